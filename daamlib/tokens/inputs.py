"""Checked inputs of token optimisation: masks on the grid of the maps, parts of records, embeddings to start from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional as F

from ..attention.heatmaps import require_ratio, upsample
from ..attention.record import MAX_BYTES, AttentionRecord, require_same_model
from ..attention.text import find_word
from .objective import Masks, Rows, pixels_of, softmax_maps

BACKGROUND = "background"  # the name of the class of the pixels that no mask covers


def require_records(records: Sequence[Any], kind: type = AttentionRecord) -> None:
    """Raise TypeError unless all records are of this kind, ValueError if there is none or several models made them."""
    if not records:
        raise ValueError("no training images: give one or more records, each with its mask")
    for record in records:
        if not isinstance(record, kind):
            raise TypeError(
                f"records must be {kind.__name__}s, got {type(record).__name__}: optimize_probe reads JointRecords, "
                "every other fit AttentionRecords"
            )
    require_same_model(records)


def select_part(record: Any, layers: Sequence[str] | None, max_timestep: int | None) -> Any:
    """Return the record of these layers and of the passes up to `max_timestep`; the record itself if that is all.

    A record without such a pass, as of a real image that was noised further, gives its least noisy ones. Raises
    ValueError if a layer is unknown, none is left, or a record without queries would have to give single passes.
    """
    unknown = sorted(set(layers or ()) - set(record.layer_names()))
    if unknown:
        raise ValueError(f"the record has no layers {unknown}: it has {record.layer_names()}")
    if max_timestep is not None and max_timestep < 0:
        raise ValueError(f"max_timestep must be 0 or more, got {max_timestep}")
    limit = max(record.timesteps) if max_timestep is None else max(max_timestep, min(record.timesteps))
    steps = [i for i, t in enumerate(record.timesteps) if t <= limit]
    whole = len(steps) == len(record.timesteps)
    if whole and layers is None:
        return record
    kept = None if layers is None else lambda layer: layer.name in layers
    return record.select(layers=kept, steps=None if whole else steps)


def query_features(
    record: AttentionRecord, grid: tuple[int, int], keys: Float[torch.Tensor, "K channels"] | None = None
) -> torch.Tensor:
    """Return the scaled queries of all layers at `grid`, their mean over the passes less that over the image.

    They are (P, channels); with keys (P, K), their products, which are up-sampled in the place of the queries.
    Raises ValueError if the record holds no queries (`AttentionRecord.collapsed`), or some are not finite.
    """
    if record.kept_map is not None:
        raise ValueError("tokens of all classes read each layer's queries, which a collapsed record holds no more")
    queries = [layer.summed_queries() * layer.scale for layer in record.layers]
    if keys is not None:
        of_layers = keys.to(record.device).split([each.shape[1] for each in queries], dim=1)
        queries = [each @ of_layer.T for each, of_layer in zip(queries, of_layers, strict=True)]
    pairs = zip(queries, record.layers, strict=True)
    maps = [upsample(each.T.unflatten(1, layer.grid), grid) for each, layer in pairs]
    joined = torch.cat(maps) if keys is None else torch.stack(maps).sum(dim=0)
    features = record.finite(joined.flatten(1).T)
    return (features - features.mean(dim=0)) / len(record.timesteps)


def made_of(records: Sequence[Any]) -> dict[str, Any]:
    """Return the entries of a token's `info` on the model and the images that it was fitted to."""
    return {
        "model": str(getattr(records[0].pipe, "name_or_path", None)),  # it may be a Path
        "fingerprint": {name: list(numbers) for name, numbers in records[0].fingerprint.layers.items()},
        "prompts": [record.prompt for record in records],
    }


def folds(grids: Sequence[tuple[int, int]], most: int, middle: Sequence[int] | None = None) -> torch.Tensor:
    """Return the number of the part that each pixel is left out with in cross-validation: at most `most` parts.

    Each part holds whole images. The parts of a single image are its quarters, whose first ends with the row and
    column `middle` (default: the image's).
    """
    if len(grids) > 1:
        return torch.cat([torch.full((h * w,), i % most) for i, (h, w) in enumerate(grids)])
    y, x = [side // 2 - 1 for side in grids[0]] if middle is None else middle
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grids[0]), indexing="ij")
    return (2 * (rows > y) + (columns > x)).flatten()


