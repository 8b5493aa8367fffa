"""The annotator: a small segmentation network that finds the classes of the street scenes in any image of them.

It is trained on rendered scenes, whose labels are exact, and judges what the generative model draws: a stock
`transformers` Segformer whose first stage works on half the image's side, since a lamp post is two pixels wide.

    python -m daamlib.urban.annotator train --samples 30000   # continues where it was stopped
    python -m daamlib.urban.annotator export                  # writes the averaged weights in float16
    python -m daamlib.urban.annotator evaluate                # IoU of the exported weights on held-out scenes

The scenes are those of `python -m daamlib.urban.training.train data`.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ..attention.fingerprint import Fingerprint
from ..attention.unet import fingerprint_of
from ..cityscapes import BY_NAME
from ..pipeline import BUNDLED, quiet_loading
from ..resources import bundled
from .scenes import HELD_OUT, SIZE, render, to_tensor
from .training.data import render_scenes
from .training.job import Job

FOLDER = bundled("urban-tiny/annotator")
# Every class that occurs in the scenes, in the order of its train id: the network's channels.
CLASSES = (
    "road",
    "sidewalk",
    "building",
    "pole",
    "traffic light",
    "vegetation",
    "sky",
    "person",
    "rider",
    "car",
)
IDS = np.array([BY_NAME[name].id for name in CLASSES], np.uint8)  # channel -> Cityscapes id
SCALES = (1.0, 1.25)  # the image is seen at both sizes: what is two pixels wide is found better enlarged
LEAST_SIDE = 32  # px: below it the strided convolutions of the attention have nothing to stand on

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
    torch.set_num_threads(args.threads)
    scenes = render_scenes(args.work / "scenes", args.scenes)
    torch.manual_seed(args.seed)
    job = Job(new_annotator(), args.work / "annotator.pt", args, rank=0, world=1)
    job.module.train()
    vae = None
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32).to(job.device).eval()
    rng = job.rng()
    torch.manual_seed(int(rng.integers(2**31)))  # the augmentation's noise
    end = time.monotonic() + 60 * args.minutes
    while job.samples < args.samples and time.monotonic() < end:
        index = np.sort(rng.integers(len(scenes.captions), size=args.batch))
        pixels = to_tensor(scenes.images[index])
        targets = torch.from_numpy(to_channels(scenes.labels[index]).astype(np.int64))
        if vae is not None:
            with torch.no_grad():
                mean = vae.encode(pixels[::4].to(job.device)).latent_dist.mean
                pixels[::4] = vae.decode(mean).sample.cpu()
        pixels, targets = augment(pixels, targets)
        with job.autocast():
            logits = job.forward(pixels.to(job.device)).logits
        job.step(segmentation_loss(logits, targets.to(job.device)), job.learning_rate(decay_from=0))
        with torch.no_grad():  # a job averages parameters only; the batch norm's statistics are buffers
            for averaged, current in zip(job.ema.buffers(), job.module.buffers(), strict=True):
                if averaged.is_floating_point():
                    averaged.lerp_(current, 0.01)
                else:
                    averaged.copy_(current)
    job.save()
    print(f"{job.path}: {job.samples} samples, {job.seconds / 60:.1f} minutes of training")


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights to `--out` with `save_pretrained`, float16 safetensors."""
    state = torch.load(args.work / "annotator.pt", map_location="cpu", weights_only=True)
    model = new_annotator()
    model.load_state_dict(state["ema"])
    model.half().save_pretrained(args.out)
    print(f"{args.out}: {state['samples']} samples, {sum(p.numel() for p in model.parameters())} parameters")


def load_annotator(folder: str | Path | None = None, device: str = "cpu") -> SegformerForSemanticSegmentation:
    """The trained annotator of `folder` (None: the bundled one) in float32, ready for `annotate`.

    Raises ValueError if the folder holds no annotator.
    """
    folder = Path(folder or FOLDER)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"there is no annotator in {folder}: train and export one with `python -m daamlib.urban.annotator`"
        )
    with quiet_loading():
        model = SegformerForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    unknown = sorted(set(model.config.id2label.values()) - set(BY_NAME))
    if unknown:
        raise ValueError(f"the model in {folder} has classes that are no Cityscapes labels: {unknown}")
    return model.to(device).eval()


def is_bundled(pipe) -> bool:
    """Whether the pipeline's U-Net has the bundled model's keys. TypeError or ValueError if `trace` refuses it."""
    stored = load_file(BUNDLED / "unet" / "diffusion_pytorch_model.safetensors")
    ending = ".attn2.to_k.weight"
    weights = {name.removesuffix(".to_k.weight"): stored[name].float() for name in stored if name.endswith(ending)}
    found = fingerprint_of(pipe, middle=True)
    keys = {name: weights[name].T.__rmatmul__ for name in found.layers if name in weights}
    d_text = next(iter(weights.values())).shape[1]
    return len(keys) == len(weights) and Fingerprint.of_keys(keys, d_text).difference(found) is None


