"""Exports: what others' tools read there, whole files, and what must not vanish on the way."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from small_sets import contents

from daamlib import classes, datasets
from daamlib.cityscapes import BY_NAME, COLOURS, to_train_ids
from daamlib.datasets import export
from daamlib.datasets import folder as files
from daamlib_lab.urban.dataset import render_dataset

N = 3
NOT_HERE = "{} is not installed: docs/formats.md says how"


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


# -- MMSegmentation ----------------------------------------------------------------------------------------------


def test_mmsegmentation_folders(scenes, tmp_path):
    arguments = export.mmsegmentation(scenes, tmp_path / "out", split="val")
    metainfo = arguments.pop("metainfo")
    assert arguments == {
        "data_root": str(tmp_path / "out"),
        "data_prefix": {"img_path": "img_dir/val", "seg_map_path": "ann_dir/val"},
        "img_suffix": ".png",
    }
    found = contents(tmp_path / "out")
    names = [f"{part}/val/{i:05d}.png" for part in ("ann_dir", "img_dir") for i in range(N)]
    assert sorted(found) == [*names, "metainfo.json"]  # Detectron2, too, matches images and label maps by name
    for i in range(N):
        assert found[f"img_dir/val/{i:05d}.png"] == scenes.path("images", i).read_bytes()
        assert np.array_equal(pixels(tmp_path / f"out/ann_dir/val/{i:05d}.png"), to_train_ids(scenes.labels(i)))
    assert json.loads(found["metainfo.json"]) == metainfo
    assert len(metainfo["classes"]) == len(metainfo["palette"]) == 19
    assert [metainfo["classes"][i] for i in (0, 13, 18)] == ["road", "car", "bicycle"]
    assert metainfo["palette"] == [list(BY_NAME[name].color) for name in metainfo["classes"]]


def test_mmsegmentation_of_a_few_classes(sparse, tmp_path):
    metainfo = export.mmsegmentation(sparse, tmp_path / "out", classes=("person", "car"))["metainfo"]
    colours = [[0, 0, 0], list(BY_NAME["person"].color), list(BY_NAME["car"].color)]
    assert metainfo == {"classes": ["background", "person", "car"], "palette": colours}
    for i in range(N):
        ids, train = sparse.labels(i), pixels(tmp_path / f"out/ann_dir/train/{i:05d}.png")
        for value, train_id in ((0, 0), (BY_NAME["person"].id, 1), (BY_NAME["car"].id, 2), (255, 255)):
            assert np.array_equal(train == train_id, ids == value)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="metainfo.json"):  # the splits of a folder have the same classes
        export.mmsegmentation(sparse, tmp_path / "out", classes=("car", "person"), split="val")
    for options, message in (({"classes": ["cat"]}, "cat"), ({"split": "a/b"}, "split")):
        with pytest.raises(ValueError, match=message):
            export.mmsegmentation(sparse, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before


def test_mmsegmentation_of_other_classes(sparse, tmp_path):
    table = classes.class_list({"bicycle": (7, "#0a141e"), "dog": (3, (40, 50, 60))})
    settings = json.loads((sparse.folder / "dataset.json").read_text()) | {"classes": table.stored()}
    (sparse.folder / "dataset.json").write_text(json.dumps(settings))
    for i in range(N):
        files.write_png(sparse.folder / f"labels/{i:05d}.png", np.full((128, 128), (3, 7, 0)[i], np.uint8))
    metainfo = export.mmsegmentation(sparse, tmp_path / "out")["metainfo"]
    assert metainfo == {
        "classes": ["background", "bicycle", "dog"],
        "palette": [[0, 0, 0], [10, 20, 30], [40, 50, 60]],
    }
    assert [int(pixels(tmp_path / f"out/ann_dir/train/{i:05d}.png").max()) for i in range(N)] == [2, 1, 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a library of 2023
def test_mmsegmentation_reads_its_folders(sparse, tmp_path, monkeypatch):
    pytest.importorskip("mmseg", reason=NOT_HERE.format("mmsegmentation"))
    if not importlib.util.find_spec("mmcv._ext"):  # mmcv-lite: a module that the datasets import needs an operator
        monkeypatch.setitem(sys.modules, "mmcv.ops", SimpleNamespace(point_sample=None))  # which they do not use
    mmseg = importlib.import_module("mmseg.datasets")
    arguments = export.mmsegmentation(sparse, tmp_path / "out", split="val", classes=("person", "car"))
    steps = [{"type": f"mmseg.{name}"} for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")]
    read = mmseg.BaseSegDataset(**arguments, pipeline=steps)
    assert (len(read), read.ignore_index, read.label_map) == (N, 255, None)
    assert read.metainfo["classes"] == ["background", "person", "car"]
    assert read.metainfo["palette"] == arguments["metainfo"]["palette"]
    for i, sample in enumerate(read):
        found = sample["data_samples"].gt_sem_seg.data[0].numpy()
        assert np.array_equal(found, pixels(tmp_path / f"out/ann_dir/val/{i:05d}.png"))
        assert set(np.unique(found)) <= {0, 1, 2, 255}
        assert np.array_equal(sample["inputs"].numpy()[::-1].transpose(1, 2, 0), sparse.image(i))  # BGR


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_supervision_takes_the_detections(scenes):
    supervision = pytest.importorskip("supervision", reason=NOT_HERE.format("supervision"))
    arguments, image = export.detections(scenes.labels(0)), np.asarray(scenes.image(0))
    found = supervision.Detections(**arguments)
    assert len(found) == len(arguments["class_id"]) > 3
    assert found.area.tolist() == arguments["mask"].sum(axis=(1, 2)).tolist()
    cars = found[found["class_name"] == "car"]
    assert len(cars) and set(cars.class_id) == {BY_NAME["car"].id}
    painted = supervision.MaskAnnotator().annotate(image.copy(), cars)
    assert np.array_equal((painted != image).any(axis=2), cars.mask.any(axis=0))
    assert len(supervision.Detections(**export.detections(np.zeros((20, 30), np.uint8)))) == 0


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


# -- FiftyOne ----------------------------------------------------------------------------------------------------


@pytest.fixture
def voxel51(tmp_path, monkeypatch):
    """The package, with its database in a folder of this test."""
    if not (spec := importlib.util.find_spec("fiftyone")):
        pytest.skip(NOT_HERE.format("fiftyone"))
    bundled = Path(spec.submodule_search_locations[0]) / "db" / "bin" / "mongod"
    if not ("FIFTYONE_DATABASE_URI" in os.environ or bundled.is_file()):
        pytest.skip(NOT_HERE.format("MongoDB, which fiftyone needs,"))
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path / "database"))
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
    return importlib.import_module("fiftyone")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fiftyone(whole, voxel51):
    made = export.fiftyone(whole, word="car")
    assert made.name in voxel51.list_datasets() and len(made) == len(whole)
    assert made.default_mask_targets[BY_NAME["car"].id] == "car" and made.default_mask_targets[255] == "ignored"
    again = voxel51.load_dataset(made.name)
    fields = again.get_field_schema()
    assert fields["label"].document_type is voxel51.Segmentation
    assert fields["heatmap"].document_type is voxel51.Heatmap
    for i, sample in zip(whole.indices, again, strict=True):
        assert sample.filepath == str(whole.path("images", i).resolve())
        assert np.array_equal(sample.label.get_mask(), whole.labels(i))
        assert (sample["index"], sample["prompt"]) == (i, whole.manifest.prompt[i])
        assert sample["seed"] == whole.manifest.seed[i]
        if "car" in sample["prompt"]:
            heat = whole.record(i).daam()["car"].numpy()
            assert np.array_equal(sample.heatmap.get_map(), heat)
            assert sample.heatmap.range == [heat.min(), heat.max()]
        else:
            assert sample.heatmap is None
    assert again.exists("heatmap").values("index") == [0, 2, 3, 4]
    assert "heatmap" not in export.fiftyone(whole).get_field_schema()
    before = voxel51.list_datasets()
    with pytest.raises(ValueError, match="'bicycle'"):
        export.fiftyone(whole, word="bicycle")
    assert voxel51.list_datasets() == before


def test_without_fiftyone(scenes, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(ImportError, match=r"pip install 'daamlib\[fiftyone\]'"):
        export.fiftyone(scenes)


# -- all of them -------------------------------------------------------------------------------------------------


def test_images_without_labels(sparse, tmp_path):
    (sparse.folder / "labels" / "00001.png").unlink()
    calls = [lambda: export.cityscapes(sparse, tmp_path / "a"), lambda: export.coco(sparse, tmp_path / "b")]
    calls.append(lambda: export.mmsegmentation(sparse, tmp_path / "a"))
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
