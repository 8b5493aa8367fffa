"""What is given to token optimisation, checked: masks on the grid of the maps, and the embeddings to start from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch.nn import functional as F

from ..attention.heatmaps import require_ratio, upsample
from ..attention.joint.record import JointRecord
from ..attention.record import MAX_BYTES, AttentionRecord, require_same_model
from ..attention.text import find_word
from .objective import softmax_maps

Masks = list[Bool[torch.Tensor, "K _ _"]]  # one an image
Rows = tuple[tuple[int, ...], ...]


def select_steps(record: AttentionRecord | JointRecord, max_timestep: int | None) -> list[int] | None:
    """The numbers of a record's passes with a timestep up to `max_timestep`; None where those are all.

    A record without such a pass, as of a real image that was noised further, has its least noisy ones.
    """
    limit = max(record.timesteps) if max_timestep is None else max(max_timestep, min(record.timesteps))
    steps = [i for i, t in enumerate(record.timesteps) if t <= limit]
    return None if len(steps) == len(record.timesteps) else steps


def select_part(record: AttentionRecord, layers: Sequence[str] | None, max_timestep: int | None) -> AttentionRecord:
    """Return the record of the layers and steps that a token reads, the record itself where those are all.

    Raises ValueError if a layer is unknown, none is left, or steps are to be taken apart of a record without queries.
    """
    unknown = sorted(set(layers or ()) - set(record.layer_names()))
    if unknown:
        raise ValueError(f"the record has no layers {unknown}: it has {record.layer_names()}")
    steps = select_steps(record, max_timestep)
    if steps is None and layers is None:
        return record
    return record.select(layers=None if layers is None else lambda layer: layer.name in layers, steps=steps)


def query_features(record: AttentionRecord, grid: tuple[int, int]) -> Float[torch.Tensor, "P channels"]:
    """Return the scaled queries of all layers at `grid`, their mean over the passes less that over the image.

    Raises ValueError if the record holds no queries (`AttentionRecord.collapsed`), or some are not finite.
    """
    if record.kept_map is not None:
        raise ValueError("tokens of all classes read each layer's queries, which a collapsed record holds no more")
    layers = [(layer.summed_queries() * layer.scale).T.unflatten(1, layer.grid) for layer in record.layers]
    features = record.finite(torch.cat([upsample(each, grid) for each in layers]).flatten(1).T)
    return (features - features.mean(dim=0)) / len(record.timesteps)


def made_of(records: Sequence[AttentionRecord | JointRecord]) -> dict[str, Any]:
    """What a token's `info` says of the model and the images that it was fitted to."""
    return {
        "model": str(getattr(records[0].pipe, "name_or_path", None)),  # it may be a Path
        "fingerprint": {name: list(numbers) for name, numbers in records[0].fingerprint.layers.items()},
        "prompts": [record.prompt for record in records],
    }


def read_masks(
    records: list,
    masks: list,
    words: tuple[str, ...],
    *,
    multiclass: bool,
    background: str | None,
    kind: type = AttentionRecord,
) -> tuple[Masks, tuple[str, ...]]:
    """The masks on their record's grid and the first record's device, and the names of the K classes.

    Args:
        records: n images of one model.
        masks: n, each (H, W) or (K, H, W) boolean, of any size, but of the image's ratio of height and width.
        words: The names of the classes, or none.
        multiclass: Whether each pixel belongs to one class at most.
        background: The name of a class more, the last, of the pixels of no class; None: without it.
        kind: Of the records.

    Returns:
        n masks (K, h, w), and K names.

    Raises:
        TypeError: Something else than records was given.
        ValueError: The masks fit neither the records, nor each other, nor the options.
    """
    if not records:
        raise ValueError("no training images: give one or more records, each with its mask")
    for record in records:
        if not isinstance(record, kind):
            hint = " (images of joint models are read by optimize_probe)" if isinstance(record, JointRecord) else ""
            raise TypeError(f"records must be {kind.__name__}s, got {type(record).__name__}{hint}")
    if len(masks) != len(records):
        raise ValueError(f"{len(masks)} masks for {len(records)} records: give one mask for each record")
    require_same_model(records)
    pairs = enumerate(zip(masks, records, strict=True))
    grids = [_resized(mask, record, number).to(records[0].device) for number, (mask, record) in pairs]
    counts = {len(grid) for grid in grids}
    if len(counts) > 1 or (words and counts != {len(words)}):
        wanted = f"{len(words)} words {list(words)}" if words else "one number of classes in all images"
        raise ValueError(f"the masks have {sorted(counts)} classes, expected {wanted}")
    count = len(grids[0])
    if multiclass and not background and count == 1:
        raise ValueError("a softmax needs two classes or more: give masks of several, or background=True")
    if multiclass and any((grid.sum(dim=0) > 1).any() for grid in grids):
        raise ValueError("masks overlap: a softmax between classes gives each pixel to one class")
    words = words or (tuple(f"class {k}" for k in range(count)) if count > 1 else ("token",))
    if background:
        words = (*words, background)
        grids = [torch.cat([grid, ~grid.any(dim=0, keepdim=True)]) for grid in grids]
    for word, pixels in zip(words, torch.cat([grid.flatten(1) for grid in grids], dim=1), strict=True):
        if pixels.all() or not pixels.any():
            which = "fill every image" if pixels.all() else "are all empty"
            raise ValueError(
                f"the masks of {word} {which} at the maps' sizes {sorted({record.grid for record in records})}: "
                "there is nothing to tell apart"
            )
    return grids, words


