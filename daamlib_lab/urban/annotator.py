"""The annotator: a small segmentation network that finds the classes of the street scenes in any image of them.

It was trained on rendered scenes, whose labels are exact, and labels what the generative model draws: a stock
`transformers` Segformer whose first stage works on half the image's side, since a lamp post is two pixels wide.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn import functional as F
from transformers import SegformerForSemanticSegmentation

from daamlib.attention.fingerprint import Fingerprint
from daamlib.attention.readers import fingerprint_of
from daamlib.cityscapes import BY_NAME
from daamlib.pipeline import load_pipeline, loading
from daamlib.resources import bundled

from .scenes import to_tensor

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
SCALES = (1.0, 1.25)  # the image is seen at both sizes: it recognises two pixels of width better when enlarged
LEAST_SIDE = 32  # px: below it the strided convolutions of the attention have nothing to stand on


def load_annotator(
    folder: str | Path | None = None, device: str | torch.device = "cpu"
) -> SegformerForSemanticSegmentation:
    """Load a trained annotator, ready for `annotate`.

    Args:
        folder: of its weights and config; None for the bundled one.
        device: where it computes, in float32.

    Returns:
        The network.

    Raises:
        ValueError: if the folder holds no annotator, or one of other classes or weights.
    """
    folder = Path(folder or FOLDER)
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no annotator in {folder}: `python -m training.annotator` trains one")
    with loading(folder, exactly=True):
        model = SegformerForSemanticSegmentation.from_pretrained(folder, local_files_only=True).float()
    unknown = sorted(set(_names(model)) - set(BY_NAME))
    if unknown:
        raise ValueError(f"the model in {folder} has classes that are no Cityscapes labels: {unknown}")
    model.eval()
    return torch.nn.Module.to(model, device)


def _names(model) -> list[str]:
    """The class of each channel."""
    return [name for _, name in sorted(model.config.id2label.items())]


@functools.cache
def _of_bundled() -> Fingerprint:
    return fingerprint_of(load_pipeline(device="cpu", dtype=torch.float32), middle=True)


def is_bundled(pipe: DiffusionPipeline) -> bool:
    """Return whether a pipeline's U-Net has the keys of the bundled model, in any precision.

    Args:
        pipe: a diffusers pipeline.

    Returns:
        True for the bundled model.

    Raises:
        TypeError: for a pipeline without a U-Net.
        ValueError: for a U-Net that `trace` refuses.
    """
    return _of_bundled().difference(fingerprint_of(pipe, middle=True)) is None


def labels_for(pipe: DiffusionPipeline, *, any_model: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """`annotate` by the bundled annotator, for the images of a pipeline; `datasets.AnnotatorLabeller` takes it.

    It knows the drawn streets of the bundled model alone, and would label photographs without a word.

    Args:
        pipe: the pipeline; the annotator computes where it does.
        any_model: True for another model that draws the same streets, such as one of `training`.

    Returns:
        A function from images (B, H, W, 3) uint8 to Cityscapes ids (B, H, W) uint8.

    Raises:
        ValueError: for any other pipeline, saying how to make masks.
    """
    if not any_model and not is_bundled(pipe):
        raise ValueError(
            f"the annotator knows the drawn streets of the bundled model, not the images of "
            f"{pipe.config.get('_name_or_path') or type(pipe).__name__}. Draw masks for those: "
            "daamlib.widgets.annotate(dataset, classes, 'masks') on the images of daamlib.datasets.generate, which "
            "daamlib.datasets.import_masks(dataset, 'masks/labels') reads, and notebook 06 as its parameter "
            "MASKS='masks/labels'. If this model draws the same streets, say so: labels_for(pipe, any_model=True)"
        )
    return functools.partial(annotate, load_annotator(device=pipe._execution_device))


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
def annotate(
    model: SegformerForSemanticSegmentation, images: np.ndarray | Sequence[Image.Image], *, batch: int = 32
) -> np.ndarray:
    """Find the class of every pixel.

    Args:
        model: the network, of `load_annotator`.
        images: an array (B, H, W, 3) uint8, or PIL images in RGB mode and of one size. The network knows scenes of 128
            px; other sizes work, the worse the farther.
        batch: how many images are seen at a time.

    Returns:
        The Cityscapes ids, (B, H, W) uint8.

    Raises:
        ValueError: for other images, and for a model in training mode, whose labels would depend on the batch.
    """
    images = _to_array(images)
    if model.training:
        raise ValueError("the annotator is in training mode: call model.eval() first")
    ids = np.array([BY_NAME[name].id for name in _names(model)], np.uint8)
    maps = np.empty(images.shape[:3], np.uint8)
    for start in range(0, len(images), batch):
        pixels = to_tensor(images[start : start + batch], images.shape[2]).to(model.device)
        logits = torch.stack([_logits(model, pixels, scale) for scale in SCALES]).sum(0)
        maps[start : start + batch] = ids[logits.argmax(1).cpu().numpy()]
    return maps


def _logits(model, pixels: torch.Tensor, scale: float) -> torch.Tensor:
    """Return (B, C, H, W) logits of (B, 3, H, W) pixels enlarged by `scale`."""
    size = [round(side * scale) for side in pixels.shape[-2:]]
    logits = model(F.interpolate(pixels, size, mode="bilinear", align_corners=False)).logits
    return F.interpolate(logits.float(), pixels.shape[-2:], mode="bilinear", align_corners=False)
