"""The function that token optimisation minimises: maps of text embeddings, masks of their size, losses between them.

The K maps of all images stand side by side, (K, P) for P pixels in all, and so do their masks. The losses are

    "bce"            binary cross-entropy of sigmoid(logits); with a softmax, the cross-entropy between the classes
    "dice"           1 - soft Dice coefficient of the same probabilities, the mean over images and classes
    "cross_entropy"  the thesis': binary cross-entropy of each image's map scaled to [0, 1]; it learns no scale and bias
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch.nn import functional as F

from ..attention.heatmaps import normalize, upsample
from ..attention.layers import Layer
from ..attention.ldaam import LinearMap
from ..attention.record import AttentionRecord
from ..attention.softmax import summed_probabilities

Maps = Callable[[torch.Tensor], torch.Tensor]  # (m, d_text) embeddings -> (K, P), differentiable
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (K, P) maps and (K, P) logits -> a number
Masks = list[Bool[torch.Tensor, "K _ _"]]  # one an image
Rows = tuple[tuple[int, ...], ...]  # the rows of the embedding that are averaged to each map


@dataclass(frozen=True, eq=False)
class Objective:
    """F(x, b, s) = C(maps(x), s (maps(x) - centre) / unit + b) + w |x - x_0|^2 / |x_0|^2 for embeddings x.

    Maps enter the loss C standardised by `centre` and `unit`, so that one starting point suits every model.

    Attributes:
        maps: (m, d_text) embeddings -> (K, P) maps, differentiable.
        loss: C: (K, P) maps and (K, P) logits -> a number; see `loss_of`.
        start: x_0.
        targets: 1 inside the masks and 0 outside.
        weights: weight of each pixel in the loss; the images weigh the same.
        matrix: A of all images, a pixel a row (`daamlib.attention.ldaam`). LDAAM's maps are x A^T + o. For DAAM and for
            normalised keys A is only a preconditioner.
        offset: o, LDAAM of the zero embedding in each pixel, from the keys' bias; 0 without one.
        unit: deviation of each map of x_0.
        centre: mean of each map of x_0. None (linear LDAAM): the mean of each map of x, so that centring and bias stay
            independent.
        weight_decay: w.
        multiclass: whether the loss has a softmax between the classes.
        words: names of the K maps.
        rows: rows of x that are averaged to each map.
    """

    maps: Maps
    loss: Loss
    start: Float[torch.Tensor, "m d_text"]
    targets: Float[torch.Tensor, "K P"]
    weights: Float[torch.Tensor, " P"]
    matrix: Float[torch.Tensor, "_ d_text"]
    offset: Float[torch.Tensor, " P"]
    unit: Float[torch.Tensor, "K 1"]
    centre: Float[torch.Tensor, "K 1"] | None
    weight_decay: float
    multiclass: bool
    words: tuple[str, ...]
    rows: Rows

    def __call__(
        self, x: Float[torch.Tensor, "m d_text"], bias: torch.Tensor, scale: torch.Tensor | float = 1.0
    ) -> Float[torch.Tensor, ""]:
        """Return F at embeddings x and the (K, 1) bias b and scale s, differentiable in them.

        The scale stays 1 where the maps are linear in the embedding, which includes the scale already.
        """
        maps = self.maps(x)
        logits = scale * (maps - self.centre_of(maps)) / self.unit + bias
        decay = self.weight_decay / self.start.square().sum()
        return self.loss(maps, logits) + decay * (x - self.start).square().sum()

    def centre_of(self, maps: Float[torch.Tensor, "K P"]) -> Float[torch.Tensor, "K 1"]:
        """Return the numbers that are subtracted from the maps before they are divided by the unit."""
        return maps.mean(dim=1, keepdim=True) if self.centre is None else self.centre

    @property
    def first_bias(self) -> Float[torch.Tensor, "K 1"]:
        """Log odds of each class over all pixels."""
        frequency = self.targets.mean(dim=1, keepdim=True)
        return torch.log(frequency / (1 - frequency))


def objective_of(
    maps: Maps, first: torch.Tensor, grids: Masks, *, loss: str, linear: bool, multiclass: bool, **parts: Any
) -> Objective:
    """Return the objective of `maps`, which are `first` at the start, against masks; `parts` are its other fields."""
    sizes, targets = [grid[0].numel() for grid in grids], pixels_of(grids).to(first)
    weights = torch.cat([torch.full((n,), 1 / (n * len(sizes)), dtype=torch.float64) for n in sizes]).to(first)
    return Objective(
        maps=maps,
        loss=loss_of(loss, targets, weights, sizes, multiclass=multiclass),
        targets=targets,
        weights=weights,
        unit=first.std(dim=1, keepdim=True).clamp(min=torch.finfo(first.dtype).tiny),
        centre=None if linear else first.mean(dim=1, keepdim=True),
        multiclass=multiclass,
        **parts,
    )


def pixels_of(grids: Masks) -> Bool[torch.Tensor, "K P"]:
    """Return the masks of all images as one."""
    return torch.cat([grid.flatten(1) for grid in grids], dim=1)


def pass_factors(records: Sequence[Any]) -> list[float]:
    """Return the factors that make maps of records comparable, which are sums over passes: mean number over number."""
    passes = [len(record.timesteps) for record in records]
    return [sum(passes) / len(passes) / each for each in passes]


def device_of(records: Sequence[Any]) -> torch.device:
    """Return the first record's device; the CPU for one on an Apple GPU, which has no float64."""
    return torch.device("cpu") if records[0].device.type == "mps" else records[0].device


