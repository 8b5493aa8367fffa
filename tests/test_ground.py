"""The dependencies are said once: pyproject.toml, constraints.txt, environment.yml and the Makefile agree."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_USERS = ("datasets", "ray", "experiments", "widgets", "notebooks", "training", "fiftyone")
APART = ("fiftyone",)  # extras that `dev` leaves out, so that nothing pins what they bring
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}

# torch's own dependencies where its build is for CUDA; torch pins them exactly itself.
CUDA = ("cuda-", "nvidia-", "triton")


def declared():
    """Every requirement of pyproject.toml and the extras that `dev` installs, but for those of daamlib on itself."""
    texts = [
        *PROJECT["dependencies"],
        *(text for extra, texts in EXTRAS.items() if extra not in APART for text in texts),
    ]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != "daamlib"]


def imported(source):
    """The top-level names that Python code imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def requires(requirement):
    """What the package of a requirement asks for; of daamlib what pyproject.toml says now, installed or not."""
    if requirement.name == "daamlib":
        return [*PROJECT["dependencies"], *(text for extra in requirement.extras for text in EXTRAS[extra])]
    return importlib.metadata.requires(requirement.name) or []


def installed_by(requirement, seen):
    """Add to ``seen`` the names of all that pip installs for ``requirement`` on this machine."""
    name = canonicalize_name(requirement.name)
    if (name, frozenset(requirement.extras)) in seen or name.startswith(CUDA):
        return seen
    seen.add((name, frozenset(requirement.extras)))
    for text in requires(requirement):
        child = Requirement(text)
        environments = [{**default_environment(), "extra": extra} for extra in ("", *requirement.extras)]
        if child.marker is None or any(child.marker.evaluate(environment) for environment in environments):
            installed_by(child, seen)
    return seen


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_each_dependency_is_pinned_within_its_range(requirement):
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_the_pins_are_exact_plain_and_unique():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in LINES)
    assert len(PINS) == len(LINES)


def test_everything_that_the_dev_extra_installs_is_pinned():
    names = {name for name, _ in installed_by(Requirement("daamlib[dev]"), set())} - {"daamlib"}
    assert names - PINS.keys() == set()


def test_the_extras_for_users_have_a_lower_bound_and_no_other():
    texts = [*PROJECT["dependencies"], *(text for name in FOR_USERS for text in EXTRAS[name])]
    bounds = {text: [part.operator for part in Requirement(text).specifier] for text in texts}
    assert {text: found for text, found in bounds.items() if found != [">="] and "daamlib" not in text} == {}


def test_the_versions_that_other_files_count_on():
    assert "nbval==0.11.0" in EXTRAS["test"]
    assert "daamlib[test]" in EXTRAS["dev"]


def test_conda_installs_the_same_through_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert pip == "pip"
    assert packages == {"pip": ["-c constraints.txt", "-e .[dev]"]}
    name, version = python.split("=")
    assert name == "python"
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)


@pytest.mark.parametrize("folder", ["daamlib", "daamlib_lab", "training", "tests"])
def test_what_the_code_imports_is_declared(folder):
    extras = [text for name in FOR_USERS + ("test", "docs") * (folder == "tests") for text in EXTRAS[name]]
    allowed = {canonicalize_name(Requirement(text).name) for text in [*PROJECT["dependencies"], *extras]}
    owners = importlib.metadata.packages_distributions()
    files = [path for path in (ROOT / folder).rglob("*.py") if path.name != "peers.py"]  # has an environment of its own
    assert files
    for path in files:
        own = {
            "daamlib",
            "daamlib_lab",
            "training",
            "tests",
            *(other.stem for other in (*path.parent.iterdir(), *(ROOT / "tests").iterdir())),
        }
        for name in set(imported(path.read_text())) - sys.stdlib_module_names - own:
            # what is not installed has, as far as is known, the name of its package
            owner = {canonicalize_name(distribution) for distribution in owners.get(name, [name])}
            assert owner & allowed, f"{path} imports {name}, which pyproject.toml does not ask for"
