"""One cross-attention layer's part of a record."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float

from .placement import bytes_of, on_device
from .precision import without_autocast


@dataclass(frozen=True, eq=False)
class KeyProjection:
    """Map from text embeddings to the keys of one layer: k(c) = n(W c + b), where n is the identity or an RMS norm.

    With r(c) = (mean((W c + b)^2) + eps)^-1/2, one number a token, the norm is n(W c + b) = r(c) g (W c + b).
    """

    weight: Float[torch.Tensor, "channels d_text"]  # W
    bias: Float[torch.Tensor, " channels"] | None = None  # b
    norm: Float[torch.Tensor, " channels"] | None = None  # g, the weight of an RMS norm across all heads
    eps: float = 0.0  # of the norm

    @without_autocast
    def __call__(self, embeddings: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Return (m, heads * d_head) keys of (m, d_text) embeddings times `scale`, in the embeddings' type."""
        keys = embeddings @ (self.weight.to(embeddings.dtype) * scale).T
        if self.bias is not None:
            keys = keys + self.bias.to(keys.dtype) * scale
        if self.norm is not None:
            keys = keys * self.norm.to(keys.dtype) * self.norm_factor(embeddings)[:, None]
        return keys

    def norm_factor(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return (m,) numbers r(c) of (m, d_text) embeddings; ones without a norm."""
        if self.norm is None:
            return embeddings.new_ones(len(embeddings))
        keys = replace(self, norm=None)(embeddings)
        return (keys.square().mean(dim=1) + self.eps).rsqrt()

    def augmented(self) -> Float[torch.Tensor, "channels columns"]:
        """Return g [W, b], what the keys are up to r(c), in float32; without a bias g W, of one column less."""
        weight = self.weight.float()
        weight = weight if self.bias is None else torch.cat([weight, self.bias.float()[:, None]], dim=1)
        return weight if self.norm is None else weight * self.norm.float()[:, None]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The weight, and the bias and norm that there are, by name."""
        return {name: part for name in ("weight", "bias", "norm") if (part := getattr(self, name)) is not None}

    def to(self, device: torch.device) -> "KeyProjection":
        """Return the same on `device`."""
        return on_device(self, device)

    def equals(self, other: "KeyProjection") -> bool:
        """Return whether the two are the same, bit for bit."""
        own, others = self.tensors, other.tensors
        same = self.eps == other.eps and own.keys() == others.keys()
        return same and all(torch.equal(tensor, others[name]) for name, tensor in own.items())

    def of_heads(self, columns: torch.Tensor) -> "KeyProjection":
        """Return the keys of some of the channels. ValueError where a norm joins them all."""
        if self.norm is not None:
            raise ValueError("heads cannot be taken apart: the keys of this model are normalised across its heads")
        return KeyProjection(self.weight[columns], None if self.bias is None else self.bias[columns])


@dataclass(frozen=True, eq=False)
class Layer:
    """Tensors of one cross-attention layer (thesis: i) of one image: h * w positions, heads * d_head channels."""

    name: str  #: its module path in the denoiser
    grid: tuple[int, int]  #: (h, w) of its positions
    heads: int  #: their number
    scale: float  #: d_head ** -0.5, the factor of the scores
    to_k: KeyProjection  #: made the text's keys while generating (LoRA included)
    #: in the pipeline's dtype, of `store="queries"`
    queries: Float[torch.Tensor, "steps positions channels"] | None = None
    #: float32, the sum of the queries over the steps, of `store="linear"` and "maps"
    query_sum: Float[torch.Tensor, "positions channels"] | None = None
    #: (m, h, w) float32 each, of `store="maps"`: DAAM of the prompt and of the record's texts, padding included
    maps: tuple[torch.Tensor, ...] = ()

    def keys(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return (heads, m, d_head) keys of (m, d_text) embeddings, scaled, in the embeddings' type."""
        return self.to_k(embeddings, self.scale).unflatten(1, (self.heads, -1)).transpose(0, 1)

    def project(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return (m, heads * d_head) keys of (m, d_text) embeddings as they are, where the key weights lie."""
        return self.to_k(embeddings.to(self.to_k.weight.device))

    @property
    def key_weight(self) -> Float[torch.Tensor, "channels d_text"]:
        """(heads * d_head, d_text), W_k."""
        return self.to_k.weight

    def summed_queries(self) -> torch.Tensor:
        """Return the (h*w, heads * d_head) sum over the steps, accumulated in float32."""
        if self.queries is not None:
            return self.queries.sum(dim=0, dtype=torch.float32)
        assert self.query_sum is not None  # one of the two is stored
        return self.query_sum

    def first_not_finite(self) -> float:
        """Return the first step with NaN or infinite queries, 0 where a sum holds them, infinity where none does."""
        for stored in (self.queries, self.query_sum, *self.maps, self.key_weight):
            if stored is not None and not stored.isfinite().all():
                of_steps = stored is self.queries
                return int(stored.flatten(1).isfinite().all(dim=1).int().argmin()) if of_steps else 0
        return math.inf

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored of the image; the key weights are shared by the records of a trace."""
        return bytes_of(self.queries, self.query_sum, self.maps)

    def select(self, steps: Sequence[int] | None, heads: Sequence[int] | None) -> "Layer":
        """Return the layer with only some steps and heads (by number), and without maps, which are sums over both."""
        layer = self
        if steps is not None and layer.queries is not None:
            layer = replace(layer, queries=layer.queries[list(steps)], maps=())
        if heads is not None:
            columns = torch.arange(len(layer.key_weight)).view(layer.heads, -1)[list(heads)].flatten()
            layer = replace(
                layer,
                heads=len(heads),
                to_k=layer.to_k.of_heads(columns),
                queries=None if layer.queries is None else layer.queries[..., columns],
                query_sum=None if layer.query_sum is None else layer.query_sum[..., columns],
                maps=(),
            )
        return layer

    def check(self, d_text: int, steps: int | None) -> None:
        """ValueError if the tensors do not fit each other; `steps` is None where the queries are not stored."""
        weight = self.key_weight
        if weight.ndim != 2 or weight.shape[1] != d_text or self.heads < 1 or len(weight) % self.heads:
            shape, heads = tuple(weight.shape), self.heads
            raise ValueError(f"the keys of {self.name} have shape {shape}, not {heads} heads of width {d_text}")
        if any(tensor.shape[:1] != weight.shape[:1] for tensor in self.to_k.tensors.values()):
            raise ValueError(f"the bias or norm of the keys of {self.name} does not fit their {len(weight)} channels")
        if steps is None:
            return
        stored = self.query_sum if self.queries is None else self.queries
        expected = (() if self.queries is None else (steps,)) + (math.prod(self.grid), len(weight))
        got = None if stored is None else tuple(stored.shape)
        if got != expected:
            raise ValueError(f"the queries of {self.name} have shape {got}, expected {expected}")
        if any(maps.ndim != 3 or tuple(maps.shape[1:]) != self.grid for maps in self.maps):
            raise ValueError(f"the maps of {self.name} are not of its grid {self.grid}")
