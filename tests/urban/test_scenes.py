"""The bundled street world: deterministic, labelled everywhere, with captions that tell the truth."""

import hashlib
import re

import numpy as np
import pytest

from daamlib.cityscapes import BY_ID, BY_NAME, LABELS, to_train_ids
from daamlib_lab.urban.captions import LONGEST, caption
from daamlib_lab.urban.scenes import KINDS, main, render

SEEDS = range(60)


@pytest.fixture(scope="module")
def scenes():
    return [render(seed) for seed in SEEDS]


def test_same_seed_same_bytes(scenes):
    for seed in (0, 7, 31):
        again = render(seed)
        assert again.image.tobytes() == scenes[seed].image.tobytes()
        assert again.labels.tobytes() == scenes[seed].labels.tobytes()
        assert (again.caption, again.things, again.time) == (
            scenes[seed].caption,
            scenes[seed].things,
            scenes[seed].time,
        )
    assert len({scene.image.tobytes() for scene in scenes}) == len(scenes)


def test_the_scenes_are_those_that_the_bundled_model_was_trained_on(scenes):
    """A changed pixel or word would part the model from its world, and every stored mask from its scene."""
    found = hashlib.sha256()
    for scene in scenes:
        found.update(scene.image.tobytes() + scene.labels.tobytes())
        found.update(f"{scene.caption} {scene.trees}".encode())
    assert found.hexdigest() == "3a3731fccc27d2b9baf538637ac9434a0d0664580e43fdfb9f5bb575488c626a"


def test_every_pixel_has_a_known_label_and_every_class_occurs(scenes):
    seen = set()
    for scene in scenes:
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        assert scene.labels.shape == (128, 128) and scene.labels.dtype == np.uint8
        seen |= set(np.unique(scene.labels).tolist())
    expected = ("sky", "building", "sidewalk", "road", "vegetation", "pole", *KINDS)
    assert seen == {BY_NAME[name].id for name in expected}
    assert {scene.time for scene in scenes} == {"day", "sunset", "night", "fog"}


def test_things_are_visible_and_complete():
    """A cut or hidden thing is too small to be segmented: nearly all keep at least this many pixels."""
    least = {"car": 400, "person": 400, "traffic light": 500, "rider": 700}
    shares = []
    for seed in range(200):
        scene = render(seed)
        assert len({thing.kind for thing in scene.things}) == len(scene.things) <= 3
        present = {kind for kind in KINDS if (scene.labels == BY_NAME[kind].id).any()}
        assert present == {thing.kind for thing in scene.things}
        shares += [(scene.labels == BY_NAME[thing.kind].id).sum() >= least[thing.kind] for thing in scene.things]
    assert np.mean(shares) > 0.97


def test_labels_lie_inside_the_box(scenes):
    for scene in scenes:
        for thing in scene.things:
            rows, columns = np.nonzero(scene.labels == BY_NAME[thing.kind].id)
            x0, y0, x1, y1 = (128 * value for value in thing.box)
            assert columns.min() > x0 - 8 and columns.max() < x1 + 8
            assert rows.min() > y0 - 6 and rows.max() < y1 + 4
            centre = (thing.box[0] + thing.box[2]) / 2
            assert thing.side == ("left" if centre < 0.4 else "right" if centre > 0.6 else "middle")


def test_captions_tell_the_truth():
    mentions, things = 0, 0
    for seed in range(300):
        scene = render(seed, 32)
        text = scene.caption
        assert text == text.lower() and len(text.split()) <= 40 and "  " not in text
        kinds = {thing.kind: thing for thing in scene.things}
        for kind in KINDS:
            if re.search(rf"\b{kind}\b", text):
                assert kind in kinds, text
                mentions += 1
        for kind, thing in kinds.items():  # a colour named with a class is that thing's colour
            pattern = rf"\b{kind} in (\w+)" if kind in ("person", "rider") else rf"\b(\w+) {kind}\b"
            named = re.search(pattern, text)
            if named and named[1] in ("red", "blue", "green", "yellow", "white", "black", "orange", "purple"):
                assert named[1] == thing.colour, text
        if re.search(r"\btrees?\b", text):
            assert (render(seed).labels == BY_NAME["vegetation"].id).any(), text
        for time, words in (("night", "at night"), ("sunset", "at sunset"), ("fog", "in the fog"), ("day", "by day")):
            assert words not in text or scene.time == time
        things += len(kinds)
    assert 0.95 < mentions / things < 1  # a few go by another word


