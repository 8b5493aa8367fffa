"""The drawn streets of the bundled model: scenes with exact labels, their captions, and the annotator network."""

import importlib
from typing import Any

from .annotator import labels_for as labels_for
from .captions import STREET_WORDS as STREET_WORDS
from .scenes import HELD_OUT as HELD_OUT
from .scenes import KINDS as KINDS
from .scenes import render as render
from .scenes import scene_prompt as scene_prompt
from .scenes import to_tensor as to_tensor


def __getattr__(name: str) -> Any:
    """Import `dataset` and its `render_dataset` when they are asked for: they need the extra `datasets`."""
    if name in ("dataset", "render_dataset"):
        module = importlib.import_module(".dataset", __name__)
        return module if name == "dataset" else module.render_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
