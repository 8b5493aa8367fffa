"""The drawn world of the bundled model: prompts for it, and its rendered scenes as datasets with exact labels."""

import itertools
import json
from pathlib import Path

import numpy as np

from ..cityscapes import MIN_AREA, label_id
from ..resources import bundled
from ..urban import scenes
from ..urban.captions import join_words
from . import folder as files
from .dataset import CLASSES, Dataset, load
from .progress import bar

PROMPTS = bundled("prompts/urban.json")


def urban_prompts(n: int, *, seed: int = 0) -> list[str]:
    """Prompts from the templates of data/prompts/urban.json in turn; each of `CLASSES` is in half of them.

    Args:
        n: how many; fewer prompts are the first of more.
        seed: a template's variations come in an order drawn from it, each once before any comes again.

    Returns:
        `n` prompts.

    Raises:
        ValueError: for n < 1.
        FileNotFoundError: without the file.
    """
    if not 1 <= n <= files.MOST_IMAGES:
        raise ValueError(f"expected one prompt or more, at most {files.MOST_IMAGES:,}, got n={n}")
    seed = files.whole_number("seed", seed, 0)
    if not PROMPTS.is_file():
        raise FileNotFoundError(f"the prompts are not at {PROMPTS}: install daamlib anew")
    lists = json.loads(PROMPTS.read_text(encoding="utf-8"))
    variations = []
    for number, template in enumerate(lists["templates"]):
        slots = [name for name in lists["slots"] if f"{{{name}}}" in template]
        fillings = itertools.product(*(lists["slots"][name] for name in slots))
        texts = [template.format(**dict(zip(slots, filling, strict=True))) for filling in fillings]
        order = np.random.default_rng([seed, number]).permutation(len(texts))
        variations.append([texts[i] for i in order])
    rounds = [divmod(i, len(variations)) for i in range(n)]
    return [variations[which][turn % len(variations[which])] for turn, which in rounds]


def render(folder: str | Path, n: int, *, first_seed: int = scenes.HELD_OUT, size: int = scenes.SIZE) -> Dataset:
    """Write rendered scenes with their exact label maps; resumed and refused as by `generate`.

    A scene's prompt names those of `CLASSES` that cover `MIN_AREA` of its label map: "a car and a rider in an urban
    environment", or "an urban environment".

    Args:
        folder: of the dataset.
        n: how many scenes; those of the seeds first_seed ... first_seed + n - 1.
        first_seed: the bundled model never saw the scenes from `HELD_OUT` on.
        size: side of the square images in pixels, 16 or more; by default the bundled model's, and for another model
            best its own (`daamlib.pipeline.image_size`).

    Returns:
        The dataset.

    Raises:
        ValueError: for n < 1, a size below 16, or a folder that was begun with other settings.
    """
    if n < 1:
        raise ValueError(f"expected one scene or more, got n={n}")
    if size < scenes.LEAST_SIDE:
        raise ValueError(f"a scene has a side of {scenes.LEAST_SIDE} px or more, got size={size}")
    folder, parts = Path(folder), ("images", "labels")
    made_by = {"model": "daamlib.urban.scenes", "labels": ["exact"]}
    settings = files.common_settings("rendered", n, first_seed, (size, size)) | made_by
    settings = files.compare(folder, settings, parts, range(n))
    files.verify(folder, settings, range(n))
    files.begin(folder, settings)
    files.clean(folder, range(n))
    for i in bar(files.missing(folder, parts, range(n)), "scenes"):
        scene = scenes.render(first_seed + i, size)
        files.write_png(folder / files.file_name("labels", i), scene.labels)
        files.write_png(folder / files.file_name("images", i), scene.image)
    prompts = [scene_prompt(files.read_png(folder / files.file_name("labels", i))) for i in range(n)]
    files.write_manifest(folder, settings, prompts)
    return load(folder)


def scene_prompt(ids: np.ndarray) -> str:
    """The prompt of a rendered scene with this label map."""
    seen = [f"a {name}" for name in CLASSES if (ids == label_id(name)).mean() >= MIN_AREA]
    return f"{join_words(seen)} in an urban environment" if seen else "an urban environment"
