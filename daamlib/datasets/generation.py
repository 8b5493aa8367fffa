"""Generator of datasets: images, and with a labeller their label maps, whole or not at all."""

import functools
import inspect
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..attention.calls import Store
from ..attention.joint.families import family_of
from ..attention.layers import Layer
from ..attention.record import AttentionRecord
from ..classes import Classes, ClassList, class_list
from ..pipeline import DENOISERS, denoiser_of, generators
from ..tracing import trace
from . import folder as files
from .dataset import Dataset
from .labelling import Labeller, label_image

log = logging.getLogger("daamlib")

GPU_BATCH = 4  # images at 1024 px that fit in memory with their attention
MOST = 1024  # images of a batch, and threads; more is a mistake
TEXTS = ("negative_prompt", "prompt_")  # begin the names of the pipeline's options that are texts
# what `generate` itself passes to a pipeline, and its own name for it
OURS = {
    "prompt": "prompts",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "height": "size",
    "width": "size",
    "generator": "seed",
    "latents": "seed",
    "num_images_per_prompt": "prompts",
    **dict.fromkeys(("output_type", "return_dict", "callback", "callback_on_step_end"), ""),
}


def generate(
    pipe: Any,
    prompts: Sequence[str],
    folder: str | Path,
    *,
    labeller: Labeller | None = None,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 5.0,
    size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    shard: tuple[int, int] = (0, 1),
    keep_steps: int = 0,
    self_attention: bool = False,
    classes: Classes | None = None,
    **options: Any,
) -> Dataset:
    """Generate one image a prompt into a folder; what is there already, made the same way, stays.

        dataset = generate(pipe, ["a car", "a person"], "new", steps=2, size=64)

    The noise of an image is drawn on the CPU from the seed and its index, and batches are those of the whole dataset,
    so sharding and resuming change no image. By single pixels and one level the bytes do depend on `batch_size`, the
    device (a GPU's kernels, too), the CPU threads and the versions, which must stay the same until all is generated.

    Raises TypeError for values of another type, and options that the pipeline does not take or JSON cannot hold.
    Raises ValueError for other bad arguments, a labeller of another model, a bad label map, pixels that are NaN, a
    damaged file, and, naming the differences, a folder that was begun with other settings.

    Args:
        pipe: a Stable Diffusion pipeline.
        prompts: one for each image. With more than before the dataset grows, if its own are the first of them.
        folder: a new one, or one to go on in. It can be killed at any moment, and the same call goes on.
        labeller: makes the label maps, see `daamlib.datasets.labelling`; None: images alone. One whose `store` is None
            labels images that are there, too. A label map that is there stays, as one that a person corrected.
        seed: of the noise.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        size: of the images in pixels, a side or (height, width); None: the model's own.
        batch_size: images that are denoised at once; None: 1 on a CPU, 4 elsewhere.
        shard: (k, n) makes every n-th batch from the k-th on, so that n processes fill one folder.
        keep_steps: number of evenly spaced steps of the attention records that are stored, queries in float16.
        self_attention: store with each record the mean that `record.refine` reads, 2.1 MB at 32 x 32 positions.
        classes: those of the label maps (`daamlib.classes.class_list`); None: the labeller's, else Cityscapes.
        **options: of the pipeline's own call, the same for every image, such as negative_prompt="blurry".

    Returns:
        The dataset, or the shard's part of it; `load` returns all.
    """
    ours: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance, "size": size, "batch_size": batch_size}
    ours |= {"keep_steps": keep_steps, "self_attention": self_attention, "options": options}
    generator = Generator.open(pipe, prompts, folder, labeller, shard=shard, classes=classes, **ours)
    mine = generator.indices(shard)
    files.clean(generator.folder, set(mine))
    done = len(mine) - len(generator.missing(mine))
    for _ in files.bar(generator.make(shard), "images", total=len(mine), initial=done):
        pass
    files.finish(generator.folder, generator.parts, len(prompts))
    manifest = files.manifest(generator.settings, generator.settings["prompts"])
    return Dataset(generator.folder, manifest.loc[mine])


