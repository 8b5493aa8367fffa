"""Drawing masks of many images into a folder, without any view: what the annotator does with its messages.

    images/00000.png  labels/00000.png  annotation.json

The files are a dataset's (`daamlib.datasets`), each written whole after each action, the image before its labels. So
when the kernel dies, at most the last action is lost.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..attention.pictures import rgb
from ..cityscapes import IGNORED
from ..classes import CITYSCAPES, Classes, ClassList, class_list
from ..datasets import folder as files
from ..datasets.dataset import Dataset
from ..datasets.masks import PROGRESS
from .editor import LabelEditor

FORMAT = "daamlib-annotation-1"
TOOLS = ("brush", "polygon", "fill", "grow")


class AnnotationSession:
    """The images, the folder, and the editor of the open image; `apply` does what a view asks for.

        session = AnnotationSession(images, ["car", "person"], "masks")
        session.apply({"type": "brush", "points": [[10, 10], [30, 20]], "radius": 3, "value": 26})

    Arguments and errors are those of `annotate`. An image's position is its number in the file names, unless it is of a
    `Dataset`. A proposal is saved by the first action, or "save"; its 255, to be ignored, becomes unlabeled.

    `class_list` has the classes of the label maps, `names` those to choose from, that of 0 first; `position` is that of
    the open image, from 0.
    """

    def __init__(
        self,
        images: Sequence | Dataset,
        classes: Classes,
        folder: str | Path,
        proposals: Sequence[np.ndarray] | None = None,
    ) -> None:
        self._images = images
        self.numbers = images.indices if isinstance(images, Dataset) else list(range(len(images)))
        if not self.numbers:
            raise ValueError("there are no images to annotate")
        if proposals is not None and len(proposals) != len(self.numbers):
            raise ValueError(f"{len(proposals)} proposals for {len(self.numbers)} images: give one for each")
        self._proposals = proposals
        self.folder = Path(folder)
        own = images.classes if isinstance(images, Dataset) else CITYSCAPES
        self.class_list, self.names, position = self._start(classes, own)
        self._open(position)

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8: the open image."""
        return self.editor.image

    @property
    def labels(self) -> np.ndarray:
        """(H, W) uint8 ids of the open image, a copy."""
        return self.editor.labels

    @property
    def done(self) -> int:
        """Number of images with a label map on disk."""
        return len(self.numbers) - len(files.missing(self.folder, ["labels"], self.numbers))

    @property
    def saved(self) -> str:
        """Place of the open image's label map, "" if it has none."""
        return f"saved as {files.file_name('labels', self.number)}" if self._path(self.number).is_file() else ""

    @property
    def number(self) -> int:
        """Number of the open image in its file's name."""
        return self.numbers[self.position]

    def apply(self, action: Mapping[str, Any]) -> None:
        """Carry out one action and save.

        The action is {"type": "brush" | "grow", "points": [[x, y], ...], "radius": r, "value": id}, "polygon" and
        "fill" without a radius; {"type": "undo"}; {"type": "save"}, which also marks an image without anything on it as
        done; or {"type": "go", "position": k}. Raises TypeError or ValueError for a bad action, OSError where it cannot
        be saved: it is done but not on disk, and the next action saves both.
        """
        match action.get("type") if isinstance(action, Mapping) else None:
            case "go":
                return self._go(action.get("position"))
            case "undo":
                self.editor.undo()
            case "save":
                self._marked = True
            case kind if kind in TOOLS:
                self._draw(kind, action)
            case _:
                raise ValueError(f"unknown action {action!r}: expected one of {', '.join(TOOLS)}, undo, save or go")
        self._save()

    def _draw(self, kind: str, action: Mapping[str, Any]) -> None:
        value, points = action.get("value"), action.get("points")
        ids = [self.class_list.id(name) for name in self.names]
        if value not in ids:
            raise ValueError(f"no class has the id {value!r}: expected one of {ids}")
        radius = () if kind in ("polygon", "fill") else (action.get("radius"),)
        if radius and not isinstance(radius[0], int | float):
            raise TypeError(f"the radius must be a number, got {radius[0]!r}")
        getattr(self.editor, kind)(points, *radius, value)

    def _go(self, position: Any) -> None:
        if not isinstance(position, int) or position not in range(len(self.numbers)):
            raise ValueError(f"no image at position {position!r}: there are {len(self.numbers)}")
        if self._unsaved:  # after an OSError: leaving would lose it
            self._save()
        self._open(position)

    def _start(self, classes: Classes, own: ClassList) -> tuple[ClassList, tuple[str, ...], int]:
        """Return the class list, the names to choose from, and the position that the folder was left at."""
        if (self.folder / files.SETTINGS).is_file():
            raise ValueError(f"{self.folder} is a dataset: draw into another folder, then datasets.import_masks")
        if not (self.folder / PROGRESS).is_file():
            if any(any((self.folder / part).glob("[!.]*")) for part in ("images", "labels")):
                raise ValueError(f"{self.folder} holds files but no {PROGRESS}: name another folder")
            return *_classes(classes, own), 0
        files.clean(self.folder, self.numbers)
        try:
            progress = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
            version, number, drawn = progress["format"], progress["image"], progress.get("classes", ["unlabeled"])
            before = class_list(drawn)
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{self.folder / PROGRESS} is damaged: {error!r}. Remove it") from error
        if version != FORMAT:
            raise ValueError(f"{self.folder / PROGRESS} has the format {version!r}, this version reads {FORMAT!r}")
        table, names = _classes(classes, own if before.stored() is None else before)
        difference = table.difference(before, names) if before.stored() is None else before.difference(table)
        if difference and any((self.folder / "labels").glob("[0-9]*.png")):
            raise ValueError(
                f"{self.folder} was drawn with other classes, {list(drawn)} ({difference}): give those, and new ones "
                "with ids of their own, or name another folder"
            )
        return table, names, self.numbers.index(number) if number in self.numbers else 0

    def _open(self, position: int) -> None:
        number = self.numbers[position]
        image = rgb(self._images.image(number) if isinstance(self._images, Dataset) else self._images[number])
        stored = self.folder / files.file_name("images", number)
        if stored.is_file() and not np.array_equal(files.read_png(stored), image):
            raise ValueError(f"{stored} is another image than number {number} here: name another folder")
        path, labels = self._path(number), None
        if path.is_file():
            labels = self._checked(files.read_png(path), image, str(path))
        elif self._proposals is not None:
            labels = np.array(self._proposals[position])
            labels[labels == IGNORED] = 0
            labels = self._checked(labels, image, f"proposal {position}")
        self.editor = LabelEditor(image, labels)
        self.position = position
        self._marked = path.is_file()  # whether the label map stays when all is undone
        self._unsaved = False
        classes = self.class_list.stored() or list(self.names)
        progress = {"format": FORMAT, "image": number, "classes": classes}
        files.write_json(self.folder / PROGRESS, progress)

    def _save(self) -> None:
        """Write the label map, the image before it; remove it where no step is left and nobody saved it as done."""
        self._unsaved = True
        path = self._path(self.number)
        if self._marked or self.editor.can_undo:
            image = self.folder / files.file_name("images", self.number)
            if not image.is_file():
                files.write_png(image, self.image)
            files.write_png(path, self.labels)
        else:
            path.unlink(missing_ok=True)
        self._unsaved = False

    def _path(self, number: int) -> Path:
        return self.folder / files.file_name("labels", number)

    def _checked(self, labels: np.ndarray, image: np.ndarray, what: str) -> np.ndarray:
        """Return the label map. Raises ValueError unless it fits the image and the classes."""
        if labels.shape != image.shape[:2] or labels.dtype != np.uint8:
            raise ValueError(f"{what} is {labels.shape} {labels.dtype}, its image {image.shape[:2]}")
        self.class_list.check(labels, what)
        return labels


def _classes(classes: Classes, own: ClassList) -> tuple[ClassList, tuple[str, ...]]:
    """Return the class list, and the names to choose from, that of 0 first.

    own: the dataset's, whose names may be given alone. Raises TypeError or ValueError for what is no class list.
    """
    if isinstance(classes, str | Mapping | ClassList):
        table = class_list(classes)
        given = tuple(classes.ids if isinstance(classes, ClassList) else classes)
    else:
        given = tuple(classes)
        table = own if given and set(given) <= set(own.ids) else class_list(given)
    names = tuple(dict.fromkeys([table.names[0], *given]))
    if len(names) == 1:
        raise ValueError("give one class or more to draw, such as ['car', 'person'] or {'cat': 1, 'dog': 2}")
    return table, names
