"""Train `urban-tiny` from scratch, in stages that each continue where they were stopped.

    python -m daamlib.urban.training.train data       # render the scenes (seeds 0 ... N-1) and train the tokenizer
    python -m daamlib.urban.training.train vae        # the autoencoder
    python -m daamlib.urban.training.train latents --size 64    # encode every scene once; then the same with --size 128
    python -m daamlib.urban.training.train unet --size 64  --samples 300000   # U-Net and text encoder, jointly
    python -m daamlib.urban.training.train unet --size 128 --samples 400000   # the same networks, continued
    python -m daamlib.urban.training.train export     # write the Stable Diffusion folder in float16

    python -m daamlib.urban.training.train restore    # instead: checkpoints from that folder, to train it further

`data` takes what a model is: its captions (`--captions`), `--context`, `--text-layers`, `--null-padding` and the
U-Net's `--channels` and `--attention-levels`; the other stages read it from `recipe.json`, which `data` or `restore`
wrote.

`--samples` counts from the very beginning of a stage's network, so the second `unet` line trains 100,000 samples at
128 px. Checkpoints go to `--work` every few minutes; a stopped command is simply given again. On a CPU use one
process per core (`--processes 2`); on a GPU one process and a larger `--batch`.
"""

import argparse
import json
import os
import signal
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from ..scenes import to_tensor
from . import networks
from .data import encode_latents, render_scenes
from .job import Job

EMPTY_CAPTIONS = 0.1  # for classifier-free guidance
NOISE_OFFSET = 0.05  # lets the model learn overall brightness, which the schedule's last step leaks
SNR_GAMMA = 5.0  # min-SNR weighting (Hang et al. 2023)


class Denoiser(torch.nn.Module):
    """Text encoder and U-Net as one module, so that one optimiser and one DDP wrapper hold both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy, timesteps, ids, empty, muted):
        """The predicted velocity (B, 4, h, w).

        noisy: (B, 4, h, w); timesteps: (B,); ids: (B, C) token ids; empty: (1, C) those of the empty text; muted: (B,
        C) bool, the tokens that show the U-Net the empty text's state of their place instead of their own.
        """
        states = self.text_encoder(torch.cat([ids, empty])).last_hidden_state
        text = torch.where(muted.unsqueeze(-1), states[-1:], states[:-1])
        return self.unet(noisy, timesteps, text).sample


class Autoencoder(torch.nn.Module):
    """The VAE as one forward pass, for DDP: pixels -> (reconstruction, KL per latent value)."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels):
        """(B, 3, H, W) -> (B, 3, H, W), scalar."""
        posterior = self.vae.encode(pixels).latent_dist
        return self.vae.decode(posterior.sample()).sample, posterior.kl().sum() / posterior.mean.numel()


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Mean absolute and squared error, and the absolute error of horizontal and vertical differences (edges)."""
    error = decoded - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def train_vae(rank: int, world: int, args: argparse.Namespace) -> None:
    """Train the autoencoder on 64 px crops of the scenes and, a quarter of the time, on scenes shrunk to 64 px."""
    scenes = render_scenes(args.work / "scenes", args.scenes)
    torch.manual_seed(args.seed)
    job = Job(Autoencoder(networks.new_vae()), args.work / "vae.pt", args, rank, world)
    rng = job.rng()
    torch.manual_seed(int(rng.integers(2**31)))  # the posterior's noise
    while job.samples < args.samples:
        images = to_tensor(scenes.images[np.sort(rng.integers(len(scenes.captions), size=args.batch))])
        if rng.random() < 0.25:
            pixels = F.interpolate(images, (64, 64), mode="area")
        else:
            top, left = rng.integers(65, size=2)
            pixels = images[:, :, top : top + 64, left : left + 64]
        pixels = pixels.to(job.device)
        with job.autocast():
            decoded, kl = job.forward(pixels)
        job.step(reconstruction_loss(decoded.float(), pixels) + 1e-5 * kl, job.learning_rate(decay_from=0.3))
    job.save()


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
            latents = trained_vae(args.work).encode(to_tensor(scenes.images[:1000])).latent_dist.mean
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        moments.write_text(json.dumps({"mean": mean.tolist(), "deviation": deviation.tolist()}))
    vae = trained_vae(args.work)
    path = args.work / f"latents{args.size}.npy"
    latents = encode_latents(vae, scenes, path, size=args.size, device=args.device)
    print(f"{args.size} px: latents {latents.shape}, standard deviation {latents[:2000].astype(np.float32).std():.3f}")


@dataclass(frozen=True)
class Recipe:
    """What a model is, besides how long it was trained.

    captions: "sparse" or "dense" (`daamlib.urban.captions`); text_layers: of the text encoder; channels: of the U-Net's
    three levels; attention_levels: how many of them, from the largest grid on, attend to the text; null_padding: how
    often a text's end token and padding are those of the empty text. They follow the words in a causal text encoder
    and so know all of them: where they are heard, the words themselves need not say what they stand for.
    """

    captions: str
    text_layers: int
    channels: list[int]
    attention_levels: int
    null_padding: float

    @classmethod
    def read(cls, work: Path) -> "Recipe":
        """Raises FileNotFoundError where neither `data` nor `restore` was run."""
        return cls(**json.loads((work / "recipe.json").read_text()))

    def write(self, work: Path) -> None:
        (work / "recipe.json").write_text(json.dumps(asdict(self)) + "\n")

    def denoiser(self, tokenizer: CLIPTokenizer) -> Denoiser:
        """New networks, for the tokenizer's words and context."""
        text_encoder = networks.new_text_encoder(tokenizer, layers=self.text_layers)
        return Denoiser(networks.new_unet(self.channels, attention_levels=self.attention_levels), text_encoder)


