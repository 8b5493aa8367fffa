"""Files that are complete or not there, and tensors with a JSON header in one safetensors file."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


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


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], format: str) -> None:
    """Write tensors and a header to one safetensors file, whole or not at all.

    Args:
        path: Of the file; one that is there already is replaced.
        tensors: By name, of any shape and device; they may share memory.
        header: What else is kept, of JSON's own types and with names as keys; tuples become lists.
        format: Name and version of the layout, which `load_tensors` asks for.
    """
    # safetensors writes no tensors that share memory
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"format": format, "header": header})
    with atomic_write(Path(path)) as temporary:
        save_file(copies, temporary, metadata={"daamlib": text})


def load_tensors(path: str | Path, format: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Args:
        path: Of the file.
        format: The one that the file must have.

    Returns:
        The tensors by name, on the CPU, and the header.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another program, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}, expected one of the format {format}")
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {})["daamlib"])
            # clone: what lies in the mapped file is not aligned, and products of it may round otherwise
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        if found["format"] != format:
            raise ValueError(f"its format is {found['format']}: make it anew with this version")
        return tensors, dict(found["header"])
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no readable file of the format {format}: {error}") from error
