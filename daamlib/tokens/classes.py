"""Tokens of all classes of a few annotated images, which label every pixel of the model's other images.

    p(k | pixel) = softmax_k( sum_i s q_i . c_ki + b_k ),        q_i: queries of layer i, less their mean over the image

Each class k has a free key c_ki in each layer i, where LDAAM's token x has W_k,i x. That is one text embedding a layer
(Voynov et al. 2023, "P+") wherever W_k,i reaches every key. The problem stays convex: multinomial logistic regression
with a ridge. Targets are the shares of the classes in each cell of the maps, so thin things count. The weight decay is
chosen by leaving out images. The benchmark `street` among the tests measures the result.
"""

import math
import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional as F

from ..attention.heatmaps import require_ratio
from ..attention.readers import in_decoder
from ..attention.record import AttentionRecord
from ..cityscapes import IGNORED
from ..classes import Classes, class_list
from .inputs import folds, made_of, query_features, require_records, select_part
from .token import OptimizedToken

WEIGHT_DECAYS = (0.1, 0.03, 0.01, 0.003)  # of standardised features
RARE = 0.3  # power of the class shares that the probabilities are divided by: mean IoU weighs rare classes as much
RANK = 256  # principal components of the features
EXACT = 2048  # features up to which the components are exact
MORE, POWERS, SAMPLES = 32, 3, 2  # else: more directions, power iterations, pixels a feature
PARTS = 3  # at most so many fits of each weight decay
ITERATIONS = 60  # of L-BFGS
MAX_BYTES = 2**32  # of the features


@torch.inference_mode(False)  # it differentiates, whatever mode it is called in
def fit_classes(
    records: Iterable[AttentionRecord],
    label_maps: Iterable,
    classes: Classes | None = None,
    *,
    layers: Sequence[str] | None = None,
    max_timestep: int | None = None,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
) -> OptimizedToken:
    """Fit tokens of all classes at once to the label maps of a few images; `label_map` reads other images with them.

        labels = np.where(mask, 26, 7)  # ids of Cityscapes: car and road
        tokens = daamlib.fit_classes([record], [labels])
        daamlib.label_map(record, tokens, image=np.asarray(image))

    Args:
        records: k images of one model.
        label_maps: k arrays (H, W) of integer ids, with the images' ratio of height and width; 255 is ignored.
        classes: Class list of the ids (`daamlib.classes.class_list`), by default Cityscapes. Its classes that are in no
            label map are left out.
        layers: Names of the layers to read, by default the decoder's (of a U-Net), or all.
        max_timestep: Read only the passes with a timestep up to this one, see `optimize_token`.
        weight_decays: Candidates, compared on images left out (of a single image, its quarters).

    Returns:
        One token of the method "keys" with a word a class.

    Raises:
        TypeError: The records are no AttentionRecords.
        ValueError: Records of several models, or label maps, ids or options that do not fit.
    """
    started = time.perf_counter()
    records, label_maps, table = list(records), [np.asarray(ids) for ids in label_maps], class_list(classes)
    present = _check(records, label_maps, table, weight_decays)
    if layers is None:
        layers = [name for name in records[0].layer_names() if in_decoder(name)] or records[0].layer_names()
    features = _features(records, layers, max_timestep)
    shares = [_shares(ids, present, record.grid) for ids, record in zip(label_maps, records, strict=True)]
    targets = torch.cat(shares).to(features.device)
    parts = folds([record.grid for record in records], PARTS).to(features.device)
    keys, bias, losses, gradient, decay = _solve(features, targets, parts, weight_decays)
    words = tuple(table.names[number] for number in present)
    read = {"layers": list(layers), "max_timestep": max_timestep, "weight_decay": decay}
    return OptimizedToken(
        embedding=keys.cpu(),
        method="keys",
        words=words,
        rows=tuple((k,) for k in range(len(words))),
        scale=(1.0,) * len(words),
        bias=tuple(bias.tolist()),
        losses=losses,
        gradient_norm=gradient,
        seconds=time.perf_counter() - started,
        info={**made_of(records), "loss": "bce", "multiclass": True, "classes": table.stored(), **read},
    )


def _solve(
    features: torch.Tensor, targets: torch.Tensor, parts: torch.Tensor, weight_decays: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...], float, float]:
    """The classes' keys and biases, the losses, the last gradient's length and the chosen weight decay."""
    unit = features.std(dim=0).clamp(min=torch.finfo(features.dtype).tiny)
    features /= unit  # it is large, and nobody else's
    basis = principal_directions(features)
    components = features @ basis
    decay = _choose(components, targets, parts, sorted(weight_decays, reverse=True))
    theta, bias, losses, gradient = _fit(components, targets, decay)
    bias = bias - RARE * (targets.sum(dim=0) / targets.sum()).log()
    return (theta @ basis.T) / unit, bias, losses, gradient, decay


