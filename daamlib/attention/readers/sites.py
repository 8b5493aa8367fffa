"""The sites of a model: its attentions that can be read, and what all readers ask of a pipeline."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..fingerprint import Fingerprint
from ..layers import KeyProjection
from ..watch import unwatched

EMBED = ("encode_prompt", "_encode_prompt")  # methods that embed prompts; an older pipeline has the second alone
HARMLESS = ("offload", "casting", "autocast", "tracker")  # hooks of diffusers that leave what a layer computes as it is
PROBE = 256.0  # a power of two: next to weights so much larger a bias costs no digits in half precision


@dataclass(frozen=True, eq=False)
class Site:
    """One attention that can be read."""

    name: str  # its module path in the denoiser
    module: Any  # the attention, whose `to_k` makes keys of embeddings, normalised by its `norm_k` if it has one
    to_q: torch.nn.Module  # makes queries, (batch, h*w, heads * d_head)
    heads: int
    scale: float  # d_head ** -0.5
    d_text: int  # the width of the text embeddings
    linear: bool = False  # whether it is a linear attention, without a softmax

    @property
    def queries(self) -> torch.nn.Module:
        """The module whose output the queries are: `to_q`, or the norm after it."""
        return getattr(self.module, "norm_q", None) or self.to_q

    @property
    def keys(self) -> torch.nn.Module:
        """The module whose output the keys are: `to_k`, or the norm after it."""
        return getattr(self.module, "norm_k", None) or self.module.to_k

    def key_projection(self, like: torch.Tensor) -> KeyProjection:
        """Return what makes its keys as it acts now, in the type of `like` and where it lies.

        Measured by calling the layers past their hooks, so that LoRA weights, their scale and off-loading are included.
        """
        layer, norm = self.module.to_k, getattr(self.module, "norm_k", None)
        bias, eps = None, 0.0
        if _is_plain(layer, like):
            weight = layer.weight.detach().clone()
            bias = None if layer.bias is None else layer.bias.detach().clone()
        else:
            to_k, unit = layer.forward, torch.eye(self.d_text, dtype=like.dtype, device=like.device)
            if getattr(layer, "bias", None) is None:
                weight = to_k(unit).T.contiguous()
            else:
                bias = to_k(torch.zeros_like(unit[:1]))[0]
                weight = ((to_k(PROBE * unit) - to_k(-PROBE * unit)) / (2 * PROBE)).T.contiguous()
        if norm is not None:
            eps = float(norm.eps)
            # of ones the norm is g / sqrt(1 + eps)
            norm = norm.forward(torch.ones_like(weight[:, :1].T))[0] * (1 + eps) ** 0.5
        return KeyProjection(weight, bias, norm, eps)


def _is_plain(to_k: Any, like: torch.Tensor) -> bool:
    """Return whether a layer is its weight alone, as without LoRA and off-loading; then no products need be made."""
    if type(to_k) is not torch.nn.Linear or "forward" in vars(to_k):
        return False
    return to_k.weight.dtype == like.dtype and to_k.weight.device == like.device


def refuse_caches(denoiser: torch.nn.Module) -> None:
    """ValueError for a denoiser with hooks of diffusers that skip or re-use parts of a pass, as its caches do."""
    for name, module in denoiser.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        others = [hook for hook in hooks if not any(part in hook for part in HARMLESS)]
        if others:
            raise ValueError(
                f"{name or 'the denoiser'} has the hooks {others}, such as caches that skip or re-use attention: its "
                "passes are not those of the model alone. Call disable_cache() on the denoiser before tracing"
            )


def embedder_of(pipe: Any) -> Callable[..., Any]:
    """Return the pipeline's method that embeds prompts, past a trace that watches it. ValueError if it has none."""
    name = next((name for name in EMBED if hasattr(pipe, name)), None)
    if name is None or "prompt" not in inspect.signature(getattr(pipe, name)).parameters:  # LEDITS++'s embeds edits
        raise ValueError(f"{type(pipe).__name__} has no `encode_prompt` of a prompt: use daam_from or ldaam_from")
    return unwatched(pipe, name)


def place_of(module: torch.nn.Module, pipe: Any) -> torch.device:
    """Return where a module computes; weights off-loaded layer by layer are on `meta` and come to the pipeline."""
    device = next(module.parameters()).device
    return pipe._execution_device if device.type == "meta" else device


def fingerprint_of_sites(sites: Sequence[Site], dtype: torch.dtype, pipe: Any) -> Fingerprint:
    """Return the fingerprint of a pipeline's model as it is now, by the weights (of `dtype`) of its sites' keys."""

    def project(site: Site, values: torch.Tensor) -> torch.Tensor:
        keys, norm = site.module.to_k, getattr(site.module, "norm_k", None)
        made = keys(values.to(place_of(keys, pipe), dtype))
        return made if norm is None else norm(made)

    by_name = {site.name: functools.partial(project, site) for site in sites}
    return Fingerprint.of_keys(by_name, sites[0].d_text)
