"""The explorer: what a state shows is what the library says, bad words are messages, knobs and state agree."""

import base64
import dataclasses
import io
import json
import re
import time

import numpy as np
import pytest
import torch
from helpers import generate
from matplotlib import colormaps
from PIL import Image

import daamlib
from daamlib import AttentionRecord, metrics, optimize_token
from daamlib.widgets import explore
from daamlib.widgets import pictures as _pictures
from daamlib.widgets.explorer import ExplorerModel
from daamlib.widgets.reading import METHODS, Reader, State

SIZE = 32, 48


@pytest.fixture(scope="module")
def record(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe)
    return trace[0]


@pytest.fixture(scope="module")
def linear(sd1_pipe):
    with daamlib.trace(sd1_pipe, store="linear") as trace:
        generate(sd1_pipe)
    return trace[0]


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)


@pytest.fixture
def mask():
    found = np.zeros(SIZE, bool)
    found[5:20, 10:30] = True
    return found


def expected(heat):
    """(H, W): a raw map as the explorer shows it."""
    return daamlib.HeatMaps(heat[None].cpu(), ("",)).resize(*SIZE).normalized().values[0].numpy()


def pixels_in(page):
    """The pictures of some HTML."""
    found = re.findall(r"base64,([^\"]+)", page)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


# -- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "heat"),
    [
        ({"word": "bus"}, lambda r: r.ldaam("bus")["bus"]),
        ({"word": " traffic  light "}, lambda r: r.ldaam("traffic light")["traffic light"]),
        ({"word": "bus", "text": "a bus"}, lambda r: r.ldaam("a bus")["bus"]),
        ({"word": "bus", "text": "a bus", "method": "ov-daam"}, lambda r: r.daam("a bus")["bus"]),
        ({"word": "bus", "method": "ov-daam"}, lambda r: r.daam("bus")["bus"]),
        ({"word": "tree", "method": "daam"}, lambda r: r.daam()["tree"]),
        ({"word": "tree", "method": "daam", "text": "not read"}, lambda r: r.daam()["tree"]),
        ({"word": "bus", "steps": (1, 1)}, lambda r: r.select(steps=[1]).ldaam("bus")["bus"]),
        (
            {"word": "tree", "method": "daam", "grids": [(8, 12)], "steps": (0, 0)},
            lambda r: r.select(layers=lambda layer: layer.grid == (8, 12), steps=[0]).daam()["tree"],
        ),
    ],
)
def test_a_state_shows_what_the_library_says(record, image, mask, state, heat):
    explorer = explore(record, image, mask, state={**state, "threshold": 0.4})
    result, raw = explorer.result, heat(record)
    assert result.message == ""
    np.testing.assert_array_equal(result.heat, expected(raw))
    np.testing.assert_array_equal(result.mask, result.heat > 0.4)
    assert result.iou == metrics.iou(result.mask, mask)
    thresholds, curve = metrics.miou_curve(raw[None], mask[None])
    np.testing.assert_array_equal(result.thresholds, thresholds)
    np.testing.assert_array_equal(result.curve, curve)
    assert result.iou == pytest.approx(curve[40])


def test_without_a_mask_there_is_no_iou(record, image):
    result = explore(record, image).result
    assert (result.iou, result.thresholds, result.curve) == (None, None, None)
    assert result.heat.shape == result.mask.shape == SIZE


@pytest.mark.parametrize("method", ["ldaam", "daam"])
def test_an_optimised_token(record, image, mask, tmp_path, method):
    token = optimize_token([record], [mask], method=method, word="car", iterations=3)
    token.save(tmp_path / "car.safetensors")
    explorer = explore(record, image, state={"method": "token", "token_path": str(tmp_path / "car.safetensors")})
    assert explorer.state["word"] == "car"  # of the prompt, and of the token
    np.testing.assert_array_equal(explorer.result.heat, expected(token.maps(record)["car"]))
    explorer.change(word="")  # the token's own
    np.testing.assert_array_equal(explorer.result.heat, expected(token.maps(record)["car"]))
    explorer.change(grids=explorer.state["grids"][:1])  # fewer layers are no other model
    assert explorer.result.message == ""
    part = record.select(layers=lambda layer: layer.grid == record.grid)
    np.testing.assert_array_equal(explorer.result.heat, expected(dataclasses.replace(token, info={}).maps(part)["car"]))
    explorer.change(word="tree")
    assert "'tree' is not in the text" in explorer.result.message


