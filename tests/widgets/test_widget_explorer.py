"""The explorer: what a state shows is what the library says, bad words are messages, knobs and state agree."""

import base64
import dataclasses
import html
import io
import json
import re
import time

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from helpers import generate
from PIL import Image

import daamlib
from daamlib import AttentionRecord, metrics, optimize_token
from daamlib.widgets import explore, pictures
from daamlib.widgets.explorer_model import METHODS, ExplorerModel, ExplorerState

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


def parts(widget):
    """A widget and all in it, in order."""
    return [widget, *(part for child in getattr(widget, "children", ()) for part in parts(child))]


def control(explorer, label):
    """The control that a user finds under a label."""
    (found,) = [part for part in parts(explorer) if getattr(part, "description", None) == label]
    return found


def shown(explorer):
    """The HTML of the message, of the image, and of the heat map, mask and curve."""
    return [part.value for part in parts(explorer) if isinstance(part, widgets.HTML)]


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


def test_refined_maps(sd1_pipe, record, image):
    with daamlib.trace(sd1_pipe, self_attention=True) as trace:
        generate(sd1_pipe)
    explorer = explore(trace[0], image, state={"word": "car"})
    plain = explorer.result.heat
    control(explorer, "refined").value = True
    assert explorer.state["refined"]
    expected = trace[0].refine(trace[0].ldaam("car")).resize(*SIZE).normalized()["car"]
    np.testing.assert_allclose(explorer.result.heat, expected.cpu(), atol=1e-5)
    assert not np.allclose(plain, explorer.result.heat, atol=0.01)
    without = explore(record, image)
    assert control(without, "refined").disabled
    without.change(refined=True)
    assert "self_attention" in without.result.message


def test_a_token_that_chose_its_layers(record, image, tmp_path):
    mask = np.zeros(SIZE, bool)
    mask[5:20, 10:30] = True
    token = optimize_token([record], [mask], word="car", layers=[record.layers[-1].name], weight_decay=1e-2)
    token.save(tmp_path / "car.safetensors")
    explorer = explore(record, image, state={"method": "token", "token_path": str(tmp_path / "car.safetensors")})
    expected = token.maps(record).resize(*SIZE).normalized()["car"]
    np.testing.assert_allclose(explorer.result.heat, expected.cpu(), atol=1e-5)


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
    assert "tree" in explorer.result.message


def test_a_token_file_that_is_written_anew_is_read_anew(record, image, mask, tmp_path):
    path = tmp_path / "token.safetensors"
    state = {"method": "token", "token_path": str(path), "word": ""}
    explorer = explore(record, image, state=state)
    assert str(path) in explorer.result.message
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
    assert "another model" in explorer.result.message


# -- what cannot be read is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"word": ""}, "type"),
        ({"word": "  "}, "type"),
        ({"word": "bus", "method": "daam"}, "choose OV-DAAM or LDAAM"),
        ({"word": "bus", "text": "a car"}, "bus"),
        ({"word": "bus " * 100}, "77"),
        ({"grids": []}, "layers"),
        ({"grids": [(3, 3)]}, "layers"),
        ({"steps": (0, 7)}, "steps"),
        ({"method": "token"}, "file"),
        ({"method": "token", "token_path": "/"}, "/"),
        ({"method": "token", "token_path": "a\0b"}, "a\0b"),
    ],
)
def test_what_cannot_be_read_is_a_message_and_the_next_word_works(record, image, mask, state, message):
    explorer = explore(record, image, mask)
    good, before = explorer.result, explorer.state
    explorer.change(**state)
    result = explorer.result
    assert message in result.message
    assert (result.heat, result.mask, result.iou, result.curve) == (None, None, None, None)
    assert html.escape(result.message) in shown(explorer)[0]
    assert "<figure" not in shown(explorer)[2]  # of another word
    assert "min-height:240px" in shown(explorer)[2]  # the cells below stay where they are
    explorer.change(**before)
    np.testing.assert_array_equal(explorer.result.heat, good.heat)
    assert shown(explorer)[2].count("<figure") == 3 and shown(explorer)[0].endswith("></div>")


def test_markup_in_a_word_stays_text(record, image):
    explorer = explore(record, image, state={"word": "<b>car</b>", "method": "daam"})
    assert "<b>" not in shown(explorer)[0] and "&lt;b&gt;car" in shown(explorer)[0]
    explorer.change(method="ldaam", word='"><img src=x>', text="")
    assert "<img src=x" not in shown(explorer)[2]


def test_a_record_of_sums(linear, image):
    explorer = explore(linear, image)
    assert explorer.state["method"] == "ldaam" and explorer.result.message == ""
    assert control(explorer, "Steps").disabled
    explorer.change(method="ov-daam")
    assert 'store="queries"' in explorer.result.message
    explorer.change(method="ldaam", steps=(0, 0))
    assert "sums" in explorer.result.message
    explorer.change(steps=(0, 1), grids=[(8, 12)])  # its layers can be taken apart
    assert explorer.result.message == ""


