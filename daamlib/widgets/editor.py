"""Drawing on one label map: each tool is a function of arrays, and an editor that can undo them.

Points are (x, y) as a pointer gives them, in image pixels: x to the right, y down, (0, 0) the image's upper left
corner, so that the first pixel's centre is (0.5, 0.5).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from skimage.draw import disk
from skimage.draw import polygon as polygon_pixels
from skimage.measure import block_reduce
from skimage.segmentation import flood, random_walker

UNDO = 100  # steps that can be taken back
WALK_SIDE = 256  # pixels; the random walker solves a linear system in all of them, so larger images are halved first
EDGE = 200  # beta of the random walker: the larger, the harder it is to cross an edge of the image


def stroke(points: ArrayLike, radius: float, shape: tuple[int, int]) -> np.ndarray:
    """Return the (H, W) mask under a round brush of `radius` pixels drawn along one or more points [[x, y], ...].

        under = stroke([[10.5, 4.5], [30, 20]], radius=3, shape=(64, 64))

    Raises ValueError for bad points or a radius out of range, as do the other tools.
    """
    y, x = _points(points, 1, shape)
    if not 0 < radius <= max(shape):
        raise ValueError(f"the brush's radius must be in (0, {max(shape)}] pixels, got {radius!r}")
    counts = np.ceil(np.hypot(np.diff(y), np.diff(x)) / max(1, radius / 4)).astype(int)  # of discs, a smooth edge
    legs = [np.linspace((y[i], x[i]), (y[i + 1], x[i + 1]), n, endpoint=False) for i, n in enumerate(counts)]
    centres = np.unique(np.round(np.concatenate([*legs, [(y[-1], x[-1])]]), 1), axis=0)
    under = np.zeros(shape, bool)
    for centre in centres:
        # a disc of half a pixel between two pixels would hit neither
        under[disk(centre, max(radius, 0.71), shape=shape)] = True
    return under


def inside(points: ArrayLike, shape: tuple[int, int]) -> np.ndarray:
    """Return the (H, W) mask inside of a polygon of three or more points."""
    y, x = _points(points, 3, shape)
    where = np.zeros(shape, bool)
    where[polygon_pixels(y, x, shape)] = True
    return where


def region(labels: np.ndarray, points: ArrayLike) -> np.ndarray:
    """Return the (H, W) mask of the first point's label, connected to it side by side."""
    y, x = (int(np.floor(value[0] + 0.5)) for value in _points(points, 1, labels.shape))
    if not (0 <= y < labels.shape[0] and 0 <= x < labels.shape[1]):
        raise ValueError(f"the point ({x}, {y}) lies outside of the image of {labels.shape} pixels")
    return flood(labels, (y, x), connectivity=1)


