"""Datasets: the same bytes however the work is done, nothing lost or doubled, labels from wherever they come."""

import functools
import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_sets import CAR, OPTIONS, PERSON, PROMPTS, TREE, bright, contents

import daamlib
from daamlib import AttentionRecord, datasets
from daamlib.datasets import folder as files


def pixels(dataset):
    return [np.asarray(dataset.image(i)).tobytes() for i in dataset.manifest.index]


# -- the same bytes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batched(sd1_pipe, tmp_path_factory):
    """The same prompts in batches of 2; read-only."""
    folder = tmp_path_factory.mktemp("batched") / "set"
    return datasets.generate(sd1_pipe, PROMPTS, folder, labeller=bright, batch_size=2, **OPTIONS)


def test_batches_are_denoised_at_once(whole, batched, fresh, tmp_path):
    pipe, sizes = fresh("sd1"), []
    pipe.unet.register_forward_pre_hook(lambda unet, args: sizes.append(len(args[0])))
    datasets.generate(pipe, PROMPTS, tmp_path / "set", batch_size=2, **{**OPTIONS, "steps": 1})
    assert sizes == [4, 4, 2]  # guidance doubles them
    assert batched.settings["batch_size"] == 2
    for i in range(5):
        difference = np.abs(np.asarray(batched.image(i), int) - np.asarray(whole.image(i), int))
        assert difference.max() <= 2  # rounding alone: it is the same noise and the same prompt
        assert batched.record(i).prompt == PROMPTS[i]


def test_a_batch_does_not_depend_on_what_was_there(batched, sd1_pipe, tmp_path):
    make = functools.partial(
        datasets.generate, sd1_pipe, PROMPTS, tmp_path / "set", labeller=bright, batch_size=2, **OPTIONS
    )
    assert list(make(shard=(1, 2)).manifest.index) == [2, 3]
    make(shard=(0, 2))
    assert contents(tmp_path / "set") == contents(batched.folder)
    for name in ("images/00001.png", "records/00002.safetensors", "manifest.csv"):
        (tmp_path / "set" / name).unlink()
    with pytest.raises(ValueError, match="batch_size"):
        datasets.generate(sd1_pipe, PROMPTS, tmp_path / "set", labeller=bright, **OPTIONS)
    make()
    assert contents(tmp_path / "set") == contents(batched.folder)


def test_a_finished_dataset_opens_with_any_batch_size(batched, sd1_pipe):
    before = contents(batched.folder)
    assert len(datasets.generate(sd1_pipe, PROMPTS, batched.folder, **OPTIONS)) == 5
    assert contents(batched.folder) == before


def test_the_settings_are_not_read_for_every_image(sd1_pipe, tmp_path, monkeypatch):
    reads, read = [], files.read_settings
    monkeypatch.setattr(files, "read_settings", lambda folder: reads.append(folder) or read(folder))
    counts = []
    for n in (1, 5):
        datasets.generate(sd1_pipe, PROMPTS[:n], tmp_path / str(n), labeller=bright, steps=1, size=16)
        counts.append(len(reads))
        reads.clear()
    assert counts[0] == counts[1] <= 3


def test_shards_fill_one_folder(whole, sd1_pipe, tmp_path):
    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS, tmp_path / "set", labeller=bright, **OPTIONS)
    other = make(shard=(1, 2))
    assert list(other.manifest.index) == list(other.manifest["index"]) == [1, 3]
    assert len(other) == 2
    assert pixels(other) == [pixels(whole)[i] for i in (1, 3)]
    with pytest.raises(IndexError, match="no image 0"):
        other.image(0)
    with pytest.raises(FileNotFoundError, match=r"lacks"):
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
    seeds = [files.image_seed({"kind": "generated", "seed": s}, i) for s in range(9) for i in range(99)]
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
        datasets.generate(sd1_pipe, ["a car"], tmp_path / name, steps=1, size=16, labeller=bright)
        shown = capsys.readouterr().err
        assert ("images: 100%" in shown) == (name == "other")
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
from tiny import build
from small_sets import OPTIONS, PROMPTS, bright
from daamlib import datasets

save = Image.Image.save

def killed(self, path, **options):
    save(self, path, **options)
    if "00002.png" in str(path):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

Image.Image.save = killed
datasets.generate(build("sd1", sys.argv[4]), PROMPTS, sys.argv[2], labeller=bright, **OPTIONS)
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
    with pytest.raises(FileNotFoundError, match="lacks"):
        datasets.load(folder)
    datasets.generate(sd1_pipe, PROMPTS, folder, labeller=bright, **OPTIONS)
    assert contents(folder) == contents(whole.folder)
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before  # not made anew


