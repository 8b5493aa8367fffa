"""The core works with its own dependencies, each extra is enough for its modules, and what is missing is named.

Every test runs in a fresh interpreter that finds only what pip would have installed.
"""

import importlib.metadata
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_ground import installed_by

MODULES = {
    "datasets": ["daamlib.datasets", "daamlib.generate", "daamlib.datasets.export"],
    "experiments": ["daamlib_lab.experiments", "daamlib_lab.experiments.segmentation"],
    "widgets": ["daamlib.widgets"],
    "notebooks": ["daamlib_lab.diagrams", "daamlib.plots", "daamlib_lab.runs"],
    "training": [f"training.{name}" for name in ("annotator", "evaluate", "run", "sample", "train")],
}

HIDE = """
import re, sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        found = super().find_distributions(*context)
        return (one for one in found if re.sub("[-_.]+", "-", one.name).lower() in installed)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""

CORE = """
import daamlib, daamlib_lab.urban.annotator
from daamlib import metrics

pipe = daamlib.load_pipeline(device="cpu")
with daamlib.trace(pipe) as trace:
    image = pipe("a car and a tree", num_inference_steps=2).images[0]
real = daamlib.trace_image(pipe, image, prompt="a car")
heat, other = trace[0].daam()["car"], real.ldaam("tree")["tree"]
mask = heat > heat.median()
token = daamlib.optimize_token([trace[0]], [mask.numpy()], word="car")
print(metrics.max_miou(heat[None], mask[None]), *other.shape, *token.maps(real)["car"].shape)
"""

MISSING = """
import importlib
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(module, error, sep=": ")
"""


def run(code, extras=(), **names):
    """What `code` prints to stdout and stderr where daamlib has only these extras; `names` are set before it runs."""
    there = {name for name, _ in installed_by(Requirement(f"daamlib[{','.join(extras)}]"), set())}
    owners = importlib.metadata.packages_distributions()
    hidden = {name for name, of in owners.items() if not there & {canonicalize_name(o) for o in of}}
    assert "pytest" in hidden and "torch" not in hidden
    names |= {"installed": there, "hidden": hidden}
    given = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    done = subprocess.run([sys.executable, "-c", given + HIDE + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_core_needs_no_extra():
    printed, warned = run(CORE)
    best, *shapes = printed.split()
    assert "accelerate" not in warned
    assert float(best) > 0.9
    assert shapes == ["32"] * 4


def test_a_module_without_its_extra_says_what_to_install():
    printed, _ = run(MISSING, modules=[module for modules in MODULES.values() for module in modules])
    lines = printed.splitlines()
    expected = [(module, extra) for extra, modules in MODULES.items() for module in modules]
    assert len(lines) == len(expected)
    for line, (module, extra) in zip(lines, expected, strict=True):
        assert line.startswith(f"{module}: ")
        assert line.endswith(f" is not installed: pip install 'daamlib[{extra}]'")


@pytest.mark.slow
@pytest.mark.parametrize("extra", MODULES)
def test_an_extra_is_enough_for_its_modules(extra):
    printed, _ = run(MISSING, [extra], modules=MODULES[extra])
    assert printed == ""