def test_a_token_file_that_is_written_anew_is_read_anew(record, image, mask, tmp_path):
    path = tmp_path / "token.safetensors"
    state = {"method": "token", "token_path": str(path), "word": ""}
    explorer = explore(record, image, state=state)
    assert "no optimised token at" in explorer.result.message
    optimize_token([record], [mask], word="car", iterations=3).save(path)
    explorer.change(threshold=0.3)
    first = explorer.result
    assert first.message == ""
    time.sleep(0.01)
    optimize_token([record], [~mask], word="car", iterations=3).save(path)
    explorer.change(threshold=0.4)
    assert (explorer.result.heat != first.heat).any()


def test_a_token_of_another_model_is_a_message(record, sd2_pipe, image, mask, tmp_path):
    with daamlib.trace(sd2_pipe) as trace:
        generate(sd2_pipe)
    optimize_token([trace[0]], [mask], word="car", iterations=2).save(tmp_path / "token")
    explorer = explore(record, image, state={"method": "token", "token_path": str(tmp_path / "token")})
    assert "optimised on another model" in explorer.result.message


# -- what cannot be read is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"word": ""}, "type a word"),
        ({"word": "  "}, "type a word"),
        ({"word": "bus", "method": "daam"}, "'bus' is not in the text"),
        ({"word": "bus", "text": "a car"}, "'bus' is not in the text"),
        ({"word": "bus " * 100}, "the text encoder reads 77"),
        ({"grids": []}, "no layers are left"),
        ({"grids": [(3, 3)]}, "no layers are left"),
        ({"steps": (0, 7)}, "the record has the steps 0 to 1"),
        ({"method": "token"}, "name the file of an optimised token"),
        ({"method": "token", "token_path": "/"}, "no optimised token at /"),
        ({"method": "token", "token_path": "a\0b"}, "no optimised token at a"),
    ],
)
def test_what_cannot_be_read_is_a_message_and_the_next_word_works(record, image, mask, state, message):
    explorer = explore(record, image, mask)
    good, before = explorer.result, explorer.state
    explorer.change(**state)
    result = explorer.result
    assert message in result.message
    assert (result.heat, result.mask, result.iou, result.curve) == (None, None, None, None)
    assert message.split("'")[-1] in explorer._message.value
    assert "<figure" not in explorer._pictures.value  # of another word
    explorer.change(**before)
    np.testing.assert_array_equal(explorer.result.heat, good.heat)
    assert explorer._pictures.value.count("<figure") == 3 and explorer._message.value.endswith("></div>")


def test_markup_in_a_word_stays_text(record, image):
    explorer = explore(record, image, state={"word": "<b>car</b>", "method": "daam"})
    assert "<b>" not in explorer._message.value and "&lt;b&gt;car" in explorer._message.value
    explorer.change(method="ldaam", word='"><img src=x>', text="")
    assert "<img src=x" not in explorer._pictures.value


def test_a_record_of_sums(linear, image):
    explorer = explore(linear, image)
    assert explorer.state["method"] == "ldaam" and explorer.result.message == ""
    assert explorer._controls["steps"].disabled
    explorer.change(method="ov-daam")
    assert 'store="linear"' in explorer.result.message
    explorer.change(method="ldaam", steps=(0, 0))
    assert 'store="linear"' in explorer.result.message
    explorer.change(steps=(0, 1), grids=[(8, 12)])  # its layers can be taken apart
    assert explorer.result.message == ""


