"""How well heat maps segment: IoU over thresholds, averaged over images.

A heat map becomes a mask by a threshold: it is up-sampled bilinearly to the size of the true mask, scaled to its own
[0, 1] (min-max), and a pixel belongs to the word where the map is larger than the threshold. mIoU is the thesis': the
IoU of each image, averaged over the images that contain the class. An image without the class (an empty mask) has no
IoU and is refused; leave it out before.
"""

import numpy as np
import torch

from .heatmaps import upsample

THRESHOLDS = tuple(i / 100 for i in range(101))


def iou(prediction, mask) -> float:
    """Intersection over union of two masks, both boolean (H, W) arrays or tensors.

    Raises ValueError if they are not boolean, not of one shape, or if `mask`, the truth, is empty.
    """
    prediction, mask = _masks(prediction, "prediction", 2), _masks(mask, "mask", 2)
    if prediction.shape != mask.shape:
        raise ValueError(f"prediction is {tuple(prediction.shape)} and mask {tuple(mask.shape)}: they must agree")
    _refuse_empty(mask[None])
    return float((prediction & mask).sum() / (prediction | mask).sum())


def miou_curve(maps, masks, *, thresholds=THRESHOLDS) -> tuple[np.ndarray, np.ndarray]:
    """The thresholds and, for each, the IoU averaged over the images.

    maps: (n, h, w) heat maps of one word, one an image. masks: (n, H, W) boolean, the truth; the maps are up-sampled
    to its size. thresholds: ascending numbers in [0, 1]. All thresholds of an image are counted at once, from a
    histogram of its map inside the mask and one of the whole map.

    Returns two float64 arrays of one length. Raises ValueError for shapes that do not fit, NaN or infinite maps,
    masks that are not boolean, an empty mask, no images, or thresholds that are not ascending in [0, 1].
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
    curves = [_iou_at(heat, mask, levels) for heat, mask in zip(maps.float(), masks, strict=True)]
    return levels.double().numpy(), torch.stack(curves).mean(dim=0).numpy()


def max_miou(maps, masks, *, thresholds=THRESHOLDS) -> float:
    """The maximum of `miou_curve`: the mIoU at the one threshold that is best for all the images together."""
    return float(miou_curve(maps, masks, thresholds=thresholds)[1].max())


def area_under_curve(maps, masks, *, thresholds=THRESHOLDS) -> float:
    """The area under `miou_curve`, by the trapezoidal rule; at most 1 for thresholds from 0 to 1."""
    levels, values = miou_curve(maps, masks, thresholds=thresholds)
    return float(np.trapezoid(values, levels))


def _iou_at(heat: torch.Tensor, mask: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """(h, w) map, (H, W) mask -> float64 IoU at each of the levels."""
    heat = upsample(heat[None], tuple(mask.shape))[0]
    span = heat.max() - heat.min()
    heat = (heat - heat.min()) / (span if span > 0 else 1)  # a constant map becomes zero, as in HeatMaps.normalized
    below = torch.bucketize(heat, levels)  # how many levels the pixel exceeds
    counts = torch.bincount((2 * below + mask).flatten(), minlength=2 * len(levels) + 2).view(-1, 2)
    outside, inside = counts.flip(0).cumsum(0).flip(0)[1:].double().unbind(1)  # pixels that exceed each level
    return inside / (outside + mask.sum())


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
    empty = ~masks.any(dim=2).any(dim=1)
    if empty.any():
        raise ValueError(
            f"mask {_numbers(empty)} is empty: IoU is averaged over images that contain the class, leave it out"
        )


def _numbers(which: torch.Tensor) -> str:
    return ", ".join(map(str, which.nonzero().flatten().tolist()))
