"""Train the annotator on rendered scenes, whose labels are exact.

    python -m training.annotator train --samples 30000   # continues where it was stopped
    python -m training.annotator export                  # writes the averaged weights in float16
    python -m training.annotator evaluate                # IoU of the exported weights on held-out scenes

The scenes are those of `python -m training.train data`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from daamlib_lab.urban.annotator import CLASSES, FOLDER, IDS, annotate, load_annotator
from daamlib_lab.urban.scenes import HELD_OUT, SIZE, render, to_tensor

from .data import render_scenes
from .train import begin
from .trainer import Trainer, add_options, launch

_UNKNOWN = 255
_CHANNELS = np.full(256, _UNKNOWN, np.uint8)  # Cityscapes id -> channel
_CHANNELS[IDS] = np.arange(len(IDS))


def new_annotator() -> SegformerForSemanticSegmentation:
    """An untrained annotator (1.0 M parameters): (B, 3, H, W) in [-1, 1] -> logits (B, 10, H/2, W/2).

    The stages are narrow where the grid is fine, and the attention there looks at a grid reduced to 4 x 4 (at
    128 px): on a CPU the 64 x 64 grid is what costs.
    """
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            id2label=dict(enumerate(CLASSES)),
            label2id={name: i for i, name in enumerate(CLASSES)},
            num_encoder_blocks=4,
            depths=[1, 1, 2, 2],
            hidden_sizes=[16, 32, 64, 160],
            patch_sizes=[5, 3, 3, 3],
            strides=[2, 2, 2, 2],
            sr_ratios=[16, 8, 2, 1],
            num_attention_heads=[1, 1, 2, 4],
            mlp_ratios=[2, 2, 4, 4],
            hidden_act="relu",
            decoder_hidden_size=32,
            # every sample is new, augmented and seen once or twice: nothing is left for dropout to do
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
        )
    )


def to_channels(ids: np.ndarray) -> np.ndarray:
    """Cityscapes ids, uint8 of any shape -> the network's channels 0..9, uint8 of the same shape.

    Raises ValueError for an id that is not one of the ten classes.
    """
    channels = _CHANNELS[ids]
    if (channels == _UNKNOWN).any():
        strange = sorted(set(np.unique(ids).tolist()) - set(IDS.tolist()))
        raise ValueError(
            f"the ids {strange} are not among the annotator's: {dict(zip(CLASSES, IDS.tolist(), strict=True))}"
        )
    return channels


def augment(pixels: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring rendered scenes nearer to generated ones: softer, off in colour, with smooth noise; and flip half.

    pixels: (B, 3, H, W) in [-1, 1]; targets: (B, H, W). Returns new tensors of the same shapes. Draws from
    torch's global generator.
    """

    def uniform(low: float, high: float, channels: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pixels), channels, 1, 1)

    flip = torch.rand(len(pixels)) < 0.5
    targets = torch.where(flip[:, None, None], targets.flip(2), targets)
    pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)

    soft = pixels
    for _ in range(2):  # two box filters: a blur of about 1.2 px
        soft = F.avg_pool2d(F.pad(soft, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pixels = torch.lerp(pixels, soft, uniform(-0.5, 1).clamp(min=0))  # a third stays sharp

    pixels = torch.lerp(pixels.mean(1, keepdim=True), pixels, uniform(0.6, 1.3))  # saturation
    middle = pixels.mean((1, 2, 3), keepdim=True)
    pixels = middle + (pixels - middle) * uniform(0.75, 1.2)  # contrast
    pixels = pixels + uniform(-0.2, 0.2) + uniform(-0.08, 0.08, channels=3)  # brightness and tint

    noise = torch.zeros(len(pixels), 3, 1, 1)
    for side in (8, 32):  # stains, and the grain of a denoiser that stopped too early
        noise = F.interpolate(noise, (side, side), mode="bilinear", align_corners=False)
        noise = noise + uniform(0, 0.12) * torch.randn_like(noise)
    noise = F.interpolate(noise, pixels.shape[-2:], mode="bilinear", align_corners=False)
    return (pixels + noise).clamp(-1, 1), targets


def segmentation_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus half the soft Dice loss over the batch, which keeps thin classes from being given up.

    logits: (B, C, h, w), up-sampled bilinearly to the targets; targets: (B, H, W) int64 in 0..C-1.
    """
    logits = F.interpolate(logits.float(), targets.shape[-2:], mode="bilinear", align_corners=False)
    logs = logits.log_softmax(1)
    right = logs.gather(1, targets[:, None])  # of the true class; no (B, C, H, W) one-hot is needed
    classes, flat = logits.shape[1], targets.flatten()
    common = logits.new_zeros(classes).index_add(0, flat, right.exp().flatten())
    total = logs.exp().sum((0, 2, 3)) + torch.bincount(flat, minlength=classes)
    dice = 1 - (2 * common + 1) / (total + 1)  # + 1 pixel: a class the batch does not hold counts as right
    return 0.5 * dice.mean() - right.mean()


def train(args: argparse.Namespace) -> None:
    """Train up to `--samples` samples in all, or for `--minutes`; the checkpoint is `annotator.pt` in `--work`."""
    trainer = Trainer(new_annotator().train(), args.work / "annotator.pt", args)
    scenes = render_scenes(args.work / "scenes", args.scenes)
    vae = None
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32).to(trainer.device).eval()
    while trainer.goes_on():
        index = torch.randint(len(scenes.captions), (args.batch,)).numpy()
        pixels = to_tensor(scenes.images[index])
        targets = torch.from_numpy(to_channels(scenes.labels[index]).astype(np.int64))
        if vae is not None:
            with torch.no_grad():
                mean = vae.encode(pixels[::4].to(trainer.device)).latent_dist.mean
                pixels[::4] = vae.decode(mean).sample.cpu()
        pixels, targets = augment(pixels, targets)
        logits = trainer.forward(pixels.to(trainer.device)).logits
        trainer.step(segmentation_loss(logits, targets.to(trainer.device)))
    print(f"annotator: {trainer.samples} samples")


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights to `--out` with `save_pretrained`, float16 safetensors."""
    state = torch.load(args.work / "annotator.pt", map_location="cpu", weights_only=True)
    model = new_annotator()
    model.load_state_dict(state["ema"])
    model.half().save_pretrained(args.out)
    print(f"{args.out}: {state['samples']} samples, {sum(p.numel() for p in model.parameters())} parameters")


def class_ious(counts: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each class of a confusion matrix; nan where a class never occurs."""
    return counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())


def evaluate(args: argparse.Namespace) -> None:
    """Print the IoU of every class over `--images` held-out scenes and write `metrics.json` next to the weights."""
    torch.set_num_threads(args.threads)
    model, matrix = load_annotator(args.out, args.device), MulticlassConfusionMatrix(len(CLASSES))
    for first in range(0, args.images, 50):
        seeds = range(HELD_OUT + first, HELD_OUT + min(first + 50, args.images))
        scenes = [render(seed, SIZE) for seed in seeds]
        found = annotate(model, np.stack([scene.image for scene in scenes]))
        truth = np.stack([scene.labels for scene in scenes])
        matrix.update(torch.from_numpy(to_channels(found)), torch.from_numpy(to_channels(truth)))
    counts = matrix.compute().double()
    ious = {name: round(iou, 4) for name, iou in zip(CLASSES, class_ious(counts).tolist(), strict=True)}
    metrics = {
        "miou": round(float(class_ious(counts).nanmean()), 4),
        "iou": {name: iou for name, iou in ious.items() if iou == iou},  # JSON knows no nan
        "pixel_accuracy": round(float(counts.trace() / counts.sum()), 4),
        "scenes": args.images,
        "first_seed": HELD_OUT,
    }
    for name, iou in ious.items():
        print(f"{name:>14} {iou:.4f}")
    print(f"{'mIoU':>14} {metrics['miou']:.4f} over {args.images} held-out scenes")
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run one stage."""
    parser = argparse.ArgumentParser(
        prog="python -m training.annotator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stages = {"train": lambda args: launch(train, args), "export": export, "evaluate": evaluate}
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--vae", type=Path, help="an autoencoder's folder: every fourth sample goes through it")
    parser.add_argument("--images", type=int, default=500, help="held-out scenes of `evaluate`")
    add_options(parser, out=FOLDER, samples=30_000, batch=8, lr=1.5e-3, decay_from=0.0, ema=0.998)
    args = parser.parse_args(argv)
    begin(args)
    stages[args.stage](args)


if __name__ == "__main__":
    main()
