"""Files that are complete or not there, and tensors or dataclasses in one safetensors file with a JSON header."""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

T = TypeVar("T")


@contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """Yield a name next to `path` to write to; what is left under it afterwards is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def in_the_making(path: Path) -> bool:
    """Return whether a `temporary_name` belongs to another process of this machine that runs."""
    process = path.name.split(".")[-2]
    if not process.isdigit() or int(process) in (1, os.getpid()) or os.name == "nt":  # 1: init, which writes none
        return False  # and on Windows `kill` with 0 would end the process
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return True


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a name next to `path` to write to; it becomes `path` on leaving, and is removed after an error."""
    with temporary_name(path) as temporary:
        temporary.touch()  # with the permissions of the umask; safetensors makes files that only their owner can read
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        temporary.replace(path)


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], format: str) -> None:
    """Write tensors and a header to one safetensors file, whole or not at all; a file that is there is replaced.

    The tensors may have any shape and device, and share memory. The header holds JSON's own types; tuples become lists.
    `format` is the name and version of the layout, which `load_tensors` asks for.
    """
    # safetensors writes no tensors that share memory
    plain = torch.contiguous_format
    copies = {name: tensor.detach().cpu().clone(memory_format=plain) for name, tensor in tensors.items()}
    text = json.dumps({"format": format, "header": header, "checksum": _checksum(copies, header)})
    with atomic_write(Path(path)) as temporary:
        save_file(copies, temporary, metadata={"daamlib": text})


def load_tensors(path: str | Path, format: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: the tensors by name, on the CPU, and the header.

    Raises FileNotFoundError, or ValueError for a file that is damaged, of another program, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}, expected one of the format {format}")
    try:
        with safe_open(path, "pt") as file:
            written = _header(file, format)
            # clone: what lies in the mapped file is not aligned, and products of it may round otherwise
            tensors, header = {name: file.get_tensor(name).clone() for name in file.keys()}, dict(written["header"])
        if written.get("checksum") not in (None, _checksum(tensors, header)):
            raise ValueError("its values are not those that were written")
        return tensors, header
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(path, format, error) from error


def _checksum(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> int:
    """CRC of a header and of tensors on the CPU; files of before it was stored have none."""
    crc = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def save_dataclass(path: str | Path, instance: Any, format: str) -> None:
    """Write a dataclass to one safetensors file: its tensors as such, all else as JSON in the header.

        save_dataclass("token.safetensors", token, "daamlib-token-3")
        token = load_dataclass(daamlib.OptimizedToken, "token.safetensors", "daamlib-token-3")

    It may hold tensors, JSON's own types, tuples, mappings by text, and dataclasses of these.
    """
    tensors: dict[str, torch.Tensor] = {}
    save_tensors(path, tensors, _plain(instance, "", tensors), format)


def load_dataclass(kind: type[T], path: str | Path, format: str) -> T:
    """Read the dataclass `kind` that `save_dataclass` wrote, its tensors on the CPU.

    Fields that the file does not have get their default. Raises as `load_tensors`, and ValueError for other fields.
    """
    tensors, header = load_tensors(path, format)
    try:
        return _restored(kind, header, "", tensors)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another format than {format}: {error}") from error


def _plain(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value in JSON's own types; its tensors go to `tensors`, under places such as layers.0.queries."""
    if isinstance(value, torch.Tensor):
        tensors[place] = value
        return None
    if isinstance(value, list | tuple):
        return [_plain(part, f"{place}.{number}", tensors) for number, part in enumerate(value)]
    is_mapping = isinstance(value, Mapping)
    if is_dataclass(value):
        value = {part.name: getattr(value, part.name) for part in fields(value)}
    if not isinstance(value, Mapping):
        return value
    parts = {name: _plain(part, f"{place}.{name}".lstrip("."), tensors) for name, part in value.items()}
    # the header lists all names of a mapping; those of a dataclass are known
    return {name: part for name, part in parts.items() if is_mapping or not isinstance(value[name], torch.Tensor)}


def _restored(kind: Any, value: Any, place: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Invert `_plain` by the type annotation `kind`. Raises TypeError or ValueError that names the place."""
    if place in tensors:
        return tensors[place]
    if isinstance(kind, type) and is_dataclass(kind):
        hints, given = get_type_hints(kind), {}
        for part in fields(kind):
            inner = f"{place}.{part.name}".lstrip(".")
            if part.name in value or inner in tensors:
                given[part.name] = _restored(hints[part.name], value.get(part.name), inner, tensors)
            elif part.default is MISSING and part.default_factory is MISSING:
                raise ValueError(f"{inner} is missing")
        if set(value) - set(given):
            raise ValueError(f"{place or 'it'} has the unexpected {', '.join(sorted(set(value) - set(given)))}")
        return kind(**given)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        some = next(part for part in parts if part is not NoneType)
        return None if value is None and NoneType in parts else _restored(some, value, place, tensors)
    expected = {tuple: list, list: list, Mapping: dict, dict: dict, float: int | float}.get(origin or kind, kind)
    if expected in (list, dict, str, bool, int, int | float) and not isinstance(value, expected):
        raise TypeError(f"{place} is {value!r}, expected {kind}")
    if origin in (tuple, list):
        kinds = parts if origin is tuple and Ellipsis not in parts else parts[:1] * len(value)
        pairs = enumerate(zip(kinds, value, strict=True))
        return origin(_restored(inner, part, f"{place}.{number}", tensors) for number, (inner, part) in pairs)
    if expected is dict and parts:
        return {name: _restored(parts[1], part, f"{place}.{name}", tensors) for name, part in value.items()}
    return value


def check_file(path: Path) -> dict[str, Any]:
    """Read the header of what `save_tensors` wrote. Raises ValueError for a file that is cut, or of another program."""
    try:
        with safe_open(path, "pt") as file:
            return dict(_header(file)["header"])
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise _unreadable(path, "daamlib", error) from error


def _header(file: Any, format: str | None = None) -> dict[str, Any]:
    """Return what `save_tensors` wrote: format and header. Raises ValueError that says what the file is."""
    metadata = file.metadata() or {}
    if "daamlib" not in metadata:
        names = ", ".join(list(file.keys())[:2])
        raise ValueError(f"it is a safetensors file of another program, with tensors such as {names}")
    written = json.loads(metadata["daamlib"])
    if format is not None and written["format"] != format:
        kind, read = _KINDS.get(written["format"].rpartition("-")[0], ("a file", "")), format.rpartition("-")[0]
        if written["format"].startswith(read + "-") or not kind[1]:
            raise ValueError(f"its format is {written['format']}: make it anew with this version")
        raise ValueError(f"it is {kind[0]} ({written['format']}), which {kind[1]} reads")
    return written


# what `save_tensors` is used for, by the format's name, and what reads it
_KINDS = {
    "daamlib-token": ("an optimised token", "daamlib.OptimizedToken.load"),
    "daamlib-record": ("an attention record", "daamlib.AttentionRecord.load"),
    "daamlib-joint-record": ("a record of a joint model", "daamlib.JointRecord.load"),
}
_BEGINNINGS = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"PK\x03\x04": "a zip or PyTorch file",
    b"{": "JSON",
}


def _unreadable(path: Path, format: str, error: Exception) -> ValueError:
    """Return the error of a file that is not of the format; it says what the file is, if its first bytes show it."""
    with path.open("rb") as file:
        begins = file.read(8)
    kind = next((kind for start, kind in _BEGINNINGS.items() if begins.startswith(start)), None)
    reason = "it is empty" if not begins else f"it is {kind}" if kind else error
    return ValueError(f"{path} is no readable file of the format {format}: {reason}")
