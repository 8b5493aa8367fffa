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
    """Import `render_dataset` when it is asked for: it needs the extra `datasets`."""
    if name == "render_dataset":
        return importlib.import_module(".dataset", __name__).render_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
