"""Label maps that optimised tokens read from the attention of an image while it is generated."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..attention.heatmaps import upsample
from ..attention.record import AttentionRecord
from ..attention.unet import fingerprint_of
from ..cityscapes import IGNORED
from ..tokens.optimize import BACKGROUND
from ..tokens.token import OptimizedToken, require_calibrated
from .dataset import is_named, label_id

Threshold = float | Mapping[str, float]  # one for all classes, or one for each by its name


def label_map(
    probabilities: torch.Tensor | np.ndarray,
    ids: Sequence[int],
    sure: float | Sequence[float] = 0.6,
    unsure: float | Sequence[float] = 0.4,
) -> np.ndarray:
    """(H, W) uint8: the id of the most probable class where it is sure, 255 where it is not, 0 where it is unlikely.

    probabilities: (K, H, W). ids: of the K classes. sure, unsure: one number or K of them. A pixel is the class with
    the highest probability p (the first of equals) if p >= sure, 255 (uncertain, to be ignored) if p >= unsure, else 0
    (none of these classes). No class at all, K = 0, gives zeros. Raises ValueError for probabilities that are no
    (K, H, W) numbers in [0, 1], or for thresholds without 0 <= unsure <= sure <= 1.
    """
    if isinstance(probabilities, torch.Tensor):
        probabilities = probabilities.detach().float().cpu().numpy()
    chances = np.asarray(probabilities, np.float32)
    if chances.ndim != 3 or len(chances) != len(ids):
        raise ValueError(f"expected (K, H, W) probabilities of {len(ids)} classes, got shape {chances.shape}")
    if not ((chances >= 0) & (chances <= 1)).all():  # false for NaN too
        raise ValueError("the probabilities are not all in [0, 1], some may be NaN: look at the model's dtype")
    upper, lower = (np.broadcast_to(np.asarray(t, np.float32), len(ids)) for t in (sure, unsure))
    if not ((lower >= 0) & (lower <= upper) & (upper <= 1)).all():
        raise ValueError(f"expected thresholds 0 <= unsure <= sure <= 1, got sure {sure} and unsure {unsure}")
    if not len(ids):
        return np.zeros(chances.shape[1:], np.uint8)
    best, highest = chances.argmax(axis=0), chances.max(axis=0)
    certain = np.asarray(ids, np.uint8)[best]
    doubtful = np.where(highest >= lower[best], np.uint8(IGNORED), np.uint8(0))
    return np.where(highest >= upper[best], certain, doubtful)


@dataclass(frozen=True, eq=False)
class Reader:
    """Optimised tokens that label images: reader(record, (height, width)) -> (height, width) uint8 Cityscapes ids.

    tokens: their words name the classes, each once, as in `daamlib.cityscapes`. A word "background" (a token fitted
    with `background=True`) takes part as what is none of them. sure, unsure: see `label_map`; a number for all classes
    or {name: number} of every class. named_only: consider only the classes that the image's prompt names, by the same
    rule as `Dataset.with_class`: what the model was not asked for is seldom there.

    Raises ValueError for words that are no Cityscapes labels or come twice, thresholds that do not fit, and tokens
    without calibrated probabilities.
    """

    tokens: tuple[OptimizedToken, ...]
    sure: Threshold = 0.6
    unsure: Threshold = 0.4
    named_only: bool = True

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("there is no class to label: expected one optimised token or more")
        words = [word for token in self.tokens for word in token.words if word != BACKGROUND]
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice:
            raise ValueError(f"two tokens read {', '.join(twice)}: give one token a class")
        for token in self.tokens:
            _require_labels(token)
        for name, threshold in (("sure", self.sure), ("unsure", self.unsure)):
            known = threshold.keys() if isinstance(threshold, Mapping) else self.classes
            if set(known) != set(self.classes):
                raise ValueError(f"{name} has thresholds for {sorted(known)}, the tokens read {sorted(self.classes)}")
        label_map(np.zeros((len(words), 1, 1)), self._ids(words), *self._thresholds(words))  # checks the numbers

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the tokens' order."""
        words = [word for token in self.tokens for word in token.words if word != BACKGROUND]
        self._ids(words)
        return tuple(words)

    @property
    def store(self) -> str:
        """What `trace` has to keep: sums over the steps are enough for LDAAM."""
        return "linear" if all(token.method == "ldaam" for token in self.tokens) else "queries"

    def require_model(self, pipe) -> None:
        """ValueError unless all tokens were optimised on this pipeline's model."""
        fingerprint = fingerprint_of(pipe)
        for token in self.tokens:
            token.require_model(fingerprint)

    def settings(self) -> dict[str, Any]:
        """Everything that a label map depends on besides the image, in JSON's own types."""
        plain = [dict(t) if isinstance(t, Mapping) else float(t) for t in (self.sure, self.unsure)]
        tokens = [{"words": list(t.words), "method": t.method, "sha256": _hash(t)} for t in self.tokens]
        return {"tokens": tokens, "sure": plain[0], "unsure": plain[1], "named_only": self.named_only}

    def __call__(self, record: AttentionRecord, size: tuple[int, int]) -> np.ndarray:
        chances: dict[str, torch.Tensor] = {}
        for token in self.tokens:
            words = [word for word in token.words if self._considers(word, record)]
            if set(words) - {BACKGROUND}:
                chances |= zip(words, token.probabilities(record, words), strict=True)
        chances.pop(BACKGROUND, None)
        names = list(chances)
        maps = torch.stack(list(chances.values())) if names else torch.zeros(0, *record.grid)
        maps = upsample(maps, size) if names else torch.zeros(0, *size)
        return label_map(maps.clamp(0, 1), self._ids(names), *self._thresholds(names))

    def _considers(self, word: str, record: AttentionRecord) -> bool:
        return word == BACKGROUND or not self.named_only or is_named(word, record.prompt or "")

    @staticmethod
    def _ids(names: Sequence[str]) -> list[int]:
        try:
            return [label_id(name) for name in names]
        except ValueError as error:
            raise ValueError(f"a token's word must name its class: {error}") from error

    def _thresholds(self, names: Sequence[str]) -> tuple[list[float], list[float]]:
        both = (self.sure, self.unsure)
        return tuple([float(t[name] if isinstance(t, Mapping) else t) for name in names] for t in both)


def _require_labels(token: OptimizedToken) -> None:
    """ValueError unless the token's probabilities tell its classes from the rest of an image."""
    require_calibrated(token)
    if token.info.get("joint") and BACKGROUND not in token.words:
        raise ValueError(
            f"the token of {', '.join(token.words)} was fitted to tell its classes apart, not to tell them from the "
            "rest of an image: use background=True, or joint=False"
        )


def _hash(token: OptimizedToken) -> str:
    """16 hexadecimal digits of the SHA-256 of what a token's probabilities follow from."""
    parts = [token.method, token.words, token.rows, token.scale, token.bias]
    parts += [token.info.get(name) for name in ("joint", "passes")]
    digest = hashlib.sha256(json.dumps(parts).encode())
    digest.update(token.embedding.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
