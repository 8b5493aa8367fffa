"""Prompts of the drawn world, and its rendered scenes as datasets."""

import json

import numpy as np
import pytest
from small_sets import CAR, contents
from transformers import CLIPTokenizer

from daamlib import datasets
from daamlib.cityscapes import BY_NAME
from daamlib.datasets import folder as files
from daamlib.datasets.prompts import PROMPTS
from daamlib.pipeline import BUNDLED
from daamlib_lab.urban import captions, objects, scenes
from daamlib_lab.urban.dataset import render_dataset
from daamlib_lab.urban.scenes import HELD_OUT, KINDS

# -- prompts -----------------------------------------------------------------------------------------------------


def test_every_class_is_in_half_of_the_prompts():
    prompts = datasets.urban_prompts(200)
    assert len(prompts) == 200
    for name in KINDS:
        assert sum(name in prompt for prompt in prompts) == 100
    for n in range(1, 12):
        few = datasets.urban_prompts(n)
        assert few == prompts[:n]
        assert all(abs(2 * sum(name in prompt for prompt in few) - n) <= 1 for name in KINDS)


def test_the_order_of_the_variations_is_drawn_from_the_seed():
    assert datasets.urban_prompts(40) == datasets.urban_prompts(40, seed=0) != datasets.urban_prompts(40, seed=1)
    with_car = datasets.urban_prompts(4 * 135)[::4]  # 9 cars, 3 places, 5 times
    assert len(set(with_car)) == 135
    assert set(datasets.urban_prompts(4 * 15)[1::4]) == set(datasets.urban_prompts(4 * 30, seed=5)[61::4])
    with pytest.raises(ValueError, match="got 0"):
        datasets.urban_prompts(0)


def test_the_prompts_are_in_the_language_that_the_bundled_model_learnt():
    prompts = datasets.urban_prompts(4 * 135)
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    for word in set(" ".join(prompts).split()):
        assert len(tokenizer.tokenize(word)) == 1, word
    lists = json.loads(PROMPTS.read_text())["slots"]
    assert {time.strip() for time in lists["time"]} == {"", *captions.TIMES.values()}
    assert {place.split(" ", 1)[1] for place in lists["place"]} < set(captions.PLACES)
    assert {car.split()[1] for car in lists["car"]} == {*objects.COLOURS, "car"}
    assert not {"cyclist", "pedestrian", "vehicle", "stop"} & set(" ".join(prompts).split())


def test_without_the_file_of_prompts(monkeypatch, tmp_path):
    monkeypatch.setattr("daamlib.datasets.prompts.PROMPTS", tmp_path / "urban.json")
    with pytest.raises(FileNotFoundError, match="install"):
        datasets.urban_prompts(4)


# -- rendered ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return render_dataset(tmp_path_factory.mktemp("rendered") / "set", 12)


def test_rendered_scenes_are_exact(rendered):
    for i in (0, 7, 11):
        scene = scenes.render(HELD_OUT + i)
        assert np.array_equal(rendered.image(i), scene.image)
        assert np.array_equal(rendered.labels(i), scene.labels)
        assert rendered.manifest.seed[i] == HELD_OUT + i
    assert (rendered.settings["kind"], rendered.settings["labels"]) == ("rendered", ["exact"])
    for name in KINDS:
        kinds = [i for i in range(12) if name in [thing.kind for thing in scenes.render(HELD_OUT + i).things]]
        assert kinds
        assert rendered.with_class(name) == kinds


def test_the_prompt_of_a_scene_names_what_is_there(rendered):
    for i, prompt in enumerate(rendered.manifest.prompt):
        kinds = {thing.kind for thing in scenes.render(HELD_OUT + i).things}
        assert {name for name in KINDS if f"a {name}" in prompt} == kinds
        assert prompt.endswith("an urban environment")
    ids = np.zeros((128, 128), np.uint8)
    assert scenes.scene_prompt(ids) == "an urban environment"
    ids[:100, :3], ids[100:, :100] = BY_NAME["car"].id, BY_NAME["traffic light"].id
    assert scenes.scene_prompt(ids) == "a traffic light in an urban environment"  # 300 pixels of the car are too few
    ids[:100, :4] = BY_NAME["car"].id
    assert scenes.scene_prompt(ids) == "a car and a traffic light in an urban environment"
    ids[:100, 50:] = BY_NAME["rider"].id
    assert scenes.scene_prompt(ids) == "a car, a traffic light and a rider in an urban environment"


def test_rendering_goes_on_and_refuses_other_settings(rendered, tmp_path):
    folder = tmp_path / "set"
    render_dataset(folder, 12)
    for name in ("labels/00002.png", "images/00005.png", "manifest.csv"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match="labels/00002.png"):
        datasets.load(folder)
    render_dataset(folder, 12)
    assert contents(folder) == contents(rendered.folder)
    with pytest.raises(ValueError, match="seed"):
        render_dataset(folder, 4, first_seed=5)
    with pytest.raises(ValueError, match="n=0"):
        render_dataset(tmp_path / "other", 0)
    with pytest.raises(ValueError, match="size=8"):
        render_dataset(tmp_path / "other", 1, size=8)
    assert not (tmp_path / "other").exists()


def test_scenes_of_another_size_show_the_same_things(rendered, tmp_path):
    larger = render_dataset(tmp_path / "set", 12, size=192)
    assert larger.image(0).size == (192, 192) and larger.labels(0).shape == (192, 192)
    assert list(larger.manifest.prompt) == list(rendered.manifest.prompt)
    for name in KINDS:  # a share of the image, whatever its size
        assert larger.with_class(name) == rendered.with_class(name)
    with pytest.raises(ValueError, match="size"):
        render_dataset(tmp_path / "set", 12)


def test_the_smallest_object_is_a_share_of_the_image(tmp_path):
    dataset = render_dataset(tmp_path / "set", 1, size=128)
    for pixels, found in ((327, []), (328, [0])):  # of the 16384 of the bundled model's images
        ids = np.zeros(128 * 128, np.uint8)
        ids[:pixels] = CAR
        files.write_png(dataset.folder / "labels/00000.png", ids.reshape(128, 128))
        assert dataset.with_class("car") == found
