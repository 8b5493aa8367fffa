"""Masks that a person drew: folders of PNGs and COCO files become label maps, or are refused whole."""

import functools
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from small_sets import CAR, PERSON, PROMPTS, TREE, bright, contents

from daamlib import datasets
from daamlib.datasets import export
from daamlib.datasets import folder as files


def folder_of(path, **images):
    path.mkdir(parents=True)
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
    "another program's file": ({"00001.json": Image.new("L", (24, 16))}, "00001.json.* is not an image"),
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


def test_what_is_to_be_ignored(large, tmp_path):
    ignored, car = np.zeros((20, 30), bool), np.zeros((20, 30), np.uint8)
    ignored[4:9, 2:25] = True
    car[3:11, 5:9] = CAR
    encoded = coco_mask.encode(np.asfortranarray(ignored, np.uint8))
    lengths = {"size": [20, 30], "counts": encoded["counts"].decode()}
    content = coco((0, 1, [box(5, 3, 9, 11)]))
    content["images"][0]["ignored"] = content["images"][2]["ignored"] = lengths
    drawn(large, tmp_path, content)
    assert np.array_equal(large.labels(0), np.where(ignored, 255, car))
    assert np.array_equal(large.labels(2), np.where(ignored, 255, 0))  # nothing else was annotated
    assert large.labelled == [0, 2]
    content["images"][0]["ignored"] = {"size": [20, 30], "counts": [5]}
    with pytest.raises(ValueError, match="what is ignored of image 10"):
        drawn(large, tmp_path, content)


def test_a_crowd_is_of_its_class_too(large, tmp_path):
    content = coco((0, 1, {"size": [20, 30], "counts": [0, 600]}), (0, 2, [box(0, 0, 6, 4)]))
    content["annotations"][0]["iscrowd"] = 1
    drawn(large, tmp_path, content)
    assert np.bincount(large.labels(0).ravel())[[CAR, PERSON]].tolist() == [576, 24]


def test_all_that_an_export_says_comes_back(sd1_pipe, tmp_path):
    """Of other classes, images without anything on them among them, into images without label maps."""
    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS[:3], steps=1, size=(16, 24))
    maps = np.random.default_rng(0).choice(np.array([0, 1, 7, 255], np.uint8), (3, 16, 24))
    maps[1] = 0
    labels = iter(maps)

    def labeller(image, record, prompt):
        return next(labels)

    labeller.store = None
    dataset = make(tmp_path / "set", labeller=labeller, classes={"cat": 7, "dog": (1, "#ff0000")})
    path = export.coco(dataset, tmp_path / "out")
    back = datasets.import_masks(make(tmp_path / "back"), path)
    assert [np.array_equal(back.labels(i), maps[i]) for i in range(3)] == [True] * 3
    assert back.classes.ids == {"unlabeled": 0, "cat": 7, "dog": 1}
    assert [(c["id"], c["name"]) for c in json.loads(path.read_text())["categories"]] == [(1, "dog"), (7, "cat")]
    part = json.loads(export.coco(dataset, tmp_path / "part", classes=["cat"]).read_text())
    assert part["info"]["complete"] is False and [c["name"] for c in part["categories"]] == ["cat"]
    folder = export.cityscapes(dataset, tmp_path / "city")
    assert json.loads((folder / "classes.json").read_text()) == {
        "0": "background", "1": "cat", "2": "dog", "255": "ignored"
    }  # fmt: skip
    train = files.read_png(next(folder.rglob("*000000_gtFine_labelTrainIds.png")))
    assert np.array_equal(train, np.array([0, 2, 255, 1])[np.searchsorted([0, 1, 255], maps[0]) + (maps[0] == 7)])
    painted = files.read_png(export.overlays(dataset, tmp_path, opacity=1) / "00000.png")
    assert (painted[maps[0] == 1] == (255, 0, 0)).all() and (painted[maps[0] == 7] == (128, 128, 128)).all()
    found = export.prompts(dataset.labels(0), table=dataset.classes)
    assert {prompt["class"] for prompt in found} == {"cat", "dog"}
    with pytest.raises(ValueError, match="'car' is no custom label"):
        export.coco(dataset, tmp_path / "other", classes=["car"])


