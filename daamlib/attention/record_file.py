"""Records on disk: one safetensors file each, the rest as JSON in its header. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..io import atomic_write
from .layers import TENSORS, Layer
from .text import TokenEmbeddings, Word

if TYPE_CHECKING:
    from .record import AttentionRecord

FORMAT = "daamlib-record-1"


def save(record: AttentionRecord, path: Path) -> None:
    """Write `record` to `path` through a temporary file beside it, so that no half-written file takes its name."""
    tensors = {"prompt_embeddings": record.prompt_embeddings.values}
    for number, layer in enumerate(record.layers):
        for name in TENSORS:
            if getattr(layer, name) is not None:
                tensors[f"{number}.{name}"] = getattr(layer, name)
    header = {
        "format": FORMAT,
        "prompt": record.prompt,
        "tokens": record.prompt_embeddings.tokens,
        "words": record.prompt_embeddings.words,
        "timesteps": record.timesteps,
        "branch": record.branch,
        "layers": [
            {"name": layer.name, "grid": layer.grid, "heads": layer.heads, "scale": layer.scale}
            for layer in record.layers
        ],
    }
    # clone: safetensors writes no tensors that share memory
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"daamlib": json.dumps(header)})


@torch.inference_mode(False)  # its tensors may be differentiated through wherever it was loaded
def load(path: Path, pipe: Any = None, device: str | torch.device | None = None) -> AttentionRecord:
    """Read a record written by `save`; device: None is where `pipe` computes, without one the CPU.

    Raises FileNotFoundError, or ValueError if the file is damaged, is no record, or is not of `pipe`'s model.
    """
    from .record import AttentionRecord
    from .trace import fingerprint_of

    if not path.is_file():
        raise FileNotFoundError(f"no attention record at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["daamlib"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, this version reads {FORMAT!r}")
        layers = tuple(_layer(number, fields, tensors) for number, fields in enumerate(header["layers"]))
        words = tuple(Word(*word) for word in header["words"])
        prompt = TokenEmbeddings(tensors["prompt_embeddings"], tuple(header["tokens"]), words)
        record = AttentionRecord(
            header["prompt"], prompt, [int(t) for t in header["timesteps"]], layers, header["branch"], pipe
        )
        _check(record)
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} is not a readable attention record, or is damaged: {error}") from error
    if pipe is None:
        return record if device is None else record.to(device)
    middle = any(layer.name.startswith("mid_block") for layer in layers)
    difference = record.fingerprint.difference(fingerprint_of(pipe, middle=middle))
    if difference:
        raise ValueError(f"{path} and the pipeline have {difference}: give the model that made it, with its LoRA")
    return record.to(device or pipe._execution_device)


def _layer(number: int, fields: dict, tensors: dict[str, torch.Tensor]) -> Layer:
    found = {name: tensors.get(f"{number}.{name}") for name in TENSORS}
    return Layer(fields["name"], tuple(fields["grid"]), int(fields["heads"]), float(fields["scale"]), **found)


def _check(record: AttentionRecord) -> None:
    """ValueError if the tensors do not fit each other."""
    if not record.layers:
        raise ValueError("it holds no layers")
    prompt, d_text = record.prompt_embeddings, record.d_text
    if tuple(prompt.values.shape) != (len(prompt.tokens), d_text):
        raise ValueError(f"it has {len(prompt.tokens)} tokens and embeddings of shape {tuple(prompt.values.shape)}")
    for layer in record.layers:
        kept = layer.query_sum if layer.queries is None else layer.queries
        expected = (layer.grid[0] * layer.grid[1], len(layer.key_weight))
        if layer.queries is not None:
            expected = (len(record.timesteps), *expected)
        fits = layer.key_weight.ndim == 2 and layer.key_weight.shape[1] == d_text
        if not fits or layer.heads < 1 or len(layer.key_weight) % layer.heads:
            got = tuple(layer.key_weight.shape)
            raise ValueError(f"the keys of {layer.name} have shape {got}, not {layer.heads} heads of width {d_text}")
        if kept is None or tuple(kept.shape) != expected:
            got = None if kept is None else tuple(kept.shape)
            raise ValueError(f"the queries of {layer.name} have shape {got}, expected {expected}")
