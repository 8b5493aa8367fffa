"""The wide world: its stuff comes and goes, is labelled exactly, and is what the captions say."""

import re

import numpy as np
import pytest

from daamlib.cityscapes import BY_NAME
from daamlib_lab.urban import wide
from daamlib_lab.urban.backdrop import STUFF
from daamlib_lab.urban.captions import LONGEST, wide_caption
from daamlib_lab.urban.scenes import KINDS, SIZE, Canvas, main, render

# word -> Cityscapes class
CLASS = {"sky": "sky", "buildings": "building", "trees": "vegetation", "a tree": "vegetation", "hills": "terrain"}
CLASS |= {"grass": "terrain", "a fence": "fence", "road": "road", "sidewalk": "sidewalk"}
CLASS |= dict.fromkeys(("water", "snow", "square"), "ground")
SEEDS = range(200)


@pytest.fixture(scope="module")
def scenes():
    return [render(seed, 64, "wide") for seed in SEEDS]


def covers(scene, name):
    return (scene.labels == BY_NAME[name].id).mean()


def test_same_seed_same_scene_and_never_that_of_the_other_world(scenes):
    for seed in (0, 7, 31):
        again = render(seed, 64, "wide")
        assert again.image.tobytes() == scenes[seed].image.tobytes() and again.caption == scenes[seed].caption
        assert again.labels.tobytes() == scenes[seed].labels.tobytes() and again.stuff == scenes[seed].stuff
        assert render(seed, 64).image.tobytes() != again.image.tobytes() and not render(seed, 64).stuff


def test_what_is_named_is_there_and_what_is_there_is_named(scenes):
    hidden = 0
    for scene in scenes:
        assert set(scene.stuff) <= set(CLASS) and len(set(scene.stuff)) == len(scene.stuff)
        named = {CLASS[word] for word in scene.stuff}
        seen = {name for name, label in BY_NAME.items() if (scene.labels == label.id).any()}
        assert seen - {"pole", *KINDS} <= named  # so a scene without the word "sky" has no pixel of sky
        hidden += len(named - seen)
    assert hidden < 0.01 * sum(len(scene.stuff) for scene in scenes)  # a thing may stand before all of it


@pytest.mark.parametrize("name", ["sky", "building", "road", "sidewalk", "vegetation"])
def test_no_stuff_is_everywhere(scenes, name):
    assert 0.3 < np.mean([covers(scene, name) > 0.01 for scene in scenes]) < 0.8


@pytest.mark.parametrize("kind", wide.GROUNDS)
@pytest.mark.parametrize("far", [True, False])
def test_every_pixel_of_a_ground_has_its_label(kind, far):
    canvas = Canvas(SIZE, ((0, 0, 0),) * 3)
    wide.draw_ground(canvas, np.random.default_rng(0), "day", kind, 0.5, 0.6 if far else 1.0, far=far)
    indices = np.asarray(canvas.indices)
    below = indices[round(0.5 * len(indices)) + 1 :]
    assert (below == STUFF.index(kind)).all()
    assert set(np.unique(indices)) == {STUFF.index("sky"), below[0, 0]}


def test_captions_tell_the_truth_in_few_words(scenes):
    everything = []
    for scene in scenes:
        assert scene.caption == scene.say(0)
        for number in range(4):
            text = scene.say(number)
            assert text == text.lower() and "  " not in text
            assert len(text.replace(",", " ,").split()) <= LONGEST
            for word, there in {"building": "buildings", "street": "road", "tree": "trees", "fence": "a fence"}.items():
                if re.search(rf"\b{word}s?\b", text):
                    assert there in scene.stuff or f"a {word}" in scene.stuff, text
            for word in ("sky", "hills", "road", *wide.GROUNDS):
                if re.search(rf"\b{word}\b", text):
                    assert word in scene.stuff, text
            for kind in KINDS:
                if re.search(rf"\b{kind}\b", text):
                    assert kind in [thing.kind for thing in scene.things], text
            everything.append(all(word.removesuffix("s") in text for word in scene.stuff))
    assert 0.7 < np.mean(everything) < 0.9


def test_the_layout_does_not_depend_on_the_size(scenes):
    agree = [(render(seed, 128, "wide").labels[1::2, 1::2] == scenes[seed].labels).mean() for seed in range(12)]
    assert np.mean(agree) > 0.95


def test_another_world_or_time_is_refused():
    with pytest.raises(ValueError, match="world must be"):
        render(0, 64, "mars")
    with pytest.raises(ValueError, match="dusk"):
        wide_caption(np.random.default_rng(0), (), "dusk", ("sky",))


def test_contact_sheet(tmp_path, capsys):
    main(["--out", str(tmp_path / "sheet.png"), "--n", "3", "--size", "32", "--world", "wide", "--captions"])
    assert (tmp_path / "sheet.png").stat().st_size > 0 and capsys.readouterr().out.count("\n") == 3
