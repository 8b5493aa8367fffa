"""Exports: what others' tools read there, whole files, and what must not vanish on the way."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from small_sets import contents

from daamlib import datasets
from daamlib.cityscapes import BY_NAME, COLOURS, to_train_ids
from daamlib.datasets import export
from daamlib.datasets import folder as files
from daamlib_lab.urban.dataset import render_dataset

N = 3


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Rendered scenes; read-only."""
    return render_dataset(tmp_path_factory.mktemp("scenes") / "set", N)


@pytest.fixture
def sparse(scenes, tmp_path):
    """The same images, labelled as by tokens: cars and persons only, a corner uncertain; of this test alone."""
    shutil.copytree(scenes.folder, tmp_path / "sparse")
    dataset = datasets.load(tmp_path / "sparse")
    for i in range(N):
        ids = dataset.labels(i)
        ids[~np.isin(ids, [BY_NAME["car"].id, BY_NAME["person"].id])] = 0
        ids[:5, :7] = 255
        files.write_png(dataset.folder / f"labels/{i:05d}.png", ids)
    return dataset


def pixels(path):
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.array(image)


# -- Cityscapes --------------------------------------------------------------------------------------------------


def test_cityscapes_folders(scenes, tmp_path):
    assert export.cityscapes(scenes, tmp_path / "out", split="val", city="tiny") == tmp_path / "out"
    found = contents(tmp_path / "out")
    stems = [f"tiny_000000_{i:06d}_" for i in range(N)]
    maps = [f"gtFine/val/tiny/{stem}gtFine_{kind}.png" for stem in stems for kind in ("labelIds", "labelTrainIds")]
    images = [f"leftImg8bit/val/tiny/{stem}leftImg8bit.png" for stem in stems]
    assert sorted(found) == sorted(["classes.json", *maps, *images])
    for i in range(N):
        assert found[images[i]] == (scenes.folder / scenes.manifest.file[i]).read_bytes()
        assert np.array_equal(pixels(tmp_path / "out" / maps[2 * i]), scenes.labels(i))
        assert np.array_equal(pixels(tmp_path / "out" / maps[2 * i + 1]), to_train_ids(scenes.labels(i)))
    classes = json.loads(found["classes.json"])
    assert len(classes) == 20
    assert (classes["0"], classes["13"], classes["18"], classes["255"]) == ("road", "car", "bicycle", "ignored")


def test_of_a_few_classes_the_background_stays(sparse, tmp_path):
    export.cityscapes(sparse, tmp_path / "out", classes=("person", "car"))
    shown = set()
    for i in range(N):
        stem = tmp_path / "out" / "gtFine" / "train" / "urban" / f"urban_000000_{i:06d}_gtFine_"
        ids, train = sparse.labels(i), pixels(f"{stem}labelTrainIds.png")
        shown |= {*np.unique(train).tolist()}
        for value, train_id in ((0, 0), (BY_NAME["person"].id, 1), (BY_NAME["car"].id, 2), (255, 255)):
            assert np.array_equal(train == train_id, ids == value)
        assert np.array_equal(pixels(f"{stem}labelIds.png"), np.where(ids == 255, 0, ids))
    assert {0, 255} < shown
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert classes == {"0": "background", "1": "person", "2": "car", "255": "ignored"}


def test_cityscapes_again_after_a_correction_or_a_kill(sparse, tmp_path):
    folder = export.cityscapes(sparse, tmp_path / "out", classes=["car"])
    first = contents(folder)
    next(folder.rglob("*000001_leftImg8bit.png")).unlink()
    (folder / "gtFine/train/urban/.urban_000000_000001_gtFine_labelIds.png.1.part").write_text("half")
    export.cityscapes(sparse, folder, classes=["car"])
    assert contents(folder) == first
    files.write_png(sparse.folder / "labels/00001.png", np.full((128, 128), 26, np.uint8))
    export.cityscapes(sparse, folder, classes=["car"])
    changed = {name for name, content in contents(folder).items() if content != first[name]}
    stem = "gtFine/train/urban/urban_000000_000001_gtFine_"
    assert changed == {stem + "labelIds.png", stem + "labelTrainIds.png"}


