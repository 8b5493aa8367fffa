"""Class lists: the names, ids and colours of what a label map shows. Cityscapes' is the default of everything.

    class_list({"cat": 1, "dog": 2})                              # colours by PASCAL VOC's rule
    class_list({"cat": (1, "#ff8000"), "dog": (2, (0, 128, 255))})
    class_list(["cat", "dog"])                                    # numbered from 1
    VOC, COCO, ADE20K, CITYSCAPES                                 # ready tables

What takes `classes` or `ids` takes any of these. In every list 0 is none of its classes and 255 is to be ignored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import ImageColor

from .cityscapes import BY_NAME, IGNORED, LABELS

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
            raise ValueError(
                f"{what} has the values {strange[:5]}, which are no {self.name} ids: expected those of its list, such "
                f"as {some}"
            )

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
            names: those of Cityscapes have its ids, others are numbered from 1 in their order; or a list that is one
            already. None: Cityscapes.

    Returns:
        The list. Of names of Cityscapes it is all of Cityscapes.

    Raises:
        TypeError: for a string, and for names, ids or colours of other types.
        ValueError: for no class, ids that come twice or are not 0 ... 254, and mixed names, of
            Cityscapes and others.
    """
    if classes is None:
        return CITYSCAPES
    if isinstance(classes, ClassList):
        return classes
    if isinstance(classes, str):
        raise TypeError(f"classes are a list of names or {{name: id}}, got the string {classes!r}: write [{classes!r}]")
    if isinstance(classes, Mapping):
        return _custom(
            {name: entry if isinstance(entry, list | tuple) else (entry, None) for name, entry in classes.items()}
        )
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
    return CITYSCAPES if known else _custom({name: (number, None) for number, name in enumerate(names, start=1)})


def _custom(entries: Mapping[Any, Any]) -> ClassList:
    ids: dict[str, int] = {}
    colours: dict[str, RGB] = {}
    for name, entry in entries.items():
        if not isinstance(name, str) or not name.strip() or len(entry) != 2:
            raise TypeError(f"a class is a name and its id, or a name and (id, colour), got {name!r}: {entry!r}")
        number, colour = entry
        if not isinstance(number, int | np.integer) or isinstance(number, bool):
            raise TypeError(f"the id of {name!r} must be a whole number, got {number!r}")
        if not 0 <= number < IGNORED or number in ids.values():
            raise ValueError(
                f"ids are 0 ... 254, each of one class alone (255 is to be ignored), got {number} of {name!r}"
            )
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
    """Red, green, blue of a given colour; None: that of the id by PASCAL VOC's rule, which spreads its bits."""
    if colour is None:
        bits = [sum((number >> (3 * place + channel) & 1) << (7 - place) for place in range(3)) for channel in range(3)]
        return bits[0], bits[1], bits[2]
    values = ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else tuple(colour)
    if len(values) != 3 or not all(isinstance(value, int | np.integer) and 0 <= value <= 255 for value in values):
        raise ValueError(f"a colour is (red, green, blue), each 0 ... 255, or '#ff8000', got {colour!r}")
    return int(values[0]), int(values[1]), int(values[2])


def _table(
    name: str, names: str, colours: str | None = None, gaps: Iterable[int] = (), zero: str = "unlabeled"
) -> ClassList:
    """Of names between commas and colours of six hexadecimal digits; ids from 1 on without the gaps."""
    words = [" ".join(word.split()) for word in names.split(",")]
    numbers = [number for number in range(1, IGNORED) if number not in gaps][: len(words)]
    given = [None] * len(words) if colours is None else [f"#{colours[6 * k : 6 * k + 6]}" for k in range(len(words))]
    ids = {zero: 0, **dict(zip(words, numbers, strict=True))}
    paints = (_colour(colour, number) for colour, number in zip(given, numbers, strict=True))
    return ClassList(name, ids, {zero: (0, 0, 0), **dict(zip(words, paints, strict=True))})


_PIXEL_LABELS = [label for label in LABELS if label.id >= 0]
CITYSCAPES = ClassList(
    "Cityscapes",
    {label.name: label.id for label in _PIXEL_LABELS},
    {label.name: label.color for label in _PIXEL_LABELS},
)
# The 20 classes of PASCAL VOC (Everingham et al., 2010)
VOC = _table(
    "PASCAL VOC",
    "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person, "
    "pottedplant, sheep, sofa, train, tvmonitor",
    zero="background",
)
# The 80 things of COCO (Lin et al., 2014) with their category ids; colours of its panoptic task
COCO = _table(
    "COCO",
    """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush
    """,
    "dc143c770b2000008e0000e66a00e4003c640050640000460000c0faaa1e64aa1edcdc00af74affa001ea52a2aff4dff00e2fcb6b6ff"
    "00520078a69d6e4c00ae39ffc76400480076ffb3f0007d5cd10097bcd0b600dcb0ff63a45c00498581ff4eb4ff00e400aefff32d59ff"
    "8686679194aeffd0bac5e2ffab86016d3f36cf8aff97005f09503d5469334a4169a6c466d0c3d2ff6d41008f95b300c2d1636a057900"
    "e3ffcd93bad0994501035fa1a3ff007700aa00b6c700a578b782585f20008272876e8185a64a76db8eb94fd272b25a3e41460f7fa773"
    "3b696a8e6c2dc4ac005f3650804cffc93901f6007abfa2d0",
    gaps=(12, 26, 29, 30, 45, 66, 68, 69, 71, 83),
)
# The 150 classes of the scene parsing benchmark (Zhou et al., 2017), with the ids of its annotation files
ADE20K = _table(
    "ADE20K",
    """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field,
    armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest
    of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool
    table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill,
    bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus,
    towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track,
    apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer
    belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle,
    oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket,
    sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board,
    shower, radiator, glass, clock, flag
    """,
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04"
    "ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffff"
    "e0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe000"
    "99ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff00"
    "0052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
    "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ff"
    "ff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff"
    "ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff",
)
