"""Masks that a person drew: folders of PNGs and COCO files become label maps, or are refused whole."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from small_sets import CAR, PERSON, PROMPTS, TREE, bright, contents

from daamlib import datasets


def folder_of(path, **images):
    path.mkdir()
    for name, image in images.items():
        image.save(path / f"{name}.png")
    return path


def test_a_folder_of_masks(generated, sd1_pipe, tmp_path):
    ids = np.full((8, 12), TREE, np.uint8)
    ids[:2, 3:] = CAR
    palette = Image.fromarray(np.full((16, 24), PERSON, np.uint8))
    palette.putpalette([0, 0, 0] * 256)
    assert palette.mode == "P"
    source = folder_of(tmp_path / "drawn", **{"00000": Image.fromarray(ids), "00002": palette})
    (source / ".DS_Store").write_text("")
    datasets.generate(sd1_pipe, PROMPTS[:3], generated.folder, labeller=bright, steps=1, size=(16, 24))
    kept = generated.labels(1)
    assert datasets.import_masks(generated, source) is generated
    assert np.array_equal(generated.labels(0), ids.repeat(2, 0).repeat(2, 1))  # nearest
    assert (generated.labels(2) == PERSON).all()
    assert np.array_equal(generated.labels(1), kept)
    assert generated.settings["labels"] == ["small_sets.bright", "masks of drawn"]
    Image.fromarray(ids).save(source / "00001.png")
    datasets.import_masks(generated, str(source))
    assert generated.settings["labels"] == ["masks of drawn"]
    assert len(datasets.load(generated.folder)) == 3


WRONG_MASKS = {
    "an unknown image": ({"00007": Image.new("L", (24, 16))}, "00007.png"),
    "colours": ({"00001": Image.new("RGB", (24, 16))}, "mode RGB"),
    "16 bits": ({"00001": Image.new("I;16", (24, 16))}, "mode I;16"),
    "other ids": ({"00001": Image.new("L", (24, 16), 99)}, "99"),
    "nothing": ({}, "no masks"),
}


@pytest.mark.parametrize(("images", "message"), WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_wrong_masks(generated, tmp_path, images, message):
    good = {"00000": Image.new("L", (24, 16), CAR)} if images else {}
    source = folder_of(tmp_path / "drawn", **good, **images)
    before = contents(generated.folder)
    with pytest.raises(ValueError, match=message):
        datasets.import_masks(generated, source)
    assert contents(generated.folder) == before


def test_no_masks_at_all(generated, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        datasets.import_masks(generated, tmp_path / "nowhere")


def coco(*annotations, **changes):
    """A COCO file's contents for images of 20 x 30 (height x width)."""
    return {
        "images": [{"id": 10 + i, "file_name": f"set/0000{i}.png", "height": 20, "width": 30} for i in range(3)],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "person"}],
        "annotations": [
            {"id": number, "image_id": 10 + image, "category_id": category, "segmentation": segmentation}
            for number, (image, category, segmentation) in enumerate(annotations)
        ],
    } | changes


def drawn(dataset, tmp_path, content):
    path = tmp_path / "masks.json"
    path.write_text(json.dumps(content))
    return datasets.import_masks(dataset, path)


@pytest.fixture
def large(sd1_pipe, tmp_path):
    """A dataset of images of the COCO file's size."""
    dataset = datasets.generate(sd1_pipe, PROMPTS[:3], tmp_path / "set", steps=1, size=16)
    for i in range(3):
        Image.new("RGB", (30, 20)).save(dataset.folder / dataset.manifest.file[i])
    return dataset


def box(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def test_coco_polygons(large, tmp_path):
    drawn(large, tmp_path, coco((0, 1, [box(5, 3, 9, 11), box(20, 8, 27, 19)]), (0, 2, [box(0, 0, 6, 4)])))
    expected = np.zeros((20, 30), np.uint8)
    expected[3:11, 5:9] = expected[8:19, 20:27] = CAR
    expected[:4, :6] = PERSON  # later, hence over the car
    assert np.array_equal(large.labels(0), expected)
    with pytest.raises(ValueError, match="label"):  # nobody annotated it
        large.labels(1)
    assert large.settings["labels"] == ["masks of masks.json"]


def test_coco_run_lengths(large, tmp_path):
    expected = np.zeros((20, 30), bool)
    expected[3:11, 5:9] = expected[8:19, 20:27] = expected[0, 0] = True
    two_boxes = coco_mask.encode(np.asfortranarray(expected, np.uint8))["counts"].decode()
    counts = [20, 3, 600 - 23]  # column by column: the first three pixels of the second column
    drawn(
        large,
        tmp_path,
        coco(
            (0, 1, {"size": [20, 30], "counts": two_boxes}),
            (1, 2, {"size": [20, 30], "counts": counts}),
            images=coco()["images"],
        ),
    )
    assert np.array_equal(large.mask(0, "car"), expected)
    expected[:] = False
    expected[:3, 1] = True
    assert np.array_equal(large.mask(1, "person"), expected)


def test_coco_masks_of_another_size(generated, tmp_path):
    drawn(generated, tmp_path, coco((2, 2, [box(0, 0, 15, 20)])))
    assert np.array_equal(generated.mask(2, "person"), np.arange(24) < np.full((16, 1), 12))


TRIANGLE = [box(0, 0, 4, 4)]
WRONG_COCO = {
    "a category": (coco((0, 1, TRIANGLE), categories=[{"id": 1, "name": "cat"}]), "cat"),
    "an image": (
        coco((0, 1, TRIANGLE), images=[{"id": 10, "file_name": "dog.png", "height": 20, "width": 30}]),
        "dog.png",
    ),
    "an image's number": (coco((0, 1, TRIANGLE), (7, 1, TRIANGLE)), "COCO"),
    "a category's number": (coco((0, 3, TRIANGLE)), "COCO"),
    "a box": (coco((0, 1, TRIANGLE), (1, 1, [])), "annotation 1"),
    "two points": (coco((0, 1, [[0, 0, 4, 4]])), "polygon"),
    "another size": (coco((0, 1, {"size": [30, 20], "counts": [600]})), "run lengths"),
    "too few": (coco((0, 1, {"size": [20, 30], "counts": [5, 5]})), "run lengths"),
    "compressed, too few": (coco((0, 1, {"size": [20, 30], "counts": "01V3"})), "run lengths"),
    "compressed, too many": (coco((0, 1, {"size": [20, 30], "counts": "d1d1d1d1"})), "COCO|masks.json"),
    "no run lengths": (coco((0, 1, {"size": [20, 30], "counts": "~"})), "run lengths"),
    "negative": (coco((0, 1, {"size": [20, 30], "counts": [-5, 605]})), "run lengths"),
    "no annotations": (coco(), "annotations"),
    "another file": ({"images": []}, "COCO"),
    "a list": ([1], "COCO"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_COCO.values(), ids=WRONG_COCO)
def test_wrong_coco_files(generated, tmp_path, content, message):
    before = contents(generated.folder)
    with pytest.raises(ValueError, match=message):
        drawn(generated, tmp_path, content)
    assert contents(generated.folder) == before


def test_a_file_that_is_no_json(generated, tmp_path):
    (tmp_path / "masks.json").write_text("{")
    with pytest.raises(ValueError, match="masks.json"):
        datasets.import_masks(generated, tmp_path / "masks.json")
