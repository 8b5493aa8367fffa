"""The metrics that a notebook leaves in its OUTPUT_DIR: nested dicts of numbers and strings, in JSON."""

import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daamlib.io import atomic_write


def write_metrics(
    output_dir: str | os.PathLike,
    metrics: Mapping[str, Any],
    *,
    headline: Sequence[str] = (),
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> None:
    """Write what a notebook measured to `metrics.json`, and what a run ends with to `headline.json`.

    Args:
        output_dir: folder of both files; it is made if it is not there.
        metrics: finite numbers, strings, or dicts of those.
        headline: dotted names of the metrics that a reader wants first, as "miou.car" for {"miou": {"car": ...}}.
        tables: {title: {row: {column: number or string}}}, which may hold what is no metric, such as others' numbers.

    Raises:
        ValueError: where `metrics` is empty, where `metrics` or `tables` hold anything else, or where a headline is no
            metric; nothing is written then.
    """
    metrics = _plain(metrics)
    known = flatten(metrics)
    unknown = [name for name in headline if name not in known]
    if unknown:
        raise ValueError(f"no metrics are named {', '.join(unknown)}, as headline says; there are {', '.join(known)}")
    first = {"metrics": {name: known[name] for name in headline}, "tables": _plain(tables, "tables") if tables else {}}
    for name, content in {"metrics": metrics, "headline": first}.items():
        path = Path(output_dir) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_metrics(output_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the metrics of a notebook, and its headline, {} where it wrote metrics by other means.

    Raises ValueError where there are no metrics, or something else than `write_metrics` accepts.
    """
    metrics, headline = output_dir / "metrics.json", output_dir / "headline.json"
    if not metrics.is_file():
        raise ValueError("no metrics.json in OUTPUT_DIR; a notebook's last cell has to call write_metrics")
    first = json.loads(headline.read_text(encoding="utf-8")) if headline.is_file() else {}
    return _plain(json.loads(metrics.read_text(encoding="utf-8"))), first


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: value} of the leaves of nested dicts; `prefix` begins all names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _plain(value: Any, name: str = "metrics") -> Any:
    """The value in JSON's own types. Raises ValueError for what `write_metrics` does not accept."""
    if isinstance(value, Mapping) and value:
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name} has keys that are not strings: {list(value)}")
        return {key: _plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise ValueError(
        f"{name} is {value!r} ({type(value).__name__}); expected a finite number, a string or a dict of "
        "those that is not empty. Turn tensors and arrays into numbers first, with .item() or float()."
    )
