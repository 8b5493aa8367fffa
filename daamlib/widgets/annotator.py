"""The annotator: draw masks with brush, polygon, fill and scribbles that grow; every stroke is on disk at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from ..classes import Classes
from ..datasets.dataset import Dataset
from .pictures import png
from .session import AnnotationSession

HERE = Path(__file__).parent


class Annotator(anywidget.AnyWidget):
    """View of an `AnnotationSession`, which holds all that is drawn; `annotate` makes one.

    The browser sends each stroke as a message and shows the label map that comes back.
    """

    _esm = HERE / "annotator.js"
    _css = HERE / "annotator.css"

    # what the browser shows; it writes none of it
    classes: Any = traitlets.List().tag(sync=True)  # {"id", "name", "color": [r, g, b]}
    palette = traitlets.Dict().tag(sync=True)  # id -> [r, g, b] of every label that may be on the map
    height = traitlets.Int().tag(sync=True)
    width = traitlets.Int().tag(sync=True)
    picture = traitlets.Bytes().tag(sync=True)  # PNG of the open image
    labels = traitlets.Bytes().tag(sync=True)  # height * width ids, row by row
    position = traitlets.Int(-1).tag(sync=True)  # of the open image; -1 before the first
    count = traitlets.Int().tag(sync=True)
    done = traitlets.Int().tag(sync=True)
    can_undo = traitlets.Bool().tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    failed = traitlets.Bool().tag(sync=True)  # whether `status` says what went wrong
    revision = traitlets.Int().tag(sync=True)  # one more after each message, also where nothing else changed

    def __init__(self, session: AnnotationSession) -> None:
        self.session = session
        ids, colours = session.class_list.ids, session.class_list.colours
        super().__init__(
            classes=[{"id": ids[name], "name": name, "color": list(colours[name])} for name in session.names],
            palette={str(number): list(colours[name]) for name, number in ids.items()},
            count=len(session.numbers),
        )
        self._show("")
        self.on_msg(lambda _widget, action, _buffers: self.act(action))

    @property
    def folder(self) -> Path:
        """Folder of the masks; `folder / "labels"` is what `datasets.import_masks` reads."""
        return self.session.folder

    @property
    def label_map(self) -> np.ndarray:
        """(H, W) uint8 ids of the image that is shown, a copy."""
        return self.session.labels

    def act(self, action: Mapping[str, Any]) -> None:
        """Do what the browser asks for (see `AnnotationSession.apply`); an error is shown, never raised."""
        message = ""
        try:
            self.session.apply(action)
        except (ValueError, TypeError, LookupError, OSError, RuntimeError) as error:
            message = str(error) or type(error).__name__
        self._show(message)

    def _show(self, message: str) -> None:
        """Send all that changed in one message."""
        session = self.session
        with self.hold_sync():
            if self.position != session.position:
                self.height, self.width = session.image.shape[:2]
                self.picture = png(session.image)
                self.position = session.position
            self.labels = session.labels.tobytes()
            self.done = session.done
            self.can_undo = session.editor.can_undo > 0
            self.failed = bool(message)
            self.status = message or session.saved
            self.revision += 1


def annotate(
    images: Sequence | Dataset, classes: Classes, folder: str | Path, *, proposals: Sequence[np.ndarray] | None = None
) -> Annotator:
    """Draw masks of some images by hand: the last line of a notebook's cell.

        annotator = annotate(images, ["car", "person"], "masks")
        car = annotator.label_map == 26  # drawn on the open image

    `datasets.import_masks(dataset, folder / "labels")` makes them the labels of the dataset whose images they are.

    Args:
        images: PIL images or (H, W, 3) uint8 arrays, or a `Dataset`.
        classes: names of `daamlib.cityscapes`, such as ["car", "traffic light"]; any others, such as ["cat", "dog"],
            numbered from 1; {name: id} or {name: (id, colour)}; or a table of `daamlib.classes`.
        folder: gets images/00000.png and labels/00000.png (ids) after every stroke; what it has of them is continued.
        proposals: label maps to correct, (H, W) uint8 ids, one for each image, such as `daamlib.label_map`'s. One
            counts as drawn once something is drawn on it, or it is saved.

    Returns:
        The widget.

    Raises:
        TypeError: for images or classes of another type.
        ValueError: for unknown classes, no images, proposals that do not fit them, and a folder of something else.
    """
    return Annotator(AnnotationSession(images, classes, folder, proposals))
