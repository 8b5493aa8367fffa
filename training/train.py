"""Train `urban-tiny` from scratch, in stages that each continue where they were stopped.

    python -m training.train data       # render the scenes (seeds 0 ... N-1) and train the tokenizer
    python -m training.train vae --samples 100000    # the autoencoder
    python -m training.train latents --size 64       # encode every scene once; then the same with 128
    python -m training.train unet --size 64  --samples 300000   # U-Net and text encoder, jointly
    python -m training.train unet --size 128 --samples 400000   # the same networks, continued
    python -m training.train export     # write the Stable Diffusion folder in float16

    python -m training.train restore    # instead: checkpoints from that folder, to train it further

After `data --world wide` in a new work folder, `restore` lets that model go on in another world: it keeps the tokenizer
of the world's captions, and the tokens that the model knew keep their embeddings but for those of `--forget`.

`data` takes what a model is: `--context`, `--text-layers`, `--null-padding` and the U-Net's `--channels` and
`--attention-levels`; the other stages read it from `recipe.json`, which `data` or `restore` wrote.

`--samples` counts from the very beginning of a stage's network, so the second `unet` line trains 100,000 samples at
128 px; `--minutes` counts from the beginning of the command. Checkpoints go to `--work` every few minutes; a stopped
command is simply given again. On a CPU use one process per core (`--processes 2`); on a GPU one process and a larger
`--batch`. `python -m training.run` does all stages within some minutes.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from daamlib_lab.urban.scenes import WORLDS, to_tensor

from . import networks
from .data import encode_latents, render_scenes
from .trainer import Trainer, add_options, launch

EMPTY_CAPTIONS = 0.1  # for classifier-free guidance
NOISE_OFFSET = 0.05  # lets the model learn overall brightness, which the schedule's last step leaks
SNR_GAMMA = 5.0  # min-SNR weighting (Hang et al. 2023)
KL_WEIGHT = 1e-5
# Of captions, what says nothing itself; but following a noun in a causal text encoder, it knows the noun
SMALL_WORDS = (
    *("a", "an", "the", ",", "and", "with", "in", "on", "of", "by", "at", "to", "front", "photo"),
    *("urban", "environment", "city", "street"),
)
SHARD = "15MB"  # the most of a file of weights, its header not counted


class Denoiser(torch.nn.Module):
    """Text encoder and U-Net as one module, for one optimiser and one forward pass."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy, timesteps, ids, empty, muted):
        """The predicted velocity (B, 4, h, w).

        noisy: (B, 4, h, w); timesteps: (B,); ids: (B, C) token ids; empty: (1, C) those of the empty text; muted: (B,
        C) bool, the tokens that show the U-Net the empty text's state of their place, not their state.
        """
        states = self.text_encoder(torch.cat([ids, empty])).last_hidden_state
        text = torch.where(muted.unsqueeze(-1), states[-1:], states[:-1])
        return self.unet(noisy, timesteps, text).sample


class Autoencoder(torch.nn.Module):
    """The VAE as one forward pass: pixels (B, 3, H, W) -> (reconstruction (B, 3, H, W), KL per latent value)."""

    vae: AutoencoderKL

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels):
        """Encode, draw from the posterior, decode."""
        posterior = self.vae.encode(pixels).latent_dist
        return self.vae.decode(posterior.sample()).sample, posterior.kl().sum() / posterior.mean.numel()


@dataclass(frozen=True)
class Recipe:
    """Definition of a model, apart from the length of its training.

    Attributes:
        text_layers: of the text encoder.
        channels: of the U-Net's three levels.
        attention_levels: how many of them, from the largest grid on, attend to the text.
        null_padding: how often a text's end token and padding are those of the empty text. They follow the words in a
            causal text encoder and so know all of them: where they are heard, the words themselves need not say what
            they stand for.
    """

    text_layers: int
    channels: list[int]
    attention_levels: int
    null_padding: float

    @classmethod
    def read(cls, work: Path) -> "Recipe":
        """Read the recipe of a work folder; FileNotFoundError where neither `data` nor `restore` was run."""
        return cls(**json.loads((work / "recipe.json").read_text()))

    def write(self, work: Path) -> None:
        """Keep it for the stages to come; ValueError where the folder has networks of another recipe."""
        if (work / "unet.pt").exists() and Recipe.read(work) != self:
            raise ValueError(f"{work} has networks of another recipe, {Recipe.read(work)}: name another folder")
        (work / "recipe.json").write_text(json.dumps(asdict(self)) + "\n")

    def denoiser(self, tokenizer: CLIPTokenizer) -> Denoiser:
        """New networks, for the tokenizer's words and context."""
        text_encoder = networks.new_text_encoder(tokenizer, layers=self.text_layers)
        return Denoiser(networks.new_unet(self.channels, attention_levels=self.attention_levels), text_encoder)


