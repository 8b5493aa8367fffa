"""Which metrics of two runs differ by more than their tolerance: ``python -m daamlib.runs compare A B``."""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import leaves

# (pattern, relative tolerance): the first pattern found in a metric's name counts
TOLERANCES = ((r"second|speedup|time", math.inf), (r"", 0.01))  # durations differ on every machine


@dataclass(frozen=True)
class Difference:
    """A metric that is not the same in both runs; None where a run does not have it."""

    name: str
    first: Any
    second: Any
    relative: float  # |a - b| / max(|a|, |b|, 1e-6); infinite where that means nothing
    tolerance: float

    def __str__(self) -> str:
        a, b = ("nothing" if value is None else f"{value!r}" for value in (self.first, self.second))
        percent = "" if math.isinf(self.relative) else f", {self.relative:.2%} apart (tolerance {self.tolerance:.2%})"
        return f"{self.name}: {a} and {b}{percent}"


def read_metrics(run: Path) -> dict[str, Any]:
    """The metrics of a run by dotted name. Raises ValueError where the folder holds none."""
    path = run / "metrics.json"
    try:
        return dict(leaves(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"no metrics of a run in {path}: expected a folder of papermill_runs ({error})") from error


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], tolerances: Sequence[tuple[str, float]] = TOLERANCES
) -> list[Difference]:
    """The metrics that differ by more than their tolerance, or that only one of the runs has."""
    found = []
    for name in [*first, *(name for name in second if name not in first)]:
        a, b = first.get(name), second.get(name)
        tolerance = next(limit for pattern, limit in tolerances if re.search(pattern, name))
        relative = _relative(a, b)
        if relative > tolerance or (math.isinf(relative) and not math.isinf(tolerance)):
            found.append(Difference(name, a, b, relative, tolerance))
    return found


def _relative(a: Any, b: Any) -> float:
    if a == b:
        return 0.0
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
    return abs(a - b) / max(abs(a), abs(b), 1e-6) if numbers else math.inf


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
    """Print the differences; return 0 where there are none, 1 where there are some, 2 for a wrong choice."""
    parser = argparse.ArgumentParser(
        prog="python -m daamlib.runs compare",
        description="Print which metrics of two runs differ by more than their tolerance. Durations never do, all "
        "others by default where they are 1 percent apart; what is no number has to be equal.",
    )
    parser.add_argument("first", type=Path, help="a folder of papermill_runs")
    parser.add_argument("second", type=Path, help="another one")
    parser.add_argument(
        "-t", "--tolerance", type=_tolerance, action="append", default=[], metavar="PATTERN=NUMBER",
        help="relative tolerance of the metrics whose name the regular expression finds; may be given several times",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        first, second = read_metrics(arguments.first), read_metrics(arguments.second)
    except ValueError as error:
        parser.error(str(error))
    found = differences(first, second, (*arguments.tolerance, *TOLERANCES))
    for difference in found:
        print(difference)
    print(f"{len(found)} of {len(first.keys() | second.keys())} metrics differ by more than their tolerance")
    return 1 if found else 0
