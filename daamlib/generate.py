"""Generate datasets of any size, images with the label maps of optimised tokens: ``python -m daamlib.generate``.

    python -m daamlib.generate dataset --n 1000 --workers 2          # the bundled model, a class at every pixel
    python -m daamlib.generate dataset --n 1000 --tokens car.safetensors person.safetensors
    python -m daamlib.generate dataset --n 100000 --tokens *.safetensors --model MODEL --ray --address ADDRESS

A run that is stopped or killed goes on by the same command: what is there is skipped. With Ray every worker, and this
process, has daamlib and sees the folder, the tokens and a model's folder under the same paths, on a shared file system.
"""

import argparse
import functools
import inspect
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from .cityscapes import IGNORED
from .classes import ADE20K, CITYSCAPES, COCO, VOC
from .datasets.folder import MOST_IMAGES
from .datasets.generation import GPU_BATCH
from .datasets.prompts import urban_prompts
from .datasets.workers import SHARD, Job, WorkerError, run_shards
from .pipeline import cpu_threads
from .resources import bundled

TABLES = {"cityscapes": CITYSCAPES, "voc": VOC, "coco": COCO, "ade20k": ADE20K}
METAVARS = {"size": "PIXELS", "threshold": "P", "ignore_from": "P", "ids": "NAME=ID", "options": "NAME=VALUE"}
FLAGS = {"named_only": "--all-classes", "ids": "--classes", "options": "--option"}  # not named as the fields of `Job`


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 where workers died, 2 for a wrong choice."""
    arguments = vars(_parser().parse_args(argv))
    estimate = arguments.pop("estimate")
    kind = {name: arguments.pop(name) for name in ("workers", "ray", "address", "shard_size")}
    try:
        job = _job(**arguments)
        if estimate:
            seconds, n, workers = _seconds_per_image(job), len(job.prompts), kind["workers"] or 1
            print(f"{seconds:.3g} s an image, measured with one worker on this machine")
            print(f"{n} images on {workers} such, if none slows another: {n * seconds / (workers * 3600):.3g} hours")
            return 0
        before, start = len(job.missing()), time.perf_counter()
        dataset = run_shards(job, **kind)
    except WorkerError as error:
        print(f"error: {error}\nThe same command goes on from here.", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
        said = str(error).splitlines()[0] if isinstance(error, RuntimeError) else error  # PyTorch's go on for long
        print(f"error: {said}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    print(f"{before} images in {seconds:.1f} s, {before / seconds:.3g} images/s; {len(dataset)} in {dataset.folder}")
    if job.tokens:
        maps = (np.bincount(dataset.labels(i).ravel(), minlength=IGNORED + 1) for i in dataset.labelled)
        counts = sum(maps, np.zeros(IGNORED + 1, int))
        names = sorted({**dataset.classes.names, IGNORED: "ignored"}.items())
        shares = {name: float(counts[i] / counts.sum()) for i, name in names if counts[i]}
        print("\n".join(f"{name:16} {share:6.1%} of the pixels" for name, share in shares.items()))
        (dataset.folder / "statistics.json").write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")
    return 0


def _job(*, n: int | None, prompts: Path | None, images_only: bool = False, **same: Any) -> Job:
    """Return the job of the parsed arguments; `same` are those that were given of the other fields of `Job`."""
    if n is None and prompts is None:
        raise ValueError("say how many images: --n, or --prompts with one prompt for each")
    if n is not None and not 1 <= n <= MOST_IMAGES:
        raise ValueError(f"expected one image or more, at most {MOST_IMAGES:,}, got --n {n}")
    if not {"tokens", "model"} & set(same) and not images_only:
        same["tokens"] = [bundled("urban-tiny") / "street.safetensors"]
    same = {name: READ[name](value) if name in READ else value for name, value in same.items()}
    texts = _read_prompts(prompts, n) if prompts else urban_prompts(n or 0, seed=same.get("seed", Job.seed))
    return Job(prompts=texts, **same)


def _read_prompts(path: Path, n: int | None) -> list[str]:
    """Return `n` prompts of a text file, one a line, from the first again where it has fewer; None: all."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as that") from error
    # not `splitlines`, for which a form feed or U+2028 inside of a prompt ends a line
    prompts = [line.strip() for line in re.split("\r\n|\r|\n", text) if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompts: expected one a line")
    return [prompts[i % len(prompts)] for i in range(len(prompts) if n is None else n)]


def _seconds_per_image(job: Job, batches: int = 3) -> float:
    """Return the mean over some batches, label maps and files included, after one to warm up; in this process."""
    with tempfile.TemporaryDirectory() as folder, cpu_threads(job.threads):
        n = (batches + 1) * (job.batch_size or GPU_BATCH)
        prompts = [job.prompts[i % len(job.prompts)] for i in range(n)]
        generator = replace(job, folder=folder, prompts=prompts).open()
        list(generator.make((0, n)))  # shards of one batch
        start = time.perf_counter()
        made = sum(1 for k in range(1, batches + 1) for _ in generator.make((k, n)))
        return (time.perf_counter() - start) / made


def _numbers(texts: Sequence[str], kind: type, expected: str) -> Any:
    """Read 0.6, or car=0.6 person=0.5. Raises ValueError for anything else."""
    try:
        if len(texts) == 1 and "=" not in texts[0]:
            return kind(texts[0])
        return {name: kind(number) for name, number in (text.rsplit("=", 1) for text in texts)}
    except ValueError as error:
        raise ValueError(f"{expected}, got {' '.join(texts)}") from error


def _options(texts: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE, the value in JSON or else as text."""
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"an option is NAME=VALUE, got {text}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _size(sides: Sequence[str]) -> list[int]:
    """Read a side, or height and width."""
    numbers = [_numbers([side], int, "--size is in pixels") for side in sides]
    return numbers * 2 if len(numbers) == 1 else numbers


LIMIT = functools.partial(_numbers, kind=float, expected="a threshold is a number, or CLASS=NUMBER for every class")
IDS = f"classes are one of {', '.join(TABLES)}, or NAME=ID each"
# how the texts after an option become a field of `Job`
READ: dict[str, Callable[[Sequence[str]], Any]] = {
    "size": _size,
    "threshold": LIMIT,
    "ignore_from": LIMIT,
    "ids": lambda texts: TABLES.get(" ".join(texts).lower()) or _numbers(texts, int, IDS),
    "options": _options,
    "tokens": tuple,
}


def _parser() -> argparse.ArgumentParser:
    """Make an option for each field of `Job`, with its line of the docstring as help, and those of the run."""
    parser = argparse.ArgumentParser(prog="python -m daamlib.generate", description="Generate images with label maps.")
    add, hints = parser.add_argument, get_type_hints(Job)
    lines = dict(re.findall(r"^    (\w+): (.*)$", inspect.getdoc(Job) or "", re.MULTILINE))
    add("folder", help=lines["folder"])
    add("--n", type=int, help="images; by default one for each line of --prompts")
    add("--prompts", type=Path, metavar="FILE", help="one a line; by default those of data/prompts/urban.json")
    for part in fields(Job)[2:]:
        name, default, kinds = part.name, part.default, (hints[part.name], *get_args(hints[part.name]))
        how: dict[str, Any] = {"type": next((kind for kind in (int, float) if kind in kinds), str)}
        if isinstance(default, bool):
            how = {"action": "store_false" if default else "store_true"}
        elif name in READ:
            how = {"nargs": "+", "metavar": METAVARS.get(name, "FILE")}
        line = lines[name] + f" (default: {default})" * isinstance(default, bool | int | float)
        add(FLAGS.get(name, f"--{name.replace('_', '-')}"), dest=name, default=argparse.SUPPRESS, help=line, **how)
    add("--images-only", action="store_true", help="no label maps of the bundled model's images either")
    add("--workers", type=int, help="processes or Ray actors (default: 1; with Ray as many as there is room for)")
    add("--shard-size", type=int, default=SHARD, help=f"images handed to a worker at a time (default: {SHARD})")
    add("--ray", action="store_true", help="on a Ray cluster of this machine, or of --address")
    add("--address", help="of a Ray cluster, such as auto or HOST:PORT")
    add("--estimate", action="store_true", help="measure a few images, say how long all of them take, make none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
