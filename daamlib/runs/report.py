"""What a headless run leaves behind besides the notebooks: metrics.json, environment.json and summary.md."""

import base64
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import torch

from ..resources import CLONE


@dataclass
class Result:
    """What became of one notebook of a run; ``state`` is "not run", "interrupted", "passed" or "failed"."""

    name: str
    state: str = "not run"
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    headline: dict[str, Any] = field(default_factory=dict)  # the metrics that a reader wants first, by dotted name
    tables: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # {title: {row: {column: value}}}
    error: str = ""

    @property
    def outcome(self) -> str:
        """The headline metrics, or the error, on one line."""
        shown = "; ".join(f"{name} = {_text(value, digits=4)}" for name, value in self.headline.items())
        return " ".join((self.error or shown).split())


def environment() -> dict[str, Any]:
    """Return the versions, the machine and the commit (None outside a git clone) that a run depends on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Return the versions of daamlib and of all the packages that it and its extras ask for and that are installed."""
    names = [re.split(r"[^\w.-]", line)[0] for line in importlib.metadata.requires("daamlib") or []]
    versions = {}
    for name in dict.fromkeys(["daamlib", *names]):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra
    return versions


def _git(*arguments: str) -> str | None:
    """Return what git prints in the clone, None where there is no clone, or git fails or is not installed."""
    if CLONE is None:  # and not git of whatever repository the environment may lie in
        return None
    try:
        done = subprocess.run(["git", "-C", CLONE, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_reports(run_dir: Path, parameters: Mapping, results: Sequence[Result], machine: Mapping) -> None:
    """Write the metrics of all notebooks, the environment and the summary into ``run_dir``."""
    metrics = {result.name: result.metrics for result in results if result.metrics}
    pages = [page for result in results if (page := _tables_and_figures(run_dir, result.name))]
    for name, content in {"environment": machine, "metrics": metrics}.items():
        (run_dir / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    summary = _summary(run_dir.name, parameters, results, machine, pages)
    (run_dir / "summary.md").write_text(summary, encoding="utf-8")


def _tables_and_figures(run_dir: Path, name: str) -> str:
    """The tables (HTML, as pandas shows them) and figures of an executed notebook, each under its last heading.

    The figures are written as PNG files beside the notebook's metrics.
    """
    executed, parts, heading, count = run_dir / f"{name}.ipynb", [], "", 0
    for cell in nbformat.read(executed, as_version=4).cells if executed.is_file() else []:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ (.*)$", cell.source, re.MULTILINE)
            heading = f"**{headings[-1]}**" if headings else heading
        for output in cell.get("outputs", []):
            data, shown = output.get("data", {}), None
            if "image/png" in data:
                count += 1
                figure = run_dir / name / f"figure-{count:02d}.png"
                figure.write_bytes(base64.b64decode(data["image/png"]))
                shown = f"![{name}, figure {count}]({name}/{figure.name})"
            elif "<table" in data.get("text/html", ""):
                shown = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
                shown = re.sub(r"\n\s*", "\n", shown).strip()  # indented lines would be code in Markdown
            if shown:
                parts += [heading] * (heading != "") + [shown]
                heading = ""
    return "\n\n".join([f"### {name}", *parts]) if parts else ""


def _summary(name: str, parameters: Mapping, results: Sequence[Result], machine: Mapping, pages: Sequence[str]) -> str:
    links = [r.name if r.state == "not run" else f"[{r.name}]({r.name}.ipynb)" for r in results]
    notebooks = [(link, r.state, f"{r.seconds:.1f}", r.outcome) for link, r in zip(links, results, strict=True)]
    metrics = [(r.name, key, value) for r in results for key, value in flat(r.metrics)]
    parts = [
        f"# {name}",
        _table(("notebook", "state", "seconds", "headline or error"), notebooks),
        *(f"**{title}**\n\n{_table(*_rows(table))}" for r in results for title, table in r.tables.items()),
        "## Metrics",
        _table(("notebook", "metric", "value"), metrics),
        "## Tables and figures",
        *(pages or ["none"]),
        "## Parameters given (all others: the notebooks' own values)",
        _table(("parameter", "value"), [(key, repr(value)) for key, value in parameters.items()]),
        "## Environment",
        _table(("what", "value"), list(flat(machine))),
    ]
    return "\n\n".join(parts) + "\n"


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for each leaf of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, value as text) for each leaf of a nested dict."""
    for name, value in leaves(tree):
        yield name, _text(value)


def ending(run_dir: Path, results: Sequence[Result]) -> str:
    """What a run prints last: a line for each notebook, their tables, and where everything else is."""
    width = max(len(result.name) for result in results)
    lines = [f"{r.name:{width}}  {r.state:11}  {r.seconds:7.1f} s  {r.outcome}".rstrip() for r in results]
    for title, table in [item for result in results for item in result.tables.items()]:
        lines += ["", title, *_aligned(*_rows(table))]
    passed = sum(result.state == "passed" for result in results)
    lines += [
        "",
        f"{passed} of {len(results)} notebooks passed; in {run_dir}:",
        "  summary.md     all metrics, tables and figures on one page",
        "  metrics.json   every number",
        "  NN_name.ipynb  the notebooks as they ran; NN_name/ what they wrote",
    ]
    return "\n".join(lines)


def _text(value: Any, digits: int = 6) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _rows(table: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of {row: {column: value}}; "" where a row lacks a column."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    return ["", *columns], [[name, *(_text(row.get(c, "")) for c in columns)] for name, row in table.items()]


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    cells = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in (header, *rows)
    ]
    return ["  ".join(row) for row in cells]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "none"
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
