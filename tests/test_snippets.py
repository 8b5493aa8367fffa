"""Every Python snippet of the README, the site's pages, the cards and the docstrings runs, on the bundled model.

The snippets of a page run in order and share their names. `names` says which names a page may use without making them.
"""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import shutil
import textwrap
from pathlib import Path

import diffusers
import matplotlib
import numpy as np
import pytest
import tiny_joint
import torch
from PIL import Image
from test_site import public_names

import daamlib
import daamlib_lab
from daamlib import datasets, widgets
from daamlib.datasets import export
from daamlib_lab.experiments import segmentation
from daamlib_lab.urban.annotator import labels_for

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("data/*/README.md"))]
PROMPT = "a red car and a person in an urban environment"
STEPS = 2  # at most, whatever a snippet says
SECTION = re.compile(r"^(?:Args|Attributes|Raises|Returns|Yields):\Z", re.MULTILINE)


def python_blocks(text):
    """(line, code) of each block that is marked as Python."""
    for match in re.finditer(r"^( *)```python\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start(2)) + 1, textwrap.dedent(match[2])


def indented_blocks(docstring):
    """(line, code) of each indented block that is Python: no formula, and nothing under `Args:` and the like."""
    for match in re.finditer(r"(?:^ {4,}.*\n|^\n)+", docstring + "\n", re.MULTILINE):
        before = docstring[: match.start()].rstrip()
        code = textwrap.dedent(match[0]).strip("\n")
        if not SECTION.search(before) and is_python(code):
            yield before.count("\n") + 1, code


def is_python(code):
    try:
        return any(isinstance(node, ast.Call) for node in ast.walk(ast.parse(code)))
    except SyntaxError:
        return False


def documented():
    """(module, name, docstring) of the package's modules, and of their classes and functions."""
    packages = [*pkgutil.walk_packages(daamlib.__path__, "daamlib.")]
    packages += pkgutil.walk_packages(daamlib_lab.__path__, "daamlib_lab.")
    for info in packages:
        if info.name.endswith("__main__") or "._data" in info.name:
            continue
        module = importlib.import_module(info.name)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                yield module, getattr(node, "name", ""), ast.get_docstring(node)


EXAMPLES = [
    (module, name, list(indented_blocks(text))) for module, name, text in documented() if any(indented_blocks(text))
]


def run(blocks, path, names):
    """Run blocks in one namespace; a traceback names the page and its line."""
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Few steps, an empty folder with the repository's `data`, and no window."""
    whole = diffusers.StableDiffusionPipeline.__call__

    @functools.wraps(whole)
    def call(self, *args, num_inference_steps=STEPS, **options):
        return whole(self, *args, num_inference_steps=min(num_inference_steps, STEPS), **options)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", call)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    matplotlib.use("agg")


@pytest.fixture(scope="module")
def example():
    """The bundled model, two traced images with masks of a car, and tokens of a car and a person fitted to them."""
    pipe = daamlib.load_pipeline(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with daamlib.trace(pipe, self_attention=True) as trace:
        images = pipe([PROMPT, PROMPT], num_inference_steps=STEPS, generator=generator).images
    height, width = np.asarray(images[0]).shape[:2]
    masks = np.zeros((2, height, width), dtype=bool)
    masks[:, height // 2 :, : width // 2] = True
    car, person = (
        daamlib.optimize_token(list(trace), list(part), word=word)
        for word, part in (("car", masks), ("person", ~masks))
    )
    return {
        "pipe": pipe,
        "records": list(trace),
        "record": trace[0],
        "images": images,
        "image": images[0],
        "masks": list(masks),
        "mask": masks[0],
        "car": car,
        "person": person,
    }


@pytest.fixture(scope="module")
def files(example, tmp_path_factory):
    """A folder with a record, a token, a label map, and a dataset of one image that it was imported to."""
    folder = tmp_path_factory.mktemp("files")
    example["record"].save(folder / "car.safetensors")
    example["car"].save(folder / "car-token.safetensors")
    labeller = datasets.TokenLabeller((example["car"],))
    dataset = datasets.generate(example["pipe"], [PROMPT], folder / "made", steps=STEPS, labeller=labeller)
    (folder / "labels").mkdir()
    Image.fromarray(drawn(example["mask"])).save(folder / "labels" / "00000.png")
    datasets.import_masks(dataset, folder / "labels")
    return folder


def drawn(mask):
    """A label map of Cityscapes: a car in the mask, a person beside it, neither in the first rows."""
    labels = np.where(mask, 26, 24).astype(np.uint8)
    labels[:16] = 0
    return labels


@pytest.fixture
def names(example, files, tmp_path, monkeypatch):
    """What a snippet may use without making it. One place: a page that needs another name adds it here."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    dataset, labels = datasets.load(tmp_path / "made"), drawn(example["mask"])

    def annotate(images, classes, folder):
        """The widget, and the hand that draws in it."""
        annotator = open_widget(images, classes, folder)
        first, second = annotator.session.names[:2]
        ids = annotator.session.class_list.ids
        painted = np.select([labels == 26, labels == 24], [ids[first], ids[second]]).astype(np.uint8)
        Path(folder, "labels").mkdir(exist_ok=True)
        for number in range(annotator.count if isinstance(images, datasets.Dataset) else 1):
            Image.fromarray(painted).save(Path(folder, "labels", f"{number:05}.png"))
        return annotator

    open_widget = widgets.annotate
    monkeypatch.setattr(widgets, "annotate", annotate)
    return {
        **example,
        "MODEL": daamlib.pipeline.BUNDLED,
        "annotate": annotate,
        "daamlib": daamlib,
        "dataset": dataset,
        "datasets": datasets,
        "export": export,
        "segmentation": segmentation,
        "test_set": dataset,
        "labels_for": labels_for,
        "urban_prompts": lambda n: datasets.urban_prompts(min(n, 2)),
        "token": example["car"],
    }


@functools.cache
def joint_example():
    """What the examples of joint models' docstrings may use: a tiny pipeline, and a traced image."""
    pipe = tiny_joint.shared("SD 3")
    (record,) = tiny_joint.traced(pipe)
    masks = [record.daam()["car"] > record.daam()["car"].median()]
    image = Image.new("RGB", (48, 32))  # of the maps' ratio
    return {"pipe": pipe, "record": record, "image": image, "records": [record], "masks": masks}


@pytest.mark.parametrize(
    "path", [path for path in PAGES if any(python_blocks(path.read_text()))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_snippets_of_a_page_run(path, names):
    run(python_blocks(path.read_text()), path, names)


@pytest.mark.parametrize("module, name, blocks", EXAMPLES, ids=[f"{m.__name__} {n}".strip() for m, n, _ in EXAMPLES])
def test_the_examples_of_a_docstring_run(module, name, blocks, names):
    if name == "fiftyone":
        pytest.importorskip("fiftyone", reason="fiftyone is not installed: docs/formats.md says how")
    joint = joint_example() if module.__name__.endswith(".probe") or ".joint" in module.__name__ else {}
    run(blocks, module.__file__, {**vars(module), **names, **joint})


def test_there_are_examples_in_pages_and_docstrings():
    assert {path.name for path in PAGES if any(python_blocks(path.read_text()))} >= {"README.md", "formats.md"}
    assert {module.__name__ for module, _, _ in EXAMPLES} >= {"daamlib.datasets", "daamlib.widgets"}


def test_every_exported_name_has_an_example():
    bare = {name for name in public_names() if not any(indented_blocks(inspect.getdoc(getattr(daamlib, name)) or ""))}
    assert bare == set()


def test_no_example_lost_its_indentation():
    """The formatter takes it where nothing but the example follows the first line; then it is prose, and not run."""
    paragraphs = [(m.__name__, name, part) for m, name, text in documented() for part in text.split("\n\n")[1:]]
    assert [found for found in paragraphs if not found[2].startswith(" ") and is_python(found[2])] == []


def test_a_broken_snippet_fails_and_its_page_and_line_are_named():
    page = "# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nprint(x)\nprint(y)\n```\n"
    with pytest.raises(NameError, match="'y'") as caught:
        run(python_blocks(page), "page.md", {})
    where = caught.traceback[-1]
    assert (Path(where.path).name, where.lineno + 1) == ("page.md", 11)
    docstring = "Do it.\n\n    x = missing(1)\n\nArgs:\n    x: of one (or two)\n"
    with pytest.raises(NameError, match="'missing'"):
        run(indented_blocks(docstring), "module.py", {})
