"""A tiny AudioLDM2 pipeline built from config, as `tiny` builds those of images: random weights, no hub.

Latents are (time, mel) = (16, 8) by default, so that the two axes cannot be taken for each other.
"""

import string

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    DDIMScheduler,
    MusicLDMPipeline,
    UNet2DConditionModel,
)
from tiny import BLOCKS, SCHEDULER
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLAP = 10  # the widths of the three text models, which no other part of the U-Net has
GPT2 = 12
T5 = 20
TIME, MEL = 16, 8  # of the latents
CONTEXT = 24  # tokens that T5 reads
PIECES = ["▁a", "▁dog", "▁bark", "ing", "▁rain", "▁thunder", "s", "torm", "▁and"]  # sentencepiece: ▁ begins a word


def t5_tokenizer(context=CONTEXT):
    letters = [("▁", -5.0), *((letter, -10.0) for letter in string.ascii_lowercase + ",.")]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = [*special, *((piece, -2.0) for piece in PIECES), *letters]
    return T5Tokenizer(vocabulary, extra_ids=0, model_max_length=context)


def roberta_tokenizer():
    letters = ["Ġ", *string.ascii_lowercase, *string.punctuation]
    vocabulary = {token: row for row, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters])}
    return RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=32)


def unet(cross_attention_dim=((None, GPT2, T5),) * 2):
    """As in the published model each block attends to itself, to the GPT-2 vectors and to the T5 tokens in turn."""
    dims = {"cross_attention_dim": cross_attention_dim, "attention_head_dim": 2}
    model = AudioLDM2UNet2DConditionModel(sample_size=TIME, in_channels=4, out_channels=4, **BLOCKS, **dims).eval()
    with torch.no_grad():  # as in `tiny`
        for name, weight in model.named_parameters():
            if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
                weight.mul_(4)
    return model


def clap():
    text = {"vocab_size": 70, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1}
    audio = {"spec_size": 8, "window_size": 4, "num_mel_bins": 8, "depths": [1, 1], "num_attention_heads": [1, 1]}
    audio |= {"hidden_size": 16, "patch_size": 2, "patch_stride": 2, "patch_embed_input_channels": 4}
    depth = {"num_hidden_layers": 1, "projection_dim": CLAP}
    config = ClapConfig(text_config={**text, **depth}, audio_config={**audio, **depth}, projection_dim=CLAP)
    return ClapModel(config).eval()


def vocoder():
    kernels = {"upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3]}
    config = SpeechT5HifiGanConfig(
        model_in_dim=2 * MEL, upsample_initial_channel=8, resblock_dilation_sizes=[[1, 3]], **kernels
    )
    return SpeechT5HifiGan(config).eval()


def vae():
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    ).eval()


def feature_extractor():
    return ClapFeatureExtractor(feature_size=8, hop_length=160)


def audioldm2():
    tokenizer = t5_tokenizer()
    t5 = T5Config(vocab_size=len(tokenizer), d_model=T5, d_kv=5, d_ff=40, num_layers=2, num_heads=4)
    gpt2 = GPT2Config(n_embd=GPT2, n_head=2, n_layer=1, vocab_size=10, n_positions=96, bos_token_id=0, eos_token_id=0)
    gpt2.max_new_tokens = 8
    return AudioLDM2Pipeline(
        vae=vae(),
        text_encoder=clap(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        projection_model=AudioLDM2ProjectionModel(CLAP, T5, GPT2).eval(),
        language_model=GPT2LMHeadModel(gpt2).eval(),
        tokenizer=roberta_tokenizer(),
        tokenizer_2=tokenizer,
        feature_extractor=feature_extractor(),
        unet=unet(),
        scheduler=DDIMScheduler(**SCHEDULER),
        vocoder=vocoder(),
    )


def audioldm(kind):
    """A pipeline of a `kind` that gives its U-Net one CLAP vector as a class: AudioLDMPipeline or MusicLDMPipeline."""
    classes = {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": CLAP}
    options = {**BLOCKS, **classes, "class_embeddings_concat": True, "cross_attention_dim": (8, 16)}
    parts = {
        "vae": vae(),
        "text_encoder": clap(),
        "tokenizer": roberta_tokenizer(),
        "unet": UNet2DConditionModel(sample_size=TIME, in_channels=4, out_channels=4, **options).eval(),
        "scheduler": DDIMScheduler(**SCHEDULER),
        "vocoder": vocoder(),
    }
    if kind is MusicLDMPipeline:
        parts["feature_extractor"] = feature_extractor()
    return kind(**parts)


def build(make, device="cpu", seed=0):
    """The pipeline that `make` makes, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = make()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
