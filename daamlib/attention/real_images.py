"""Records of real images: no generation, no inversion."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from .joint.families import family_of
from .joint.trace import trace_pixels
from .noise import add_noise
from .readers import reader_of
from .trace import trace


@torch.no_grad()
def trace_image(
    pipe: Any,
    image: Any,
    *,
    prompt: str = "",
    timesteps: Sequence[int] = (100, 300, 500),
    seed: int = 0,
    self_attention: bool = False,
) -> Any:  # an AttentionRecord, or a JointRecord
    """The record of a REAL image: encode it, add noise at each timestep, one pass of the denoiser each.

    The noise is the training's, whatever sampler the pipeline uses: z_t = sqrt(a_t) z + sqrt(1 - a_t) e, or of a model
    of flow matching, as every joint model is, z_t = (1 - s) z + s e with s = t / 1000 (the length of its schedule).

    Args:
        pipe: a pipeline that `trace` reads.
        image: a PIL image, an (H, W, 3) uint8 array, or a (3, H, W) tensor in [0, 1]; H and W multiples of the VAE's
            factor (of a joint model, times its patches).
        prompt: what the passes are conditioned on.
        timesteps: of the training schedule, 0 ... 999 (of a joint model 0 ... 1000): which noise a number means differs
            between models.
        seed: of the noise, drawn anew for each timestep.
        self_attention: as for `trace`.

    Returns:
        The record, as that of a generated image of so many steps.

    Raises:
        TypeError: `trace` refuses the pipeline.
        ValueError: it does, or sizes or timesteps do not fit.
    """
    family = family_of(pipe)
    if family is not None:
        if self_attention:
            raise ValueError(f"self_attention: {family.name} is a joint model, of which it is not read")
        pixels = _pixels(image, family.sides(pipe)).float()
        return trace_pixels(pipe, family, pixels, prompt=prompt, timesteps=timesteps, seed=seed)
    reader = reader_of(pipe)
    _ = reader.sites  # an error before anything is computed if it has none
    steps = [int(t) for t in timesteps]
    device = pipe._execution_device
    count = pipe.scheduler.config.num_train_timesteps
    if not steps or min(steps) < 0 or max(steps) >= count:
        raise ValueError(f"timesteps must be one or more of 0 ... {count - 1}, got {list(timesteps)}")
    pixels = _pixels(image, reader.image_factor).float().to(device)
    with _wide_enough(pipe.vae) as vae:
        encoded = vae.encode(pixels.to(vae.dtype))
        mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        latents = mean.float() * vae.config.scaling_factor
    noisy = add_noise(latents, [_levels(pipe.scheduler, step, device) for step in steps], seed)
    with trace(pipe, self_attention=self_attention) as tracer:
        reader.denoise(prompt, steps, noisy, (pixels.shape[-2], pixels.shape[-1]))
    pipe.maybe_free_model_hooks()  # as at the end of the pipeline's own call: off-loaded models go back
    (record,) = tracer
    return record


def _levels(scheduler, step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the latents and of the noise at a timestep."""
    # some samplers do either, and know alphas that flow matching does not use
    if getattr(scheduler.config, "use_flow_sigmas", False) or not hasattr(scheduler, "alphas_cumprod"):
        sigma = torch.tensor(step / scheduler.config.num_train_timesteps, device=device)
        return 1 - sigma, sigma
    alpha = scheduler.alphas_cumprod[step].to(device)  # a scheduler takes them along to where it was last used
    return alpha.sqrt(), (1 - alpha).sqrt()


@contextmanager
def _wide_enough(vae) -> Iterator:
    """The VAE in float32 where its config says that float16 overflows, as SDXL's does; in float16 again afterwards.

    Every float16 is a float32, so the weights come back bit for bit.
    """
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    try:
        yield vae.float() if upcast else vae
    finally:
        if upcast:
            vae.half()


def _pixels(image, factor: int) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    height, width = (image.height, image.width) if hasattr(image, "convert") else _array_size(image)
    if height % factor or width % factor:
        raise ValueError(f"the image is {height} x {width} px; both must be multiples of {factor} for this model")
    if not hasattr(image, "convert") and not isinstance(image, torch.Tensor):
        image = image[None].astype("float32") / 255
    return VaeImageProcessor(vae_scale_factor=factor).preprocess(image)


def _array_size(image) -> tuple[int, int]:
    shape, kind = tuple(getattr(image, "shape", ())), str(getattr(image, "dtype", type(image).__name__))
    if isinstance(image, torch.Tensor):
        if len(shape) == 3 and shape[0] == 3 and image.is_floating_point():
            return shape[1], shape[2]
    elif len(shape) == 3 and shape[2] == 3 and kind == "uint8":
        return shape[0], shape[1]
    raise ValueError(
        f"expected a PIL image, an (H, W, 3) uint8 array or a (3, H, W) float tensor, got shape {shape} of {kind}"
    )