@dataclass(frozen=True, eq=False)
class Generator:
    """A pipeline at work on one dataset, whose folder and settings were compared with it once."""

    pipe: Any
    folder: Path
    settings: dict[str, Any]  # what dataset.json says, or will once the first image is made
    labeller: Labeller | None
    parts: tuple[str, ...]  # what is made of every image
    drawn: tuple[str, ...]  # those of them that only a pass of the pipeline can make

    @classmethod
    def open(
        cls,
        pipe,
        prompts: Sequence[str],
        folder: str | Path,
        labeller: Labeller | None = None,
        *,
        shard: tuple[int, int] = (0, 1),
        classes: Classes | None = None,
        **options,
    ) -> "Generator":
        """Compare a dataset with its folder; arguments and errors are those of `generate`, nothing is written yet."""
        if not isinstance(shard, Sequence) or len(shard) != 2:
            raise TypeError(f"shard is (k, n) with 0 <= k < n, got {shard!r}")
        k, n = (files.whole_number(f"each number of shard={shard}", number, 0) for number in shard)
        if not k < n:
            raise ValueError(f"shard is (k, n) with 0 <= k < n, got {shard}")
        settings = generation_settings(pipe, prompts, **options)
        drawn = parts = ("images", "records") if settings["keep_steps"] else ("images",)
        given = getattr(labeller, "class_list", None) if classes is None else classes
        table = None if given is None else class_list(given)
        if labeller is not None:
            if hasattr(labeller, "require_model"):
                labeller.require_model(pipe)
            if hasattr(labeller, "settings"):
                settings["label_maps"] = labeller.settings
            settings["labels"] = [_source(labeller)]
            parts = (*drawn, "labels")
            drawn = parts if store_of(labeller) else drawn
        opened = cls(pipe, Path(folder), settings, labeller, parts, drawn)
        return replace(opened, settings=files.compare(opened.folder, settings, drawn, opened.indices(shard), table))

    @functools.cached_property
    def classes(self) -> ClassList:
        """The classes of the label maps."""
        return class_list(self.settings.get("classes"))

    @functools.cached_property
    def _started_folder(self) -> Path:
        """Folder with dataset.json, written with the first image: a call that can draw none leaves nothing."""
        files.begin(self.folder, self.settings)
        return self.folder

    def indices(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """Return the indices of a shard's images, see `generate`."""
        return [i for batch in self._batches(shard) for i in batch]

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Return those of the images that are still to be made."""
        return files.missing(self.folder, self.parts, indices)

    def make(self, shard: tuple[int, int] = (0, 1)) -> Iterator[int]:
        """Check the files of a shard that are there and make the others; yield an image's index when it has all."""
        files.verify(self.folder, self.settings, self.indices(shard))
        for batch in self._batches(shard):
            if self.missing(batch):
                yield from self._make(batch)

    def _batches(self, shard: tuple[int, int]) -> list[range]:
        n, size = self.settings["images"], self.settings["batch_size"]
        return [range(start, min(start + size, n)) for start in range(0, n, size)[shard[0] :: shard[1]]]

    def _make(self, batch: range) -> Iterator[int]:
        """Make what is missing of a batch; an image's own file is written last, as it says that the image is done."""
        prompts = [self.settings["prompts"][i] for i in batch]
        images, records = self._draw(batch, prompts)
        for i, prompt, image, record in zip(batch, prompts, images, records, strict=True):
            missing = [part for part in self.parts if files.missing(self.folder, [part], [i])]
            if not missing:
                continue
            made: dict[str, Any] = {}  # all of it before anything is written
            if "records" in missing and record is not None:
                made["records"] = _thinned(record, self.settings)
            if "labels" in missing and self.labeller is not None:
                read = record if store_of(self.labeller) else None
                made["labels"] = label_image(self.labeller, image, read, prompt, self.classes)
            if "images" in missing:
                made["images"] = image
            for part, content in made.items():
                path = self._started_folder / files.file_name(part, i)
                if part == "records":
                    path.parent.mkdir(exist_ok=True)
                    content.save(path)  # whole or not at all, too
                else:
                    files.write_png(path, content, files.mark(self.settings, i))
            yield i

    def _draw(self, batch: range, prompts: list[str]) -> tuple[list[np.ndarray], list[Any]]:
        """Return a batch's images and records; images that only need label maps are read, without records."""
        if not files.missing(self.folder, self.drawn, batch):
            images = [files.read_image(self.folder / files.file_name("images", i)) for i in batch]
            return images, [None] * len(images)
        store: Store = "queries" if self.settings["keep_steps"] else store_of(self.labeller)
        # a plain function may read anything of its record; of joint models there is no self-attention
        reads_all = self.labeller is not None and not hasattr(self.labeller, "store") and family_of(self.pipe) is None
        averaged = self.settings.get("self_attention") or getattr(self.labeller, "self_attention", reads_all)
        texts = {"texts": getattr(self.labeller, "texts", ())} if store == "maps" else {}
        seeds = [files.image_seed(self.settings, i) for i in batch]
        return draw(self.pipe, prompts, seeds, self.settings, store=store, self_attention=averaged, **texts)


def draw(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: dict[str, Any],
    store: Store | None = None,
    **stored: Any,
) -> tuple[list[np.ndarray], list[AttentionRecord] | list[None]]:
    """Return a batch of images, (H, W, 3) uint8, and with `store` their records; `stored` are arguments of `trace`."""
    height, width = settings["size"] or (None, None)
    with trace(pipe, store=store, **stored) if store else nullcontext() as traced, warnings.catch_warnings():
        # numpy's, of an image of NaN, which would be black
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            made = pipe(
                list(prompts),
                num_inference_steps=settings["steps"],
                guidance_scale=settings["guidance"],
                height=height,
                width=width,
                generator=generators(seeds),
                **{  # texts in a list, as the prompts are
                    name: [value] * len(prompts) if name.startswith(TEXTS) else value
                    for name, value in settings.get("options", {}).items()
                },
            )
        except RuntimeWarning as warning:
            raise ValueError(
                f"the image of {prompts[0]!r} has pixels that are no numbers (NaN): look at the guidance "
                f"({settings['guidance']}) and at the model's dtype ({settings.get('dtype')}), which may overflow"
            ) from warning
    if any(getattr(made, "nsfw_content_detected", None) or ()):
        log.warning("the safety checker has made an image black, of one of %s", list(prompts))
    images = [np.array(image.convert("RGB")) for image in made.images]
    shape = images[0].shape[:2]
    if height is not None and shape != (height, width):
        raise ValueError(f"{type(pipe).__name__} made {shape} pixels for size={(height, width)}: ask for that size")
    return images, [None] * len(images) if traced is None else list(traced)


def store_of(labeller: Labeller | None) -> Any:
    """Return what `trace` has to store for a labeller, None where it reads no record; a function may read anything."""
    return None if labeller is None else getattr(labeller, "store", "queries")


def _source(labeller: Labeller) -> str:
    """Return the source of label maps for dataset.json: the labeller's `source`, or its module and name."""
    function = getattr(labeller, "func", labeller)  # of a partial
    named = function if hasattr(function, "__qualname__") else type(function)
    return getattr(labeller, "source", f"{named.__module__}.{named.__qualname__}")


def _thinned(record: AttentionRecord, settings: dict[str, Any]) -> AttentionRecord:
    """Return the record of `keep_steps` steps, evenly spaced, in half precision, without what only a labeller reads."""
    passes, steps = len(record.timesteps), settings["keep_steps"]  # some schedulers make more passes than steps
    record = record.select(steps=sorted({int((j + 0.5) * passes / steps) for j in range(steps)}))
    attention = record.self_attention if settings.get("self_attention") else None
    if attention is not None and attention.queries is not None:  # in their place the mean over all steps and layers
        positions = torch.eye(attention.queries.shape[1], device=attention.queries.device)
        mean = attention.propagate(positions).T.contiguous()
        attention = replace(attention, queries=None, keys=None, mean=mean.half())
    return replace(record, layers=tuple(map(_halved, record.layers)), self_attention=attention)


def _halved(layer: Layer) -> Layer:
    assert layer.queries is not None
    queries = layer.queries.half() if layer.queries.dtype == torch.float32 else layer.queries
    if not queries.isfinite().all():
        raise ValueError(f"the queries of {layer.name} are beyond float16: generate with keep_steps=0")
    return replace(layer, queries=queries)


# -- everything that the bytes of an image depend on -------------------------------------------------------------


def generation_settings(
    pipe,
    prompts: Sequence[str],
    *,
    keep_steps: int = 0,
    self_attention: bool = False,
    options: Mapping[str, Any] | None = None,
    **numbers: Any,
) -> dict[str, Any]:
    """Return the settings of a generated dataset, by `generate`'s arguments; its errors."""
    check_prompts(prompts)
    numbers = check_numbers(**numbers)
    _require_drawable(pipe, numbers["steps"], numbers["size"])
    options = _checked_options(pipe, {name: value for name, value in (options or {}).items() if value is not None})
    keep_steps = files.whole_number("keep_steps", keep_steps, 0)
    if keep_steps > numbers["steps"]:
        raise ValueError(f"keep_steps must be 0 ... {numbers['steps']}, the number of steps, got {keep_steps}")
    if self_attention and not keep_steps:
        raise ValueError("self_attention is stored with records, of which there are none: it needs keep_steps > 0")
    device = pipe._execution_device
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    model = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    numbers["batch_size"] = numbers["batch_size"] or (1 if device.type == "cpu" else GPU_BATCH)
    return (
        files.common_settings("generated", len(prompts))
        | numbers
        | {
            "prompts": list(prompts),
            "keep_steps": keep_steps,
            "model": Path(model).name if Path(model).is_dir() else model,  # a path means nothing elsewhere
            "weights": weight_hash(pipe),
            "dtype": str(denoiser_of(pipe).dtype),
            "scheduler": type(pipe.scheduler).__name__,
            "scheduler_config": files.short_hash([json.dumps(config, sort_keys=True, default=str).encode()]),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
        }
        # only where given: older folders have neither and can be resumed
        | ({"self_attention": True} if self_attention else {})
        | ({"options": options} if options else {})
    )


def check_numbers(seed: Any, steps: Any, guidance: Any, size: Any, batch_size: Any, threads: Any = 1) -> dict[str, Any]:
    """Return numbers of `generate` as plain ints and floats, size as (height, width); `threads` is only checked.

    Raises TypeError or ValueError, naming the wrong one.
    """
    sides: Any = None
    if size is not None:
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if len(sides) != 2:
            raise ValueError(f"size is a side, or height and width, got {size}")
        sides = tuple(files.whole_number("each side of size", side, 1) for side in sides)
        if sides[0] * sides[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"size={sides} is more than the {Image.MAX_IMAGE_PIXELS} pixels that Pillow reads back")
    if isinstance(guidance, bool | str) or not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance!r}")
    files.whole_number("threads", threads, 1, MOST)
    return {
        "seed": files.whole_number("seed", seed, 0),
        "size": sides,
        "steps": files.whole_number("steps", steps, 1),
        "guidance": float(guidance),
        "batch_size": None if batch_size is None else files.whole_number("batch_size", batch_size, 1, MOST),
    }


