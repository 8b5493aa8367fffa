"""How well heat maps segment: IoU over thresholds, averaged over images or pooled.

A heat map becomes a mask by a threshold: it is up-sampled bilinearly to the size of the true mask, scaled to its own
[0, 1] (min-max), and a pixel belongs to the word where the map is larger than the threshold. mIoU is the thesis': the
IoU of each image, averaged over the images that contain the class. Pooled IoU, which OVAM (Marcos-Manchón et al. 2024)
reports, adds up the pixels of all images before it divides: large objects weigh more. An image without the class (an
empty mask) has no IoU and is refused; leave it out before.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .attention.heatmaps import normalize, upsample

THRESHOLDS = tuple(i / 100 for i in range(101))
IN_CACHE = 2**18  # pixels that are counted at a time; found by trial


@dataclass(frozen=True, eq=False)
class ThresholdCounts:
    """Pixels in the intersection and in the union, for every image and threshold; all metrics follow from them.

    thresholds: (T,) float64, ascending in [0, 1]. intersection, union: (n, T) int64.
    """

    thresholds: np.ndarray
    intersection: np.ndarray
    union: np.ndarray

    def curve(self, *, pooled: bool = False) -> np.ndarray:
        """(T,) float64: the IoU averaged over the images (mIoU), or pooled over all their pixels."""
        if pooled:
            return self.intersection.sum(axis=0) / self.union.sum(axis=0)
        return (self.intersection / self.union).mean(axis=0)

    def resampled_curves(self, resamples: int = 1000, *, seed: int = 0, pooled: bool = False) -> np.ndarray:
        """(resamples, T): the curve of as many images, drawn anew with replacement each time (the bootstrap).

        Quantiles of any statistic of the rows are its interval over images: `np.quantile(curves.max(axis=1),
        [0.025, 0.975])` is the 95 % interval of the maximum.
        """
        n = len(self.union)
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)  # how often each image
        if pooled:
            return (drawn @ self.intersection) / (drawn @ self.union)
        return drawn @ (self.intersection / self.union) / n


def iou(prediction, mask) -> float:
    """Intersection over union of two masks, both boolean (H, W) arrays or tensors.

    Raises ValueError if they are not boolean, not of one shape, or if `mask`, the truth, is empty.
    """
    prediction, mask = _masks(prediction, "prediction", 2), _masks(mask, "mask", 2)
    if prediction.shape != mask.shape:
        raise ValueError(f"prediction is {tuple(prediction.shape)} and mask {tuple(mask.shape)}: they must agree")
    _refuse_empty(mask[None])
    return float((prediction & mask).sum() / (prediction | mask).sum())


def threshold_counts(maps, masks, *, thresholds=THRESHOLDS) -> ThresholdCounts:
    """Count intersection and union of each image at all thresholds at once.

    maps: (n, h, w) heat maps of one word, one an image. masks: (n, H, W) boolean, the truth; the maps are up-sampled
    to its size. thresholds: ascending numbers in [0, 1]. An image costs two histograms, of its map inside the mask
    and outside, however many thresholds there are; evenly spaced ones from 0 to 1 are the fastest.

    Raises ValueError for shapes that do not fit, NaN or infinite maps, masks that are not boolean, an empty mask, no
    images, or thresholds that are not ascending in [0, 1].
    """
    maps, masks = torch.as_tensor(maps).detach().cpu(), _masks(masks, "masks", 3)
    levels = _levels(thresholds)
    if maps.ndim != 3 or maps.numel() == 0:
        raise ValueError(f"expected (n, h, w) maps, one or more, got shape {tuple(maps.shape)}")
    if len(maps) != len(masks):
        raise ValueError(f"{len(maps)} maps for {len(masks)} masks: give one map for each mask")
    if not maps.isfinite().all():
        raise ValueError(f"maps {_numbers(~maps.isfinite().all(dim=(1, 2)))} hold NaN or infinite values")
    _refuse_empty(masks)
    images = max(1, IN_CACHE // masks[0].numel())
    counts = [_count(*piece, levels) for piece in zip(maps.float().split(images), masks.split(images), strict=True)]
    intersection, union = torch.cat(counts, dim=1).numpy()
    return ThresholdCounts(levels.double().numpy(), intersection, union)


def miou_curve(maps, masks, *, thresholds=THRESHOLDS, pooled: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The thresholds and, for each, the IoU averaged over the images, or pooled over their pixels.

    Arguments and errors are those of `threshold_counts`. Returns two float64 arrays of one length.
    """
    counts = threshold_counts(maps, masks, thresholds=thresholds)
    return counts.thresholds, counts.curve(pooled=pooled)


