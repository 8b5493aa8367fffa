"""Labellers: what makes the label map of an image while it is generated.

A labeller is a callable (image, record, prompt) -> ids: of an (H, W, 3) uint8 image, its `AttentionRecord` and its
prompt the (H, W) uint8 Cityscapes ids, 255 where they are to be ignored. It may have attributes:

    store       what its record has to keep, "linear" or "queries" (see `daamlib.trace`); without it, record is None
    settings    JSON's own types: what its label maps depend on, which a dataset is resumed with alone
    source      its name in dataset.json; without it, its module and name
    require_model(pipe)   raises ValueError for a pipeline whose images it cannot label
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..attention.heatmaps import upsample
from ..attention.record import AttentionRecord
from ..attention.unet import fingerprint_of
from ..cityscapes import IGNORED
from ..tokens.optimize import BACKGROUND
from ..tokens.token import OptimizedToken, require_calibrated
from .dataset import label_id, names
from .masks import check_ids

Labeller = Callable[[np.ndarray, AttentionRecord | None, str], np.ndarray]
Threshold = float | Mapping[str, float]  # one for all classes, or one for each by its name


@dataclass(frozen=True, eq=False)
class AnnotatorLabeller:
    """The labeller of a segmentation network: AnnotatorLabeller(labels_for(pipe)), of `daamlib.urban.annotator`.

    Attributes:
        annotate: images (B, H, W, 3) uint8 -> Cityscapes ids (B, H, W) uint8.
    """

    annotate: Callable[[np.ndarray], np.ndarray]
    source: ClassVar[str] = "daamlib.urban.annotator.annotate"

    def __call__(self, image: np.ndarray, record: AttentionRecord | None, prompt: str) -> np.ndarray:
        """The network's (H, W) uint8 ids of one image."""
        return self.annotate(image[None])[0]


@dataclass(frozen=True, eq=False)
class TokenLabeller:
    """The labeller of optimised tokens: what their probabilities say, see `label_map`, up-sampled to the image.

    LDAAM tokens need memory that does not grow with the steps, DAAM tokens the queries of every step.

    Attributes:
        tokens: of one model; their words name the classes, each once, as in `daamlib.cityscapes`. A word "background"
            (of a token fitted with `background=True`) takes part as what is none of them.
        threshold: probability from which on a pixel is of a class; one number, or {name: number} of every class.
        ignore_from: probability from which on, up to `threshold`, it is ignored.
        named_only: a pixel is only of a class that the image's prompt names (`names`); where another may be, it is
            ignored.

    Raises:
        ValueError: for words that are no Cityscapes labels or come twice, thresholds that do not fit, and tokens
            without calibrated probabilities.
    """

    tokens: tuple[OptimizedToken, ...]
    threshold: Threshold = 0.6
    ignore_from: Threshold = 0.4
    named_only: bool = True
    source: ClassVar[str] = "daamlib.datasets.TokenLabeller"

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("there is no class to label: expected one optimised token or more")
        twice = sorted({word for word in self.classes if self.classes.count(word) > 1})
        if twice:
            raise ValueError(f"two tokens read {', '.join(twice)}: give one token a class")
        for token in self.tokens:
            require_calibrated(token)
            if token.info.get("joint") and BACKGROUND not in token.words:
                raise ValueError(
                    f"the token of {', '.join(token.words)} was fitted to tell its classes apart, not to tell them "
                    "from the rest of an image: use background=True, or joint=False"
                )
        for name in ("threshold", "ignore_from"):
            known = getattr(self, name)
            if isinstance(known, Mapping) and set(known) != set(self.classes):
                raise ValueError(f"{name} has numbers for {sorted(known)}, the tokens read {sorted(self.classes)}")
        label_map(np.zeros((len(self.classes), 1, 1)), self._ids, *self._limits)  # checks the numbers

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the tokens' order."""
        return tuple(word for token in self.tokens for word in token.words if word != BACKGROUND)

    @property
    def store(self) -> str:
        """What `trace` has to keep: sums over the steps are enough for LDAAM."""
        return "linear" if all(token.method == "ldaam" for token in self.tokens) else "queries"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a label map depends on besides the image, in JSON's own types."""
        plain = [dict(t) if isinstance(t, Mapping) else float(t) for t in (self.threshold, self.ignore_from)]
        tokens = [{"words": list(t.words), "method": t.method, "sha256": _hash(t)} for t in self.tokens]
        return {"tokens": tokens, "threshold": plain[0], "ignore_from": plain[1], "named_only": self.named_only}

    def require_model(self, pipe: Any) -> None:
        """ValueError unless all tokens were optimised on this pipeline's model."""
        fingerprint = fingerprint_of(pipe)
        for token in self.tokens:
            token.require_model(fingerprint)

    def __call__(self, image: np.ndarray, record: AttentionRecord | None, prompt: str) -> np.ndarray:
        """The (H, W) uint8 ids that the tokens read in the record of an image of this prompt."""
        if record is None:
            raise TypeError("tokens read an image's record: expected an AttentionRecord, got None")
        named = [name for name in self.classes if not self.named_only or names(name, prompt)]
        found: dict[str, torch.Tensor] = {}
        for token in self.tokens:
            found |= zip(token.words, token.probabilities(record), strict=True)
            mine = [word for word in token.words if word in (*named, BACKGROUND)]
            # what the prompt does not name takes no part in the softmax of what it names
            if token.info.get("joint") and len(mine) < len(token.words) and mine != [BACKGROUND]:
                found |= zip(mine, token.probabilities(record, mine), strict=True)
        maps = upsample(torch.stack([found[name] for name in self.classes]), image.shape[:2]).clamp(0, 1)
        return label_map(maps, self._ids, *self._limits, named=[name in named for name in self.classes])

    @functools.cached_property
    def _ids(self) -> list[int]:
        return [label_id(name) for name in self.classes]

    @functools.cached_property
    def _limits(self) -> list[Any]:
        """The threshold and the ignore band's lower end, each one number or K."""
        both = (self.threshold, self.ignore_from)
        return [[t[name] for name in self.classes] if isinstance(t, Mapping) else t for t in both]


