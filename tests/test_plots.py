"""The figures of the notebooks: texts are large enough, and classes keep their colours."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from daamlib import HeatMaps, plots

SMALLEST = 9  # points
IMAGE = np.full((16, 24, 3), 200, np.uint8)
MASK = np.zeros((16, 24), bool)
MASK[4:12, 6:15] = True
HEAT = torch.arange(24.0).view(4, 6)

FIGURES = {
    "show_images": lambda: plots.show_images([IMAGE] * 3, ["one", "two"], columns=2),
    "show_classes": lambda: plots.show_classes([IMAGE] * 3, [{"car": MASK}] * 3, row_titles=["a", "b"], columns=2),
    "show_maps": lambda: plots.show_maps(IMAGE, {"car": HEAT, "rider": -HEAT}),
    "show_map_rows": lambda: plots.show_map_rows(
        [IMAGE] * 2, {"DAAM": [HEAT] * 2}, masks={"DAAM": [MASK] * 2}, row_titles=["car", "rider"]
    ),
    "show_values": lambda: plots.show_values({"one": HEAT, "two": HEAT}, "share", outline=MASK[::4, ::4]),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_is_large_enough_to_read(name):
    figure = FIGURES[name]()
    figure.canvas.draw()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    assert len(texts) >= 2
    assert {text.get_text(): text.get_fontsize() for text in texts if text.get_fontsize() < SMALLEST} == {}


def test_every_figure_is_checked():
    public = {name for name in vars(plots) if name.startswith("show_")}
    assert public == FIGURES.keys()


def test_classes_and_methods_have_colours_of_their_own():
    colours = [*plots.CLASS_COLOURS.values(), *plots.METHOD_COLOURS.values()]
    for one, other in itertools.combinations(map(to_rgb, colours), 2):
        assert np.abs(np.subtract(one, other)).sum() > 0.3


def test_a_mask_is_outlined_in_its_class_colour_and_filled_as_asked():
    figure = plots.show_classes([IMAGE], [{"rider": MASK}], opacity=0.5)
    _, fill = figure.axes[0].get_images()
    colour = np.array(to_rgb(plots.CLASS_COLOURS["rider"]))
    assert np.allclose(fill.get_array()[MASK], [*colour, 0.5]) and not fill.get_array()[~MASK].any()
    (outline,) = figure.axes[0].collections
    assert np.allclose(outline.get_edgecolor()[0][:3], colour)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(plots.CLASS_COLOURS)


def test_the_maps_of_a_record_and_of_texts_are_shown_by_word():
    maps = HeatMaps.of_words(torch.stack([HEAT, 2 * HEAT, -HEAT]), ("a", "traffic", "light"))
    shown = plots.show_maps(IMAGE, maps).axes
    assert [ax.get_title() for ax in shown if ax.get_title()] == ["image", "a", "traffic", "light"]
    np.testing.assert_array_equal(shown[2].get_images()[0].get_array(), 2 * HEAT)
    shown = plots.show_maps(IMAGE, {"light": maps, "car": HEAT, "array": HEAT.numpy()}).axes
    np.testing.assert_allclose(shown[1].get_images()[0].get_array(), HEAT * 2 / 3)  # the mean over the text's words
    rows = plots.show_maps(IMAGE, HeatMaps.unnamed(HEAT[None])).axes
    assert [ax.get_title() for ax in rows] == ["image", "0"]


def test_what_is_no_map_or_no_image_is_refused():
    with pytest.raises(ValueError, match=r"'car': \(1, 4, 6\)"):
        plots.show_maps(IMAGE, {"car": HEAT[None]})
    for show in (lambda: plots.show_images([]), lambda: plots.show_classes([], [])):
        with pytest.raises(ValueError, match="nothing to show"):
            show()
