"""The file of a record: its tensors in one `.safetensors` file, everything else as JSON in its header."""

import math
from pathlib import Path
from typing import Any

import torch

from ..io import load_tensors, save_tensors
from .layers import KeyProjection, Layer
from .ldaam import LinearMap
from .self_attention import SelfAttention
from .text import TokenEmbeddings

FORMAT = "daamlib-record-2"
OF_LAYER, OF_KEYS = ("queries", "query_sum"), ("weight", "bias", "norm")  # tensors
OF_SELF_ATTENTION, OF_MAP = ("queries", "keys", "mean"), ("weight", "bias")
PLAIN = ("prompt", "timesteps", "branch", "stream", "masked")  # fields of a record that are JSON as they are


def write(record: Any, path: str | Path) -> None:
    """Write an `AttentionRecord` to a file."""
    tensors = {"prompt_embeddings": record.prompt_embeddings.values, "encoder_check": record.encoder_check}
    for number, layer in enumerate(record.layers):
        tensors |= _tensors_of(layer.to_k, f"{number}.key_", OF_KEYS) | _tensors_of(layer, f"{number}.", OF_LAYER)
        tensors |= {f"{number}.maps.{key}": values for key, values in enumerate(layer.maps.values())}
    tensors |= {f"texts.{key}": text.values for key, text in enumerate(record.texts.values())}
    tensors |= _tensors_of(record.self_attention, "self.", OF_SELF_ATTENTION)
    tensors |= _tensors_of(record.kept_map, "linear.", OF_MAP)
    header = {name: getattr(record, name) for name in PLAIN} | {
        "self_attention": record.self_attention and _shape_of(record.self_attention, "linear"),
        "tokens": record.prompt_embeddings.tokens,
        "words": record.prompt_embeddings.words,
        "embedded_with": dict(record.embedded_with),
        "texts": {text: [embeddings.tokens, embeddings.words] for text, embeddings in record.texts.items()},
        "layers": [
            _shape_of(layer, "name") | ({} if layer.to_k.norm is None else {"key_eps": layer.to_k.eps})
            for layer in record.layers
        ],
    }
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, header, FORMAT)


def read(path: str | Path, kind: type) -> Any:
    """Return the record of this kind in a file.

    FileNotFoundError if there is none; ValueError if it is no record, or its tensors do not fit each other.
    """
    tensors, header = load_tensors(path, FORMAT)
    try:
        texts = {
            text: TokenEmbeddings.stored(tensors[f"texts.{key}"], *names)
            for key, (text, names) in enumerate(header["texts"].items())
        }
        prompt = TokenEmbeddings.stored(tensors["prompt_embeddings"], header["tokens"], header["words"])
        attention = header["self_attention"]
        record = kind(
            prompt=header["prompt"],
            prompt_embeddings=prompt,
            timesteps=[t if isinstance(t, int) else float(t) for t in header["timesteps"]],
            layers=tuple(_layer(tensors, number, each, texts) for number, each in enumerate(header["layers"])),
            branch=header["branch"],
            stream=header.get("stream"),
            texts=texts,
            self_attention=attention
            and SelfAttention(
                *_shape(attention),
                **_named(tensors, "self.", OF_SELF_ATTENTION),
                linear=bool(attention.get("linear", False)),
            ),
            kept_map=LinearMap(**_named(tensors, "linear.", OF_MAP)) if "linear.weight" in tensors else None,
            embedded_with=header["embedded_with"],
            masked=bool(header.get("masked", False)),
            encoder_check=tensors.get("encoder_check"),
        )
        _check(record)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} is not a readable attention record, or is damaged: {error}") from error
    return record


def _layer(tensors: dict[str, torch.Tensor], number: int, stored: dict, texts: dict) -> Layer:
    to_k = KeyProjection(**_named(tensors, f"{number}.key_", OF_KEYS), eps=float(stored.get("key_eps", 0.0)))
    names = {text: f"{number}.maps.{key}" for key, text in enumerate([None, *texts])}
    maps = {text: tensors[name] for text, name in names.items() if name in tensors}
    return Layer(stored["name"], *_shape(stored), to_k, **_named(tensors, f"{number}.", OF_LAYER), maps=maps)


def _tensors_of(part: Any, prefix: str, names: tuple[str, ...]) -> dict[str, torch.Tensor | None]:
    return {} if part is None else {prefix + name: getattr(part, name) for name in names}


def _named(tensors: dict[str, torch.Tensor], prefix: str, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: tensors.get(prefix + name) for name in names}


def _shape_of(part: Any, *more: str) -> dict[str, Any]:
    return {name: getattr(part, name) for name in (*more, "grid", "heads", "scale")}


def _shape(stored: dict) -> tuple[tuple[int, int], int, float]:
    """Return what `_shape_of` stored: grid, heads and scale."""
    return tuple(stored["grid"]), int(stored["heads"]), float(stored["scale"])


def _check(record: Any) -> None:
    """ValueError if the tensors do not fit each other."""
    if not record.layers:
        raise ValueError("it holds no layers")
    if not all(map(math.isfinite, record.timesteps)):
        raise ValueError(f"its timesteps are {record.timesteps}")
    prompt, d_text, linear = record.prompt_embeddings, record.d_text, record.kept_map
    if tuple(prompt.values.shape) != (len(prompt.tokens), d_text):
        raise ValueError(f"it has {len(prompt.tokens)} tokens and embeddings of shape {tuple(prompt.values.shape)}")
    for layer in record.layers:
        _check_keys(layer, d_text)
        if linear is None:
            _check_kept(layer, len(record.timesteps))
    if linear is not None:
        shapes = tuple(linear.weight.shape), record.grid if linear.bias is None else tuple(linear.bias.shape)
        if shapes != ((*record.grid, d_text), record.grid):
            raise ValueError(f"its map has shape {shapes[0]}, expected {(*record.grid, d_text)}")


def _check_keys(layer: Layer, d_text: int) -> None:
    """ValueError if what makes the keys of a layer does not fit its heads and the text."""
    fits = layer.key_weight.ndim == 2 and layer.key_weight.shape[1] == d_text
    if not fits or layer.heads < 1 or len(layer.key_weight) % layer.heads:
        raise ValueError(
            f"the keys of {layer.name} have shape {tuple(layer.key_weight.shape)}, not {layer.heads} heads of "
            f"width {d_text}"
        )
    if any(tensor.shape[:1] != layer.key_weight.shape[:1] for tensor in layer.to_k.tensors.values()):
        raise ValueError(
            f"the bias or norm of the keys of {layer.name} does not fit their {len(layer.key_weight)} channels"
        )


def _check_kept(layer: Layer, steps: int) -> None:
    """ValueError if a layer's queries, their sum or its maps are not there, or do not fit its grid."""
    kept = layer.query_sum if layer.queries is None else layer.queries
    expected: tuple[int, ...] = (layer.grid[0] * layer.grid[1], len(layer.key_weight))
    if layer.queries is not None:
        expected = (steps, *expected)
    if kept is None or tuple(kept.shape) != expected:
        got = None if kept is None else tuple(kept.shape)
        raise ValueError(f"the queries of {layer.name} have shape {got}, expected {expected}")
    if any(maps.ndim != 3 or tuple(maps.shape[1:]) != layer.grid for maps in layer.maps.values()):
        raise ValueError(f"the maps of {layer.name} are not of its grid {layer.grid}")
