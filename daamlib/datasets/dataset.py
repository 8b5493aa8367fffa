"""One dataset of images with label maps, as it lies in its folder."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..attention.record import AttentionRecord
from ..cityscapes import MIN_AREA, label_id
from ..extras import needs
from . import folder as files

with needs("datasets"):
    import pandas as pd

CLASSES = ("car", "person", "traffic light", "rider")  # the thesis' four
IRREGULAR = {"person": "people"}  # plurals that no rule makes


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images of a folder, by their index in the manifest; each is read when asked for.

    Attributes:
        folder: where the files are.
        manifest: one row an image: index (also the row's name), file, prompt, seed, model, weights, scheduler, steps,
            guidance, and the versions of torch, diffusers, transformers and daamlib. That of one shard has its images
            alone.
    """

    folder: Path
    manifest: pd.DataFrame

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def settings(self) -> dict[str, Any]:
        """What dataset.json says: how the images were made, and in `labels` where the label maps come from."""
        return files.read_settings(self.folder)

    @property
    def indices(self) -> list[int]:
        """The images' indices."""
        return [int(i) for i in self.manifest.index]

    @property
    def labelled(self) -> list[int]:
        """The images that have a label map."""
        return [i for i in self.indices if self.path("labels", i).is_file()]

    def path(self, part: str, i: int) -> Path:
        """Where the file of image `i` is or would be; part: "images", "labels" or "records". Raises IndexError."""
        if i not in self.manifest.index:
            raise IndexError(f"no image {i!r}: this dataset has {len(self)}, see the index of its manifest")
        return self.folder / files.file_name(part, i)

    def image(self, i: int) -> Image.Image:
        """Image `i`, RGB. Raises IndexError for an index that is not in the manifest."""
        return Image.fromarray(files.read_png(self.path("images", i)))

    def labels(self, i: int) -> np.ndarray:
        """(H, W) uint8 Cityscapes ids of image `i`. Raises IndexError, or ValueError where it has no label map."""
        path = self.path("labels", i)
        if not path.is_file():
            raise ValueError(f"image {i} of {self.folder} has no label map: {_HOW_TO_LABEL}")
        return files.read_png(path)

    def mask(self, i: int, name: str) -> np.ndarray:
        """(H, W) bool: where image `i` shows the class. Raises ValueError for a name that is no Cityscapes label."""
        return self.labels(i) == label_id(name)

    def require_labels(self) -> None:
        """ValueError if an image has no label map."""
        without = files.missing(self.folder, ["labels"], self.indices)
        if without:
            raise ValueError(
                f"{len(without)} images of {self.folder} have no label map, such as {without[0]}: {_HOW_TO_LABEL}"
            )

    def with_class(self, name: str, min_area: float = MIN_AREA, *, in_prompt: bool = True) -> list[int]:
        """The images that show a class; those without a label map are left out.

        Args:
            name: of the class.
            min_area: the share of the image, at most 1, that it covers at least.
            in_prompt: of generated images only those whose prompt names the class too, see `names`.

        Returns:
            The images' indices.

        Raises:
            ValueError: if no image has a label map, for a share that is none, or a name that is no Cityscapes label.
        """
        found, labelled = label_id(name), self.labelled
        if not 0 < min_area <= 1:
            raise ValueError(f"min_area is a share of the image, above 0 and at most 1, got {min_area}")
        if not labelled:
            raise ValueError(f"{self.folder} has no label maps: {_HOW_TO_LABEL}")
        if in_prompt and self.settings["kind"] == "generated":
            labelled = [i for i in labelled if names(name, self.manifest.prompt[i])]
        return [i for i in labelled if (self.labels(i) == found).mean() >= min_area]

    def record(self, i: int, pipe: Any = None) -> AttentionRecord:
        """The attention record of image `i`; its DAAM and LDAAM are sums over the steps that were kept.

        Args:
            i: index of the image.
            pipe: the pipeline that made it, to embed further texts.

        Returns:
            The record, its queries in float16.

        Raises:
            IndexError: for an index that is not in the manifest.
            ValueError: if the images were made without `keep_steps`, or by another model than `pipe`.
        """
        path = self.path("records", i)
        if not path.is_file():
            raise ValueError(f"no record was kept of image {i} of {self.folder}: generate with keep_steps > 0")
        return AttentionRecord.load(path, pipe=pipe)


_HOW_TO_LABEL = "generate again with a labeller, or use import_masks"


def load(folder: str | Path) -> Dataset:
    """A complete dataset of `generate` or `render`.

    Args:
        folder: where it is.

    Returns:
        All its images.

    Raises:
        FileNotFoundError: where there is no dataset, or a file is missing.
        ValueError: where dataset.json is damaged, or the manifest is not the one that follows from it.
    """
    return Dataset(Path(folder), files.read_manifest(Path(folder)))


def names(class_name: str, prompt: str) -> bool:
    """Whether a prompt names a class: in whole words, one or several of it, in any case and with any punctuation."""
    name = class_name.casefold()
    plural = re.sub(r"([^aeiou])y$", r"\1ie", name) + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")
    forms = "|".join(re.escape(form).replace(r"\ ", r"[\s-]+") for form in (name, plural, IRREGULAR.get(name, name)))
    return re.search(rf"\b(?:{forms})\b", prompt.casefold()) is not None
