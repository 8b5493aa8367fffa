"""Which layers and steps a token reads, and how strongly it is held to its start, chosen from the training masks alone.

Cross-validation: the token is fitted without some of the pixels, and its calibrated probabilities are compared with the
masks there. The parts are the images, or the four quarters of a single image, around the middle of its masks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float

from ..attention.readers import in_decoder
from ..attention.record import AttentionRecord
from .inputs import select_part
from .objective import Objective, loss_of
from .optimize import token_objective
from .solvers import newton

ITERATIONS, TOLERANCE = 30, 1e-6  # of Newton's method in each fit; the comparison needs no more digits
WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
STEPS = (0.75, 0.5, 0.25)  # parts of the passes, the least noisy ones
PARTS = 5  # at most so many fits of each choice


def choose_settings(
    records: Iterable[AttentionRecord],
    masks: Iterable,
    *,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    **options: Any,
) -> dict[str, Any]:
    """What `optimize_token(records, masks, **settings)` reads best, by cross-validation over the training images.

    LDAAM with "bce". First the layers (all; those of the up blocks; those of each of the two largest grids, with and
    without the down blocks) and the steps (all, and the least noisy three, two and one quarter of them), together; then
    the weight decay. Each choice is fitted up to five times, in parts of a second with the bundled model.

    Args:
        records: As for `optimize_token`; steps are chosen only of records that hold queries.
        masks: Likewise. Of one image, each class on both sides of a median line of the masks.
        weight_decays: To choose from.
        **options: Of `optimize_token` as they will be: word, text, multiclass, background, seed.

    Returns:
        layers, max_timestep and weight_decay, as `optimize_token` takes them.

    Raises:
        ValueError: See `optimize_token`; or there is no part without which every class is still there.
    """
    if options.get("method", "ldaam") != "ldaam" or options.get("loss", "bce") != "bce":
        raise ValueError(f'settings are chosen for LDAAM with loss="bce", got {options}')
    if not weight_decays or not all(0 <= decay < float("inf") for decay in weight_decays):
        raise ValueError(f"weight_decays must be 0 or positive numbers, one or more, got {list(weight_decays)}")
    records, masks = list(records), list(masks)
    if not all(isinstance(record, AttentionRecord) for record in records):
        raise TypeError(
            f"settings are chosen for AttentionRecords, got {[type(record).__name__ for record in records]}: for "
            "images of joint models give `layers` and `weight_decay` to optimize_probe"
        )
    tried = [
        {"layers": layers, "max_timestep": timestep} for layers in _layers(records) for timestep in _timesteps(records)
    ]
    best = min(tried, key=lambda choice: _loss(*_objective(records, masks, choice, options)))
    objective, grids = _objective(records, masks, best, options)
    weight_decay = min(weight_decays, key=lambda decay: _loss(replace(objective, weight_decay=decay), grids))
    return {**best, "weight_decay": weight_decay}


def _objective(
    records: Sequence[AttentionRecord], masks: Sequence, choice: dict[str, Any], options: dict[str, Any]
) -> tuple[Objective, list[tuple[int, int]]]:
    """What a fit with these layers and steps minimises, and the grid of each image's maps."""
    reading = [select_part(record, choice["layers"], choice["max_timestep"]) for record in records]
    return token_objective(reading, masks, **options), [record.grid for record in reading]


def _loss(objective: Objective, grids: Sequence[tuple[int, int]]) -> float:
    """The mean loss on the pixels that the fits have not seen."""
    sizes = [height * width for height, width in grids]
    losses, first = [], None
    for part in _parts(objective.targets, grids):
        fit, test = (_of_pixels(objective, pixels, sizes) for pixels in (~part, part))
        first = x, bias = newton(fit, ITERATIONS, tolerance=TOLERANCE, first=first)[:2]
        losses.append(replace(test, weight_decay=0.0)(x, bias).item())
    return sum(losses) / len(losses)


def _of_pixels(objective: Objective, pixels: Bool[torch.Tensor, " P"], sizes: Sequence[int]) -> Objective:
    """The same objective of some of the pixels alone."""
    weights = objective.weights * pixels
    weights = weights / weights.sum()
    loss = loss_of("bce", objective.targets, weights, sizes, multiclass=objective.multiclass)
    return replace(objective, weights=weights, loss=loss)


def _parts(targets: Float[torch.Tensor, "K P"], grids: Sequence[tuple[int, int]]) -> list[Bool[torch.Tensor, " P"]]:
    """The pixels that each fit leaves out, such that those of every class and others are left."""
    if len(grids) > 1:
        number = torch.cat([torch.full((h * w,), i % PARTS) for i, (h, w) in enumerate(grids)])
    else:
        # the masks' pixels, or of masks that cover all the first class', are on both sides of the medians
        covered = targets.any(dim=0)
        of_masks = (targets[0] > 0 if covered.all() else covered).view(grids[0]).nonzero().cpu()
        y, x = of_masks.median(dim=0).values
        rows, columns = torch.meshgrid(*(torch.arange(side) for side in grids[0]), indexing="ij")
        number = (2 * (rows > y) + (columns > x)).flatten()
    parts = [(number == k).to(targets.device) for k in number.unique()]
    found = [part for part in parts if all(_both(row[~part]) for row in targets)]
    if not found:
        raise ValueError(
            "there is nothing to compare settings by: without any one of the images (of a single image, its quarters) "
            "a class is missing. Give more masks, or choose the settings yourself"
        )
    return found


def _both(row: torch.Tensor) -> bool:
    return bool(row.any()) and not bool(row.all())


def _layers(records: Sequence[AttentionRecord]) -> list[list[str] | None]:
    """None for all, and the names of some of the layers."""
    layers = records[0].layers
    up = [layer for layer in layers if in_decoder(layer.name)]
    grids = sorted({layer.grid for layer in layers}, reverse=True)[:2]
    some = [up, *([layer for layer in kind if layer.grid == grid] for grid in grids for kind in (layers, up))]
    names = {tuple(layer.name for layer in group): None for group in some if 0 < len(group) < len(layers)}
    return [None, *(list(group) for group in names)]


def _timesteps(records: Sequence[AttentionRecord]) -> list[float | None]:
    """None for all passes, and the largest timestep of the least noisy ones."""
    if any(layer.queries is None for layer in records[0].layers):
        return [None]
    ordered = sorted(records[0].timesteps)
    last = {ordered[max(0, round(part * len(ordered)) - 1)] for part in STEPS}
    return [None, *sorted(last - {ordered[-1]})]
