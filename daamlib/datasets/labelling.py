"""Labellers: what makes the label map of an image while it is generated.

A labeller is a callable (image, record, prompt) -> ids: of an (H, W, 3) uint8 image, its `AttentionRecord` and its
prompt the (H, W) uint8 ids, 255 where they are to be ignored. A plain function's record has all that any map needs. A
labeller may have attributes:

    store       what its record has to store (see `daamlib.trace`); None: it reads no record and is given None
    texts       with the store "maps": the texts whose maps are stored
    self_attention    whether the record has to store the image's self-attention, for `record.refine`
    settings    JSON's own types: what its label maps depend on, which a dataset is resumed with alone
    source      its name in dataset.json; without it, its module and name
    class_list  the classes of its ids (`daamlib.classes`); without it Cityscapes, or `generate`'s `classes`
    require_model(pipe)   raises ValueError for a pipeline whose images it cannot label
"""

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from typing_extensions import override

from ..attention.readers import fingerprint_of
from ..attention.record import AttentionRecord
from ..cityscapes import BY_NAME
from ..classes import Classes, ClassList, class_list
from ..tokens.label_maps import Threshold, assign_labels, check_tokens, ids_of, is_complete, label_map, of_each, text_of
from ..tokens.token import OptimizedToken
from .dataset import names
from .folder import short_hash, whole_number

MOST_ITERATIONS = 100  # of `record.refine`; long before, every map is flat
THINGS = ("object", "human", "vehicle")  # categories of Cityscapes; the others are surroundings

Labeller = Callable[[np.ndarray, AttentionRecord | None, str], np.ndarray]


