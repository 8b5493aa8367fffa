"""The label table of Cityscapes (Cordts et al., 2016), frozen: all 35 labels with their original values.

`id` is the value stored in a label image, `train_id` the value a network is trained on (255: ignored).

The bundled street world deviates in one label (`daamlib_lab.urban.scenes`): there `rider` (25) covers the person AND
the bicycle, with the wheels as filled discs. Cityscapes gives the bicycle its own label (33). A word such as "rider"
names the whole in a caption, and so does our mask.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

TABLES = Path(__file__).parent / "class_tables"
IGNORED = 255
# A class counts as shown where it covers this share of the image. A thing of the bundled street world is larger: over
# 6,000 scenes the 1st percentile of the visible area is 3.7 % for a car, 4.7 % for a person, 3.8 % for a traffic light
# (without its pole) and 6.8 % for a rider, and the smallest of all is 3.3 %. So a whole object passes although the
# annotator misses a third of it, and a few stray pixels do not.
MIN_AREA = 0.02


@dataclass(frozen=True)
class Label:
    """One row of the table; `color` is red, green, blue, each in 0..255."""

    name: str
    id: int
    train_id: int
    category: str
    has_instances: bool
    ignore_in_eval: bool
    color: tuple[int, int, int]


_ROWS = json.loads((TABLES / "cityscapes.json").read_text(encoding="utf-8"))
LABELS = tuple(Label(**{**row, "color": tuple(row["color"])}) for row in _ROWS)
BY_NAME = MappingProxyType({label.name: label for label in LABELS})
BY_ID = MappingProxyType({label.id: label for label in LABELS})

COLOURS = np.zeros((256, 3), np.uint8)  # RGB by the id as it stands in a uint8 label map
COLOURS[[label.id for label in LABELS]] = [label.color for label in LABELS]
COLOURS[IGNORED] = 200  # light grey; the licence plate, -1, would paint what is ignored as a car
COLOURS.setflags(write=False)

_TRAIN_IDS = np.full(256, IGNORED, np.uint8)  # by id modulo 256; the licence plate (-1) has no train id: ignored
_TRAIN_IDS[[label.id for label in LABELS if label.id >= 0]] = [label.train_id for label in LABELS if label.id >= 0]


def label_id(name: str) -> int:
    """Return the Cityscapes id of a class in a label map.

        label_id("car")

    Raises ValueError for a name that is no label, or has no id in uint8 (the licence plate).
    """
    if name not in BY_NAME or BY_NAME[name].id < 0:
        raise ValueError(f"{name!r} is no Cityscapes label of a pixel: expected one such as 'car' or 'traffic light'")
    return BY_NAME[name].id


def class_masks(
    label_maps: Sequence[np.ndarray], name: str, *, min_area: float = MIN_AREA
) -> tuple[list[int], np.ndarray]:
    """Return the numbers of the n images that show a class, and its (n, H, W) boolean masks there.

        numbers, masks = class_masks([dataset.labels(0)], "car")

    The label maps hold (H, W) integer ids, all of one size; a class is shown where it covers `min_area`, a share of the
    image, or more. Raises ValueError for a name that is no label, or where no image shows the class.
    """
    masks = np.stack(label_maps) == label_id(name)
    shown = np.flatnonzero(masks.mean(axis=(1, 2)) >= min_area)
    if not len(shown):
        raise ValueError(f"none of {len(masks)} images shows a {name} on {min_area:.0%} of its area: more are needed")
    return shown.tolist(), masks[shown]


def to_train_ids(ids: ArrayLike) -> np.ndarray:
    """Map Cityscapes ids to train ids: a new uint8 array of the same shape, 0..18, and 255 where ignored.

        to_train_ids(dataset.labels(0))

    Raises TypeError for an array that is not of integers, ValueError for an id outside of the table, -1..33.
    """
    ids = np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"ids must be an integer array, got dtype {ids.dtype}")
    if ids.size and (ids.min() < -1 or ids.max() > 33):
        raise ValueError(f"ids must lie in -1..33 (the Cityscapes table), got {ids.min()}..{ids.max()}")
    return _TRAIN_IDS[ids.astype(np.uint8)]


def overlay(
    image: Image.Image, labels: np.ndarray, *, opacity: float = 0.55, colours: np.ndarray = COLOURS
) -> np.ndarray:
    """Paint an (H, W) uint8 label map over its image: (H, W, 3) uint8 pixels.

        Image.fromarray(overlay(dataset.image(0), dataset.labels(0)))

    `opacity`, in [0, 1], is that of `colours`, (256, 3) uint8 RGB by id, such as a `ClassList.palette`; by default
    those of Cityscapes. Raises ValueError for a label map of another size.
    """
    if labels.shape != (image.height, image.width):
        raise ValueError(f"the label map has the shape {labels.shape}, the image {(image.height, image.width)}")
    return ((1 - opacity) * np.asarray(image) + opacity * colours[labels] + 0.5).astype(np.uint8)