def read_masks(
    records: list, masks: list, words: tuple[str, ...], *, multiclass: bool, background: bool, kind: type
) -> tuple[Masks, tuple[str, ...]]:
    """Return the (K, h, w) masks on their record's grid and the first record's device, and the names of the K classes.

    With `background` there is one class more, the last, of the pixels of no class. Raises TypeError for records of
    another kind, ValueError for masks that fit neither the records, nor each other, nor the options.
    """
    require_records(records, kind)
    if len(masks) != len(records):
        raise ValueError(f"{len(masks)} masks for {len(records)} records: give one mask for each record")
    pairs = enumerate(zip(masks, records, strict=True))
    grids = [_resized(mask, record.grid, number).to(records[0].device) for number, (mask, record) in pairs]
    counts = {len(grid) for grid in grids}
    if len(counts) > 1 or (words and counts != {len(words)}):
        expected = f"{len(words)} words {list(words)}" if words else "one number of classes in all images"
        raise ValueError(f"the masks have {sorted(counts)} classes, expected {expected}")
    count = len(grids[0])
    if multiclass and not background and count == 1:
        raise ValueError("a softmax needs two classes or more: give masks of several, or background=True")
    if multiclass and any((grid.sum(dim=0) > 1).any() for grid in grids):
        raise ValueError("masks overlap: a softmax between classes gives each pixel to one class")
    words = words or (tuple(f"class {k}" for k in range(count)) if count > 1 else ("token",))
    if background:
        words = (*words, BACKGROUND)
        grids = [torch.cat([grid, ~grid.any(dim=0, keepdim=True)]) for grid in grids]
    for word, pixels in zip(words, pixels_of(grids), strict=True):
        if pixels.all() or not pixels.any():
            raise ValueError(
                f"the masks of {word} {'fill every image' if pixels.all() else 'are all empty'} at the maps' sizes "
                f"{sorted({record.grid for record in records})}: there is nothing to tell apart"
            )
    return grids, words


def _resized(mask: Any, grid: tuple[int, int], number: int) -> torch.Tensor:
    """(K, h, w) on the grid, by nearest neighbour."""
    mask = torch.as_tensor(np.array(mask) if not isinstance(mask, torch.Tensor) else mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask {number} is {mask.dtype}, expected boolean: compare first, as labels == id")
    if mask.ndim not in (2, 3) or not mask.numel():
        raise ValueError(f"mask {number} has shape {tuple(mask.shape)}, expected (H, W) or (K, H, W)")
    mask = mask[None] if mask.ndim == 2 else mask
    require_ratio(f"mask {number}", (mask.shape[1], mask.shape[2]), grid)
    return F.interpolate(mask[None].float(), grid, mode="nearest-exact")[0].bool()


def start_tokens(
    record: AttentionRecord, words: tuple[str, ...], text: str | None, count: int, seed: int
) -> Float[torch.Tensor, "count d_text"]:
    """Return each word's embedding in `text`, its tokens averaged, then random ones; float32 on the CPU."""
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
    """Return the embeddings of `text` and the rows of each class: of its word, or of the word whose map fits best.

    The background class uses the first token outside any word: the start token, else the end token.
    """
    if records[0].layers[0].queries is None:
        raise ValueError('DAAM needs the queries of every step: trace with store="queries", or use method="ldaam"')
    embeddings = records[0].text_embeddings(text, padding=False)
    values = embeddings.values.float()
    known = tuple(tuple(range(word.start, word.stop)) for word in embeddings.words)
    if words:
        rows = [tuple(find_word(word, embeddings.words, embeddings.tokens)) for word in words]
    elif known:
        with torch.no_grad():
            maps = softmax_maps(records, known, MAX_BYTES)(values)
        targets = pixels_of(masks).to(maps)
        targets = targets[:-1] if background else targets
        correlations = torch.corrcoef(torch.cat([targets, maps]))[: len(targets), len(targets) :].nan_to_num(-1)
        rows = [known[i] for i in correlations.argmax(dim=1).tolist()]
    else:
        raise ValueError("DAAM needs a text with a word in it: give `text`, and the `word` in it")
    if background:
        rows.append((min(set(range(len(values))).difference(*known)),))
    return values, tuple(rows)
