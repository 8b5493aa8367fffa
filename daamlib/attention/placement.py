"""Values that hold tensors, however deep: on which device, and how many bytes."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
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
