"""One cross-attention layer's part of a record, and its softmax maps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.checkpoint import checkpoint


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

    def summed_queries(self) -> torch.Tensor:
        """(h*w, heads * d_head) float32: sum over the steps, accumulated in float32."""
        return self.query_sum if self.queries is None else self.queries.sum(dim=0, dtype=torch.float32)

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
        most `max_bytes`; with gradients, each piece is computed again in the backward pass, not kept.
        """
        keys = embeddings @ (self.key_weight.to(embeddings.dtype) * self.scale).T
        keys = keys.unflatten(1, (self.heads, -1)).permute(1, 2, 0)  # (head, d_head, m)
        positions = self.queries.shape[1]
        row_bytes = self.heads * len(embeddings) * embeddings.element_size()  # of one position of one step
        rows = max(1, min(positions, max_bytes // row_bytes))
        steps = max(1, max_bytes // (row_bytes * rows))
        maps = []
        for start in range(0, positions, rows):
            total: torch.Tensor | float = 0.0
            for queries in self.queries[:, start : start + rows].split(steps):
                if keys.requires_grad and torch.is_grad_enabled():
                    total = total + checkpoint(_attend, queries, keys, use_reentrant=False)
                else:
                    total = total + _attend(queries, keys)
            maps.append(total)
        return torch.cat(maps).T.unflatten(1, self.grid)


def _attend(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """(step, n, head * d_head) and (head, d_head, m) -> (n, m): probabilities summed over steps and heads."""
    heads, d_head, _ = keys.shape
    queries = queries.to(keys.dtype).unflatten(2, (heads, d_head)).transpose(1, 2)  # (step, head, n, d_head)
    return torch.softmax(queries @ keys, dim=-1).sum(dim=(0, 1))
