"""Places of the files that come with the package: its model, the prompts and the thesis' tables.

In a clone they lie in the folder `data`. A wheel carries that folder as `daamlib/_data` (pyproject.toml says how).
"""

from pathlib import Path

_PACKAGED = Path(__file__).resolve().parent / "_data"

# The root of the clone that the package is imported from; None where a wheel was installed
CLONE = None if _PACKAGED.is_dir() else Path(__file__).resolve().parents[1]


def bundled(name: str) -> Path:
    """Return the path of a file or folder in `data`, such as "urban-tiny"; not all of `data` is in a wheel."""
    return (CLONE / "data" if CLONE else _PACKAGED) / name
