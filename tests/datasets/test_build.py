"""Datasets: the same bytes however the work is done, nothing lost or doubled, labels from wherever they come."""

import functools
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

import daamlib
from daamlib import AttentionRecord, datasets
from daamlib.cityscapes import BY_NAME
from daamlib.datasets import build as build_module
from daamlib.datasets import folder as _dataset_folder
from daamlib.pipeline import BUNDLED
from daamlib.urban import captions, objects, scenes
from daamlib.urban.scenes import HELD_OUT

PROMPTS = ["a car", "a tree", "a car and a tree", "a tree and a car", "a tree, a car"]
OPTIONS = {"steps": 2, "size": (16, 24), "keep_steps": 1, "seed": 3}
CAR, PERSON, TREE = (BY_NAME[name].id for name in ("car", "person", "vegetation"))


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")
        yield


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(dataset):
    return [np.asarray(dataset.image(i)).tobytes() for i in dataset.manifest.index]


def bright(images):
    """Label maps for tests: car where the red is bright, trees elsewhere."""
    return np.where(images[..., 0] > 128, np.uint8(CAR), np.uint8(TREE))


@pytest.fixture(scope="module")
def whole(sd1_pipe, tmp_path_factory):
    """An uninterrupted run; read-only."""
    return datasets.generate(sd1_pipe, PROMPTS, tmp_path_factory.mktemp("whole") / "set", labels=bright, **OPTIONS)


@pytest.fixture
def generated(sd1_pipe, tmp_path):
    """A dataset without labels or records, of this test alone."""
    return datasets.generate(sd1_pipe, PROMPTS[:3], tmp_path / "set", steps=1, size=(16, 24))


# -- prompts -----------------------------------------------------------------------------------------------------


def test_every_class_is_in_half_of_the_prompts():
    prompts = datasets.urban_prompts(200)
    assert len(prompts) == 200
    for name in datasets.CLASSES:
        assert sum(name in prompt for prompt in prompts) == 100
    for n in range(1, 12):
        few = datasets.urban_prompts(n)
        assert few == prompts[:n]
        assert all(abs(2 * sum(name in prompt for prompt in few) - n) <= 1 for name in datasets.CLASSES)


def test_the_order_of_the_variations_is_drawn_from_the_seed():
    assert datasets.urban_prompts(40) == datasets.urban_prompts(40, seed=0) != datasets.urban_prompts(40, seed=1)
    with_car = datasets.urban_prompts(4 * 135)[::4]  # 9 cars, 3 places, 5 times
    assert len(set(with_car)) == 135
    assert set(datasets.urban_prompts(4 * 15)[1::4]) == set(datasets.urban_prompts(4 * 30, seed=5)[61::4])
    with pytest.raises(ValueError, match="one prompt or more, got n=0"):
        datasets.urban_prompts(0)


def test_the_prompts_are_in_the_language_that_the_bundled_model_learnt():
    prompts = datasets.urban_prompts(4 * 135)
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    for word in set(" ".join(prompts).split()):
        assert len(tokenizer.tokenize(word)) == 1, word
    lists = json.loads(build_module.PROMPTS.read_text())["slots"]
    assert {time.strip() for time in lists["time"]} == {"", *captions.TIMES.values()}
    assert {place.split(" ", 1)[1] for place in lists["place"]} < set(captions.PLACES)
    assert {car.split()[1] for car in lists["car"]} == {*objects.COLOURS, "car"}
    assert not {"cyclist", "pedestrian", "vehicle", "stop"} & set(" ".join(prompts).split())


def test_without_the_file_of_prompts(monkeypatch, tmp_path):
    monkeypatch.setattr(build_module, "PROMPTS", tmp_path / "urban.json")
    with pytest.raises(FileNotFoundError, match="install daamlib anew"):
        datasets.urban_prompts(4)


# -- the same bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_do_not_change_a_byte(whole, sd1_pipe, tmp_path, batch_size):
    sizes = []

    def labels(images):
        sizes.append(len(images))
        return bright(images)

    labels.__module__, labels.__qualname__ = bright.__module__, bright.__qualname__
    datasets.generate(sd1_pipe, PROMPTS, tmp_path / "set", labels=labels, batch_size=batch_size, **OPTIONS)
    assert contents(tmp_path / "set") == contents(whole.folder)
    assert sizes == {2: [2, 2, 1], 3: [3, 2]}[batch_size]


