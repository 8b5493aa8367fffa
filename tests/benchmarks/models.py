"""The models that are timed: the bundled one, and denoisers of full size with random weights.

Speed does not depend on the values. The big ones have no VAE and, but for the joint one, no text encoder: they are
called with embeddings and give latents, so that the denoising loop, which tracing adds to, is timed alone.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import daamlib
from daamlib.pipeline import denoiser_of

sys.path.append(str(Path(__file__).parents[1]))
import tiny
import tiny_joint
from shapes import FLUX, PIXART_SIGMA, SD3_MEDIUM, SD15, SDXL

SHAPES = {
    "bundled": {},
    "sd15": SD15,
    "sdxl": SDXL,
    "pixart_sigma": PIXART_SIGMA,
    "sd3_medium": SD3_MEDIUM,
    "flux": FLUX,
}
JOINT = ("sd3_medium", "flux")
# what makes the shapes small enough to rehearse every row on a CPU
FEW_CHANNELS = {
    "sd15": {"block_out_channels": (32, 64, 64, 64)},
    "sdxl": {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": 2},
    "pixart_sigma": {"num_layers": 2},
    "sd3_medium": {"num_layers": 2},
    "flux": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 4},
}
PIXELS = {"sd15": 512, "sdxl": 1024, "pixart_sigma": 1024, "sd3_medium": 1024, "flux": 1024}
PIXELS_OF_CPU = {"pixart_sigma": 512, "sd3_medium": 256, "flux": 256}  # at their own size a step takes minutes
DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
PROMPT = "a red car and a tree"


@dataclass(frozen=True)
class Model:
    """shape: a name of `SHAPES`. size: of the images in pixels. steps, batch: of a timed generation."""

    shape: str
    pipe: Any
    size: int
    steps: int
    batch: int
    guidance: float

    def generate(self, steps: int | None = None, size: int | None = None):
        """The same images, or latents, every time."""
        pipe, generator = self.pipe, torch.Generator().manual_seed(0)
        size = size or self.size
        options = {"num_inference_steps": steps or self.steps, "guidance_scale": self.guidance, "generator": generator}
        if self.shape == "bundled" or self.shape in JOINT:
            latent = {} if self.shape == "bundled" else {"output_type": "latent"}
            return pipe([PROMPT] * self.batch, height=size, width=size, **latent, **options).images
        embedded = self._embedded(generator)
        return pipe(**embedded, height=size, width=size, output_type="latent", **options).images

    def _embedded(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A text and an empty one, as the pipeline takes them."""
        denoiser = denoiser_of(self.pipe)
        config = denoiser.config
        tokens, width = (
            (300, config.caption_channels) if self.shape == "pixart_sigma" else (77, config.cross_attention_dim)
        )
        text = torch.randn(self.batch, tokens, width, generator=generator).to(denoiser.device, denoiser.dtype)
        texts = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
        if self.shape == "sdxl":
            pooled = text[:, 0, :1280]
            texts |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
        if self.shape == "pixart_sigma":
            mask = torch.ones(self.batch, tokens, device=text.device)
            texts |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
            texts |= {"use_resolution_binning": False}
        return texts