@dataclass(frozen=True, eq=False)
class AnnotatorLabeller:
    """The labeller of a segmentation network.

        labeller = AnnotatorLabeller(labels_for(pipe))  # of daamlib_lab.urban.annotator
        ids = labeller(np.asarray(image), None, "a car")

    Attributes:
        annotate: images (B, H, W, 3) uint8 -> Cityscapes ids (B, H, W) uint8.
    """

    annotate: Callable[[np.ndarray], np.ndarray]
    source: ClassVar[str] = "daamlib_lab.urban.annotator.annotate"
    store: ClassVar[None] = None

    def __call__(self, image: np.ndarray, record: AttentionRecord | None, prompt: str) -> np.ndarray:
        """Return the network's (H, W) uint8 ids of one image."""
        return self.annotate(image[None])[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class _RecordLabeller(ABC):
    """Base of labellers that read a record with `daamlib.tokens.label_maps.label_map`; see their attributes."""

    named_only: bool = True
    iterations: int = 1
    edge_aware: bool = False
    ids: Classes | None = None

    def __post_init__(self) -> None:
        whole_number("iterations", self.iterations, 0, MOST_ITERATIONS)
        classes, _, limits = self._reads()
        limits = {name: of_each(limit, classes) for name, limit in limits.items()}
        ids = [self.class_list.id(name) for name in classes]
        assign_labels(np.zeros((len(ids), 1, 1)), ids, **limits)  # checks the limits

    @abstractmethod
    def _reads(self) -> tuple[tuple[str, ...], Any, dict[str, Any]]:
        """Return the classes, what `label_map` reads them by, and its limits."""

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in their order."""
        return self._reads()[0]

    @functools.cached_property
    def class_list(self) -> ClassList:
        """The classes of its label maps."""
        return class_list(self.classes if self.ids is None else self.ids)

    @property
    def self_attention(self) -> bool:
        """True if `trace` has to store what `record.refine` needs."""
        return self.iterations > 0

    @property
    def settings(self) -> dict[str, Any]:
        """Values that a label map depends on, apart from the image, in JSON's own types."""
        return {name: getattr(self, name) for name in ("named_only", "iterations", "edge_aware")}

    def __call__(self, image: np.ndarray, record: AttentionRecord | None, prompt: str) -> np.ndarray:
        """Return the (H, W) uint8 ids that are read in the record of an image of this prompt."""
        if record is None:
            raise TypeError("tokens and words read an image's record: expected an AttentionRecord, got None")
        classes, reads, limits = self._reads()
        if self.named_only:
            limits["names"] = [name for name in classes if self._takes_part(name, prompt)]
        limits |= {"image": image} if self.edge_aware else {}
        height, width, ids = *image.shape[:2], self.class_list.ids
        return label_map(record, reads, size=(height, width), iterations=self.iterations, ids=ids, **limits)

    def _takes_part(self, name: str, prompt: str) -> bool:
        return names(name, prompt)


@dataclass(frozen=True, eq=False)
class TokenLabeller(_RecordLabeller):
    """Labeller of optimised tokens, see `daamlib.tokens.label_maps.label_map`.

        labeller = TokenLabeller((car, person), named_only=False)
        ids = labeller(np.asarray(image), record, record.prompt)
        labeller = TokenLabeller.of([car])  # with tokens of `fit_classes` it labels every pixel

    LDAAM tokens need memory that does not grow with the steps, DAAM tokens the queries of every step. Raises ValueError
    for bad words or thresholds, and tokens without calibrated probabilities.

    Attributes:
        tokens: of one model; their words name the classes, each once. A word "background" (of a token fitted with
            `background=True`) competes in the softmax but is never written.
        threshold: probability from which on a pixel is of a class; one number, or {name: number} of every class.
        ignore_from: probability from which on, up to `threshold`, it is ignored.
        margin: a pixel whose best two probabilities differ by less is ignored.
        named_only: a pixel is only of a class that the image's prompt names (`names`); where another may be, it is
            ignored.
        iterations: of `record.refine` on the probabilities, 0: none.
        edge_aware: whether they are up-sampled along the image's edges.
        ids: {class: id} or another class list (`daamlib.classes.class_list`); None: that of the words.
    """

    tokens: tuple[OptimizedToken, ...]
    threshold: Threshold = 0.6
    ignore_from: Threshold = 0.4
    margin: float = 0.0
    source: ClassVar[str] = "daamlib.datasets.TokenLabeller"

    @classmethod
    def of(cls, tokens: Sequence[OptimizedToken], **options: Any) -> "TokenLabeller":
        """Return the labeller with the defaults that suit the tokens: those of `fit_classes` label as `label_map`."""
        whole = {"threshold": 0.0, "ignore_from": 0.0, "margin": 0.1, "named_only": False, "edge_aware": True}
        return cls(tuple(tokens), **(whole if is_complete(tokens) else {}) | options)

    def __post_init__(self) -> None:
        for name in ("threshold", "ignore_from"):
            known = getattr(self, name)
            if isinstance(known, Mapping) and set(known) != set(self.classes):
                raise ValueError(f"{name} has numbers for {sorted(known)}, the tokens read {sorted(self.classes)}")
        if is_complete(self.tokens) and (self.named_only or of_each(self.ignore_from, self.classes) != 0):
            raise ValueError("tokens of fit_classes label every pixel: use TokenLabeller.of")
        super().__post_init__()

    @functools.cached_property
    @override
    def class_list(self) -> ClassList:
        return ids_of(self.tokens) if self.ids is None else class_list(self.ids)

    def _reads(self) -> tuple[tuple[str, ...], Any, dict[str, Any]]:
        limits = {name: getattr(self, name) for name in ("margin", "threshold", "ignore_from")}
        return check_tokens(self.tokens), self.tokens, limits

    @property
    def store(self) -> str:
        """Store of `trace`: sums over the steps are enough if all tokens are LDAAM's."""
        sums = [token.method in ("ldaam", "keys") and token.info.get("max_timestep") is None for token in self.tokens]
        return "linear" if all(sums) else "queries"

    @property
    @override
    def settings(self) -> dict[str, Any]:
        plain = [dict(t) if isinstance(t, Mapping) else float(t) for t in (self.threshold, self.ignore_from)]
        tokens = [{"words": list(t.words), "method": t.method, "sha256": _hash(t)} for t in self.tokens]
        margin = {"margin": float(self.margin)} if self.margin else {}  # folders that were begun without it go on
        return {"tokens": tokens, "threshold": plain[0], "ignore_from": plain[1], **margin, **super().settings}

    def require_model(self, pipe: Any) -> None:
        """ValueError unless all tokens were optimised on this pipeline's model."""
        fingerprint = fingerprint_of(pipe)
        for token in self.tokens:
            token.require_model(fingerprint)


@dataclass(frozen=True, eq=False)
class WordLabeller(_RecordLabeller):
    """Zero-shot labeller: words compete for each pixel, see `daamlib.tokens.label_maps.word_probabilities`.

        labeller = WordLabeller({"car": "car", "person": "person", "road": "street"})
        ids = labeller(np.asarray(image), record, record.prompt)

    Raises ValueError for unknown classes, less than two words, and a margin outside of 0 ... 1.

    Attributes:
        words: {class: word}.
        margin: a pixel whose best two probabilities differ by less is ignored.
        named_only: only classes that the prompt names (`names`, also by word) and Cityscapes' surroundings take part.
        iterations, edge_aware: as of `TokenLabeller`.
        ids: {class: id} or another class list; None: that of the classes' names.
    """

    words: Mapping[str, str]
    margin: float = 0.1
    source: ClassVar[str] = "daamlib.datasets.WordLabeller"
    store: ClassVar[str] = "maps"

    def __post_init__(self) -> None:
        if len(self.words) < 2:
            raise ValueError(f"words compete with each other: expected two or more, got {list(self.words)}")
        super().__post_init__()

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts whose maps `trace` has to store."""
        return (text_of(self.words),)

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return {"words": dict(self.words), "margin": float(self.margin), **super().settings}

    def _reads(self) -> tuple[tuple[str, ...], Any, dict[str, Any]]:
        return tuple(self.words), self.words, {"margin": self.margin}

    def _takes_part(self, name: str, prompt: str) -> bool:
        surroundings = name in BY_NAME and BY_NAME[name].category not in THINGS
        return surroundings or names(name, prompt) or names(self.words[name], prompt)


def label_image(
    labeller: Labeller, image: np.ndarray, record: AttentionRecord | None, prompt: str, classes: ClassList
) -> np.ndarray:
    """Return the label map of one image. Raises ValueError for a result of another shape, type or values."""
    with torch.no_grad():
        ids = labeller(image, record, prompt)
    if not isinstance(ids, np.ndarray) or ids.dtype != np.uint8 or ids.shape != image.shape[:2]:
        got = f"{ids.shape} {ids.dtype}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise ValueError(f"a labeller must return an array of {image.shape[:2]} uint8 {classes.name} ids, got {got}")
    classes.check(ids, "the result of the labeller")
    return ids


def _hash(token: OptimizedToken) -> str:
    """Return the `short_hash` of all that a token's probabilities follow from."""
    parts: list[Any] = [token.method, token.words, token.rows, token.scale, token.bias]
    parts += [token.info.get(name) for name in ("multiclass", "passes", "layers", "max_timestep")]
    embedding = token.embedding.detach().cpu().float().contiguous()
    return short_hash([json.dumps(parts).encode(), embedding.numpy().tobytes()])
