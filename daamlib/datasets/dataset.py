"""One dataset of images with label maps, as it lies in its folder."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..attention.record import AttentionRecord
from ..cityscapes import MIN_AREA
from ..classes import ClassList
from ..extras import needs
from . import folder as files

with needs("datasets"):
    import pandas as pd

IRREGULAR = {"person": "people"}  # plurals that no rule makes
Transform = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Dataset(torch.utils.data.Dataset):
    """Images of a folder, by their index in the manifest; each is read when asked for.

    PyTorch's data loaders take it as it is, if every image has a label map: `dataset[k]` is the k-th row's image,
    (3, H, W) float32 in [0, 1], and its label map, (H, W) int64.

        flipped = Dataset(dataset.folder, dataset.manifest, lambda image, labels: (image[:, ::-1], labels[:, ::-1]))
        loader = torch.utils.data.DataLoader(flipped, batch_size=8, shuffle=True)

    Attributes:
        folder: of the files.
        manifest: one row an image: index (also the row's name), file, prompt, seed, model, weights, scheduler, steps,
            guidance, and the versions of torch, diffusers, transformers and daamlib.
        transform: changes an image, (H, W, 3) uint8, and its label map, (H, W) uint8, before they become tensors.
    """

    folder: Path
    manifest: pd.DataFrame
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if "index" not in self.manifest or list(self.manifest["index"]) != list(self.manifest.index):
            raise ValueError("the manifest's index must be its column index: select rows, without reset_index")
        if not self.manifest.index.is_unique:
            raise ValueError("an image comes twice in the manifest: give a data loader a sampler instead")

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        i = int(self.manifest.index[files.whole_number("the row", row, -math.inf)])
        image, labels = np.array(self.image(i)), self.labels(i)
        if self.transform is not None:
            image, labels = self._transformed(self.transform, image, labels)
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        return pixels.contiguous() / 255, torch.from_numpy(np.ascontiguousarray(labels)).long()

    def _transformed(self, transform: Transform, *pair: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what the transform makes. Raises ValueError unless it is an image and its label map, of one size."""
        result: Any = transform(*pair)
        parts = [np.asarray(part) for part in result] if isinstance(result, Sequence) else []
        if [part.ndim for part in parts] == [3, 2] and parts[0].shape == (*parts[1].shape, 3):
            if parts[0].dtype == np.uint8 and np.issubdtype(parts[1].dtype, np.integer):
                return parts[0], parts[1]
        got = ", ".join(f"{part.shape} {part.dtype}" for part in parts) or type(result).__name__
        raise ValueError(f"transform must return (H, W, 3) uint8 pixels and (H, W) integer ids of them, got {got}")

    @property
    def classes(self) -> ClassList:
        """The classes of the label maps."""
        return files.classes_of(self.folder)

    @property
    def settings(self) -> dict[str, Any]:
        """Contents of dataset.json: how the images were made, and in `labels` the sources of the label maps."""
        return files.read_settings(self.folder)

    @property
    def indices(self) -> list[int]:
        """The images' indices, such as `dataset.indices[:3]`."""
        return [int(i) for i in self.manifest.index]

    @property
    def labelled(self) -> list[int]:
        """The images that have a label map."""
        return [i for i in self.indices if self.path("labels", i).is_file()]

    def path(self, part: str, i: int) -> Path:
        """Return the path of a file of image `i`; part: "images", "labels" or "records".

            dataset.path("labels", 0).is_file()

        Raises IndexError.
        """
        if not isinstance(i, int | np.integer) or i not in self.manifest.index:
            raise IndexError(f"no image {i!r}: this dataset has {len(self)}, see the index of its manifest")
        return self.folder / files.file_name(part, i)

    def image(self, i: int) -> Image.Image:
        """Return image `i`, RGB.

            dataset.image(0).save("first.png")

        Raises IndexError, or ValueError for a damaged file.
        """
        return Image.fromarray(files.read_image(self.path("images", i)))

    def labels(self, i: int) -> np.ndarray:
        """Return the (H, W) uint8 ids of image `i`.

            road = (dataset.labels(0) == dataset.classes.id("road")).mean()

        Raises IndexError, or ValueError without a whole label map.
        """
        path = self.path("labels", i)
        if not path.is_file():
            raise ValueError(f"image {i} of {self.folder} has no label map: {_HOW_TO_LABEL}")
        return files.read_labels(path, self.classes)

    def mask(self, i: int, name: str) -> np.ndarray:
        """Return the (H, W) bool mask of a class in image `i`.

            car = dataset.mask(0, "car")

        Raises ValueError for a name that is none of `classes`.
        """
        return self.labels(i) == self.classes.id(name)

    def require_labels(self) -> None:
        """Read all files once; raise ValueError for no image, one without a label map, or a damaged file.

            dataset.require_labels()

        Exports call it first.
        """
        if not self.indices:
            raise ValueError(f"there is no image: none of {self.folder} is selected")
        if without := files.missing(self.folder, ["labels"], self.indices):
            some = f"{len(without)} images of {self.folder}, such as {without[0]},"
            raise ValueError(f"{some} have no label map: {_HOW_TO_LABEL}")
        files.verify(self.folder, self.settings, self.indices)

    def with_class(self, name: str, min_area: float = MIN_AREA, *, in_prompt: bool = True) -> list[int]:
        """Return the indices of the images that show a class on `min_area`, a share of the image, or more.

            dataset.with_class("car", min_area=0.1)

        Images without a label map are left out and, with `in_prompt`, generated images whose prompt does not name the
        class (`names`). Raises ValueError if no image has a label map, for a bad share, or a name not in `classes`.
        """
        number, labelled = self.classes.id(name), self.labelled
        if not 0 < min_area <= 1:
            raise ValueError(f"min_area is a share of the image, above 0 and at most 1, got {min_area}")
        if not labelled:
            raise ValueError(f"{self.folder} has no label maps: {_HOW_TO_LABEL}")
        if in_prompt and self.settings["kind"] == "generated":
            labelled = [i for i in labelled if names(name, self.manifest.prompt[i])]
        return [i for i in labelled if (self.labels(i) == number).mean() >= min_area]

    def record(self, i: int, pipe: Any = None) -> AttentionRecord:
        """Return the attention record of image `i`, queries in float16; its maps are sums over the stored steps.

            with_records = datasets.generate(pipe, ["a car"], "few", steps=2, keep_steps=1)
            with_records.record(0, pipe).daam()["car"]

        `pipe`, the pipeline that made it, embeds further texts. Raises IndexError for an unknown index, and ValueError
        if the images were made without `keep_steps` or by another model than `pipe`, or the record is of another image.
        """
        path = self.path("records", i)
        if not path.is_file():
            raise ValueError(f"no record was stored of image {i} of {self.folder}: generate with keep_steps > 0")
        record = AttentionRecord.load(path, pipe=pipe)
        files.require_prompt(path, record.prompt, self.manifest.prompt[i])
        return record


_HOW_TO_LABEL = "generate again with a labeller, or use import_masks"


def load(folder: str | Path, *, verify: bool = True) -> Dataset:
    """Open a complete dataset of `generate` or `render`.

        dataset = load(dataset.folder)

    With `verify` all files are read once, so that a damaged one is noticed here (0.5 s for 1,000 images of 128 pixels).
    Raises FileNotFoundError where there is no dataset, or a file is missing, and ValueError where dataset.json, an
    image, a label map or a record is damaged, or the manifest was edited.
    """
    manifest, settings = files.read_manifest(Path(folder))
    if verify:
        files.verify(Path(folder), settings, range(len(manifest)))
    return Dataset(Path(folder), manifest)


def names(class_name: str, prompt: str) -> bool:
    """Return whether a prompt names a class in whole words, one or several, in any case and with any punctuation.

        names("traffic light", "Two traffic-lights!")

    The plural is by rule, but for those of `IRREGULAR`.
    """
    name = class_name.casefold()
    plural = re.sub(r"([^aeiou])y$", r"\1ie", name) + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")
    forms = "|".join(re.escape(form).replace(r"\ ", r"[\s-]+") for form in (name, plural, IRREGULAR.get(name, name)))
    return re.search(rf"\b(?:{forms})\b", prompt.casefold()) is not None