def test_masks_of_other_classes(generated, tmp_path):
    cats = coco((0, 1, TRIANGLE), categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}])
    with pytest.raises(ValueError, match=r"\['cat', 'dog'\] are no Cityscapes labels.*classes=\{'cat': 1, 'dog': 2\}"):
        drawn(generated, tmp_path, cats)
    (tmp_path / "masks.json").write_text("\ufeff" + json.dumps(cats))
    datasets.import_masks(generated, tmp_path / "masks.json", classes={"cat": 3, "dog": 4})
    assert {*np.unique(generated.labels(0))} == {0, 3} and generated.classes.ids["dog"] == 4
    before = contents(generated.folder)
    with pytest.raises(ValueError, match="other classes.*'cat' is 1 here, it is 3 there"):
        datasets.import_masks(generated, tmp_path / "masks.json", classes={"cat": 1, "dog": 2})
    with pytest.raises(ValueError, match="no custom labels"):
        drawn(generated, tmp_path, coco((0, 1, TRIANGLE)))
    source = folder_of(tmp_path / "drawn", **{"00000": Image.new("L", (24, 16), CAR)})
    with pytest.raises(ValueError, match="26"):
        datasets.import_masks(generated, source)
    assert contents(generated.folder) == before


@pytest.mark.parametrize("size", [(24, 24), (16, 24), (12, 16), (240, 100)])
def test_a_mask_of_another_shape_is_refused(generated, tmp_path, size):
    source = folder_of(tmp_path / "drawn", **{"00001": Image.new("L", size, CAR)})
    before = contents(generated.folder)
    with pytest.raises(ValueError, match="another shape"):
        datasets.import_masks(generated, source)
    height, width = size[1], size[0]
    images = [{"id": 10, "file_name": "00000.png", "height": height, "width": width}]
    with pytest.raises(ValueError, match="another shape"):
        drawn(generated, tmp_path, coco((0, 1, TRIANGLE), images=images))
    assert contents(generated.folder) == before


def test_a_mask_of_a_rounded_size_fits(generated, tmp_path):
    source = folder_of(tmp_path / "drawn", **{"00001": Image.new("L", (75, 49), CAR)})  # 75 x 50, less a row
    assert (datasets.import_masks(generated, source).labels(1) == CAR).all()


def test_a_mask_that_was_drawn_on_another_image_is_refused(generated, whole, tmp_path):
    (tmp_path / "drawn" / "images").mkdir(parents=True)
    folder_of(tmp_path / "drawn" / "labels", **{"00001": Image.new("L", (24, 16), CAR)})
    copy = tmp_path / "drawn" / "images" / "00001.png"
    before = contents(generated.folder)
    almost = np.array(generated.image(1))
    almost[0, 0, 0] ^= 1
    large = np.array(whole.image(2)).repeat(4, 0).repeat(4, 1)
    for other in (np.asarray(whole.image(1)), almost, large):
        Image.fromarray(other).save(copy)
        with pytest.raises(ValueError, match="00001.png .*drawn on another image"):
            datasets.import_masks(generated, tmp_path / "drawn" / "labels")
    assert contents(generated.folder) == before
    for same in (generated.image(1), generated.image(1).resize((96, 64), Image.Resampling.BICUBIC)):
        same.save(copy)
        datasets.import_masks(generated, tmp_path / "drawn" / "labels")
        assert (generated.labels(1) == CAR).all()


def test_a_coco_file_of_another_dataset_is_refused(generated, whole, tmp_path):
    path = export.coco(whole, tmp_path / "out", split="val")
    with pytest.raises(ValueError, match="00003.png.* is not an image of this dataset"):
        datasets.import_masks(generated, path)
    few = export.coco(datasets.Dataset(whole.folder, whole.manifest.loc[[0, 1]]), tmp_path / "few")
    with pytest.raises(ValueError, match="another image"):
        datasets.import_masks(generated, few)
    with pytest.raises(ValueError, match="00000.png, which is not of this dataset"):  # nor is it overwritten
        export.coco(generated_labels(generated), tmp_path / "few")
    with pytest.raises(ValueError, match="there is no image"):
        export.coco(datasets.Dataset(whole.folder, whole.manifest.loc[[]]), tmp_path / "none")


def generated_labels(dataset):
    for i in dataset.indices:
        files.write_png(dataset.path("labels", i), np.full((16, 24), CAR, np.uint8))
    return dataset


