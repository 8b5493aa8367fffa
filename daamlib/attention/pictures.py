"""Pictures by Pillow alone: a heat map over its image, a label map in the colours of its classes.

    overlay(image, record.daam()["car"]).save("car.png")  # as record.overlay("car", image)
    label_picture(dataset.labels(0), dataset.image(0)).save("labels.png")

The explorer shows its maps by `overlay`, too.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import cityscapes
from ..classes import Classes, class_list
from .heatmaps import normalize, require_ratio, upsample

# Perceptually uniform, each of them; a rainbow shows edges where there are none. Seventeen colours of matplotlib's maps
# (van der Walt and Smith, 2015; Nunez et al., 2018), with straight lines between them
COLOUR_MAPS = {
    "magma": "0000030a07221c1046350f6a50127b691c808225819c2e7fb63679ce4070e55063f4685bfb8660fda470fec286fddfa1fbfcbf",
    "viridis": "44015447186a472c7b4240853a528b32628d2c728e26818e20908c1e9e8827ad803dbb745bc86281d34caadb32d4e11afde724",
    "inferno": "0000030a0723200c4a3c0965570f6d70196e892269a32b61bb3754d04544e35832f0701ef98c09fbaa0ef8c931f1e864fcfea4",
    "plasma": "0c07863104964c02a16500a77e03a79511a1a92395bb3586cb4777d8586ae56b5cef7e4ef79341fcaa33fdc328f8dd24eff821",
    "cividis": "00224d002d691a386f31436c434e6b52596c61646f6e70737c7b788a86789a9376aa9f72baac6ccbba64dcc858eed747fde737",
}


def rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return a copy of the (H, W, 3) uint8 pixels of a PIL image or array; TypeError or ValueError for another."""
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
    elif not isinstance(image, np.ndarray):
        raise TypeError(f"expected a PIL image or an (H, W, 3) uint8 array, got {type(image).__name__}")
    pixels = np.array(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"expected an (H, W, 3) uint8 image, got {pixels.shape} {pixels.dtype}")
    return pixels


def overlay(image: Any, heat: Any, *, opacity: float = 0.65, colour_map: str = "magma") -> Image.Image:
    """Return an image of a PIL image or (H, W, 3) uint8 array under an (h, w) heat map, scaled to its own range.

        overlay(image, record.daam()["car"]).save("car.png")
        overlay(image, record.ldaam("tree")["tree"], opacity=0.4, colour_map="viridis")

    `opacity` in [0, 1] is that of the colours, `colour_map` one of `COLOUR_MAPS`. Raises TypeError or ValueError for
    others, and for a map of another ratio of height and width than the image, or with NaN.
    """
    pixels, values = rgb(image), torch.as_tensor(heat).detach().float().cpu()
    if values.ndim != 2 or not values.isfinite().all():
        raise ValueError(f"expected an (h, w) map of finite numbers, such as maps['car'], got {tuple(values.shape)}")
    if colour_map not in COLOUR_MAPS or not 0 <= opacity <= 1:
        known = ", ".join(COLOUR_MAPS)
        raise ValueError(f"expected a colour map of {known}, opacity in [0, 1], got {colour_map!r}, {opacity}")
    require_ratio("the image", pixels.shape[:2], (values.shape[0], values.shape[1]))
    scaled = normalize(upsample(values[None], pixels.shape[:2]))[0].numpy()
    colours = np.frombuffer(bytes.fromhex(COLOUR_MAPS[colour_map]), np.uint8).reshape(-1, 3)
    places = np.linspace(0, 1, len(colours))
    painted = np.stack([np.interp(scaled, places, channel) for channel in colours.T], axis=-1)
    return Image.fromarray(np.rint((1 - opacity) * pixels + opacity * painted).astype(np.uint8))


def label_picture(
    labels: np.ndarray, image: Any = None, *, classes: Classes | None = None, opacity: float = 0.55
) -> Image.Image:
    """Return (h, w) uint8 labels in the colours of their classes; over an image, if one is given, in its size.

        labels = daamlib.label_map(record, [token])
        label_picture(labels).save("labels.png")

    The ids are Cityscapes' or those of `classes` (see `daamlib.classes.class_list`); 255, to be ignored, is light grey.
    Raises TypeError for an image of another kind; ValueError for other labels, an id of no class, an image of another
    ratio of height and width, and an opacity outside of [0, 1].
    """
    labels, table = np.asarray(labels), class_list(classes)
    if labels.ndim != 2 or labels.dtype != np.uint8 or not 0 <= opacity <= 1:
        got = f"{labels.shape} {labels.dtype}, {opacity}"
        raise ValueError(f"expected an (h, w) uint8 label map and an opacity in [0, 1], got {got}")
    table.check(labels, "the label map")
    if image is None:
        return Image.fromarray(table.palette[labels])
    pixels = rgb(image)
    require_ratio("the image", pixels.shape[:2], labels.shape)
    large = np.asarray(Image.fromarray(labels).resize(pixels.shape[1::-1], Image.Resampling.NEAREST))
    return Image.fromarray(cityscapes.overlay(Image.fromarray(pixels), large, opacity=opacity, colours=table.palette))
