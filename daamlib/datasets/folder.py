"""A dataset's folder: where its files are, and how they get there whole, once, and under one set of settings.

    images/00000.png  labels/00000.png  records/00000.safetensors  manifest.csv  dataset.json

An image is done when its file is there; what cannot be made from it later is written before. `dataset.json` is
written first and `manifest.csv` last, so a folder with a manifest is a complete dataset.
"""

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..extras import needs
from ..io import atomic_write, temporary_name

with needs("datasets"):
    import pandas as pd

FORMAT = "daamlib-dataset-1"
SETTINGS, MANIFEST = "dataset.json", "manifest.csv"
SUFFIX = {"images": "png", "labels": "png", "records": "safetensors"}
# what changes how an image is rounded, besides what was asked for
ROUNDING = ("batch_size", "device", "threads", "versions")
COLUMNS = ("model", "weights", "scheduler", "steps", "guidance")  # of the manifest, as in the settings
STALE = 3600  # s after which a temporary file is nobody's


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


def write_png(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 pixels or (H, W) uint8 ids."""
    write(path, lambda temporary: Image.fromarray(image).save(temporary, format="PNG"))


def read_png(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 pixels or (H, W) uint8 ids, a new array."""
    with Image.open(path) as image:
        return np.array(image)


def clean(folder: Path, mine: Container[int]) -> None:
    """Remove what a killed process left half-written of the images `mine`; those of others may be in the making."""
    for path in [path for part in (".", *SUFFIX) for path in (folder / part).glob(".*.part")]:
        number = path.name[1:].split(".")[0]
        with suppress(FileNotFoundError):  # its process has just finished it
            if (number.isdigit() and int(number) in mine) or path.stat().st_mtime < time.time() - STALE:
                path.unlink()


# -- settings ----------------------------------------------------------------------------------------------------


def common_settings(kind: str, n: int, seed: int, size: tuple[int, int] | None) -> dict[str, Any]:
    """What generated and rendered datasets both have, None for what a rendered one has not."""
    if seed < 0:
        raise ValueError(f"a seed is 0 or more, got {seed}")
    packages = ("torch", "diffusers", "transformers", "daamlib")
    return {
        "format": FORMAT,
        "kind": kind,
        "images": n,
        "seed": seed,
        "size": size,
        **dict.fromkeys(("weights", "scheduler", "steps", "guidance", "keep_steps")),
        "batch_size": 1,
        "labels": [],
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def required_parts(settings: dict[str, Any]) -> list[str]:
    """What every image must have; the labels of generated ones may come later, but for those that tokens read."""
    labels = settings["kind"] == "rendered" or "label_maps" in settings
    return ["images"] + ["records"] * bool(settings["keep_steps"]) + ["labels"] * labels


def start(folder: Path, settings: dict[str, Any], drawn: Iterable[str], indices: Iterable[int]) -> dict[str, Any]:
    """Make the folder, or go on in one with the same settings, and return those of dataset.json.

    drawn: the parts that are made by drawing the images `indices`. How an image is rounded matters only where one is
    still to be drawn: a finished dataset opens under other versions too. Raises ValueError, naming the differences, for
    other settings, and for a folder of files that is no dataset.
    """
    # in this order: where another process has written an image, its settings were there before
    foreign = any(any((folder / part).glob("*")) for part in SUFFIX)
    if not (folder / SETTINGS).is_file():
        if foreign:
            raise ValueError(f"{folder} holds files but no {SETTINGS}: it is no dataset to go on with, name another")
        _create(folder / SETTINGS, settings)
    there = read_settings(folder)
    here = json.loads(json.dumps(settings))  # as they are read: tuples become lists
    ignored = {"labels"} if missing(folder, drawn, indices) else {"labels", *ROUNDING}
    names = [name for name in {**there, **here} if name not in ignored]
    differences = [_difference(name, there.get(name), here.get(name)) for name in names]
    if any(differences):
        raise ValueError(
            f"{folder} was made with other settings ({'; '.join(filter(None, differences))}): use those, or name "
            "another folder"
        )
    return there


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
        settings = json.loads(path.read_text(encoding="utf-8"))
        found = settings["format"]
        settings.setdefault("batch_size", 1)  # which it was where it is not said
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of something else: {error!r}") from error
    if found != FORMAT:
        raise ValueError(f"{path} has the format {found!r}, this version reads {FORMAT!r}")
    return settings


def add_label_source(folder: Path, source: str, *, only: bool = False) -> None:
    """Note in dataset.json where label maps come from; `only`: all of them."""
    settings = read_settings(folder)
    sources = [source] if only else list(dict.fromkeys([*settings["labels"], source]))
    if sources != settings["labels"]:
        write(folder / SETTINGS, lambda temporary: _write_json(temporary, {**settings, "labels": sources}))


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
    """Write manifest.csv unless it is there."""
    if not (folder / MANIFEST).is_file():
        write(folder / MANIFEST, lambda temporary: manifest(settings, prompts).to_csv(temporary, index=False))


def read_manifest(folder: Path) -> pd.DataFrame:
    """The manifest of a complete dataset.

    Raises FileNotFoundError for a missing file, ValueError where the manifest is not that of the settings.
    """
    settings, lost = read_settings(folder), []
    for part in required_parts(settings):
        lost += [file_name(part, i) for i in missing(folder, [part], range(settings["images"]))]
    if not (folder / MANIFEST).is_file():
        lost.append(MANIFEST)
    if lost:
        raise FileNotFoundError(
            f"{folder} lacks {len(lost)} files ({', '.join(lost[:3])}{', ...' * (len(lost) > 3)}): call "
            f"{'render' if settings['kind'] == 'rendered' else 'generate'} again as before, it makes what is missing"
        )
    found = pd.read_csv(folder / MANIFEST, dtype=str, keep_default_na=False)
    if "prompt" in found and len(found) == settings["images"]:
        expected = manifest(settings, settings.get("prompts") or list(found["prompt"]))
        if found.equals(expected.astype(str)):
            return expected
    raise ValueError(
        f"{folder / MANIFEST} is not the one that follows from {SETTINGS}: was it edited? Remove it and call generate "
        "or render again as before"
    )
