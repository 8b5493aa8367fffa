"""The optional dependencies: pyproject.toml says which extra brings which packages."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of packages that only `extra` brings.

    Raises ModuleNotFoundError, which says what to install, where one of them is missing. Of two nested calls the outer
    one, that of the module which was asked for, has the word.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "daamlib").partition(".")[0] == "daamlib":  # a mistake here, which no extra mends
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'daamlib[{extra}]'", name=error.name
        ) from error
