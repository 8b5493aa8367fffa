"""The evaluation of the bundled model: its measures on known numbers, and a run on an untrained pipeline."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from daamlib.cityscapes import BY_NAME
from daamlib.datasets import MIN_AREA
from daamlib_lab.urban.captions import TIMES, caption
from daamlib_lab.urban.scenes import HELD_OUT, KINDS, Thing, render
from training import evaluate, networks, words
from training.annotator import new_annotator
from training.evaluate import (
    PROMPTS,
    TEMPLATES,
    count_hits,
    draw_sheet,
    folder_sizes,
    hit_prompts,
    main,
)


@pytest.fixture(scope="module")
def captions():
    """A caption of every kind: the grammar itself, on things of random colours and places."""
    rng = np.random.default_rng(0)
    colours = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
    texts = []
    for _ in range(3000):
        things = tuple(
            Thing(str(kind), str(rng.choice(colours)), str(rng.choice(("left", "middle", "right"))), (0,) * 4, 1, "")
            for kind in rng.permutation(KINDS)[: rng.integers(4)]
        )
        texts.append(caption(rng, things, str(rng.choice(tuple(TIMES))), int(rng.integers(3))))
    return texts


def test_the_prompts_are_fixed_unique_and_of_known_words(captions):
    assert len(PROMPTS) == len(set(PROMPTS)) == 24
    # a changed prompt makes older sheets incomparable: change the file's name then, and this line
    assert PROMPTS[0] == "a car in an urban environment" and PROMPTS[-1].endswith("a tree by day")
    known = {word for text in captions for word in re.findall("[a-z]+", text)}
    asked = {word for text in PROMPTS for word in re.findall("[a-z]+", text)}
    assert asked <= known
    templates = {word for text in TEMPLATES for word in re.findall("[a-z]+", text)}
    assert templates <= known and len(TEMPLATES) == len(set(TEMPLATES))


def test_the_prompts_cover_what_the_model_knows():
    named = [frozenset(kind for kind in KINDS if re.search(rf"\b{kind}\b", text)) for text in PROMPTS]
    assert {frozenset([kind]) for kind in KINDS} <= set(named)
    assert {frozenset([a, b]) for a in KINDS for b in KINDS if a != b} <= set(named)
    assert frozenset() in named
    everything = " ".join(PROMPTS)
    places = ("on the left", "on the right", "in the middle", "by day", "at sunset", "at night", "in the fog")
    stuff = ("building", "road", "sidewalk", "sky", "tree")
    colours = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
    for word in (*places, *stuff, *colours):
        assert word in everything, word


def test_hit_prompts_are_the_same_number_for_every_class():
    pairs = hit_prompts(200)
    assert [sum(kind == k for k, _ in pairs) for kind in KINDS] == [50] * 4
    assert all(kind in prompt for kind, prompt in pairs)
    assert len({prompt for _, prompt in pairs}) == len(KINDS) * len(TEMPLATES)
    for wrong in (0, 2, 201):
        with pytest.raises(ValueError, match=f"multiple of 4.*{wrong}"):
            hit_prompts(wrong)


def test_hits_on_hand_made_maps():
    maps = np.full((4, 10, 10), 7, np.uint8)  # road
    maps[0, :2] = 26  # a car, as asked
    maps[1, :2] = 26  # a car instead of the person asked for
    maps[2, 0, :3] = 24  # a person, and beside it
    maps[2, 9, 9] = 25  # a rider too small to count
    hits = count_hits(maps, ["car", "person", "person", "rider"])
    assert hits["overall"] == 0.5
    assert hits["per_class"] == {"car": 1, "person": 0.5, "rider": 0}
    assert hits["unprompted"] == {"car": 0.3333, "person": 0, "traffic light": 0, "rider": 0}
    assert hits["images"] == 4 and hits["min_area"] == MIN_AREA
    assert count_hits(maps, ["car", "person", "person", "rider"], min_area=0.01)["overall"] == 0.5
    assert count_hits(maps[2:3], ["rider"], min_area=0.01)["overall"] == 1
    assert "rider" not in count_hits(maps[2:3], ["rider"])["unprompted"]


@pytest.mark.parametrize(
    "maps, prompted, message",
    [
        (np.zeros((2, 4, 4)), ["car"], r"\(2, 4, 4\)"),
        (np.zeros((4, 4)), ["car"] * 4, r"\(4, 4\)"),
        (np.zeros((0, 4, 4)), [], r"\(0, 4, 4\)"),
        (np.zeros((1, 4, 4)), ["bus"], "bus"),
    ],
)
def test_hits_refuse(maps, prompted, message):
    with pytest.raises(ValueError, match=message):
        count_hits(maps, prompted)


def test_things_of_rendered_scenes_are_larger_than_the_least_area():
    for seed in range(40):
        scene = render(seed, 64)
        prompted = [thing.kind for thing in scene.things]
        if prompted:
            assert count_hits(np.stack([scene.labels] * len(prompted)), prompted)["overall"] == 1


def test_the_sheet_has_every_image_and_its_caption():
    images = [Image.new("RGB", (128, 128), (9 * i, 0, 0)) for i in range(24)]
    sheet = draw_sheet(images, PROMPTS)
    pixels = np.asarray(sheet)
    step = 128 + 12
    assert sheet.width == 12 + 6 * step
    height = (sheet.height - 12) // 4
    for i in range(24):
        x, y = 12 + i % 6 * step, 12 + i // 6 * height
        assert (pixels[y : y + 128, x : x + 128] == (9 * i, 0, 0)).all()
        beneath = pixels[y + 128 : y + height, x : x + 128]
        assert (beneath < 128).sum() > 50  # ink
        assert (pixels[y + 128 : y + height, x - 8 : x - 2] == 255).all()  # no word runs on
    with pytest.raises(ValueError, match="23 and 24"):
        draw_sheet(images, PROMPTS[1:])


def test_sizes(tmp_path):
    (tmp_path / "unet" / "deep").mkdir(parents=True)
    (tmp_path / "unet" / "a.bin").write_bytes(bytes(2_000_000))
    (tmp_path / "unet" / "deep" / "b.bin").write_bytes(bytes(1_000))
    (tmp_path / "model_index.json").write_bytes(bytes(499_000))
    assert folder_sizes(tmp_path) == {"total": 2.5, "unet": 2.001}


@pytest.fixture(scope="module")
def folder(captions, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    tokenizer = networks.train_tokenizer(captions[:1500], path / "words")
    unet = networks.new_unet()
    pipe = networks.assemble(networks.new_vae(), networks.new_text_encoder(tokenizer), tokenizer, unet)
    pipe.to(dtype=torch.float16).save_pretrained(path / "model")
    new_annotator().half().save_pretrained(path / "model" / "annotator")
    return path / "model"


def test_a_run_keeps_what_was_measured_before(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "STEPS", 1)
    monkeypatch.setattr(evaluate, "PROMPTS", PROMPTS[:3])
    common = ["--model", str(folder), "--out", str(tmp_path), "--images", "4"]
    main([*common, "--only", "psnr"])
    before = json.loads((tmp_path / "metrics.json").read_text())
    assert set(before) == {"psnr", "size_mb"} and before["psnr"]["images"] == 4 and 0 < before["psnr"]["db"] < 30
    assert before["size_mb"]["total"] > before["size_mb"]["unet"] > 1
    main([*common, "--only", "sheet", "hits", "time"])
    after = json.loads((tmp_path / "metrics.json").read_text())
    assert after["psnr"] == before["psnr"] and set(after) == {*before, "sheet", "hits", "time"}
    assert after["hits"]["images"] == 4 and set(after["hits"]["per_class"]) == set(KINDS)
    assert 0 < after["time"]["seconds_per_image"] <= after["time"]["slowest"]
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.width == 12 + 6 * 140


@pytest.mark.slow
def test_words_are_measured_by_class_and_layer(folder):
    pipe = evaluate.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    found = words.measure_words(pipe, 20, HELD_OUT)
    of_scenes = [render(HELD_OUT + i, 64).labels for i in range(20)]
    shares = [(labels == BY_NAME["car"].id).mean() for labels in of_scenes]
    assert found["whole_image"]["car"] == pytest.approx(100 * np.mean([x for x in shares if x >= 0.01]), abs=0.5)
    tables = [found["whole_image"], found["daam"], found["ldaam"], found["token"], *found["daam_by_layer"].values()]
    assert len(found["daam_by_layer"]) == 6
    for table in tables:
        assert list(table) == [*KINDS, "mean"]
        assert table["mean"] == pytest.approx(np.mean([table[kind] for kind in KINDS]), abs=0.1)
        assert all(0 < value < 100 for value in table.values())
    # the masks of five scenes say more than the words of a model that was never trained
    assert found["token"]["mean"] > max(found["daam"]["mean"], found["ldaam"]["mean"])
    with pytest.raises(ValueError, match="measure on more scenes"):
        words.measure_words(pipe, 5, HELD_OUT)


def test_words_of_things_and_stuff_are_measured_in_either_world(folder):
    pipe = evaluate.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    found = words.measure_street(pipe, 12, HELD_OUT, world="wide", size=64)
    masks = [render(HELD_OUT + i, 64, "wide").labels == BY_NAME["sky"].id for i in range(12)]
    shares = [mask.mean() for mask in masks if mask.mean() >= words.MIN_SHARE]
    assert found["floor"]["sky"] == round(100 * np.mean(shares), 1) and len(shares) < 12
    for kind in ("daam", "listed", "zero_shot", "zero_shot_present"):
        assert set(found[kind]) == {*words.STREET_WORDS, "mean", "things"}
        assert all(0 <= value <= 100 for value in found[kind].values())
    assert all(found["listed"][name] >= found["floor"][name] - 1 for name in words.STREET_WORDS)
    assert found["world"] == "wide" and found["scenes"] == 12


def test_an_image_depends_on_its_own_seed_only(folder, monkeypatch):
    monkeypatch.setattr(evaluate, "STEPS", 1)
    pipe = evaluate.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    first, second = evaluate.generate(pipe, ["a car", "a rider"], 5)
    alone = evaluate.generate(pipe, ["a rider"], 6)[0]
    difference = np.abs(np.asarray(second, float) - np.asarray(alone))
    assert difference.max() <= 1 and (np.asarray(first) != np.asarray(second)).any()


def test_mistakes_are_told_before_anything_is_generated(folder, tmp_path):
    with pytest.raises(ValueError, match="multiple of 4"):
        main(["--model", str(folder), "--images", "6", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="no annotator in"):
        main(["--model", str(tmp_path), "--images", "4"])
    assert not list(tmp_path.iterdir())
