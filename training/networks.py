"""The networks of `urban-tiny`, all stock diffusers / transformers classes built from a config.

Nothing here is special to this project: the finished folder loads with
`StableDiffusionPipeline.from_pretrained` and none of our code.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from daamlib.pipeline import CHECK, check_values

TEXT_WIDTH = 128  # d_text: the width of the embeddings the U-Net attends to
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(
    captions: Iterable[str], folder: Path, context: int = 32, *, vocab_size: int = 1000
) -> CLIPTokenizer:
    """Train a byte-level BPE and load it as CLIP's.

    Args:
        captions: the texts to learn from.
        folder: where it is written.
        context: the length of a text in tokens, 77 in Stable Diffusion.
        vocab_size: an upper bound that counts 512 byte symbols and the two special tokens.

    Returns:
        The tokenizer.
    """
    bpe = CLIPTokenizer().backend_tokenizer  # still empty, but it cuts a text into words as CLIP does
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 514,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=20,
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = alphabet + [symbol + "</w>" for symbol in alphabet]
    words = list(dict.fromkeys(symbols + ["".join(merge) for merge in merges] + [BOS, EOS]))
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    vocab = {word: i for i, word in enumerate(words)}
    # the annotation of `merges` does not know the pairs that the class works with
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=context, **names)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_vae() -> AutoencoderKL:
    """An f = 4 autoencoder with 4 latent channels: (B, 3, H, W) in [-1, 1] <-> (B, 4, H/4, W/4)."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
    )


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: list[float], deviation: list[float]) -> None:
    """Fold the latents' mean and deviation (one per channel) into the VAE's two 1x1 convolutions, in place.

    Stable Diffusion's pipelines know one scale for all channels and no shift; with this the latents have mean 0 and
    deviation 1 in each channel, the scale is 1, and the reconstructions stay what they were.
    """
    shift, scale = torch.tensor(mean), torch.tensor(deviation)
    channels = len(shift)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= scale.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.bias[channels:] -= 2 * scale.log()  # log variances
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight *= scale.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def new_text_encoder(tokenizer: CLIPTokenizer, *, layers: int = 1) -> CLIPTextModel:
    """A CLIP text model for the tokenizer's context C: (B, C) token ids -> (B, C, 128).

    With no layers at all it is an embedding of words and positions: no token knows of another one.
    """
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def change_tokens(
    text_encoder: CLIPTextModel, old: CLIPTokenizer, new: CLIPTokenizer, *, forget: Iterable[str] = ()
) -> None:
    """Let a text encoder read another tokenizer, in place: tokens that both have keep their embeddings.

    The others begin at random, as long as the others: shorter ones drown in the embeddings of the positions.

    Args:
        text_encoder: of the old tokenizer.
        old: its tokenizer.
        new: the other one.
        forget: words that begin at random too. Attention to a word that was never needed tends to lie where its thing
            is not, from where it hardly comes back.
    """
    embeddings: Any = text_encoder.get_input_embeddings()
    before, known = embeddings.weight.clone(), old.get_vocab()
    kept = {i: known[token] for token, i in new.get_vocab().items() if token in known}
    for word in forget:
        kept.pop(new.get_vocab()[f"{word}</w>"], None)
    text_encoder.resize_token_embeddings(len(new), mean_resizing=False)
    embeddings = text_encoder.get_input_embeddings()  # new ones
    rows = embeddings.weight
    whole = [known[token] for token in known if token.endswith("</w>") and len(token) > len("x</w>")]
    rows[:] = before[whole].std() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    rows[list(kept)] = before[list(kept.values())]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_encoder.config, key, getattr(new, key))


def new_unet(channels: Sequence[int] = (64, 128, 192), *, attention_levels: int = 2) -> UNet2DConditionModel:
    """A three-level U-Net for 4 x 32 x 32 latents of 128 px images; its largest `attention_levels` attend to the text.

    The middle block, on the smallest grid, attends to the text in any case.
    """
    without = len(channels) - attention_levels
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(channels),
        down_block_types=("CrossAttnDownBlock2D",) * attention_levels + ("DownBlock2D",) * without,
        up_block_types=("UpBlock2D",) * without + ("CrossAttnUpBlock2D",) * attention_levels,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        # diffusers' historical name: these are the NUMBERS of heads. One head on the largest grid, where
        # self-attention over 1024 positions is what costs.
        attention_head_dim=(1, 4, 4),
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's scaled-linear schedule, with v-prediction (as SD 2.x)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    """The stock pipeline of the parts, without the safety checker (the model knows only drawn streets)."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return (B, C) int64 token ids, padded to the context C as the pipeline pads; longer captions are cut."""
    batch = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return batch.input_ids


def save(pipe: StableDiffusionPipeline, folder: Path, shard: str) -> None:
    """Write a pipeline so that every version of transformers loads it.

    Args:
        pipe: as `assemble` makes it.
        folder: where it is written.
        shard: the most of a file of weights, such as "15MB".
    """
    pipe.save_pretrained(folder, max_shard_size=shard)
    # transformers 5 writes neither the names nor the files that version 4 reads; it reads them as its own
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": each for name, each in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)
    model = json.loads(pipe.tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    check = {"text": "a red car", "values": check_values(pipe, "a red car")}
    (folder / CHECK).write_text(json.dumps(check, indent=1) + "\n")
