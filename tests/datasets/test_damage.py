"""What is wrong in a folder is said, with the file's name, before anything relies on it."""

import dataclasses
import functools
import json
import os
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import CAR, OPTIONS, PROMPTS, bright, contents, token_for, traced

import daamlib
from daamlib import datasets
from daamlib.classes import VOC
from daamlib.datasets import export, generation
from daamlib.datasets import folder as files
from daamlib_lab.urban.dataset import render_dataset


@pytest.fixture
def copy(whole, tmp_path):
    """The whole dataset, of this test alone."""
    shutil.copytree(whole.folder, tmp_path / "a folder with spaces")
    return tmp_path / "a folder with spaces"


@pytest.fixture
def again(copy, sd1_pipe):
    """The call that made it."""
    return functools.partial(datasets.generate, sd1_pipe, PROMPTS, copy, labeller=bright, **OPTIONS)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_end(path):
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path):
    """One bit of the pixels, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def noise(path):
    path.write_bytes(os.urandom(path.stat().st_size))


def empty(path):
    path.write_bytes(b"")


def jpeg(path):
    with Image.open(path) as image:
        image.convert("L").save(path, format="JPEG")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def picture(mode, size=(24, 16), value=0):
    return lambda path: Image.new(mode, size, value).save(path)


def bomb(path):
    """A small file that says it is 60,000 x 60,000 pixels."""
    head = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    end = b"IEND"
    chunks = [(len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big") for part in (head, end)]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


DAMAGE = {
    "cut": cut,
    "without its end": without_end,
    "flipped": flipped,
    "empty": empty,
    "noise": noise,
    "a pointer": pointer,
    "a bomb": bomb,
}
IMAGES = DAMAGE | {
    "other size": picture("RGB", (16, 24)),
    "a palette": picture("P"),
    "grey": picture("L"),
    "see-through": picture("RGBA"),
}
LABELS = DAMAGE | {
    "other size": picture("L", (16, 24)),
    "half size": picture("L", (12, 8)),
    "colours": picture("RGB"),
    "16 bits": picture("I;16"),
    "other ids": picture("L", value=77),
}


@pytest.mark.parametrize(
    ("part", "damage"),
    [("images", damage) for damage in IMAGES.values()] + [("labels", damage) for damage in LABELS.values()],
    ids=[f"images, {name}" for name in IMAGES] + [f"labels, {name}" for name in LABELS],
)
def test_a_damaged_picture_is_named_everywhere(copy, again, tmp_path, part, damage):
    whole = datasets.load(copy)
    damage(copy / part / "00003.png")
    before, uses = contents(copy), {
        "load": lambda: datasets.load(copy),
        "the same call": again,
        "cityscapes": lambda: export.cityscapes(whole, tmp_path / "c", classes=["car"]),
        "coco": lambda: export.coco(whole, tmp_path / "o"),
        "overlays": lambda: export.overlays(whole, tmp_path / "v"),
    }  # fmt: skip
    for use in uses.values():
        with pytest.raises(ValueError, match=f"{part}/00003.png"):
            use()
    assert contents(copy) == before and not list((tmp_path / "o").rglob("*.json"))
    assert len(datasets.load(copy, verify=False)) == 5
    (copy / part / "00003.png").unlink()  # as the error says
    again()
    assert len(datasets.load(copy)) == 5


def test_a_damaged_picture_is_named_for_hugging_face(copy):
    pytest.importorskip("datasets", reason="the extra daamlib[datasets] is not installed")
    dataset = datasets.load(copy)
    for part, damage in (("images", cut), ("labels", picture("L", value=77))):
        kept = (copy / part / "00003.png").read_bytes()
        damage(copy / part / "00003.png")
        with pytest.raises(ValueError, match=f"{part}/00003.png"):
            export.hugging_face(dataset)
        (copy / part / "00003.png").write_bytes(kept)
    assert len(export.hugging_face(dataset)) == 5


@pytest.mark.parametrize("damage", [cut, empty, noise], ids=["cut", "empty", "noise"])
def test_a_damaged_record_is_named(copy, again, damage):
    damage(copy / "records" / "00002.safetensors")
    for use in (again, lambda: datasets.load(copy)):
        with pytest.raises(ValueError, match="records/00002.safetensors"):
            use()


def test_a_damaged_scene_is_named(tmp_path):
    dataset = render_dataset(tmp_path / "scenes", 2, size=32)
    cut(dataset.path("images", 1))
    for use in (lambda: datasets.load(dataset.folder), lambda: render_dataset(dataset.folder, 2, size=32)):
        with pytest.raises(ValueError, match="images/00001.png"):
            use()


def test_without_a_size_all_images_have_that_of_the_first(sd1_pipe, tmp_path):
    dataset = datasets.generate(sd1_pipe, PROMPTS[:3], tmp_path / "set", steps=1)
    Image.new("RGB", (8, 8)).save(dataset.path("images", 2))
    with pytest.raises(ValueError, match="images/00002.png is 8 px wide"):
        datasets.load(dataset.folder)


def test_files_of_images_that_the_dataset_has_not(copy, again):
    shutil.copy(copy / "images" / "00003.png", copy / "images" / "00005.png")
    for use in (again, lambda: datasets.load(copy)):
        with pytest.raises(ValueError, match="images/00005.png is not of this dataset, which has 5"):
            use()


def test_a_folder_that_was_copied_in_part(copy, again):
    (copy / "dataset.json").rename(copy / "moved")
    with pytest.raises(FileNotFoundError, match=r"no dataset.json"):
        datasets.load(copy)
    with pytest.raises(ValueError, match="no dataset.json"):
        again()
    (copy / "moved").rename(copy / "dataset.json")
    expected = contents(copy)
    (copy / "images" / "00004.png").unlink()
    (copy / "images" / "00004.png").symlink_to("nowhere")
    shutil.rmtree(copy / "labels")
    again()
    assert contents(copy) == expected


def edited(text):
    lines = text.split("\n")
    return {
        "a cell": text.replace("a car and a tree", "a bus"),
        "a column less": "\n".join(line.rpartition(",")[0] for line in lines),
        "a row less": "\n".join(lines[:-2]),
        "a row twice": "\n".join([*lines[:2], *lines[1:]]),
        "other order": "\n".join([lines[0], lines[2], lines[1], *lines[3:]]),
        "no header": "\n".join(lines[1:]),
        "nothing": "",
        "a quote": text.replace("prompt", '"prompt', 1),
        "NUL": text.replace("tree", "\0", 1),
    }


def test_an_edited_manifest_is_refused(copy, again):
    path = copy / "manifest.csv"
    text = path.read_text()
    for content in (*edited(text).values(), b"\xff\xfe"):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for use in (again, lambda: datasets.load(copy)):
            with pytest.raises(ValueError, match="manifest.csv is not the one that follows"):
                use()
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())  # as a spreadsheet saves the same
    assert len(datasets.load(copy)) == len(again()) == 5


def test_an_edited_manifest_of_scenes_is_refused(tmp_path):
    dataset = render_dataset(tmp_path / "scenes", 2, size=32)
    text = (dataset.folder / "manifest.csv").read_text()
    for content in (text.split("\n", 1)[1], text.replace("prompt", "text"), text.replace("rendered", "") + "x,y\n", ""):
        (dataset.folder / "manifest.csv").write_text(content)
        with pytest.raises(ValueError, match="manifest.csv"):
            datasets.load(dataset.folder)


def test_edited_settings_are_refused(copy, again):
    path = copy / "dataset.json"
    settings = json.loads(path.read_text())
    changes = [{"images": 7}, {"images": "5"}, {"prompts": None}, {"labels": None}, {"size": "16"}, {"versions": []}]
    without = [
        {name: value for name, value in settings.items() if name != lost} for lost in ("seed", "prompts", "kind")
    ]
    for wrong in [*({**settings, **change} for change in changes), *without]:
        path.write_text(json.dumps(wrong))
        for use in (again, lambda: datasets.load(copy)):
            with pytest.raises(ValueError, match="dataset.json is damaged"):
                use()


def test_a_full_disk_leaves_no_half_file_and_the_same_call_goes_on(copy, again, monkeypatch):
    expected = contents(copy)
    for name in ("images/00001.png", "labels/00001.png", "records/00001.safetensors", "manifest.csv"):
        (copy / name).unlink()
    save = Image.Image.save

    def full(self, path, **options):
        save(self, path, **options)
        if "00001.png" in str(path):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space"):
            again()
    left = contents(copy)
    assert all(expected[name] == left[name] for name in left) and not [name for name in left if ".part" in name]
    again()
    assert contents(copy) == expected


# -- nothing is left of what was refused -------------------------------------------------------------------------


def black(image, record, prompt):
    raise ValueError("this labeller labels nothing")


REFUSED = {
    "no steps": ({"steps": 0}, "steps must be 1"),
    "half a step": ({"steps": 2.5}, "steps must be a whole number"),
    "too many steps": ({"steps": 100000}, "at most 1000"),
    "a seed": ({"seed": 0.5}, "seed must be a whole number"),
    "no size": ({"size": 0}, "size must be 1"),
    "a negative size": ({"size": (16, -8)}, "size must be 1"),
    "three sides": ({"size": (16, 16, 16)}, "height and width"),
    "an odd size": ({"size": 7}, "multiple|divisible"),
    "a huge size": ({"size": 10**6}, "Pillow"),
    "a shard": ({"shard": 3}, "shard is .k, n."),
    "half a shard": ({"shard": (0.5, 1)}, "shard.* whole number"),
    "half a letter": ({"prompts": ["\ud800"]}, "surrogate"),
    "a batch": ({"batch_size": 10**9}, "batch_size .*at most"),
    "guidance": ({"guidance": float("nan")}, "guidance"),
    "much guidance": ({"guidance": float("inf")}, "guidance"),
    "overflowing guidance": ({"guidance": 1e38}, "NaN"),
    "records": ({"keep_steps": -1}, "keep_steps"),
    "no such option": ({"negative_promt": "blurry"}, "did you mean negative_prompt"),
    "our option": ({"guidance_scale": 2.0}, "use guidance="),
    "an option of the dataset": ({"output_type": "latent"}, "output_type"),
    "a list of texts": ({"negative_prompt": ["blurry"]}, "negative_prompt is one text"),
    "an option that is no JSON": ({"sigmas": np.ones(2)}, "dataset.json cannot hold"),
    "the labeller": ({"labeller": black}, "labels nothing"),
    "classes": ({"labeller": bright, "classes": {"car": 1}}, "26"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refused_call_leaves_nothing_in_the_way(sd1_pipe, tmp_path, change, message):
    usual = {"prompts": ["a car"], "folder": tmp_path / "set", "steps": 1, "size": 16}
    with pytest.raises((ValueError, TypeError), match=message):
        datasets.generate(sd1_pipe, **{**usual, **change})
    assert not list((tmp_path / "set").rglob("*"))
    assert len(datasets.generate(sd1_pipe, **usual)) == 1


# -- the pipeline's own options, and more images -----------------------------------------------------------------


def test_the_pipelines_own_options(sd1_pipe, tmp_path):
    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS[:3], steps=2, size=(16, 24), batch_size=2)
    plain, dataset = make(tmp_path / "plain"), make(tmp_path / "set", negative_prompt="a tree", eta=0.5, clip_skip=None)
    assert dataset.settings["options"] == {"negative_prompt": "a tree", "eta": 0.5}
    assert "options" not in plain.settings
    for i in range(3):
        generator = torch.Generator().manual_seed(int(dataset.manifest.seed[i]))
        same = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 16, "width": 24, "generator": generator}
        image = sd1_pipe(PROMPTS[i], negative_prompt="a tree", eta=0.5, **same).images[0]
        assert np.abs(np.asarray(image, int) - np.asarray(dataset.image(i), int)).max() <= 2  # of a batch
        assert not np.array_equal(dataset.image(i), plain.image(i))
    with pytest.raises(ValueError, match=r"options: .*'a tree'.* there, .*'a bus'.* here"):
        make(dataset.folder, negative_prompt="a bus", eta=0.5)
    with pytest.raises(ValueError, match="options: .* there, None here"):
        make(dataset.folder)
    before = contents(dataset.folder)
    make(dataset.folder, eta=0.5, negative_prompt="a tree")
    assert contents(dataset.folder) == before


def test_a_dataset_grows(whole, sd1_pipe, tmp_path):
    make = functools.partial(datasets.generate, sd1_pipe, folder=tmp_path / "set", labeller=bright, **OPTIONS)
    make(PROMPTS[:2])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "images").iterdir()}
    with pytest.raises(ValueError, match="images: 2 there, 1 here"):
        make(PROMPTS[:1])
    shutil.copy(tmp_path / "set" / "images" / "00001.png", tmp_path / "set" / "images" / "00003.png")  # not of it
    with pytest.raises(ValueError, match="00003.png is not of this dataset"):
        make(PROMPTS)
    (tmp_path / "set" / "images" / "00003.png").unlink()
    make(PROMPTS)
    assert contents(tmp_path / "set") == contents(whole.folder)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(datasets.load(tmp_path / "set")) == 5


def test_scenes_grow(tmp_path):
    render_dataset(tmp_path / "set", 2, size=32)
    render_dataset(tmp_path / "set", 3, size=32)
    whole = render_dataset(tmp_path / "whole", 3, size=32)
    assert contents(tmp_path / "set") == contents(whole.folder)


# -- labellers and classes ---------------------------------------------------------------------------------------


def test_a_plain_function_gets_the_record(sd1_pipe, tmp_path):
    """With all that any map needs, also where the images are there already."""
    seen = []

    def cats(image, record, prompt):
        seen.append(record)
        assert record.prompt == prompt
        return daamlib.label_map(record, {"cat": "car", "dog": "tree"}, size=image.shape[:2], margin=0.0)

    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS[:2], tmp_path / "set", steps=2, size=(16, 24))
    plain = contents(make().folder)
    dataset = make(labeller=cats, classes={"cat": 1, "dog": 2})
    assert len(seen) == 2
    for i, record in enumerate(seen):
        expected = daamlib.label_map(record, {"cat": "car", "dog": "tree"}, size=(16, 24), margin=0.0)
        assert np.array_equal(dataset.labels(i), expected) and {*np.unique(expected)} == {1, 2}
        assert np.array_equal(dataset.mask(i, "dog"), expected == 2)
    assert {name: content for name, content in contents(dataset.folder).items() if "images" in name} == {
        name: content for name, content in plain.items() if "images" in name
    }
    assert dataset.settings["classes"] == {
        "unlabeled": [0, [0, 0, 0]],
        "cat": [1, [128, 0, 0]],
        "dog": [2, [0, 128, 0]],
    }
    with pytest.raises(ValueError, match="'car' is no custom label"):
        dataset.with_class("car")
    before = contents(dataset.folder)
    make(labeller=cats)  # the classes are the dataset's
    assert contents(dataset.folder) == before
    with pytest.raises(ValueError, match="'cat' is 1 here, it is 2 there"):
        make(labeller=cats, classes={"cat": 2, "dog": 1})


def test_words_and_tokens_of_any_classes(sd1_pipe, tmp_path):
    words, cat = {"cat": "car", "dog": "tree"}, (token_for(traced(sd1_pipe), "cat"),)
    every = {"named_only": False}
    for labeller, ids in (
        (datasets.WordLabeller(words, margin=0.0, **every), {"cat": 1, "dog": 2}),
        (datasets.WordLabeller(words, ids={"dog": 7, "cat": 9}, **every), {"dog": 7, "cat": 9}),
        (datasets.TokenLabeller(cat, **every), {"cat": 1}),
        (datasets.TokenLabeller(cat, ids=VOC, **every), {name: i for name, i in VOC.ids.items() if i}),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        dataset = datasets.generate(sd1_pipe, PROMPTS[:1], folder, labeller=labeller, steps=2, size=(16, 24))
        assert {name: number for name, number in dataset.classes.ids.items() if number} == ids
        assert {*np.unique(dataset.labels(0))} - {0, 255} <= set(ids.values())
        assert dataset.mask(0, "cat").any()


def test_pytorch_reads_a_dataset(whole):
    assert isinstance(whole, torch.utils.data.Dataset)
    images, labels = next(iter(torch.utils.data.DataLoader(whole, batch_size=5)))
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
        (5, 3, 16, 24), torch.float32, (5, 16, 24), torch.int64
    )  # fmt: skip
    for i in range(5):
        assert np.array_equal((images[i] * 255).round().byte().permute(1, 2, 0).numpy(), whole.image(i))
        assert np.array_equal(labels[i].numpy(), whole.labels(i))
    assert len(list(whole)) == 5
    flipped = dataclasses.replace(whole, transform=lambda image, labels: (image[:, ::-1], labels[:, ::-1]))
    assert torch.equal(flipped[-1][0], images[4].flip(2)) and torch.equal(flipped[-1][1], labels[4].flip(1))
    few = datasets.Dataset(whole.folder, whole.manifest.loc[[3, 1]])
    assert torch.equal(few[0][1], labels[3])
    assert CAR in labels
    with pytest.raises(IndexError):
        few[2]
    with pytest.raises(TypeError, match="whole number"):
        few[0:2]
    with pytest.raises(IndexError, match="no image 1.0"):
        whole.image(1.0)


TRANSFORMS = {
    "another shape of one": lambda image, labels: (image[:8], labels),
    "pixels in 0 ... 1": lambda image, labels: (image / 255, labels),
    "channels first": lambda image, labels: (image.transpose(2, 0, 1), labels),
    "blurred ids": lambda image, labels: (image, labels / 2),
    "nothing": lambda image, labels: None,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_that_does_not_fit_is_refused(whole, transform):
    with pytest.raises(ValueError, match="transform must return"):
        dataclasses.replace(whole, transform=transform)[0]


def test_rows_are_of_their_images(whole):
    with pytest.raises(ValueError, match="reset_index"):
        datasets.Dataset(whole.folder, whole.manifest.iloc[[3, 1]].reset_index(drop=True))
    with pytest.raises(ValueError, match="twice"):
        datasets.Dataset(whole.folder, whole.manifest.iloc[[3, 3]])


# -- files of another image --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["images", "labels", "records"])
def test_files_that_changed_places_are_named(copy, again, sd1_pipe, part):
    first, second = (copy / files.file_name(part, i) for i in (1, 3))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    for call in (again, lambda: datasets.load(copy)):
        with pytest.raises(ValueError, match=f"{first.name} is of another image"):
            call()
    if part == "records":
        with pytest.raises(ValueError, match="of another image"):
            datasets.load(copy, verify=False).record(1, sd1_pipe)


def test_an_image_of_elsewhere_is_named(copy, sd1_pipe, tmp_path):
    path = copy / "images" / "00001.png"
    other = datasets.generate(sd1_pipe, PROMPTS[:2], tmp_path / "other", **{**OPTIONS, "seed": 4})
    path.write_bytes(other.path("images", 1).read_bytes())
    with pytest.raises(ValueError, match="00001.png is of another image"):
        datasets.load(copy)
    with Image.open(path) as image:
        Image.fromarray(255 - np.asarray(image)).save(path)
    with pytest.raises(ValueError, match="00001.png was replaced"):
        datasets.load(copy)


def test_a_label_map_of_another_program_and_a_folder_of_an_older_version_open(copy, again):
    Image.fromarray(np.full((16, 24), CAR, np.uint8)).save(copy / "labels" / "00001.png")
    assert (datasets.load(copy).labels(1) == CAR).all()
    path = copy / "dataset.json"
    settings = json.loads(path.read_text())
    del settings["marks"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(settings).encode())  # as some editors save it
    (copy / "images" / "00000.png").unlink()
    assert len(again()) == 5
    with Image.open(copy / "images" / "00000.png") as image:
        assert not image.info


# -- before work is lost -----------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused_at_once(sd1_pipe, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "draw", None)  # nothing may be drawn
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="name a folder"):
        datasets.generate(sd1_pipe, PROMPTS, tmp_path / "file", **OPTIONS)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="read-only"):
        datasets.generate(sd1_pipe, PROMPTS, tmp_path / "new" / "set", **OPTIONS)
    assert len(datasets.generate(sd1_pipe, PROMPTS, whole.folder, labeller=bright, **OPTIONS)) == 5  # all is there


def dark(image, record, prompt):
    return np.full(image.shape[:2], CAR, np.uint8)


dark.store = None


def test_another_labeller_does_not_go_on(copy, again):
    (copy / "labels" / "00001.png").unlink()
    with pytest.raises(ValueError, match="small_sets.bright, got the labeller test_damage.dark"):
        again(labeller=dark)
    shutil.rmtree(copy / "labels")
    made = again(labeller=dark)
    assert made.settings["labels"] == ["test_damage.dark"] and all((made.labels(i) == CAR).all() for i in range(5))


def test_an_unlabelled_file_is_named(copy):
    assert files.read_png(copy / "labels" / "00001.png").shape == (16, 24)
    with pytest.raises(FileNotFoundError):
        files.read_png(copy / "labels" / "00099.png")
