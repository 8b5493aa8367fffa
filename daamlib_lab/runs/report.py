"""Files that a headless run writes in addition to the notebooks: metrics.json, environment.json and summary.md."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from nbconvert import MarkdownExporter

from daamlib.resources import CLONE

from .metrics import flatten

# a notebook without its code, warnings and progress bars
PAGE = """{%- extends 'index.md.j2' -%}
{%- block stream -%}{%- if output.name == 'stdout' -%}{{ super() }}{%- endif -%}{%- endblock -%}
{%- block data_text -%}
{%- if 'application/vnd.jupyter.widget-view+json' not in output.data -%}{{ super() }}{%- endif -%}
{%- endblock -%}"""


@dataclass
class Result:
    """Result of one notebook of a run.

    Attributes:
        name: its file's, without the ending.
        state: "not run", "interrupted", "passed" or "failed".
        seconds: how long it ran.
        metrics: all that it measured.
        headline: the metrics that a reader wants first, by dotted name.
        tables: {title: {row: {column: value}}}.
        error: what went wrong, "" if nothing.
    """

    name: str
    state: str = "not run"
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    headline: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    error: str = ""

    @property
    def outcome(self) -> str:
        """The headline metrics, or the error, on one line."""
        shown = "; ".join(f"{name} = {_text(value, digits=4)}" for name, value in self.headline.items())
        return " ".join((self.error or shown).split())


def environment() -> dict[str, Any]:
    """The versions, the machine and the commit (None outside a git clone) that a run depends on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": {one.name: one.version for one in importlib.metadata.distributions()},
    }


def _git(*arguments: str) -> str | None:
    """Output of git in the clone; None where there is no clone, or git fails or is not installed."""
    if CLONE is None:  # and not git of whatever repository the environment may lie in
        return None
    try:
        done = subprocess.run(["git", "-C", CLONE, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_reports(
    run_dir: Path, parameters: Mapping[str, Any], results: Sequence[Result], machine: Mapping[str, Any]
) -> None:
    """Write metrics.json, environment.json and summary.md; `machine` comes from `environment`."""
    metrics = {result.name: result.metrics for result in results if result.metrics}
    for name, content in {"environment": machine, "metrics": metrics}.items():
        (run_dir / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    links = [r.name if r.state == "not run" else f"[{r.name}]({r.name}.ipynb)" for r in results]
    states = [(link, r.state, f"{r.seconds:.1f}", r.outcome) for link, r in zip(links, results, strict=True)]
    measured = [(r.name, name, _text(value)) for r in results for name, value in flatten(r.metrics).items()]
    here = {name: value for name, value in machine.items() if name != "versions"}
    parts = [
        f"# {run_dir.name}",
        _markdown(("notebook", "state", "seconds", "headline or error"), states),
        *(f"**{title}**\n\n{_markdown(*_cells(table))}" for r in results for title, table in r.tables.items()),
        "## Metrics",
        _markdown(("notebook", "metric", "value"), measured),
        "## Parameters given (all others: the notebooks' own values)",
        _markdown(("parameter", "value"), [(name, repr(value)) for name, value in parameters.items()]),
        "## Environment (versions: [environment.json](environment.json))",
        _markdown(("what", "value"), [(name, _text(value)) for name, value in here.items()]),
        *(_page(run_dir / f"{r.name}.ipynb") for r in results if r.state != "not run"),
    ]
    (run_dir / "summary.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _page(executed: Path) -> str:
    """An executed notebook as Markdown, without its code; the figures are written next to its metrics."""
    if not executed.is_file():
        return ""
    exporter = MarkdownExporter(raw_template=PAGE, exclude_input=True)
    places = {"output_files_dir": executed.stem, "unique_key": "figure"}
    text, resources = exporter.from_filename(str(executed), resources=places)
    for name, content in resources["outputs"].items():
        (executed.parent / name).write_bytes(content)
    return re.sub(r"<style.*?</style>\n?", "", text, flags=re.DOTALL).strip()  # of pandas; Markdown would show it


def ending(run_dir: Path, results: Sequence[Result]) -> str:
    """Last lines that a run prints: a line for each notebook, their tables, and where everything else is."""
    width = max(len(result.name) for result in results)
    lines = [f"{r.name:{width}}  {r.state:11}  {r.seconds:7.1f} s  {r.outcome}".rstrip() for r in results]
    for title, table in [item for result in results for item in result.tables.items()]:
        columns, rows = _cells(table)
        lines += ["", title, pd.DataFrame(rows, columns=columns).set_index("").to_string(index_names=False)]
    passed = sum(result.state == "passed" for result in results)
    lines += [
        "",
        f"{passed} of {len(results)} notebooks passed; in {run_dir}:",
        "  summary.md     all metrics, then the notebooks without their code, on one page",
        "  metrics.json   every number",
        "  NN_name.ipynb  the notebooks as they ran; NN_name/ what they wrote",
    ]
    return "\n".join(lines)


def _text(value: Any, digits: int = 6) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _cells(table: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of {row: {column: value}}; "" where a row lacks a column."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    return ["", *columns], [[name, *(_text(row.get(c, "")) for c in columns)] for name, row in table.items()]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) if rows else "none"