def train_unet(rank: int, world: int, args: argparse.Namespace) -> None:
    """Train U-Net and text encoder jointly on the cached latents, with v-prediction and min-SNR weights."""
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    recipe = Recipe.read(args.work)
    scenes = render_scenes(args.work / "scenes", args.scenes)
    captions = scenes.dense_captions if recipe.captions == "dense" else [[caption] for caption in scenes.captions]
    latents = np.load(args.work / f"latents{args.size}.npy", mmap_mode="r")
    # (caption of a scene, scene, token)
    ids = torch.stack([networks.tokenize(tokenizer, list(of_scenes)) for of_scenes in zip(*captions, strict=True)])
    empty = networks.tokenize(tokenizer, [""])
    scheduler = networks.new_scheduler()
    alphas = scheduler.alphas_cumprod
    weights = torch.clamp(alphas / (1 - alphas), max=SNR_GAMMA) / (alphas / (1 - alphas) + 1)

    torch.manual_seed(args.seed)
    job = Job(recipe.denoiser(tokenizer), args.work / "unet.pt", args, rank, world)
    rng = job.rng()
    torch.manual_seed(int(rng.integers(2**31)))
    while job.samples < args.samples:
        index = np.sort(rng.integers(len(latents), size=args.batch))
        clean = torch.from_numpy(latents[index].astype(np.float32))
        noise = torch.randn_like(clean) + NOISE_OFFSET * torch.randn(args.batch, clean.shape[1], 1, 1)
        # stratified over the batch: the loss of a step varies less
        timesteps = ((torch.arange(args.batch) + torch.rand(args.batch)) * 1000 / args.batch).long()
        said = ids[rng.integers(len(ids), size=args.batch), index]
        text = torch.where(torch.rand(args.batch, 1) < EMPTY_CAPTIONS, empty, said)
        end = (text == tokenizer.eos_token_id).int().argmax(dim=1, keepdim=True)  # the first: padding is the same token
        muted = (torch.arange(text.shape[1]) >= end) & (torch.rand(args.batch, 1) < recipe.null_padding)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps).to(job.device)
        with job.autocast():
            inputs = (noisy, timesteps, text, empty, muted)
            predicted = job.forward(*(tensor.to(job.device) for tensor in inputs))
        error = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        job.step((error * weights[timesteps].to(job.device)).mean(), job.learning_rate(decay_from=args.decay_from))
    job.save()


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a Stable Diffusion folder in float16 safetensors, and what they cost."""
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    states = {
        name: torch.load(args.work / f"{name}.pt", map_location="cpu", weights_only=True) for name in ("vae", "unet")
    }
    denoiser = Recipe.read(args.work).denoiser(tokenizer)
    denoiser.load_state_dict(states["unet"]["ema"])
    pipe = networks.assemble(trained_vae(args.work), denoiser.text_encoder, tokenizer, denoiser.unet)
    pipe.to(dtype=torch.float16).save_pretrained(args.out, safe_serialization=True)
    spent = {name: {key: state[key] for key in ("samples", "seconds")} for name, state in states.items()}
    (args.out / "training.json").write_text(json.dumps(spent, indent=1) + "\n")
    print(f"{args.out}: {spent}")


def restore(args: argparse.Namespace) -> None:
    """Write the checkpoints that continue the training of the shipped folder, where none are left."""
    pipe = StableDiffusionPipeline.from_pretrained(args.out, dtype=torch.float32)
    spent = json.loads((args.out / "training.json").read_text())
    pipe.tokenizer.save_pretrained(args.work / "tokenizer")
    config = pipe.unet.config
    levels = sum("CrossAttn" in kind for kind in config.down_block_types)
    layers = pipe.text_encoder.config.num_hidden_layers
    Recipe(args.captions, layers, list(config.block_out_channels), levels, args.null_padding).write(args.work)
    parts = {"vae": Autoencoder(pipe.vae), "unet": Denoiser(pipe.unet, pipe.text_encoder)}
    for name, module in parts.items():
        path = args.work / f"{name}.pt"
        if path.exists():
            raise ValueError(f"{path} exists: continue from it, or move it away first")
        weights = module.state_dict()
        torch.save({"module": weights, "ema": weights, **spent[name]}, path)
    channels = pipe.vae.config.latent_channels  # the shipped latents are standardised already
    (args.work / "moments.json").write_text(json.dumps({"mean": [0.0] * channels, "deviation": [1.0] * channels}))


def make_data(args: argparse.Namespace) -> None:
    """Render the training scenes and train the tokenizer on their captions."""
    scenes = render_scenes(args.work / "scenes", args.scenes)
    texts = [text for of_scene in scenes.dense_captions for text in of_scene]
    texts = texts if args.captions == "dense" else scenes.captions
    networks.train_tokenizer(texts, args.work / "tokenizer", context=args.context)
    Recipe(args.captions, args.text_layers, args.channels, args.attention_levels, args.null_padding).write(args.work)


def _worker(rank: int, world: int, port: int, args: argparse.Namespace) -> None:
    """One data-parallel process; on a CPU it keeps to one core of its own."""
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
        if world > 1:
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    if world > 1:
        backend = "gloo" if args.device == "cpu" else "nccl"
        dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    {"vae": train_vae, "unet": train_unet}[args.stage](rank, world, args)
    if world > 1:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Read the command line and run one stage."""
    parser = argparse.ArgumentParser(
        prog="python -m daamlib.urban.training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=["data", "vae", "latents", "unet", "export", "restore"])
    parser.add_argument("--work", type=Path, default=Path("checkpoints/urban-tiny"), help="checkpoints and caches")
    parser.add_argument("--out", type=Path, default=Path("data/urban-tiny"), help="the folder `export` writes")
    parser.add_argument("--scenes", type=int, default=24_000, help="rendered training scenes")
    parser.add_argument("--captions", choices=["sparse", "dense"], default="sparse", help="see daamlib.urban.captions")
    parser.add_argument("--context", type=int, default=77, help="tokens of a text")
    parser.add_argument("--text-layers", type=int, default=2, help="layers of the text encoder")
    parser.add_argument("--channels", type=int, nargs=3, default=[48, 96, 192], help="of the U-Net's three levels")
    parser.add_argument("--attention-levels", type=int, default=3, help="levels that attend to the text, largest first")
    parser.add_argument("--null-padding", type=float, default=0.0, help="how often end and padding say nothing")
    parser.add_argument("--samples", type=int, default=100_000, help="stop when this many samples were seen in all")
    parser.add_argument("--size", type=int, choices=[64, 128], default=64, help="image size of the latents, px")
    parser.add_argument("--batch", type=int, default=32, help="samples per process and step")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--decay-from", type=float, default=1.0, help="part of --samples after which the rate falls")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes on this machine")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process, on a CPU")
    parser.add_argument("--save-minutes", type=float, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as a normal exit, which ends the worker processes too
    if args.stage in ("vae", "unet"):
        torch.multiprocessing.spawn(_worker, (args.processes, _free_port(), args), nprocs=args.processes, daemon=True)
    else:
        {"data": make_data, "latents": cache_latents, "export": export, "restore": restore}[args.stage](args)


if __name__ == "__main__":
    main()