def principal_directions(features: torch.Tensor) -> Float[torch.Tensor, "features directions"]:
    """Directions of the largest variance; of many features and some pixels, by power iterations (Halko et al. 2011)."""
    width = features.shape[1]
    if width <= EXACT:
        return torch.linalg.eigh(features.T @ features).eigenvectors[:, -RANK:]
    features = features[:: max(1, len(features) // (SAMPLES * width))]
    basis = torch.randn(width, RANK + MORE, generator=torch.Generator().manual_seed(0)).to(features)
    for _ in range(POWERS):
        basis = torch.linalg.qr(features.T @ (features @ basis)).Q
    projected = features @ basis
    return basis @ torch.linalg.eigh(projected.T @ projected).eigenvectors[:, -RANK:]


def _features(records: list[AttentionRecord], layers: Sequence[str], max_timestep: int | None) -> torch.Tensor:
    """(pixels, features) queries of the images. Raises ValueError if they are too large to fit."""
    parts = [select_part(record, layers, max_timestep) for record in records]
    size = 4 * sum(r.grid[0] * r.grid[1] for r in records) * sum(len(layer.key_weight) for layer in parts[0].layers)
    if size > MAX_BYTES:
        raise ValueError(f"the features take {size / 2**30:.1f} GiB, more than 4: give fewer images or fewer `layers`")
    features, rows = torch.empty(0), 0
    for part, record in zip(parts, records, strict=True):  # one image at a time: all of them are large
        found = query_features(part, record.grid)
        if not rows:
            features = found.new_empty(sum(math.prod(each.grid) for each in records), found.shape[1])
        features[rows : rows + len(found)] = found
        rows += len(found)
    return features


def _check(records: list, label_maps: list[np.ndarray], table, weight_decays: Sequence[float]) -> list[int]:
    """The ids of the classes in the label maps. TypeError or ValueError for arguments that do not fit."""
    if not records or len(records) != len(label_maps):
        raise ValueError(f"{len(label_maps)} label maps for {len(records)} records: give one or more, a map a record")
    require_records(records)
    if not weight_decays or not all(0 < decay < float("inf") for decay in weight_decays):
        raise ValueError(f"weight_decays must be positive numbers, one or more, got {list(weight_decays)}")
    present: set[int] = set()
    for number, (ids, record) in enumerate(zip(label_maps, records, strict=True)):
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > IGNORED:
            raise ValueError(f"label map {number} must be (H, W) integers 0 ... 255, got {ids.shape} {ids.dtype}")
        require_ratio(f"label map {number}", (ids.shape[0], ids.shape[1]), record.grid)
        table.check(ids.astype(np.uint8), f"label map {number}")
        present |= {*np.unique(ids).tolist()} - {IGNORED}
    if len(present) < 2:
        raise ValueError(f"the label maps hold {len(present)} class: expected two or more, to tell apart")
    return sorted(present)


def _shares(ids: np.ndarray, present: Sequence[int], grid: tuple[int, int]) -> Float[torch.Tensor, "P K"]:
    """Share of each class in the cells of a grid; less than one in all where pixels are to be ignored."""
    masks = torch.tensor(ids[None] == np.array(present)[:, None, None]).float()
    return F.adaptive_avg_pool2d(masks[None], grid)[0].flatten(1).T


def _choose(features: torch.Tensor, targets: torch.Tensor, parts: torch.Tensor, decays: Sequence[float]) -> float:
    """The weight decay whose fits lose least on the parts that they leave out."""
    if len(decays) == 1:
        return decays[0]
    losses = dict.fromkeys(decays, 0.0)
    for part in parts.unique():
        rest, start = parts != part, None
        for decay in decays:
            start = theta, bias = _fit(features[rest], targets[rest], decay, start)[:2]
            losses[decay] += _loss(features[~rest], targets[~rest], theta, bias).item() * targets[~rest].sum().item()
    return min(decays, key=losses.__getitem__)


def _loss(features: torch.Tensor, targets: torch.Tensor, theta: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood of the targets."""
    return -(targets * (features @ theta.T + bias).log_softmax(dim=1)).sum() / targets.sum()


def _fit(
    features: torch.Tensor, targets: torch.Tensor, decay: float, start: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...], float]:
    """Minimise `_loss` + decay |theta|^2 by L-BFGS; returns theta, bias, losses and the gradient's norm."""
    unit = (0.1 * features.square().mean(dim=0) + 2 * decay).rsqrt()
    frequency = (targets.sum(dim=0) / targets.sum()).clamp(min=1e-6)
    theta, bias = start or (features.new_zeros(targets.shape[1], features.shape[1]), frequency.log())
    scaled, bias = (theta / unit).requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS([scaled, bias], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")
    losses: list[float] = []

    def closure() -> torch.Tensor:
        solver.zero_grad()
        theta = scaled * unit
        loss = _loss(features, targets, theta, bias) + decay * theta.square().sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    solver.step(closure)
    closure()
    assert scaled.grad is not None
    return (scaled * unit).detach(), bias.detach(), tuple(losses), scaled.grad.norm().item()
