"""The site builds offline from what is stored, and has a page or an entry for everything that it should."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard
from sphinx.util.inventory import InventoryFile

import daamlib

ROOT = Path(__file__).resolve().parents[1]
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["'](?:https?:)?//[^"']+|"""
    r"""<link(?=[^>]*\srel=["'](?:stylesheet|preload|preconnect|icon))[^>]*\shref=["'](?:https?:)?//[^"']+|"""
    r"""(?:url\(|@import )["']?(?:https?:)?//[^"')]+"""
)


def makefile_flags():
    """The arguments of `python` that `make docs` builds with, but for the folders that it writes to."""
    (line,) = re.findall(r"^SPHINX := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return line.replace(" --doctree-dir docs/_build/doctrees", "").split()


def public_names():
    """What daamlib/__init__.py exports: `from x import name as name`."""
    nodes = ast.parse(Path(daamlib.__file__).read_text()).body
    aliases = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    return {alias.asname for alias in aliases if alias.asname == alias.name}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        *makefile_flags(),
        "--doctree-dir",
        out / "doctrees",
        "--builder",
        "html",
        ".",
        out / "html",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")  # warnings are errors
    return out / "html"


@pytest.mark.slow
def test_every_notebook_has_a_page_and_a_figure_on_the_start_page(site):
    names = [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert names
    start = (site / "docs/index.html").read_text()
    for name in names:
        assert (site / f"notebooks/{name}.html").is_file()
        assert re.search(rf'<img[^>]*src="[^"]*_images/{name}-0\.(png|jpg)"', start), name
    assert "docs/index.html" in (site / "index.html").read_text()


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    found = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    objects = {name for kind, of_kind in found.data.items() if kind.startswith("py:") for name in of_kind}
    assert len(public_names()) > 10
    assert {f"daamlib.{name}" for name in public_names()} - objects == set()


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    files = [path for ending in ("html", "css") for path in site.rglob(f"*.{ending}")]
    assert len(files) > 30
    assert {path.name: found for path in files if (found := LOADED.findall(path.read_text()))} == {}


@pytest.mark.slow
def test_the_search_knows_the_pages(site):
    script = (site / "searchindex.js").read_text()
    index = json.loads(script.removeprefix("Search.setIndex(").removesuffix(")"))
    assert {"docs/index", "docs/notation", "notebooks/00_quickstart"} <= set(index["docnames"])
    assert "token" in index["terms"]


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site):
    missing = set()
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if not re.match(r"\w+:|//", link) and not (page.parent / link).exists():
                missing.add((page.name, link))
    assert missing == set()


@pytest.mark.parametrize("page", ["index", "reading", "supported", "widgets", "scale", "results"])
def test_a_guide_leads_to_the_reference(page):
    links = re.findall(r"\]\((api/\w+\.md)\)", (ROOT / f"docs/{page}.md").read_text())
    assert links and all((ROOT / "docs" / link).is_file() for link in links)


def test_install_names_the_small_build_of_torch_where_pip_is_named():
    commands = re.findall(r"^    (pip install .*)$", (ROOT / "docs/install.md").read_text(), re.MULTILINE)
    assert "torch" in commands[0] and "--index-url" in commands[0] and "<clone>" in commands[1]


def test_the_search_for_what_is_loaded_finds_it():
    for text in (
        '<script src="https://cdn.example/x.js">',
        '<script async="" src="//cdn.example/x.js">',
        "<link rel='stylesheet' href='https://fonts.example/x.css'>",
        "@font-face { src: url(https://fonts.example/x.woff) }",
    ):
        assert LOADED.search(text), text
    assert not LOADED.search('<a href="https://arxiv.org/abs/2210.04885"> <link rel="next" href="https://x.example">')


def test_the_cards_are_cards_of_the_hub():
    model = ModelCard.load(ROOT / "data/urban-tiny/README.md")
    assert (model.data.license, model.data.library_name, model.data.pipeline_tag) == (
        "mit",
        "diffusers",
        "text-to-image",
    )
    data = DatasetCard.load(ROOT / "data/urban-sample/README.md")
    assert (data.data.license, data.data.task_categories) == ("mit", ["image-segmentation"])
    assert model.data.tags and data.data.tags
    assert model.text.lstrip().startswith("# urban-tiny") and data.text.lstrip().startswith("# urban-sample")


def test_the_version_is_the_same_everywhere():
    texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")]
    patterns = [r'^version = "(.*)"$', r"^version: (.*)$", r"^## (.*)$"]
    found = [re.search(pattern, text, re.MULTILINE)[1] for pattern, text in zip(patterns, texts, strict=True)]
    assert found == [daamlib.__version__] * 3
    assert f"version = {{{daamlib.__version__}}}" in (ROOT / "docs/cite.md").read_text()