def test_a_record_without_a_pipeline_reads_its_prompt(record, image, tmp_path):
    record.save(tmp_path / "record")
    explorer = explore(AttentionRecord.load(tmp_path / "record"), image)
    assert explorer.state["method"] == "daam" and explorer.result.message == ""
    explorer.change(method="ldaam")
    assert "no text encoder" in explorer.result.message


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"colour_map": "jet"}, ValueError, "'magma'.* got 'jet'"),
        ({"method": "ovam"}, ValueError, "'ldaam', 'ov-daam', 'daam', 'token', got 'ovam'"),
        ({"threshold": 1.5}, ValueError, r"threshold must be in \[0, 1\], got 1.5"),
        ({"steps": (2, 1)}, ValueError, "0 <= first <= last"),
        ({"word": 3}, TypeError, "word must be a string, got 3"),
        ({"treshold": 0.5}, TypeError, "no treshold: expected word, text"),
    ],
)
def test_code_that_asks_for_what_cannot_be_gets_an_error(record, image, values, error, message):
    explorer = explore(record, image)
    before = explorer.state
    with pytest.raises(error, match=message):
        explorer.change(**values)
    with pytest.raises(error, match=message):
        explore(record, image, state=values)
    assert explorer.state == before


def test_images_and_masks_that_do_not_fit(record, image, mask):
    with pytest.raises(TypeError, match="expected an AttentionRecord, as trace.0., got str"):
        explore("record", image)
    with pytest.raises(TypeError, match="expected a PIL image"):
        explore(record, "image.png")
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 image, got \(32, 48\)"):
        explore(record, image[..., 0])
    with pytest.raises(ValueError, match="boolean"):
        explore(record, image, mask.astype(np.uint8))
    with pytest.raises(ValueError, match="is empty"):
        explore(record, image, mask & False)
    with pytest.raises(ValueError, match=r"the mask is \(48, 32\), the image \(32, 48\)"):
        explore(record, image, mask.T)
    explore(record, Image.fromarray(image), torch.from_numpy(mask))


# -- state -------------------------------------------------------------------------------------------------------


def test_the_state_goes_on_in_code(record, image):
    explorer = explore(record, image, state={"word": "bus", "steps": (1, 1), "grids": [(8, 12)], "threshold": 0.3})
    found = json.loads(json.dumps(explorer.state))  # plain values
    again = explore(record, image, state=found)
    assert again.state == explorer.state
    heat = expected(again.record.ldaam("bus")["bus"])
    np.testing.assert_array_equal(heat > again.state["threshold"], explorer.result.mask)


def test_the_first_state():
    assert set(METHODS) == {"ldaam", "ov-daam", "daam", "token"}
    assert State("a", "", "ldaam", [0, 1], [[8, 8], [16, 16]]).grids == ((16, 16), (8, 8))


def test_nothing_is_computed_twice(record, image, mask, monkeypatch):
    calls = []
    original = AttentionRecord.ldaam
    monkeypatch.setattr(AttentionRecord, "ldaam", lambda self, text: calls.append(text) or original(self, text))
    explorer = explore(record, image, mask)
    explorer.change(threshold=0.2, opacity=0.1, colour_map="cividis")
    explorer.change(threshold=0.9)
    assert calls == ["car"]
    explorer.change(grids=[(8, 12)])
    selected = explorer.record
    explorer.change(word="bus")
    assert calls == ["car", "car", "bus"] and explorer.record is selected
    explorer.change(grids=[(16, 24), (8, 12)])
    assert explorer.record is record


def test_the_arguments_are_left_as_they_are(record, image, mask):
    pixels, truth = image.copy(), mask.copy()
    explorer = explore(record, image, mask)
    image[:], mask[:] = 0, False
    explorer.change(word="tree")
    np.testing.assert_array_equal(explorer.model.reader.image, pixels)
    assert explorer.result.iou == metrics.iou(explorer.result.mask, truth)


# -- the view ----------------------------------------------------------------------------------------------------


def test_the_controls_turn_the_state_and_follow_it(record, image, mask):
    explorer = explore(record, image, mask)
    controls = explorer._controls
    controls["word"].value = "bus"
    controls["threshold"].value = 0.25
    controls["steps"].value = (1, 1)
    explorer._grids[16, 24].value = False
    state = explorer.state
    assert (state["word"], state["threshold"], state["steps"], state["grids"]) == ("bus", 0.25, (1, 1), ((8, 12),))
    seen = []
    explorer.model.observe(lambda change: seen.append(change.new), "result")
    explorer.change(word="tree", method="daam", steps=(0, 0), grids=[(16, 24)], opacity=0.2)
    assert seen == [explorer.result]  # not also the states that the controls pass through
    assert explorer.state["grids"] == ((16, 24),)
    assert [controls[name].value for name in ("word", "method", "steps", "opacity")] == ["tree", "daam", (0, 0), 0.2]
    assert [box.value for box in explorer._grids.values()] == [True, False]
    assert controls["text"].disabled and controls["text"].placeholder == record.prompt
    explorer._grids[16, 24].value = False
    assert "no layers" in explorer.result.message