WRONG = {
    "a class": ({"classes": ["cat"]}, "cat"),
    "a string": ({"classes": "car"}, "classes"),
    "twice": ({"classes": ["car", "car"]}, "classes"),
    "none": ({"classes": []}, "classes"),
    "a split": ({"split": "a/b"}, "split"),
    "a city": ({"city": "a_b"}, "city"),
    "a place": ({"city": ".."}, "city"),
    "a drive": ({"city": "C:"}, "city"),
    "a device": ({"split": "con"}, "Windows"),
    "a number": ({"split": 5}, "split"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_for_cityscapes(scenes, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export.cityscapes(scenes, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_two_exports_do_not_mix(scenes, tmp_path):
    folder = export.cityscapes(scenes, tmp_path / "out", classes=["car"])
    before = contents(folder)
    with pytest.raises(ValueError, match="classes.json"):
        export.cityscapes(scenes, folder, classes=["car", "person"], split="val")
    few = datasets.Dataset(scenes.folder, scenes.manifest.loc[[0, 2]])
    with pytest.raises(ValueError, match="urban_000000_000001"):
        export.cityscapes(few, folder, classes=["car"])
    assert contents(folder) == before


# -- COCO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scenes", "sparse"])
def test_coco_comes_back(kind, request, tmp_path):
    dataset = request.getfixturevalue(kind)
    path = export.coco(dataset, tmp_path / "out", split="val")
    assert path == tmp_path / "out" / "annotations" / "instances_val.json"
    shutil.copytree(dataset.folder, tmp_path / "blank")
    shutil.rmtree(tmp_path / "blank" / "labels")
    back = datasets.Dataset(tmp_path / "blank", dataset.manifest)
    datasets.import_masks(back, path)
    seen = 0
    for i in range(N):
        seen += len(np.unique(dataset.labels(i)))
        assert np.array_equal(back.labels(i), dataset.labels(i))
        assert (tmp_path / "out" / "val" / f"{i:05d}.png").read_bytes() == dataset.path("images", i).read_bytes()
    assert seen > N


def test_coco_instances(scenes, tmp_path):
    ids = np.zeros((128, 128), np.uint8)
    ids[10:20, 30:50] = ids[20:30, 50:55] = 26  # they touch at a corner: one
    ids[0, 0] = ids[100:103, 4] = 24
    ids[60:62, 60:63] = 255
    shutil.copytree(scenes.folder, tmp_path / "set")
    dataset = datasets.load(tmp_path / "set")
    files.write_png(dataset.folder / "labels/00001.png", ids)
    for changes, areas in (({}, [1, 3, 250]), ({"min_pixels": 3}, [3, 250]), ({"classes": ["person"]}, [1, 3])):
        path = export.coco(dataset, tmp_path / "out", **changes)
        content = json.loads(path.read_text())
        found = [a for a in content["annotations"] if a["image_id"] == 1]
        assert [a["area"] for a in found] == areas
        if not changes:
            assert [a["category_id"] for a in found] == [24, 24, 26]
            assert [a["bbox"] for a in found] == [[0, 0, 1, 1], [4, 100, 1, 3], [30, 10, 25, 20]]
            first = COCO(path).annToMask(found[0])
            assert first.shape == (128, 128) and first[0, 0] == first.sum() == 1
            assert COCO(path).annToMask(found[1])[100:103, 4].sum() == 3
    assert content["categories"] == [{"id": 24, "name": "person", "supercategory": "human"}]
    assert [a["id"] for a in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    entry = content["images"][1]
    assert (entry["file_name"], entry["height"], entry["width"]) == ("00001.png", 128, 128)
    assert np.array_equal(coco_mask.decode(entry["ignored"]), ids == 255)
    assert "ignored" not in content["images"][0]


def test_points_are_far_inside(scenes, tmp_path):
    content = json.loads(export.coco(scenes, tmp_path / "out").read_text())
    for found in content["annotations"]:
        (x, y), labels = found["point"], scenes.labels(found["image_id"])
        assert (
            labels[y, x] == found["category_id"]
            and COCO(tmp_path / "out/annotations/instances_train.json").annToMask(found)[y, x]
        )


def test_prompts_by_hand():
    ids = np.zeros((20, 30), np.uint8)
    ids[4:11, 6:17] = 26  # a bar with a thin handle: the middle of its box is not the point farthest inside
    ids[7, 17:29] = 26
    ids[15:18, 0:3] = 24  # at the edge: the picture's border is outside, too
    ids[0, 29] = 255
    person, car = export.prompts(ids)
    assert person == {"class": "person", "box": [0, 15, 2, 17], "points": [[1, 16]], "point_labels": [1]}
    assert (car["class"], car["box"]) == ("car", [6, 4, 28, 10])
    ((x, y),) = car["points"]
    assert y == 7 and 9 <= x <= 13
    assert export.prompts(ids, classes=["person"]) == [person]
    assert export.prompts(ids, min_pixels=10) == [car]
    assert export.prompts(np.full((3, 3), 255, np.uint8)) == []
    for options, message in (({"classes": ["cat"]}, "cat"), ({"min_pixels": 0}, "min_pixels")):
        with pytest.raises(ValueError, match=message):
            export.prompts(ids, **options)
    with pytest.raises(ValueError, match="99"):
        export.prompts(np.full((3, 3), 99, np.uint8))


def test_detections_by_hand():
    ids = np.zeros((20, 30), np.uint8)
    ids[4:11, 6:17] = 26
    ids[15:18, 0:3] = 24
    ids[0, 29] = 255
    found = export.detections(ids)
    assert found["xyxy"].tolist() == [[0, 15, 2, 17], [6, 4, 16, 10]]
    assert found["mask"].dtype == bool and np.array_equal(found["mask"], [ids == 24, ids == 26])
    assert found["class_id"].tolist() == [24, 26] and found["data"]["class_name"].tolist() == ["person", "car"]
    empty = export.detections(ids, classes=["bus"])
    assert (empty["xyxy"].shape, empty["mask"].shape, len(empty["class_id"])) == ((0, 4), (0, 20, 30), 0)
    with pytest.raises(ValueError, match="cat"):
        export.detections(ids, classes=["cat"])


def test_overlays(scenes, tmp_path):
    folder = export.overlays(scenes, tmp_path, opacity=0.25)
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:05d}.png" for i in scenes.indices]
    found, image = files.read_png(folder / "00001.png"), np.asarray(scenes.image(1))
    assert np.abs(found - (0.75 * image + 0.25 * COLOURS[scenes.labels(1)])).max() <= 0.5 + 1e-6
    (folder / "mine.png").touch()
    with pytest.raises(ValueError, match="mine"):
        export.overlays(scenes, tmp_path)
    with pytest.raises(ValueError, match="opacity"):
        export.overlays(scenes, tmp_path, opacity=2)


def test_wrong_arguments_for_coco(scenes, tmp_path):
    for options, message in (
        ({"classes": ["cat"]}, "cat"),
        ({"split": "../x"}, "split"),
        ({"min_pixels": 0}, "min_pixels"),
        ({"min_pixels": float("nan")}, "min_pixels"),
        ({"classes": ["car", "unlabeled"]}, "unlabeled.* none of the classes"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            export.coco(scenes, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# -- Hugging Face ------------------------------------------------------------------------------------------------


def test_hugging_face(sparse):
    pytest.importorskip("datasets", reason="the extra daamlib[datasets] is not installed")
    table = export.hugging_face(sparse)
    assert table.column_names == ["image", "label", "index", "prompt", "seed"]
    assert len(table) == N
    for i, row in enumerate(table):
        assert np.array_equal(row["image"], sparse.image(i))
        assert np.array_equal(row["label"], sparse.labels(i))
        assert (row["index"], row["prompt"], row["seed"]) == (i, sparse.manifest.prompt[i], sparse.manifest.seed[i])
    assert table.select([2])[0]["index"] == 2
    again = export.hugging_face(sparse)
    assert again._fingerprint == table._fingerprint
    os.utime(sparse.folder / "labels" / "00001.png", (0, 0))  # as if it was drawn anew
    assert export.hugging_face(sparse)._fingerprint != table._fingerprint


def test_without_hugging_face(scenes, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'daamlib\[datasets\]'"):
        export.hugging_face(scenes)


# -- all of them -------------------------------------------------------------------------------------------------


def test_images_without_labels(sparse, tmp_path):
    (sparse.folder / "labels" / "00001.png").unlink()
    calls = [lambda: export.cityscapes(sparse, tmp_path / "a"), lambda: export.coco(sparse, tmp_path / "b")]
    if "datasets" in sys.modules:
        calls.append(lambda: export.hugging_face(sparse))
    for call in calls:
        with pytest.raises(ValueError, match="label"):
            call()
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    files.write_png(sparse.folder / "labels/00001.png", np.full((128, 128), 99, np.uint8))
    with pytest.raises(ValueError, match="99"):
        export.coco(sparse, tmp_path / "b")
    assert not list(tmp_path.glob("b/annotations/*"))
