"""Maps are computed in float32 or wider, whatever precision the pipeline is called in."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
# devices that `torch.autocast` rounds products on; torch 2.4 has none for mps, and an error where it is asked
KINDS = [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)]


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function with `torch.autocast` off, which would round its products to half precision."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for kind in KINDS:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run
