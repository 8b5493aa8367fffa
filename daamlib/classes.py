"""Class lists: the names, ids and colours of what a label map shows. Cityscapes' is the default of everything.

    class_list({"cat": 1, "dog": 2})                              # colours by PASCAL VOC's rule
    class_list({"cat": (1, "#ff8000"), "dog": (2, (0, 128, 255))})
    class_list(["cat", "dog"])                                    # numbered from 1
    VOC, COCO, ADE20K, CITYSCAPES                                 # ready tables

What takes `classes` or `ids` takes any of these. In every list 0 is none of its classes and 255 is to be ignored.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import ImageColor

from .cityscapes import BY_NAME, IGNORED, LABELS, TABLES

RGB = tuple[int, int, int]
ZERO = ("unlabeled", "background", "void", "none", "other")  # what the id 0 may be called


@dataclass(frozen=True, eq=False)
class ClassList:
    """A table of classes, one of the benchmarks' or one of `class_list`.

    Attributes:
        name: of the table.
        ids: {class: id in a label map}, from 0 (none of them) to 254.
        colours: {class: (red, green, blue)}.
    """

    name: str
    ids: Mapping[str, int]
    colours: Mapping[str, RGB]

    @cached_property
    def names(self) -> dict[int, str]:
        """{id: class}."""
        return {number: name for name, number in self.ids.items()}

    @cached_property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8 RGB by id; black where there is no class, light grey for what is ignored."""
        table = np.zeros((256, 3), np.uint8)
        for name, number in self.ids.items():
            table[number] = self.colours[name]
        table[IGNORED] = 200
        table.setflags(write=False)
        return table

    def id(self, name: str) -> int:
        """Return the id of a class in a label map.

            CITYSCAPES.id("car")

        Raises ValueError for a name that is not in the list.
        """
        if name not in self.ids:
            some = ", ".join(list(self.ids)[:4]) if self.name != CITYSCAPES.name else "car, traffic light"
            raise ValueError(
                f"{name!r} is no {self.name} label of a pixel: expected one such as {some}. Other classes are given as "
                "{name: id}, see daamlib.classes"
            )
        return self.ids[name]

    def check(self, ids: np.ndarray, what: str) -> None:
        """Raise ValueError, naming `what`, where a uint8 label map has an id that is neither in the list nor 255.

            CITYSCAPES.check(dataset.labels(0), "the first label map")

        It names the first such ids.
        """
        present = np.flatnonzero(np.bincount(ids.ravel(), minlength=256)).tolist()
        strange = [number for number in present if number not in self.names and number != IGNORED]
        if strange:
            some = ", ".join(f"{name} {number}" for name, number in list(self.ids.items())[:3])
            some = some if self.name != CITYSCAPES.name else "car 26 or 0 for unlabeled"
            raise ValueError(f"{what} has the values {strange[:5]}, no {self.name} ids: expected such as {some}")

    def stored(self) -> dict[str, list[Any]] | None:
        """Return what a file says of the list, and `class_list` reads; None for Cityscapes, which no file names."""
        if self.ids == CITYSCAPES.ids:
            return None
        return {name: [number, list(self.colours[name])] for name, number in self.ids.items()}

    def difference(self, other: "ClassList", names: Iterable[str] | None = None) -> str:
        """Return what two lists disagree about, "" if label maps of this list are label maps of the other.

            class_list({"cat": 1}).difference(VOC)

        It is the first of the classes `names` of this list (None: of all) that has another id in the other one, or
        whose id another class has there.
        """
        for name in self.ids if names is None else names:
            number = self.id(name)
            if number and other.ids.get(name) != number:
                there = other.ids.get(name, "no id") if name in other.ids else other.names.get(number, "no class")
                return f"{name!r} is {number} here, {'it' if name in other.ids else number} is {there} there"
        return ""


Classes = ClassList | Mapping[str, Any] | Iterable[str]  # what `class_list` takes


