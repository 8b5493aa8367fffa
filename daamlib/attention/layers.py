"""One cross-attention layer's part of a record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class Layer:
    """What one cross-attention layer (thesis: i) leaves behind of one image.

    Attributes:
        name: its module path in the denoiser.
        grid: (h, w) of its positions.
        heads: number of heads.
        scale: d_head ** -0.5, the factor of the scores.
        key_weight: (heads * d_head, d_text), W_k as it was while generating (LoRA included).
        queries: (step, h*w, heads * d_head) in the pipeline's dtype; None unless the trace stored "queries".
        query_sum: (h*w, heads * d_head) float32, the sum over the steps; None where `queries` is kept.
        maps: text -> (m, h, w) float32, DAAM of the texts that a trace with `store="maps"` was given, and of the prompt
            under None; padding included.
    """

    name: str
    grid: tuple[int, int]
    heads: int
    scale: float
    key_weight: Float[torch.Tensor, "channels d_text"]
    queries: Float[torch.Tensor, "steps positions channels"] | None = None
    query_sum: Float[torch.Tensor, "positions channels"] | None = None
    maps: Mapping[str | None, torch.Tensor] = field(default_factory=dict)

    def keys(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(m, d_text) embeddings -> (heads, m, d_head) keys, scaled, in the embeddings' type."""
        keys = embeddings @ (self.key_weight.to(embeddings.dtype) * self.scale).T
        return keys.unflatten(1, (self.heads, -1)).transpose(0, 1)

    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(m, d_text) embeddings -> (m, heads * d_head) keys as they are, in float32 where the key weights lie."""
        return embeddings.to(self.key_weight.device) @ self.key_weight.float().T

    def summed_queries(self) -> torch.Tensor:
        """(h*w, heads * d_head) float32: sum over the steps, accumulated in float32."""
        if self.queries is not None:
            return self.queries.sum(dim=0, dtype=torch.float32)
        assert self.query_sum is not None  # one of the two is kept
        return self.query_sum

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept of the image; the key weights are shared by the records of a trace."""
        kept = [self.queries, self.query_sum, *self.maps.values()]
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    def to(self, device: torch.device) -> "Layer":
        """The layer with its tensors on `device`."""
        names = [name for name in ("key_weight", "queries", "query_sum") if getattr(self, name) is not None]
        maps = {text: values.to(device) for text, values in self.maps.items()}
        return replace(self, maps=maps, **{name: getattr(self, name).to(device) for name in names})

    def select(self, steps: Sequence[int] | None, heads: Sequence[int] | None) -> "Layer":
        """The layer with only some steps and heads (by number); kept maps, which are sums over both, are left out."""
        layer = self
        if steps is not None and layer.queries is not None:
            layer = replace(layer, queries=layer.queries[list(steps)], maps={})
        if heads is not None:
            columns = torch.arange(len(layer.key_weight)).view(layer.heads, -1)[list(heads)].flatten()
            layer = replace(
                layer,
                heads=len(heads),
                key_weight=layer.key_weight[columns],
                queries=None if layer.queries is None else layer.queries[..., columns],
                query_sum=None if layer.query_sum is None else layer.query_sum[..., columns],
                maps={},
            )
        return layer
