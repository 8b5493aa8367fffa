"""The models that are timed: the bundled one, and U-Nets of full size with random weights.

Speed does not depend on the values. The big ones have no text encoder and no VAE: they are called with embeddings and
give latents, so that the denoising loop, which tracing adds to, is timed alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

import daamlib

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest are diffusers' defaults
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SHAPES = {"bundled": None, "sd15": SD15, "sdxl": SDXL}
DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


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
        if self.shape == "bundled":
            return pipe(["a red car and a tree"] * self.batch, height=size, width=size, **options).images
        config = pipe.unet.config
        text = torch.randn(self.batch, 77, config.cross_attention_dim, generator=generator)
        text = text.to(pipe.unet.device, pipe.unet.dtype)
        texts = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
        if self.shape == "sdxl":
            pooled = text[:, 0, :1280]
            texts |= {"pooled_prompt_embeds": pooled, "negative_prompt_embeds": torch.zeros_like(text)}
            texts |= {"negative_pooled_prompt_embeds": torch.zeros_like(pooled)}
        return pipe(**texts, height=size, width=size, output_type="latent", **options).images


def load(shape: str, *, size: int | None, steps: int | None, batch: int, device: str, dtype: torch.dtype) -> Model:
    """On a CPU the big models make two steps without guidance: tracing costs the same, so it weighs twice as much."""
    if shape == "bundled":
        pipe = daamlib.load_pipeline(device=device, dtype=dtype)
        return Model(shape, pipe, size or 128, steps or 10, batch, 5.0)
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**SHAPES[shape]).eval().to(dtype)
    nothing = {"vae": None, "text_encoder": None, "tokenizer": None}
    if shape == "sd15":
        kind = StableDiffusionPipeline
        nothing |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        kind = StableDiffusionXLPipeline
        nothing |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    pipe = kind(unet=unet, scheduler=DDIMScheduler(**DDIM), **nothing).to(device)
    pipe.set_progress_bar_config(disable=True)
    fast = device != "cpu"
    pixels = {"sd15": 512, "sdxl": 1024}[shape]
    return Model(shape, pipe, size or pixels, steps or (30 if fast else 2), batch, 5.0 if fast else 1.0)


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