def make_data(args: argparse.Namespace) -> None:
    """Render the training scenes and train the tokenizer on their captions."""
    Recipe(args.text_layers, args.channels, args.attention_levels, args.null_padding).write(args.work)
    texts = render_scenes(args.work / "scenes", args.scenes, world=args.world).captions
    networks.train_tokenizer([text for of_scene in texts for text in of_scene], args.work / "tokenizer", args.context)


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Mean absolute and squared error, and the absolute error of horizontal and vertical differences (edges)."""
    error = decoded - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def train_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder on 64 px crops of the scenes and, a quarter of the time, on scenes shrunk to 64 px."""
    trainer = Trainer(Autoencoder(networks.new_vae()), args.work / "vae.pt", args)
    images = torch.from_numpy(render_scenes(args.work / "scenes", args.scenes).images).to(trainer.device)
    while trainer.goes_on():
        pixels = to_tensor(images[torch.randint(len(images), (args.batch,), device=trainer.device)])
        if torch.rand(()) < 0.25:
            pixels = F.interpolate(pixels, (64, 64), mode="area")
        else:
            top, left = torch.randint(65, (2,)).tolist()
            pixels = pixels[:, :, top : top + 64, left : left + 64]
        decoded, kl = trainer.forward(pixels)
        trainer.step(reconstruction_loss(decoded.float(), pixels) + KL_WEIGHT * kl)


def trained_vae(work: Path) -> AutoencoderKL:
    """The averaged (EMA) autoencoder of the checkpoint, its latents standardised once `latents` has measured them."""
    autoencoder = Autoencoder(networks.new_vae())
    autoencoder.load_state_dict(torch.load(work / "vae.pt", map_location="cpu", weights_only=True)["ema"])
    moments = work / "moments.json"
    if moments.exists():
        networks.standardise(autoencoder.vae, **json.loads(moments.read_text()))
    return autoencoder.vae.eval()


def cache_latents(args: argparse.Namespace) -> None:
    """Measure the latents' mean and deviation by channel, standardise them, encode all scenes at `--size`."""
    if args.device == "cpu":
        torch.set_num_threads(args.threads * args.processes)
    scenes = render_scenes(args.work / "scenes", args.scenes)
    moments = args.work / "moments.json"
    if not moments.exists():
        with torch.no_grad():
            pixels = to_tensor(scenes.images[:1000]).to(args.device)
            latents = trained_vae(args.work).to(args.device).encode(pixels).latent_dist.mean
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        moments.write_text(json.dumps({"mean": mean.tolist(), "deviation": deviation.tolist()}))
    path = args.work / f"latents{args.size}.npy"
    latents = encode_latents(trained_vae(args.work), scenes, path, size=args.size, device=args.device)
    print(f"{args.size} px: latents {latents.shape}, standard deviation {latents[:2000].astype(np.float32).std():.3f}")


def find_silent(ids: torch.Tensor, end: int, small: torch.Tensor) -> torch.Tensor:
    """Return (B, C) bool: the end token of each text, the padding after it, and the tokens that are among `small`."""
    first = (ids == end).int().argmax(dim=1, keepdim=True)  # padding is the same token
    return (torch.arange(ids.shape[1], device=ids.device) >= first) | torch.isin(ids, small)