def test_shards_fill_one_folder(whole, sd1_pipe, tmp_path):
    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS, tmp_path / "set", labels=bright, **OPTIONS)
    other = make(shard=(1, 2))
    assert list(other.manifest.index) == list(other.manifest["index"]) == [1, 3]
    assert len(other) == 2
    assert pixels(other) == [pixels(whole)[i] for i in (1, 3)]
    with pytest.raises(IndexError, match="no image 0"):
        other.image(0)
    with pytest.raises(FileNotFoundError, match=r"lacks 7 files \(images/00000.png, images/00002.png"):
        datasets.load(tmp_path / "set")
    make(shard=(0, 2))
    assert contents(tmp_path / "set") == contents(whole.folder)


def test_the_image_is_that_of_a_plain_call(whole, sd1_pipe):
    for i in (0, 3):
        generator = torch.Generator().manual_seed(int(whole.manifest.seed[i]))
        image = sd1_pipe(
            PROMPTS[i], num_inference_steps=2, guidance_scale=5.0, height=16, width=24, generator=generator
        ).images[0]
        assert np.array_equal(whole.image(i), image)


def test_two_seeds_share_no_image(whole, sd1_pipe, tmp_path):
    same = ["a car"] * 3
    one = datasets.generate(sd1_pipe, same, tmp_path / "0", steps=1, size=16)
    other = datasets.generate(sd1_pipe, same, tmp_path / "1", steps=1, size=16, seed=1)
    assert len({*pixels(one), *pixels(other)}) == 6
    seeds = [_dataset_folder.image_seed({"kind": "generated", "seed": s}, i) for s in range(9) for i in range(99)]
    assert len(set(seeds)) == 9 * 99
    assert max(seeds) < 2**32
    assert [int(seed) for seed in whole.manifest.seed] == [seeds[3 * 99 + i] for i in range(5)]


def test_the_pipeline_is_left_as_it_was(fresh, tmp_path):
    pipe = fresh("sd1")
    before, state = datasets.weight_hash(pipe), torch.random.get_rng_state()
    attributes, config = set(vars(pipe)), dict(pipe.scheduler.config)
    datasets.generate(pipe, PROMPTS[:2], tmp_path / "set", steps=2, size=16, keep_steps=1)
    assert datasets.weight_hash(pipe) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert dict(pipe.scheduler.config) == config
    assert "encode_prompt" not in set(vars(pipe)) - attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_bars_are_silent_under_ci(sd1_pipe, tmp_path, monkeypatch, capsys):
    for name in ("set", "other"):
        datasets.generate(sd1_pipe, ["a car"], tmp_path / name, steps=1, size=16, labels=bright)
        shown = capsys.readouterr().err
        assert ("images: 100%" in shown, "labels: 100%" in shown) == (name == "other",) * 2
        monkeypatch.delenv("CI", raising=False)


def test_no_record_of_a_finished_image_stays_in_memory(sd1_pipe, tmp_path, monkeypatch):
    alive, save = [], AttentionRecord.save

    def watched(self, path):
        gc.collect()
        assert not any(reference() for reference in alive)
        alive.append(weakref.ref(self))
        save(self, path)

    monkeypatch.setattr(AttentionRecord, "save", watched)
    datasets.generate(sd1_pipe, PROMPTS[:3], tmp_path / "set", steps=1, size=16, keep_steps=1)
    assert len(alive) == 3


# -- interrupted -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/datasets"]
import torch
from PIL import Image
torch.set_num_threads(int(sys.argv[3]))
from conftest import build
from test_build import OPTIONS, PROMPTS, bright
from daamlib import datasets

save = Image.Image.save

def killed(self, path, **options):
    save(self, path, **options)
    if "00002.png" in str(path):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