TRIANGLE = [box(0, 0, 4, 4)]
WRONG_COCO = {
    "a category": (coco((0, 1, TRIANGLE), categories=[{"id": 1, "name": "cat"}]), "cat"),
    "an image": (
        coco((0, 1, TRIANGLE), images=[{"id": 10, "file_name": "dog.png", "height": 20, "width": 30}]),
        "dog.png",
    ),
    "an image's number": (coco((0, 1, TRIANGLE), (7, 1, TRIANGLE)), "annotation 1 is of image 17"),
    "a category's number": (coco((0, 3, TRIANGLE)), "category 3"),
    "a category's number twice": (
        coco((0, 1, TRIANGLE), categories=[{"id": 1, "name": "car"}, {"id": 1, "name": "person"}]),
        "two categories",
    ),
    "shares of the image": (coco((0, 1, [box(0.1, 0.1, 0.4, 0.4)])), "covers no pixel"),
    "of a larger image": (coco((0, 1, [box(5, 5, 300, 10)])), "beyond the image"),
    "left of the image": (coco((0, 1, [box(-9, 5, 4, 10)])), "beyond the image"),
    "beyond all numbers": (coco((0, 1, [[0, 0, float("inf"), 0, 4, 4]])), "polygon"),
    "texts": (coco((0, 1, [["0", "0", "4", "0", "4", "4"]])), "polygon"),
    "a flat list": (coco((0, 1, TRIANGLE[0])), "polygon"),
    "half a pixel": (coco((0, 1, {"size": [20, 30], "counts": [0.5, 599.5]})), "run lengths"),
    "a huge image": (
        coco((0, 1, TRIANGLE), images=[{**coco()["images"][0], "width": 24_000_000, "height": 16_000_000}]),
        "no picture is so large",
    ),
    "a negative size": (coco((0, 1, TRIANGLE), images=[{**coco()["images"][0], "width": -30}]), "width"),
    "a box": (coco((0, 1, TRIANGLE), (1, 1, [])), "annotation 1"),
    "two points": (coco((0, 1, [[0, 0, 4, 4]])), "polygon"),
    "another size": (coco((0, 1, {"size": [30, 20], "counts": [600]})), "run lengths"),
    "too few": (coco((0, 1, {"size": [20, 30], "counts": [5, 5]})), "run lengths"),
    "compressed, too few": (coco((0, 1, {"size": [20, 30], "counts": "01V3"})), "run lengths"),
    "compressed, too many": (coco((0, 1, {"size": [20, 30], "counts": "d1d1d1d1"})), "COCO|masks.json"),
    "no run lengths": (coco((0, 1, {"size": [20, 30], "counts": "~"})), "run lengths"),
    "negative": (coco((0, 1, {"size": [20, 30], "counts": [-5, 605]})), "run lengths"),
    "no annotations": (coco(), "annotations"),
    "an image twice": (coco((0, 1, TRIANGLE), images=[coco()["images"][0]] * 2), "two images"),
    "an image under two numbers": (
        coco((0, 1, TRIANGLE), images=[coco()["images"][0], {**coco()["images"][0], "id": 11}]),
        "two entries",
    ),
    "another file": ({"images": []}, "COCO"),
    "a list": ([1], "COCO"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_COCO.values(), ids=WRONG_COCO)
def test_wrong_coco_files(generated, tmp_path, content, message):
    before = contents(generated.folder)
    with pytest.raises(ValueError, match=message):
        drawn(generated, tmp_path, content)
    assert contents(generated.folder) == before


def test_lossy_and_scaled_ids_are_refused(generated, tmp_path):
    source = folder_of(tmp_path / "drawn")
    Image.new("L", (24, 16), CAR).save(source / "00000.png", format="JPEG")
    with pytest.raises(ValueError, match="00000.png is a JPEG"):
        datasets.import_masks(generated, source)
    # a grey PNG of 4 bits, whose ids of 1 decoders show as 17, a pole
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 24, 16, 4, 0, 0, 0, 0), b"IDAT" + zlib.compress(b"\0" + b"\x10" * 12)]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (*chunks, b"IEND")]
    (source / "00000.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(ValueError, match="4 bits"):
        datasets.import_masks(generated, source)


def test_a_picture_that_is_shown_turned_is_refused(generated, tmp_path):
    source = folder_of(tmp_path / "drawn" / "labels", **{"00000": Image.new("L", (24, 16), CAR)})
    (tmp_path / "drawn" / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    generated.image(0).save(tmp_path / "drawn" / "images" / "00000.png", exif=exif)
    with pytest.raises(ValueError, match="EXIF"):
        datasets.import_masks(generated, source)


def test_a_path_of_windows(large, tmp_path):
    images = [{**coco()["images"][0], "file_name": "train\\00000.png"}]
    assert drawn(large, tmp_path, coco((0, 1, TRIANGLE), images=images)).mask(0, "car").any()


def test_a_file_that_is_no_json(generated, tmp_path):
    (tmp_path / "masks.json").write_text("{")
    with pytest.raises(ValueError, match="masks.json"):
        datasets.import_masks(generated, tmp_path / "masks.json")
