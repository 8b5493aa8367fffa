"""What the explorer shows, without any view: a state goes in, a heat map, a mask and its IoU come out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .. import metrics
from ..attention.heatmaps import HeatMaps
from ..attention.record import AttentionRecord
from ..datasets.dataset import CLASSES
from ..tokens.token import OptimizedToken
from .pictures import COLOUR_MAPS, rgb

METHODS = {"ldaam": "LDAAM", "ov-daam": "OV-DAAM", "daam": "DAAM", "token": "optimised token"}
# of a word that cannot be read, a file that is none, a GPU that is full: said in the widget, which lives on
EXPECTED = (ValueError, TypeError, LookupError, OSError, RuntimeError)


@dataclass(frozen=True)
class State:
    """All that can be chosen, in plain values.

    word: whose map is shown. text: in which it is read (LDAAM, OV-DAAM), "" for the word alone; DAAM reads the prompt.
    method: one of `METHODS`. steps: (first, last), both included, numbered from 0 as in `record.select`.
    grids: (h, w) of the layers that take part. threshold: of the map scaled to its own [0, 1].
    opacity: of the heat map over the image. colour_map: one of `COLOUR_MAPS`. token_path: of the method "token".

    Raises TypeError or ValueError for what no record could be read with.
    """

    word: str
    text: str
    method: str
    steps: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    threshold: float = 0.5
    opacity: float = 0.65
    colour_map: str = COLOUR_MAPS[0]
    token_path: str = ""

    def __post_init__(self) -> None:
        for name in ("word", "text", "token_path"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {getattr(self, name)!r}")
        for name, known in (("method", tuple(METHODS)), ("colour_map", COLOUR_MAPS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")
        for name in ("threshold", "opacity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        # as lists they come back from JSON; as tuples they are keys of the caches
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "grids", tuple(sorted((tuple(grid) for grid in self.grids), reverse=True)))
        if len(self.steps) != 2 or not 0 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps must be (first, last) with 0 <= first <= last, got {self.steps}")


@dataclass(frozen=True, eq=False)
class Reading:
    """What a state shows of one image; all None but the message where it cannot be read.

    heat: (H, W) float32, the map at the image's size, scaled to its own [0, 1]. mask: (H, W) bool, heat > threshold.
    iou: of the mask with the true one, thresholds and curve: (101,) each, its IoU over thresholds; None without one.
    message: what was wrong, "" if nothing.
    """

    heat: np.ndarray | None = None
    mask: np.ndarray | None = None
    iou: float | None = None
    thresholds: np.ndarray | None = None
    curve: np.ndarray | None = None
    message: str = ""


class Reader:
    """Reads one record; keeps the last selection of its layers and steps, and the last map, for the next state.

    So a new word costs one matrix product (LDAAM), and a new threshold neither that nor the curve.
    """

    def __init__(self, record: AttentionRecord, image, mask=None) -> None:
        """image: PIL, or (H, W, 3) uint8. mask: (H, W) bool, the truth, or None.

        Raises TypeError or ValueError if they are not that, do not agree, or the mask is empty.
        """
        if not isinstance(record, AttentionRecord):
            raise TypeError(f"expected an AttentionRecord, as trace[0], got {type(record).__name__}")
        self.record = record
        self.image = rgb(image)
        self.truth = None
        if mask is not None:
            metrics.iou(mask, mask)  # it says what is wrong with a mask
            self.truth = np.array(torch.as_tensor(mask).cpu())
            if self.truth.shape != self.image.shape[:2]:
                raise ValueError(f"the mask is {self.truth.shape}, the image {self.image.shape[:2]}: they must agree")
        self.grids = tuple(sorted({layer.grid for layer in record.layers}, reverse=True))
        self._selection = _Last()
        self._heat = _Last()
        self._token = _Last()

    @property
    def linear(self) -> bool:
        """Whether the record holds only sums over the steps, which cannot be taken apart."""
        return self.record.layers[0].queries is None

    @property
    def all_steps(self) -> tuple[int, int]:
        return 0, len(self.record.timesteps) - 1

    def first_state(self) -> State:
        """All layers and steps, and a word of the prompt: one of the thesis' four classes if it has one."""
        words = [word.text for word in self.record.prompt_embeddings.words]
        word = next((name for name in CLASSES if name in " ".join(words)), words[-1] if words else "")
        method = "ldaam" if self.record.pipe is not None else "daam"  # no other text can be embedded
        return State(word=word, text="", method=method, steps=self.all_steps, grids=self.grids)

    def read(self, state: State) -> Reading:
        """What `state` shows; what is wrong with it comes back as a message, never as an exception."""
        # what a map depends on; not on the threshold or the colours
        key = replace(state, threshold=0.5, opacity=0.5, colour_map=COLOUR_MAPS[0]), self._stamp(state)
        try:
            heat, thresholds, curve = self._heat(key, lambda: self._read(state))
        except EXPECTED as error:
            return Reading(message=str(error) or type(error).__name__)
        mask = heat > state.threshold
        iou = None if self.truth is None else metrics.iou(mask, self.truth)
        return Reading(heat, mask, iou, thresholds, curve)

    def select(self, state: State) -> AttentionRecord:
        """The record of the state's layers and steps. Raises ValueError if there are none such."""
        grids, steps = state.grids, state.steps
        if not grids or not set(grids) <= set(self.grids):
            raise ValueError(f"no layers are left: choose among the grids {list(self.grids)}, got {list(grids)}")
        if steps[1] > self.all_steps[1]:
            raise ValueError(f"the record has the steps 0 to {self.all_steps[1]}, got {steps[0]} to {steps[1]}")
        if grids == self.grids and steps == self.all_steps:
            return self.record  # no copy of its queries, and its own linear map
        return self._selection((grids, steps), lambda: self._select(grids, steps))

    def _select(self, grids: tuple, steps: tuple[int, int]) -> AttentionRecord:
        numbers = None if steps == self.all_steps else range(steps[0], steps[1] + 1)
        return self.record.select(layers=lambda layer: layer.grid in grids, steps=numbers)

    @torch.no_grad()
    def _read(self, state: State) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        values = self._map(state).float().cpu()
        if not values.isfinite().all():
            raise ValueError("the map holds NaN or infinite values: look at the image that made it")
        maps = HeatMaps(values[None], ("",)).resize(*self.image.shape[:2]).normalized()
        thresholds = curve = None
        if self.truth is not None:
            thresholds, curve = metrics.miou_curve(values[None], self.truth[None])
        return maps.values[0].numpy(), thresholds, curve

    def _map(self, state: State) -> torch.Tensor:
        """(h, w): the word's map, not normalised."""
        selected, word = self.select(state), " ".join(state.word.split())
        if state.method == "token":
            token = self._load_token(state)
            # a selection of layers is no other model, so the token was compared with the whole record
            return replace(token, info={}).maps(selected)[word or token.words[0]]
        if not word:
            raise ValueError("type a word, such as car or traffic light")
        if state.method == "daam":
            return selected.daam()[word]
        maps = selected.ldaam if state.method == "ldaam" else selected.daam
        return maps(state.text if state.text.strip() else word)[word]

    def _load_token(self, state: State) -> OptimizedToken:
        path = state.token_path.strip()
        if not path:
            raise ValueError("name the file of an optimised token, as written by OptimizedToken.save")
        token = self._token((path, self._stamp(state)), lambda: OptimizedToken.load(Path(path).expanduser()))
        token.require_model(self.record.fingerprint)
        return token

    @staticmethod
    def _stamp(state: State) -> int | None:
        """When the token's file was written: the same name may come to hold another token."""
        try:
            return Path(state.token_path.strip()).expanduser().stat().st_mtime_ns if state.method == "token" else None
        except (OSError, ValueError, RuntimeError):  # what is wrong with it is said where it is read
            return None


class _Last:
    """Keeps one result, the last: a record's queries can be large, and one hand turns one knob at a time."""

    def __init__(self) -> None:
        self.key = self.value = None

    def __call__(self, key, make: Callable):
        if self.key is None or key != self.key:
            self.key = self.value = None  # freed before the next is made
            self.value = make()
            self.key = key
        return self.value