def test_captions_are_short_enough_for_their_context_and_half_name_everything():
    texts = [render(seed, 16).caption for seed in range(400)]
    assert max(len(text.replace(",", " ,").split()) for text in texts) <= LONGEST
    everything = ["building", "road", "sidewalk", "sky"]
    assert 0.4 < np.mean([all(name in text for name in everything) for text in texts]) < 0.65
    short = [text for text in texts if len(text.split()) <= 8]
    assert len(short) > 20 and any(re.fullmatch(r"a (\w+ )?\w+ in an urban environment", text) for text in short)


def test_the_layout_does_not_depend_on_the_size(scenes):
    agree = []
    for seed in range(12):
        small, large = render(seed, 64), scenes[seed]
        assert small.caption == large.caption and small.things == large.things
        agree.append((small.labels == large.labels[1::2, 1::2]).mean())
    assert np.mean(agree) > 0.95


@pytest.mark.parametrize(
    "arguments, error",
    [((0, 8), ValueError), ((-1,), ValueError), ((0.5,), TypeError), ((0, 64.0), TypeError), ((True,), TypeError)],
)
def test_wrong_arguments_are_refused(arguments, error):
    with pytest.raises(error, match="must be"):
        render(*arguments)


def test_unknown_time_is_refused():
    with pytest.raises(ValueError, match="dusk"):
        caption(np.random.default_rng(0), (), "dusk", 0)


def test_contact_sheet(tmp_path, capsys):
    main(["--out", str(tmp_path / "sheet.png"), "--n", "3", "--size", "32", "--labels", "--captions"])
    assert (tmp_path / "sheet.png").stat().st_size > 0
    assert capsys.readouterr().out.count("\n") == 3


def test_cityscapes_table():
    assert len(LABELS) == 35 == len(BY_NAME) == len(BY_ID)
    facts = {
        "road": (7, 0, (128, 64, 128)),
        "sidewalk": (8, 1, (244, 35, 232)),
        "building": (11, 2, (70, 70, 70)),
        "pole": (17, 5, (153, 153, 153)),
        "traffic light": (19, 6, (250, 170, 30)),
        "vegetation": (21, 8, (107, 142, 35)),
        "sky": (23, 10, (70, 130, 180)),
        "person": (24, 11, (220, 20, 60)),
        "rider": (25, 12, (255, 0, 0)),
        "car": (26, 13, (0, 0, 142)),
        "bicycle": (33, 18, (119, 11, 32)),
    }
    for name, (id_, train_id, color) in facts.items():
        assert (BY_NAME[name].id, BY_NAME[name].train_id, BY_NAME[name].color) == (id_, train_id, color)
    trained = sorted(label.train_id for label in LABELS if 0 <= label.train_id < 255)
    assert trained == list(range(19))
    assert all(label.ignore_in_eval == (label.train_id in (255, -1)) for label in LABELS)
    assert sum(label.has_instances for label in LABELS) == 10
    with pytest.raises(TypeError):
        BY_ID[7] = LABELS[0]


def test_to_train_ids():
    ids = np.array([[7, 26, 0], [-1, 33, 9]])
    got = to_train_ids(ids)
    assert got.dtype == np.uint8 and got.tolist() == [[0, 13, 255], [255, 18, 255]]
    assert ids[1, 0] == -1  # the input is left alone
    with pytest.raises(ValueError, match="34"):
        to_train_ids(np.array([34]))
    with pytest.raises(TypeError, match="float"):
        to_train_ids(np.array([7.0]))


def test_the_text_of_a_scene_names_its_things_alone(scenes):
    for scene in scenes:
        kinds = [thing.kind for thing in scene.things]
        assert scene.text == (" and ".join(f"a {kind}" for kind in kinds) if kinds else "a photo")
    assert any(scene.things for scene in scenes)
