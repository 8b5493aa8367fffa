"""Run the notebooks headless and gather what they measured: ``python -m daamlib.runs``.

``python -m daamlib.runs compare A B`` says which metrics of two runs differ.

Every run writes one folder, ``papermill_runs/<UTC time>-<model>/``: the executed notebooks, a folder of
outputs for each with its ``metrics.json``, the metrics of all of them, the environment, and a ``summary.md``.
"""

import argparse
import ast
import itertools
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillException, PapermillExecutionError

from ..resources import CLONE
from . import compare
from .metrics import read_metrics
from .report import Result, ending, environment, write_reports


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
    """Raise ValueError, naming all cases, where a parameter is not in the `parameters` cell of a notebook.

    Papermill itself only warns, and a mistyped name would silently run with the default.
    """
    problems = []
    for path in notebooks:
        known = papermill.inspect_notebook(path)
        unknown = [name for name in parameters if name not in known]
        if unknown:
            has = ", ".join(known) or "none"
            problems.append(f"{path.name} has no parameter {', '.join(unknown)}; it has {has}")
    if problems:
        raise ValueError("; ".join(problems))


class _CurrentKernelManager(AsyncKernelManager):
    """Starts the kernel of this very interpreter, whatever is registered under its name elsewhere."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **kwargs)


def _run_notebook(notebook: Path, run_dir: Path, parameters: Mapping[str, Any], result: Result) -> None:
    """Execute a notebook into `run_dir` and fill in the result. A failure is recorded there, not raised."""
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
            kernel_manager_class=_CurrentKernelManager,
            language="python",
            cwd=notebook.parent,
            progress_bar=sys.stderr.isatty(),
        )
        result.metrics, first = read_metrics(output_dir)
        result.headline, result.tables = first.get("metrics", {}), first.get("tables", {})
        result.state = "passed"
    except PapermillExecutionError as error:
        print(error, file=sys.stderr)  # the cell's traceback
        result.error = f"In [{error.exec_count}] raised {error.ename}: {error.evalue}"
    except (PapermillException, RuntimeError, TimeoutError, OSError, ValueError) as error:
        # such as a kernel that was killed for its memory, which leaves no error in any cell
        result.error = f"{type(error).__name__}: {error} (after the cell {_last_started_cell(executed)!r})"
    result.seconds = time.monotonic() - start
    result.state = "failed" if result.error else result.state


def _last_started_cell(executed: Path) -> str:
    """The first line of the last code cell that papermill began, "" where there is none."""
    cells = nbformat.read(executed, as_version=4).cells if executed.is_file() else []
    code = [cell for cell in cells if cell.cell_type == "code"]
    started = [cell for cell in code if cell.metadata.get("papermill", {}).get("start_time")]
    return started[-1].source.split("\n")[0] if started else ""


def _run(notebooks: Sequence[Path], parameters: Mapping[str, Any], run_dir: Path) -> list[Result]:
    """Run the notebooks one after the other, up to the first that fails, and write the reports."""
    results = [Result(path.stem) for path in notebooks]
    machine = environment()  # first, so that a broken installation shows before hours of work
    try:
        for i, (path, result) in enumerate(zip(notebooks, results, strict=True), start=1):
            progress = f"[{i}/{len(notebooks)}] {path.name}"
            print(f"{progress} ...", flush=True)
            _run_notebook(path, run_dir, parameters, result)
            print(f"{progress} {result.state} after {result.seconds:.1f} s", flush=True)
            if result.error:
                print(f"{path.name}: {result.error}\nIt is kept: {run_dir / path.name}", file=sys.stderr)
                break
    finally:
        write_reports(run_dir, parameters, results, machine)
    return results


def _value(text: str) -> Any:
    """A parameter as a Python literal where it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m daamlib.runs",
        description="Run the notebooks headless. (`compare A B` instead: which metrics of two runs differ.)",
    )
    parser.add_argument("notebooks", nargs="*", metavar="NN", help="numbers of notebooks (default: all)")
    parser.add_argument("--model", help="id or folder of a diffusers pipeline (default: the bundled model)")
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1, mps")
    parser.add_argument("--steps", type=int, help="denoising steps of an image")
    parser.add_argument("--n-images", type=int, help="images of an experiment")
    parser.add_argument("--seed", type=int)
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


def new_folder(path: Path) -> Path:
    """Make a folder that nobody else has: two runs may begin in one second.

    Args:
        path: of the folder.

    Returns:
        The path, or with -2, -3 ... after it where it is there.
    """
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None for those that the program was called with.

    Returns:
        0 where all notebooks passed, 1 where one failed. A wrong choice ends the program with 2, before anything runs.
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
    model = re.sub(r"[^\w.-]+", "-", Path(str(parameters.get("MODEL") or "urban-tiny")).name)
    run_dir = new_folder(chosen.runs_dir.resolve() / f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{model}")
    given = parameters or "as in the notebooks"
    print(f"{len(notebooks)} notebooks, parameters {given}, into {run_dir}", flush=True)
    results = _run(notebooks, parameters, run_dir)
    print("", ending(run_dir, results), sep="\n")
    return 0 if all(result.state == "passed" for result in results) else 1
