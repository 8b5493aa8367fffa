"""Masks that a person drew, as label maps: a folder of PNGs, or a COCO JSON file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..cityscapes import BY_ID, BY_NAME, label_id
from ..extras import needs
from . import folder as files
from .dataset import Dataset


def import_masks(dataset: Dataset, source: str | Path) -> Dataset:
    """Take masks that a person drew as the label maps of their images; other images keep what they have.

    All is read before anything is written. A mask of another size than its image is resized by nearest neighbour.

    Args:
        dataset: the images.
        source: a folder of PNGs named as the images, mode L or P with Cityscapes ids; or a COCO JSON file with polygons
            or run lengths, categories named as in `daamlib.cityscapes`, images named as in the manifest. Later
            annotations cover earlier ones.

    Returns:
        The dataset.

    Raises:
        FileNotFoundError: without a source.
        ValueError: for an image, category or id that is unknown, and for what is no mask.
    """
    source = Path(source)
    masks = _read(source, {dataset.path("images", i).name: i for i in dataset.indices})
    for i, ids in masks.items():
        masks[i] = np.array(Image.fromarray(ids).resize(dataset.image(i).size, Image.Resampling.NEAREST))
    files.add_label_source(dataset.folder, f"masks of {source.name}")
    for i, ids in masks.items():
        files.write_png(dataset.path("labels", i), ids)
    if len(masks) == dataset.settings["images"]:
        files.add_label_source(dataset.folder, f"masks of {source.name}", only=True)
    return dataset


def check_masks(source: str | Path, n: int) -> None:
    """Raise what `import_masks` would for a dataset of `n` images, before hours go into generating them."""
    _read(Path(source), {Path(files.file_name("images", i)).name: i for i in range(n)})


def check_ids(ids: np.ndarray, what: str) -> None:
    """ValueError where an id is not in the table of Cityscapes."""
    strange = [i for i in np.unique(ids).tolist() if i not in BY_ID]
    if strange:
        raise ValueError(
            f"{what} has the values {strange[:5]}, which are no Cityscapes ids: expected those of "
            "daamlib.cityscapes, such as car 26 or 0 for unlabeled"
        )


def _read(source: Path, numbers: Mapping[str, int]) -> dict[int, np.ndarray]:
    """{image number: (H, W) uint8 ids}, each in the source's own size; numbers: of the images by file name."""
    if source.is_dir():
        return _from_folder(source, numbers)
    if not source.is_file():
        raise FileNotFoundError(f"no masks at {source}: expected a folder of PNG files or a COCO JSON file")
    try:
        return _from_coco(json.loads(source.read_text(encoding="utf-8")), numbers)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is not a COCO file of masks: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


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
        mask[where] = label_id(names[annotation["category_id"]])
    if not masks:
        raise ValueError("it has no annotations")
    return masks


def _region(segmentation: Any, shape: tuple[int, int], what: str) -> np.ndarray:
    """(H, W) bool of COCO's polygons [[x, y, x, y, ...], ...] or run lengths {"size": [H, W], "counts": ...}."""
    with needs("datasets"):  # here, as experiments and widgets do without
        from pycocotools import mask as coco_mask
    if isinstance(segmentation, dict):
        counts, size = segmentation["counts"], segmentation["size"]
        whole = tuple(size) == shape
        if whole and not isinstance(counts, str):
            whole = min(counts) >= 0 and sum(counts) == shape[0] * shape[1]
            segmentation = coco_mask.frPyObjects(segmentation, *shape) if whole else None
        region = coco_mask.decode(segmentation) if whole else None
        # pycocotools leaves the rest of the memory as it was where compressed run lengths are too few
        if region is None or (isinstance(counts, str) and coco_mask.encode(region)["counts"] != counts.encode()):
            raise ValueError(f"the run lengths of {what}, size {size}, do not fill the image, {shape[0]} x {shape[1]}")
        return region.astype(bool)
    if not segmentation:
        raise ValueError(f"{what} has no mask: a box alone is none")
    for points in segmentation:
        if len(points) < 6 or len(points) % 2:
            raise ValueError(f"{what} has a polygon of {len(points)} numbers: expected x, y of three points or more")
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *shape))).astype(bool)
