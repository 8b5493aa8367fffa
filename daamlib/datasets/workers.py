"""Datasets of any size: shards that are made in this process, in several of this machine, or with Ray.

Every worker loads the model once and makes shards as `generate(..., shard=(k, n))` does, so any number of workers or
machines gives the same files. A worker that dies is replaced, and what is missing of its shard is made.
"""

import logging
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..classes import Classes
from ..extras import needs
from ..pipeline import cpu_threads, load_pipeline
from ..tokens.label_maps import Threshold
from ..tokens.token import OptimizedToken
from . import folder as files
from .dataset import Dataset, load
from .generation import Generator, check_numbers, check_prompts
from .labelling import TokenLabeller

log = logging.getLogger("daamlib")

NUMBERS = ("seed", "steps", "guidance", "size", "batch_size")  # `generate`'s arguments of these names
MOST_WORKERS = 1024  # more is a mistake
SHARD = 8  # images; small, as the bar moves by shards and to hand one over takes milliseconds
DEATHS = 3  # of workers in a row, with no shard finished between them, that end a run
PAUSES = (1, 10)  # s before a shard is tried again after an OSError, such as one of the network
WRONG = (ValueError, TypeError, OSError)  # would come again in any worker: settings, a missing file, a full disk

Shard = tuple[int, int]


class WorkerError(RuntimeError):
    """Workers died again and again."""


@dataclass(frozen=True)
class Job:
    """One dataset to make: `generate`'s arguments, with the places of a model and of tokens instead of themselves.

        job = Job("dataset", ["a car"] * 8, tokens=["car-token.safetensors"], steps=2)
        dataset = run_shards(job)

    Paths are made absolute. `python -m daamlib.generate` has an option for each attribute, with these lines as help.

    Attributes:
        folder: of the dataset; with Ray on several machines on a shared file system.
        prompts: one for each image.
        tokens: files of optimised tokens, whose `TokenLabeller` makes label maps; the command has its own.
        model: id or folder of a diffusers pipeline; by default the bundled model.
        device: such as cpu, cuda, cuda:1; by default a GPU if there is one.
        seed: of the noise.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        size: of the images in pixels, a side, or height and width; by default the model's.
        batch_size: images denoised at once, on which the bytes depend; by default 1, on a GPU 4.
        threshold: probability from which on a pixel is of a class, by default 0.6; one number, or one for every class.
        ignore_from: probability from which on it is ignored (255), and below it 0; by default 0.4.
        margin: a pixel whose best two probabilities differ by less is ignored; by default 0.1 with `fit_classes`.
        named_only: whether a pixel is only of classes that its prompt names, which --all-classes switches off.
        iterations: of the refinement along the self-attention; 0 for none.
        edge_aware: whether label maps follow the edges of their image.
        ids: of the tokens' classes, or the name of a class list.
        options: of the pipeline's own call, such as negative_prompt=blurry.
        threads: of each worker on a CPU, on which the bytes depend.

    Raises TypeError or ValueError for what needs no model to be seen wrong, FileNotFoundError for missing tokens.
    """

    folder: str | Path
    prompts: Sequence[str]
    tokens: Sequence[str | Path] = ()
    model: str | None = None
    device: str | None = None
    seed: int = 0
    steps: int = 25
    guidance: float = 5.0
    size: int | tuple[int, int] | None = None
    batch_size: int | None = None
    threshold: Threshold | None = None
    ignore_from: Threshold | None = None
    margin: float | None = None
    named_only: bool = True
    iterations: int = 1
    edge_aware: bool = False
    ids: Classes | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        check_numbers(**{name: getattr(self, name) for name in (*NUMBERS, "threads")})
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise ValueError(f"{self.device!r} is no device: expected cpu, cuda, cuda:1 or mps") from error
        absolute: dict[str, Any] = {
            "folder": str(Path(self.folder).resolve()),
            "tokens": tuple(str(Path(path).resolve()) for path in self.tokens),
        }
        if self.model is not None and Path(self.model).is_dir():
            absolute["model"] = str(Path(self.model).resolve())
        vars(self).update(absolute)  # the dataclass is frozen
        self.labeller()

    def labeller(self) -> TokenLabeller | None:
        """Return the labeller of the images, None without tokens."""
        tokens = tuple(OptimizedToken.load(path) for path in self.tokens)
        names = ("threshold", "ignore_from", "margin", "named_only", "iterations", "edge_aware", "ids")
        given = {name: getattr(self, name) for name in names if getattr(self, name) != getattr(Job, name)}
        return TokenLabeller.of(tokens, **given) if tokens else None

    def open(self, device: str | None = None) -> Generator:
        """Load the model and the tokens. Raises what `generate` raises."""
        options = {name: getattr(self, name) for name in (*NUMBERS, "options")}
        device, gpus = device or self.device, torch.cuda.device_count()
        place = torch.device(device or "cpu")
        if place.type == "cuda" and (place.index or 0) >= gpus:
            raise ValueError(f"there is no device {device!r} on this machine, which has {gpus} GPUs")
        pipe = load_pipeline(self.model, device=device)
        return Generator.open(pipe, self.prompts, self.folder, self.labeller(), **options)

    @property
    def parts(self) -> list[str]:
        """Parts that every image must have."""
        return ["images"] + ["labels"] * bool(self.tokens)

    def missing(self) -> list[int]:
        """Return the indices of the images that are still to be made."""
        return files.missing(Path(self.folder), self.parts, range(len(self.prompts)))