def class_list(classes: Classes | None = None) -> ClassList:
    """Make a class list of names, ids and colours.

        pets = class_list({"cat": 1, "dog": (2, "#ff8000")})
        pets.palette[pets.id("dog")]

    Args:
        classes: {name: id} or {name: (id, colour)}, ids 1 ... 254, a colour as (red, green, blue) or as "#ff8000"; or
            names, numbered from 1 in their order, but names of Cityscapes give all of Cityscapes; or a `ClassList`.
            None: Cityscapes.

    Returns:
        The list.

    Raises:
        TypeError: for a string, and for names, ids or colours of other types.
        ValueError: for no class, ids that come twice or are not 0 ... 254, and names of Cityscapes mixed with others.
    """
    if classes is None:
        return CITYSCAPES
    if isinstance(classes, ClassList):
        return classes
    if isinstance(classes, str):
        raise TypeError(f"classes are a list of names or {{name: id}}, got the string {classes!r}: write [{classes!r}]")
    if isinstance(classes, Mapping):
        return _custom(classes)
    names = list(dict.fromkeys(classes))
    known = [name for name in names if name in BY_NAME]
    if known and len(known) < len(names):
        other = next(name for name in names if name not in BY_NAME)
        numbered = {name: number for number, name in enumerate(names, start=1)}
        raise ValueError(
            f"{other!r} is no Cityscapes label of a pixel, but {known[0]!r} is: use its names (daamlib.cityscapes), or "
            f"give ids, such as {numbered}"
        )
    for name in known:
        CITYSCAPES.id(name)  # the licence plate has none
    return CITYSCAPES if known else _custom({name: number for number, name in enumerate(names, start=1)})


def _custom(entries: Mapping[Any, Any]) -> ClassList:
    ids: dict[str, int] = {}
    colours: dict[str, RGB] = {}
    for name, given in entries.items():
        entry = given if isinstance(given, list | tuple) else (given, None)
        if not isinstance(name, str) or not name.strip() or len(entry) != 2:
            raise TypeError(f"a class is a name and its id, or a name and (id, colour), got {name!r}: {entry!r}")
        number, colour = entry
        if not isinstance(number, int | np.integer) or isinstance(number, bool):
            raise TypeError(f"the id of {name!r} must be a whole number, got {number!r}")
        if not 0 <= number < IGNORED or number in ids.values():
            raise ValueError(f"ids are 0 ... 254, each of one class (255 is to be ignored), got {number} of {name!r}")
        ids[name] = int(number)
        colours[name] = _colour(colour, int(number))
    zero = next((name for name, number in ids.items() if not number), ZERO[0])
    if zero not in ZERO and len(ids) > 1:
        raise ValueError(f"0 is none of the classes, not {zero!r}: number from 1, or name it {' or '.join(ZERO)}")
    if not any(ids.values()):
        raise ValueError("there is no class: give one or more, such as {'cat': 1, 'dog': 2}")
    if 0 not in ids.values():
        if "unlabeled" in ids:
            raise ValueError(f"'unlabeled' is what is none of the classes, its id is 0, got {ids['unlabeled']}")
        ids, colours = {"unlabeled": 0} | ids, {"unlabeled": (0, 0, 0)} | colours
    return ClassList("custom", ids, colours)


def _colour(colour: Any, number: int) -> RGB:
    """Return red, green, blue of a given colour; None: that of the id by PASCAL VOC's rule, which spreads its bits."""
    if colour is None:
        bits = [sum((number >> (3 * place + channel) & 1) << (7 - place) for place in range(3)) for channel in range(3)]
        return bits[0], bits[1], bits[2]
    values = ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else tuple(colour)
    if len(values) != 3 or not all(isinstance(value, int | np.integer) and 0 <= value <= 255 for value in values):
        raise ValueError(f"a colour is (red, green, blue), each 0 ... 255, or '#ff8000', got {colour!r}")
    return int(values[0]), int(values[1]), int(values[2])


def _table(name: str, file: str) -> ClassList:
    return replace(class_list(json.loads((TABLES / f"{file}.json").read_text(encoding="utf-8"))), name=name)


_PIXEL_LABELS = [label for label in LABELS if label.id >= 0]
CITYSCAPES = ClassList(
    "Cityscapes",
    {label.name: label.id for label in _PIXEL_LABELS},
    {label.name: label.color for label in _PIXEL_LABELS},
)
VOC = _table("PASCAL VOC", "voc")  # the 20 classes of PASCAL VOC (Everingham et al., 2010)
COCO = _table("COCO", "coco")  # the 80 things (Lin et al., 2014), their category ids and panoptic colours
ADE20K = _table("ADE20K", "ade20k")  # the 150 classes of scene parsing (Zhou et al., 2017), ids of its annotation files
