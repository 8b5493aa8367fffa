"""Making datasets: generated images, rendered scenes, label maps."""

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..resources import bundled
from ..urban import scenes
from ..urban.captions import join_words
from ..urban.scenes import HELD_OUT, SIZE
from . import folder as files
from .dataset import CLASSES as CLASSES
from .dataset import MIN_AREA as MIN_AREA
from .dataset import Dataset as Dataset
from .dataset import label_id
from .drawing import common_settings, draw, generation_settings
from .drawing import weight_hash as weight_hash
from .masks import check_ids, read_masks

PROMPTS = bundled("prompts/urban.json")
Labels = Callable[[np.ndarray], np.ndarray]  # images (B, H, W, 3) uint8 -> Cityscapes ids (B, H, W) uint8


def urban_prompts(n: int, *, seed: int = 0) -> list[str]:
    """`n` prompts from the templates of data/prompts/urban.json in turn; each of `CLASSES` is in half of them.

    A template's variations come in an order drawn from `seed`, each once before any comes again; fewer prompts are
    the first of more. Raises ValueError for n < 1, FileNotFoundError without the file.
    """
    if n < 1:
        raise ValueError(f"expected one prompt or more, got n={n}")
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


def generate(
    pipe,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 5.0,
    size: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    shard: tuple[int, int] = (0, 1),
    keep_steps: int = 0,
    labels: Labels | None = None,
) -> Dataset:
    """Generate one image a prompt into `folder`; what is there already, made the same way, is kept.

    size: of the images in pixels, a side or (height, width); None: the model's own. shard: (k, n) makes the images i
    with i % n == k, so that n processes fill one folder; each returns its own images, `load` returns all.
    keep_steps: keep this many steps, evenly spaced, of each image's attention record, queries in float16.
    labels: (B, H, W, 3) uint8 -> (B, H, W) uint8 Cityscapes ids, called with `batch_size` images at a time.

    Every image has a CPU generator of its own, whose seed is in the manifest, and is denoised by itself: to batch it
    with others changes the rounding of its matrix products (measured on a CPU with the bundled model: 4e-6 of the
    range, enough to move single pixels by one level) and gains nothing there (3 % in time). So its bytes do not
    depend on `batch_size`, `shard` or resuming. They do depend, by as little, on the number of CPU threads, which is
    why a dataset is finished under the one it was begun with. On a GPU, shards side by side do what batches
    would; the bytes are as repeatable as its kernels are (`torch.use_deterministic_algorithms`; not measured).

    Raises ValueError, naming the differences, if the folder was begun with other prompts, settings or weights or, with
    images still to be made, another device, number of threads or versions; TypeError or ValueError for other
    arguments.
    """
    settings = generation_settings(pipe, prompts, seed, steps, guidance, size, keep_steps)
    k, n = shard
    if not 0 <= k < n:
        raise ValueError(f"shard is (k, n) with 0 <= k < n, got {shard}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    folder, mine = Path(folder), range(k, len(prompts), n)
    settings, todo = files.start(folder, settings, mine)
    for i in _bar(todo, "images"):
        _make(pipe, folder, settings, i)
    dataset = Dataset(folder, files.manifest(settings, settings["prompts"]).loc[list(mine)])
    if labels is not None:
        add_labels(dataset, labels, batch_size=batch_size)
    parts = ["images"] if labels is None else ["images", "labels"]
    if not any(files.missing(folder, part, range(len(prompts))) for part in parts):
        files.write_manifest(folder, settings, settings["prompts"])
    return dataset


def _make(pipe, folder: Path, settings: dict, i: int) -> None:
    """Generate image `i` and write it, the record first; both are gone from memory afterwards."""
    image, record = draw(pipe, settings["prompts"][i], files.image_seed(settings, i), settings)
    if record is not None:
        (folder / "records").mkdir(exist_ok=True)
        record.save(folder / files.file_name("records", i))
    files.write_png(folder / files.file_name("images", i), image)


def render(folder: str | Path, n: int, *, first_seed: int = HELD_OUT, size: int = SIZE) -> Dataset:
    """Write the rendered scenes of the seeds first_seed ... first_seed + n - 1, with their exact label maps.

    size: side of the square images in pixels, 16 or more; by default the bundled model's, and for another model best
    its own (`daamlib.pipeline.image_size`). A scene's prompt names those of `CLASSES` that cover `MIN_AREA` of its
    label map: "a car and a rider in an urban environment", or "an urban environment". The bundled model never saw the
    scenes from `HELD_OUT` on. Resumed and refused as by `generate`; raises ValueError for n < 1 or a size below 16 too.
    """
    if n < 1:
        raise ValueError(f"expected one scene or more, got n={n}")
    if size < scenes.LEAST_SIDE:
        raise ValueError(f"a scene has a side of {scenes.LEAST_SIDE} px or more, got size={size}")
    folder = Path(folder)
    settings = common_settings("rendered", n, first_seed, (size, size)) | {
        "model": "daamlib.urban.scenes",
        "labels": ["exact"],
    }
    settings, todo = files.start(folder, settings, range(n))
    for i in _bar(todo, "scenes"):
        scene = scenes.render(first_seed + i, size)
        files.write_png(folder / files.file_name("labels", i), scene.labels)
        files.write_png(folder / files.file_name("images", i), scene.image)
    label_maps = (files.read_png(folder / files.file_name("labels", i)) for i in range(n))
    files.write_manifest(folder, settings, [_sentence(ids) for ids in label_maps])
    return load(folder)


def load(folder: str | Path) -> Dataset:
    """A complete dataset of `generate` or `render`.

    Raises FileNotFoundError where there is none or a file is missing, ValueError where dataset.json is damaged or
    the manifest is not the one that follows from it.
    """
    return Dataset(Path(folder), files.read_manifest(Path(folder)))


def add_labels(dataset: Dataset, labels: Labels, *, batch_size: int = 8) -> Dataset:
    """Make the label maps of the images that have none: `labels` as for `generate`. Returns the dataset.

    The bundled annotator gives the same maps at any `batch_size` (measured: 32 scenes, one thread). Raises ValueError
    for label maps of another shape, type or values; those made before stay.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    todo = files.missing(dataset.folder, "labels", dataset.manifest.index)
    for start in _bar(range(0, len(todo), batch_size), "labels"):
        batch = todo[start : start + batch_size]
        images = np.stack([np.asarray(dataset.image(i)) for i in batch])
        maps = labels(images)
        if not isinstance(maps, np.ndarray) or maps.dtype != np.uint8 or maps.shape != images.shape[:3]:
            got = f"{maps.shape} {maps.dtype}" if isinstance(maps, np.ndarray) else type(maps).__name__
            raise ValueError(f"labels must return an array of {images.shape[:3]} uint8 Cityscapes ids, got {got}")
        check_ids(maps, "the result of labels")
        files.add_label_source(dataset.folder, _full_name(labels))  # first: who is killed here comes back here
        for i, ids in zip(batch, maps, strict=True):
            files.write_png(dataset._path("labels", i), ids)
    return dataset


def _full_name(function: Callable) -> str:
    """Module and name of a function, without the arguments that a partial adds; of another callable its class'."""
    while isinstance(function, functools.partial):
        function = function.func
    function = function if hasattr(function, "__qualname__") else type(function)
    return f"{function.__module__}.{function.__qualname__}"


def import_masks(dataset: Dataset, source: str | Path) -> Dataset:
    """Take masks that a person drew as the label maps of their images; other images keep what they have.

    source: a folder of PNGs named as the images, mode L or P with Cityscapes ids; or a COCO JSON file with polygons or
    run lengths, categories named as in `daamlib.cityscapes`, images named as in the manifest. Later annotations
    cover earlier ones. A mask of another size than its image is resized by nearest neighbour. All is read before
    anything is written. Returns the dataset; raises FileNotFoundError without a source, ValueError for an image,
    category or id that is unknown, and for what is no mask.
    """
    source = Path(source)
    masks = read_masks(source, {Path(name).name: i for i, name in dataset.manifest.file.items()})
    for i, ids in masks.items():
        size = dataset.image(i).size
        masks[i] = np.array(Image.fromarray(ids).resize(size, Image.Resampling.NEAREST))
    files.add_label_source(dataset.folder, f"masks of {source.name}")
    for i, ids in masks.items():
        files.write_png(dataset._path("labels", i), ids)
    if len(masks) == dataset.settings["images"]:
        files.add_label_source(dataset.folder, f"masks of {source.name}", only=True)
    return dataset


def check_masks(source: str | Path, n: int) -> None:
    """Raise what `import_masks` would for a dataset of `n` images, before hours go into generating them."""
    read_masks(Path(source), {Path(files.file_name("images", i)).name: i for i in range(n)})


def _sentence(ids: np.ndarray) -> str:
    """The prompt of a rendered scene with this label map."""
    seen = [f"a {name}" for name in CLASSES if (ids == label_id(name)).mean() >= MIN_AREA]
    return f"{join_words(seen)} in an urban environment" if seen else "an urban environment"


def _bar(indices: Iterable[int], what: str) -> tqdm:
    return tqdm(indices, desc=what, disable="CI" in os.environ)
