"""The one generator of datasets: images, and with a labeller their label maps, whole or not at all."""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..attention.calls import Store
from ..attention.layers import Layer
from ..attention.record import AttentionRecord
from ..attention.self_attention import SelfAttention
from ..pipeline import DENOISERS, denoiser_of, generators
from ..tracing import trace
from . import folder as files
from .dataset import Dataset
from .labelling import Labeller, label_image
from .progress import bar

GPU_BATCH = 4  # images; what fits beside their attention at 1024 px


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
) -> Dataset:
    """Generate one image a prompt into a folder; what is there already, made the same way, is kept.

    The noise of an image is drawn on the CPU from the seed and its index. Batches are those of the whole dataset,
    however it is sharded or resumed: images 0 ... batch_size - 1, and so on; one that was killed is drawn anew, and
    what lacks is written. So the bytes of an image depend on neither. They do depend, by single pixels and one level,
    on what rounds its matrix products: `batch_size`, the device, the number of CPU threads, the versions. Those, too,
    are the same as long as there is something to be drawn. (On a CPU batches gain nothing: 3 % in time with the bundled
    model. On a GPU the bytes are as repeatable as its kernels are, see `torch.use_deterministic_algorithms`.)

    Args:
        pipe: a Stable Diffusion pipeline.
        prompts: one for each image.
        folder: a new one, or one to go on in. It can be killed at any moment, and the same call goes on.
        labeller: makes the label map of each image, see `daamlib.datasets.labelling`; None: images alone. With a
            labeller that reads no record, images that are there are labelled as they are. A label map that is there
            stays, as one that a person corrected (`import_masks`).
        seed: of the noise.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        size: of the images in pixels, a side or (height, width); None: the model's own.
        batch_size: images that are denoised at once; None: 1 on a CPU, 4 elsewhere.
        shard: (k, n) makes every n-th batch from the k-th on, so that n processes fill one folder.
        keep_steps: keep so many steps, evenly spaced, of each image's attention record, queries in float16.
        self_attention: keep with each record what `record.refine` needs: of all late steps the mean, in float16, 2.1 MB
            an image at 32 x 32 positions.

    Returns:
        The dataset, or the shard's part of it; `load` returns all.

    Raises:
        TypeError: for prompts that are no list of strings.
        ValueError: for other arguments that do not fit, a labeller of another model, a label map that is none, and,
            naming the differences, a folder that was begun with other prompts, settings or weights.
    """
    k, n = shard
    if not 0 <= k < n:
        raise ValueError(f"shard is (k, n) with 0 <= k < n, got {shard}")
    options = {"seed": seed, "steps": steps, "guidance": guidance, "size": size, "batch_size": batch_size}
    kept = {"keep_steps": keep_steps, "self_attention": self_attention}
    generator = Generator.open(pipe, prompts, folder, labeller, shard=shard, **kept, **options)
    mine = generator.indices(shard)
    files.clean(generator.folder, set(mine))
    with bar(None, "images", total=len(mine), initial=len(mine) - len(generator.missing(mine))) as progress:
        for _ in generator.make(shard):
            progress.update()
    settings = generator.settings
    if not generator.missing(range(len(prompts))):
        files.write_manifest(generator.folder, settings, settings["prompts"])
    return Dataset(generator.folder, files.manifest(settings, settings["prompts"]).loc[mine])


