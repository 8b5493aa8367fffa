"""Masks that a person drew, as label maps: a folder of PNGs, or a COCO JSON file."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image

from ..cityscapes import IGNORED
from ..classes import Classes, ClassList, class_list
from ..extras import needs
from . import folder as files
from .dataset import Dataset

PROGRESS = "annotation.json"  # of the annotator, in the folder above its labels
ORIENTATION = 0x0112  # in EXIF, 1: upright
SLACK = 1  # px by which a polygon may leave its image
SAME = 8  # levels by which a resized copy of an image may differ from it on average


def import_masks(dataset: Dataset, source: str | Path, *, classes: Classes | None = None) -> Dataset:
    """Take masks that a person drew as the label maps of their images; other images stay as they are.

        datasets.import_masks(dataset, "labels")

    All is read before anything is written. A mask of another size than its image, but of its shape, is resized by
    nearest neighbour. Where the image that was drawn on lies next to its mask, as the annotator puts it, it must be the
    image of the dataset.

    Args:
        dataset: the images.
        source: a folder of the annotator, or of PNGs named as the images, mode L or P with ids, 255 to be ignored; or a
            COCO JSON file with polygons or run lengths, categories named as the classes, images named as in the
            manifest. Later annotations cover earlier ones, an image's "ignored" run lengths cover all.
        classes: those of the masks (`daamlib.classes.class_list`); None: those that the annotator or `export.coco` has
            stored, else the dataset's. They become the dataset's if it has no label maps.

    Returns:
        The dataset.

    Raises:
        FileNotFoundError: without a source.
        ValueError: for an unknown image, category or id, for what is no mask, a mask of another shape or of another
            image, and classes that are not those of the dataset's label maps.
    """
    source, coco = _opened(Path(source))
    table = _classes_of(dataset, source, _noted(source, coco), classes)
    masks = _read(source, coco, {dataset.path("images", i).name: i for i in dataset.indices}, table)
    for i, ids in masks.items():
        image, name = dataset.image(i), dataset.path("images", i).name
        _require_same_image(source, name, image)
        masks[i] = _resized(ids, image.size, f"the mask of {name} in {source}")
    settings, noted = dataset.settings, f"{files.MASKS}{source.name}"
    files.add_label_source(dataset.folder, noted, table)
    for i, ids in masks.items():
        files.write_png(dataset.path("labels", i), ids, files.mark(settings, i))
    if len(masks) == settings["images"]:
        files.add_label_source(dataset.folder, noted, table, only=True)
    return dataset


def check_masks(source: str | Path, n: int, *, classes: Classes | None = None) -> None:
    """Raise what `import_masks` would for a dataset of `n` images, before hours go into generating them.

        check_masks("labels", len(dataset))

    `source` and `classes` are as there.
    """
    source, coco = _opened(Path(source))
    noted = _noted(source, coco)
    table = noted[0] if classes is None and noted is not None else class_list(classes)
    _read(source, coco, {Path(files.file_name("images", i)).name: i for i in range(n)}, table)


def _opened(source: Path) -> tuple[Path, Any]:
    """Return the folder of masks (in the annotator's folder: labels) and None, or the JSON file and its content."""
    if source.is_dir():
        return (source / "labels" if (source / PROGRESS).is_file() else source), None
    if not source.is_file():
        raise FileNotFoundError(f"no masks at {source}: expected a folder of PNG files or a COCO JSON file")
    try:
        return source, json.loads(source.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{source} is not a COCO file of masks: {error}") from error


def _noted(source: Path, coco: Any) -> tuple[ClassList, list[str] | None] | None:
    """Return the class list that the annotator or `export.coco` has stored, and the names in use (None: all)."""
    path = source.parent / PROGRESS if source.is_dir() else source
    try:
        if not source.is_dir():
            classes = (coco.get("info") or {}).get("classes") if isinstance(coco, dict) else None
            return None if classes is None else (class_list(classes), None)
        if not path.is_file():
            return None
        drawn = json.loads(path.read_text(encoding="utf-8-sig"))["classes"]
        return class_list(drawn), list(drawn)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _classes_of(
    dataset: Dataset, source: Path, noted: tuple[ClassList, list[str] | None] | None, classes: Classes | None
) -> ClassList:
    """Return the class list of the masks. Raises ValueError where the dataset's label maps have another one."""
    settings = dataset.settings
    if classes is not None:
        noted = class_list(classes), None
    if noted is None:
        return dataset.classes
    table, names = noted
    if not settings["labels"] and "classes" not in settings:
        return table
    if difference := table.difference(dataset.classes, names):
        raise ValueError(f"the masks of {source} are of other classes than {dataset.folder}: {difference}")
    return dataset.classes


def _resized(ids: np.ndarray, size: tuple[int, int], what: str) -> np.ndarray:
    """Return the mask at the size (W, H). Raises ValueError where that would stretch it by more than a pixel."""
    height, width = ids.shape
    if abs(width * size[1] - height * size[0]) > max(width, height, *size):
        raise ValueError(
            f"{what} is {width} x {height}, the image {size[0]} x {size[1]} (width x height): a mask of another shape "
            "lies elsewhere, crop it as the image was"
        )
    return np.array(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))


def _require_same_image(source: Path, name: str, image: Image.Image) -> None:
    """Raise ValueError where the image that a mask was drawn on is there and is another one."""
    split = source.stem.removeprefix("instances_")  # export.coco's
    path = (source.parent / "images" if source.is_dir() else source.parent.parent / split) / name
    if not path.is_file():
        return
    with files.opened(path, formats=()) as opened:
        if opened.getexif().get(ORIENTATION, 1) != 1:
            raise ValueError(f"{path} is shown turned (EXIF), so its mask may be turned: save the picture upright")
        drawn_on = opened.convert("RGB")
    levels = np.asarray(drawn_on.resize(image.size, Image.Resampling.BOX), float) - np.asarray(image, float)
    if levels.any() if drawn_on.size == image.size else np.abs(levels).mean() > SAME:
        of_dataset = f"{path} is not image {name} of this dataset"
        raise ValueError(f"the mask {name} of {source} was drawn on another image: {of_dataset}")


def _read(source: Path, coco: Any, numbers: Mapping[str, int], classes: ClassList) -> dict[int, np.ndarray]:
    """Return {image number: (H, W) uint8 ids}, each in the source's own size; numbers: of the images by file name."""
    if not numbers:
        raise ValueError(f"there is no image that the masks of {source} could be of")
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if not path.name.startswith("."))
        if not paths:
            raise ValueError(f"there are no masks in {source}")
        return {_number(path.name, numbers): files.read_labels(path, classes) for path in paths}
    try:
        return _from_coco(coco, numbers, classes)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is not a COCO file of masks: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _number(name: str, numbers: Mapping[str, int]) -> int:
    if name not in numbers:
        raise ValueError(f"{name!r} is not an image of this dataset: its masks are named as {min(numbers)}")
    return numbers[name]


