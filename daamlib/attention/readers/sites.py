"""What every reader speaks of: the sites of a model, and one pass of its denoiser."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Site:
    """One attention that can be read.

    Attributes:
        name: its module path in the denoiser.
        module: the attention, whose `to_k` makes keys of text embeddings.
        to_q: the module whose output the queries are, (batch, h*w, heads * d_head).
        heads: number of heads.
        scale: d_head ** -0.5.
        d_text: the width of the text embeddings.
    """

    name: str
    module: Any
    to_q: torch.nn.Module
    heads: int
    scale: float
    d_text: int

    def key_weight(self, like: torch.Tensor) -> torch.Tensor:
        """(heads * d_head, d_text): W_k as it acts now, in the type of `like` and where it lies.

        Asked of the layer itself, so that a LoRA, its scale and off-loading count.
        """
        return self.module.to_k(torch.eye(self.d_text, dtype=like.dtype, device=like.device)).T.contiguous()


@dataclass(frozen=True, eq=False)
class Pass:
    """What one call of the denoiser says: sample (batch, channel, h, w), timestep, text (batch, token, d_text)."""

    sample: torch.Tensor
    timestep: Any
    text: torch.Tensor