def linear_rows(
    records: Sequence[Any], linear: Iterable[LinearMap]
) -> tuple[Float[torch.Tensor, "P d_text"], Float[torch.Tensor, " P"]]:
    """Return A and o of every image, a pixel a row, in float64: the fit is small and is to converge.

    Both are scaled to the mean number of passes.
    """
    device = device_of(records)
    rows, offsets = [], []
    for factor, each in zip(pass_factors(records), linear, strict=True):
        offset = torch.zeros_like(each.weight[..., 0]) if each.bias is None else each.bias
        rows.append(factor * each.weight.to(device).double().flatten(0, 1))
        offsets.append(factor * offset.to(device).double().flatten())
    return torch.cat(rows), torch.cat(offsets)


def linear_maps(matrix: Float[torch.Tensor, "P d_text"], offset: Float[torch.Tensor, " P"]) -> Maps:
    """LDAAM of tokens: (K, d_text) embeddings -> (K, P) maps, by A and o of `linear_rows`."""
    return lambda x: x @ matrix.T + offset


def normed_maps(records: Sequence[AttentionRecord]) -> Maps:
    """LDAAM of a model that normalises its keys, whose maps are not linear in the embedding; in float32."""
    pairs = list(zip(pass_factors(records), records, strict=True))
    return lambda x: torch.cat([r * record.ldaam_from(x).values.flatten(1) for r, record in pairs], dim=1)


def softmax_maps(records: Sequence[AttentionRecord], rows: Rows, max_bytes: int) -> Maps:
    """DAAM of whole texts: (m, d_text) embeddings -> (K, P) maps, the mean of those of each tuple of `rows`.

    Images of one size are processed together, as one tall image; `max_bytes` of probabilities at a time.
    """
    groups = defaultdict(list)
    for number, record in enumerate(records):
        groups[(len(record.timesteps), *(layer.grid for layer in record.layers))].append(number)
    device, factors = records[0].device, pass_factors(records)
    tall = [
        ([_stack(layers, device) for layers in zip(*(records[i].layers for i in group), strict=True)], group)
        for group in groups.values()
    ]

    def maps(x: torch.Tensor) -> torch.Tensor:
        parts: dict[int, torch.Tensor] = {}
        for layers, group in tall:
            total = torch.zeros((), device=device)
            for layer in layers:
                assert layer.queries is not None  # `start_text` checks it
                of_tokens = summed_probabilities(layer.queries, layer.keys(x), max_bytes).unflatten(1, layer.grid)
                of_words = torch.stack([of_tokens[list(tokens)].mean(dim=0) for tokens in rows])
                images = of_words.unflatten(1, (len(group), -1)).flatten(0, 1)  # (K * images, h, w)
                total = total + upsample(images, records[group[0]].grid)
            total = factors[group[0]] * total  # the images of a group have as many passes
            by_image = total.unflatten(0, (len(rows), -1)).flatten(2).unbind(dim=1)
            parts |= dict(zip(group, by_image, strict=True))
        return torch.cat([parts[i] for i in range(len(records))], dim=1)

    return maps


def _stack(layers: Sequence[Layer], device: torch.device) -> Layer:
    """One layer of several images as that of one image of their heights together, on `device`."""
    height, width = layers[0].grid
    queries = torch.cat([layer.queries.to(device) for layer in layers if layer.queries is not None], dim=1)
    to_k = layers[0].to_k.to(device)
    return replace(layers[0], grid=(height * len(layers), width), to_k=to_k, queries=queries)


def loss_of(kind: str, targets: torch.Tensor, weights: torch.Tensor, sizes: Sequence[int], *, multiclass: bool) -> Loss:
    """Return the loss of this kind (see above) against (K, P) targets; every class weighs the same."""
    sizes = list(sizes)

    def binary(maps: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return (F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=0) * weights).sum()

    def between_classes(maps: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return -((targets * logits.log_softmax(dim=0)).sum(dim=0) * weights).sum()

    def dice(maps: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        probabilities = logits.softmax(dim=0) * targets.any(dim=0) if multiclass else logits.sigmoid()
        scores = []
        for p, true in zip(probabilities.split(sizes, dim=1), targets.split(sizes, dim=1), strict=True):
            # + 1 pixel: an image without the class is right where nothing is predicted
            scores.append((2 * (p * true).sum(dim=1) + 1) / (p.sum(dim=1) + true.sum(dim=1) + 1))
        return 1 - torch.stack(scores).mean()

    def thesis(maps: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scaled = torch.cat([normalize(part[:, None])[:, 0] for part in maps.split(sizes, dim=1)], dim=1)
        probabilities = scaled.clamp(1e-6, 1 - 1e-6)
        return (F.binary_cross_entropy(probabilities, targets, reduction="none").mean(dim=0) * weights).sum()

    return {"bce": between_classes if multiclass else binary, "dice": dice, "cross_entropy": thesis}[kind]
