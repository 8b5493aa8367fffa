"""Scores of heat maps as segmentations: IoU over thresholds, averaged over images or pooled.

    daamlib.metrics.max_miou(record.daam()["car"][None], mask[None])

A heat map becomes a mask by a threshold t: it is up-sampled bilinearly to the size of the true mask, scaled to its own
[0, 1] (min-max), and a pixel belongs to the word where the map is larger than t. With the true mask G,

    TP(t) = pixels of G whose map is above t            = |prediction(t) and G|
    FP(t) = pixels outside G whose map is above t
    IoU(t) = TP(t) / (|G| + FP(t))                      |prediction(t) or G| = |G| + FP(t)

so two cumulative histograms of the map, of its pixels inside G and of those outside, give the whole curve in one pass
over the pixels, however many thresholds there are.

    mIoU(t) = 1/n sum_j IoU_j(t)                        (thesis: over the n images that contain the class)
    pooled IoU(t) = sum_j TP_j(t) / sum_j (|G_j| + FP_j(t))             (OVAM, Marcos-Manchón et al. 2024)

Pooled, large objects weigh more. An empty mask (an image without the class) has no IoU and is a ValueError.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64

from .attention.heatmaps import normalize, require_ratio, upsample

Array = np.ndarray | torch.Tensor

THRESHOLDS = tuple(i / 100 for i in range(101))
IN_CACHE = 2**18  # pixels that are counted at a time; chosen by trial
trapezoid = getattr(np, "trapezoid", None) or np.trapz  # type: ignore[attr-defined]  # numpy 2 renamed it


@dataclass(frozen=True, eq=False)
class ThresholdCounts:
    """Counts of n images at T thresholds, from which all metrics follow.

    Attributes:
        thresholds: ascending in [0, 1].
        intersection: TP, in pixels of each image at each threshold.
        union: |G| + FP, likewise.
    """

    thresholds: Float[np.ndarray, " T"]
    intersection: Int64[np.ndarray, "n T"]
    union: Int64[np.ndarray, "n T"]

    def curve(self, *, pooled: bool = False) -> Float[np.ndarray, " T"]:
        """Return the IoU at each threshold, averaged over the images (mIoU), or pooled over all their pixels."""
        if pooled:
            return self.intersection.sum(axis=0) / self.union.sum(axis=0)
        return (self.intersection / self.union).mean(axis=0)

    def resampled_curves(
        self, drawn: Int64[np.ndarray, "resamples n"], *, pooled: bool = False
    ) -> Float[np.ndarray, "resamples T"]:
        """Return the curves of resampled images (the bootstrap) by `draw_images`; NaN where no image was drawn.

        Quantiles of any statistic of the rows are its interval over images: `np.nanquantile(curves.max(axis=1), [0.025,
        0.975])` is the 95 % interval of the maximum.
        """
        with np.errstate(invalid="ignore"):
            if pooled:
                return (drawn @ self.intersection) / (drawn @ self.union)
            return drawn @ (self.intersection / self.union) / drawn.sum(axis=1, keepdims=True)


def draw_images(n: int, resamples: int = 1000, *, seed: int = 0) -> Int64[np.ndarray, "resamples n"]:
    """Draw n of n images with replacement, `resamples` times: how often each image is in each resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def iou(prediction: Array, mask: Array) -> float:
    """Return the intersection over union of two (H, W) boolean masks, arrays or tensors; `mask` is the truth.

    Raises ValueError for masks that are not boolean or not of one shape, or an empty `mask`.
    """
    prediction, mask = _masks(prediction, "prediction", 2), _masks(mask, "mask", 2)
    if prediction.shape != mask.shape:
        raise ValueError(f"prediction is {tuple(prediction.shape)} and mask {tuple(mask.shape)}: they must agree")
    _refuse_empty(mask[None])
    return float((prediction & mask).sum() / (prediction | mask).sum())


