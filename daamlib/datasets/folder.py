"""A dataset's folder: where its files are, and how each is written whole, once, and under one set of settings.

    images/00000.png  labels/00000.png  records/00000.safetensors  manifest.csv  dataset.json

`dataset.json` is written first, once an image could be made; an image after its record and label map; `manifest.csv`
last, so a folder with a manifest is a complete dataset.
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
# settings that change only how an image is rounded
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
    """Return the path of a file inside the folder, such as images/00007.png."""
    return f"{part}/{index:05d}.{SUFFIX[part]}"


def short_hash(parts: Iterable[Any]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of bytes, or of arrays' memory, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def missing(folder: Path, parts: Iterable[str], indices: Iterable[int]) -> list[int]:
    """Return the indices of images that lack the file of one of the parts."""
    parts = tuple(parts)
    return [i for i in indices if not all((folder / file_name(part, i)).is_file() for part in parts)]


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Call `save` with a temporary name, then rename: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save(temporary)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write(path, lambda temporary: temporary.write_text(_as_json(content), encoding="utf-8"))


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def mark(settings: dict[str, Any], index: int) -> str | None:
    """Return the text in an image's PNG files that shows how it was made; None in folders of older versions."""
    if not settings.get("marks"):
        return None
    made = [settings[name] for name in ("kind", "weights", "scheduler", "steps", "guidance")]
    prompt = settings["prompts"][index] if "prompts" in settings else None
    return short_hash([json.dumps([*made, index, image_seed(settings, index), prompt]).encode()])


