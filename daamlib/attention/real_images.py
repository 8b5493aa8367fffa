"""Helpers of the recorders to read a real image: its size, its latents, their noise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Factor = torch.Tensor | float


def check_levels(timesteps: Sequence[int], most: int) -> None:
    """ValueError unless there are timesteps, and all are 0 ... `most`."""
    if not len(timesteps) or min(timesteps) < 0 or max(timesteps) > most:
        raise ValueError(f"timesteps must be one or more of 0 ... {most}, got {list(timesteps)}")


def add_noise(latents: torch.Tensor, factors: Sequence[tuple[Factor, Factor]], seed: int) -> list[torch.Tensor]:
    """Return a z + b e for each pair of factors (a, b) of the latents z and of noise e, drawn anew each time."""
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = [torch.randn(latents.shape, generator=generator).to(latents.device) for _ in factors]
    return [a * latents + b * each for (a, b), each in zip(factors, noise, strict=True)]


def noise_levels(scheduler: Any, step: int, device: torch.device) -> tuple[Factor, Factor]:
    """Return the factors of latents and noise at a timestep; ValueError where noise levels are no timesteps (EDM)."""
    name, config = type(scheduler).__name__, scheduler.config
    # some samplers do either, and know alphas that flow matching does not use
    flow = getattr(config, "use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction"
    if flow or "FlowMatch" in name:
        sigma = torch.tensor(step / config.num_train_timesteps, device=device)
        return 1 - sigma, sigma
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"trace_image does not know what noise a timestep of {name} means: it has neither alphas_cumprod nor flow "
            "matching. Give the pipeline the scheduler of the model's training, such as DDPMScheduler"
        )
    alpha = scheduler.alphas_cumprod[step].to(device)  # a scheduler takes them along to where it was last used
    return alpha.sqrt(), (1 - alpha).sqrt()


def latents_of(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return the (1, channel, h, w) latents of pixels in [-1, 1]: the VAE's mean, moved and scaled as it asks."""
    frames = (1,) * (next((weight.ndim for weight in vae.parameters() if weight.ndim > 3), 4) - 4)  # of a video VAE
    with _wide_enough(vae) as wide:
        encoded = wide.encode(pixels.to(wide.dtype).unflatten(1, (3, *frames)))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mean
    else:
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    latents = latents.flatten(1, 1 + len(frames)).float()
    config = vae.config
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    scale, shift = (getattr(config, name, None) for name in ("scaling_factor", "shift_factor"))
    if mean is not None and deviation is not None:
        of_channel = lambda values: torch.tensor(values).to(latents).view(1, -1, 1, 1)  # noqa: E731
        return (latents - of_channel(mean)) * (scale or 1.0) / of_channel(deviation)
    return (latents - (shift or 0.0)) * (scale or 1.0)


@contextmanager
def _wide_enough(vae: Any) -> Iterator[Any]:
    """Hold the VAE in float32 where float16 overflows, as SDXL's; its weights come back bit for bit."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        yield vae.float() if upcast else vae
    finally:
        if upcast:
            vae.half()


def pixels_of(image: Any, factor: int) -> torch.Tensor:
    """Return (1, 3, H, W) in [-1, 1] of an image. ValueError for another kind, or sides that are no multiples."""
    from diffusers.image_processor import VaeImageProcessor

    image = np.asarray(image.convert("RGB")) if hasattr(image, "convert") else image
    height, width = _array_size(image)
    if height % factor or width % factor:
        raise ValueError(f"the image is {height} x {width} px; both must be multiples of {factor} for this model")
    if not isinstance(image, torch.Tensor):
        image = image[None].astype("float32") / 255
    return VaeImageProcessor(vae_scale_factor=factor).preprocess(image).float()


def _array_size(image: Any) -> tuple[int, int]:
    shape, kind = tuple(getattr(image, "shape", ())), str(getattr(image, "dtype", type(image).__name__))
    if isinstance(image, torch.Tensor):
        if len(shape) == 3 and shape[0] == 3 and image.is_floating_point():
            return shape[1], shape[2]
    elif len(shape) == 3 and shape[2] == 3 and kind == "uint8":
        return shape[0], shape[1]
    raise ValueError(f"expected a PIL image, an (H, W, 3) uint8 array or a (3, H, W) float tensor, got {shape} {kind}")
