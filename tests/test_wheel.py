"""A wheel built from the tree, installed in an environment of its own, works outside the clone."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tree: setuptools leaves its `build` behind and would pack what lies in an old one."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("daamlib", "daamlib_lab", "data"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", tree / "dist", tree], check=True)
    (path,) = (tree / "dist").glob("daamlib-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Run the interpreter of an environment that holds the wheel, in an empty folder; return the finished process."""
    folder, outside = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("outside")
    venv.create(folder, with_pip=False)
    here = folder / "bin" / "python"
    subprocess.run([*PIP, "--python", here, "install", "--no-deps", "--no-index", wheel], check=True)
    # The dependencies are those of the environment of the tests, which would take minutes to install anew. Python does
    # not read the .pth files of a folder that is named in one, so that an editable daamlib there stays out of sight.
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # -I: neither PYTHONPATH nor the current folder counts
    return lambda *arguments: subprocess.run(
        [here, "-I", *arguments], cwd=outside, capture_output=True, text=True, errors="replace"
    )


@pytest.mark.slow
def test_the_wheel_holds_all_code_and_the_data_that_it_reads(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    packages = (ROOT / "daamlib", ROOT / "daamlib_lab")
    files = [path for package in packages for path in package.rglob("*.*") if path.suffix != ".pyc"]
    code = {path.relative_to(ROOT).as_posix() for path in files}
    model = {
        f"daamlib/_data/urban-tiny/{path.relative_to(ROOT / 'data/urban-tiny').as_posix()}"
        for path in (ROOT / "data/urban-tiny").rglob("*.*")
    }
    assert len(code) > 50 and len(model) > 15
    data = {name for name in inside if name.startswith("daamlib/_data/")}
    run = ("results.csv", "curves.csv", "differences.csv", "iou.npz", "metrics.json")
    tables = ("thesis_tables.csv", "prompts/urban.json", *(f"tables-200/{name}" for name in run))
    draws = {f"daamlib/_data/street-sets/{path.name}" for path in (ROOT / "data/street-sets").glob("*.json")}
    assert draws and data == model | draws | {f"daamlib/_data/{name}" for name in tables}
    assert {name for name in inside if ".dist-info/" not in name} == code | data


@pytest.mark.slow
def test_the_quick_example_of_the_readme_works_outside_the_clone(python):
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"## Ten lines\n\n```python\n(.*?)```", readme, re.DOTALL)[1]
    example += "\nprint(daamlib.__file__, tuple(car.shape), image.size, mask.shape, sep='\\n')"
    done = python("-c", example)
    assert done.returncode == 0, done.stderr
    where, *shapes = done.stdout.splitlines()
    assert Path(where).parts[-3:] == ("site-packages", "daamlib", "__init__.py")
    assert ROOT not in Path(where).parents
    assert shapes == ["(32, 32)", "(128, 128)", "torch.Size([128, 128])"]


@pytest.mark.slow
def test_prompts_tables_and_annotator_are_found_outside_the_clone(python):
    code = """
from daamlib import datasets
from daamlib_lab import experiments
from daamlib_lab.urban.annotator import load_annotator
print(len(datasets.urban_prompts(3)), len(experiments.thesis_values()), type(load_annotator()).__name__)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    prompts, values, annotator = done.stdout.split()
    assert (prompts, annotator) == ("3", "SegformerForSemanticSegmentation")
    assert int(values) > 50


@pytest.mark.slow
def test_the_runner_says_where_notebooks_come_from(python):
    done = python("-m", "daamlib_lab.runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--notebooks-dir CLONE/notebooks" in done.stderr
