"""Values that hold tensors, however deep: on which device, how many bytes, and how many are free there."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch


def on_device(value: Any, device: str | torch.device, known: dict[int, torch.Tensor] | None = None) -> Any:
    """Return a value with its tensors on `device`; a tensor that occurs several times is moved once."""
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        if id(value) not in known:
            known[id(value)] = value.to(device)
        return known[id(value)]
    if isinstance(value, Mapping):
        return {name: on_device(part, device, known) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([on_device(part, device, known) for part in value])
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: on_device(getattr(value, each.name), device, known) for each in fields(value)}
        return replace(value, **parts)
    return value


def bytes_of(*values: Any) -> int:
    """Return the bytes of all tensors in these values; a tensor that occurs several times counts once."""
    return sum({id(tensor): tensor.nbytes for tensor in _tensors(values)}.values())


def free_bytes(device: torch.device) -> float:
    """Return the bytes that can still be allocated on a device, infinity where the system does not say."""
    if device.type == "cuda" and torch.cuda.is_available():
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    table = Path("/proc/meminfo")  # of Linux
    if device.type != "cpu" or not table.exists():
        return math.inf
    lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors([getattr(value, each.name) for each in fields(value)])
