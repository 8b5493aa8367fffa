"""Report the calls of methods and modules, and hide some of them from others."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

After = Callable[[FrameType, dict, Any], None]
_ALONE: ContextVar[Any] = ContextVar("alone", default=None)  # who alone is to see what runs now; one a thread


@contextmanager
def watch(pipe: Any, method: str, after: After) -> Iterator[None]:
    """Call `after` with the caller's frame, the arguments and the result of every `pipe.method(...)`.

    On this instance alone, if it has such a method. Several watchers share one wrapper, so they may leave in any order.
    """
    original = getattr(pipe, method, None)
    if original is None:
        yield
        return
    watchers = getattr(original, "watchers", None)
    if watchers is None:
        watchers = _wrap(pipe, method, original)
    watchers.append(after)
    try:
        yield
    finally:
        watchers.remove(after)
        watched = None if watchers else vars(pipe).pop(method, None)
        if watched is not None and watched.shadowed:
            vars(pipe)[method] = watched.original


def unwatched(pipe: Any, method: str) -> Callable:
    """Return the method itself, for a call that no trace is to see."""
    watched = getattr(pipe, method)
    return getattr(watched, "original", watched)


def _wrap(pipe: Any, method: str, original: Callable) -> list[After]:
    signature, watchers = inspect.signature(original), list[After]()

    @functools.wraps(original)
    def watched(*args, **kwargs):
        caller = sys._getframe(1)
        result = original(*args, **kwargs)
        for after in list(watchers):
            after(caller, signature.bind(*args, **kwargs).arguments, result)
        return result

    vars(watched).update(watchers=watchers, original=original, shadowed=method in vars(pipe))
    vars(pipe)[method] = watched
    return watchers


def is_running(frame: FrameType | None) -> bool:
    """Return whether the function call of this frame is among those that led here."""
    current: FrameType | None = sys._getframe(1)
    while frame is not None and current is not None:
        if current is frame:
            return True
        current = current.f_back
    return False


def see_output(stack: ExitStack, module: Any, see: Callable[[Any], None]) -> None:
    """Show what a module returns, until the stack is closed."""
    stack.callback(module.register_forward_hook(lambda module, args, output: see(output)).remove)


def see_input(stack: ExitStack, module: Any, see: Callable[[Any], None]) -> None:
    """Show what a module is called with, until the stack is closed."""
    stack.callback(module.register_forward_pre_hook(lambda module, args: see(args[0])).remove)


@contextmanager
def alone(owner: Any) -> Iterator[None]:
    """Hide what runs inside from all other owners of hooks."""
    before = _ALONE.set(owner)
    try:
        yield
    finally:
        _ALONE.reset(before)


def who_is_alone() -> Any:
    """Return the owner that `alone` was given, None outside of it."""
    return _ALONE.get()
