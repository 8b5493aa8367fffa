"""The size of a record, computed from a denoiser's config; no weight is made.

python tests/record_sizes.py    write the tables of docs/size.md
"""

import math
import re
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from pages import between
from shapes import FLUX, PIXART_SIGMA, SD3_MEDIUM, SD15, SDXL

PAGE, MARKS = Path(__file__).parents[1] / "docs/size.md", ("<!-- {} -->\n", "<!-- end -->\n")
SIDES = (512, 1024)  # px
PIXELS = 8  # of the image on each side of a latent
# name -> (class, config, tokens of the prompt with padding), as published
CROSS = {
    "Stable Diffusion 1.5": (UNet2DConditionModel, SD15, 77),
    "SDXL": (UNet2DConditionModel, SDXL, 77),
    "PixArt-Sigma": (PixArtTransformer2DModel, PIXART_SIGMA, 300),
}
JOINT = {
    "Stable Diffusion 3": (SD3Transformer2DModel, SD3_MEDIUM, 77 + 256),
    "Flux.1": (FluxTransformer2DModel, FLUX, 512),
}


def built(kind, config):
    """A denoiser without weights."""
    with torch.device("meta"):
        return kind(**config)


def sites(denoiser, latent):
    """[(grid, channels)] of each cross-attention that is read, for latents of (h, w); a U-Net's middle is not."""
    found = []
    for name, module in denoiser.named_modules():
        if not name.endswith("attn2") or name.startswith("mid_block"):
            continue
        if match := re.match(r"(down|up)_blocks\.(\d+)", name):
            level = int(match[2]) if match[1] == "down" else len(denoiser.up_blocks) - 1 - int(match[2])
            factor = 2**level
        else:
            factor = denoiser.config.patch_size
        found.append((tuple(side // factor for side in latent), module.to_q.out_features))
    return found


def cross_bytes(denoiser, latent, *, steps, tokens, item=2):
    """{store: bytes of a record}, and of its linear map once it was requested; item: bytes of a number of the model."""
    read = sites(denoiser, latent)
    queries = sum(math.prod(grid) * channels for grid, channels in read)
    maps = tokens * sum(math.prod(grid) for grid, _ in read)
    to_k = next(module for name, module in denoiser.named_modules() if name.endswith("attn2.to_k"))
    columns = to_k.in_features + (to_k.bias is not None)
    return {
        "queries": steps * item * queries,
        "linear": 4 * queries,
        "maps": 4 * (queries + maps),
        "linear map": 4 * columns * math.prod(max(grid for grid, _ in read)),
    }


def joint_bytes(denoiser, latent, *, tokens, passes=4, item=2):
    """Bytes of a joint model's record: the arguments of its passes, which share their text, and the prompt's maps."""
    config, positions = denoiser.config, latent[0] * latent[1] // 4
    shared = tokens * config.joint_attention_dim + config.pooled_projection_dim
    if isinstance(denoiser, FluxTransformer2DModel):
        shared += 3 * (positions + tokens)  # the places of image and text
        a_pass = item * (positions * config.in_channels + 1)
    else:
        a_pass = 4 * (item * positions * config.in_channels + 1)
    guidance = 4 if getattr(config, "guidance_embeds", False) else 0
    return item * shared + passes * a_pass + guidance + 4 * tokens * positions


def size(count):
    """Bytes for a reader."""
    return f"{count / 2**20:,.1f} MiB" if count < 100 * 2**20 else f"{count / 2**20:,.0f} MiB"


def tables():
    """{name of a table: its Markdown}."""
    cross = ["| model | image | `queries`, each step | `linear` | `maps` | linear map |", "|---|---|---|---|---|---|"]
    joint = ["| model | image | record |", "|---|---|---|"]
    for side in SIDES:
        latent = (side // PIXELS, side // PIXELS)
        for name, (kind, config, tokens) in CROSS.items():
            found = cross_bytes(built(kind, config), latent, steps=1, tokens=tokens)
            cross.append(f"| {name} | {side} px | {' | '.join(map(size, found.values()))} |")
        for name, (kind, config, tokens) in JOINT.items():
            joint.append(f"| {name} | {side} px | {size(joint_bytes(built(kind, config), latent, tokens=tokens))} |")
    return {"cross": "\n".join(cross) + "\n", "joint": "\n".join(joint) + "\n"}


def page():
    """The text of the page with the tables of today."""
    text = PAGE.read_text()
    for name, table in tables().items():
        text = between(text, MARKS[0].format(f"python tests/record_sizes.py: {name}"), MARKS[1], table)
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