Image.Image.save = killed
datasets.generate(build("sd1", sys.argv[4]), PROMPTS, sys.argv[2], labels=bright, **OPTIONS)
"""


def test_killed_while_it_writes_an_image(whole, sd1_pipe, tmp_path, pytestconfig):
    if pytestconfig.getoption("--device").startswith("pretended"):
        pytest.skip("only this process pretends to have the device")
    folder = tmp_path / "set"
    arguments = [str(Path(__file__).parents[1]), str(folder), str(torch.get_num_threads()), sd1_pipe.device.type]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = contents(folder)
    assert [name for name in left if name.endswith(".part")]
    assert {name for name in left if name.startswith("images/0")} == {"images/00000.png", "images/00001.png"}
    before = {name: (folder / name).stat().st_mtime_ns for name in left if name.startswith("images/0")}
    with pytest.raises(FileNotFoundError, match="call generate again as before"):
        datasets.load(folder)
    datasets.generate(sd1_pipe, PROMPTS, folder, labels=bright, **OPTIONS)
    assert contents(folder) == contents(whole.folder)
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before  # not made anew


class Crash(BaseException):
    """Not caught by anything, as a SIGKILL."""


@pytest.mark.parametrize("renamed", [False, True])
def test_stopped_at_every_file(sd1_pipe, tmp_path, monkeypatch, renamed):
    """A process that dies at its n-th renaming, before or after it, and cleans nothing up: for every n."""
    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS[:2], labels=bright, steps=1, size=16, keep_steps=1)
    expected, replace = contents(make(folder=tmp_path / "whole").folder), Path.replace
    for stop in range(8):  # record, image and label map of each, the labels' source and the manifest
        folder, done = tmp_path / f"set {stop}", []

        def dying(self, target, stop=stop, done=done):
            if renamed or len(done) < stop:
                replace(self, target)
            if len(done) == stop:
                raise Crash
            done.append(target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
            patch.setattr(os, "getpid", lambda: 1)
            with pytest.raises(Crash):
                make(folder=folder)
        assert (folder / ".dataset.json.1.part").exists()
        os.utime(folder / ".dataset.json.1.part", (0, 0))  # an hour later
        for path in folder.glob(".manifest*"):
            os.utime(path, (0, 0))
        make(folder=folder)
        assert contents(folder) == expected
    make(folder=folder)
    assert contents(folder) == expected


def test_stale_temporary_files_of_the_folder_go_too(generated, sd1_pipe):
    old, new, other = (generated.folder / f".{name}.1.part" for name in ("manifest.csv", "dataset.json", "00007.png"))
    for path in (old, new, other):
        path.write_text("half")
    os.utime(old, (0, 0))
    datasets.generate(sd1_pipe, PROMPTS[:3], generated.folder, steps=1, size=(16, 24))
    assert {path.name for path in generated.folder.glob(".*")} == {new.name, other.name}  # of processes at work


def test_a_lost_file_is_made_again(whole, sd1_pipe, tmp_path):
    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS, tmp_path / "set", labels=bright, **OPTIONS)
    make()
    for name in ("records/00001.safetensors", "images/00003.png", "labels/00000.png", "manifest.csv"):
        (tmp_path / "set" / name).unlink()
    make()
    assert contents(tmp_path / "set") == contents(whole.folder)


# -- settings ----------------------------------------------------------------------------------------------------

OTHERS = {
    "seed": ({"seed": 1}, "seed: 0 there, 1 here"),
    "steps": ({"steps": 2}, "steps: 1 there, 2 here"),
    "guidance": ({"guidance": 3}, "guidance: 5.0 there, 3.0 here"),
    "size": ({"size": 16}, r"size: \[16, 24\] there, \[16, 16\] here"),
    "records": ({"keep_steps": 1}, "keep_steps: 0 there, 1 here"),
    "a prompt": ({"prompts": ["a car", "a bus", PROMPTS[2]]}, r"\(prompt 1: 'a tree' there, 'a bus' here\)"),
    "more prompts": (
        {"prompts": PROMPTS[:4]},
        "images: 3 there, 4 here; prompt 3: None there, 'a tree and a car' here",
    ),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_other_settings_are_refused(generated, sd1_pipe, change, message):
    before = contents(generated.folder)
    arguments = {"prompts": PROMPTS[:3], "steps": 1, "size": (16, 24), **change}
    with pytest.raises(ValueError, match=f"was made with other settings .*{message}.*: use those, or name another"):
        datasets.generate(sd1_pipe, folder=generated.folder, **arguments)
    assert contents(generated.folder) == before


def test_another_model_or_scheduler_is_refused(generated, fresh):
    pipe = fresh("sd1")
    arguments = (PROMPTS[:3], generated.folder)
    with torch.no_grad():
        next(pipe.text_encoder.parameters())[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"settings \(weights: '[0-9a-f]{16}' there, '[0-9a-f]{16}' here\)"):
        datasets.generate(pipe, *arguments, steps=1, size=(16, 24))
    pipe = fresh("sd1")
    pipe.scheduler.register_to_config(steps_offset=0)
    with pytest.raises(ValueError, match=r"settings \(scheduler_config: '[0-9a-f]{16}' there, "):
        datasets.generate(pipe, *arguments, steps=1, size=(16, 24))
    with pytest.raises(ValueError, match="weights: .*; dtype: 'torch.float32' there, 'torch.bfloat16' here"):
        datasets.generate(fresh("sd1").to(torch.bfloat16), *arguments, steps=1, size=(16, 24))


def test_the_machine_matters_while_there_is_something_to_draw(generated, sd1_pipe, monkeypatch):
    if sd1_pipe.device.type != "cpu":
        pytest.skip("the number of threads changes no image that a GPU makes")
    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS[:3], generated.folder, steps=1, size=(16, 24))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    before = contents(generated.folder)
    make()
    assert contents(generated.folder) == before
    (generated.folder / "images" / "00001.png").unlink()
    with pytest.raises(ValueError, match=rf"\(threads: {threads} there, {threads + 1} here\)"):
        make()
    assert "images/00001.png" not in contents(generated.folder)


def test_settings_of_a_faster_process_count(sd1_pipe, tmp_path, monkeypatch):
    """Two processes begin at once with different settings: one of them is refused."""
    link, folder = os.link, tmp_path / "set"

    def late(source, target):
        monkeypatch.setattr(os, "link", link)
        datasets.generate(sd1_pipe, PROMPTS[:1], folder, steps=1, size=16)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(ValueError, match="steps: 1 there, 2 here"):
        datasets.generate(sd1_pipe, PROMPTS[:1], folder, steps=2, size=16)
    assert len(datasets.load(folder)) == 1


def test_a_file_system_without_links(sd1_pipe, tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    datasets.generate(sd1_pipe, PROMPTS[:1], tmp_path / "set", steps=1, size=16)
    assert len(datasets.load(tmp_path / "set")) == 1


def test_a_folder_of_other_images_is_refused(sd1_pipe, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00000.png").write_text("mine")
    with pytest.raises(ValueError, match="it is no dataset to go on with"):
        datasets.generate(sd1_pipe, PROMPTS[:1], tmp_path, steps=1, size=16)
    assert contents(tmp_path) == {"images/00000.png": b"mine"}


BAD = {
    "a string": ({"prompts": "a car"}, TypeError, "must be a list of strings"),
    "no prompts": ({"prompts": []}, ValueError, "no prompts"),
    "a shard": ({"shard": (2, 2)}, ValueError, r"\(k, n\) with 0 <= k < n, got \(2, 2\)"),
    "no batch": ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
    "records": ({"keep_steps": 3}, ValueError, "keep_steps must be 0 ... 2, the number of steps, got 3"),
    "a seed": ({"seed": -1}, ValueError, "a seed is 0 or more, got -1"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_arguments_that_do_not_fit(sd1_pipe, tmp_path, change, error, message):
    arguments = {"prompts": ["a car"], "steps": 2, "size": 16, **change}
    with pytest.raises(error, match=message):
        datasets.generate(sd1_pipe, folder=tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


# -- what is in the folder ---------------------------------------------------------------------------------------


def test_manifest_and_settings(whole, sd1_pipe):
    back = datasets.load(str(whole.folder))
    pd.testing.assert_frame_equal(back.manifest, whole.manifest, check_index_type=False)
    columns = "index file prompt seed model weights scheduler steps guidance torch diffusers transformers daamlib"
    assert list(back.manifest) == columns.split()
    row = back.manifest.loc[3]
    assert (row["index"], row.file, row.prompt) == (3, "images/00003.png", PROMPTS[3])
    assert (row.model, row.weights) == ("StableDiffusionPipeline", datasets.weight_hash(sd1_pipe))
    assert (row.scheduler, row.steps, row.guidance, row.daamlib) == ("DDIMScheduler", 2, 5.0, daamlib.__version__)
    pd.testing.assert_frame_equal(pd.read_csv(whole.folder / "manifest.csv"), back.manifest, check_dtype=False)
    settings = back.settings
    assert (settings["kind"], settings["images"], settings["prompts"]) == ("generated", 5, PROMPTS)
    assert settings["labels"] == ["test_build.bright"]
    with Image.open(whole.folder / "labels" / "00000.png") as image:
        assert (image.mode, image.size) == ("L", (24, 16))


def test_a_pipeline_of_a_folder_is_named_without_its_path(fresh, tmp_path):
    pipe = fresh("sd1")
    pipe.register_to_config(_name_or_path=str(tmp_path))
    dataset = datasets.generate(pipe, ["a car"], tmp_path / "set", steps=1, size=16)
    assert dataset.manifest.model[0] == tmp_path.name
    assert str(tmp_path) not in (tmp_path / "set" / "dataset.json").read_text()


def test_prompts_that_a_csv_could_break(sd1_pipe, tmp_path):
    prompts = ['a "car", red', "a\ncar", "", "NA", "señal"]
    datasets.generate(sd1_pipe, prompts, tmp_path / "set", steps=1, size=16)
    assert list(datasets.load(tmp_path / "set").manifest.prompt) == prompts


def test_images_masks_and_classes(whole):
    assert len(whole) == 5
    for i in range(5):
        image, ids = whole.image(i), whole.labels(i)
        assert (image.mode, image.size) == ("RGB", (24, 16))
        assert (ids.shape, ids.dtype) == ((16, 24), np.uint8)
        assert np.array_equal(ids, bright(np.asarray(image)))
        assert np.array_equal(whole.mask(i, "car"), ids == CAR)
        assert whole.mask(i, "car").dtype == bool
    amounts = [float(whole.mask(i, "car").mean()) for i in range(5)]
    assert whole.with_class("car", min(amounts)) == [0, 2, 3, 4]  # prompt 1 names none
    assert whole.with_class("car", min(amounts), in_prompt=False) == [0, 1, 2, 3, 4]
    expected = [i for i in (0, 2, 3, 4) if amounts[i] >= max(amounts)]
    assert whole.with_class("car", max(amounts)) == expected
    assert whole.with_class("car") == [i for i in (0, 2, 3, 4) if amounts[i] >= datasets.MIN_AREA]
    for pixels in (0, 328):
        with pytest.raises(ValueError, match=f"min_area is a share of the image, .* got {pixels}"):
            whole.with_class("car", pixels)
    for call in (functools.partial(whole.mask, 0), whole.with_class):
        with pytest.raises(ValueError, match="'cat' is no Cityscapes label"):
            call("cat")
    for i in (5, -1):
        with pytest.raises(IndexError, match=f"no image {i}"):
            whole.labels(i)


def test_a_name_inside_a_word_is_not_in_the_prompt(sd1_pipe, tmp_path):
    prompts = ["a scar", "a car", "a carpet", "the car's tree"]
    dataset = datasets.generate(sd1_pipe, prompts, tmp_path / "set", steps=1, size=16)
    datasets.add_labels(dataset, lambda images: np.full(images.shape[:3], CAR, np.uint8))
    assert dataset.with_class("car") == [1, 3]


def test_records_come_back(fresh, tmp_path):
    pipe = fresh("sd1")
    dataset = datasets.generate(pipe, PROMPTS[:2], tmp_path / "set", steps=4, size=(16, 24), keep_steps=2)
    generator = torch.Generator().manual_seed(int(dataset.manifest.seed[1]))
    with daamlib.trace(pipe) as trace:
        pipe(PROMPTS[1], num_inference_steps=4, guidance_scale=5.0, height=16, width=24, generator=generator)
    expected, record = trace[0].select(steps=[1, 3]), dataset.record(1, pipe)
    assert record.prompt == PROMPTS[1]
    assert record.timesteps == expected.timesteps
    for layer, other in zip(record.layers, expected.layers, strict=True):
        assert layer.queries.dtype == torch.float16
        assert torch.equal(layer.queries, other.queries.half())
        assert torch.equal(layer.key_weight, other.key_weight)
    maps = record.daam("a tree")["tree"]
    assert torch.allclose(maps, expected.daam("a tree")["tree"], rtol=1e-2)
    without = dataset.record(1)  # no pipeline is needed for the prompt
    assert (without.device.type, record.device) == ("cpu", pipe.device)
    assert torch.equal(without.to(pipe.device).daam()["tree"], record.daam()["tree"])


def test_queries_beyond_half_precision(fresh, tmp_path):
    pipe = fresh("sd1")
    with torch.no_grad():
        pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q.weight.mul_(1e6)
    with pytest.raises(ValueError, match="queries of down_blocks.0.* are beyond float16"):
        datasets.generate(pipe, ["a car"], tmp_path / "set", steps=1, size=16, keep_steps=1)


def test_without_records_and_labels(generated):
    with pytest.raises(ValueError, match="no record was kept of image 0 .*keep_steps > 0"):
        generated.record(0)
    with pytest.raises(ValueError, match="image 0 of .* has no label map"):
        generated.labels(0)
    with pytest.raises(ValueError, match="has no label maps: make them with add_labels or import_masks"):
        generated.with_class("car")


def test_loading_what_is_not_whole(generated, tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset in .*nowhere: it has no dataset.json"):
        datasets.load(tmp_path / "nowhere")
    folder, manifest = generated.folder, (generated.folder / "manifest.csv").read_text()
    (folder / "manifest.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 files \(manifest.csv\): call generate again as before"):
        datasets.load(folder)
    for text in (manifest.replace("a tree", "a bus"), manifest.split("\n", 1)[0], manifest.replace("prompt", "text")):
        (folder / "manifest.csv").write_text(text)
        with pytest.raises(ValueError, match="is not the one that follows from dataset.json"):
            datasets.load(folder)
    (folder / "manifest.csv").write_text(manifest)
    assert len(datasets.load(folder)) == 3
    (folder / "images" / "00001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 files \(images/00001.png\)"):
        datasets.load(folder)
    for text in ("{", "[]", "{}"):
        (folder / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match="dataset.json is damaged, or of something else"):
            datasets.load(folder)
    (folder / "dataset.json").write_text('{"format": "daamlib-dataset-9"}')
    with pytest.raises(ValueError, match="has the format 'daamlib-dataset-9', this version reads"):
        datasets.load(folder)


# -- rendered ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return datasets.render(tmp_path_factory.mktemp("rendered") / "set", 12)


def test_rendered_scenes_are_exact(rendered):
    for i in (0, 7, 11):
        scene = scenes.render(HELD_OUT + i)
        assert np.array_equal(rendered.image(i), scene.image)
        assert np.array_equal(rendered.labels(i), scene.labels)
        assert rendered.manifest.seed[i] == HELD_OUT + i
    assert (rendered.settings["kind"], rendered.settings["labels"]) == ("rendered", ["exact"])
    for name in datasets.CLASSES:
        kinds = [i for i in range(12) if name in [thing.kind for thing in scenes.render(HELD_OUT + i).things]]
        assert kinds
        assert rendered.with_class(name) == kinds


def test_the_prompt_of_a_scene_names_what_is_there(rendered):
    for i, prompt in enumerate(rendered.manifest.prompt):
        kinds = {thing.kind for thing in scenes.render(HELD_OUT + i).things}
        assert {name for name in datasets.CLASSES if f"a {name}" in prompt} == kinds
        assert prompt.endswith("an urban environment")
    ids = np.zeros((128, 128), np.uint8)
    assert build_module._sentence(ids) == "an urban environment"
    ids[:100, :3], ids[100:, :100] = BY_NAME["car"].id, BY_NAME["traffic light"].id
    assert build_module._sentence(ids) == "a traffic light in an urban environment"  # 300 pixels of the car are too few
    ids[:100, :4] = BY_NAME["car"].id
    assert build_module._sentence(ids) == "a car and a traffic light in an urban environment"
    ids[:100, 50:] = BY_NAME["rider"].id
    assert build_module._sentence(ids) == "a car, a traffic light and a rider in an urban environment"


def test_rendering_goes_on_and_refuses_other_settings(rendered, tmp_path):
    folder = tmp_path / "set"
    datasets.render(folder, 12)
    for name in ("labels/00002.png", "images/00005.png", "manifest.csv"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match="labels/00002.png.*call render again"):
        datasets.load(folder)
    datasets.render(folder, 12)
    assert contents(folder) == contents(rendered.folder)
    with pytest.raises(ValueError, match="images: 12 there, 4 here; seed: 10000000 there, 5 here"):
        datasets.render(folder, 4, first_seed=5)
    with pytest.raises(ValueError, match="one scene or more, got n=0"):
        datasets.render(tmp_path / "other", 0)
    with pytest.raises(ValueError, match="a side of 16 px or more, got size=8"):
        datasets.render(tmp_path / "other", 1, size=8)
    assert not (tmp_path / "other").exists()


def test_scenes_of_another_size_show_the_same_things(rendered, tmp_path):
    larger = datasets.render(tmp_path / "set", 12, size=192)
    assert larger.image(0).size == (192, 192) and larger.labels(0).shape == (192, 192)
    assert list(larger.manifest.prompt) == list(rendered.manifest.prompt)
    for name in datasets.CLASSES:  # a share of the image, whatever its size
        assert larger.with_class(name) == rendered.with_class(name)
    with pytest.raises(ValueError, match=r"size: \[192, 192\] there, \[128, 128\] here"):
        datasets.render(tmp_path / "set", 12)


def test_the_smallest_object_is_a_share_of_the_image(tmp_path):
    dataset = datasets.render(tmp_path / "set", 1, size=128)
    for pixels, found in ((327, []), (328, [0])):  # of the 16384 of the bundled model's images
        ids = np.zeros(128 * 128, np.uint8)
        ids[:pixels] = CAR
        _dataset_folder.write_png(dataset.folder / "labels/00000.png", ids.reshape(128, 128))
        assert dataset.with_class("car") == found


# -- labels ------------------------------------------------------------------------------------------------------


def test_labels_are_added_where_there_are_none(generated):
    first = np.full((16, 24), PERSON, np.uint8)
    _dataset_folder.write_png(generated.folder / "labels" / "00001.png", first)
    shapes = []

    class Labeller:
        def __call__(self, images, value):
            shapes.append(images.shape)
            return np.full(images.shape[:3], value, np.uint8)

    assert datasets.add_labels(generated, functools.partial(Labeller(), value=CAR), batch_size=1) is generated
    assert shapes == [(1, 16, 24, 3)] * 2
    assert [int(generated.labels(i)[0, 0]) for i in range(3)] == [CAR, PERSON, CAR]
    name = "test_labels_are_added_where_there_are_none.<locals>.Labeller"
    assert generated.settings["labels"] == [f"test_build.{name}"]
    datasets.add_labels(generated, bright)
    assert len(shapes) == 2
    assert generated.settings["labels"] == [f"test_build.{name}"]
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        datasets.add_labels(generated, bright, batch_size=-1)


WRONG_LABELS = {
    "one map": (lambda images: np.zeros((16, 24), np.uint8), r"got \(16, 24\) uint8"),
    "integers": (lambda images: np.zeros(images.shape[:3], int), r"got \(3, 16, 24\) int64"),
    "a tensor": (lambda images: torch.zeros(3, 16, 24, dtype=torch.uint8), "got Tensor"),
    "train ids": (lambda images: np.full(images.shape[:3], 255, np.uint8), r"values \[255\], which are no Cityscapes"),
}


@pytest.mark.parametrize(("labels", "message"), WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_wrong_labels(generated, labels, message):
    with pytest.raises(ValueError, match=message):
        datasets.add_labels(generated, labels)
    assert not (generated.folder / "labels").exists()
    assert generated.settings["labels"] == []


def folder_of(path, **images):
    path.mkdir()
    for name, image in images.items():
        image.save(path / f"{name}.png")
    return path


def test_a_folder_of_masks(generated, tmp_path):
    ids = np.full((8, 12), TREE, np.uint8)
    ids[:2, 3:] = CAR
    palette = Image.fromarray(np.full((16, 24), PERSON, np.uint8))
    palette.putpalette([0, 0, 0] * 256)
    assert palette.mode == "P"
    source = folder_of(tmp_path / "drawn", **{"00000": Image.fromarray(ids), "00002": palette})
    (source / ".DS_Store").write_text("")
    datasets.add_labels(generated, bright)
    kept = generated.labels(1)
    assert datasets.import_masks(generated, source) is generated
    assert np.array_equal(generated.labels(0), ids.repeat(2, 0).repeat(2, 1))  # nearest
    assert (generated.labels(2) == PERSON).all()
    assert np.array_equal(generated.labels(1), kept)
    assert generated.settings["labels"] == ["test_build.bright", "masks of drawn"]
    Image.fromarray(ids).save(source / "00001.png")
    datasets.import_masks(generated, str(source))
    assert generated.settings["labels"] == ["masks of drawn"]
    assert len(datasets.load(generated.folder)) == 3


WRONG_MASKS = {
    "an unknown image": ({"00007": Image.new("L", (24, 16))}, "'00007.png' is not an image of this dataset"),
    "colours": ({"00001": Image.new("RGB", (24, 16))}, "00001.png is a PNG of mode RGB: expected the Cityscapes id"),
    "16 bits": ({"00001": Image.new("I;16", (24, 16))}, "mode I;16"),
    "other ids": ({"00001": Image.new("L", (24, 16), 99)}, r"00001.png has the values \[99\]"),
    "nothing": ({}, "there are no masks in"),
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
    with pytest.raises(FileNotFoundError, match="no masks at .*nowhere: expected a folder of PNG files or a COCO"):
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
    with pytest.raises(ValueError, match="image 1 of .* has no label map"):  # nobody annotated it
        large.labels(1)
    assert large.settings["labels"] == ["masks of masks.json"]


def test_coco_run_lengths(large, tmp_path):
    """The compressed ones were made with pycocotools 2.0.11."""
    two_boxes = "01V37VM00000Q73lH00000000000d1"
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
    expected = np.zeros((20, 30), bool)
    expected[3:11, 5:9] = expected[8:19, 20:27] = expected[0, 0] = True
    assert np.array_equal(large.mask(0, "car"), expected)
    expected[:] = False
    expected[:3, 1] = True
    assert np.array_equal(large.mask(1, "person"), expected)


def test_compressed_run_lengths_with_negative_steps(generated, tmp_path):
    noise = ["0111000", "0000101", "0100111", "1000100", "0001100", "1100101"]
    noise = np.array([[digit == "1" for digit in row] for row in noise])
    images = [{"id": 10, "file_name": "00000.png", "height": 6, "width": 7}]
    content = coco((0, 1, {"size": [6, 7], "counts": "31110O113ON0O40L21NO"}), images=images)
    Image.new("RGB", (7, 6)).save(generated.folder / generated.manifest.file[0])
    drawn(generated, tmp_path, content)
    assert np.array_equal(generated.mask(0, "car"), noise)


def test_coco_masks_of_another_size(generated, tmp_path):
    drawn(generated, tmp_path, coco((2, 2, [box(0, 0, 15, 20)])))
    assert np.array_equal(generated.mask(2, "person"), np.arange(24) < np.full((16, 1), 12))


TRIANGLE = [box(0, 0, 4, 4)]
WRONG_COCO = {
    "a category": (coco((0, 1, TRIANGLE), categories=[{"id": 1, "name": "cat"}]), r"categories \['cat'\] are no"),
    "an image": (
        coco((0, 1, TRIANGLE), images=[{"id": 10, "file_name": "dog.png", "height": 20, "width": 30}]),
        "'dog.png' is not an image of this dataset",
    ),
    "an image's number": (coco((0, 1, TRIANGLE), (7, 1, TRIANGLE)), r"not a COCO file of masks: KeyError\(17\)"),
    "a category's number": (coco((0, 3, TRIANGLE)), r"not a COCO file of masks: KeyError\(3\)"),
    "a box": (coco((0, 1, TRIANGLE), (1, 1, [])), "annotation 1 has no mask: a box alone is none"),
    "two points": (coco((0, 1, [[0, 0, 4, 4]])), "polygon of 4 numbers"),
    "another size": (coco((0, 1, {"size": [30, 20], "counts": [600]})), r"size \[30, 20\] .* the image is 20 x 30"),
    "too few": (coco((0, 1, {"size": [20, 30], "counts": [5, 5]})), "cover 10 pixels"),
    "negative": (coco((0, 1, {"size": [20, 30], "counts": [-5, 605]})), "run lengths"),
    "no annotations": (coco(), "it has no annotations"),
    "another file": ({"images": []}, r"masks.json is not a COCO file of masks: KeyError\('categories'\)"),
    "a list": ([1], "masks.json is not a COCO file of masks"),
}


@pytest.mark.parametrize(("content", "message"), WRONG_COCO.values(), ids=WRONG_COCO)
def test_wrong_coco_files(generated, tmp_path, content, message):
    before = contents(generated.folder)
    with pytest.raises(ValueError, match=message):
        drawn(generated, tmp_path, content)
    assert contents(generated.folder) == before


def test_a_file_that_is_no_json(generated, tmp_path):
    (tmp_path / "masks.json").write_text("{")
    with pytest.raises(ValueError, match="masks.json: Expecting"):
        datasets.import_masks(generated, tmp_path / "masks.json")