def grow(image: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Give each pixel the seed that a random walker from there meets first; it hardly crosses edges (Grady 2006).

    `seeds` are (H, W) integers of two kinds or more, 0 where there is none. Images larger than `WALK_SIDE` are walked
    in blocks of pixels. Raises ValueError for less than two kinds, seeds too close to each other, or a flat image.
    """
    kinds = np.unique(seeds[seeds > 0])
    if len(kinds) < 2:
        raise ValueError("scribble on the object with its class, and around it with another or unlabeled")
    if image.min() == image.max():
        raise ValueError("the image has one flat colour, there are no edges to grow to: use the brush")
    block = -(-max(seeds.shape) // WALK_SIDE)
    rest = [(0, -side % block) for side in seeds.shape]  # repeats the last pixels; zeros would be an edge
    small = block_reduce(np.pad(image, (*rest, (0, 0)), mode="edge"), (block, block, 1), np.mean) / 255
    coarse = block_reduce(seeds, block, np.max)
    marked = np.where(coarse > 0, np.searchsorted(kinds, coarse) + 1, 0)
    if len(np.unique(marked[marked > 0])) < len(kinds):
        raise ValueError("the scribbles lie too close to each other: draw them further apart")
    # the tolerance: probabilities a little outside of [0, 1] do not change which is largest
    walked = marked if marked.all() else random_walker(small, marked, EDGE, "cg_j", prob_tol=1, channel_axis=-1)
    walked = walked.repeat(block, 0).repeat(block, 1)[: seeds.shape[0], : seeds.shape[1]]
    return np.where(seeds > 0, seeds, kinds[walked - 1])


def _points(points: ArrayLike, least: int, shape: tuple[int, int]) -> np.ndarray:
    """Return (2, n): y and x of the points in scikit-image's coordinates, whole numbers at the pixels' centres."""
    try:
        array = np.asarray(points, float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"points must be [[x, y], ...], got {points!r}") from error
    if array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all():
        raise ValueError(f"points must be [[x, y], ...], got an array of shape {array.shape} or not finite")
    if len(array) < least:
        raise ValueError(f"expected {least} points or more, got {len(array)}")
    far = 2 * max(shape)  # a pointer may leave the image, but a stroke must not take for ever
    return np.clip(array, -far, far).T[::-1] - 0.5


@dataclass(frozen=True, eq=False)
class _Step:
    """A state to undo to. base: the labels before the scribbles of `seeds`, which are 1 + id, 0 for none."""

    labels: np.ndarray
    base: np.ndarray
    seeds: np.ndarray


class LabelEditor:
    """One (H, W, 3) uint8 image and its (H, W) uint8 label map, changed by tools, each of which can be undone.

        editor = LabelEditor(np.zeros((64, 64, 3), np.uint8))
        editor.brush([[10, 10], [30, 20]], radius=3, value=26)
        editor.undo()

    It begins with a copy of `labels`, or with zeros. Raises ValueError for labels of another shape or type.
    """

    def __init__(self, image: np.ndarray, labels: np.ndarray | None = None) -> None:
        shape = image.shape[:2]
        labels = np.zeros(shape, np.uint8) if labels is None else labels
        if labels.shape != shape or labels.dtype != np.uint8:
            raise ValueError(f"expected labels of {shape} uint8 for this image, got {labels.shape} {labels.dtype}")
        self.image = image
        self._steps = [_Step(labels.copy(), labels, np.zeros(shape, np.int32))]

    @property
    def labels(self) -> np.ndarray:
        """(H, W) uint8, a copy."""
        return self._steps[-1].labels.copy()

    @property
    def can_undo(self) -> int:
        """Number of steps that can be taken back."""
        return len(self._steps) - 1

    def brush(self, points: ArrayLike, radius: float, value: int) -> None:
        """Paint along the points; `value` 0 erases."""
        self._set(stroke(points, radius, self.image.shape[:2]), value)

    def polygon(self, points: ArrayLike, value: int) -> None:
        """Paint the inside of a polygon."""
        self._set(inside(points, self.image.shape[:2]), value)

    def fill(self, points: ArrayLike, value: int) -> None:
        """Paint the whole region of one label that the first point is in."""
        self._set(region(self._steps[-1].labels, points), value)

    def grow(self, points: ArrayLike, radius: float, value: int) -> None:
        """Scribble, and let the scribbles since the last other tool grow to the edges of the image.

        What grows from 0 (unlabeled) only bounds the others: there the labels stay as they were before the scribbles.
        Until there are two kinds of scribbles they are painted as they are.
        """
        last = self._steps[-1]
        seeds = last.seeds.copy()
        seeds[stroke(points, radius, seeds.shape)] = value + 1
        several = len(np.unique(seeds[seeds > 0])) > 1
        grown = grow(self.image, seeds) if several else seeds
        labels = np.where(grown > 1, grown - 1, last.base).astype(np.uint8)
        labels[seeds == 1] = 0
        self._push(replace(last, labels=labels, seeds=seeds))

    def undo(self) -> None:
        """Take the last step back, if there is one."""
        if self.can_undo:
            self._steps.pop()

    def _set(self, where: np.ndarray, value: int) -> None:
        labels = self._steps[-1].labels.copy()
        labels[where] = value
        self._push(_Step(labels, labels, np.zeros_like(self._steps[-1].seeds)))

    def _push(self, step: _Step) -> None:
        self._steps = [*self._steps[-UNDO:], step]
