"""Pictures without matplotlib: what lies where, in which colour, and what is refused."""

import numpy as np
import pytest
import torch
from helpers import generate
from matplotlib import colormaps
from PIL import Image
from skimage.color import rgb2lab
from tiny_joint import shared, traced

import daamlib
from daamlib.attention.pictures import COLOUR_MAPS
from daamlib.cityscapes import COLOURS

GREY = np.full((4, 6, 3), 100, np.uint8)
HEAT = torch.arange(6.0).view(2, 3)
PLACES = np.arange(256, dtype=np.float32).reshape(16, 16)


@pytest.mark.parametrize("name", COLOUR_MAPS)
def test_the_colour_maps_are_matplotlibs_and_perceptually_uniform(name):
    """Their lightness (CIE L*) rises steadily, unlike a rainbow's."""
    painted = np.asarray(daamlib.overlay(np.zeros((16, 16, 3), np.uint8), PLACES, opacity=1, colour_map=name))
    expected = colormaps[name](PLACES.astype(np.uint8), bytes=True)[..., :3]
    assert abs(painted.astype(int) - expected).max() <= 12 and abs(painted.astype(int) - expected).mean() < 1
    lightness = rgb2lab(painted.reshape(-1, 3)[::4])[:, 0]
    assert (np.diff(lightness) > 0).all()
    assert np.diff(lightness).std() < 0.35 * np.diff(lightness).mean()


def test_a_map_is_scaled_up_sampled_and_mixed():
    np.testing.assert_array_equal(daamlib.overlay(GREY, HEAT, opacity=0), GREY)
    full = np.asarray(daamlib.overlay(Image.fromarray(GREY), HEAT, opacity=1)).astype(float)
    assert full.shape == GREY.shape
    np.testing.assert_array_equal(full[0, 0], colormaps["magma"](0, bytes=True)[:3])  # the map's minimum
    np.testing.assert_array_equal(full[-1, -1], colormaps["magma"](255, bytes=True)[:3])
    half = np.asarray(daamlib.overlay(GREY, 7 * HEAT - 3, opacity=0.5))
    assert abs(half - (100 + full) / 2).max() <= 1


@pytest.mark.parametrize(
    "image, heat, options, message",
    [
        (GREY, HEAT[None], {}, "finite numbers"),
        (GREY, HEAT / 0, {}, "finite numbers"),
        (GREY, HEAT.T, {}, "ratios of height and width differ"),
        (GREY, HEAT, {"colour_map": "jet"}, "jet"),
        (GREY, HEAT, {"opacity": 2}, "opacity"),
        (GREY / 255, HEAT, {}, "uint8"),
    ],
)
def test_what_is_no_map_of_the_image_is_refused(image, heat, options, message):
    with pytest.raises(ValueError, match=message):
        daamlib.overlay(image, heat, **options)
    with pytest.raises(TypeError, match="PIL"):
        daamlib.overlay("image.png", HEAT)


def test_a_record_paints_a_word_over_its_image(sd1_pipe, tmp_path):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe)
    record, image = trace[0], Image.new("RGB", (96, 64))
    record.overlay("car", image).save(tmp_path / "car.png")
    expected = daamlib.overlay(image, record.daam()["car"])
    np.testing.assert_array_equal(Image.open(tmp_path / "car.png"), expected)
    painted = record.overlay("bus", image, text="a bus", opacity=0.3)
    np.testing.assert_array_equal(painted, daamlib.overlay(image, record.daam("a bus")["bus"], opacity=0.3))
    with pytest.raises(ValueError, match="'bus' is not in the text"):
        record.overlay("bus", image)
    with pytest.raises(ValueError, match="ratios"):
        record.overlay("car", Image.new("RGB", (64, 64)))


def test_a_joint_record_paints_a_word_over_its_image():
    (record,) = traced(shared("SD 3"), words=["car", "road"])
    image = Image.new("RGB", (8 * record.grid[1], 8 * record.grid[0]))
    np.testing.assert_array_equal(record.overlay("car", image), daamlib.overlay(image, record.daam()["car"]))
    painted = record.overlay("road", image, text=["car", "road"])
    np.testing.assert_array_equal(painted, daamlib.overlay(image, record.daam(["car", "road"])["road"]))


def test_a_label_map_is_painted_in_the_colours_of_its_classes():
    labels = np.array([[26, 0, 255], [24, 24, 26]], np.uint8)
    np.testing.assert_array_equal(daamlib.label_picture(labels), COLOURS[labels])
    pets = {"cat": (1, "#ff8000"), "dog": 2}
    np.testing.assert_array_equal(
        daamlib.label_picture(np.array([[1, 0]], np.uint8), classes=pets), [[(255, 128, 0), (0, 0, 0)]]
    )
    over = np.asarray(daamlib.label_picture(labels, GREY, opacity=1))
    np.testing.assert_array_equal(over, COLOURS[labels].repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(daamlib.label_picture(labels, GREY, opacity=0), GREY)
    for wrong, message in ((labels.astype(int), "uint8"), (labels + 100, "no Cityscapes ids"), (labels.T, "ratios")):
        with pytest.raises(ValueError, match=message):
            daamlib.label_picture(wrong, GREY)
    with pytest.raises(ValueError, match="opacity"):
        daamlib.label_picture(labels, opacity=2)
