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

from daamlib._bundled import CLONE


@dataclass
class Result:
    """What became of one notebook of a run; ``state`` is "not run", "interrupted", "passed" or "failed"."""

    name: str
    state: str = "not run"
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def environment() -> dict[str, Any]:
    """Return the versions, the machine and the commit (None outside a git clone) that a run depends on."""
    import torch  # only here: nothing else in this module needs it, and it is slow to import

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
    notebooks = [(link, r.state, f"{r.seconds:.1f}", r.error) for link, r in zip(links, results, strict=True)]
    metrics = [(r.name, key, value) for r in results for key, value in flat(r.metrics)]
    parts = [
        f"# {name}",
        _table(("notebook", "state", "seconds", "error"), notebooks),
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
        yield name, f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "none"
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
