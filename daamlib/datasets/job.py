"""What `daamlib.generate` makes, in a form that goes to other processes, and how one of them makes a part of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..attention.trace import trace
from ..pipeline import cpu_threads, load_pipeline
from ..tokens.token import OptimizedToken
from . import folder as files
from .dataset import Dataset
from .drawing import check_prompts, draw, generation_settings
from .labelling import Reader, Threshold

SOURCE = "daamlib.generate"  # of the label maps, in dataset.json


@dataclass(frozen=True)
class Job:
    """One dataset to make: `generate_labelled`'s arguments, with a model's and tokens' places instead of themselves.

    model, device: as for `load_pipeline`. tokens: paths. threads: of PyTorch on the CPU, in each worker; the bytes of
    a dataset depend on it (see `datasets.generate`), those of a dataset made on a GPU do not. Paths are taken from
    the current folder, so they are made absolute for processes that have another.

    Raises TypeError or ValueError for what needs no model to be seen wrong, FileNotFoundError for missing tokens.
    """

    folder: str | Path
    prompts: tuple[str, ...]
    tokens: tuple[str | Path, ...] = ()
    model: str | None = None
    device: str | None = None
    seed: int = 0
    steps: int = 25
    guidance: float = 5.0
    size: int | tuple[int, int] | None = None
    sure: Threshold = 0.6
    unsure: Threshold = 0.4
    named_only: bool = True
    threads: int = 1

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        for name, lowest in (("seed", 0), ("steps", 1), ("threads", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be {lowest} or more, got {getattr(self, name)}")
        absolute: dict[str, Any] = {
            "folder": str(Path(self.folder).resolve()),
            "prompts": tuple(self.prompts),
            "tokens": tuple(str(Path(path).resolve()) for path in self.tokens),
        }
        if self.model is not None and Path(self.model).is_dir():
            absolute["model"] = str(Path(self.model).resolve())
        for name, value in absolute.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        self.reader()

    def reader(self) -> Reader | None:
        """What labels the images, None without tokens."""
        tokens = tuple(OptimizedToken.load(path) for path in self.tokens)
        return Reader(tokens, self.sure, self.unsure, self.named_only) if tokens else None

    def open(self, device: str | None = None) -> "Maker":
        """Load the model and the tokens. Raises ValueError if they are not of one another."""
        pipe = load_pipeline(self.model, device=device or self.device)
        options = {"seed": self.seed, "steps": self.steps, "guidance": self.guidance, "size": self.size}
        return Maker(pipe, self.prompts, self.folder, self.reader(), **options)

    def missing(self) -> list[int]:
        """The images that are still to be made."""
        return _missing(Path(self.folder), range(len(self.prompts)), bool(self.tokens))


def _missing(folder: Path, indices: range, labelled: bool) -> list[int]:
    """Those of the images of which a file is not there."""
    parts = ["images"] + ["labels"] * labelled
    return sorted({i for part in parts for i in files.missing(folder, part, indices)})


class Maker:
    """A loaded model that makes images of one dataset, with their label maps."""

    def __init__(self, pipe, prompts: Sequence[str], folder: str | Path, reader: Reader | None, **options):
        """options: seed, steps, guidance, size. Raises what `generation_settings` and `Reader.require_model` raise."""
        self.pipe, self.folder, self.reader = pipe, Path(folder), reader
        settings = generation_settings(pipe, prompts, **options, keep_steps=0)
        if reader is not None:
            reader.require_model(pipe)
            settings |= {"labels": [SOURCE], "label_maps": reader.settings()}
        self.settings, self._begun = settings, False

    def missing(self, indices: range) -> list[int]:
        """Those of the images that are still to be made."""
        return _missing(self.folder, indices, self.reader is not None)

    def make(self, indices: range) -> Iterator[int]:
        """Make those of the images that are not there, whole or not at all; yields each index when its files are.

        Raises ValueError, before anything is made, if the folder was begun with other settings.
        """
        if not self._begun:  # once: it looks through the folder, a second at 100,000 images
            self.settings, _ = files.start(self.folder, self.settings, indices)
            self._begun = True
        for i in self.missing(indices):
            self._make(i)
            yield i

    def _make(self, i: int) -> None:
        """The label map first: an image is done when its file is there. A map that is there stays as it is."""
        tracing = nullcontext() if self.reader is None else trace(self.pipe, store=self.reader.store)
        with tracing as tracer, torch.no_grad():
            image, _ = draw(self.pipe, self.settings["prompts"][i], files.image_seed(self.settings, i), self.settings)
        labels = self.folder / files.file_name("labels", i)
        if tracer is not None and not labels.is_file():
            with torch.no_grad():
                files.write_png(labels, self.reader(tracer[0], image.size[::-1]))
        files.write_png(self.folder / files.file_name("images", i), image)


def finish(folder: Path) -> Dataset:
    """The complete dataset: its manifest is written, what killed workers left half-written is removed.

    Nobody may be at work in the folder. Raises RuntimeError if an image is missing.
    """
    settings = files.read_settings(folder)
    settings, todo = files.start(folder, settings, range(settings["images"]))
    if todo:
        raise RuntimeError(f"{folder} lacks {len(todo)} images, such as {todo[0]}, that were made: who removed them?")
    files.write_manifest(folder, settings, settings["prompts"])
    return Dataset(folder, files.read_manifest(folder))


def shards_of(n: int, size: int) -> list[range]:
    """The indices of n images in ranges of `size`, the last may be shorter. ValueError for a size below 1."""
    if size < 1:
        raise ValueError(f"the shard size must be 1 or more, got {size}")
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def make_here(job: Job, shards: Sequence[range], done: Callable[[int], None]) -> None:
    """Make the shards in this process; `done(1)` after each image."""
    with cpu_threads(job.threads):
        maker = job.open()
        for shard in shards:
            for _ in maker.make(shard):
                done(1)