def labels_for(pipe, *, any_model: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """`annotate` by the bundled annotator, for the images of a pipeline: the `labels` of `datasets.generate`.

    It knows the drawn streets of the bundled model alone, and would label photographs without a word. any_model: True
    for another model that draws the same streets, such as one that `daamlib.urban.training` made. Raises ValueError for
    any other pipeline, saying how to make masks.
    """
    if not any_model and not is_bundled(pipe):
        raise ValueError(
            f"the annotator knows the drawn streets of the bundled model, not the images of "
            f"{pipe.config.get('_name_or_path') or type(pipe).__name__}. Draw masks for those: "
            "daamlib.widgets.annotate(dataset, classes, 'masks') on the images of daamlib.datasets.generate, which "
            "daamlib.datasets.import_masks(dataset, 'masks/labels') reads, and notebook 06 as its parameter "
            "MASKS='masks/labels'. If this model draws the same streets, say so: labels_for(pipe, any_model=True)"
        )
    return functools.partial(annotate, load_annotator(device=pipe.device.type))


def _to_array(images: np.ndarray | Sequence[Image.Image]) -> np.ndarray:
    if not isinstance(images, np.ndarray):
        images = list(images)
        for image in images:
            if not isinstance(image, Image.Image) or image.mode != "RGB":
                what = f"a {image.mode} image" if isinstance(image, Image.Image) else type(image).__name__
                raise ValueError(f"expected PIL images in RGB mode, got {what}: use image.convert('RGB')")
        sizes = sorted({image.size for image in images})
        if len(sizes) != 1:
            raise ValueError(f"expected at least one image, all of one size, got the sizes {sizes}")
        images = np.stack([np.asarray(image) for image in images])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(
            f"expected images (B, H, W, 3) uint8, B at least 1, got {images.shape} {images.dtype}; "
            "a single image needs a leading axis: image[None]"
        )
    if min(images.shape[1:3]) < LEAST_SIDE:
        raise ValueError(f"images must be at least {LEAST_SIDE} px high and wide, got {images.shape[1:3]}")
    return images


@torch.inference_mode()
def annotate(model, images: np.ndarray | Sequence[Image.Image], *, batch: int = 32) -> np.ndarray:
    """The Cityscapes id of every pixel, (B, H, W) uint8, as `model` (of `load_annotator`) sees it.

    images: (B, H, W, 3) uint8 array, or PIL images in RGB mode and of one size. The network knows scenes of
    128 px; other sizes work, the worse the farther. Runs `batch` images at a time.
    Raises ValueError for other images and for a model in training mode, which would judge by the batch.
    """
    images = _to_array(images)
    if model.training:
        raise ValueError("the annotator is in training mode: call model.eval() first")
    ids = np.array([BY_NAME[name].id for _, name in sorted(model.config.id2label.items())], np.uint8)
    maps = np.empty(images.shape[:3], np.uint8)
    for start in range(0, len(images), batch):
        pixels = to_tensor(images[start : start + batch], images.shape[2]).to(model.device)
        logits = sum(_logits(model, pixels, scale) for scale in SCALES)
        maps[start : start + batch] = ids[logits.argmax(1).cpu().numpy()]
    return maps


def _logits(model, pixels: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, 3, H, W) -> (B, C, H, W) logits of the pixels enlarged by `scale`."""
    size = [round(side * scale) for side in pixels.shape[-2:]]
    logits = model(F.interpolate(pixels, size, mode="bilinear", align_corners=False)).logits
    return F.interpolate(logits.float(), pixels.shape[-2:], mode="bilinear", align_corners=False)


def count_pixels(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The confusion matrix (10, 10) int64 of two id maps: row the true class, column the predicted one."""
    n = len(CLASSES)
    pairs = to_channels(truth).astype(np.int64) * n + to_channels(predicted)
    return np.bincount(pairs.ravel(), minlength=n * n).reshape(n, n)


def class_ious(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, pooled over all pixels counted; nan where a class never occurs."""
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return np.where(union > 0, counts.diagonal() / np.maximum(union, 1), np.nan)


def evaluate(args: argparse.Namespace) -> None:
    """Print the IoU of every class over `--images` held-out scenes and write `metrics.json` beside the weights."""
    torch.set_num_threads(args.threads)
    model = load_annotator(args.out, args.device)
    counts = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    for first in range(0, args.images, 50):
        seeds = range(HELD_OUT + first, HELD_OUT + min(first + 50, args.images))
        scenes = [render(seed, SIZE) for seed in seeds]
        found = annotate(model, np.stack([scene.image for scene in scenes]))
        counts += count_pixels(np.stack([scene.labels for scene in scenes]), found)
    ious = dict(zip(CLASSES, class_ious(counts).round(4).tolist(), strict=True))
    metrics = {
        "miou": round(float(np.nanmean(class_ious(counts))), 4),
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
        prog="python -m daamlib.urban.annotator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=["train", "export", "evaluate"])
    parser.add_argument("--work", type=Path, default=Path("checkpoints/urban-tiny"), help="scenes, checkpoint")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder of the exported weights")
    parser.add_argument("--scenes", type=int, default=24_000, help="rendered training scenes")
    parser.add_argument("--samples", type=int, default=30_000, help="train until so many were seen in all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop this run after so long")
    parser.add_argument("--batch", type=int, default=8, help="samples per step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="the highest rate; it falls as a cosine")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", type=Path, help="an autoencoder's folder: every fourth sample goes through it")
    parser.add_argument("--images", type=int, default=500, help="held-out scenes of `evaluate`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--save-minutes", type=float, default=2)
    args = parser.parse_args(argv)
    {"train": train, "export": export, "evaluate": evaluate}[args.stage](args)


if __name__ == "__main__":
    main()
