"""Tiny pipelines with cross-attention transformers, built from config: random weights from a seed, no hub."""

import functools

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tiny import vae
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, T5Config, T5EncoderModel, T5Tokenizer

WORDS = "a car and tree red traffic light in the street".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz,.:"
FAMILIES = ("PixArt-alpha", "PixArt-Sigma", "Sana 1.0", "Sana 1.5")


def _t5_tokenizer():
    """Pieces of whole words, of the halves of "traffic", and of single letters."""
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS if word != "traffic"), "▁traf", "fic", "▁"]
    scored = [(piece, 0.0 if piece.startswith("<") else -1.0) for piece in pieces]
    return T5Tokenizer(vocab=scored + [(letter, -5.0) for letter in LETTERS], extra_ids=0, model_max_length=512)


def _gemma_tokenizer():
    """Byte pairs that join letters to the same words."""
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *LETTERS]
    merges = []
    for word in (*(f"▁{word}" for word in WORDS), *WORDS):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = GemmaTokenizer(vocab={piece: number for number, piece in enumerate(vocab)}, merges=merges)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def _pixart(kind, **config):
    tokenizer = _t5_tokenizer()
    encoder = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    transformer = PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=8,
        caption_channels=32,
        cross_attention_dim=24,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        **config,
    )
    autoencoder = vae(sample_size=32)
    return kind(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(encoder).eval(),
        vae=autoencoder,
        transformer=_spread(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )


def _sana(scheduler, **config):
    tokenizer = _gemma_tokenizer()
    encoder = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=32,
        **config,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(encoder).eval(),
        vae=vae.eval(),
        transformer=_spread(transformer),
        scheduler=scheduler,
    )


def _spread(transformer):
    """Random weights at their usual size give nearly constant attention, and biases and norms that are none."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if ".attn" in name and name.endswith(("to_q.weight", "to_k.weight")):
                weight.mul_(4)
            elif ".attn" in name and name.endswith(("to_q.bias", "to_k.bias")):
                weight.normal_()
            elif "norm_q" in name or "norm_k" in name or "caption_norm" in name:
                weight.uniform_(0.5, 2)
    return transformer.eval()


BUILDERS = {
    "PixArt-alpha": lambda: _pixart(PixArtAlphaPipeline, sample_size=8),
    "PixArt-Sigma": lambda: _pixart(PixArtSigmaPipeline, sample_size=16, use_additional_conditions=False),
    "Sana 1.0": lambda: _sana(
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    ),
    "Sana 1.5": lambda: _sana(
        FlowMatchEulerDiscreteScheduler(shift=3.0), qk_norm="rms_norm_across_heads", timestep_scale=0.5
    ),
}


@functools.cache
def shared(family, device="cpu"):
    """A tiny pipeline that all tests share, which must leave it as it is."""
    return build(family, device)


def build(family, device="cpu"):
    """A new tiny pipeline, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = BUILDERS[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def generate(pipe, prompt="a car and a tree", *, seed=0, **options):
    """Latents of 16 x 32 cells: two steps with guidance. The same call makes the same latents."""
    defaults = {
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "output_type": "latent",
        "use_resolution_binning": False,
        "height": 32,
        "width": 64,
    }
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, **{**defaults, **options}, generator=generator).images


def supports(feature, families=FAMILIES):
    """Parametrise a test over families; that it passes is what the documentation's table says of them."""
    marks = [pytest.param(one, marks=pytest.mark.supports(family=one, feature=feature), id=one) for one in families]
    return pytest.mark.parametrize("family", marks)
