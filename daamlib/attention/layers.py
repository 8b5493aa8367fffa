"""One cross-attention layer's part of a record, and its softmax maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TENSORS = ("key_weight", "queries", "query_sum")  # of a layer
IN_CACHE = 2**21  # bytes of attention probabilities that a CPU works on at a time; found by trial
QUERIES_IN_CACHE = 3 * 2**20  # bytes of queries, likewise
SAFE_POWER = 64  # of two: sums of such powers and their reciprocals stay far inside the range of float32


@dataclass(frozen=True, eq=False)
class Layer:
    """What one cross-attention layer (thesis: i) leaves behind of one image.

    name: module path in the U-Net. grid: (h, w). scale: d_head ** -0.5.
    key_weight: (heads * d_head, d_text), W_k as it was while generating (LoRA included).
    queries: (step, h*w, heads * d_head) in the pipeline's dtype, or None with `store="linear"`.
    query_sum: (h*w, heads * d_head) float32, the sum over steps, or None where `queries` is kept.
    """

    name: str
    grid: tuple[int, int]
    heads: int
    scale: float
    key_weight: torch.Tensor
    queries: torch.Tensor | None = None
    query_sum: torch.Tensor | None = None

    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(m, d_text) embeddings -> (m, heads * d_head) keys, in float32 where the key weights lie."""
        return embeddings.to(self.key_weight.device) @ self.key_weight.float().T

    def summed_queries(self) -> torch.Tensor:
        """(h*w, heads * d_head) float32: sum over the steps, accumulated in float32."""
        return self.query_sum if self.queries is None else self.queries.sum(dim=0, dtype=torch.float32)

    def to(self, device: torch.device) -> "Layer":
        """The layer with its tensors on `device`."""
        kept = {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in kept.items()})

    def select(self, steps: Sequence[int] | None, heads: Sequence[int] | None) -> "Layer":
        """The layer with only some steps and heads (by number)."""
        layer = self
        if steps is not None:
            layer = replace(layer, queries=layer.queries[list(steps)])
        if heads is not None:
            columns = torch.arange(len(layer.key_weight)).view(layer.heads, -1)[list(heads)].flatten()
            layer = replace(
                layer,
                heads=len(heads),
                key_weight=layer.key_weight[columns],
                queries=None if layer.queries is None else layer.queries[..., columns],
                query_sum=None if layer.query_sum is None else layer.query_sum[..., columns],
            )
        return layer

    def softmax_maps(self, embeddings: torch.Tensor, max_bytes: int) -> torch.Tensor:
        """(m, d_text) -> (m, h, w): softmax over the m tokens, summed over steps and heads (thesis: D of layer i).

        Works through the steps (and, if one step is too large, the positions) in pieces whose probabilities take at
        most `max_bytes`, and on a CPU no more than stay in its cache; with gradients, each piece is computed again in
        the backward pass, not kept.
        """
        keys = embeddings @ (self.key_weight.to(embeddings.dtype) * self.scale).T
        keys = keys.unflatten(1, (self.heads, -1)).transpose(0, 1)  # (head, m, d_head)
        differentiable = keys.requires_grad and torch.is_grad_enabled()
        in_cache = keys.device.type == "cpu" and not differentiable
        size = min(max_bytes, IN_CACHE) if in_cache else max_bytes
        positions = self.queries.shape[1]
        row_bytes = self.heads * len(embeddings) * embeddings.element_size()  # of one position of one step
        rows = max(1, min(positions, size // row_bytes))
        steps = max(1, size // (row_bytes * positions))
        maps = []
        for start in range(0, positions, rows):
            total: torch.Tensor | float = 0.0
            for queries in self.queries[:, start : start + rows].split(steps):
                if differentiable:
                    total = total + checkpoint(_attend, queries, keys, use_reentrant=False)
                else:
                    total = total + (_attend_in_place if in_cache else _attend)(queries, keys)
            maps.append(total)
        return torch.cat(maps, dim=1).unflatten(1, self.grid)


def _attend(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(step, n, head * d_head) and (head, m, d_head) -> (m, n): probabilities summed over steps and heads."""
    probabilities = torch.softmax(torch.bmm(keys, _columns(queries, keys)), dim=1)
    return probabilities.unflatten(2, (len(queries), -1)).sum(dim=(0, 2))


def _attend_in_place(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The same on a CPU, up to rounding: each pass over the scores finds them in the cache, and writes them there.

    The products of all heads are made for a few steps before the next: each head reads a part of the same queries.
    2 ** (x / ln 2) is e ** x, in half the time. The largest score of a position is taken off only where a power of
    two would leave the range of float32 without it.
    """
    tokens = keys.shape[1]
    keys = F.pad(keys, (0, 0, 0, max(0, 4 - tokens)))  # matrix products with 4 rows are faster than with 2 or 3
    keys = keys / math.log(2)
    steps, positions, channels = queries.shape
    scores = keys.new_empty(*keys.shape[:2], steps * positions)
    few = max(1, QUERIES_IN_CACHE // (positions * channels * keys.element_size()))
    for part, out in zip(queries.split(few), scores.split(few * positions, dim=2), strict=True):
        torch.bmm(keys, _columns(part, keys), out=out)
    scores = scores[:, :tokens]
    low, high = scores.aminmax()
    if not max(-low, high) < SAFE_POWER:
        scores -= scores.amax(dim=1, keepdim=True)
    scores.exp2_()
    weights = scores.sum(dim=1, keepdim=True).reciprocal_()
    total = scores[0] * weights[0]
    for of_head, weight in zip(scores[1:], weights[1:], strict=True):
        total.addcmul_(of_head, weight)
    return total.unflatten(1, (steps, -1)).sum(dim=1)


def _columns(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(head, d_head, step * n): products stand as (token, position), so that a softmax over few tokens is fast too."""
    return queries.to(keys.dtype).flatten(0, 1).unflatten(1, (len(keys), -1)).permute(1, 2, 0)
