"""Files that are complete or not there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is left under it afterwards is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` on leaving, and is removed after an error."""
    with temporary_name(path) as temporary:
        yield temporary
        temporary.replace(path)
