"""Linear DAAM collapsed to one tensor.

Without the softmax everything after the query is linear in the text embedding x, so the sums commute
(thesis, slides "Linear DAAM"; t steps, i layers, l heads, s = d_head ** -0.5):

    LD(x) = sum_i sum_t sum_l Up( s * Q[t,i,l] (W_k[i,l] x) )
          = sum_i Up( s * (sum_t Q[t,i]) W_k[i] ) x          # the heads are columns of Q and rows of W_k
          = A x,        A: (H, W, d_text)

While generating this costs one addition per layer and step, its memory does not grow with the steps, and any word's
map is one matrix product afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch.nn import functional as F

from .heatmaps import upsample
from .layers import Layer
from .text import TokenEmbeddings, check_embeddings


@dataclass(frozen=True, eq=False)
class LinearMap:
    """The whole of Linear DAAM for one image.

    Attributes:
        weight: (H, W, d_text) float32, A in the derivation above.
    """

    weight: Float[torch.Tensor, "height width d_text"]

    def __call__(self, embeddings: torch.Tensor | TokenEmbeddings) -> Float[torch.Tensor, "m height width"]:
        """(m, d_text) token embeddings -> (m, H, W) maps, differentiable in the embeddings.

        Raises ValueError if the embeddings are not (m, d_text).
        """
        height, width, d_text = self.weight.shape
        values = check_embeddings(embeddings, d_text, self.weight.device)
        return F.linear(values, self.weight.to(values.dtype).reshape(-1, d_text)).view(-1, height, width)


def collapse(layers: Sequence[Layer], grid: tuple[int, int]) -> LinearMap:
    """A of the module's derivation: layers of one grid are summed before they are up-sampled, once, to `grid`."""
    by_grid: dict[tuple[int, int], torch.Tensor] = {}
    for layer in layers:
        weight = layer.summed_queries() @ (layer.key_weight.float() * layer.scale)
        by_grid[layer.grid] = by_grid[layer.grid] + weight if layer.grid in by_grid else weight
    # (h*w, d_text) -> (d_text, h, w) for the interpolation
    maps = [upsample(weight.T.unflatten(1, (h, w)), grid) for (h, w), weight in by_grid.items()]
    return LinearMap(torch.stack(maps).sum(dim=0).permute(1, 2, 0).contiguous())
