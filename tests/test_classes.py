"""Class lists: the benchmarks' tables, and lists that a user gives."""

import pickle

import numpy as np
import pytest

from daamlib import cityscapes
from daamlib.classes import ADE20K, CITYSCAPES, COCO, VOC, class_list


def test_the_benchmarks_have_the_ids_of_their_own_files():
    for table, count, some in (
        (CITYSCAPES, 34, {"unlabeled": 0, "car": 26, "person": 24, "bicycle": 33}),
        (VOC, 21, {"background": 0, "aeroplane": 1, "cat": 8, "person": 15, "tvmonitor": 20}),
        (COCO, 81, {"person": 1, "fire hydrant": 11, "stop sign": 13, "backpack": 27, "toilet": 70, "toothbrush": 90}),
        (ADE20K, 151, {"wall": 1, "chest of drawers": 45, "traffic light": 137, "flag": 150}),
    ):
        assert len(table.ids) == len(table.names) == len(table.colours) == count
        assert all(table.ids[name] == number and table.names[number] == name for name, number in some.items())
        assert all(name == " ".join(name.split()) for name in table.ids)
        assert max(table.ids.values()) < 255


def test_the_colours_are_those_that_others_paint():
    assert np.array_equal(CITYSCAPES.palette, cityscapes.COLOURS)
    for table, name, colour in (
        (VOC, "aeroplane", (128, 0, 0)),
        (VOC, "person", (192, 128, 128)),
        (VOC, "tvmonitor", (0, 64, 128)),
        (COCO, "person", (220, 20, 60)),
        (COCO, "toothbrush", (191, 162, 208)),
        (ADE20K, "sky", (6, 230, 230)),
        (ADE20K, "flag", (92, 0, 255)),
    ):
        assert table.colours[name] == colour == tuple(table.palette[table.ids[name]])
    with pytest.raises(ValueError, match="read-only"):
        VOC.palette[0] = 1


def test_lists_that_a_user_gives():
    for given in ({"cat": 1, "dog": 2}, ["cat", "dog"], ("cat", "dog", "cat"), {"cat": 1, "dog": (2, "#008000")}):
        table = class_list(given)
        assert table.ids == {"unlabeled": 0, "cat": 1, "dog": 2}
        assert table.colours == {"unlabeled": (0, 0, 0), "cat": (128, 0, 0), "dog": (0, 128, 0)}
    painted = class_list({"background": (0, (1, 2, 3)), "cat": (np.int64(200), [255, 128, 0])})
    assert painted.names == {0: "background", 200: "cat"}
    assert painted.palette[[0, 200, 255]].tolist() == [[1, 2, 3], [255, 128, 0], [200, 200, 200]]
    assert class_list() is CITYSCAPES is class_list(["rider", "car"]) and class_list(VOC) is VOC
    assert class_list(painted.stored()).ids == painted.ids and CITYSCAPES.stored() is None
    assert pickle.loads(pickle.dumps(painted)).colours == painted.colours


WRONG = {
    "a string": ("cat", TypeError, r"write \['cat'\]"),
    "nothing": ([], ValueError, "no class"),
    "nothing but what is none": ({"background": 0}, ValueError, "no class"),
    "mixed": (["car", "cat"], ValueError, r"'cat' is no Cityscapes label.*\{'car': 1, 'cat': 2\}"),
    "no pixels": (["license plate"], ValueError, "license plate"),
    "ignored": ({"cat": 255}, ValueError, "255"),
    "from 0": ({"cat": 0, "dog": 1}, ValueError, "0 is none of the classes, not .cat"),
    "negative": ({"cat": -1}, ValueError, "-1"),
    "too many": ([f"class {i}" for i in range(255)], ValueError, "255"),
    "twice": ({"cat": 1, "dog": 1}, ValueError, "1 of 'dog'"),
    "a fraction": ({"cat": 1.5}, TypeError, "1.5"),
    "a truth": ({"cat": True}, TypeError, "True"),
    "no name": ({"": 1}, TypeError, "name"),
    "a number": ([1, 2], TypeError, "name"),
    "a colour": ({"cat": (1, "colourless")}, ValueError, "colourless"),
    "a shade": ({"cat": (1, (0, 0, 256))}, ValueError, "256"),
    "three": ({"cat": (1, 2, 3)}, TypeError, "cat"),
    "unlabeled": ({"unlabeled": 3}, ValueError, "unlabeled"),
}


@pytest.mark.parametrize(("given", "error", "message"), WRONG.values(), ids=WRONG)
def test_lists_that_cannot_be(given, error, message):
    with pytest.raises(error, match=message):
        class_list(given)


def test_names_and_ids_are_looked_up_or_refused():
    with pytest.raises(ValueError, match="'cow' is no custom label.*cat"):
        class_list(["cat"]).id("cow")
    with pytest.raises(ValueError, match="no Cityscapes label"):
        CITYSCAPES.id("license plate")
    VOC.check(np.array([0, 20, 255], np.uint8), "this")
    with pytest.raises(ValueError, match=r"this has the values \[21\]"):
        VOC.check(np.array([[0, 21]], np.uint8), "this")


def test_two_lists_agree_where_a_label_map_says_the_same_in_both():
    few, more, other = class_list({"cat": 1}), class_list({"dog": 2, "cat": 1}), class_list({"dog": 1, "cat": 2})
    assert few.difference(more) == few.difference(few) == ""
    assert "'dog'" in more.difference(few)
    assert more.difference(few, ["cat"]) == ""
    assert "'cat' is 1 here, it is 2 there" in few.difference(other)
    assert "1 is aeroplane there" in class_list({"tree": 1}).difference(VOC)