def _from_coco(coco: dict[str, Any], numbers: Mapping[str, int], classes: ClassList) -> dict[int, np.ndarray]:
    """Paint annotations in the order of the file, later ones over earlier ones, on 0 (unlabeled).

    An image without any is left out: the file does not say whether anybody looked at it, unless `export.coco` wrote it.
    """
    _require_once("two categories have the number", (category["id"] for category in coco["categories"]))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    unknown = sorted(str(name) for name in names.values() if name not in classes.ids)
    if unknown:
        numbered = {name: number for number, name in names.items()}
        raise ValueError(f"{unknown} are no {classes.name} labels: rename them, or give classes={numbered}")
    _require_once("two images have the number", (image["id"] for image in coco["images"]))
    images = {image["id"]: image for image in coco["images"]}
    # of Windows' paths, too
    indices = {key: _number(PureWindowsPath(image["file_name"]).name, numbers) for key, image in images.items()}
    shapes = {key: _shape(image) for key, image in images.items()}
    _require_once("two entries are of image number", indices.values())
    masks: dict[int, np.ndarray] = {}
    if (coco.get("info") or {}).get("complete"):
        masks = {indices[key]: np.zeros(shapes[key], np.uint8) for key in images}
    for annotation in coco["annotations"]:
        key, category, what = annotation["image_id"], annotation["category_id"], f"annotation {annotation['id']}"
        if key not in images or category not in names:
            raise ValueError(f"{what} is of image {key!r} and category {category!r}, of which the file has no entry")
        where = _region(annotation.get("segmentation"), shapes[key], what)
        mask = masks.setdefault(indices[key], np.zeros(shapes[key], np.uint8))
        mask[where] = classes.id(names[category])
    for key, image in images.items():
        if "ignored" in image:
            where = _region(image["ignored"], shapes[key], f"what is ignored of image {key}")
            masks.setdefault(indices[key], np.zeros(shapes[key], np.uint8))[where] = IGNORED
    if not masks:
        raise ValueError("it has no annotations")
    return masks


