"""Which metrics of two runs differ by more than their tolerance: ``python -m daamlib_lab.runs compare A B``."""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .metrics import flatten

# (pattern, relative tolerance): the first pattern that matches a metric's name counts
TOLERANCES = ((r"second|speedup|time", math.inf), (r"", 0.01))  # durations differ on every machine


def _differences(
    first: Mapping[str, Any], second: Mapping[str, Any], tolerances: Sequence[tuple[str, float]]
) -> list[str]:
    """A line for each metric that one run lacks, or that differs by more than its limit.

    The limit is one of |a - b| / max(|a|, |b|, 1e-6). What is no number has to be equal, unless its limit is infinite.
    """
    found = []
    for name in {**first, **second}:
        a, b = first.get(name), second.get(name)
        limit = next(limit for pattern, limit in tolerances if re.search(pattern, name))
        apart = _relative(a, b)
        if apart > limit:
            values = " and ".join("nothing" if value is None else repr(value) for value in (a, b))
            percent = "" if math.isinf(apart) else f", {apart:.2%} apart (tolerance {limit:.2%})"
            found.append(f"{name}: {values}{percent}")
    return found


def _relative(a: Any, b: Any) -> float:
    if a == b:
        return 0.0
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    return abs(a - b) / max(abs(a), abs(b), 1e-6) if numbers else math.inf


def _metrics(run: str) -> dict[str, Any]:
    path = Path(run) / "metrics.json"
    try:
        return flatten(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise argparse.ArgumentTypeError(
            f"no metrics in {path}: expected a folder of papermill_runs ({error})"
        ) from error


def _tolerance(text: str) -> tuple[str, float]:
    pattern, equals, value = text.rpartition("=")
    try:
        re.compile(pattern)
        limit = float(value)
    except (re.error, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected PATTERN=NUMBER, got {text!r} ({error})") from error
    if not equals or not limit >= 0:
        raise argparse.ArgumentTypeError(f"expected PATTERN=NUMBER, the number 0 or more, got {text!r}")
    return pattern, limit


def main(argv: Sequence[str]) -> int:
    """Print the differences of two runs.

    Args:
        argv: what follows `compare` on the command line.

    Returns:
        0 where there are none, 1 where there are some. A wrong choice ends the program with 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m daamlib_lab.runs compare",
        description="Print which metrics of two runs differ by more than their tolerance. Durations never do, all "
        "others by default where they are 1 percent apart; what is no number has to be equal.",
    )
    parser.add_argument("first", type=_metrics, help="a folder of papermill_runs")
    parser.add_argument("second", type=_metrics, help="another one")
    parser.add_argument(
        "-t", "--tolerance", type=_tolerance, action="append", default=[], metavar="PATTERN=NUMBER",
        help="relative tolerance of the metrics whose name the regular expression finds; may be given several times",
    )  # fmt: skip
    chosen = parser.parse_args(argv)
    found = _differences(chosen.first, chosen.second, (*chosen.tolerance, *TOLERANCES))
    total = len(chosen.first | chosen.second)
    print(*found, f"{len(found)} of {total} metrics differ by more than their tolerance", sep="\n")
    return 1 if found else 0
