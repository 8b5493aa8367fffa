"""Datasets of any size, images with the label maps that optimised tokens read: ``python -m daamlib.generate``.

    python -m daamlib.generate dataset --n 1000 --tokens car.safetensors person.safetensors --workers 2
    python -m daamlib.generate dataset --n 100000 --tokens *.safetensors --model MODEL --ray --address ADDRESS

Every image's noise is drawn from (seed, index), so any number of workers, of processes or of machines gives the same
files. They make shards, ranges of indices; a worker that dies is replaced, and what it had not finished is made by
another. A run that is stopped or killed goes on by the same command: what is there is skipped.

With Ray every worker, and this process, sees the folder, the tokens and a model's folder under the same paths: on a
cluster of several machines they lie on a shared file system. daamlib is installed on all of them.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from ..pipeline import cpu_threads
from ..tokens.token import OptimizedToken
from .build import urban_prompts
from .dataset import Dataset
from .job import Job as Job
from .job import Maker, finish, make_here, shards_of
from .labelling import Reader, Threshold
from .labelling import label_map as label_map
from .ray_pool import Actors
from .workers import Processes, spread
from .workers import WorkerError as WorkerError

SHARD = 8  # images; small, as the bar moves by shards and to hand one over takes milliseconds


def generate_labelled(
    pipe,
    prompts: Sequence[str],
    folder: str | Path,
    tokens: Sequence[OptimizedToken],
    *,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 5.0,
    size: int | tuple[int, int] | None = None,
    sure: Threshold = 0.6,
    unsure: Threshold = 0.4,
    named_only: bool = True,
) -> Dataset:
    """Generate one image a prompt into `folder`, each with the label map that the tokens read while it is generated.

    The other arguments are those of `datasets.generate`, and the images are the same. tokens: of this model, one for
    each class, their words named as in `daamlib.cityscapes`; no token: images without label maps. A pixel of the
    label map is the Cityscapes id of the most probable class where its probability is `sure` or more; 255, uncertain
    and to be ignored, where it is `unsure` or more; 0 (unlabeled: none of the classes) elsewhere. Either is a number or
    {class name: number}. named_only: an image's classes are those that its prompt names.

    Probabilities are up-sampled to the image, bilinear. LDAAM tokens need memory that does not grow with the steps,
    DAAM tokens the queries of every step. Resumed and refused as by `datasets.generate`; a label map that is there
    stays, as one that a person corrected (`datasets.import_masks`). Raises TypeError or ValueError for other arguments,
    before anything is generated.
    """
    reader = Reader(tuple(tokens), sure, unsure, named_only) if tokens else None
    maker = Maker(pipe, prompts, folder, reader, seed=seed, steps=steps, guidance=guidance, size=size)
    everything = range(len(prompts))
    with _bar(len(prompts), len(maker.missing(everything))) as bar:
        for _ in maker.make(everything):
            bar.update()
    return finish(Path(folder))


def run(
    job: Job, *, workers: int | None = None, ray: bool = False, address: str | None = None, shard_size: int = SHARD
) -> Dataset:
    """Make the dataset of a job, on this machine or with Ray; what is there already is kept. Returns the dataset.

    workers: None: this process alone, or with Ray as many as the cluster has room for. More than one without Ray are
    processes of this machine, so a script calls this under `if __name__ == "__main__":`. ray, address: one Ray actor a
    GPU, or `job.threads` CPU cores; address: of a cluster, None: of this machine. shard_size: images that a worker is
    handed at a time.

    Shows a bar with the throughput of all workers, not under CI. Raises what a worker finds wrong (ValueError: the
    folder was begun with other settings, a token is of another model), ImportError without Ray, ValueError for numbers
    that do not fit, and `WorkerError` if three workers died over the same images.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"expected one worker or more, got {workers}")
    if address and not ray:
        raise ValueError("an address is that of a Ray cluster: ask for Ray too")
    shards = shards_of(len(job.prompts), shard_size)
    todo = set(job.missing())
    # of a finished dataset one shard is looked at, which compares the settings and weights with those that made it
    shards = [shard for shard in shards if not todo.isdisjoint(shard)] or shards[:1]
    with _bar(len(job.prompts), len(todo)) as bar:
        if ray:
            spread(shards, Actors(job, workers, address), bar.update)
        elif workers is None or workers == 1:
            make_here(job, shards, bar.update)
        else:
            spread(shards, Processes(job, workers), bar.update)
    return finish(Path(job.folder))


def _bar(images: int, todo: int) -> tqdm:
    """All images, those there already at its beginning: its rate is that of the others."""
    hidden = "CI" in os.environ
    return tqdm(desc="images", total=images, initial=images - todo, unit="image", smoothing=0.05, disable=hidden)


