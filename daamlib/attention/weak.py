"""A field of a dataclass that does not keep its value alive."""

import weakref
from collections.abc import Callable
from typing import Any


class Weakly:
    """Descriptor of a dataclass field that holds a weak reference: it reads None once nothing else holds the value.

    Written as `pipe: Any = Weakly()` in the class, the field's default is None. The class decides what its pickles and
    copies hold: a weak reference cannot be pickled.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        reference = None if instance is None else vars(instance).get(self._name)
        return None if reference is None else reference()

    def __set__(self, instance: Any, value: Any) -> None:
        reference: Callable[[], Any] | None
        try:
            reference = None if value is None else weakref.ref(value)
        except TypeError:  # some small objects that stand for a pipeline allow no weak reference
            reference = lambda: value  # noqa: E731
        vars(instance)[self._name] = reference
