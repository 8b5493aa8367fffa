"""The optional dependencies: pyproject.toml says which extra brings which packages."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """A context for the imports of packages that only an extra brings.

    Of two nested ones the outer, that of the module which was asked for, says what to install.

    Args:
        extra: its name in pyproject.toml.

    Yields:
        Nothing.

    Raises:
        ModuleNotFoundError: with what to install, where one of the packages is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "daamlib").partition(".")[0] == "daamlib":  # a mistake here, which no extra mends
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'daamlib[{extra}]'", name=error.name
        ) from error