def _resized(mask, record: AttentionRecord | JointRecord, number: int) -> torch.Tensor:
    """(K, h, w) at the record's grid, by nearest neighbour."""
    mask = torch.as_tensor(np.array(mask) if not isinstance(mask, torch.Tensor) else mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask {number} is {mask.dtype}, expected boolean: compare first, as labels == id")
    if mask.ndim not in (2, 3) or not mask.numel():
        raise ValueError(f"mask {number} has shape {tuple(mask.shape)}, expected (H, W) or (K, H, W)")
    mask = mask[None] if mask.ndim == 2 else mask
    require_ratio(f"mask {number}", (mask.shape[1], mask.shape[2]), record.grid)
    return F.interpolate(mask[None].float(), record.grid, mode="nearest-exact")[0].bool()


def start_tokens(
    record: AttentionRecord, words: tuple[str, ...], text: str | None, count: int, seed: int
) -> Float[torch.Tensor, "count d_text"]:
    """float32 on the CPU: the embedding of each word in `text`, its tokens averaged; of `seed` where none is left."""
    tokens = []
    for word in words:
        embeddings = record.encode(text or word)
        rows = find_word(word, embeddings.words, embeddings.tokens)
        tokens.append(embeddings.values[rows].float().mean(dim=0, keepdim=True).cpu())
    prompt = record.prompt_embeddings.values.float().cpu()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count - len(tokens), record.d_text, generator=generator) * prompt.std()
    return torch.cat([*tokens, noise])


def start_text(
    records: Sequence[AttentionRecord], masks: Masks, words: tuple[str, ...], text: str | None, background: bool
) -> tuple[Float[torch.Tensor, "m d_text"], Rows]:
    """The embeddings of `text`, and the rows of each class in it: those of its word, or of the closest map's.

    The background's is the first token of no word: the start token, or where a text has none the end token.
    """
    if records[0].layers[0].queries is None:
        raise ValueError('DAAM needs the queries of every step: trace with store="queries", or use method="ldaam"')
    embeddings = records[0].text_embeddings(text, padding=False)
    values = embeddings.values.float()
    if words:
        rows = [tuple(find_word(word, embeddings.words, embeddings.tokens)) for word in words]
    elif embeddings.words:
        known = tuple(tuple(range(word.start, word.stop)) for word in embeddings.words)
        with torch.no_grad():
            maps = softmax_maps(records, known, MAX_BYTES)(values)
        targets = torch.cat([mask.flatten(1) for mask in masks], dim=1).to(maps)
        targets = targets[:-1] if background else targets
        correlations = torch.corrcoef(torch.cat([targets, maps]))[: len(targets), len(targets) :].nan_to_num(-1)
        rows = [known[i] for i in correlations.argmax(dim=1).tolist()]
    else:
        raise ValueError("DAAM needs a text with a word in it: give `text`, and the `word` in it")
    if not background:
        return values, tuple(rows)
    of_words = {row for word in embeddings.words for row in range(word.start, word.stop)}
    return values, (*rows, (min(set(range(len(values))) - of_words),))
