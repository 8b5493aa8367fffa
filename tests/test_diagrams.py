"""The diagrams can be read: boxes apart, texts in place and large enough, arrows around what they do not join."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.text import Text

from daamlib_lab import diagrams

ALL = [
    "latent_diffusion",
    "cross_attention",
    "open_vocabulary_daam",
    "linear_collapse",
    "token_optimisation",
    "synthetic_segmentation",
]
SMALLEST = 9  # points
GAP = 3  # pixels between two things that do not belong together


def parts(figure, kind):
    """The visible artists of a kind that are not empty, with the rectangles of pixels that they fill."""
    figure.canvas.draw()
    found = [artist for artist in figure.findobj(kind) if artist.get_visible()]
    return [(artist, artist.get_window_extent()) for artist in found if artist.get_window_extent().width > 1]


def points(arrow):
    """(n, 2) pixels along an arrow, from its start; its head is left out."""
    corners = arrow.get_transform().transform_path(arrow.get_path()).to_polygons(closed_only=False)[0]
    share = np.linspace(0, 1, 200)[:, None]
    return np.concatenate([a + share * (b - a) for a, b in itertools.pairwise(corners)])


def holds(outer, inner):
    return outer.x0 <= inner.x0 and outer.y0 <= inner.y0 and inner.x1 <= outer.x1 and inner.y1 <= outer.y1


def faults(figure):
    """What makes a diagram hard to read, in words."""
    boxes, texts = [extent for _, extent in parts(figure, FancyBboxPatch)], parts(figure, Text)
    for a, b in itertools.combinations(boxes, 2):
        if a.padded(GAP).overlaps(b):
            yield "two boxes overlap"
    for (a, first), (b, second) in itertools.combinations(texts, 2):
        if first.overlaps(second):
            yield f"texts overlap: {a.get_text()!r}, {b.get_text()!r}"
    paths = np.concatenate([points(arrow) for arrow in figure.findobj(FancyArrowPatch)])
    for text, extent in texts:
        if text.get_fontsize() < SMALLEST:
            yield f"small text: {text.get_text()!r}"
        if not holds(figure.bbox, extent):
            yield f"text outside the figure: {text.get_text()!r}"
        if any(extent.overlaps(box) and not holds(box.padded(-GAP), extent) for box in boxes):
            yield f"text over the edge of a box: {text.get_text()!r}"
        if extent.count_contains(paths):
            yield f"an arrow crosses a text: {text.get_text()!r}"
    for box in boxes:
        if not holds(figure.bbox, box):
            yield "a box outside the figure"
        if box.padded(-GAP).count_contains(paths):
            yield "an arrow crosses a box"


@pytest.fixture
def draw():
    yield lambda name: getattr(diagrams, name)()
    plt.close("all")


@pytest.mark.parametrize("name", ALL)
def test_a_diagram_can_be_read(draw, name):
    figure = draw(name)
    assert list(faults(figure)) == []
    assert len(parts(figure, FancyBboxPatch)) >= 8 and len(figure.findobj(FancyArrowPatch)) >= 7


@pytest.mark.parametrize("name", ALL)
def test_every_arrow_joins_two_boxes(draw, name):
    figure = draw(name)
    boxes = [extent.padded(GAP) for _, extent in parts(figure, FancyBboxPatch)]
    for arrow in figure.findobj(FancyArrowPatch):
        start, *_, end = points(arrow)
        assert any(box.contains(*start) for box in boxes), start
        assert any(box.contains(*end) for box in boxes), end


def test_every_diagram_is_checked():
    public = [name for name, value in vars(diagrams).items() if callable(value) and name[0].islower()]
    assert sorted(name for name in public if getattr(diagrams, name).__module__ == diagrams.__name__) == sorted(ALL)


SPOILT = {
    "two boxes overlap": lambda ax: ax.add_patch(FancyBboxPatch((0.3, 2.0), 1, 1)),
    "small text": lambda ax: ax.text(4, 0.6, "tiny", fontsize=7),
    "text outside": lambda ax: ax.text(8.7, 0.6, "far out", fontsize=10),
    "texts overlap": lambda ax: [ax.text(7.5, 1.2, text, fontsize=10) for text in ("one", "another")],
    "text over the edge": lambda ax: ax.text(0.8, 2.95, "a text that is too long for it", ha="center", fontsize=10),
    "an arrow crosses a text": lambda ax: ax.text(2, 1.9, "in its way", fontsize=10),
    "an arrow crosses a box": lambda ax: ax.add_patch(FancyArrowPatch((0.2, 2.95), (8.8, 2.95))),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_the_check_sees_a_spoilt_diagram(draw, fault):
    figure = draw("latent_diffusion")
    SPOILT[fault](figure.axes[0])
    assert [found for found in faults(figure) if found.startswith(fault)]
