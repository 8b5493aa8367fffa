"""The label table of Cityscapes (Cordts et al., 2016), frozen: all 35 labels with their original values.

`id` is the value stored in a label image, `train_id` the value a network is trained on (255: ignored).

One deviation of the bundled street world, made in `daamlib_lab.urban.scenes`: there the label `rider` (25) covers
the whole silhouette, the person AND the bicycle, with the wheels as filled discs. Cityscapes itself gives the
bicycle its own label (33). A word such as "rider" names the whole in a caption, and so does our mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

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


LABELS = (
    Label("unlabeled", 0, 255, "void", False, True, (0, 0, 0)),
    Label("ego vehicle", 1, 255, "void", False, True, (0, 0, 0)),
    Label("rectification border", 2, 255, "void", False, True, (0, 0, 0)),
    Label("out of roi", 3, 255, "void", False, True, (0, 0, 0)),
    Label("static", 4, 255, "void", False, True, (0, 0, 0)),
    Label("dynamic", 5, 255, "void", False, True, (111, 74, 0)),
    Label("ground", 6, 255, "void", False, True, (81, 0, 81)),
    Label("road", 7, 0, "flat", False, False, (128, 64, 128)),
    Label("sidewalk", 8, 1, "flat", False, False, (244, 35, 232)),
    Label("parking", 9, 255, "flat", False, True, (250, 170, 160)),
    Label("rail track", 10, 255, "flat", False, True, (230, 150, 140)),
    Label("building", 11, 2, "construction", False, False, (70, 70, 70)),
    Label("wall", 12, 3, "construction", False, False, (102, 102, 156)),
    Label("fence", 13, 4, "construction", False, False, (190, 153, 153)),
    Label("guard rail", 14, 255, "construction", False, True, (180, 165, 180)),
    Label("bridge", 15, 255, "construction", False, True, (150, 100, 100)),
    Label("tunnel", 16, 255, "construction", False, True, (150, 120, 90)),
    Label("pole", 17, 5, "object", False, False, (153, 153, 153)),
    Label("polegroup", 18, 255, "object", False, True, (153, 153, 153)),
    Label("traffic light", 19, 6, "object", False, False, (250, 170, 30)),
    Label("traffic sign", 20, 7, "object", False, False, (220, 220, 0)),
    Label("vegetation", 21, 8, "nature", False, False, (107, 142, 35)),
    Label("terrain", 22, 9, "nature", False, False, (152, 251, 152)),
    Label("sky", 23, 10, "sky", False, False, (70, 130, 180)),
    Label("person", 24, 11, "human", True, False, (220, 20, 60)),
    Label("rider", 25, 12, "human", True, False, (255, 0, 0)),
    Label("car", 26, 13, "vehicle", True, False, (0, 0, 142)),
    Label("truck", 27, 14, "vehicle", True, False, (0, 0, 70)),
    Label("bus", 28, 15, "vehicle", True, False, (0, 60, 100)),
    Label("caravan", 29, 255, "vehicle", True, True, (0, 0, 90)),
    Label("trailer", 30, 255, "vehicle", True, True, (0, 0, 110)),
    Label("train", 31, 16, "vehicle", True, False, (0, 80, 100)),
    Label("motorcycle", 32, 17, "vehicle", True, False, (0, 0, 230)),
    Label("bicycle", 33, 18, "vehicle", True, False, (119, 11, 32)),
    Label("license plate", -1, -1, "vehicle", False, True, (0, 0, 142)),
)

BY_NAME = MappingProxyType({label.name: label for label in LABELS})
BY_ID = MappingProxyType({label.id: label for label in LABELS})

COLOURS = np.zeros((256, 3), np.uint8)  # RGB by the id as it stands in a uint8 label map
COLOURS[[label.id for label in LABELS]] = [label.color for label in LABELS]
COLOURS[IGNORED] = 200  # light grey; the licence plate, -1, would paint what is ignored as a car
COLOURS.setflags(write=False)

# by id + 1, so that -1 is row 0. The licence plate's train id, -1, has no place in uint8: it is ignored as well
_TRAIN_IDS = np.array([BY_ID[i].train_id % 256 for i in range(-1, 34)], np.uint8)


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
    """Return the masks of a class in the images that show it.

        numbers, masks = class_masks([dataset.labels(0)], "car")

    Args:
        label_maps: (H, W) integer Cityscapes ids each, all of one size.
        name: of the class.
        min_area: the share of an image that the class covers at least; less counts as not shown.

    Returns:
        The numbers of the n images that show it, and their (n, H, W) boolean masks.

    Raises:
        ValueError: for a name that is no label, or where no image shows the class.
    """
    masks = np.stack(label_maps) == label_id(name)
    shown = np.flatnonzero(masks.mean(axis=(1, 2)) >= min_area)
    if not len(shown):
        raise ValueError(f"none of {len(masks)} images shows a {name} on {min_area:.0%} of its area: more are needed")
    return shown.tolist(), masks[shown]


def to_train_ids(ids: ArrayLike) -> np.ndarray:
    """Map Cityscapes ids to train ids.

        to_train_ids(dataset.labels(0))

    Args:
        ids: integer array of any shape, with values in -1..33.

    Returns:
        A new uint8 array of the same shape: 0..18, and 255 where the label is ignored.

    Raises:
        TypeError: for an array that is not of integers.
        ValueError: for an id that is not in the table.
    """
    ids = np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"ids must be an integer array, got dtype {ids.dtype}")
    if ids.size and (ids.min() < -1 or ids.max() > 33):
        raise ValueError(f"ids must lie in -1..33 (the Cityscapes table), got {ids.min()}..{ids.max()}")
    return _TRAIN_IDS[ids.astype(np.int16) + 1]


def overlay(
    image: Image.Image, labels: np.ndarray, *, opacity: float = 0.55, colours: np.ndarray = COLOURS
) -> np.ndarray:
    """Paint a label map over its image.

        Image.fromarray(overlay(dataset.image(0), dataset.labels(0)))

    Args:
        image: of the size (W, H).
        labels: (H, W) uint8 ids.
        opacity: of the colours, in [0, 1].
        colours: (256, 3) uint8 RGB by id, such as a `ClassList.palette`; by default those of Cityscapes.

    Returns:
        (H, W, 3) uint8 pixels.

    Raises:
        ValueError: for a label map of another size.
    """
    if labels.shape != (image.height, image.width):
        raise ValueError(f"the label map has the shape {labels.shape}, the image {(image.height, image.width)}")
    return ((1 - opacity) * np.asarray(image) + opacity * colours[labels] + 0.5).astype(np.uint8)
