"""The label table of Cityscapes (Cordts et al., 2016), frozen: all 35 labels with their original values.

`id` is the value stored in a label image, `train_id` the value a network is trained on (255: ignored).

One deviation of the bundled street world, made in `daamlib.urban.scenes`: there the label `rider` (25) covers
the whole silhouette, the person AND the bicycle, with the wheels as filled discs. Cityscapes itself gives the
bicycle its own label (33). A word such as "rider" names the whole in a caption, and so does our mask."""

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image

IGNORED = 255


@dataclass(frozen=True)
class Label:
    """One row of the table; `color` is (red, green, blue) in 0..255."""

    name: str
    id: int
    train_id: int
    category: str
    has_instances: bool
    ignore_in_eval: bool
    color: tuple[int, int, int]


_ = False  # keeps the columns of the table narrow
LABELS = (
    Label("unlabeled", 0, 255, "void", _, True, (0, 0, 0)),
    Label("ego vehicle", 1, 255, "void", _, True, (0, 0, 0)),
    Label("rectification border", 2, 255, "void", _, True, (0, 0, 0)),
    Label("out of roi", 3, 255, "void", _, True, (0, 0, 0)),
    Label("static", 4, 255, "void", _, True, (0, 0, 0)),
    Label("dynamic", 5, 255, "void", _, True, (111, 74, 0)),
    Label("ground", 6, 255, "void", _, True, (81, 0, 81)),
    Label("road", 7, 0, "flat", _, _, (128, 64, 128)),
    Label("sidewalk", 8, 1, "flat", _, _, (244, 35, 232)),
    Label("parking", 9, 255, "flat", _, True, (250, 170, 160)),
    Label("rail track", 10, 255, "flat", _, True, (230, 150, 140)),
    Label("building", 11, 2, "construction", _, _, (70, 70, 70)),
    Label("wall", 12, 3, "construction", _, _, (102, 102, 156)),
    Label("fence", 13, 4, "construction", _, _, (190, 153, 153)),
    Label("guard rail", 14, 255, "construction", _, True, (180, 165, 180)),
    Label("bridge", 15, 255, "construction", _, True, (150, 100, 100)),
    Label("tunnel", 16, 255, "construction", _, True, (150, 120, 90)),
    Label("pole", 17, 5, "object", _, _, (153, 153, 153)),
    Label("polegroup", 18, 255, "object", _, True, (153, 153, 153)),
    Label("traffic light", 19, 6, "object", _, _, (250, 170, 30)),
    Label("traffic sign", 20, 7, "object", _, _, (220, 220, 0)),
    Label("vegetation", 21, 8, "nature", _, _, (107, 142, 35)),
    Label("terrain", 22, 9, "nature", _, _, (152, 251, 152)),
    Label("sky", 23, 10, "sky", _, _, (70, 130, 180)),
    Label("person", 24, 11, "human", True, _, (220, 20, 60)),
    Label("rider", 25, 12, "human", True, _, (255, 0, 0)),
    Label("car", 26, 13, "vehicle", True, _, (0, 0, 142)),
    Label("truck", 27, 14, "vehicle", True, _, (0, 0, 70)),
    Label("bus", 28, 15, "vehicle", True, _, (0, 60, 100)),
    Label("caravan", 29, 255, "vehicle", True, True, (0, 0, 90)),
    Label("trailer", 30, 255, "vehicle", True, True, (0, 0, 110)),
    Label("train", 31, 16, "vehicle", True, _, (0, 80, 100)),
    Label("motorcycle", 32, 17, "vehicle", True, _, (0, 0, 230)),
    Label("bicycle", 33, 18, "vehicle", True, _, (119, 11, 32)),
    Label("license plate", -1, -1, "vehicle", _, True, (0, 0, 142)),
)
del _

BY_NAME = MappingProxyType({label.name: label for label in LABELS})
BY_ID = MappingProxyType({label.id: label for label in LABELS})
COLOURS = np.zeros((256, 3), np.uint8)  # RGB by the id as it stands in a uint8 label map
for _label in LABELS:
    COLOURS[_label.id % 256] = _label.color
COLOURS[IGNORED] = 200  # light grey; the licence plate, -1, would paint what is ignored as a car
COLOURS.setflags(write=False)
del _label

# Row id + 1 (so that -1 is row 0). The licence plate's train_id -1 has no place in uint8: it is ignored as
# well.
_TO_TRAIN = np.array([BY_ID[i].train_id if BY_ID[i].train_id >= 0 else IGNORED for i in range(-1, 34)], np.uint8)
_TO_TRAIN.setflags(write=False)


def to_train_ids(ids):
    """Map Cityscapes ids to train ids.

    ids: integer array of any shape with values in -1..33. Returns a new uint8 array of the same shape, 0..18,
    and 255 where the label is ignored. Raises TypeError for a non-integer array, ValueError for an id not in
    the table."""
    ids = np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"ids must be an integer array, got dtype {ids.dtype}")
    if ids.size and (ids.min() < -1 or ids.max() > 33):
        raise ValueError(f"ids must lie in -1..33 (the Cityscapes table), got {ids.min()}..{ids.max()}")
    return _TO_TRAIN[ids.astype(np.int16) + 1]


def overlay(image: Image.Image, labels: np.ndarray, *, opacity: float = 0.55) -> np.ndarray:
    """(H, W, 3) uint8: the image under the colours of its (H, W) label map."""
    return ((1 - opacity) * np.asarray(image) + opacity * COLOURS[labels] + 0.5).astype(np.uint8)
