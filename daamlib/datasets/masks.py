"""Masks that a person drew, as label maps: a folder of PNGs, or a COCO JSON file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..cityscapes import BY_ID, BY_NAME
from ..extras import needs

with needs("datasets"):
    from skimage.draw import polygon


def read_masks(source: Path, numbers: Mapping[str, int]) -> dict[int, np.ndarray]:
    """{image number: (H, W) uint8 Cityscapes ids} of a folder of PNGs or a COCO file, each in the source's own size.

    numbers: of the images by file name ("00003.png"). Raises FileNotFoundError for a missing source, ValueError for
    unknown images, categories and ids, and for what is no mask.
    """
    if source.is_dir():
        return _from_folder(source, numbers)
    if not source.is_file():
        raise FileNotFoundError(f"no masks at {source}: expected a folder of PNG files or a COCO JSON file")
    try:
        coco = json.loads(source.read_text(encoding="utf-8"))
        return _from_coco(coco, numbers)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is not a COCO file of masks: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def check_ids(ids: np.ndarray, what: str) -> None:
    """ValueError where an id is not in the table of Cityscapes."""
    strange = [i for i in np.unique(ids).tolist() if i not in BY_ID]
    if strange:
        raise ValueError(
            f"{what} has the values {strange[:5]}, which are no Cityscapes ids: expected those of "
            "daamlib.cityscapes, such as car 26 or 0 for unlabeled"
        )


def _number(name: str, numbers: Mapping[str, int]) -> int:
    if name not in numbers:
        raise ValueError(f"{name!r} is not an image of this dataset: its masks are named as {min(numbers)}")
    return numbers[name]


def _from_folder(folder: Path, numbers: Mapping[str, int]) -> dict[int, np.ndarray]:
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not paths:
        raise ValueError(f"there are no masks in {folder}")
    masks = {}
    for path in paths:
        number = _number(path.name, numbers)
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(
                    f"{path} is a PNG of mode {image.mode}: expected the Cityscapes id of each pixel, mode L or P"
                )
            masks[number] = np.array(image)
        check_ids(masks[number], str(path))
    return masks


def _from_coco(coco: dict[str, Any], numbers: Mapping[str, int]) -> dict[int, np.ndarray]:
    """Annotations are painted in the order of the file, later ones over earlier ones, on 0 (unlabeled).

    An image without any is left out: the file does not say whether anybody looked at it.
    """
    names = {category["id"]: category["name"] for category in coco["categories"]}
    unknown = sorted(name for name in names.values() if name not in BY_NAME or BY_NAME[name].id < 0)
    if unknown:
        raise ValueError(
            f"the categories {unknown} are no Cityscapes labels: rename them, say, to car or traffic light"
        )
    images = {image["id"]: image for image in coco["images"]}
    found = {key: _number(Path(image["file_name"]).name, numbers) for key, image in images.items()}
    masks: dict[int, np.ndarray] = {}
    for annotation in coco["annotations"]:
        key = annotation["image_id"]
        shape = images[key]["height"], images[key]["width"]
        where = _region(annotation["segmentation"], shape, f"annotation {annotation['id']}")
        mask = masks.setdefault(found[key], np.zeros(shape, np.uint8))
        mask[where] = BY_NAME[names[annotation["category_id"]]].id
    if not masks:
        raise ValueError("it has no annotations")
    return masks


def _region(segmentation: Any, shape: tuple[int, int], what: str) -> np.ndarray:
    """(H, W) bool of COCO's polygons [[x, y, x, y, ...], ...] or run lengths {"size": [H, W], "counts": ...}."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        counts = _decompress(counts) if isinstance(counts, str) else counts
        if tuple(segmentation["size"]) != shape or sum(counts) != shape[0] * shape[1] or min(counts) < 0:
            raise ValueError(
                f"the run lengths of {what} are of size {segmentation['size']} and cover {sum(counts)} pixels, the "
                f"image is {shape[0]} x {shape[1]}"
            )
        runs = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return runs.reshape(shape[::-1]).T  # column by column
    if not segmentation:
        raise ValueError(f"{what} has no mask: a box alone is none")
    region = np.zeros(shape, bool)
    for points in segmentation:
        if len(points) < 6 or len(points) % 2:
            raise ValueError(f"{what} has a polygon of {len(points)} numbers: expected x, y of three points or more")
        # COCO measures from the image's corner, skimage from the centre of the first pixel
        x, y = np.array(points, float).reshape(-1, 2).T - 0.5
        region[polygon(y, x, shape)] = True
    return region


def _decompress(text: str) -> Sequence[int]:
    """COCO's compressed run lengths: numbers in base 32, each from the third on as the step from the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        piece = character - 48
        value |= (piece & 31) << shift
        shift += 5
        if piece & 32:  # more of this number follows
            continue
        if piece & 16:  # it is negative
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts
