"""Tiny pipelines built from config: random weights from a seed, no hub, a few channels."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

GOLDEN = Path(__file__).parent / "golden"

BLOCKS = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SD1 = {**BLOCKS, "cross_attention_dim": 24, "attention_head_dim": 4}
SD2 = {**BLOCKS, "cross_attention_dim": 20, "attention_head_dim": [2, 4], "use_linear_projection": True}
# as in SDXL, no attention at the full resolution and several transformer blocks in the layers below
SDXL = {
    **BLOCKS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 40,  # of both text encoders, side by side
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 16,
}

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def prepare_device(name):
    """Kernels as exact and repeatable as the CPU's; a usage error for a device that is not there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise pytest.UsageError(
            f"--device {name}: PyTorch {torch.__version__} has no such device here ({reason})"
        ) from error
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS may add in another order each time
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)


def clip_tokenizer(context):
    return CLIPTokenizer.from_pretrained(GOLDEN / "tiny-sd15" / "tokenizer", model_max_length=context)


def clip(width, context, kind=CLIPTextModel, *, projection=16):
    config = CLIPTextConfig(
        vocab_size=592,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        projection_dim=projection,
        bos_token_id=590,
        eos_token_id=591,
        pad_token_id=591,
    )
    return kind(config).eval()


def vae(channels=(4, 8), **config):
    """An autoencoder of four latent channels; every block after the first halves the image's side."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        norm_num_groups=2,
        **config,
    ).eval()


def _parts(unet, prediction="epsilon"):
    autoencoder = vae(sample_size=32)
    scheduler = DDIMScheduler(**SCHEDULER, prediction_type=prediction)
    model = UNet2DConditionModel(sample_size=16, in_channels=4, out_channels=4, **unet).eval()
    with torch.no_grad():  # random weights at their usual size give nearly constant attention, which would prove little
        for name, weight in model.named_parameters():
            if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
                weight.mul_(4)
    return {"unet": model, "vae": autoencoder, "scheduler": scheduler}


def _sd(unet, width, context, prediction="epsilon"):
    return StableDiffusionPipeline(
        **_parts(unet, prediction),
        text_encoder=clip(width, context),
        tokenizer=clip_tokenizer(context),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl():
    return StableDiffusionXLPipeline(
        **_parts(SDXL),
        text_encoder=clip(24, 77),
        text_encoder_2=clip(16, 77, CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(77),
        tokenizer_2=clip_tokenizer(77),
        add_watermarker=False,
    )


BUILDERS = {
    "sd1": lambda: _sd(SD1, 24, 77),
    "sd2": lambda: _sd(SD2, 20, 24, "v_prediction"),  # a context length that is not CLIP's 77
    "sdxl": _sdxl,
}


def of_components(kind, pipe, **more):
    """Another kind of Stable Diffusion pipeline on the parts of `pipe`."""
    other = kind(**pipe.components, **more, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def build(family, device="cpu"):
    """A new tiny pipeline, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = BUILDERS[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