class Worker:
    """Makes shards of a job; loads the model with the first, and again after an error."""

    def __init__(self, job: Job, device: str | None = None, *, expendable: bool = True):
        """expendable: it is alone in its process, and ends it after an error that may have spoilt the device."""
        self._job, self._device, self._expendable = job, device, expendable
        self._generator: Generator | None = None

    def make(self, shard: Shard) -> int:
        """Make what is missing of a shard; return the number of images. After an OSError it is tried again, twice."""
        for pause in (*PAUSES, None):
            try:
                torch.set_num_threads(self._job.threads)
                self._generator = self._generator or self._job.open(self._device)
                return sum(1 for _ in self._generator.make(shard))
            except WRONG as error:
                if pause is None or not isinstance(error, OSError):
                    # by its plain type: those of libraries do not all survive pickling
                    raise next(kind for kind in WRONG if isinstance(error, kind))(str(error)) from error
                log.warning("%s: %s. Tried again in %d s", type(error).__name__, error, pause)
                self._generator = None
                time.sleep(pause)
            except RuntimeError:  # of CUDA, say
                if not self._expendable:
                    raise
                traceback.print_exc()
                os._exit(1)
        raise AssertionError("the last try returns or raises")


def run_shards(
    job: Job, *, workers: int | None = None, ray: bool = False, address: str | None = None, shard_size: int = SHARD
) -> Dataset:
    """Make the dataset of a job, on this machine or with Ray; what is there already stays.

        dataset = run_shards(Job("dataset", ["a car", "a person"], steps=2, size=64))

    Shows a bar with the throughput of all workers, not under CI.

    Args:
        job: what to make.
        workers: None: this process alone, or with Ray as many as the cluster has room for. More than one without Ray
            are processes of this machine, so a script calls this under `if __name__ == "__main__":`; with several GPUs
            they take turns.
        ray: one Ray actor a GPU, or `job.threads` CPU cores. A Ray that the caller has initialised is used as it is.
        address: of a Ray cluster; None: one of this machine, for as long as this runs.
        shard_size: images that a worker is given at a time.

    Returns:
        The complete dataset.

    Raises:
        ValueError: for numbers that do not fit, and as `generate`; TypeError and OSError likewise.
        ImportError: without Ray.
        ConnectionError: without a cluster at the address.
        WorkerError: if three workers in a row died.
    """
    if workers is not None:
        workers = files.whole_number("workers", workers, 1, MOST_WORKERS)
    shard_size = files.whole_number("the shard size", shard_size, 1)
    if address and not ray:
        raise ValueError("an address is that of a Ray cluster: ask for Ray too")
    n, folder = len(job.prompts), Path(job.folder)
    count = -(-n // shard_size)
    if ray:
        made = _with_ray(job, count, workers, address)
    elif workers is None or workers == 1:
        made = _in_this_process(job)
    else:
        made = _in_processes(job, count, workers)
    # what was there already is at the bar's beginning: its rate is that of the others
    with files.bar(None, "images", total=n, initial=n - len(job.missing()), unit="image", smoothing=0.05) as progress:
        for images in made:
            progress.update(images)
    files.clean(folder, range(n))
    files.finish(folder, job.parts, n)
    return load(folder, verify=False)  # the workers have read what they did not write


def _in_this_process(job: Job) -> Iterator[int]:
    worker, n = Worker(job, expendable=False), len(job.prompts)
    with cpu_threads(job.threads):
        yield from (worker.make((k, n)) for k in range(n))


# -- processes of this machine -----------------------------------------------------------------------------------

_worker: Worker  # of a process of the pool


def _in_processes(job: Job, count: int, workers: int) -> Iterator[int]:
    """Yield the number of images made of each shard, by processes that start afresh; replace a broken pool."""
    context, todo, deaths = multiprocessing.get_context("spawn"), set(range(count)), 0
    while todo:
        number = context.Value("i")
        pool = ProcessPoolExecutor(min(workers, len(todo)), context, _begin, (job, number))
        try:
            futures = {pool.submit(_make, (k, count)): k for k in sorted(todo)}
            for future in as_completed(futures):
                yield future.result()
                todo.remove(futures[future])
                deaths = 0
        except RuntimeError as error:  # a broken pool
            deaths += 1
            if deaths == DEATHS:
                raise WorkerError(f"{DEATHS} workers died one after the other; what they said stands above") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(job: Job, number: Any) -> None:
    """Set up a process of the pool; number: the shared count of them."""
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gpus = torch.cuda.device_count() if job.device in (None, "cuda") else 0
    with number.get_lock():
        device = f"cuda:{number.value % gpus}" if gpus > 1 else None
        number.value += 1
    _worker = Worker(job, device)


def _end_with_parent() -> None:
    """End this process with its parent: a killed driver would leave it waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(shard: Shard) -> int:
    return _worker.make(shard)


# -- Ray ---------------------------------------------------------------------------------------------------------


def _with_ray(job: Job, count: int, workers: int | None, address: str | None) -> Iterator[int]:
    """Yield the number of images made of each shard, by actors that Ray replaces and whose shards it tries again."""
    with needs("ray"):
        import ray
        from ray.util import ActorPool
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local = {"address": "local", "include_dashboard": False, "object_store_memory": 2**27}  # it keeps the job alone
        try:
            ray.init(**({"address": address} if address else local), logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            raise ConnectionError(
                f"no Ray cluster answers at {address}: {error}. One that asks for a token, as Ray does from 2.61 on, "
                "wants RAY_AUTH_MODE=token here and the token that `ray get-auth-token` shows there"
            ) from error
    actors: list[Any] = []
    try:
        gpus, cores = (int(ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU"))
        on_gpus = gpus > 0 and job.device in (None, "cuda")
        room = gpus if on_gpus else cores // job.threads
        size = room if workers is None else workers
        if not 1 <= size <= room:
            each = f"each takes {'a GPU' if on_gpus else f'{job.threads} CPU cores (--threads)'}"
            has = f"the cluster has {gpus} GPUs and {cores} CPU cores"
            raise ValueError(f"there is room for {room} workers, asked for {size}: {has}, {each}")
        takes = {"num_gpus": 1, "num_cpus": 1} if on_gpus else {"num_gpus": 0, "num_cpus": job.threads}
        actor = ray.remote(Worker).options(**takes, max_restarts=-1, max_task_retries=DEATHS - 1)
        place = ray.put(job)
        actors = [actor.remote(place) for _ in range(min(size, count))]
        shards = [(k, count) for k in range(count)]
        yield from ActorPool(actors).map_unordered(lambda worker, shard: worker.make.remote(shard), shards)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # of the worker
    except ray.exceptions.RayError as error:
        raise WorkerError(f"{DEATHS} workers died over the same images: {error}") from error
    finally:
        for worker in actors:
            ray.kill(worker)
        if ours:
            ray.shutdown()
