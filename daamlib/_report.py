"""What a headless run leaves behind besides the notebooks: metrics.json, environment.json and summary.md."""

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

ROOT = Path(__file__).resolve().parents[1]


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

    requirements = importlib.metadata.requires("daamlib") or []
    names = [re.split(r"[^\w.-]", line)[0] for line in requirements if "extra ==" not in line]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": {name: importlib.metadata.version(name) for name in ["daamlib", *names]},
    }


def _git(*arguments: str) -> str | None:
    """Return what git prints in the repository, None where it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_reports(run_dir: Path, parameters: Mapping, results: Sequence[Result], machine: Mapping) -> None:
    """Write the metrics of all notebooks, the environment and the summary into ``run_dir``."""
    metrics = {result.name: result.metrics for result in results if result.metrics}
    for name, content in {"environment": machine, "metrics": metrics}.items():
        (run_dir / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    summary = _summary(run_dir.name, parameters, results, machine)
    (run_dir / "summary.md").write_text(summary, encoding="utf-8")


def _summary(name: str, parameters: Mapping, results: Sequence[Result], machine: Mapping) -> str:
    links = [r.name if r.state == "not run" else f"[{r.name}]({r.name}.ipynb)" for r in results]
    notebooks = [(link, r.state, f"{r.seconds:.1f}", r.error) for link, r in zip(links, results, strict=True)]
    metrics = [(r.name, key, value) for r in results for key, value in flat(r.metrics)]
    parts = [
        f"# {name}",
        _table(("notebook", "state", "seconds", "error"), notebooks),
        "## Metrics",
        _table(("notebook", "metric", "value"), metrics),
        "## Parameters given (all others: the notebooks' own values)",
        _table(("parameter", "value"), [(key, repr(value)) for key, value in parameters.items()]),
        "## Environment",
        _table(("what", "value"), list(flat(machine))),
    ]
    return "\n\n".join(parts) + "\n"


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, value as text) for each leaf of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "none"
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