def test_the_pictures_are_those_of_the_result(record, image, mask):
    explorer = explore(record, image, mask)
    result = explorer.result
    np.testing.assert_array_equal(pixels_in(explorer._image.value), [image])
    blended = _pictures.overlay(image, result.heat, 0.65, "magma")
    cut = _pictures.cut_out(image, result.mask, mask)
    np.testing.assert_array_equal(pixels_in(explorer._pictures.value), [blended, cut])
    assert f"map &gt; 0.50: IoU {result.iou:.3f}" in explorer._pictures.value
    picture = explorer._image.value
    explorer.change(threshold=0.7)
    assert f"map &gt; 0.70: IoU {explorer.result.iou:.3f}" in explorer._pictures.value
    x, y = map(float, re.search(r'circle cx="([\d.]+)" cy="([\d.]+)"', explorer._pictures.value).groups())
    assert x == pytest.approx(30 + 0.7 * 182, abs=0.06)
    assert y == pytest.approx(188 - 180 * explorer.result.iou, abs=0.06)
    assert explorer._image.value is picture


def test_every_control_and_picture_has_a_name(record, image, mask):
    explorer = explore(record, image, mask)
    assert all(control.description for control in (*explorer._controls.values(), *explorer._grids.values()))
    for page in (explorer._image.value, explorer._pictures.value):
        assert len(re.findall(r'<img alt="[^"]+"', page)) == page.count("<img") > 0
    assert re.search(r'role="img".* aria-label="IoU over the threshold', explorer._pictures.value)


@pytest.mark.parametrize("name", _pictures.COLOUR_MAPS)
def test_the_colour_maps_are_perceptually_uniform(name):
    """Their lightness (CIE L*) rises steadily, unlike a rainbow's."""
    from skimage.color import rgb2lab

    lightness = rgb2lab(colormaps[name](np.linspace(0, 1, 64))[None, :, :3])[0, :, 0]
    assert (np.diff(lightness) > 0).all()
    assert np.diff(lightness).std() < 0.35 * np.diff(lightness).mean()


def test_the_overlay():
    image = np.full((1, 3, 3), 100, np.uint8)
    heat = np.array([[0, 0.5, 1]], np.float32)
    np.testing.assert_array_equal(_pictures.overlay(image, heat, 0, "viridis"), image)
    ends = _pictures.overlay(image, heat, 1, "viridis")[0, [0, 2]]
    np.testing.assert_array_equal(ends, np.rint(255 * np.array(colormaps["viridis"]([0.0, 1.0]))[:, :3]))
    half = _pictures.overlay(image, heat, 0.5, "viridis").astype(float)
    full = _pictures.overlay(image, heat, 1, "viridis").astype(float)
    assert abs(half - (100 + full) / 2).max() <= 1


@pytest.mark.slow
def test_words_of_the_bundled_model_are_read_one_after_the_other(device):
    pipe = daamlib.load_pipeline(device=device, dtype=torch.float32)
    with daamlib.trace(pipe) as trace:
        image = generate(pipe, "a car", height=128, width=128, num_inference_steps=4, output_type="pil")[0]
    mask = np.zeros((128, 128), bool)
    mask[40:80, 40:80] = True
    explorer, seen = explore(trace[0], image, mask), set()
    for word in ["tree", "bus", "road", "sky", "person", "rider", "sidewalk", "building", "traffic light"]:
        explorer._controls["word"].value = word
        assert explorer.result.message == ""
        seen.add(explorer.result.heat.tobytes())
    assert len(seen) == 9


def test_the_model_works_without_a_view(record, image):
    reader = Reader(record, image)
    model = ExplorerModel(reader, reader.first_state())
    seen = []
    model.observe(lambda change: seen.append(change.new.message), "result")
    model.change(word="bus")
    model.change(word="bus")  # no change
    model.change(word="")
    assert seen == ["", "type a word, such as car or traffic light"]
