"""The house: which module may import which, and who may use what. All is read from the source."""

import ast
import importlib.metadata
import io
import json
import re
import tokenize
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_ground import EXTRAS, FOR_USERS

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("daamlib", "daamlib_lab", "training")  # none imports one that stands after it
CORE, SEAM = ("attention", "tokens", "datasets", "widgets"), ("readers", "joint")
# `np.clip` and the argument `clip_skip` are none
FAMILY = re.compile(
    r"CLIP|(?i:(?<![a-z])(unet|t5|gpt2|gemma|qwen|flux|sana|pixart|audioldm|sdxl|sd[123]|(up|mid|down)_block))"
)
FLOORS = 6  # so many rooms of the library stand on one another at most
LINES = {"daamlib": 12_578, "daamlib_lab": 3_811, "training": 1_580}  # at most; to be lowered, never raised
FUNCTION, CLASS = 60, 250  # lines at most


def module_name(path):
    """daamlib/tokens/token.py is daamlib.tokens.token, and an __init__.py is its package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = [path for house in HOUSES for path in sorted((ROOT / house).rglob("*.py"))]
TREES = {module_name(path): ast.parse(path.read_text()) for path in SOURCES}
TESTS = {path.stem: ast.parse(path.read_text()) for path in sorted(Path(__file__).parent.rglob("*.py"))}
PACKAGES = {module_name(path) for path in SOURCES if path.name == "__init__.py"}


def imports(module, node):
    """The dotted names that an import statement of a module asks for: modules, or names in modules."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = module if module in PACKAGES else module.rpartition(".")[0]
    base = package.rsplit(".", node.level - 1)[0] if node.level else ""
    source = ".".join(filter(None, (base, node.module)))
    return [f"{source}.{alias.name}" for alias in node.names]


def imported(module, tree=None):
    """All dotted names that a module, or a part of it, imports."""
    nodes = ast.walk(tree or TREES[module])
    return {name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for name in imports(module, node)}


def owner(name):
    """The module of daamlib that a dotted name is or is in; None for what is not of daamlib."""
    return next((part for part in (name, name.rpartition(".")[0]) if part in TREES), None)


GRAPH = {module: {owner(name) for name in imported(module)} - {module, None} for module in TREES}


def leads_to(module):
    """All modules that importing a module imports, by whatever way."""
    found, todo = set(), [module]
    while todo:
        new = GRAPH[todo.pop()] - found
        found |= new
        todo += new
    return found


def circles():
    """Imports by which a module leads back to itself."""
    return {f"{a} imports {b} in a circle" for a in GRAPH for b in GRAPH[a] if a in leads_to(b)}


def house(module):
    """The number of the house that a module stands in."""
    return HOUSES.index(module.split(".")[0])


