"""Linear DAAM collapsed to one tensor.

Without the softmax everything after the query is linear in the text embedding x, so the sums commute
(thesis, slides "Linear DAAM"; t steps, i layers, l heads, s = d_head ** -0.5):

    LD(x) = sum_i sum_t sum_l Up( s * Q[t,i,l] (W_k[i,l] x) )
          = sum_i Up( s * (sum_t Q[t,i]) W_k[i] ) x          # the heads are columns of Q and rows of W_k
          = A x,        A: (H, W, d_text)

While generating this costs one addition per layer and step, its memory does not grow with the steps, and any word's
map is one matrix product afterwards.

Where the keys have a bias, k = W_k x + b, A has one column more and LD(x) = A [x; 1]. Where they are normalised,
k = r_i(x) g (W_k x + b) with one number r_i(x) a token and layer (`KeyProjection`), only steps and heads collapse:

    LD(x) = sum_i r_i(x) A_i [x; 1],        A_i = Up( s * (sum_t Q[t,i]) g [W_k[i], b[i]] )
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch.nn import functional as F

from .heatmaps import upsample
from .layers import KeyProjection, Layer
from .placement import bytes_of, on_device
from .precision import without_autocast
from .text import TokenEmbeddings, check_embeddings


@dataclass(frozen=True, eq=False)
class LinearMap:
    """The whole of Linear DAAM for one image.

        record.linear_map()(record.encode("car")["car"])  # (tokens, H, W)

    Attributes:
        weight: (H, W, d_text) float32, A in the derivation above.
        bias: (H, W) float32, the last column of A where the keys have a bias; else None.
    """

    weight: Float[torch.Tensor, "height width d_text"]
    bias: Float[torch.Tensor, "height width"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, d_text), of the weight."""
        return tuple(self.weight.shape)

    @without_autocast
    def __call__(self, embeddings: torch.Tensor | TokenEmbeddings) -> Float[torch.Tensor, "m height width"]:
        """Return (m, H, W) maps of (m, d_text) embeddings, differentiable in them; ValueError for another width."""
        height, width, d_text = self.weight.shape
        values = check_embeddings(embeddings, d_text, self.weight.device)
        bias = None if self.bias is None else self.bias.to(values.dtype).flatten()
        return F.linear(values, self.weight.to(values.dtype).reshape(-1, d_text), bias).view(-1, height, width)

    def clone(self) -> "LinearMap":
        """Return a copy."""
        return LinearMap(self.weight.clone(), None if self.bias is None else self.bias.clone())

    @property
    def nbytes(self) -> int:
        """Bytes of A."""
        return bytes_of(self)

    def to(self, device: torch.device) -> "LinearMap":
        """Return the map on `device`."""
        return on_device(self, device)

    def check(self, grid: tuple[int, int], d_text: int) -> None:
        """ValueError unless it is a map of this grid and width."""
        shapes = tuple(self.weight.shape), grid if self.bias is None else tuple(self.bias.shape)
        if shapes != ((*grid, d_text), grid):
            raise ValueError(f"its map has shape {shapes[0]}, expected {(*grid, d_text)}")


@dataclass(frozen=True, eq=False)
class NormedLinearMap:
    """The whole of Linear DAAM for one image of a model that normalises its keys: one linear map a layer."""

    maps: tuple[LinearMap, ...]  # A_i in the derivation above
    to_k: tuple[KeyProjection, ...]  # of each layer, for r_i

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, H, W, d_text), of the weights."""
        return (len(self.maps), *self.maps[0].shape)

    def __call__(self, embeddings: torch.Tensor | TokenEmbeddings) -> Float[torch.Tensor, "m height width"]:
        """Return (m, H, W) maps of (m, d_text) embeddings, differentiable in them; ValueError for another width."""
        weight = self.maps[0].weight
        values = check_embeddings(embeddings, weight.shape[2], weight.device)
        factors = [to_k.norm_factor(values)[:, None, None] for to_k in self.to_k]
        return functools.reduce(torch.add, [r * part(values) for r, part in zip(factors, self.maps, strict=True)])

    @property
    def nbytes(self) -> int:
        """Bytes of all A_i."""
        return bytes_of(self.maps)

    def clone(self) -> "NormedLinearMap":
        """Return a copy of the A_i, with the same r_i."""
        return NormedLinearMap(tuple(part.clone() for part in self.maps), self.to_k)

    def near(self, embeddings: torch.Tensor) -> LinearMap:
        """Return the linear map with each layer's r_i held at its mean over (m, d_text) embeddings."""
        values = embeddings.to(self.maps[0].weight)
        factors = [to_k.norm_factor(values).mean() for to_k in self.to_k]
        return LinearMap(functools.reduce(torch.add, [r * a.weight for r, a in zip(factors, self.maps, strict=True)]))


def collapse(layers: Sequence[Layer], grid: tuple[int, int]) -> LinearMap | NormedLinearMap:
    """Return A of the module's derivation, or each A_i where the keys are normalised, up-sampled to `grid`."""
    if all(layer.to_k.norm is None for layer in layers):
        return _sum(layers, grid)
    return NormedLinearMap(tuple(_sum([layer], grid) for layer in layers), tuple(layer.to_k for layer in layers))


@without_autocast
def _sum(layers: Sequence[Layer], grid: tuple[int, int]) -> LinearMap:
    """Return the sum of A_i over the layers: those of one grid are summed before they are up-sampled, once."""
    d_text, biased = layers[0].to_k.weight.shape[1], layers[0].to_k.bias is not None
    by_grid: dict[tuple[int, int], torch.Tensor] = {}
    for layer in layers:
        weight = layer.summed_queries() @ (layer.to_k.augmented() * layer.scale)
        by_grid[layer.grid] = by_grid[layer.grid] + weight if layer.grid in by_grid else weight
    # (h*w, columns) -> (columns, h, w) for the interpolation
    maps = [upsample(weight.T.unflatten(1, (h, w)), grid) for (h, w), weight in by_grid.items()]
    columns = torch.stack(maps).sum(dim=0)
    weight = columns[:d_text].permute(1, 2, 0).contiguous()
    return LinearMap(weight, columns[d_text] if biased else None)