def threshold_counts(maps: Array, masks: Array, *, thresholds: Sequence[float] | Array = THRESHOLDS) -> ThresholdCounts:
    """Count intersection and union of each image at all thresholds at once.

    Args:
        maps: (n, h, w) heat maps of one word, one an image.
        masks: (n, H, W) boolean, the truth; the maps are up-sampled to its size, which has their ratio.
        thresholds: T ascending numbers in [0, 1]; evenly spaced ones from 0 to 1 are the fastest.

    Returns:
        The counts of n images at T thresholds.

    Raises:
        ValueError: for shapes that do not fit, NaN or infinite maps, masks that are not boolean, an empty mask, no
            images, or thresholds that are not ascending in [0, 1].
    """
    maps, masks = torch.as_tensor(maps).detach().cpu(), _masks(masks, "masks", 3)
    levels = torch.as_tensor(thresholds, dtype=torch.float32)
    if levels.ndim != 1 or not len(levels) or not (levels.diff() > 0).all() or levels[0] < 0 or not levels[-1] <= 1:
        raise ValueError(f"thresholds must be ascending numbers in [0, 1], got {thresholds!r}")
    if maps.ndim != 3 or maps.numel() == 0:
        raise ValueError(f"expected (n, h, w) maps, one or more, got shape {tuple(maps.shape)}")
    if len(maps) != len(masks):
        raise ValueError(f"{len(maps)} maps for {len(masks)} masks: give one map for each mask")
    require_ratio("the mask", (masks.shape[1], masks.shape[2]), (maps.shape[1], maps.shape[2]))
    if not maps.isfinite().all():
        raise ValueError(f"maps {_numbers(~maps.isfinite().all(dim=(1, 2)))} hold NaN or infinite values")
    _refuse_empty(masks)
    images = max(1, IN_CACHE // masks[0].numel())
    counts = [_count(*piece, levels) for piece in zip(maps.float().split(images), masks.split(images), strict=True)]
    intersection, union = torch.cat(counts, dim=1).numpy()
    return ThresholdCounts(levels.double().numpy(), intersection, union)


def miou_curve(
    maps: Array, masks: Array, *, thresholds: Sequence[float] | Array = THRESHOLDS, pooled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the thresholds and, for each, the IoU averaged over the images, or pooled over their pixels.

    Other arguments and errors are those of `threshold_counts`. Both arrays are float64, of one length.
    """
    counts = threshold_counts(maps, masks, thresholds=thresholds)
    return counts.thresholds, counts.curve(pooled=pooled)


def max_miou(
    maps: Array, masks: Array, *, thresholds: Sequence[float] | Array = THRESHOLDS, pooled: bool = False
) -> float:
    """Return the maximum of `miou_curve`: the mIoU at the one threshold that is best for all the images together.

    The threshold is chosen on the very images that are evaluated, as in the thesis, which is optimistic.
    """
    return float(miou_curve(maps, masks, thresholds=thresholds, pooled=pooled)[1].max())


def area_under_curve(
    maps: Array, masks: Array, *, thresholds: Sequence[float] | Array = THRESHOLDS, pooled: bool = False
) -> float:
    """Return the area under `miou_curve`, by the trapezoidal rule; at most 1 for thresholds from 0 to 1."""
    levels, values = miou_curve(maps, masks, thresholds=thresholds, pooled=pooled)
    return float(trapezoid(values, levels))


def correlation(one: Array, other: Array) -> float:
    """Return Pearson's correlation of two (h, w) maps over their cells, in [-1, 1]; NaN where a map is constant.

    It is 1 for the same shape, whatever scale and offset. Raises ValueError where the shapes differ.
    """
    one, other = (torch.as_tensor(heat).detach().cpu().double() for heat in (one, other))
    if one.shape != other.shape:
        raise ValueError(f"maps of one shape can be compared, got {tuple(one.shape)} and {tuple(other.shape)}")
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()


def _count(maps: torch.Tensor, masks: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return (2, n, T) int64, intersection and union at each level, of (n, h, w) maps and (n, H, W) masks."""
    _, height, width = masks.shape
    heat, masks = normalize(upsample(maps, (height, width))).flatten(1), masks.flatten(1)
    last = len(levels) - 1
    if torch.equal(levels, torch.arange(len(levels)) / last):  # even: no search, all before the nearest are exceeded
        nearest = (heat * last).round_()
        exceeded = nearest.add_((nearest / last).lt_(heat))
    else:
        exceeded = torch.bucketize(heat, levels).float()
    bins = exceeded.add_(masks.float(), alpha=len(levels) + 1).int()  # how many levels a pixel exceeds; inside G after
    counts = torch.stack([torch.bincount(image, minlength=2 * len(levels) + 2) for image in bins])
    outside, inside = counts.unflatten(1, (2, -1)).flip(2).cumsum(dim=2).flip(2).unbind(dim=1)  # so many or more
    return torch.stack([inside[:, 1:], inside[:, :1] + outside[:, 1:]])  # TP, |G| + FP


def _masks(masks: Array, name: str, ndim: int) -> torch.Tensor:
    masks = torch.as_tensor(masks).detach().cpu()
    if masks.dtype != torch.bool:
        raise ValueError(f"{name} must be boolean, got {masks.dtype}: compare first, as labels == id or map > level")
    if masks.ndim != ndim or masks.numel() == 0:
        shape = "(H, W)" if ndim == 2 else "(n, H, W), one or more"
        raise ValueError(f"expected {name} of shape {shape}, got {tuple(masks.shape)}")
    return masks


def _refuse_empty(masks: torch.Tensor) -> None:
    empty = masks.flatten(1).view(torch.uint8).amax(dim=1) == 0  # `any` of booleans takes twice as long
    if empty.any():
        raise ValueError(f"mask {_numbers(empty)} is empty: IoU is of images that contain the class, leave it out")


def _numbers(which: torch.Tensor) -> str:
    return ", ".join(map(str, which.nonzero().flatten().tolist()))
