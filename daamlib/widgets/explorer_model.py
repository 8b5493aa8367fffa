"""The explorer without its view: a state goes in; a heat map, a mask and its IoU come out."""

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import traitlets
from PIL import Image

from .. import metrics
from ..attention.heatmaps import HeatMaps
from ..attention.pictures import COLOUR_MAPS, rgb
from ..attention.record import AttentionRecord
from ..attention.text import occurrences
from ..cityscapes import BY_NAME
from ..tokens.token import OptimizedToken

METHODS = {"ldaam": "LDAAM", "ov-daam": "OV-DAAM", "daam": "DAAM", "token": "optimised token"}


@dataclass(frozen=True)
class ExplorerState:
    """All that can be chosen, in plain values.

    Raises TypeError for a word, text or path that is no string, ValueError for what no record could be read with.
    """

    word: str  #: shown in the map
    text: str  #: in which the word is read (LDAAM, OV-DAAM), "" for the word alone; DAAM reads the prompt
    method: str  #: one of `METHODS`
    steps: tuple[int, int]  #: (first, last), both included, numbered from 0 as in `record.select`
    grids: tuple[tuple[int, int], ...]  #: (h, w) of the layers that take part
    threshold: float = 0.5  #: of the map scaled to its own [0, 1]
    opacity: float = 0.65  #: of the map over the image, in [0, 1]
    colour_map: str = "magma"  #: one of `COLOUR_MAPS`
    token_path: str = ""  #: of the method "token"
    refined: bool = False  #: whether the map is propagated along the image's self-attention

    def __post_init__(self) -> None:
        for name in ("word", "text", "token_path"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {getattr(self, name)!r}")
        for name, known in (("method", tuple(METHODS)), ("colour_map", tuple(COLOUR_MAPS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")
        for name in ("threshold", "opacity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        # JSON makes lists of tuples; as tuples they are keys of the caches
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "grids", tuple(sorted((tuple(grid) for grid in self.grids), reverse=True)))
        if len(self.steps) != 2 or not 0 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps must be (first, last) with 0 <= first <= last, got {self.steps}")


@dataclass(frozen=True, eq=False)
class ExplorerResult:
    """Arrays of one image under a state; all None but the message where it cannot be read."""

    heat: np.ndarray | None = None  #: (H, W) float32, the map at the image's size, scaled to its own [0, 1]
    mask: np.ndarray | None = None  #: (H, W) bool, heat > threshold
    iou: float | None = None  #: of the mask; like the curve None without a true mask
    thresholds: np.ndarray | None = None  #: (101,) in [0, 1]
    curve: np.ndarray | None = None  #: (101,), the IoU at each threshold
    message: str = ""  #: what was wrong, "" if nothing


class ExplorerModel(traitlets.HasTraits):
    """One image with its record; `change` makes a new `state`, and with it a new `result`.

        model = ExplorerModel(record, image, mask)
        model.change(word="tree", threshold=0.4)
        model.result.iou

    Arguments and errors are those of `explore`; it works without a view.
    """

    state = traitlets.Instance(ExplorerState)
    result = traitlets.Instance(ExplorerResult)

    def __init__(self, record: AttentionRecord, image: Image.Image | np.ndarray, true_mask: Any = None) -> None:
        if not isinstance(record, AttentionRecord):
            raise TypeError(f"expected an AttentionRecord, as trace[0], got {type(record).__name__}")
        self.record = record
        self.image = rgb(image)
        self.true_mask: np.ndarray | None = None
        if true_mask is not None:
            metrics.iou(true_mask, true_mask)  # it says what is wrong with a mask
            self.true_mask = mask = np.array(torch.as_tensor(true_mask).cpu())
            if mask.shape != self.image.shape[:2]:
                raise ValueError(f"the mask is {mask.shape}, the image {self.image.shape[:2]}: they must agree")
        self.grids = tuple(sorted({layer.grid for layer in record.layers}, reverse=True))
        self.last_step = len(record.timesteps) - 1
        # only the last of each is stored: queries can be large, and one hand turns one knob at a time
        self._selected = lru_cache(maxsize=1)(self._select)
        self._map = lru_cache(maxsize=1)(self._read_map)
        words = [word.text for word in record.prompt_embeddings.words]
        prompt = " ".join(words)
        classes = sorted((name for name in BY_NAME if name in prompt), key=prompt.index)
        word = (classes or words[-1:] or [""])[0]
        method = "ldaam" if record.pipe is not None else "daam"  # no other text can be embedded
        state = ExplorerState(word=word, text="", method=method, steps=(0, self.last_step), grids=self.grids)
        super().__init__(state=state, result=self._read(state))

    @property
    def summed(self) -> bool:
        """True if the record holds only sums over the steps, which cannot be taken apart."""
        return self.record.layers[0].queries is None

    def change(self, **values: Any) -> None:
        """Change parts of an `ExplorerState` by name; where that raises, nothing changes.

        Raises TypeError for an unknown name or a value of another type, ValueError for another bad value.
        """
        known = [part.name for part in fields(ExplorerState)]
        if unknown := sorted(set(values) - set(known)):
            raise TypeError(f"the explorer has no {', '.join(unknown)}: expected {', '.join(known)}")
        state = replace(self.state, **values)
        if (state.grids, state.steps) != (self.state.grids, self.state.steps):
            self._selected.cache_clear()  # frees its queries before others are gathered
        if state != self.state:
            self.state = state  # observers of the result see the state it is of
            self.result = self._read(state)

    def select(self, state: ExplorerState) -> AttentionRecord:
        """Return the record of a state's layers and steps alone, the whole record itself where nothing is left out.

        Raises ValueError if there are no such layers or steps.
        """
        if not state.grids or not set(state.grids) <= set(self.grids):
            raise ValueError(f"no layers are left: choose among the grids {list(self.grids)}, got {list(state.grids)}")
        if state.steps[1] > self.last_step:
            raise ValueError(f"the record has the steps 0 to {self.last_step}, got {state.steps}")
        if state.grids == self.grids and state.steps == (0, self.last_step):
            return self.record  # no copy of its queries, and its own linear map
        return self._selected(state.grids, state.steps)

    def _select(self, grids: tuple, steps: tuple[int, int]) -> AttentionRecord:
        numbers = None if steps == (0, self.last_step) else range(steps[0], steps[1] + 1)
        return self.record.select(layers=lambda layer: layer.grid in grids, steps=numbers)

    def _read(self, state: ExplorerState) -> ExplorerResult:
        """Return what the state shows; an error comes back as a message, never as an exception."""
        shown = replace(state, threshold=0.5, opacity=0.5, colour_map="magma")  # a map depends on none of these
        try:
            heat, thresholds, curve = self._map(shown, _written(state))
        except (ValueError, TypeError, LookupError, OSError, RuntimeError) as error:  # also a GPU that is full
            return ExplorerResult(message=str(error) or type(error).__name__)
        mask = heat > state.threshold
        iou = None if self.true_mask is None else metrics.iou(mask, self.true_mask)
        return ExplorerResult(heat, mask, iou, thresholds, curve)

    @torch.no_grad()
    def _read_map(self, state: ExplorerState, written: int | None) -> tuple[np.ndarray, Any, Any]:
        """Return the map, and its IoU over thresholds; `written`, the time of the token's file, is for the cache."""
        values = self._raw_map(state)
        if state.refined:
            values = self.select(state).refine(HeatMaps(values[None], ("",))).values[0]
        values = values.float().cpu()
        if not values.isfinite().all():
            raise ValueError("the map holds NaN or infinite values: look at the image that made it")
        maps = HeatMaps(values[None], ("",)).resize(*self.image.shape[:2]).normalized()
        thresholds = curve = None
        if self.true_mask is not None:
            thresholds, curve = metrics.miou_curve(values[None], self.true_mask[None])
        return maps.values[0].numpy(), thresholds, curve

    def _raw_map(self, state: ExplorerState) -> torch.Tensor:
        """Return the word's (h, w) map, not normalised."""
        selected, word = self.select(state), " ".join(state.word.split())
        if state.method == "token":
            if not state.token_path.strip():
                raise ValueError("name the file of an optimised token, as written by OptimizedToken.save")
            token = OptimizedToken.load(Path(state.token_path.strip()).expanduser())
            token.require_model(self.record.fingerprint)
            if selected is not self.record:  # no other model, and no choice of the token's own
                token = replace(token, info={})
            return token.maps(selected)[word or token.words[0]]
        if not word:
            raise ValueError("type a word, such as car or traffic light")
        if state.method == "daam":
            maps = selected.daam()
            if maps.words and not occurrences(word, maps.words):
                raise ValueError(f"{word!r} is not in the prompt, which DAAM reads: choose OV-DAAM or LDAAM")
            return maps[word]
        read = selected.ldaam if state.method == "ldaam" else selected.daam
        return read(state.text if state.text.strip() else word)[word]


def _written(state: ExplorerState) -> int | None:
    """Return when the token's file was written: the same name may come to hold another token."""
    try:
        return Path(state.token_path.strip()).expanduser().stat().st_mtime_ns if state.method == "token" else None
    except (OSError, ValueError, RuntimeError):  # what is wrong with it is said where it is read
        return None
