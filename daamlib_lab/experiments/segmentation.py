"""Worth of labels: a small segmentation network trained on a Cityscapes-style folder, tested on another.

    export.cityscapes(dataset, "out", split="train", classes=("car", "person"))
    export.cityscapes(test_set, "out", split="val", classes=("car", "person"))
    images = segmentation.read("out", split="train", side=64)
    model = segmentation.train(images, steps=120, seed=0)
    segmentation.evaluate(model, segmentation.read("out", split="val", side=64))  # {class: IoU}

Every set of labels gets the same network, the same number of steps and the same augmentation, so that a difference
between two tests is one between the labels (and images) trained on. Pixels of 255 take no part in the loss or the test.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from daamlib.cityscapes import IGNORED
from daamlib.extras import needs
from daamlib.pipeline import cpu_threads

with needs("experiments"):
    from torchmetrics.classification import MulticlassJaccardIndex

LEAST_SIDE = 32  # px: below it the strided convolutions of the attention have nothing to stand on
WEIGHT = 3.0  # of a pixel of a class, in the loss; of the class "background" 1: most pixels are background
EVERY = 30  # steps between two checks on a validation set


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images with their label maps.

    Attributes:
        images: Of one size.
        targets: Numbers of `classes`, 255 where a pixel does not count.
        classes: Their names.
    """

    images: UInt8[np.ndarray, "n height width 3"]
    targets: UInt8[np.ndarray, "n height width"]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int]) -> "Labelled":
        """Return some of the images, in this order."""
        return replace(self, images=self.images[list(indices)], targets=self.targets[list(indices)])

    def __add__(self, other: "Labelled") -> "Labelled":
        if self.classes != other.classes or self.images.shape[1:] != other.images.shape[1:]:
            sets = " and ".join(f"{of.classes} {of.images.shape[1:]}" for of in (self, other))
            raise ValueError(f"sets of the same classes and size can be added, got {sets}")
        images, targets = (self.images, other.images), (self.targets, other.targets)
        return replace(self, images=np.concatenate(images), targets=np.concatenate(targets))


def read(folder: str | Path, *, split: str = "train", side: int | None = None) -> Labelled:
    """Return a split of a folder of `export.cityscapes` with named `classes`, in the order of the files' names.

    Args:
        folder: With `classes.json`, `leftImg8bit` and `gtFine`.
        split: As `export.cityscapes` named it.
        side: Make the images side x side pixels: they are averaged down, of the labels the pixel under each cell's
            centre is taken. None: as they are.

    Returns:
        The images and their labels.

    Raises:
        FileNotFoundError: There is no such split, or an image has no label map.
        ValueError: Images of several sizes, a side that is more than theirs, or values that are no class.
    """
    folder = Path(folder)
    table = folder / "classes.json"
    if not table.is_file():
        raise FileNotFoundError(f"no {table}: write the folder by datasets.export.cityscapes, with its classes named")
    numbers = {int(i): name for i, name in json.loads(table.read_text(encoding="utf-8")).items() if int(i) != IGNORED}
    classes = tuple(numbers[i] for i in sorted(numbers))
    if sorted(numbers) != list(range(len(numbers))):
        raise ValueError(f"{table} must number the classes 0, 1, 2, ..., got {sorted(numbers)}")
    pictures = sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not pictures:
        raise FileNotFoundError(f"no images *_leftImg8bit.png in {folder / 'leftImg8bit' / split}")
    images, targets = [], []
    for path in pictures:
        name = path.name.replace("leftImg8bit", "gtFine_labelTrainIds")
        with Image.open(path) as image, Image.open(folder / "gtFine" / split / path.parent.name / name) as labels:
            if labels.size != image.size or side is not None and side > min(image.size):
                raise ValueError(f"{path} is {image.size}, its labels {labels.size}, asked for: {side or 'as it is'}")
            size = image.size if side is None else (side, side)
            images.append(np.array(image.resize(size, Image.Resampling.BOX).convert("RGB")))
            targets.append(np.array(labels.resize(size, Image.Resampling.NEAREST)))
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise ValueError(f"{folder / 'leftImg8bit' / split} has images of several sizes, {sizes}: give a side")
    strange = sorted({*np.unique(targets).tolist()} - {*numbers, IGNORED})
    if strange:
        raise ValueError(f"the label maps of {folder} have the values {strange}, which {table} does not name")
    return Labelled(np.stack(images), np.stack(targets), classes)