def seconds_per_image(job: Job, images: int = 3) -> float:
    """Wall-clock seconds that this process takes for an image of the job, label map and files included.

    The mean of `images` after one to warm up, made in a temporary folder. Neither loading the model nor what other
    workers on the same machine take from one another is in it.
    """
    prompts = [job.prompts[i % len(job.prompts)] for i in range(images + 1)]
    with tempfile.TemporaryDirectory() as folder, cpu_threads(job.threads):
        maker = replace(job, folder=folder, prompts=tuple(prompts)).open()
        list(maker.make(range(1)))
        start = time.perf_counter()
        list(maker.make(range(1, images + 1)))
        return (time.perf_counter() - start) / images


def hours(images: int, seconds: float, workers: int) -> float:
    """What `images` take at `seconds` an image on `workers` that do not slow each other down."""
    return images * seconds / (workers * 3600)


def read_prompts(path: Path, n: int | None) -> tuple[str, ...]:
    """`n` prompts of a text file, one a line, without the empty ones; from the first again where n is more.

    n=None: all. Raises ValueError for a file without a prompt, FileNotFoundError without the file.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} has no prompts: expected one a line")
    return tuple(prompts[i % len(prompts)] for i in range(len(prompts) if n is None else n))


def _threshold(texts: Sequence[str]) -> Threshold:
    """0.6, or car=0.6 person=0.5. Raises ValueError for anything else."""
    try:
        if len(texts) == 1 and "=" not in texts[0]:
            return float(texts[0])
        return {name: float(number) for name, number in (text.rsplit("=", 1) for text in texts)}
    except ValueError as error:
        raise ValueError(f"a threshold is a number, or CLASS=NUMBER for every class, got {' '.join(texts)}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m daamlib.generate", description="Generate images with the label maps of optimised tokens."
    )
    add = parser.add_argument
    add("folder", type=Path, help="of the dataset; with Ray on several machines on a shared file system")
    add("--n", type=int, help="images (default: one for each line of --prompts)")
    add("--prompts", type=Path, metavar="FILE", help="one a line (default: of data/prompts/urban.json)")
    add("--tokens", type=Path, nargs="+", default=[], metavar="FILE", help="optimised tokens (default: no label maps)")
    add("--model", help="id or folder of a diffusers pipeline (default: the bundled model)")
    add("--device", help="such as cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=25, help="denoising steps (default: 25)")
    add("--guidance", type=float, default=5.0, help="default: 5.0")
    add("--size", type=int, nargs="+", metavar="PIXELS", help="a side, or height and width (default: the model's)")
    add("--sure", nargs="+", default=["0.6"], metavar="P", help="label from this probability on (default: 0.6)")
    add("--unsure", nargs="+", default=["0.4"], metavar="P", help="255 from this one on; 0 below (default: 0.4)")
    add("--all-classes", action="store_true", help="consider also the classes that an image's prompt does not name")
    add("--workers", type=int, help="processes or Ray actors (default: 1; with Ray as many as there is room for)")
    add("--threads", type=int, default=1, help="of each worker on a CPU; the bytes depend on it (default: 1)")
    add("--shard-size", type=int, default=SHARD, help=f"images handed to a worker at a time (default: {SHARD})")
    add("--ray", action="store_true", help="on a Ray cluster of this machine, or of --address")
    add("--address", help="of a Ray cluster, such as auto or HOST:PORT")
    add("--estimate", action="store_true", help="measure a few images, say how long all of them take, make none")
    return parser


def _job(arguments: argparse.Namespace) -> Job:
    n, size = arguments.n, arguments.size
    if n is None and arguments.prompts is None:
        raise ValueError("say how many images: --n, or --prompts with one prompt for each")
    if n is not None and n < 1:
        raise ValueError(f"expected one image or more, got --n {n}")
    if size is not None and len(size) > 2:
        raise ValueError(f"--size is a side, or height and width, got {size}")
    prompts = read_prompts(arguments.prompts, n) if arguments.prompts else urban_prompts(n, seed=arguments.seed)
    return Job(
        arguments.folder,
        tuple(prompts),
        tuple(arguments.tokens),
        arguments.model,
        arguments.device,
        seed=arguments.seed,
        steps=arguments.steps,
        guidance=arguments.guidance,
        size=None if size is None else (size[0], size[-1]),
        sure=_threshold(arguments.sure),
        unsure=_threshold(arguments.unsure),
        named_only=not arguments.all_classes,
        threads=arguments.threads,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 where workers died, 2 for a wrong choice."""
    arguments = _parser().parse_args(argv)
    try:
        job = _job(arguments)
        if arguments.estimate:
            seconds, n, workers = seconds_per_image(job), len(job.prompts), arguments.workers or 1
            print(f"{seconds:.3g} s an image, measured with one worker on this machine")
            total = hours(n, seconds, workers)
            print(f"{n} images on {workers} such: {n} * {seconds:.3g} / ({workers} * 3600) = {total:.3g} hours")
            return 0
        before, start = len(job.missing()), time.perf_counter()
        kind = {"ray": arguments.ray, "address": arguments.address, "shard_size": arguments.shard_size}
        dataset = run(job, workers=arguments.workers, **kind)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"error: {error}\nThe same command goes on from here.", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(f"{before} images in {seconds:.1f} s, {before / seconds:.3g} images/s; {len(dataset)} in {dataset.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
