"""Being told of the calls of an object's method."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def watch(pipe: Any, method: str, after: Callable[[dict, Any], None]) -> Iterator[None]:
    """Call `after` with the arguments and the result of every `pipe.method(...)`, on this instance alone."""
    original = getattr(pipe, method, None)
    if original is None:
        yield
        return
    signature, shadowed = inspect.signature(original), vars(pipe).get(method)

    def watched(*args, **kwargs):
        result = original(*args, **kwargs)
        after(signature.bind(*args, **kwargs).arguments, result)
        return result

    vars(watched)["__signature__"] = signature  # for a trace inside this one
    vars(pipe)[method] = watched
    try:
        yield
    finally:
        vars(pipe).pop(method, None)
        if shadowed is not None:
            vars(pipe)[method] = shadowed