def _require_drawable(pipe: Any, steps: int, size: tuple[int, int] | None) -> None:
    """Raise ValueError for steps and a size that the pipeline cannot draw."""
    most = getattr(pipe.scheduler.config, "num_train_timesteps", None)
    if most is not None and steps > most:
        raise ValueError(f"steps must be at most {most}, the timesteps that the model was trained with, got {steps}")
    cell = getattr(pipe, "vae_scale_factor", None)
    if size is not None and cell and (size[0] % cell or size[1] % cell):
        near = tuple(max(1, round(side / cell)) * cell for side in size)
        raise ValueError(f"the sides of size must be multiples of {cell} pixels, got {size}: the next is {near}")


def _checked_options(pipe: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pipeline's own options as dataset.json holds them. Raises TypeError or ValueError for bad ones."""
    known = inspect.signature(type(pipe).__call__).parameters
    for name, value in options.items():
        if name in OURS:
            instead = f"use {OURS[name]}=" if OURS[name] else "a dataset needs the pipeline's own"
            raise TypeError(f"{name} is not an option of generate: {instead}")
        if name not in known:
            close = get_close_matches(name, list(known), 3)
            hint = f": did you mean {' or '.join(close)}?" if close else ""
            raise TypeError(f"{type(pipe).__name__} takes no option {name!r}{hint}")
        if name.startswith(TEXTS) and not isinstance(value, str):
            raise TypeError(f"{name} is one text for all images, got {value!r}")
        plain = list(value) if isinstance(value, tuple) else value
        try:
            same = json.loads(json.dumps(plain, allow_nan=False)) == plain
        except (TypeError, ValueError):
            same = False
        if not same:
            raise TypeError(f"dataset.json cannot hold {name}={value!r}: expected a text, numbers, or a list of them")
    return dict(options)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise TypeError or ValueError unless they are strings, one or more."""
    one = isinstance(prompts, str) or not hasattr(prompts, "__len__")
    if one or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts must be a list of strings, one for each image: [prompt] * 4 makes four of one")
    for i, prompt in enumerate(prompts):
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"prompt {i}, {prompt!r}, has half of a surrogate pair, which no file can hold: remove it")
    if not len(prompts):
        raise ValueError("there are no prompts: expected one or more")
    if len(prompts) > files.MOST_IMAGES:
        raise ValueError(f"{len(prompts):,} prompts are too many for a folder: at most {files.MOST_IMAGES:,}")


def weight_hash(pipe) -> str:
    """Return the `short_hash` of the denoiser's, text encoders' and VAE's weights as they are loaded."""
    return files.short_hash(_weights(pipe))


def _weights(pipe) -> Iterator[Any]:
    """Yield each tensor's name, and then its memory."""
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", *DENOISERS, "vae"):
        module = getattr(pipe, part, None)
        state = {} if module is None else module.state_dict()
        if any(tensor.is_meta for tensor in state.values()):  # after `enable_sequential_cpu_offload`
            from accelerate.utils.modeling import get_state_dict_offloaded_model

            state = get_state_dict_offloaded_model(module)
        for name, tensor in sorted(state.items()):
            yield f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
