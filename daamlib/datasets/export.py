"""Datasets in the formats that others read: folders of Cityscapes, COCO and MMSegmentation, Hugging Face, FiftyOne.

All images need a label map; `classes` are names of `Dataset.classes`. Every file is written whole or not at all.
Called again, an export writes its files anew. Files of another dataset, or a damaged image, are a ValueError.
"""

import filecmp
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..attention.text import occurrences
from ..cityscapes import BY_NAME, IGNORED, overlay, to_train_ids
from ..classes import CITYSCAPES, ClassList, class_list
from ..extras import needs
from . import folder as files
from .dataset import Dataset

with needs("datasets"):
    from pycocotools import mask as coco_mask
    from scipy.ndimage import distance_transform_edt
    from skimage.measure import label as connected
    from skimage.measure import regionprops

CLASSES, METAINFO = "classes.json", "metainfo.json"
DEVICES = ("CON", "PRN", "AUX", "NUL")  # of Windows
BACKGROUND = 0  # of compact train ids


def cityscapes(
    dataset: Dataset,
    folder: str | Path,
    *,
    split: str = "train",
    city: str = "urban",
    classes: Sequence[str] | None = None,
) -> Path:
    """Write the folders of Cityscapes, index i of the dataset as frame i; return `folder`.

        leftImg8bit/<split>/<city>/<city>_000000_000007_leftImg8bit.png         the image
        gtFine/<split>/<city>/<city>_000000_000007_gtFine_labelIds.png          ids, 0 (unlabeled) where ignored
        gtFine/<split>/<city>/<city>_000000_000007_gtFine_labelTrainIds.png     what a network is trained on
        classes.json                                                            {train id: class}

        cityscapes(dataset, "out", split="val", classes=["car", "person"])

    labelTrainIds has 0 for the background, 1 ... K for `classes` in their order, and 255 for ignored pixels. Without
    `classes` it has Cityscapes' own 19 ids, with 255 elsewhere (of a dataset of other classes: all of them, as if they
    were named). That is right where every pixel has a class, as in rendered scenes. In a dataset labelled by tokens of
    a few classes 0 says "none of these", which a network has to be shown: name its classes. The splits of a folder
    share one classes.json.

    Raises ValueError for no image, one without a label map, a class that is unknown or comes twice, names that cannot
    be in a file's name, and where the folders hold files of another export or other classes.
    """
    folder, (table, names) = Path(folder), _train_ids(classes, dataset.classes)
    _check_names("_", split=split, city=city)  # "_" parts a file's name
    dataset.require_labels()
    stems = {i: f"{city}_000000_{i:06d}_" for i in dataset.indices}
    pictures, maps = (folder / part / split / city for part in ("leftImg8bit", "gtFine"))
    endings = ("gtFine_labelIds.png", "gtFine_labelTrainIds.png")
    _require_same_export(pictures, {stem + "leftImg8bit.png": dataset.path("images", i) for i, stem in stems.items()})
    _require_same_export(maps, {stem + ending: None for stem in stems.values() for ending in endings})
    _write_classes(folder / CLASSES, names)
    for i in files.bar(dataset.indices, "Cityscapes"):
        ids = dataset.labels(i)
        files.write_png(maps / (stems[i] + endings[0]), np.where(ids == IGNORED, np.uint8(0), ids))
        files.write_png(maps / (stems[i] + endings[1]), table[ids])
        _copy(dataset.path("images", i), pictures / (stems[i] + "leftImg8bit.png"))
    return folder