def train_unet(args: argparse.Namespace) -> None:
    """Train U-Net and text encoder jointly on the cached latents, with v-prediction and min-SNR weights."""
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    recipe, scheduler = Recipe.read(args.work), networks.new_scheduler()
    denoiser = recipe.denoiser(tokenizer)
    if args.device == "cpu":  # plain products are the fastest there: 1.7 times in bfloat16
        denoiser.unet.set_attn_processor(AttnProcessor())
    trainer = Trainer(denoiser, args.work / "unet.pt", args)
    device, n = trainer.device, args.batch
    latents = torch.from_numpy(np.load(args.work / f"latents{args.size}.npy", mmap_mode="c")).to(device)
    texts = render_scenes(args.work / "scenes", args.scenes).captions
    # (caption of a scene, scene, token)
    ids = torch.stack([networks.tokenize(tokenizer, list(of_scenes)) for of_scenes in zip(*texts, strict=True)])
    ids, empty = ids.to(device), networks.tokenize(tokenizer, [""]).to(device)
    vocabulary = tokenizer.get_vocab()
    words = SMALL_WORDS if args.null_small_words else ()
    small = torch.tensor([vocabulary[f"{w}</w>"] for w in words if f"{w}</w>" in vocabulary], device=device).long()
    snr = scheduler.alphas_cumprod.to(device) / (1 - scheduler.alphas_cumprod.to(device))
    weights = snr.clamp(max=SNR_GAMMA) / (snr + 1)
    # large areas show through all noise but the heaviest, to which min-SNR weights leave next to nothing
    weights = torch.where(snr < 1, weights.clamp(min=args.least_weight), weights)
    while trainer.goes_on():
        scene = torch.randint(min(len(latents), len(texts)), (n,), device=device)
        clean = latents[scene].float()
        noise = torch.randn_like(clean) + NOISE_OFFSET * torch.randn(n, clean.shape[1], 1, 1, device=device)
        # stratified over the batch: the loss of a step varies less
        timesteps = ((torch.arange(n, device=device) + torch.rand(n, device=device)) * 1000 / n).long().clamp(max=999)
        text = ids[torch.randint(len(ids), (n,), device=device), scene]
        text = torch.where(torch.rand(n, 1, device=device) < EMPTY_CAPTIONS, empty, text)
        nulled = torch.rand(n, 1, device=device) < recipe.null_padding
        muted = find_silent(text, tokenizer.eos_token_id, small) & nulled
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = trainer.forward(noisy, timesteps, text, empty, muted).float()
        error = (predicted - scheduler.get_velocity(clean, noise, timesteps)).square().mean(dim=(1, 2, 3))
        trainer.step((error * weights[timesteps]).mean())


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a Stable Diffusion folder in float16 safetensors, and what they cost."""
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    states = {
        name: torch.load(args.work / f"{name}.pt", map_location="cpu", weights_only=True) for name in ("vae", "unet")
    }
    denoiser = Recipe.read(args.work).denoiser(tokenizer)
    denoiser.load_state_dict(states["unet"]["ema"])
    pipe = networks.assemble(trained_vae(args.work), denoiser.text_encoder, tokenizer, denoiser.unet)
    pipe.to(dtype=torch.float16)
    for old in (args.out / "unet").glob("*.safetensors*"):  # in more or fewer shards
        old.unlink()
    networks.save(pipe, args.out, SHARD)
    spent = {name: {key: state[key] for key in ("samples", "seconds")} for name, state in states.items()}
    (args.out / "training.json").write_text(json.dumps(spent, indent=1) + "\n")
    print(f"{args.out}: {spent}")


def write_checkpoint(work: Path, name: str, module: torch.nn.Module, spent: dict) -> None:
    """Make `module` a checkpoint to train on from, with the samples and seconds `spent`; ValueError if there is one."""
    path = work / f"{name}.pt"
    if path.exists():
        raise ValueError(f"{path} exists: continue from it, or move it away first")
    weights = module.state_dict()
    torch.save({"module": weights, "ema": weights, **spent}, path)


def restore_vae(folder: Path, work: Path) -> None:
    """Take the autoencoder of a model's folder, whose latents are standardised already."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32, local_files_only=True)
    write_checkpoint(work, "vae", Autoencoder(vae), json.loads((folder / "training.json").read_text())["vae"])
    channels = vae.config.latent_channels
    (work / "moments.json").write_text(json.dumps({"mean": [0.0] * channels, "deviation": [1.0] * channels}))


def restore(args: argparse.Namespace) -> None:
    """Write the checkpoints that continue the training of the exported folder, where none are left."""
    pipe = StableDiffusionPipeline.from_pretrained(args.out, dtype=torch.float32, local_files_only=True)
    config, spent = pipe.unet.config, json.loads((args.out / "training.json").read_text())
    levels = sum("CrossAttn" in kind for kind in config.down_block_types)
    layers = pipe.text_encoder.config.num_hidden_layers
    Recipe(layers, list(config.block_out_channels), levels, args.null_padding).write(args.work)
    restore_vae(args.out, args.work)
    if (args.work / "tokenizer").exists():
        tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
        networks.change_tokens(pipe.text_encoder, pipe.tokenizer, tokenizer, forget=args.forget)
    else:
        pipe.tokenizer.save_pretrained(args.work / "tokenizer")
    write_checkpoint(args.work, "unet", Denoiser(pipe.unet, pipe.text_encoder), spent["unet"])


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a model is and how it learns."""
    parser.add_argument("--context", type=int, default=32, help="tokens of a text")
    parser.add_argument("--text-layers", type=int, default=1, help="layers of the text encoder")
    parser.add_argument("--channels", type=int, nargs=3, default=[64, 128, 192], help="of the U-Net's three levels")
    parser.add_argument("--attention-levels", type=int, default=2, help="levels that attend to the text, largest first")
    parser.add_argument("--world", choices=WORLDS, default="street", help="of the scenes that `data` renders")
    parser.add_argument("--null-padding", type=float, default=0.9, help="how often end and padding say nothing")
    parser.add_argument("--null-small-words", action="store_true", help="with the padding, articles, commas and such")
    parser.add_argument("--least-weight", type=float, default=0.0, help="of the noisier half of the levels in the loss")


def begin(args: argparse.Namespace) -> None:
    """Make the work folder, and let SIGTERM end this process and those it started as an error does."""
    args.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


STAGES = {
    "data": make_data,
    "vae": lambda args: launch(train_vae, args),
    "latents": cache_latents,
    "unet": lambda args: launch(train_unet, args),
    "export": export,
    "restore": restore,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run one stage."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--size", type=int, choices=[64, 128], default=64, help="image size of the latents, px")
    parser.add_argument("--forget", nargs="+", default=[], help="words that `restore` begins anew in another world")
    add_recipe(parser)
    add_options(parser, out=Path("data/urban-tiny"), samples=100_000)
    args = parser.parse_args(argv)
    if args.decay_from is None:
        args.decay_from = 0.3 if args.stage == "vae" else 1.0
    begin(args)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
