"""Run the notebooks headless and gather what they measured: ``python -m daamlib_lab.runs``.

``python -m daamlib_lab.runs compare A B`` says which metrics of two runs differ.

Every run writes one folder, ``papermill_runs/<UTC time>-<model>/``: the executed notebooks, a folder of
outputs for each with its ``metrics.json``, the metrics of all of them, the environment, and a ``summary.md``.
Several notebooks run at a time, each in a separate kernel; the threads here only wait for them.
"""

import argparse
import ast
import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import papermill
import torch
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillException, PapermillExecutionError

from daamlib.resources import CLONE

from . import compare
from .metrics import read_metrics
from .report import Result, ending, environment, write_reports

AT_LEAST = re.compile(r"\bat least (\d+)\b")  # in the comment of a notebook's parameter
SLOWEST_FIRST = ("06", "07", "08", "05", "01", "02", "03", "04", "00")  # a wrong order costs time, nothing else


def find_notebooks(folder: Path, chosen: Sequence[str] = ()) -> list[Path]:
    """Find the notebooks `NN_*.ipynb` of a folder.

    Args:
        folder: where they are.
        chosen: numbers, such as "06" or "6"; none for all.

    Returns:
        Their paths in order.

    Raises:
        ValueError: where there are none, two with one number, or none with a chosen number.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    found = {path.name[:2]: path for path in paths}
    if not found:
        raise ValueError(f"no notebook named NN_*.ipynb in {folder}")
    if len(found) < len(paths):
        raise ValueError(f"two notebooks have the same number: {', '.join(path.name for path in paths)}")
    unknown = [number for number in chosen if number.zfill(2) not in found]
    if unknown:
        raise ValueError(f"no notebook has the number {', '.join(unknown)}; there are {', '.join(found)}")
    wanted = {number.zfill(2) for number in chosen} or found.keys()
    return [path for number, path in found.items() if number in wanted]


def _check_parameters(notebooks: Sequence[Path], parameters: Mapping[str, Any]) -> None:
    """Raise ValueError, naming all cases, where a notebook lacks a parameter or needs a larger number.

    Papermill itself only warns of a parameter that is not in the `parameters` cell, and a mistyped name would silently
    run with the default. A comment such as "images of each set, at least 28" says how small a number may be.
    """
    problems = []
    for path in notebooks:
        known = papermill.inspect_notebook(path)
        unknown = [name for name in parameters if name not in known]
        if unknown:
            has = ", ".join(known) or "none"
            problems.append(f"{path.name} has no parameter {', '.join(unknown)}; it has {has}")
        for name, value in parameters.items():
            least = AT_LEAST.search(known[name]["help"] or "") if name in known else None
            if least and isinstance(value, int | float) and value < int(least[1]):
                problems.append(f"{path.name} needs {name} of at least {least[1]}, got {value}")
    if problems:
        raise ValueError("; ".join(problems))


class _Kernels:
    """Start the kernels of a run, and stop all of them at once."""

    def __init__(self, threads: int, folder: str) -> None:
        self.threads, self.folder, self.stopped = threads, folder, threading.Event()
        self.running: dict[Path, AsyncKernelManager] = {}

    def manager(self, notebook: Path) -> type[AsyncKernelManager]:
        """Return the class of the manager with which papermill starts the kernel of a notebook."""
        kernels = self

        class Manager(AsyncKernelManager):
            def __init__(self, **kwargs: Any) -> None:
                # the kernel of this very interpreter, whatever is registered under its name elsewhere; over local
                # sockets, whose paths may have some 100 letters: a kernel over TCP warns that others may listen
                specs, sockets = KernelSpecManager(kernel_dirs=[]), f"{kernels.folder}/{notebook.name[:2]}"
                super().__init__(kernel_spec_manager=specs, transport="ipc", ip=sockets, **kwargs)

            async def start_kernel(self, **kwargs: Any) -> None:  # type: ignore[override]
                # not papermill's `cwd`, which changes the folder of this process, and so of the other threads
                env = {"OMP_NUM_THREADS": str(kernels.threads), **os.environ}
                await super().start_kernel(**{**kwargs, "cwd": str(notebook.parent), "env": env})
                kernels.running[notebook] = self
                if kernels.stopped.is_set():
                    kernels.stop()

        return Manager

    def stop(self) -> None:
        """Kill the kernels and what they started; papermill has stored the cells that ran."""
        self.stopped.set()
        for manager in list(self.running.values()):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(getattr(manager.provisioner, "pgid"), signal.SIGKILL)  # noqa: B009 - of local kernels only


def _run_notebook(
    notebook: Path, run_dir: Path, parameters: Mapping[str, Any], kernels: _Kernels, result: Result, bar: bool
) -> Result:
    """Execute a notebook into `run_dir`; fill in and return its result. A failure is recorded there, not raised."""
    if kernels.stopped.is_set():
        return result
    executed, output_dir = run_dir / notebook.name, run_dir / notebook.stem
    output_dir.mkdir()
    start = time.monotonic()
    result.state = "interrupted"
    try:
        papermill.execute_notebook(
            notebook,
            executed,
            parameters={**parameters, "OUTPUT_DIR": str(output_dir)},
            kernel_name=NATIVE_KERNEL_NAME,
            kernel_manager_class=kernels.manager(notebook),
            language="python",
            progress_bar=bar,
        )
        result.metrics, first = read_metrics(output_dir)
        result.headline, result.tables = first.get("metrics", {}), first.get("tables", {})
        result.state = "passed"
    except PapermillExecutionError as error:
        print(error, file=sys.stderr)  # the cell's traceback
        result.error = f"In [{error.exec_count}] raised {error.ename}: {error.evalue}"
    except (PapermillException, RuntimeError, TimeoutError, OSError, ValueError) as error:
        # such as a kernel that was killed for its memory, which leaves no error in any cell
        if not kernels.stopped.is_set():
            result.error = f"{type(error).__name__}: {error} (after the cell {_last_started_cell(executed)!r})"
    finally:
        kernels.running.pop(notebook, None)
        with contextlib.suppress(RuntimeError):  # there is none where no kernel was started
            asyncio.get_event_loop().close()  # that of this thread, which the kernel's client opened
    result.seconds = time.monotonic() - start
    result.state = "failed" if result.error else result.state
    return result


def _last_started_cell(executed: Path) -> str:
    """The first line of the last code cell that papermill began, "" where there is none."""
    cells = nbformat.read(executed, as_version=4).cells if executed.is_file() else []
    code = [cell for cell in cells if cell.cell_type == "code"]
    started = [cell for cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    return started[-1].source.split("\n")[0] if started else ""


def _slowest_first(notebook: Path) -> int:
    """Return a notebook's place in the queue: a long one that starts last would run alone."""
    number = notebook.name[:2]
    return SLOWEST_FIRST.index(number) if number in SLOWEST_FIRST else -1