def write_png(path: Path, image: np.ndarray, mark: str | None = None) -> None:
    """Write (H, W, 3) uint8 pixels or (H, W) uint8 ids, with the `mark` of their image."""
    info = PngInfo()
    if mark:
        info.add_text(MARK, mark)
    write(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG", pnginfo=info))


def bar(images: Iterable[int] | None, what: str, **options) -> tqdm:
    """Return a progress bar over images, or one to be moved by hand, silent under CI."""
    return tqdm(images, desc=what, disable="CI" in os.environ, **options)


@contextmanager
def opened(path: Path, formats: tuple[str, ...] = ("PNG",)) -> Iterator[Image.Image]:
    """Open a picture. Raises ValueError, naming the file, where it is cut, no picture or of another format."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG" and not _has_end(path):
                raise OSError("it is cut")
            if formats and image.format not in formats:  # JPEG changes ids and pixels
                raise ValueError(f"{path} is a {image.format} picture: expected PNG, whatever its name says")
            yield image
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, which names the file
            raise
        raise ValueError(f"{path} is damaged or no picture: {error}. {REPAIR}") from error


def _has_end(path: Path) -> bool:
    """Return whether a PNG has its last bytes; Pillow does not notice where a few are missing."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 1024), os.SEEK_END)
        return PNG_END in file.read()


def read_png(path: Path) -> np.ndarray:
    """Return (H, W, 3) uint8 pixels or (H, W) uint8 ids, a new array. Raises ValueError, naming the file."""
    with opened(path) as image:
        return np.array(image)


def read_image(path: Path) -> np.ndarray:
    """Return (H, W, 3) uint8 pixels, a new array. Raises ValueError, naming the file, for anything else."""
    with opened(path) as image:
        _check_picture(path, image, "RGB pixels", ("RGB",))
        return np.array(image)


def read_labels(
    path: Path, classes: ClassList, size: tuple[int, int] | None = None, mark: str | None = None
) -> np.ndarray:
    """Return the (H, W) uint8 ids of a label map, a new array; size: (W, H) of its image.

    Raises ValueError, naming the file, where it is damaged, no label map, of another size or image, or has other ids.
    """
    with opened(path) as image:
        drawn = MARK not in image.info  # by a person, in another program
        _check_picture(path, image, f"the {classes.name} id of each pixel", ("L", "P"), size, None if drawn else mark)
        tile = getattr(image, "tile", None)  # how Pillow reads the file, such as "L;4"
        bits = str(tile[0].args).partition(";")[2] if tile and image.mode == "L" else ""
        if bits.isdigit():  # decoders multiply these by 255 / (2^bits - 1): an id of 1 would be read as 17 or 85
            raise ValueError(f"{path} is a grey picture of {bits} bits a pixel: save the ids with 8 bits")
        ids = np.array(image)
    classes.check(ids, str(path))
    return ids


def _check_picture(
    path: Path,
    image: Image.Image,
    what: str,
    modes: tuple[str, ...],
    size: tuple[int, int] | None = None,
    mark: str | None = None,
) -> None:
    """Raise ValueError for a picture of another mode, size (W, H) or mark; None: any."""
    if image.mode not in modes:
        raise ValueError(f"{path} is a picture of mode {image.mode}: expected {what}, mode {' or '.join(modes)}")
    if size is not None and image.size != size:
        width, height = image.size
        raise ValueError(f"{path} is {width} px wide and {height} high: expected {size[0]} and {size[1]}. {REPAIR}")
    given = image.info.get(MARK)
    if mark is not None and given != mark:
        cause = "was replaced, or saved anew by another program" if given is None else "is of another image"
        raise ValueError(f"{path} {cause}: the mark of its making is {given!r}, expected {mark!r}. {REPAIR}")


def verify(folder: Path, settings: dict[str, Any], indices: Iterable[int]) -> None:
    """Check the images' files that are there; no image is decoded, and of a record only the header is read.

    Raises ValueError, naming the first file that is cut, no picture, of another size or image, or has other ids than
    the dataset's classes. A label map that another program wrote may be of any image.
    """
    size = (settings["size"][1], settings["size"][0]) if settings["size"] else None
    classes = class_list(settings.get("classes"))
    for i in indices:
        image_path, labels, record = (folder / file_name(part, i) for part in SUFFIX)
        if image_path.is_file():
            with opened(image_path) as image:
                _check_picture(image_path, image, "RGB pixels", ("RGB",), size, mark(settings, i))
                size = image.size  # without one in the settings that of the first
                image.verify()
        if labels.is_file():
            read_labels(labels, classes, size, mark(settings, i))
        if settings["keep_steps"] and record.is_file():
            require_prompt(record, check_file(record).get("prompt"), settings["prompts"][i])


def require_prompt(path: Path, given: str | None, prompt: str) -> None:
    """Raise ValueError for a record of another prompt than its image has; None: a record of embeddings."""
    if given is not None and given != prompt:
        raise ValueError(f"{path} is of another image: its prompt is {given!r}, expected {prompt!r}. {REPAIR}")


def clean(folder: Path, mine: Container[int]) -> None:
    """Remove what a killed process left half-written of the images `mine`; other processes may be writing theirs."""
    for path in [path for part in (".", *SUFFIX) for path in (folder / part).glob(".*.part")]:
        number = path.name[1:].split(".")[0]
        with suppress(FileNotFoundError):  # its process has just finished it
            age = time.time() - path.stat().st_mtime
            abandoned = number.isdigit() and int(number) in mine and (age > BUSY or not in_the_making(path))
            if abandoned or age > STALE:
                path.unlink()


# -- settings ----------------------------------------------------------------------------------------------------


def whole_number(name: str, value: Any, lowest: float, highest: float = float("inf")) -> int:
    """Return the value as an int. Raises TypeError for no whole number, ValueError outside of the limits."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from error
    if not lowest <= number <= highest:
        most = "" if highest == float("inf") else f" and at most {highest:,}"
        raise ValueError(f"{name} must be {lowest} or more{most}, got {number}")
    return number


def common_settings(kind: str, n: int, seed: int = 0, size: tuple[int, int] | None = None) -> dict[str, Any]:
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


def compare(
    folder: Path,
    settings: dict[str, Any],
    drawn: Iterable[str],
    indices: Iterable[int],
    classes: ClassList | None = None,
) -> dict[str, Any]:
    """Return the settings that a folder goes on with, with further images and label maps; nothing is written.

    How an image is rounded matters only where a part in `drawn` of an image in `indices` is still to be made: a
    finished dataset opens under other versions too. A dataset may grow: its first images stay. Raises ValueError,
    naming the differences, for other settings, and for a folder of files that is no dataset.
    """
    # before the settings are read: where another process has written an image, its settings were there before
    foreign = any(any((folder / part).glob("*")) for part in SUFFIX)
    unfinished = bool(missing(folder, drawn, indices))
    if unfinished:
        _require_writable(folder)
    here = json.loads(_as_json(settings))  # as they are read: tuples become lists
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
    ignored = {"labels", "classes", *(() if unfinished else ROUNDING)}
    differences = [_difference(k, merged.get(k), here.get(k)) for k in {**merged, **here} if k not in ignored]
    if classes is not None and (there["labels"] or "classes" in there):
        differences.append(class_list(there.get("classes")).difference(classes))
    if others := "; ".join(filter(None, differences)):
        raise ValueError(f"{folder} was made with other settings ({others}): use those, or name another folder")
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
        write_json(folder / SETTINGS, merged)


def _merged(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """Return `there` with the further images of `here`, if it begins as `there` does, and its source of label maps."""
    n, merged = there["images"], dict(there)
    if here["images"] > n and there.get("prompts") == (here["prompts"][:n] if "prompts" in here else None):
        merged |= {name: here[name] for name in ("images", "prompts") if name in here}
    merged["labels"] = list(dict.fromkeys([*there["labels"], *here["labels"]]))
    return merged | {name: here[name] for name in ("classes",) if name in here}


def _require_writable(folder: Path) -> None:
    """Raise OSError, before hours of work, where no file can be written to the folder, which need not exist."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file: name a folder for the dataset")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{place} is read-only: make it writable, or name another folder for the dataset")


