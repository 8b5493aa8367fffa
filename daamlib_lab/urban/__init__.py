"""The drawn streets of the bundled model: scenes with exact labels, their captions, and the annotator network."""

from daamlib.extras import lazy as _lazy

from .annotator import labels_for as labels_for
from .captions import STREET_WORDS as STREET_WORDS
from .scenes import HELD_OUT as HELD_OUT
from .scenes import KINDS as KINDS
from .scenes import render as render
from .scenes import scene_prompt as scene_prompt
from .scenes import to_tensor as to_tensor

__getattr__ = _lazy(__name__, "dataset", render_dataset="dataset")  # they need the extra `datasets`
