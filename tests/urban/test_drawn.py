"""The images that were annotated by hand, and how maps are compared with them."""

import json

import numpy as np
import pytest
from benchmarks import drawn

import daamlib
from daamlib import datasets
from daamlib.cityscapes import IGNORED, label_id
from daamlib.datasets import folder
from daamlib_lab.urban.scenes import KINDS


@pytest.fixture(scope="module")
def dataset():
    return datasets.load(drawn.FOLDER)


def test_it_holds_twenty_images_of_a_seed_and_every_class(dataset):
    settings = dataset.settings
    assert len(dataset) == drawn.IMAGES == 20
    assert settings["prompts"] == datasets.urban_prompts(20, seed=drawn.SEED)
    assert (settings["seed"], settings["steps"], settings["guidance"]) == (drawn.SEED, 25, 5.0)
    assert settings["weights"] == datasets.weight_hash(daamlib.load_pipeline(device="cpu"))
    for name in KINDS:
        assert len(dataset.with_class(name)) >= 8
    assert sum(path.stat().st_size for path in drawn.FOLDER.rglob("*") if path.is_file()) <= 800_000


def test_its_masks_hold_the_nine_classes_poles_and_little_that_is_undecided(dataset):
    labels = np.stack([dataset.labels(i) for i in dataset.indices])
    assert labels.shape == (20, 128, 128)
    assert set(np.unique(labels)) == {label_id(name) for name in drawn.DRAWN} | {IGNORED}
    assert (labels == IGNORED).mean() < 0.03
    assert all({label_id("road"), label_id("sidewalk"), label_id("sky")} <= set(np.unique(ids)) for ids in labels)


def test_its_masks_are_made_again_from_the_strokes(dataset):
    first, again = drawn.drawn_masks(dataset)
    assert sorted(first) == list(dataset.indices)
    assert len(again) == 5
    for i, mask in first.items():
        assert (mask == dataset.labels(i)).all()
    for i, mask in again.items():
        stored = folder.read_png(drawn.FOLDER / drawn.AGAIN / f"{i:05d}.png")
        assert (mask == stored).all()
        assert 0.8 < (mask == first[i]).mean() < 1


def test_every_stroke_is_an_action_of_the_annotator():
    strokes = json.loads(drawn.STROKES.read_text())
    for actions in (*strokes["first"].values(), *strokes["again"].values()):
        assert all(action["class"] in (*drawn.DRAWN, "unlabeled") for action in actions)


def test_what_is_undecided_a_pole_or_left_open_counts_for_nobody():
    road, sky = label_id("road"), label_id("sky")
    truth = np.full((2, 4, 4), road, np.uint8)
    truth[:, 0] = sky
    truth[:, 3, 0], truth[:, 3, 1] = IGNORED, label_id("pole")
    maps = truth.copy()
    maps[:, 3, :2] = sky
    maps[:, 2, 0] = IGNORED
    found, labelled = drawn.counts(maps, truth)
    of_class = dict(zip(drawn.CLASSES, drawn.ious(found, np.ones(2)), strict=True))
    assert of_class["road"] == of_class["sky"] == 100 and np.isnan(of_class["car"])
    assert labelled == 13 / 14
    maps[1, 1] = sky  # four of nine pixels of the road, in one of the images
    found, _ = drawn.counts(maps, truth)
    road_and_sky = drawn.ious(found, np.array([[1, 1], [2, 0]]))[:, [drawn.IDS.index(road), drawn.IDS.index(sky)]]
    np.testing.assert_allclose(road_and_sky, [[100 * 14 / 18, 100 * 8 / 12], [100, 100]])


def test_points_of_a_mirrored_image_lie_where_they_were_seen():
    action = {"type": "polygon", "class": "car", "points": [[0, 0], [2, 0], [2, 4], [0, 4]]}
    mask = drawn.drawn_mask(np.zeros((4, 4, 3), np.uint8), drawn.mirrored([action], 4))
    assert (mask == [[255, 255, 26, 26]] * 4).all()
