"""Fingerprints, which answer "is this the same model?": a few numbers for each cross-attention's key weights.

They are products of its key weights W_k with fixed random vectors, u_j^T W_k p_j, which change with a rotation, a
fine-tune or a LoRA; the norms of the weights hardly do.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

PROBES = 16  # numbers of a layer
TOLERANCE = 0.015  # of their length; rounding the weights to bfloat16 changed it by up to 0.0034 in the bundled model


@functools.lru_cache(maxsize=64)
def random_signs(width: int, seed: int) -> torch.Tensor:
    """Return (PROBES, width) of -1 and 1, which every precision holds exactly."""
    return 2.0 * torch.randint(2, (PROBES, width), generator=torch.Generator().manual_seed(seed)) - 1


@dataclass(frozen=True)
class Fingerprint:
    """Numbers that a model's cross-attention keys make of random vectors."""

    layers: Mapping[str, tuple[float, ...]]  # `PROBES` numbers for each layer, by its name

    @classmethod
    def of_keys(cls, keys: Mapping[str, Callable[[torch.Tensor], torch.Tensor]], d_text: int) -> "Fingerprint":
        """Measure the key projections of layers, by name; the weights' precision and place make no difference.

        Each takes float32 embeddings (m, d_text) on the CPU, wherever it computes, to keys (m, inner).
        """
        layers = {}
        for name, project in keys.items():
            with torch.no_grad():
                projected = project(random_signs(d_text, seed=1)).detach().cpu().double()
            layers[name] = tuple((projected * random_signs(projected.shape[1], seed=2)).sum(dim=1).tolist())
        return cls(layers)

    def of_layers(self, names: Iterable[str]) -> "Fingerprint":
        """Return that of these layers, as far as the model has them."""
        chosen = set(names)
        return Fingerprint({name: numbers for name, numbers in self.layers.items() if name in chosen})

    def difference(self, other: "Fingerprint") -> str | None:
        """Return the first difference, as in "the records have ...", or None where they are the same model."""
        if list(self.layers) != list(other.layers):
            return f"other cross-attention layers ({len(self.layers)} and {len(other.layers)} of them)"
        for name, numbers in self.layers.items():
            if math.dist(numbers, other.layers[name]) > TOLERANCE * math.hypot(*numbers):
                return f"other key weights in {name}"
        return None
