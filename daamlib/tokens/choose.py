"""Layers, steps and weight decay of a token, chosen from the training masks alone by cross-validation.

The token is fitted without some of the pixels, and its calibrated probabilities are compared with the masks there. The
parts are the images, or the four quarters of a single image, around the middle of its masks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float

from ..attention.readers import in_decoder
from ..attention.record import AttentionRecord
from .inputs import folds, require_records, select_part
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
    """Choose layers, steps and weight decay for `optimize_token` by cross-validation over the training images.

        settings = daamlib.choose_settings(records, masks, word="car")
        token = daamlib.optimize_token(records, masks, word="car", **settings)

    LDAAM with "bce". First the layers (all; those of the up blocks; those of each of the two largest grids, with and
    without the down blocks) and the steps (all, and the least noisy three, two and one quarter of them), together; then
    the weight decay. Each choice is fitted up to five times, in parts of a second with the bundled model.

    Args:
        records: As for `optimize_token`; steps are chosen only of records that hold queries.
        masks: As for `optimize_token`. A single image needs each class on both sides of a median line of the masks.
        weight_decays: Candidates.
        **options: Options of the later `optimize_token`: word, text, multiclass, background, seed.

    Returns:
        layers, max_timestep and weight_decay, as `optimize_token` takes them.

    Raises:
        TypeError: The records are no AttentionRecords.
        ValueError: See `optimize_token`; or without any one part a class is missing.
    """
    if options.get("method", "ldaam") != "ldaam" or options.get("loss", "bce") != "bce":
        raise ValueError(f'settings are chosen for LDAAM with loss="bce", got {options}')
    if not weight_decays or not all(0 <= decay < float("inf") for decay in weight_decays):
        raise ValueError(f"weight_decays must be 0 or positive numbers, one or more, got {list(weight_decays)}")
    records, masks = list(records), list(masks)
    require_records(records)

    def objective_of(choice: dict[str, Any]) -> tuple[Objective, list[tuple[int, int]]]:
        """The objective of these layers and steps, and the grid of each image's maps."""
        parts = [select_part(record, **choice) for record in records]
        return token_objective(parts, masks, **options), [record.grid for record in parts]

    choices = [{"layers": names, "max_timestep": t} for names in _layers(records[0]) for t in _timesteps(records[0])]
    best = min(choices, key=lambda choice: _loss(*objective_of(choice)))
    objective, grids = objective_of(best)
    weight_decay = min(weight_decays, key=lambda decay: _loss(replace(objective, weight_decay=decay), grids))
    return {**best, "weight_decay": weight_decay}


def _loss(objective: Objective, grids: Sequence[tuple[int, int]]) -> float:
    """The mean loss on the pixels that the fits leave out."""
    losses, first = [], None
    for part in _parts(objective.targets, grids):
        fit, test = (_of_pixels(objective, pixels, grids) for pixels in (~part, part))
        first = x, bias = newton(fit, ITERATIONS, tolerance=TOLERANCE, first=first)[:2]
        losses.append(replace(test, weight_decay=0.0)(x, bias).item())
    return sum(losses) / len(losses)


def _of_pixels(objective: Objective, pixels: Bool[torch.Tensor, " P"], grids: Sequence[tuple[int, int]]) -> Objective:
    """The objective of some of its pixels alone."""
    weights = objective.weights * pixels
    weights = weights / weights.sum()
    sizes = [height * width for height, width in grids]
    loss = loss_of("bce", objective.targets, weights, sizes, multiclass=objective.multiclass)
    return replace(objective, weights=weights, loss=loss)


def _parts(targets: Float[torch.Tensor, "K P"], grids: Sequence[tuple[int, int]]) -> list[Bool[torch.Tensor, " P"]]:
    """The pixels that each fit leaves out, such that those of every class and others remain.

    A single image is split at the median of the mask pixels (of the first class, if the masks cover the image).
    """
    middle = None
    if len(grids) == 1:
        covered = targets.any(dim=0)
        of_masks = (targets[0] > 0 if covered.all() else covered).view(grids[0]).nonzero().cpu()
        middle = of_masks.median(dim=0).values.tolist()
    number = folds(grids, PARTS, middle).to(targets.device)
    parts = [number == k for k in number.unique()]
    usable = [part for part in parts if all(row[~part].any() and not row[~part].all() for row in targets)]
    if not usable:
        raise ValueError(
            "there is nothing to compare settings by: without any one of the images (of a single image, its quarters) "
            "a class is missing. Give more masks, or choose the settings yourself"
        )
    return usable


def _layers(record: AttentionRecord) -> list[list[str] | None]:
    """None for all, and the names of some of the layers."""
    up = [layer for layer in record.layers if in_decoder(layer.name)]
    grids = sorted({layer.grid for layer in record.layers}, reverse=True)[:2]
    some = [up, *([each for each in kind if each.grid == grid] for grid in grids for kind in (record.layers, up))]
    names = {tuple(layer.name for layer in group): None for group in some if 0 < len(group) < len(record.layers)}
    return [None, *(list(group) for group in names)]


def _timesteps(record: AttentionRecord) -> list[float | None]:
    """None for all passes, and the largest timestep of the least noisy ones."""
    if any(layer.queries is None for layer in record.layers):
        return [None]
    ordered = sorted(record.timesteps)
    last = {ordered[max(0, round(part * len(ordered)) - 1)] for part in STEPS}
    return [None, *sorted(last - {ordered[-1]})]