class Crash(BaseException):
    """Not caught by anything, as a SIGKILL."""


@pytest.mark.parametrize("renamed", [False, True])
def test_stopped_at_every_file(sd1_pipe, tmp_path, monkeypatch, renamed):
    """A process that dies at its n-th renaming, before or after it, and cleans nothing up: for every n."""
    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS[:2], labeller=bright, steps=1, size=16, keep_steps=1)
    expected, replace = contents(make(folder=tmp_path / "whole").folder), Path.replace
    for stop in range(7):  # record, label map and image of each, and the manifest
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


def test_two_processes_make_one_image(generated, sd1_pipe):
    """What another process is writing at the moment stays, though this one is to make the same image."""
    expected = contents(generated.folder)
    (generated.folder / "images" / "00001.png").unlink()
    alive, dead = (generated.folder / "images" / f".00001.png.{pid}.part" for pid in (os.getppid(), 2**22 + 1))
    for path in (alive, dead):
        path.write_text("half")
    datasets.generate(sd1_pipe, PROMPTS[:3], generated.folder, steps=1, size=(16, 24))
    assert alive.exists() and not dead.exists()
    os.utime(alive, (time.time() - 100,) * 2)  # nobody has written to it for long
    datasets.generate(sd1_pipe, PROMPTS[:3], generated.folder, steps=1, size=(16, 24))
    assert contents(generated.folder) == expected


def test_a_lost_file_is_made_again(whole, sd1_pipe, tmp_path):
    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS, tmp_path / "set", labeller=bright, **OPTIONS)
    make()
    for name in ("records/00001.safetensors", "images/00003.png", "labels/00000.png", "manifest.csv"):
        (tmp_path / "set" / name).unlink()
    make()
    assert contents(tmp_path / "set") == contents(whole.folder)


# -- settings ----------------------------------------------------------------------------------------------------