def _cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _jobs(chosen: int | None, parameters: Mapping[str, Any]) -> int:
    """Return the number of notebooks at a time: one a core, but only one on a GPU, whose memory they would share."""
    device = str(parameters.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
    return chosen or (_cores() if device.startswith("cpu") else 1)


def _run(
    notebooks: Sequence[Path], parameters: Mapping[str, Any], run_dir: Path, jobs: int
) -> tuple[list[Result], bool]:
    """Run the notebooks, `jobs` at a time, print each result as it comes, and write the reports.

    Returns:
        The results in the order of the notebooks, and whether Ctrl-C stopped the run.
    """
    results = {path: Result(path.stem) for path in notebooks}
    machine = environment()  # first, so that a broken installation shows before hours of work
    jobs = min(jobs, len(notebooks))
    bar = jobs == 1 and sys.stderr.isatty()
    with tempfile.TemporaryDirectory(prefix="daamlib-") as sockets, ThreadPoolExecutor(jobs) as pool:
        kernels = _Kernels(max(1, _cores() // jobs), sockets)
        try:
            futures = {
                pool.submit(_run_notebook, path, run_dir, parameters, kernels, results[path], bar): path
                for path in sorted(notebooks, key=_slowest_first)
            }
            for number, future in enumerate(as_completed(futures), start=1):
                result, path = future.result(), futures[future]
                after = f"{result.state} after {result.seconds:.1f} s  {result.outcome}"
                print(f"[{number}/{len(notebooks)}] {path.name} {after}".rstrip(), flush=True)
                if result.error:
                    print(f"{path.name}: {result.error}\nIt is kept: {run_dir / path.name}", file=sys.stderr)
        except KeyboardInterrupt:
            print("stopping the notebooks that run ...", file=sys.stderr, flush=True)
            kernels.stop()
        except BaseException:
            kernels.stop()
            raise
    write_reports(run_dir, parameters, list(results.values()), machine)
    return list(results.values()), kernels.stopped.is_set()


def _value(text: str) -> Any:
    """A parameter as a Python literal where it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m daamlib_lab.runs",
        description="Run the notebooks headless. (`compare A B` instead: which metrics of two runs differ.)",
    )
    parser.add_argument("notebooks", nargs="*", metavar="NN", help="numbers of notebooks (default: all)")
    parser.add_argument("--model", help="id or folder of a diffusers pipeline (default: the bundled model)")
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1, mps")
    parser.add_argument("--steps", type=int, help="denoising steps of an image")
    parser.add_argument("--n-images", type=int, help="images of an experiment")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--jobs", type=_positive, help="notebooks at a time (default: one a core; on a GPU 1)")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument(
        "--notebooks-dir", type=Path, default=CLONE and CLONE / "notebooks", help="default: the clone's"
    )
    parser.add_argument(
        "--runs-dir", type=Path, default=(CLONE or Path()) / "papermill_runs", help="default: %(default)s"
    )
    return parser


def _parameters(chosen: argparse.Namespace) -> dict[str, Any]:
    """The notebook parameters that the command line gives, and only those.

    Raises ValueError where one is given twice, and for OUTPUT_DIR, which the runner gives.
    """
    pairs = [(name, getattr(chosen, name.lower())) for name in ("MODEL", "DEVICE", "STEPS", "N_IMAGES", "SEED")]
    pairs = [(name, value) for name, value in pairs if value is not None]
    pairs += [(name, _value(text)) for name, text in chosen.parameter]
    parameters = dict(pairs)
    if len(parameters) < len(pairs):
        raise ValueError(f"a parameter is given twice: {', '.join(name for name, _ in pairs)}")
    if "OUTPUT_DIR" in parameters:
        raise ValueError("OUTPUT_DIR is set for each notebook by the runner; use --runs-dir")
    for name in ("MODEL", "MASKS"):
        value = parameters.get(name)
        if value and Path(str(value)).exists():  # a relative path means another place to the notebooks
            parameters[name] = str(Path(value).resolve())
    return parameters


def _new_folder(runs_dir: Path, parameters: Mapping[str, Any]) -> Path:
    """Make the folder of a run, named after the time and the model; a second one in the same second gets a number."""
    model = re.sub(r"[^\w.-]+", "-", Path(str(parameters.get("MODEL") or "urban-tiny")).name)
    name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{model}"
    folder, number = runs_dir / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = runs_dir / f"{name}-{number}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None for those that the program was called with.

    Returns:
        0 where all notebooks passed, 1 where one failed, 130 where Ctrl-C stopped them. A wrong choice ends the program
        with 2, before anything runs.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    parser = _parser()
    chosen = parser.parse_args(argv)
    if chosen.notebooks_dir is None:
        parser.error(
            "an installed daamlib has no notebooks: clone its repository and give its folder, "
            "--notebooks-dir CLONE/notebooks"
        )
    try:
        parameters = _parameters(chosen)
        notebooks = find_notebooks(chosen.notebooks_dir.resolve(), chosen.notebooks)
        _check_parameters(notebooks, {**parameters, "OUTPUT_DIR": ""})
    except ValueError as error:
        parser.error(str(error))
    run_dir = _new_folder(chosen.runs_dir.resolve(), parameters)
    jobs = _jobs(chosen.jobs, parameters)
    given = parameters or "as in the notebooks"
    count = f"{len(notebooks)} notebook{'s' * (len(notebooks) > 1)}"
    print(f"{count}, {jobs} at a time, parameters {given}, into {run_dir}", flush=True)
    results, stopped = _run(notebooks, parameters, run_dir, jobs)
    print("", ending(run_dir, results), sep="\n")
    return 130 if stopped else 0 if all(result.state == "passed" for result in results) else 1