@dataclass(frozen=True, eq=False)
class Generator:
    """A pipeline at work on one dataset, whose folder and settings were compared with it once.

    Attributes:
        pipe: the pipeline.
        folder: of the dataset.
        settings: what dataset.json says.
        labeller: as of `generate`.
        parts: what is made of every image.
        drawn: those of them that only a pass of the pipeline can make.
    """

    pipe: Any
    folder: Path
    settings: dict[str, Any]
    labeller: Labeller | None
    parts: tuple[str, ...]
    drawn: tuple[str, ...]

    @classmethod
    def open(
        cls,
        pipe,
        prompts: Sequence[str],
        folder: str | Path,
        labeller: Labeller | None = None,
        *,
        shard: tuple[int, int] = (0, 1),
        **options,
    ) -> "Generator":
        """Begin a dataset or go on with it; arguments and errors are those of `generate`, nothing is drawn yet."""
        settings = generation_settings(pipe, prompts, **options)
        drawn = parts = ("images", "records") if settings["keep_steps"] else ("images",)
        if labeller is not None:
            if hasattr(labeller, "require_model"):
                labeller.require_model(pipe)
            if hasattr(labeller, "settings"):
                settings["label_maps"] = labeller.settings
            settings["labels"] = [_source(labeller)]
            parts = (*drawn, "labels")
            drawn = parts if getattr(labeller, "store", None) else drawn
        begun = cls(pipe, Path(folder), settings, labeller, parts, drawn)
        mine = begun.indices(shard)
        there = files.start(begun.folder, settings, drawn, mine)
        if labeller is not None and begun.missing(mine):  # noted first: who is killed while labelling comes back here
            files.add_label_source(begun.folder, *settings["labels"])
        return replace(begun, settings=there)

    def indices(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """The indices of a shard's images, see `generate`."""
        return [i for batch in self._batches(shard) for i in batch]

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those of the images that are still to be made."""
        return files.missing(self.folder, self.parts, indices)

    def make(self, shard: tuple[int, int] = (0, 1)) -> Iterator[int]:
        """Make what is not there of a shard; yields an image's index when all its files are."""
        for batch in self._batches(shard):
            if self.missing(batch):
                yield from self._make(batch)

    def _batches(self, shard: tuple[int, int]) -> list[range]:
        n, size = self.settings["images"], self.settings["batch_size"]
        return [range(start, min(start + size, n)) for start in range(0, n, size)[shard[0] :: shard[1]]]

    def _make(self, batch: range) -> Iterator[int]:
        """An image is done when its file is there, so that is written last; files that are there stay as they are."""
        prompts, keep_steps = [self.settings["prompts"][i] for i in batch], self.settings["keep_steps"]
        keep_self = self.settings.get("self_attention", False)
        store = getattr(self.labeller, "store", None)
        keep: dict[str, Any] = {"store": "queries" if keep_steps else store}
        keep["self_attention"] = keep_self or getattr(self.labeller, "self_attention", False)
        if keep["store"] == "maps":
            keep["texts"] = getattr(self.labeller, "texts", ())
        if files.missing(self.folder, self.drawn, batch):
            seeds = [files.image_seed(self.settings, i) for i in batch]
            images, records = draw(self.pipe, prompts, seeds, self.settings, **keep)
        else:
            images = [files.read_png(self.folder / files.file_name("images", i)) for i in batch]
            records = [None] * len(images)
        for i, prompt, image, record in zip(batch, prompts, images, records, strict=True):
            lacking = [part for part in self.parts if files.missing(self.folder, [part], [i])]
            paths = {part: self.folder / files.file_name(part, i) for part in self.parts}
            if "records" in lacking and record is not None:
                paths["records"].parent.mkdir(exist_ok=True)
                _thinned(record, keep_steps, keep_self).save(paths["records"])  # whole or not at all, too
            if "labels" in lacking and self.labeller is not None:
                files.write_png(paths["labels"], label_image(self.labeller, image, record if store else None, prompt))
            if "images" in lacking:
                files.write_png(paths["images"], image)
            if lacking:
                yield i


def draw(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: dict[str, Any],
    store: Store | None = None,
    **keep: Any,
) -> tuple[list[np.ndarray], list[AttentionRecord] | list[None]]:
    """One batch of images, (H, W, 3) uint8, and with `store` their records; `keep` are more arguments of `trace`."""
    height, width = settings["size"] or (None, None)
    with trace(pipe, store=store, **keep) if store else nullcontext() as traced:
        images = pipe(
            list(prompts),
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            height=height,
            width=width,
            generator=generators(seeds),
        ).images
    return [np.array(image) for image in images], [None] * len(images) if traced is None else list(traced)


def _source(labeller: Labeller) -> str:
    """What dataset.json says that label maps come from: the labeller's `source`, or its module and name."""
    function = getattr(labeller, "func", labeller)  # of a partial
    named = function if hasattr(function, "__qualname__") else type(function)
    return getattr(labeller, "source", f"{named.__module__}.{named.__qualname__}")


def _thinned(record: AttentionRecord, keep_steps: int, keep_self: bool) -> AttentionRecord:
    """The record of so many steps, evenly spaced, in half precision; what a labeller asked for goes."""
    passes = len(record.timesteps)  # of some schedulers more than steps
    record = record.select(steps=[int((j + 0.5) * passes / keep_steps) for j in range(keep_steps)])
    beside = _averaged(record.self_attention) if keep_self and record.self_attention is not None else None
    return replace(record, layers=tuple(_halved(layer) for layer in record.layers), self_attention=beside)


def _averaged(attention: SelfAttention) -> SelfAttention:
    """The same with the mean of all its steps and layers in float16, in place of their queries and keys."""
    assert attention.queries is not None  # a record with `keep_steps` holds queries, and so does its self-attention
    positions = torch.eye(attention.queries.shape[1], device=attention.queries.device)
    mean = attention.propagate(positions).T.contiguous()
    return replace(attention, queries=None, keys=None, mean=mean.half())


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
    seed: int = 0,
    steps: int = 25,
    guidance: float = 5.0,
    size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    keep_steps: int = 0,
    self_attention: bool = False,
) -> dict[str, Any]:
    """The settings of a generated dataset, by `generate`'s arguments; its errors."""
    check_prompts(prompts)
    if not 0 <= keep_steps <= steps:
        raise ValueError(f"keep_steps must be 0 ... {steps}, the number of steps, got {keep_steps}")
    if self_attention and not keep_steps:
        raise ValueError("self_attention is kept with records, of which there are none: it needs keep_steps > 0")
    device = pipe._execution_device
    batch_size = (1 if device.type == "cpu" else GPU_BATCH) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    model = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
    size = (size, size) if isinstance(size, int) else size
    return (
        files.common_settings("generated", len(prompts), seed, size)
        | {
            "prompts": list(prompts),
            "steps": steps,
            "guidance": float(guidance),
            "keep_steps": keep_steps,
            "batch_size": batch_size,
            "model": Path(model).name if Path(model).is_dir() else model,  # a path means nothing elsewhere
            "weights": weight_hash(pipe),
            "dtype": str(denoiser_of(pipe).dtype),
            "scheduler": type(pipe.scheduler).__name__,
            "scheduler_config": files.short_hash([json.dumps(config, sort_keys=True, default=str).encode()]),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
        }
        | ({"self_attention": True} if self_attention else {})  # folders that were begun without it go on
    )


def check_prompts(prompts: Sequence[str]) -> None:
    """TypeError or ValueError unless they are strings, one or more."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts must be a list of strings, one for each image: [prompt] * 4 makes four of one")
    if not prompts:
        raise ValueError("there are no prompts: expected one or more")


def weight_hash(pipe) -> str:
    """The `short_hash` of the denoiser's, text encoders' and VAE's weights as they are loaded."""
    return files.short_hash(_weights(pipe))


def _weights(pipe) -> Iterator[Any]:
    """Each tensor's name, and then its memory."""
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", *DENOISERS, "vae"):
        module = getattr(pipe, part, None)
        for name, tensor in sorted(_state(module).items()) if module is not None else ():
            yield f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name; those that `enable_sequential_cpu_offload` has taken away, from where they wait."""
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model  # without it no weight could be on `meta`

        state = get_state_dict_offloaded_model(module)
    return state