OTHERS = {
    "seed": ({"seed": 1}, "seed: 0 there, 1 here"),
    "steps": ({"steps": 2}, "steps"),
    "guidance": ({"guidance": 3}, "guidance"),
    "size": ({"size": 16}, "size"),
    "records": ({"keep_steps": 1}, "keep_steps"),
    "a prompt": ({"prompts": ["a car", "a bus", PROMPTS[2]]}, "prompt 1: 'a tree' there, 'a bus' here"),
    "fewer prompts": ({"prompts": PROMPTS[:2]}, "images: 3 there, 2 here"),
    "other prompts and more": ({"prompts": ["a bus", *PROMPTS[1:4]]}, "prompt 0: 'a car' there, 'a bus' here"),
    "an option": ({"negative_prompt": "blurry"}, "options: None there, {'negative_prompt': 'blurry'} here"),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_other_settings_are_refused(generated, sd1_pipe, change, message):
    before = contents(generated.folder)
    arguments = {"prompts": PROMPTS[:3], "steps": 1, "size": (16, 24), **change}
    with pytest.raises(ValueError, match=message):
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
    with pytest.raises(ValueError, match="dtype"):
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
    with pytest.raises(ValueError, match="threads"):
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
    with pytest.raises(ValueError, match="steps"):
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
    with pytest.raises(ValueError, match="no dataset"):
        datasets.generate(sd1_pipe, PROMPTS[:1], tmp_path, steps=1, size=16)
    assert contents(tmp_path) == {"images/00000.png": b"mine"}


BAD = {
    "a string": ({"prompts": "a car"}, TypeError, "prompts"),
    "no prompts": ({"prompts": []}, ValueError, "prompts"),
    "a shard": ({"shard": (2, 2)}, ValueError, "shard"),
    "no batch": ({"batch_size": 0}, ValueError, "batch_size"),
    "records": ({"keep_steps": 3}, ValueError, "keep_steps"),
    "a seed": ({"seed": -1}, ValueError, "seed"),
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
    assert settings["labels"] == ["small_sets.bright"]
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
        assert np.array_equal(ids, bright(np.asarray(image), None, PROMPTS[i]))
        assert np.array_equal(whole.mask(i, "car"), ids == CAR)
        assert whole.mask(i, "car").dtype == bool
    amounts = [float(whole.mask(i, "car").mean()) for i in range(5)]
    assert whole.with_class("car", min(amounts)) == [0, 2, 3, 4]  # prompt 1 names none
    assert whole.with_class("car", min(amounts), in_prompt=False) == [0, 1, 2, 3, 4]
    expected = [i for i in (0, 2, 3, 4) if amounts[i] >= max(amounts)]
    assert whole.with_class("car", max(amounts)) == expected
    assert whole.with_class("car") == [i for i in (0, 2, 3, 4) if amounts[i] >= datasets.MIN_AREA]
    for pixels in (0, 328):
        with pytest.raises(ValueError, match="min_area"):
            whole.with_class("car", pixels)
    for call in (functools.partial(whole.mask, 0), whole.with_class):
        with pytest.raises(ValueError, match="cat"):
            call("cat")
    for i in (5, -1):
        with pytest.raises(IndexError, match=f"no image {i}"):
            whole.labels(i)


def test_which_prompts_name_a_class(generated):
    for prompt in ("a car", "Two cars!", "CAR", "the car's tree", "a (car), parked", "car"):
        assert datasets.names("car", prompt)
    for prompt in ("a scar", "a carpet", "caravans", "a person", ""):
        assert not datasets.names("car", prompt)
    for name, prompt in (
        ("person", "Person"),
        ("person", "two persons"),
        ("person", "many people"),
        ("traffic light", "two traffic lights"),
        ("traffic light", "a Traffic-Light; red"),
        ("traffic light", "a traffic\nlight"),
        ("bus", "three buses"),
        ("sky", "blue skies"),
        ("rider", "riders, cars"),
    ):
        assert datasets.names(name, prompt)
    assert not datasets.names("traffic light", "traffic and light")
    assert not datasets.names("bus", "a bush")


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


def test_self_attention_is_kept_with_the_records(fresh, tmp_path):
    pipe = fresh("sd1")
    options = {"steps": 4, "size": (16, 24), "keep_steps": 2}
    dataset = datasets.generate(pipe, PROMPTS[:2], tmp_path / "set", self_attention=True, **options)
    plain = datasets.generate(pipe, PROMPTS[:2], tmp_path / "plain", **options)
    assert dataset.path("images", 1).read_bytes() == plain.path("images", 1).read_bytes()
    generator = torch.Generator().manual_seed(int(dataset.manifest.seed[1]))
    with daamlib.trace(pipe, self_attention=True) as trace:
        pipe(PROMPTS[1], num_inference_steps=4, guidance_scale=5.0, height=16, width=24, generator=generator)
    record, maps = dataset.record(1, pipe), trace[0].select(steps=[1, 3]).daam("a tree")
    positions = record.self_attention.grid[0] * record.self_attention.grid[1]
    assert record.self_attention.nbytes == 2 * positions**2  # the mean, in float16
    assert torch.allclose(record.refine(maps).values, trace[0].refine(maps).values, rtol=1e-3)
    with pytest.raises(ValueError, match="self_attention"):  # it says in dataset.json that it is there
        datasets.generate(pipe, PROMPTS[:2], tmp_path / "set", **options)
    with pytest.raises(ValueError, match="self_attention"):
        plain.record(1, pipe).refine(maps)
    with pytest.raises(ValueError, match="keep_steps"):
        datasets.generate(pipe, PROMPTS[:2], tmp_path / "new", steps=2, size=16, self_attention=True)


def test_queries_beyond_half_precision(fresh, tmp_path):
    pipe = fresh("sd1")
    with torch.no_grad():
        pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q.weight.mul_(1e6)
    with pytest.raises(ValueError, match="float16"):
        datasets.generate(pipe, ["a car"], tmp_path / "set", steps=1, size=16, keep_steps=1)


def test_without_records_and_labels(generated):
    with pytest.raises(ValueError, match="keep_steps"):
        generated.record(0)
    with pytest.raises(ValueError, match="label"):
        generated.labels(0)
    with pytest.raises(ValueError, match="label"):
        generated.with_class("car")


def test_loading_what_is_not_whole(generated, tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset"):
        datasets.load(tmp_path / "nowhere")
    folder, manifest = generated.folder, (generated.folder / "manifest.csv").read_text()
    (folder / "manifest.csv").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.csv"):
        datasets.load(folder)
    for text in (manifest.replace("a tree", "a bus"), manifest.split("\n", 1)[0], manifest.replace("prompt", "text")):
        (folder / "manifest.csv").write_text(text)
        with pytest.raises(ValueError, match="manifest.csv"):
            datasets.load(folder)
    (folder / "manifest.csv").write_text(manifest)
    assert len(datasets.load(folder)) == 3
    (folder / "images" / "00001.png").unlink()
    with pytest.raises(FileNotFoundError, match="images/00001.png"):
        datasets.load(folder)
    for text in ("{", "[]", "{}"):
        (folder / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match="dataset.json"):
            datasets.load(folder)
    (folder / "dataset.json").write_text('{"format": "daamlib-dataset-9"}')
    with pytest.raises(ValueError, match="format"):
        datasets.load(folder)


# -- labels ------------------------------------------------------------------------------------------------------


def test_labels_are_made_where_there_are_none(generated, sd1_pipe):
    first = np.full((16, 24), PERSON, np.uint8)
    files.write_png(generated.folder / "labels" / "00001.png", first)
    before, seen = contents(generated.folder), []

    class Labeller:
        store = None

        def __call__(self, image, record, prompt, value):
            seen.append((image.shape, record, prompt))
            return np.full(image.shape[:2], value, np.uint8)

    make = functools.partial(datasets.generate, sd1_pipe, PROMPTS[:3], generated.folder, steps=1, size=(16, 24))
    labeller = functools.partial(Labeller(), value=CAR)
    labeller.store = None
    made = make(labeller=labeller)
    assert seen == [((16, 24, 3), None, PROMPTS[0]), ((16, 24, 3), None, PROMPTS[2])]
    assert [int(made.labels(i)[0, 0]) for i in range(3)] == [CAR, PERSON, CAR]
    after = contents(generated.folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        "dataset.json", "labels/00000.png", "labels/00002.png"
    }  # fmt: skip
    source = made.settings["labels"]
    assert len(source) == 1 and source[0].endswith("Labeller")
    make(labeller=bright)  # nothing is left for it
    assert len(seen) == 2 and made.settings["labels"] == source


def test_a_labeller_that_reads_records_gets_them_also_for_images_that_are_there(generated, sd1_pipe):
    class Reads:
        store = "linear"

        def __call__(self, image, record, prompt):
            assert record.prompt == prompt
            heat = record.ldaam("car").resize(*image.shape[:2])["car"]
            return np.where(heat > heat.median(), np.uint8(CAR), np.uint8(255))

    before = contents(generated.folder)
    made = datasets.generate(
        sd1_pipe, PROMPTS[:3], generated.folder, labeller=Reads(), batch_size=1, steps=1, size=(16, 24)
    )
    assert {name: contents(generated.folder)[name] for name in before if "images" in name} == {
        name: content for name, content in before.items() if "images" in name
    }
    assert all({*np.unique(made.labels(i))} == {CAR, 255} for i in range(3))


@pytest.mark.parametrize("keep_steps", [0, 1])
def test_zero_shot_labels(sd1_pipe, tmp_path, keep_steps):
    labeller = datasets.WordLabeller({"car": "car", "vegetation": "trees", "sky": "sky"}, margin=0.0)
    options = {**OPTIONS, "keep_steps": keep_steps}
    dataset = datasets.generate(sd1_pipe, PROMPTS[:2], tmp_path / "set", labeller=labeller, **options)
    assert dataset.settings["labels"] == ["daamlib.datasets.WordLabeller"]
    assert dataset.settings["label_maps"] == labeller.settings
    plain = datasets.generate(sd1_pipe, PROMPTS[:2], tmp_path / "plain", **options)
    for i in range(2):
        assert dataset.path("images", i).read_bytes() == plain.path("images", i).read_bytes()
        if keep_steps:  # what a labeller asks for is not kept
            assert dataset.path("records", i).read_bytes() == plain.path("records", i).read_bytes()
        assert set(np.unique(dataset.labels(i))) <= {CAR, TREE, 23} and len(np.unique(dataset.labels(i))) > 1
    with pytest.raises(ValueError, match="label_maps"):
        other = datasets.WordLabeller(labeller.words, iterations=0)
        datasets.generate(sd1_pipe, PROMPTS[:2], dataset.folder, labeller=other, **options)


WRONG_LABELS = {
    "another shape": lambda image, record, prompt: np.zeros((1, *image.shape[:2]), np.uint8),
    "integers": lambda image, record, prompt: np.zeros(image.shape[:2], int),
    "a tensor": lambda image, record, prompt: torch.zeros(image.shape[:2], dtype=torch.uint8),
    "other ids": lambda image, record, prompt: np.full(image.shape[:2], 99, np.uint8),
}


@pytest.mark.parametrize("labeller", WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_wrong_labels(generated, sd1_pipe, labeller):
    with pytest.raises(ValueError, match="labeller"):
        datasets.generate(sd1_pipe, PROMPTS[:3], generated.folder, labeller=labeller, steps=1, size=(16, 24))
    assert not (generated.folder / "labels").exists()