def mmsegmentation(
    dataset: Dataset, folder: str | Path, *, split: str = "train", classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Write the folders of MMSegmentation; return the arguments of its `BaseSegDataset`.

        arguments = mmsegmentation(dataset, "out", split="val", classes=["car", "person"])

        img_dir/<split>/00007.png    the image
        ann_dir/<split>/00007.png    (H, W) uint8, what labelTrainIds is of `cityscapes`: 0, 1, ... and 255 for ignored
        metainfo.json                {"classes": [name], "palette": [[red, green, blue]]}, by id; the splits share it

    They are also the folders of Detectron2's `load_sem_seg(ann_dir, img_dir, image_ext="png")`, by which Mask2Former
    reads. Raises ValueError as `cityscapes` does.
    """
    folder, (table, names) = Path(folder), _train_ids(classes, dataset.classes)
    _check_names("", split=split)
    dataset.require_labels()
    _, rows = np.unique(table, return_index=True)  # for each train id, the 255 last, an id that becomes it
    metainfo = {"classes": list(names.values())[:-1], "palette": dataset.classes.palette[rows[:-1]].tolist()}
    parts = {"img_path": f"img_dir/{split}", "seg_map_path": f"ann_dir/{split}"}
    sources = {f"{i:05d}.png": dataset.path("images", i) for i in dataset.indices}
    _require_same_export(folder / parts["img_path"], sources)
    _require_same_export(folder / parts["seg_map_path"], dict.fromkeys(sources))
    _write_classes(folder / METAINFO, metainfo)
    for i, name in zip(files.bar(dataset.indices, "MMSegmentation"), sources, strict=True):
        files.write_png(folder / parts["seg_map_path"] / name, table[dataset.labels(i)])
        _copy(sources[name], folder / parts["img_path"] / name)
    return {"data_root": str(folder), "data_prefix": parts, "img_suffix": ".png", "metainfo": metainfo}


def coco(
    dataset: Dataset,
    folder: str | Path,
    *,
    split: str = "train",
    classes: Sequence[str] | None = None,
    min_pixels: int = 1,
) -> Path:
    """Write COCO's folders, `<split>/00007.png` and `annotations/instances_<split>.json`; return the JSON file.

        path = coco(dataset, "out")
        datasets.import_masks(dataset, path)  # reads it back, pixel by pixel if all classes and pieces were written

    An annotation is a connected piece (8 neighbours) of a class, of `min_pixels` or more: two cars that touch are one,
    one behind a pole is two. Its mask is given by compressed run lengths, its category by the class's id; without
    `classes` all are annotated that occur, but "unlabeled" (0). COCO does not know the "point" of an annotation, the
    [x, y] of the pixel farthest inside, nor the "ignored" pixels (255) of an image, which most tools take for
    background, nor "complete" under "info": all images are labelled. Raises ValueError as `cityscapes` does.
    """
    folder, table, categories = Path(folder), dataset.classes, _category_ids(classes, min_pixels, dataset.classes)
    _check_names("", split=split)
    dataset.require_labels()
    _require_same_export(folder / split, {f"{i:05d}.png": dataset.path("images", i) for i in dataset.indices})
    images, occurring, path = [], set(categories or ()), folder / "annotations" / f"instances_{split}.json"
    complete, stored = categories is None and min_pixels == 1, table.stored()
    info: dict[str, Any] = {"description": f"label maps of {table.name} classes", "complete": complete}
    info |= {} if stored is None else {"classes": stored}

    def save(temporary: Path) -> None:
        """Write one annotation a line, image by image: those of 100,000 images would fill the memory."""
        with temporary.open("w", encoding="utf-8") as file:
            file.write('{"annotations": [')
            number = 0
            for i in files.bar(dataset.indices, "COCO"):
                ids, name = dataset.labels(i), f"{i:05d}.png"
                _copy(dataset.path("images", i), folder / split / name)
                images.append({"id": i, "file_name": name, "height": ids.shape[0], "width": ids.shape[1]})
                if (ids == IGNORED).any():
                    images[-1]["ignored"] = run_lengths(ids == IGNORED)
                for annotation in _instances(ids, categories, min_pixels):
                    occurring.add(annotation["category_id"])
                    entry = {"id": number + 1, "image_id": i, **annotation}
                    file.write(",\n" * bool(number) + json.dumps(entry))
                    number += 1
            rest = {"categories": [_category(i, table) for i in sorted(occurring)], "images": images, "info": info}
            file.write("],\n" + ",\n".join(f'"{name}": {json.dumps(part)}' for name, part in rest.items()) + "}\n")

    files.write(path, save)
    return path


def hugging_face(dataset: Dataset) -> Any:
    """Return the dataset as a `datasets.Dataset` of Hugging Face, with the extra `daamlib[datasets]`.

        hugging_face(dataset).save_to_disk("huggingface")

    Columns: image (RGB) and label (ids, 255 ignored), both decoded to PIL images when they are looked at; index,
    prompt, seed. `info.description` names the classes. It refers to the files of this dataset's folder, which are read
    once here; `save_to_disk` and `push_to_hub` copy them. Raises ImportError without the package, or as `cityscapes`.
    """
    with needs("datasets"):
        import datasets  # Hugging Face's: imports of this package's own are relative
    dataset.require_labels()
    paths = {part: [str(dataset.path(part, i).resolve()) for i in dataset.indices] for part in ("images", "labels")}
    columns = {
        "image": [{"path": path, "bytes": None} for path in paths["images"]],
        "label": [{"path": path, "bytes": None} for path in paths["labels"]],
        "index": dataset.indices,
        "prompt": dataset.manifest.prompt.tolist(),
        "seed": dataset.manifest.seed.tolist(),
    }
    kinds = {"index": datasets.Value("int64"), "prompt": datasets.Value("string"), "seed": datasets.Value("int64")}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image(), **kinds})
    table = datasets.table.InMemoryTable.from_pydict(columns, schema=features.arrow_schema)
    # Their own fingerprint, as of `from_dict`, pickles the table, which datasets 5.2.0 cannot do with every pyarrow;
    # and of the pictures it would see the paths alone. This one changes with the rows and with the pictures' times.
    times = [os.stat(path).st_mtime_ns for part in paths.values() for path in part]
    fingerprint = files.short_hash([json.dumps([columns, times]).encode()])
    names = ", ".join(f"{number} {name}" for number, name in sorted(dataset.classes.names.items()))
    info = datasets.DatasetInfo(features=features, description=f"label: {names}, {IGNORED} ignored")
    return datasets.Dataset(table, info=info, fingerprint=fingerprint)


def fiftyone(dataset: Dataset, *, word: str | None = None) -> Any:
    """Return the dataset as a `fiftyone.Dataset` of Voxel51, with the extra `daamlib[fiftyone]`.

        fiftyone(dataset)  # fiftyone.launch_app shows it

    Fields: filepath, label (a `Segmentation` by ids, 255 ignored), index, prompt, seed; with `word`, where an image has
    a record and the word in its prompt, heatmap (DAAM). It refers to this dataset's files. FiftyOne forgets it when
    Python ends, unless `persistent` is set. Raises ValueError as `cityscapes`, and if no image has a map of the word.
    """
    with needs("fiftyone"):
        import fiftyone as voxel
    dataset.require_labels()
    samples, rows = [], dataset.manifest[["prompt", "seed"]].to_dict("index")
    for i in files.bar(dataset.indices, "FiftyOne"):
        image, labels = (str(dataset.path(part, i).resolve()) for part in ("images", "labels"))
        samples.append(voxel.Sample(image, label=voxel.Segmentation(mask_path=labels), index=i, **rows[i]))
        if word is not None and dataset.path("records", i).is_file():
            record = dataset.record(i)
            if occurrences(word, record.prompt_embeddings.words):
                heat = record.daam()[word].numpy()
                samples[-1]["heatmap"] = voxel.Heatmap(map=heat, range=[float(heat.min()), float(heat.max())])
    if word is not None and not any(sample.has_field("heatmap") for sample in samples):
        raise ValueError(f"no image of {dataset.folder} has a record whose prompt has the word {word!r}")
    made = voxel.Dataset()
    made.default_mask_targets = dataset.classes.names | {IGNORED: "ignored"}
    made.add_samples(samples, progress=False)
    return made


def prompts(
    labels: np.ndarray,
    *,
    classes: Sequence[str] | None = None,
    min_pixels: int = 1,
    table: ClassList | Mapping[str, Any] = CITYSCAPES,
) -> list[dict[str, Any]]:
    """Return boxes and points for a promptable segmenter (such as SAM), of each connected piece of (H, W) uint8 ids.

        prompts(dataset.labels(0), classes=["car"])

    `table` has the classes of the label map, such as `Dataset.classes` or {name: id}; `classes` and `min_pixels` are as
    of `coco`. Each piece gives {"class": name, "box": [x0, y0, x1, y1], "points": [[x, y]], "point_labels": [1]} in
    pixels, the lower right corner included, the point the pixel farthest inside. Raises ValueError for a class or an id
    that is not in the table, or min_pixels below 1.
    """
    return [
        {"class": name, "box": box, "points": [piece["point"]], "point_labels": [1]}
        for name, box, piece in _named_pieces(labels, classes, min_pixels, class_list(table))
    ]


def detections(
    labels: np.ndarray,
    *,
    classes: Sequence[str] | None = None,
    min_pixels: int = 1,
    table: ClassList | Mapping[str, Any] = CITYSCAPES,
) -> dict[str, Any]:
    """Return the arguments of `supervision.Detections`, one row for each connected piece of (H, W) uint8 ids.

        arguments = detections(dataset.labels(0))  # supervision.Detections(**arguments)

    They are `xyxy` (n, 4) in pixels, the lower right corner included, `mask` (n, H, W) bool, `class_id` (n,), and
    "class_name" (n,) in `data`. Other arguments and errors are those of `prompts`.
    """
    pieces = list(_named_pieces(labels, classes, min_pixels, class_list(table)))
    masks = [coco_mask.decode(piece["segmentation"]) for _, _, piece in pieces]
    return {
        "xyxy": np.array([box for _, box, _ in pieces], float).reshape(-1, 4),
        "mask": np.array(masks, bool).reshape(-1, *labels.shape),
        "class_id": np.array([piece["category_id"] for _, _, piece in pieces], int),
        "data": {"class_name": np.array([name for name, _, _ in pieces], str)},
    }


def overlays(dataset: Dataset, folder: str | Path, *, opacity: float = 0.55) -> Path:
    """Write `overlays/00007.png`, the label map painted over its image, for a quick look; return their folder.

        overlays(dataset, "out", opacity=0.4)

    Raises ValueError for an opacity of the colours outside of [0, 1], and as `cityscapes` does.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be in [0, 1], got {opacity}")
    dataset.require_labels()
    pictures = Path(folder) / "overlays"
    _require_same_export(pictures, {f"{i:05d}.png": None for i in dataset.indices})
    for i in files.bar(dataset.indices, "overlays"):
        painted = overlay(dataset.image(i), dataset.labels(i), opacity=opacity, colours=dataset.classes.palette)
        files.write_png(pictures / f"{i:05d}.png", painted)
    return pictures


def _named_pieces(
    labels: np.ndarray, classes: Sequence[str] | None, min_pixels: int, table: ClassList
) -> Iterator[tuple[str, list[int], dict[str, Any]]]:
    """Yield the class, the box [x0, y0, x1, y1] and COCO's entry of each piece; the box includes its last pixels."""
    categories = _category_ids(classes, min_pixels, table)
    table.check(labels, "the label map")
    for piece in _instances(labels, categories, min_pixels):
        x, y, width, height = piece["bbox"]
        yield table.names[piece["category_id"]], [x, y, x + width - 1, y + height - 1], piece


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's compressed run lengths of an (H, W) mask, as JSON has them."""
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def _category(number: int, table: ClassList) -> dict[str, Any]:
    name = table.names[number]
    group = BY_NAME[name].category if table.name == CITYSCAPES.name else table.name  # only Cityscapes groups classes
    return {"id": number, "name": name, "supercategory": group}


def _category_ids(classes: Sequence[str] | None, min_pixels: int, table: ClassList) -> set[int] | None:
    """Return the ids of some classes, None for all."""
    if isinstance(classes, str) or (classes is not None and not classes):
        raise ValueError(f"classes are names, one or more, got {classes!r}")
    files.whole_number("min_pixels", min_pixels, 1)
    if 0 in (table.id(name) for name in classes or ()):
        raise ValueError(f"{table.names[0]!r} is what is none of the classes: it has no pieces, leave it out")
    return None if classes is None else {table.id(name) for name in classes}


def _instances(ids: np.ndarray, categories: set[int] | None, min_pixels: int) -> Iterator[dict[str, Any]]:
    """Yield COCO's entry of each connected piece, without its numbers."""
    for category in np.unique(ids).tolist():
        if category in (0, IGNORED) or (categories is not None and category not in categories):
            continue
        pieces = connected(ids == category, connectivity=2)
        for piece in regionprops(pieces):
            if piece.num_pixels < min_pixels:
                continue
            top, left, bottom, right = piece.bbox
            # the image's border, too, counts as outside
            distance = distance_transform_edt(np.pad(piece.image, 1))[1:-1, 1:-1]
            y, x = np.unravel_index(distance.argmax(), distance.shape)
            yield {
                "category_id": category,
                "segmentation": run_lengths(pieces == piece.label),
                "area": int(piece.num_pixels),
                "bbox": [left, top, right - left, bottom - top],
                "point": [left + int(x), top + int(y)],
                "iscrowd": 0,
            }


def _train_ids(classes: Sequence[str] | None, known_as: ClassList) -> tuple[np.ndarray, dict[str, str]]:
    """Return the train id of each value of a label map, (256,) uint8; and {train id: class} as JSON has it."""
    table, known = np.full(256, IGNORED, np.uint8), np.array(list(known_as.names))
    if classes is None and known_as.stored() is None:
        table[known] = to_train_ids(known)
        names = {label.train_id: label.name for label in BY_NAME.values() if 0 <= label.train_id < IGNORED}
    else:
        classes = [name for name, number in known_as.ids.items() if number] if classes is None else classes
        if isinstance(classes, str) or not classes or len(set(classes)) < len(classes):
            raise ValueError(f"classes are names, one or more, each once, got {classes!r}")
        table[known] = BACKGROUND
        names = {BACKGROUND: "background"} | dict(enumerate(classes, start=1))
        for number, name in enumerate(classes, start=1):
            table[known_as.id(name)] = number
    return table, {str(i): names[i] for i in sorted(names)} | {str(IGNORED): "ignored"}


def _write_classes(path: Path, classes: Any) -> None:
    text = json.dumps(classes, indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} is of an export with other classes: name another folder, or export with those")
    files.write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _check_names(separators: str, **names: str) -> None:
    for name, text in names.items():
        forbidden = "/\\" + separators + '<>:"|?*'  # some by Windows, to which a dataset may be copied
        if not isinstance(text, str) or not text.isprintable() or set(text) & set(forbidden):
            raise ValueError(f"{name} is part of the files' names, without {forbidden!r}, got {text!r}")
        if text != text.strip(" .") or not text or text.split(".")[0].upper() in DEVICES:
            raise ValueError(f"{name} is part of the files' names, got {text!r}: no file has this name on Windows")


def _require_same_export(folder: Path, sources: Mapping[str, Path | None]) -> None:
    """Raise ValueError if the folder holds files that this export does not write; remove half-written ones of it.

    sources: {file name: the file that it is a copy of, if any}.
    """
    for path in sorted(path for path in folder.glob("*") if not path.match(".*.part")):
        source = sources.get(path.name)
        if path.name not in sources or (source and not filecmp.cmp(path, source, shallow=False)):
            raise ValueError(f"{folder} holds {path.name}, which is not of this dataset: name another folder")
    for path in folder.glob(".*.part"):
        path.unlink()


def _copy(source: Path, target: Path) -> None:
    files.write(target, lambda temporary: shutil.copyfile(source, temporary))