def max_miou(maps, masks, *, thresholds=THRESHOLDS, pooled: bool = False) -> float:
    """The maximum of `miou_curve`: the mIoU at the one threshold that is best for all the images together.

    The threshold is chosen on the very images it is judged on, as in the thesis, which is optimistic.
    """
    return float(miou_curve(maps, masks, thresholds=thresholds, pooled=pooled)[1].max())


def area_under_curve(maps, masks, *, thresholds=THRESHOLDS, pooled: bool = False) -> float:
    """The area under `miou_curve`, by the trapezoidal rule; at most 1 for thresholds from 0 to 1."""
    levels, values = miou_curve(maps, masks, thresholds=thresholds, pooled=pooled)
    return float(np.trapezoid(values, levels))


def _count(maps: torch.Tensor, masks: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """(n, h, w) maps, (n, H, W) masks -> (2, n, T) int64: intersection and union at each of the levels."""
    heat, masks = normalize(upsample(maps, tuple(masks.shape[1:]))).flatten(1), masks.flatten(1)
    bins = _exceeded(heat, levels).add_(masks.float(), alpha=len(levels) + 1).int()
    counts = torch.stack([torch.bincount(image, minlength=2 * len(levels) + 2) for image in bins])
    counts = counts.unflatten(1, (2, -1)).flip(2).cumsum(dim=2).flip(2)  # pixels that exceed so many levels or more
    outside, inside = counts.unbind(dim=1)
    return torch.stack([inside[:, 1:], outside[:, 1:] + inside[:, :1]])


def _exceeded(heat: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """How many of the levels each value exceeds, as float32.

    Even levels are not searched: a value exceeds all that lie before the one nearest to it.
    """
    last = len(levels) - 1
    if not torch.equal(levels, torch.arange(len(levels)) / last):
        return torch.bucketize(heat, levels).float()
    nearest = (heat * last).round_()
    return nearest.add_((nearest / last).lt_(heat))


def _levels(thresholds) -> torch.Tensor:
    levels = torch.as_tensor(thresholds, dtype=torch.float32)
    if levels.ndim != 1 or not len(levels) or not (levels.diff() > 0).all() or levels[0] < 0 or not levels[-1] <= 1:
        raise ValueError(f"thresholds must be ascending numbers in [0, 1], got {thresholds!r}")
    return levels


def _masks(masks, name: str, ndim: int) -> torch.Tensor:
    masks = torch.as_tensor(masks).detach().cpu()
    if masks.dtype != torch.bool:
        raise ValueError(
            f"{name} must be boolean, got {masks.dtype}: compare first, as labels == id or map > threshold"
        )
    if masks.ndim != ndim or masks.numel() == 0:
        shape = "(H, W)" if ndim == 2 else "(n, H, W), one or more"
        raise ValueError(f"expected {name} of shape {shape}, got {tuple(masks.shape)}")
    return masks


def _refuse_empty(masks: torch.Tensor) -> None:
    empty = masks.flatten(1).view(torch.uint8).amax(dim=1) == 0  # `any` of booleans takes twice as long
    if empty.any():
        raise ValueError(
            f"mask {_numbers(empty)} is empty: IoU is averaged over images that contain the class, leave it out"
        )


def _numbers(which: torch.Tensor) -> str:
    return ", ".join(map(str, which.nonzero().flatten().tolist()))