def label_map(
    probabilities: torch.Tensor | np.ndarray,
    ids: Sequence[int],
    threshold: float | Sequence[float] = 0.6,
    ignore_from: float | Sequence[float] = 0.4,
    *,
    named: Sequence[bool] | None = None,
) -> np.ndarray:
    """The id of each pixel's most probable class where that is probable enough, 255 in the ignore band, 0 below it.

    A pixel has the id of the named class with the highest probability p (the first of equals) if p >= threshold. It is
    255, to be ignored, if p >= ignore_from, or if that holds of any class that is not named; else 0, none of these.

    Args:
        probabilities: (K, H, W) in [0, 1].
        ids: of the K classes.
        threshold: one number, or K of them.
        ignore_from: the ignore band's lower end, one number or K of them, at most the threshold.
        named: K times whether a pixel may be of the class; None: all.

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: for other probabilities, or thresholds without 0 <= ignore_from <= threshold <= 1.
    """
    if isinstance(probabilities, torch.Tensor):
        probabilities = probabilities.detach().float().cpu().numpy()
    values = np.asarray(probabilities, np.float32)
    if values.ndim != 3 or len(values) != len(ids):
        raise ValueError(f"expected (K, H, W) probabilities of {len(ids)} classes, got shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():  # false for NaN too
        raise ValueError("the probabilities are not all in [0, 1], some may be NaN: look at the model's dtype")
    upper, lower = (np.broadcast_to(np.asarray(t, np.float32), len(ids)) for t in (threshold, ignore_from))
    if not ((lower >= 0) & (lower <= upper) & (upper <= 1)).all():
        raise ValueError(f"expected 0 <= ignore_from <= threshold <= 1, got {ignore_from} and {threshold}")
    chosen = np.flatnonzero(np.ones(len(ids), bool) if named is None else named)
    others = np.setdiff1d(np.arange(len(ids)), chosen)
    ignored = (values[others] >= lower[others, None, None]).any(axis=0)
    labels = np.zeros(values.shape[1:], np.uint8)
    if len(chosen):
        best, highest = chosen[values[chosen].argmax(axis=0)], values[chosen].max(axis=0)
        ignored |= highest >= lower[best]
        labels = np.where(highest >= upper[best], np.asarray(ids, np.uint8)[best], labels)
    return np.where(ignored & (labels == 0), np.uint8(IGNORED), labels)


def label_image(labeller: Labeller, image: np.ndarray, record: AttentionRecord | None, prompt: str) -> np.ndarray:
    """The label map of one image. Raises ValueError for a result of another shape, type or values."""
    with torch.no_grad():
        ids = labeller(image, record, prompt)
    if not isinstance(ids, np.ndarray) or ids.dtype != np.uint8 or ids.shape != image.shape[:2]:
        got = f"{ids.shape} {ids.dtype}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise ValueError(f"a labeller must return an array of {image.shape[:2]} uint8 Cityscapes ids, got {got}")
    check_ids(ids[ids != IGNORED], "the result of the labeller")
    return ids


def _hash(token: OptimizedToken) -> str:
    """16 hexadecimal digits of the SHA-256 of what a token's probabilities follow from."""
    parts: list[Any] = [token.method, token.words, token.rows, token.scale, token.bias]
    parts += [token.info.get(name) for name in ("joint", "passes")]
    digest = hashlib.sha256(json.dumps(parts).encode())
    digest.update(token.embedding.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
