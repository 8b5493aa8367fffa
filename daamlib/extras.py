"""Imports that may be missing or take long: pyproject.toml says which extra brings which packages."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import packages that only an extra of pyproject.toml brings: a missing one is an error that says what to install.

    When nested, the outermost extra is named.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "daamlib").partition(".")[0] == "daamlib":  # a mistake here, which no extra mends
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'daamlib[{extra}]'", name=error.name
        ) from error


def lazy(package: str, *modules: str, **names: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package (PEP 562), which imports some of its modules on first use.

    They take long to import or need an extra; `daamlib.plots.show_maps` works after `import daamlib` all the same.
    `names` are functions and classes that the package exports of such a module: {name: module}.
    """

    def get(name: str) -> Any:
        if name in modules or name in names:
            module = importlib.import_module(f".{names.get(name, name)}", package)
            return getattr(module, name) if name in names else module
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
