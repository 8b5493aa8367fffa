"""Duration of a function, for a notebook to print."""

import time
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(function: Callable[[], Any], *, repeats: int = 3) -> float:
    """The shortest of some runs; a GPU's work is waited for.

    Args:
        function: called without arguments.
        repeats: how often it runs.

    Returns:
        Milliseconds.
    """
    times = []
    for _ in range(repeats):
        _wait()
        started = time.perf_counter()
        function()
        _wait()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
