"""A dataset's folder: where its files are, and how they get there whole, once, and under one set of settings.

    images/00000.png  labels/00000.png  records/00000.safetensors  manifest.csv  dataset.json

The image file is written last: where it is, its record and label map are. `dataset.json` is written once the first
image could be made, before any other file, and `manifest.csv` last, so a folder with a manifest is a complete dataset.
"""

import csv
import functools
import hashlib
import importlib.metadata
import io
import json
import operator
import os
import struct
import time
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from ..classes import ClassList, class_list
from ..extras import needs
from ..io import atomic_write, check_file, in_the_making, temporary_name

with needs("datasets"):
    import pandas as pd

FORMAT = "daamlib-dataset-1"
SETTINGS, MANIFEST = "dataset.json", "manifest.csv"
SUFFIX = {"images": "png", "labels": "png", "records": "safetensors"}
# what changes how an image is rounded, besides what was asked for
ROUNDING = ("batch_size", "device", "threads", "versions")
COLUMNS = ("model", "weights", "scheduler", "steps", "guidance")  # of the manifest, as in the settings
MOST_IMAGES = 10**7  # of a folder; more is a mistake
BUSY = 60  # s after which nobody writes to the temporary file of an image
STALE = 3600  # s after which a temporary file is nobody's
MARK = "daamlib"  # the name of the text in a PNG that says of which image it is
MASKS = "masks of "  # begins the source of label maps that a person drew
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
REPAIR = "Remove it and make the dataset again as before, or put the right file there"
# dataset.json's keys that everything relies on, and their types
TYPES = {
    **{"kind": str, "images": int, "seed": int, "size": list | None, "labels": list, "versions": dict},
    **dict.fromkeys(("model", "weights", "scheduler"), str | None),
    **{"steps": int | None, "guidance": float | int | None, "keep_steps": int | None},
}


def file_name(part: str, index: int) -> str:
    """The path of a file inside the folder, such as images/00007.png."""
    return f"{part}/{index:05d}.{SUFFIX[part]}"