def imports_of_later_houses():
    """Imports of the laboratory or the training by the library, and of the training by the laboratory."""
    return {f"{a} imports {b}" for a in GRAPH for b in GRAPH[a] if house(b) > house(a)}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(tree):
    """The names with an underscore that a module defines: functions, classes, variables, attributes of `self`."""
    nodes = list(ast.walk(tree))
    stored = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in stored if isinstance(node, ast.Name)}
    names |= {node.attr for node in stored if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"}
    return set(filter(is_private, names))


def private_names_of_others():
    """Uses of a private name that only other modules define, in modules and in tests."""
    owners = defaultdict(set)
    for module, tree in TREES.items():
        for name in private_names(tree):
            owners[name].add(module)
    found = set()
    for user, tree in (TREES | TESTS).items():
        nodes = list(ast.walk(tree))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        others = {name for name in used & owners.keys() if user not in owners[name]} - private_names(tree)
        found |= {f"{user} uses {name} of another module" for name in others}
    return found


def optional_packages():
    """What can be imported of the packages that only an extra brings."""
    extras = {canonicalize_name(Requirement(text).name) for extra in FOR_USERS for text in EXTRAS[extra]} - {"daamlib"}
    owners = importlib.metadata.packages_distributions()
    return extras | {name for name, of in owners.items() if extras & {canonicalize_name(one) for one in of}}


SLOW = {
    "diffusers",
    "huggingface_hub",
    "transformers",
}  # `import daamlib` takes the time of torch alone, see test_doors.py


def imports_in_functions():
    """Imports inside of functions, but for those of packages that may be missing or take seconds."""
    optional, found = optional_packages() | SLOW, set()
    for module, tree in TREES.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        names = {name for function in functions for name in imported(module, function)}
        found |= {f"{module} imports {name} in a function" for name in names if name.split(".")[0] not in optional}
    return found


def names_of_families():
    """Names of model families in the core's code, outside of the readers; docstrings and errors may give examples."""
    found = set()
    for module, tree in TREES.items():
        parts = module.split(".")[1:]
        if house(module) or not parts or parts[0] not in CORE or set(parts) & set(SEAM):
            continue
        nodes = list(ast.walk(tree))
        docstrings = [node for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
        errors = [node for node in nodes if isinstance(node, ast.Raise)]
        told = {part for node in docstrings + errors for part in ast.walk(node)}
        fields = [value for node in nodes if node not in told for _, value in ast.iter_fields(node)]
        found |= {f"{module} names {word}" for word in fields if isinstance(word, str) and FAMILY.search(word)}
    return found


def room(module):
    """The package, or the module at the top, that a module belongs to; the training is one room."""
    return "training" if module.startswith("training") else ".".join(module.split(".")[:2])


def floors():
    """The floor of each room, from 1: one above the highest room that it imports."""
    rooms = defaultdict(set)
    for a in GRAPH:
        rooms[room(a)] |= {room(b) for b in GRAPH[a]} - {room(a)}
    found = {}
    for name in TopologicalSorter(rooms).static_order():  # it raises CycleError, and names the circle
        found[name] = 1 + max((found[other] for other in rooms[name]), default=0)
    return found


CHECKS = [circles, imports_of_later_houses, private_names_of_others, imports_in_functions, names_of_families]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_modules_keep_to(check):
    assert check() == set()


def test_the_rooms_stand_on_few_floors():
    found = {name: floor for name, floor in floors().items() if house(name) == 0}
    assert max(found.values()) <= FLOORS, found


def long_definitions():
    """Functions and classes of more lines than they may have."""
    found = set()
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                most = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
                if node.end_lineno - node.lineno + 1 > most:
                    found.add(f"{module} {node.name}")
    return found


def test_no_function_and_no_class_is_long():
    assert long_definitions() == set()


def test_the_houses_stay_small():
    lines = {name: sum(len(p.read_text().splitlines()) for p in (ROOT / name).rglob("*.py")) for name in HOUSES}
    assert {name: found for name, found in lines.items() if found > LINES[name]} == {}


# Docstrings begin with a verb or a noun
BEGINNINGS = re.compile(r"(What|Whether|Where|How|Those|That|Of|The same|The one)\b")
# Words that have a private sense here: say given, stored, result, next to, requested, unexpected, custom, re-run
PRIVATE = re.compile(
    r"\b(told|kept|found|besides?|wanted|odd|of (one's|its|your|their) own|made again|runs? along)\b", re.I
)


def unplain(source):
    """Docstrings of a source that begin in another way, and private words in its docstrings and comments."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = [text for text in map(ast.get_docstring, nodes) if text]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    words = [match[0] for text in docstrings + comments for match in PRIVATE.finditer(" ".join(text.split()))]
    return [text.splitlines()[0] for text in docstrings if BEGINNINGS.match(text)] + words


def test_the_english_is_plain():
    findings = {str(path.relative_to(ROOT)): unplain(path.read_text()) for path in SOURCES}
    assert {path: texts for path, texts in findings.items() if texts} == {}


def test_english_that_is_not_plain_is_seen():
    source = '"""What a file holds."""\ndef f():\n    """Return what was kept."""\n    x = "told"  # an odd one\n'
    assert unplain(source) == ["What a file holds.", "kept", "odd"]


@pytest.mark.parametrize("package", ["daamlib", "daamlib_lab"])
def test_the_notebooks_import_from_few_modules(package):
    cells = [
        "".join(cell["source"])
        for path in (ROOT / "notebooks").glob("*.ipynb")
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith(("%", "!")))
    nodes = list(ast.walk(ast.parse(code)))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules = {name for name in modules if name.split(".")[0] == package}
    assert 2 <= len(modules) <= 5, modules


def test_the_checks_see_what_they_look_for(monkeypatch):
    code = {
        "daamlib.a": "from .b import _hidden\nimport training\n_own = 1\n_own.x._private\nimport json",
        "daamlib.b": "class B:\n    def _private(self):\n        import daamlib.a, ray, json\n_hidden = 1",
        "training": "",
        "daamlib.attention.readers.b": "'up_blocks'",
        "daamlib.tokens": "'''as of PixArt'''\nup = a.clip(clip_skip) or 'up_blocks.1'\nraise ValueError(f'SDXL {up}')",
    }
    code["daamlib.tokens"] += "\ndef f():\n" + "    x = 1\n" * FUNCTION
    monkeypatch.setattr(f"{__name__}.TREES", {module: ast.parse(text) for module, text in code.items()})
    assert long_definitions() == {"daamlib.tokens f"}
    monkeypatch.setattr(f"{__name__}.TESTS", {"test_b": ast.parse("from daamlib.b import B, _hidden")})
    graph = {"daamlib.a": {"daamlib.b", "training"}, "daamlib.b": {"daamlib.a"}, "training": set()}
    graph |= {"daamlib.attention.readers.b": set(), "daamlib.tokens": set()}
    assert {module: {owner(name) for name in imported(module)} - {None} for module in code} == graph
    monkeypatch.setattr(f"{__name__}.GRAPH", graph)
    assert circles() == {"daamlib.a imports daamlib.b in a circle", "daamlib.b imports daamlib.a in a circle"}
    assert imports_of_later_houses() == {"daamlib.a imports training"}
    assert private_names_of_others() == {
        "daamlib.a uses _hidden of another module",
        "daamlib.a uses _private of another module",
        "test_b uses _hidden of another module",
    }
    assert imports_in_functions() == {f"daamlib.b imports {name} in a function" for name in ("daamlib.a", "json")}
    assert names_of_families() == {"daamlib.tokens names up_blocks.1"}
