"""Tiny pipelines of joint models (MMDiT) built from config: random weights from a seed, no hub, a few channels."""

import functools
import string

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny import GOLDEN
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a", "car", "and", "tree", "road", "red", "traffic", "light", "sky")


def t5_tokenizer(context=16):
    """Whole words where it knows them, letters where it does not; "traffic" is two pieces."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS if word != "traffic"), "▁traf", "fic", ","]
    vocabulary = [(piece, -1.0) for piece in pieces] + [(letter, -9.0) for letter in string.ascii_letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=context)


def t5(width):
    size = len(t5_tokenizer())
    return T5EncoderModel(
        T5Config(vocab_size=size, d_model=width, d_ff=2 * width, d_kv=8, num_layers=1, num_heads=2)
    ).eval()


def clip_tokenizer(context=20):
    return CLIPTokenizer.from_pretrained(GOLDEN / "tiny-sd15" / "tokenizer", model_max_length=context)


def clip(kind, width, context=20):
    config = CLIPTextConfig(
        vocab_size=592,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        projection_dim=width,
        bos_token_id=590,
        eos_token_id=591,
        pad_token_id=591,
    )
    return kind(config).eval()


def vae():
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def sd3(**config):
    """Latents of 4 channels, patches of 2: an image of 32 x 48 has 8 x 12 positions."""
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=24,
        pos_embed_max_size=16, **config
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clip(CLIPTextModelWithProjection, 12),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 12),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(32),
        tokenizer_3=t5_tokenizer(),
    )


def flux(**config):
    """Latents of 4 channels, packed 2 x 2: an image of 32 x 48 has 8 x 12 positions."""
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=3, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), **config
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip(CLIPTextModel, 16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
    )


def qwen_tokenizer():
    """Byte-level, with the words of `WORDS` merged where they follow a space."""
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    merges, known = [], list(alphabet)
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            if left + letter not in known:
                merges.append(f"{left} {letter}")
                known.append(left + letter)
            left += letter
    vocabulary = {piece: number for number, piece in enumerate([*known, "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def qwen_image(**config):
    """Latents of 4 channels, packed 2 x 2; the VAE makes them 1/4 of the image's sides."""
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), **config
    )  # fmt: skip
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16
    }  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    pipe = QwenImagePipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, 0.0, -0.1, 0.2], latents_std=[1.0, 2.0, 1.5, 0.5],
        ).eval(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )  # fmt: skip
    before = pipe.prompt_template_encode.split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(tokenizer(before).input_ids)  # 34 with the published tokenizer
    return pipe


BUILDERS = {
    "SD 3": sd3,
    "SD 3.5": functools.partial(sd3, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "Flux.1": functools.partial(flux, guidance_embeds=True),
    "Qwen-Image": qwen_image,
}


def build(family):
    """A new tiny pipeline, the same in every process; float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = BUILDERS[family]()
        with torch.no_grad():  # random weights at their usual size give nearly constant attention
            for name, weight in pipe.transformer.named_parameters():
                if name.endswith((".to_q.weight", ".to_k.weight", ".add_k_proj.weight", ".add_q_proj.weight")):
                    weight.mul_(4)
    pipe.set_progress_bar_config(disable=True)
    return pipe