def _require_once(what: str, numbers: Iterable[Any]) -> None:
    for number, count in Counter(numbers).items():
        if count > 1:
            raise ValueError(f"{what} {number}: each stands in the file once")


def _shape(image: Mapping[str, Any]) -> tuple[int, int]:
    """Return (H, W) of an entry of `images`."""
    height, width = (files.whole_number(f"the {side} of an image", image[side], 1) for side in ("height", "width"))
    if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{image['file_name']} has {height} x {width} pixels: no picture is so large")
    return height, width


def _region(segmentation: Any, shape: tuple[int, int], what: str) -> np.ndarray:
    """Return (H, W) bool of COCO's polygons [[x, y, x, y, ...], ...] or run lengths {"size": [H, W], "counts": ...}."""
    with needs("datasets"):  # here, as experiments and widgets do without
        from pycocotools import mask as coco_mask
    if isinstance(segmentation, dict):
        counts, size = segmentation["counts"], segmentation["size"]
        whole = tuple(size) == shape
        if whole and not isinstance(counts, str):
            whole = all(isinstance(each, int) and each >= 0 for each in counts) and sum(counts) == shape[0] * shape[1]
            segmentation = coco_mask.frPyObjects(segmentation, *shape) if whole else None
        region = coco_mask.decode(segmentation) if whole else None
        # pycocotools leaves the rest of the memory as it was where compressed run lengths are too few
        if region is None or (isinstance(counts, str) and coco_mask.encode(region)["counts"] != counts.encode()):
            raise ValueError(f"the run lengths of {what}, size {size}, do not fill the image, {shape[0]} x {shape[1]}")
        return region.astype(bool)
    if not segmentation:
        raise ValueError(f"{what} has no mask: a box alone is none")
    for points in segmentation:
        numbers = isinstance(points, list) and all(isinstance(x, int | float) and math.isfinite(x) for x in points)
        if not numbers or len(points) < 6 or len(points) % 2:
            raise ValueError(f"{what} has the polygon {str(points)[:60]}: expected x, y, x, y ... of 3 points or more")
        # pycocotools would cut it off at the border, or write beyond its memory
        if min(points) < -SLACK or max(points[::2]) > shape[1] + SLACK or max(points[1::2]) > shape[0] + SLACK:
            where = f"the image, {shape[0]} x {shape[1]} (height x width)"
            raise ValueError(f"{what} has a polygon beyond {where}: was it drawn on another size of it?")
    region = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *shape))).astype(bool)
    if not region.any():
        raise ValueError(f"{what} covers no pixel: polygons are in pixels, not in shares of the image")
    return region