def test_a_record_without_a_pipeline_reads_its_prompt(record, image, tmp_path):
    record.save(tmp_path / "record")
    explorer = explore(AttentionRecord.load(tmp_path / "record"), image)
    assert explorer.state["method"] == "daam" and explorer.result.message == ""
    explorer.change(method="ldaam")
    assert "text encoder" in explorer.result.message


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"colour_map": "jet"}, ValueError, "jet"),
        ({"method": "ovam"}, ValueError, "ovam"),
        ({"threshold": 1.5}, ValueError, "threshold"),
        ({"steps": (2, 1)}, ValueError, "steps"),
        ({"word": 3}, TypeError, "word"),
        ({"treshold": 0.5}, TypeError, "treshold"),
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
    with pytest.raises(TypeError, match="AttentionRecord"):
        explore("record", image)
    with pytest.raises(TypeError, match="PIL"):
        explore(record, "image.png")
    with pytest.raises(ValueError, match="uint8"):
        explore(record, image[..., 0])
    with pytest.raises(ValueError, match="boolean"):
        explore(record, image, mask.astype(np.uint8))
    with pytest.raises(ValueError, match="empty"):
        explore(record, image, mask & False)
    with pytest.raises(ValueError, match="agree"):
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
    assert ExplorerState("a", "", "ldaam", [0, 1], [[8, 8], [16, 16]]).grids == ((16, 16), (8, 8))


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
    np.testing.assert_array_equal(explorer.model.image, pixels)
    assert explorer.result.iou == metrics.iou(explorer.result.mask, truth)


# -- the view ----------------------------------------------------------------------------------------------------


def test_the_controls_turn_the_state_and_follow_it(record, image, mask):
    explorer = explore(record, image, mask)
    word, method, steps = (control(explorer, label) for label in ("Word", "Method", "Steps"))
    coarse, fine = control(explorer, "8 × 12"), control(explorer, "16 × 24")
    word.value = "bus"
    control(explorer, "Threshold").value = 0.25
    steps.value = (1, 1)
    fine.value = False
    state = explorer.state
    assert (state["word"], state["threshold"], state["steps"], state["grids"]) == ("bus", 0.25, (1, 1), ((8, 12),))
    seen = []
    explorer.model.observe(lambda change: seen.append(change.new), "result")
    explorer.change(word="tree", method="daam", steps=(0, 0), grids=[(16, 24)], opacity=0.2)
    assert seen == [explorer.result]  # not also the states that the controls pass through
    assert explorer.state["grids"] == ((16, 24),)
    assert (word.value, method.value, steps.value, control(explorer, "Opacity").value) == ("tree", "daam", (0, 0), 0.2)
    assert fine.value and not coarse.value
    text = control(explorer, "In the text")
    assert text.disabled and text.placeholder == record.prompt
    fine.value = False
    assert "layers" in explorer.result.message


def test_the_pictures_are_those_of_the_result(record, image, mask):
    explorer = explore(record, image, mask)
    result = explorer.result
    _, first, page = shown(explorer)
    np.testing.assert_array_equal(pixels_in(first), [image])
    blended = np.asarray(daamlib.overlay(image, result.heat, opacity=0.65))
    cut = pictures.cut_out(image, result.mask, mask)
    np.testing.assert_array_equal(pixels_in(page), [blended, cut])
    assert f"map &gt; 0.50: IoU {result.iou:.3f}" in page
    explorer.change(threshold=0.7)
    _, again, page = shown(explorer)
    assert f"map &gt; 0.70: IoU {explorer.result.iou:.3f}" in page
    x, y = map(float, re.search(r'circle cx="([\d.]+)" cy="([\d.]+)"', page).groups())
    assert x == pytest.approx(30 + 0.7 * 162, abs=0.06)
    assert y == pytest.approx(168 - 160 * explorer.result.iou, abs=0.06)
    assert again is first


def test_four_pictures_fit_in_a_row_of_a_notebook(record, image, mask):
    """JupyterLab's output is 848 pixels wide in a window of 1280; a widget has margins of 2 pixels."""
    explorer = explore(record, image, mask)
    page = "".join(shown(explorer))
    widths = [int(width) for width in re.findall(r"<figure style=.margin:0;width:(\d+)px", page)]
    (gap,) = re.findall(r"gap:0 (\d+)px", shown(explorer)[2])
    assert len(widths) == 4 and sum(widths) + 2 * int(gap) + 6 + 4 * 2 <= 848


def test_every_control_and_picture_has_a_name(record, image, mask):
    explorer = explore(record, image, mask)
    controls = [part for part in parts(explorer) if hasattr(part, "value") and not isinstance(part, widgets.Label)]
    assert all(part.description for part in controls if not isinstance(part, widgets.HTML)) and len(controls) > 10
    _, first, page = shown(explorer)
    for text in (first, page):
        assert len(re.findall(r'<img alt="[^"]+"', text)) == text.count("<img") > 0
    assert re.search(r'role="img".* aria-label="IoU over the threshold', page)


@pytest.mark.slow
def test_words_of_the_bundled_model_are_read_one_after_the_other(device):
    pipe = daamlib.load_pipeline(device=device, dtype=torch.float32)
    with daamlib.trace(pipe) as trace:
        image = generate(pipe, "a car", height=128, width=128, num_inference_steps=4, output_type="pil")[0]
    mask = np.zeros((128, 128), bool)
    mask[40:80, 40:80] = True
    explorer, seen = explore(trace[0], image, mask), set()
    for word in ["tree", "bus", "road", "sky", "person", "rider", "sidewalk", "building", "traffic light"]:
        control(explorer, "Word").value = word
        assert explorer.result.message == ""
        seen.add(explorer.result.heat.tobytes())
    assert len(seen) == 9


def test_the_model_works_without_a_view(record, image):
    model = ExplorerModel(record, image)
    seen = []
    model.observe(lambda change: seen.append(change.new.message), "result")
    model.change(word="bus")
    model.change(word="bus")  # no change
    model.change(word="")
    assert len(seen) == 2 and seen[0] == "" and "type" in seen[1]
