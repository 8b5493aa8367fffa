"""Edge-aware up-sampling: maps that follow the edges of their image.

The guided filter (He, Sun and Tang, ECCV 2010). In each window the map p is a linear function of the image's colours I,

    q = a . I + b,      a = (Cov(I) + epsilon 1)^-1 Cov(I, p),      b = mean(p) - a . mean(I),

and each pixel takes the mean of a and b over the windows that it lies in. Where the image has an edge, so may the map;
where it has none, the map is smooth.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.nn import functional as F

from ..attention.heatmaps import upsample

EPSILON = 1e-3  # variance of colours in [0, 1]: smaller changes are no edge


def guided_upsample(
    maps: Float[torch.Tensor, "K h w"],
    image: UInt8[np.ndarray, "H W 3"],
    *,
    radius: int | None = None,
    epsilon: float = EPSILON,
) -> Float[torch.Tensor, "K H W"]:
    """Return maps at the size of their image, bilinear and then along its edges.

        guided_upsample(token.probabilities(record), np.asarray(image))

    Linear in the maps, and a constant map stays constant: probabilities that sum to one do so afterwards, but single
    values may leave [0, 1] a little. `radius` is that of the windows, in pixels (None: one cell of the maps). Raises
    ValueError for an image that is no (H, W, 3) uint8 array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected an image of (H, W, 3) uint8, got {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    radius = max(1, round(height / maps.shape[1])) if radius is None else radius
    guide = torch.tensor(image, device=maps.device).permute(2, 0, 1).to(maps) / 255
    values = upsample(maps, (height, width))
    mean_guide, mean_values = _means(guide, radius), _means(values, radius)
    pairs = (guide[:, None] * guide).flatten(0, 1)
    spread = _means(pairs, radius) - (mean_guide[:, None] * mean_guide).flatten(0, 1)
    spread = spread.unflatten(0, (3, 3)).permute(2, 3, 0, 1) + epsilon * torch.eye(3).to(guide)  # (H, W, 3, 3)
    products = (guide[:, None] * values).flatten(0, 1)
    common = _means(products, radius) - (mean_guide[:, None] * mean_values).flatten(0, 1)
    slope = torch.linalg.solve(spread, common.unflatten(0, (3, -1)).permute(2, 3, 0, 1)).permute(2, 3, 0, 1)
    offset = mean_values - (slope * mean_guide[:, None]).sum(dim=0)
    slope = _means(slope.flatten(0, 1), radius).view_as(slope)
    return (slope * guide[:, None]).sum(dim=0) + _means(offset, radius)


def _means(values: Float[torch.Tensor, "C H W"], radius: int) -> Float[torch.Tensor, "C H W"]:
    """The mean of each pixel's window, cut off at the border."""
    for _ in range(2):  # along the rows, then along the columns: differences of running sums
        padding, length = (radius + 1, radius), values.shape[2]
        sums, count = (F.pad(each, padding).cumsum(dim=2) for each in (values, torch.ones_like(values[:1, :1])))
        last, first = slice(2 * radius + 1, None), slice(length)
        values = ((sums[..., last] - sums[..., first]) / (count[..., last] - count[..., first])).transpose(1, 2)
    return values