def new_network(classes: Sequence[str], *, seed: int = 0) -> SegformerForSemanticSegmentation:
    """An untrained Segformer (0.3 M parameters).

    Its weights are drawn by PyTorch's own rule for each layer. Segformer's rule, a standard deviation of 0.02 in all of
    them, is made for long trainings: a short one from nothing ends with the background everywhere.

    Args:
        classes: K names.
        seed: Of the weights.

    Returns:
        The network: (B, 3, H, W) in [-1, 1] -> logits (B, K, H/4, W/4).
    """
    config = SegformerConfig(
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
        num_encoder_blocks=3,
        depths=[1, 1, 1],
        hidden_sizes=[32, 64, 96],
        patch_sizes=[7, 3, 3],
        strides=[4, 2, 2],
        sr_ratios=[4, 2, 1],
        num_attention_heads=[1, 1, 2],
        mlp_ratios=[2, 2, 2],
        hidden_act="relu",
        decoder_hidden_size=64,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SegformerForSemanticSegmentation(config)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
    return model


def train(
    data: Labelled,
    *,
    steps: int = 120,
    batch: int = 8,
    lr: float = 8e-3,
    seed: int = 0,
    device: str = "cpu",
    validation: Labelled | None = None,
) -> SegformerForSemanticSegmentation:
    """A `new_network` trained for `steps` batches of `data`, ready to `evaluate`.

    Each image comes once, in an order of `seed`, before any comes again, see `augment`. AdamW; a one-cycle schedule,
    its peak chosen by trial on rendered scenes; on a CPU one thread, so the same arguments give the same weights.

    Args:
        data: Images of 32 px or more.
        steps: Batches in all.
        batch: Images in each.
        lr: The largest learning rate.
        seed: Of the weights, the order and the augmentation.
        device: Where it is trained, and stays.
        validation: Return the weights of the best mean IoU on these images, every 30 steps and last; None: the last.

    Returns:
        The network in evaluation mode.

    Raises:
        ValueError: Fewer than one step or image, images below 32 px, labels that are all 255, or of `ious`.
    """
    if steps < 1 or batch < 1 or not len(data):
        raise ValueError(f"expected steps, batch and images of 1 or more, got {steps}, {batch} and {len(data)}")
    if min(data.images.shape[1:3]) < LEAST_SIDE:
        raise ValueError(f"images must be at least {LEAST_SIDE} px high and wide, got {data.images.shape[1:3]}")
    if (data.targets == IGNORED).all():
        raise ValueError("every pixel is 255, uncertain: there is nothing to learn from")
    generator = torch.Generator().manual_seed(seed)
    model = new_network(data.classes, seed=seed).to(device).train()  # type: ignore[arg-type]  # transformers hides it
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    weights = torch.tensor([1.0 if name == "background" else WEIGHT for name in data.classes], device=device)
    queue: list[int] = []
    checks = []
    with cpu_threads(1):
        for step in range(1, steps + 1):
            while len(queue) < batch:
                queue += torch.randperm(len(data), generator=generator).tolist()
            part, queue = data.take(queue[:batch]), queue[batch:]
            pixels, targets = augment(_pixels(part.images), torch.from_numpy(part.targets).long(), generator)
            loss = segmentation_loss(model(pixels.to(device)).logits, targets.to(device), weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if validation is not None and (step % EVERY == 0 or step == steps):
                checks.append((evaluate(model.eval(), validation)["mean"], copy.deepcopy(model.state_dict())))
                model.train()
    if checks:
        model.load_state_dict(max(checks, key=lambda check: check[0])[1])
    return model.eval()


@torch.inference_mode()
def predict(model: SegformerForSemanticSegmentation, images: np.ndarray, *, batch: int = 32) -> np.ndarray:
    """The class that the model finds at each pixel.

    Args:
        model: In evaluation mode.
        images: (n, H, W, 3) uint8.
        batch: Images at a time.

    Returns:
        (n, H, W) uint8, numbers of classes.

    Raises:
        ValueError: The model is in training mode, where what it finds depends on the batch.
    """
    if model.training:
        raise ValueError("the network is in training mode: call model.eval() first")
    predicted = np.empty(images.shape[:3], np.uint8)
    with cpu_threads(1):
        for start in range(0, len(images), batch):
            logits = model(_pixels(images[start : start + batch]).to(model.device)).logits
            logits = F.interpolate(logits, images.shape[1:3], mode="bilinear", align_corners=False)
            predicted[start : start + batch] = logits.argmax(dim=1).cpu().numpy()
    return predicted


def ious(predicted: np.ndarray, data: Labelled) -> dict[str, float]:
    """Return the IoU of every class, over the pixels of all images but those of 255.

    Args:
        predicted: (n, H, W) uint8, the number of a class at each pixel.
        data: The images with their true labels.

    Returns:
        Percent by class, and their mean as "mean".

    Raises:
        ValueError: `predicted` is of another shape, or the data lack a class, whose IoU would mean nothing.
    """
    if predicted.shape != data.targets.shape:
        raise ValueError(f"expected predictions of images of {data.targets.shape}, got {predicted.shape}")
    absent = [name for i, name in enumerate(data.classes) if not (data.targets == i).any()]
    if absent:
        raise ValueError(f"no image shows {', '.join(absent)}: test on more images")
    metric = MulticlassJaccardIndex(num_classes=len(data.classes), average=None, ignore_index=IGNORED)
    values = 100 * metric(torch.from_numpy(predicted), torch.from_numpy(data.targets).long())
    return dict(zip(data.classes, values.tolist(), strict=True)) | {"mean": float(values.mean())}


def evaluate(model: SegformerForSemanticSegmentation, data: Labelled) -> dict[str, float]:
    """Return the `ious` of the model's predictions. Raises ValueError too if the data have other classes."""
    names = tuple(name for _, name in sorted(model.config.id2label.items()))  # type: ignore[union-attr]
    if names != data.classes:
        raise ValueError(f"the network was trained on the classes {names}, these images are labelled by {data.classes}")
    return ious(predict(model, data.images), data)


def _pixels(images: np.ndarray) -> torch.Tensor:
    """Return (B, H, W, 3) uint8 pixels as (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1


def augment(
    pixels: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip half of (B, 3, H, W) pixels with their (B, H, W) targets; change contrast, brightness and tint of all."""

    def uniform(low: float, high: float, channels: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pixels), channels, 1, 1, generator=generator)

    flip = torch.rand(len(pixels), generator=generator) < 0.5
    targets = torch.where(flip[:, None, None], targets.flip(2), targets)
    pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
    middle = pixels.mean((1, 2, 3), keepdim=True)
    pixels = middle + (pixels - middle) * uniform(0.75, 1.2)
    return (pixels + uniform(-0.2, 0.2) + uniform(-0.08, 0.08, channels=3)).clamp(-1, 1), targets


def segmentation_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy plus soft Dice loss, as the annotator's, over the pixels that count.

    logits: (B, K, h, w), up-sampled to the targets; targets: (B, H, W) int64, 255 where a pixel does not count.
    """
    logits = F.interpolate(logits.float(), targets.shape[-2:], mode="bilinear", align_corners=False)
    counts = targets != IGNORED
    kept, truth = logits.movedim(1, -1)[counts], targets[counts]  # (m, K), (m,)
    if not len(truth):
        return logits.sum() * 0
    probabilities, hits = kept.softmax(dim=1), F.one_hot(truth, len(weights))
    dice = 1 - (2 * (probabilities * hits).sum(dim=0) + 1) / ((probabilities + hits).sum(dim=0) + 1)
    return F.cross_entropy(kept, truth, weights) + dice.mean()
