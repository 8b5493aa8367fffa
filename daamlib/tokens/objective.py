"""What token optimisation minimises: maps of the parameters, masks at their size, and the losses between them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from ..attention.heatmaps import upsample
from ..attention.layers import Layer
from ..attention.record import AttentionRecord
from ..attention.softmax import summed_probabilities


@dataclass(frozen=True, eq=False)
class Problem:
    """Maps as a function of text embeddings, and what they should be; the pixels of all images stand in one line.

    maps: (m, d_text) -> (K, P), differentiable. targets: (K, P), 1 inside the mask and 0 outside. sizes: the pixels of
    each image, P in all. rows: the rows of the embeddings that are averaged to each of the K maps.
    linear: whether the maps are linear in the embeddings (LDAAM). covariance: (d_text, d_text) float64, of the rows of
    A over all pixels: how far LDAAM moves with the embedding, a good measure of how far DAAM does.
    """

    maps: Callable[[torch.Tensor], torch.Tensor]
    targets: torch.Tensor
    sizes: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    linear: bool
    covariance: torch.Tensor


def linear_problem(records: Sequence[AttentionRecord], masks: Sequence[torch.Tensor]) -> Problem:
    """LDAAM: one row of the embeddings a class. float64: the fit is small and is to converge."""
    matrix = _rows_of_linear_maps(records)
    targets = torch.cat([mask.flatten(1) for mask in masks], dim=1).to(matrix.device).to(matrix)
    rows = tuple((k,) for k in range(len(targets)))
    sizes = tuple(mask[0].numel() for mask in masks)
    return Problem(lambda x: x @ matrix.T, targets, sizes, rows, True, _covariance(matrix))


def _rows_of_linear_maps(records: Sequence[AttentionRecord]) -> torch.Tensor:
    """(P, d_text) float64: A of every image, a pixel a row.

    It lies where the first record does, but not on Apple's GPUs, which have no float64: there on the CPU.
    """
    device = torch.device("cpu") if records[0].device.type == "mps" else records[0].device
    return torch.cat([record.linear_map().weight.to(device).double().flatten(0, 1) for record in records])


def _covariance(rows: torch.Tensor) -> torch.Tensor:
    centred = rows - rows.mean(dim=0)
    return centred.T @ centred / len(rows)


def softmax_problem(
    records: Sequence[AttentionRecord],
    masks: Sequence[torch.Tensor],
    rows: tuple[tuple[int, ...], ...],
    max_bytes: int,
) -> Problem:
    """DAAM: images of one size stand below each other, as one tall image, and are worked through together."""
    groups = defaultdict(list)
    for number, record in enumerate(records):
        groups[tuple((layer.grid, len(layer.queries)) for layer in record.layers)].append(number)
    device = records[0].device
    tall = [([_stack(layers, device) for layers in zip(*(records[i].layers for i in group), strict=True)], group)
            for group in groups.values()]  # fmt: skip
    order = [i for group in groups.values() for i in group]

    def maps(x: torch.Tensor) -> torch.Tensor:
        parts = []
        for layers, group in tall:
            total: torch.Tensor | float = 0.0
            for layer in layers:
                of_tokens = summed_probabilities(layer.queries, layer.keys(x), max_bytes).unflatten(1, layer.grid)
                of_words = torch.stack([of_tokens[list(tokens)].mean(dim=0) for tokens in rows])
                images = of_words.unflatten(1, (len(group), -1)).flatten(0, 1)  # (K * images, h, w)
                total = total + upsample(images, records[group[0]].grid)
            parts.append(total.reshape(len(rows), -1))
        return torch.cat(parts, dim=1)

    targets = torch.cat([masks[i].flatten(1) for i in order], dim=1).to(device).float()
    sizes = tuple(masks[i][0].numel() for i in order)
    return Problem(maps, targets, sizes, rows, False, _covariance(_rows_of_linear_maps(records)))


def _stack(layers: Sequence[Layer], device: torch.device) -> Layer:
    """One layer of several images as that of one image of their heights together, on `device`."""
    height, width = layers[0].grid
    queries = torch.cat([layer.queries.to(device) for layer in layers], dim=1)
    keys = layers[0].key_weight.to(device)
    return replace(layers[0], grid=(height * len(layers), width), key_weight=keys, queries=queries)


def loss_of(problem: Problem, kind: str, *, joint: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(maps, logits), both (K, P) -> the loss, every image and every class weighing the same; see `optimize_token`."""
    targets, sizes = problem.targets, problem.sizes
    weights = torch.cat([targets.new_full((size,), 1 / (size * len(sizes))) for size in sizes])
    known = targets.any(dim=0) if joint else torch.ones_like(targets[0], dtype=torch.bool)

    def binary(maps: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=0) * weights).sum()

    def between_classes(maps: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return -((targets * logits.log_softmax(dim=0)).sum(dim=0) * weights).sum()

    def dice(maps: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        chances = (logits.softmax(dim=0) if joint else logits.sigmoid()) * known
        scores = []
        for chance, target in zip(chances.split(sizes, dim=1), targets.split(sizes, dim=1), strict=True):
            # + 1 pixel: an image without the class is right where nothing is found
            scores.append((2 * (chance * target).sum(dim=1) + 1) / (chance.sum(dim=1) + target.sum(dim=1) + 1))
        return 1 - torch.stack(scores).mean()

    def thesis(maps: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scaled = []
        for part in maps.split(sizes, dim=1):
            low, high = part.amin(dim=1, keepdim=True), part.amax(dim=1, keepdim=True)
            scaled.append((part - low) / (high - low).clamp(min=torch.finfo(part.dtype).tiny))
        chances = torch.cat(scaled, dim=1).clamp(1e-6, 1 - 1e-6)
        return (F.binary_cross_entropy(chances, targets, reduction="none").mean(dim=0) * weights).sum()

    return {"bce": between_classes if joint else binary, "dice": dice, "cross_entropy": thesis}[kind]
