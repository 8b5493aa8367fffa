"""Linear DAAM collapsed to one tensor.

Without the softmax everything after the query is linear in the text embedding x, so the sums commute
(thesis, slides "Linear DAAM"; t steps, i layers, l heads, s = d_head ** -0.5):

    LD(x) = sum_i sum_t sum_l Up( s * Q[t,i,l] (W_k[i,l] x) )
          = sum_i Up( s * (sum_t Q[t,i]) W_k[i] ) x          # the heads are columns of Q and rows of W_k
          = A x,        A: (H, W, d_text)

While generating this costs one addition per layer and step, its memory does not grow with the steps, and any word's
map is one matrix product afterwards.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .heatmaps import upsample
from .layers import Layer
from .text import TokenEmbeddings


@dataclass(frozen=True, eq=False)
class LinearMap:
    """The whole of Linear DAAM for one image. weight: (H, W, d_text) float32 (A in the derivation above)."""

    weight: torch.Tensor

    def __call__(self, embeddings: torch.Tensor | TokenEmbeddings) -> torch.Tensor:
        """(m, d_text) token embeddings -> (m, H, W) maps, differentiable in the embeddings.

        Raises ValueError if the embeddings are not (m, d_text).
        """
        height, width, d_text = self.weight.shape
        values = check_embeddings(embeddings, d_text, self.weight.device)
        return F.linear(values, self.weight.to(values.dtype).reshape(-1, d_text)).view(-1, height, width)


def check_embeddings(embeddings: torch.Tensor | TokenEmbeddings, d_text: int, device: torch.device) -> torch.Tensor:
    """The (m, d_text) values on `device`, in float32 (float64 stays); TypeError or ValueError if they are not that."""
    values = embeddings.values if isinstance(embeddings, TokenEmbeddings) else embeddings
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        raise TypeError(f"embeddings must be a floating-point tensor or TokenEmbeddings, got {_kind(values)}")
    if values.ndim != 2 or values.shape[1] != d_text or not len(values):
        raise ValueError(f"expected embeddings of shape (m, {d_text}) for this model, got {tuple(values.shape)}")
    return values.to(device, torch.promote_types(values.dtype, torch.float32))


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def collapse(layers: Sequence[Layer], grid: tuple[int, int]) -> LinearMap:
    """A of the module's derivation: layers of one grid are summed before they are up-sampled, once, to `grid`."""
    by_grid: dict[tuple[int, int], torch.Tensor | float] = defaultdict(float)
    for layer in layers:
        by_grid[layer.grid] = by_grid[layer.grid] + layer.summed_queries() @ (layer.key_weight.float() * layer.scale)
    # (h*w, d_text) -> (d_text, h, w) for the interpolation
    maps = [upsample(weight.T.unflatten(1, (h, w)), grid) for (h, w), weight in by_grid.items()]
    return LinearMap(torch.stack(maps).sum(dim=0).permute(1, 2, 0).contiguous())