def load(
    shape: str,
    *,
    size: int | None,
    steps: int | None,
    batch: int,
    device: str,
    dtype: torch.dtype,
    few_channels: bool = False,
) -> Model:
    """On a CPU the big models make a step or two without guidance: tracing costs the same, so it weighs more."""
    if shape == "bundled":
        pipe = daamlib.load_pipeline(device=device, dtype=dtype)
        return Model(shape, pipe, size or 128, steps or 10, batch, 5.0)
    torch.manual_seed(0)
    config = {**SHAPES[shape], **(FEW_CHANNELS[shape] if few_channels else {})}
    pipe = BUILDERS[shape](config, device, dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    if device == "cpu":
        few = 1 if shape in PIXELS_OF_CPU else 2
        return Model(shape, pipe, size or PIXELS_OF_CPU.get(shape, PIXELS[shape]), steps or few, batch, 1.0)
    return Model(shape, pipe, size or PIXELS[shape], steps or 30, batch, 5.0)


def _denoiser(kind: Any, config: dict, device: str, dtype: torch.dtype) -> Any:
    """Made in its own type and place: Flux takes 48 GB in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(**config).eval()
    finally:
        torch.set_default_dtype(before)


def _sd15(config: dict, device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=_denoiser(UNet2DConditionModel, config, device, dtype),
        scheduler=DDIMScheduler(**DDIM),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(config: dict, device: str, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=_denoiser(UNet2DConditionModel, config, device, dtype),
        scheduler=DDIMScheduler(**DDIM),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


def _pixart_sigma(config: dict, device: str, dtype: torch.dtype) -> PixArtSigmaPipeline:
    transformer = _denoiser(PixArtTransformer2DModel, config, device, dtype)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    return PixArtSigmaPipeline(transformer=transformer, scheduler=DPMSolverMultistepScheduler(), **parts)


def _sd3_medium(config: dict, device: str, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """With text encoders of the right width and two layers, or one: words that run along are embedded by the model."""
    encoders = {
        "text_encoder": tiny.clip(768, 77, CLIPTextModelWithProjection, projection=768),
        "text_encoder_2": tiny.clip(1280, 77, CLIPTextModelWithProjection, projection=1280),
        "text_encoder_3": tiny_joint.t5(4096),
    }
    return StableDiffusion3Pipeline(
        transformer=_denoiser(SD3Transformer2DModel, config, device, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        tokenizer=tiny.clip_tokenizer(77),
        tokenizer_2=tiny.clip_tokenizer(77),
        tokenizer_3=tiny_joint.t5_tokenizer(256),
        **{name: encoder.to(dtype) for name, encoder in encoders.items()},
    )


def _flux(config: dict, device: str, dtype: torch.dtype) -> FluxPipeline:
    """With text encoders of the right width; the VAE, which is not called, says how large the latents are."""
    return FluxPipeline(
        transformer=_denoiser(FluxTransformer2DModel, config, device, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(latent_channels=16, block_out_channels=(4, 4, 4, 4), norm_num_groups=1,
                          down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
        text_encoder=tiny.clip(768, 77, CLIPTextModel).to(dtype),
        tokenizer=tiny.clip_tokenizer(77),
        text_encoder_2=tiny_joint.t5(4096).to(dtype),
        tokenizer_2=tiny_joint.t5_tokenizer(256),
    )  # fmt: skip


BUILDERS = {"sd15": _sd15, "sdxl": _sdxl, "pixart_sigma": _pixart_sigma, "sd3_medium": _sd3_medium, "flux": _flux}


def records(model: Model, count: int, steps: int) -> list[daamlib.AttentionRecord]:
    """`count` records of `steps` steps: of the bundled model real ones, else random queries in the layers' shapes.

    The shapes come from one small pass, an eighth of the size.
    """
    with daamlib.trace(model.pipe) as trace:
        if model.shape == "bundled":
            for _ in range(count):
                replace(model, batch=1).generate(steps)
            return list(trace[:count])
        replace(model, batch=1).generate(1, model.size // 8)
    small = trace[0]
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        layers = tuple(replace(layer, **_grown(layer, steps)) for layer in small.layers)
        made.append(replace(small, layers=layers, timesteps=small.timesteps * steps))
    return made


def _grown(layer, steps: int) -> dict:
    """The layer's grid eight times as high and wide, with random queries."""
    h, w = (8 * side for side in layer.grid)
    queries = torch.empty((steps, h * w, layer.queries.shape[-1]), dtype=layer.queries.dtype)
    return {"grid": (h, w), "queries": queries.to(layer.queries.device).normal_(std=3)}