def _require_one_labeller(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise ValueError where label maps of another labeller are there; masks of a person do not count."""
    others = [source for source in there["labels"] if not source.startswith(MASKS)]
    if here["labels"] and others and not set(here["labels"]) & set(others):
        if any((folder / "labels").glob("[0-9]*.png")):
            raise ValueError(
                f"{folder} has label maps of {others[0]}, got the labeller {here['labels'][0]}: go on with that "
                "one, or remove the folder labels to have all of them made anew"
            )
        there["labels"] = []


def _require_none_beyond(folder: Path, n: int) -> None:
    """Raise ValueError for a file with the number of an image that the dataset does not have."""
    for path in [path for part in SUFFIX for path in (folder / part).glob(f"[0-9]*.{SUFFIX[part]}")]:
        if path.stem.isdigit() and int(path.stem) >= n:
            raise ValueError(f"{path} is not of this dataset, which has {n} images: remove it")


def _create(path: Path, settings: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_name(path) as temporary:
        temporary.write_text(_as_json(settings), encoding="utf-8")
        try:
            os.link(temporary, path)  # unlike a renaming it never replaces another process' settings
        except OSError:  # it was faster, or this file system has no links
            if not path.is_file():
                temporary.replace(path)


def _difference(name: str, there: Any, here: Any) -> str:
    """Describe a difference, "" if there is none."""
    if name == "prompts" and there and here and there != here:
        name, (there, here) = next((f"prompt {i}", p) for i, p in enumerate(zip_longest(there, here)) if p[0] != p[1])
    return "" if there == here else f"{name}: {there!r} there, {here!r} here"


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the contents of dataset.json. Raises FileNotFoundError without one, ValueError for a damaged one."""
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"no dataset in {folder}: it has no {SETTINGS}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
        version = settings["format"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of something else: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{path} has the format {version!r}, this version reads {FORMAT!r}")
    settings.setdefault("batch_size", 1)  # the only one of older versions
    wrong = [name for name, kind in TYPES.items() if name not in settings or not isinstance(settings[name], kind)]
    if not wrong:
        prompts, size = settings.get("prompts"), settings["size"]
        if settings["kind"] == "generated" and not (isinstance(prompts, list) and len(prompts) == settings["images"]):
            wrong = ["prompts"]
        elif size is not None and not (len(size) == 2 and all(isinstance(side, int) for side in size)):
            wrong = ["size"]
    if wrong:
        raise ValueError(f"{path} is damaged or was edited: {wrong[0]} is {settings.get(wrong[0], 'missing')!r}"[:400])
    return settings


def classes_of(folder: Path) -> ClassList:
    """Return the classes of a dataset's label maps; dataset.json is only read again where it has changed."""
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
        write_json(folder / SETTINGS, noted)


# -- manifest ----------------------------------------------------------------------------------------------------


def manifest(settings: dict[str, Any], prompts: list[str]) -> pd.DataFrame:
    """Return one row an image. It follows from the settings, so every process would write the same."""
    indices = range(settings["images"])
    columns = {
        "index": indices,
        "file": [file_name("images", i) for i in indices],
        "prompt": prompts,
        "seed": [image_seed(settings, i) for i in indices],
    }
    constant = {name: settings[name] for name in COLUMNS} | settings["versions"]
    return pd.DataFrame(columns).assign(**{name: "" if value is None else value for name, value in constant.items()})


def image_seed(settings: dict[str, Any], index: int) -> int:
    """Return a rendered scene's number, else 32 bits (a CPU generator reads no more) drawn from (seed, index).

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


def finish(folder: Path, parts: Iterable[str], n: int) -> None:
    """Write the manifest of a generated dataset once its n images are there, unless it has grown meanwhile."""
    if not missing(folder, parts, range(n)):
        settings = read_settings(folder)
        if settings["images"] == n:
            write_manifest(folder, settings, settings["prompts"])


def read_manifest(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the manifest of a complete dataset, and its settings.

    Raises FileNotFoundError for a missing file, ValueError where the manifest is not that of the settings.
    """
    settings = read_settings(folder)
    # label maps may come later, unless a labeller's settings are stored
    labels = settings["kind"] == "rendered" or "label_maps" in settings
    parts = ["images"] + ["records"] * bool(settings["keep_steps"]) + ["labels"] * labels
    names = [file_name(part, i) for part in parts for i in range(settings["images"])]
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
    path = folder / MANIFEST
    raise ValueError(f"{path} is not the one that follows from {SETTINGS}: remove it, and make the dataset again")
