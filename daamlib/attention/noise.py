"""Latents at chosen noise levels."""

from collections.abc import Sequence

import torch


def add_noise(
    latents: torch.Tensor, factors: Sequence[tuple[torch.Tensor | float, torch.Tensor | float]], seed: int
) -> list[torch.Tensor]:
    """a z + b e for each pair of factors (a, b) of the latents z and of noise e, drawn anew each time."""
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = [torch.randn(latents.shape, generator=generator).to(latents.device) for _ in factors]
    return [a * latents + b * each for (a, b), each in zip(factors, noise, strict=True)]