def short_hash(parts: Iterable[Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of bytes, or of arrays' memory, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def missing(folder: Path, parts: Iterable[str], indices: Iterable[int]) -> list[int]:
    """The indices of which the file of one of the parts is not there."""
    parts = tuple(parts)
    return [i for i in indices if not all((folder / file_name(part, i)).is_file() for part in parts)]


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """`save` to a temporary name beside `path`, then rename: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save(temporary)


def mark(settings: dict[str, Any], index: int) -> str | None:
    """Return what the PNG files of an image say of its making, so that a file of another image is noticed.

    Folders that were begun by older versions have none.
    """
    if not settings.get("marks"):
        return None
    made = [settings[name] for name in ("kind", "weights", "scheduler", "steps", "guidance")]
    prompt = settings["prompts"][index] if "prompts" in settings else None
    return short_hash([json.dumps([*made, index, image_seed(settings, index), prompt]).encode()])


def write_png(path: Path, image: np.ndarray, mark: str | None = None) -> None:
    """Write (H, W, 3) uint8 pixels or (H, W) uint8 ids, with the `mark` of its image."""
    info = PngInfo()
    if mark:
        info.add_text(MARK, mark)
    write(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG", pnginfo=info))


def bar(images: Iterable[int] | None, what: str, **options) -> tqdm:
    """Return a bar over images, or one to be moved by hand, silent under CI; `options` are tqdm's."""
    return tqdm(images, desc=what, disable="CI" in os.environ, **options)


@contextmanager
def opened(path: Path, formats: tuple[str, ...] = ("PNG",)) -> Iterator[Image.Image]:
    """Open a picture. Raises ValueError, naming the file, where it is cut, no picture or of another format."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                _require_end(path)
            if formats and image.format not in formats:  # JPEG changes ids and pixels
                raise ValueError(f"{path} is a {image.format} picture: expected PNG, whatever its name says")
            yield image
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, which names the file
            raise
        raise ValueError(f"{path} is damaged or no picture: {error}. {REPAIR}") from error


def _require_end(path: Path) -> None:
    """OSError for a PNG without its end, a few bytes of which Pillow does not miss."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 1024), os.SEEK_END)
        if PNG_END not in file.read():
            raise OSError("it is cut")


def read_png(path: Path) -> np.ndarray:
    """Return (H, W, 3) uint8 pixels or (H, W) uint8 ids, a new array. Raises ValueError, naming the file."""
    with opened(path) as image:
        return np.array(image)


def read_image(path: Path) -> np.ndarray:
    """Return (H, W, 3) uint8 pixels, a new array. Raises ValueError, naming the file, for anything else."""
    with opened(path) as image:
        _require_mode(path, image, ("RGB",), "RGB pixels")
        return np.array(image)


def read_labels(
    path: Path, classes: ClassList, size: tuple[int, int] | None = None, mark: str | None = None
) -> np.ndarray:
    """Return the (H, W) uint8 ids of a label map, a new array; size: (W, H) of its image.

    Raises ValueError, naming the file, where it is damaged, no label map, of another size or image, or has other ids.
    """
    with opened(path) as image:
        _require_mode(path, image, ("L", "P"), f"the {classes.name} id of each pixel")
        _require_size(path, image.size, size)
        _require_mark(path, image, mark, optional=True)
        tile = getattr(image, "tile", None)  # how Pillow reads the file, such as "L;4"
        bits = str(tile[0].args).partition(";")[2] if tile and image.mode == "L" else ""
        if bits.isdigit():  # decoders multiply these by 255 / (2^bits - 1): an id of 1 would be read as 17 or 85
            raise ValueError(f"{path} is a grey picture of {bits} bits a pixel: save the ids with 8 bits")
        ids = np.array(image)
    classes.check(ids, str(path))
    return ids


def _require_mark(path: Path, image: Image.Image, expected: str | None, *, optional: bool) -> None:
    """ValueError for the file of another image; `optional`: it may have no mark, as what a person has drawn."""
    found = image.info.get(MARK)
    if expected and found != expected and not (optional and found is None):
        what = "was replaced, or saved anew by another program" if found is None else "is of another image"
        raise ValueError(f"{path} {what}: the mark of its making is {found!r}, expected {expected!r}. {REPAIR}")


def _require_mode(path: Path, image: Image.Image, modes: tuple[str, ...], what: str) -> None:
    if image.mode not in modes:
        raise ValueError(f"{path} is a picture of mode {image.mode}: expected {what}, mode {' or '.join(modes)}")


def _require_size(path: Path, found: tuple[int, int], size: tuple[int, int] | None) -> None:
    if size is not None and found != size:
        raise ValueError(
            f"{path} is {found[0]} px wide and {found[1]} high: expected {size[0]} and {size[1]}. {REPAIR}"
        )


def verify(folder: Path, settings: dict[str, Any], indices: Iterable[int]) -> None:
    """Read the images' files that are there, without decoding an image; of a record only the header is read.

    Raises ValueError, naming the first file that is cut, no picture, of another size than the images of this dataset,
    or has other ids than its classes, or is of another image (the label map of another program may be of any).
    """
    size = (settings["size"][1], settings["size"][0]) if settings["size"] else None
    classes = class_list(settings.get("classes"))
    for i in indices:
        paths = {part: folder / file_name(part, i) for part in SUFFIX}
        if paths["images"].is_file():
            with opened(paths["images"]) as image:
                _require_mode(paths["images"], image, ("RGB",), "RGB pixels")
                _require_size(paths["images"], image.size, size)
                size = image.size  # without one in the settings that of the first
                _require_mark(paths["images"], image, mark(settings, i), optional=False)
                image.verify()
        if paths["labels"].is_file():
            read_labels(paths["labels"], classes, size, mark(settings, i))
        if settings["keep_steps"] and paths["records"].is_file():
            require_prompt(paths["records"], check_file(paths["records"]).get("prompt"), settings["prompts"][i])


def require_prompt(path: Path, found: str | None, prompt: str) -> None:
    """ValueError for a record of another prompt than its image has; embeddings have none."""
    if found is not None and found != prompt:
        raise ValueError(f"{path} is of another image: its prompt is {found!r}, expected {prompt!r}. {REPAIR}")


def clean(folder: Path, mine: Container[int]) -> None:
    """Remove what a killed process left half-written of the images `mine`; those of others may be in the making."""
    for path in [path for part in (".", *SUFFIX) for path in (folder / part).glob(".*.part")]:
        number = path.name[1:].split(".")[0]
        with suppress(FileNotFoundError):  # its process has just finished it
            age = time.time() - path.stat().st_mtime
            abandoned = number.isdigit() and int(number) in mine and (age > BUSY or not in_the_making(path))
            if abandoned or age > STALE:
                path.unlink()


# -- settings ----------------------------------------------------------------------------------------------------


def whole_number(name: str, value: Any, lowest: float, highest: float = float("inf")) -> int:
    """The value as an int. Raises TypeError unless it is a whole number, ValueError below or above the limits."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from error
    if not lowest <= number <= highest:
        most = "" if highest == float("inf") else f" and at most {highest:,}"
        raise ValueError(f"{name} must be {lowest} or more{most}, got {number}")
    return number


def common_settings(kind: str, n: int, seed: int, size: tuple[int, int] | None) -> dict[str, Any]:
    """Settings of both kinds of dataset; fields that do not apply are None."""
    packages = ("torch", "diffusers", "transformers", "daamlib")
    return {
        "format": FORMAT,
        "kind": kind,
        "images": n,
        "seed": whole_number("seed", seed, 0),
        "size": size,
        **dict.fromkeys(("weights", "scheduler", "steps", "guidance", "keep_steps")),
        "batch_size": 1,
        "marks": True,
        "labels": [],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def required_parts(settings: dict[str, Any]) -> list[str]:
    """What every image must have; the labels of generated ones may come later, but for those that tokens read."""
    labels = settings["kind"] == "rendered" or "label_maps" in settings
    return ["images"] + ["records"] * bool(settings["keep_steps"]) + ["labels"] * labels


def compare(
    folder: Path,
    settings: dict[str, Any],
    drawn: Iterable[str],
    indices: Iterable[int],
    classes: ClassList | None = None,
) -> dict[str, Any]:
    """Return the settings that a folder goes on with, for further images and label maps too; nothing is written.

    How an image is rounded matters only where a part in `drawn` of an image in `indices` is still to be made: a
    finished dataset opens under other versions too. A dataset may grow: its first images stay. Raises ValueError,
    naming the differences, for other settings, and for a folder of files that is no dataset.
    """
    # in this order: where another process has written an image, its settings were there before
    foreign = any(any((folder / part).glob("*")) for part in SUFFIX)
    if missing(folder, drawn, indices):
        _require_writable(folder)
    here = json.loads(json.dumps(settings))  # as they are read: tuples become lists
    if classes is not None and classes.stored() is not None:
        here["classes"] = classes.stored()
    if not (folder / SETTINGS).is_file():
        if foreign:
            raise ValueError(f"{folder} holds files but no {SETTINGS}: it is no dataset to go on with, name another")
        return here
    there = read_settings(folder)
    if "marks" not in there:
        here.pop("marks", None)
    if missing(folder, ["labels"], indices):
        _require_one_labeller(folder, there, here)
    merged = _merged(there, here)
    _require_none_beyond(folder, there["images"])
    ignored = {"labels", "classes"} | (set() if missing(folder, drawn, indices) else set(ROUNDING))
    names = [name for name in {**merged, **here} if name not in ignored]
    differences = [_difference(name, merged.get(name), here.get(name)) for name in names]
    if classes is not None and (there["labels"] or "classes" in there):
        differences.append(class_list(there.get("classes")).difference(classes))
    if any(differences):
        raise ValueError(
            f"{folder} was made with other settings ({'; '.join(filter(None, differences))}): use those, or name "
            "another folder"
        )
    return merged


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Write dataset.json, or bring it up to date with the settings of `compare`.

    Raises ValueError, as `compare`, where another process has been faster.
    """
    if not (folder / SETTINGS).is_file():
        _create(folder / SETTINGS, settings)
    there, merged = read_settings(folder), compare(folder, settings, ["images"], range(settings["images"]))
    if merged != there:
        if merged["images"] > there["images"]:
            (folder / MANIFEST).unlink(missing_ok=True)
        write(folder / SETTINGS, lambda temporary: _write_json(temporary, merged))


def _merged(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """`there` with the further images of `here`, if it begins as `there` does, and with its source of label maps."""
    n, merged = there["images"], dict(there)
    if here["images"] > n and there.get("prompts") == (here["prompts"][:n] if "prompts" in here else None):
        merged |= {name: here[name] for name in ("images", "prompts") if name in here}
    merged["labels"] = list(dict.fromkeys([*there["labels"], *here["labels"]]))
    if "classes" in here:
        merged["classes"] = here["classes"]
    return merged


def _require_writable(folder: Path) -> None:
    """OSError, before hours of work, where no file can be written to the folder, which need not be there."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file: name a folder for the dataset")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{place} is read-only: make it writable, or name another folder for the dataset")


def _require_one_labeller(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """ValueError for a labeller that goes on with label maps of another one; masks of a person may stand among them."""
    others = [source for source in there["labels"] if not source.startswith(MASKS)]
    if here["labels"] and others and not set(here["labels"]) & set(others):
        if any((folder / "labels").glob("[0-9]*.png")):
            raise ValueError(
                f"{folder} has label maps of {others[0]}, got the labeller {here['labels'][0]}: go on with that "
                "one, or remove the folder labels to have all of them made anew"
            )
        there["labels"] = []


def _require_none_beyond(folder: Path, n: int) -> None:
    """ValueError for numbered files of images that the dataset has not."""
    for path in [path for part in SUFFIX for path in (folder / part).glob(f"[0-9]*.{SUFFIX[part]}")]:
        if path.stem.isdigit() and int(path.stem) >= n:
            raise ValueError(f"{path} is not of this dataset, which has {n} images: remove it")


def _create(path: Path, settings: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_name(path) as temporary:
        _write_json(temporary, settings)
        try:
            os.link(temporary, path)  # unlike a renaming it never replaces another process' settings
        except OSError:  # it was faster, or this file system has no links
            if not path.is_file():
                temporary.replace(path)


def _difference(name: str, there: Any, here: Any) -> str:
    """What to say of it, "" where there is none."""
    if name == "prompts" and there and here and there != here:
        name, (there, here) = next((f"prompt {i}", p) for i, p in enumerate(zip_longest(there, here)) if p[0] != p[1])
    return "" if there == here else f"{name}: {there!r} there, {here!r} here"


def _write_json(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """The contents of dataset.json. Raises FileNotFoundError without one, ValueError where it is no such file."""
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"no dataset in {folder}: it has no {SETTINGS}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
        found = settings["format"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of something else: {error!r}") from error
    if found != FORMAT:
        raise ValueError(f"{path} has the format {found!r}, this version reads {FORMAT!r}")
    settings.setdefault("batch_size", 1)  # which it was where it is not said
    odd = [name for name, kind in TYPES.items() if name not in settings or not isinstance(settings[name], kind)]
    if not odd and settings["kind"] == "generated":
        prompts = settings.get("prompts")
        odd = [] if isinstance(prompts, list) and len(prompts) == settings["images"] else ["prompts"]
    if not odd and settings["size"] is not None:
        odd = [] if len(settings["size"]) == 2 and all(isinstance(s, int) for s in settings["size"]) else ["size"]
    if odd:
        raise ValueError(f"{path} is damaged or was edited: {odd[0]} is {settings.get(odd[0], 'missing')!r}"[:400])
    return settings


def classes_of(folder: Path) -> ClassList:
    """The classes of a dataset's label maps, read anew where dataset.json has changed."""
    return _classes(folder, (folder / SETTINGS).stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _classes(folder: Path, time: int) -> ClassList:
    return class_list(read_settings(folder).get("classes"))


def add_label_source(folder: Path, source: str, classes: ClassList, *, only: bool = False) -> None:
    """Note in dataset.json where label maps come from, and their classes; `only`: all of them."""
    settings, stored = read_settings(folder), classes.stored()
    sources = [source] if only else list(dict.fromkeys([*settings["labels"], source]))
    noted = {**settings, "labels": sources} | ({} if stored is None else {"classes": stored})
    if noted != settings:
        write(folder / SETTINGS, lambda temporary: _write_json(temporary, noted))


# -- manifest ----------------------------------------------------------------------------------------------------


def manifest(settings: dict[str, Any], prompts: list[str]) -> pd.DataFrame:
    """One row an image. It follows from the settings, so whichever process writes it, it is the same."""
    n = settings["images"]
    frame = pd.DataFrame(
        {
            "index": range(n),
            "file": [file_name("images", i) for i in range(n)],
            "prompt": prompts,
            "seed": [image_seed(settings, i) for i in range(n)],
        }
    )
    constant = {name: settings[name] for name in COLUMNS} | settings["versions"]
    return frame.assign(**{name: "" if value is None else value for name, value in constant.items()})


def image_seed(settings: dict[str, Any], index: int) -> int:
    """Of a rendered scene its number; else 32 bits (a CPU generator reads no more) drawn from (seed, index).

    Drawn, not `seed + index`: datasets of two seeds share no noise.
    """
    if settings["kind"] == "rendered":
        return settings["seed"] + index
    return int(np.random.SeedSequence([settings["seed"], index]).generate_state(1, np.uint32)[0])


def write_manifest(folder: Path, settings: dict[str, Any], prompts: list[str]) -> None:
    """Write manifest.csv; one that is there must be the same."""
    if (folder / MANIFEST).is_file():
        _checked_manifest(folder, settings, prompts)
    else:
        write(folder / MANIFEST, lambda temporary: manifest(settings, prompts).to_csv(temporary, index=False))


def read_manifest(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the manifest of a complete dataset, and its settings.

    Raises FileNotFoundError for a missing file, ValueError where the manifest is not that of the settings.
    """
    settings = read_settings(folder)
    names = [file_name(part, i) for part in required_parts(settings) for i in range(settings["images"])]
    lost = [name for name in names if not (folder / name).is_file()]
    if not (folder / MANIFEST).is_file():
        lost.append(MANIFEST)
    if lost:
        raise FileNotFoundError(
            f"{folder} lacks {len(lost)} files ({', '.join(lost[:3])}{', ...' * (len(lost) > 3)}): call "
            f"{'render' if settings['kind'] == 'rendered' else 'generate'} again as before, it makes what is missing"
        )
    expected = _checked_manifest(folder, settings, settings.get("prompts"))
    _require_none_beyond(folder, settings["images"])
    return expected, settings


def _checked_manifest(folder: Path, settings: dict[str, Any], prompts: list[str] | None) -> pd.DataFrame:
    """Return the manifest that follows from the settings. Raises ValueError unless the file says the same.

    Line ends and a byte order mark do not count. The prompts of rendered scenes (None) stand in the file alone.
    """
    with suppress(LookupError, ValueError, csv.Error):
        text = (folder / MANIFEST).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        expected = manifest(settings, prompts or [row["prompt"] for row in csv.DictReader(io.StringIO(text))])
        if text == expected.to_csv(index=False).replace("\r\n", "\n"):
            return expected
    raise ValueError(
        f"{folder / MANIFEST} is not the one that follows from {SETTINGS}: was it edited? Remove it and call generate "
        "or render again as before"
    )
