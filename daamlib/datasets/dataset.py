"""One dataset of images with label maps, as it lies in its folder."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..attention.record import AttentionRecord
from ..cityscapes import BY_NAME
from ..extras import needs
from . import folder as files

with needs("datasets"):
    import pandas as pd

CLASSES = ("car", "person", "traffic light", "rider")  # the thesis' four
# A class counts as found where it covers this share of the image. A thing that is there is larger: over 6,000 rendered
# scenes the 1st percentile of the visible area is 3.7 % for a car, 4.7 % for a person, 3.8 % for a traffic light
# (without its pole) and 6.8 % for a rider, and the smallest of all is 3.3 %. So a whole object passes although the
# annotator misses a third of it, and a few stray pixels do not.
MIN_AREA = 0.02


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images of a folder, by their index in the manifest; each is read when asked for.

    manifest: one row an image: index (also the row's name), file, prompt, seed, model, weights, scheduler, steps,
    guidance, and the versions of torch, diffusers, transformers and daamlib. That of one shard has its images alone.
    """

    folder: Path
    manifest: pd.DataFrame

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def settings(self) -> dict[str, Any]:
        """What dataset.json says: how the images were made, and in `labels` where the label maps come from."""
        return files.read_settings(self.folder)

    def image(self, i: int) -> Image.Image:
        """Image `i`, RGB. Raises IndexError for an index that is not in the manifest."""
        return Image.fromarray(files.read_png(self._path("images", i)))

    def labels(self, i: int) -> np.ndarray:
        """(H, W) uint8 Cityscapes ids of image `i`. Raises IndexError, or ValueError where it has no label map."""
        path = self._path("labels", i)
        if not path.is_file():
            raise ValueError(f"image {i} of {self.folder} has no label map: make it with add_labels or import_masks")
        return files.read_png(path)

    def mask(self, i: int, name: str) -> np.ndarray:
        """(H, W) bool: where image `i` shows the class. Raises ValueError for a name that is no Cityscapes label."""
        return self.labels(i) == label_id(name)

    @property
    def labelled(self) -> list[int]:
        """The images that have a label map."""
        return [int(i) for i in self.manifest.index if self._path("labels", i).is_file()]

    def with_class(self, name: str, min_area: float = MIN_AREA, *, in_prompt: bool = True) -> list[int]:
        """The images whose label map has the class on `min_area` of the image, a share of 1, or more.

        in_prompt: of generated images only those whose prompt has the class' name as well. Images without a label map
        are left out; ValueError if no image has one, for a share that is none, or a name that is no Cityscapes label.
        """
        found, labelled = label_id(name), self.labelled
        if not 0 < min_area <= 1:
            raise ValueError(f"min_area is a share of the image, above 0 and at most 1, got {min_area}")
        if not labelled:
            raise ValueError(f"{self.folder} has no label maps: make them with add_labels or import_masks")
        if in_prompt and self.settings["kind"] == "generated":
            labelled = [i for i in labelled if is_named(name, self.manifest.prompt[i])]
        return [i for i in labelled if (self.labels(i) == found).mean() >= min_area]

    def record(self, i: int, pipe: Any = None) -> AttentionRecord:
        """The attention record of image `i`, of the steps that were kept; `pipe` lets it embed further texts.

        Its DAAM and LDAAM are sums over those steps. Raises IndexError; ValueError if the images were made without
        `keep_steps`, or by another model than `pipe`.
        """
        path = self._path("records", i)
        if not path.is_file():
            raise ValueError(f"no record was kept of image {i} of {self.folder}: generate with keep_steps > 0")
        return AttentionRecord.load(path, pipe=pipe)

    def _path(self, part: str, i: int) -> Path:
        if i not in self.manifest.index:
            raise IndexError(f"no image {i!r}: this dataset has {len(self)}, see the index of its manifest")
        return self.folder / files.file_name(part, i)


def is_named(name: str, prompt: str) -> bool:
    """Whether a prompt has the class' name, as a word of its own."""
    return bool(re.search(rf"\b{re.escape(name)}\b", prompt))


def label_id(name: str) -> int:
    """The Cityscapes id of a class. Raises ValueError for a name that is none, or has none in uint8."""
    if name not in BY_NAME or BY_NAME[name].id < 0:
        raise ValueError(f"{name!r} is no Cityscapes label of a pixel: expected one such as {CLASSES}")
    return BY_NAME[name].id
