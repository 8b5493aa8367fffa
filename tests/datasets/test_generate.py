"""Labelled datasets: what a label map says, and the same files by any number of workers, dead ones among them."""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from helpers import assert_close
from torch.nn import functional as F

import daamlib
from daamlib import OptimizedToken, datasets
from daamlib.datasets import cli as generate
from daamlib.datasets import folder as _dataset_folder
from daamlib.datasets import ray_pool as _generate_ray
from daamlib.datasets import workers as _generate_workers
from daamlib.datasets.labelling import Reader
from daamlib.datasets.workers import Died, WorkerError, spread

PROMPTS = ("a car", "a tree", "a car and a person", "a person", "a scar")
OPTIONS = {"steps": 2, "size": (16, 24), "seed": 3}
CAR, PERSON = 26, 24


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def traced(pipe, prompt="a car and a person", steps=2, store="linear"):
    with daamlib.trace(pipe, store=store) as trace:
        generator = torch.Generator().manual_seed(0)
        pipe(prompt, num_inference_steps=steps, height=16, width=24, generator=generator, output_type="latent")
    return trace[0]


def token_for(record, *words, seed=0, **info):
    """A token of random embeddings whose logits have mean 0 and deviation 2 in this record."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(len(words), record.d_text, generator=generator)
    maps = record.ldaam_from(embedding).values.flatten(1)
    scale = 2 / maps.std(dim=1)
    bias = -scale * maps.mean(dim=1)
    rows = tuple((row,) for row in range(len(words)))
    info = {"fingerprint": dict(record.fingerprint.layers), "passes": [len(record.timesteps)]} | info
    return OptimizedToken(
        embedding, "ldaam", words, rows, tuple(scale.tolist()), tuple(bias.tolist()), (0.5,), 0.0, 0.0, info
    )


@pytest.fixture(scope="module")
def record(sd1_pipe):
    return traced(sd1_pipe)


@pytest.fixture(scope="module")
def tokens(record):
    return [token_for(record, "car"), token_for(record, "person", seed=1)]


# -- label maps --------------------------------------------------------------------------------------------------


def test_a_label_map_by_hand():
    car = [[0.9, 0.6, 0.59, 0.4, 0.39, 0.7, 0.5]]
    person = [[0.1, 0.5, 0.2, 0.1, 0.38, 0.7, 0.55]]
    ids = generate.label_map(np.array([car, person]), [CAR, PERSON], 0.6, 0.4)
    assert ids.tolist() == [[CAR, CAR, 255, 255, 0, CAR, 255]]  # the first of equals
    assert ids.dtype == np.uint8
    ids = generate.label_map(torch.tensor([car, person]), [CAR, PERSON], sure=(0.95, 0.5), unsure=(0.6, 0.5))
    assert ids.tolist() == [[255, 255, 0, 0, 0, 255, PERSON]]
    ids = generate.label_map(np.array([car]), [CAR], 0.5, 0.5)
    assert ids.tolist() == [[CAR, CAR, CAR, 0, 0, CAR, CAR]]
    assert generate.label_map(np.zeros((0, 2, 3)), []).tolist() == [[0, 0, 0]] * 2


WRONG_MAPS = {
    "one map": ((np.zeros((2, 3)), [CAR]), r"\(K, H, W\) probabilities of 1 classes, got shape \(2, 3\)"),
    "two ids": ((np.zeros((1, 2, 3)), [CAR, PERSON]), r"of 2 classes, got shape \(1, 2, 3\)"),
    "logits": ((np.full((1, 2, 3), 1.5), [CAR]), r"not all in \[0, 1\]"),
    "nan": ((np.full((1, 2, 3), np.nan), [CAR]), "some may be NaN"),
    "the wrong way round": ((np.zeros((1, 2, 3)), [CAR], 0.4, 0.6), "unsure <= sure <= 1, got sure 0.4 and unsure 0.6"),
    "percent": ((np.zeros((1, 2, 3)), [CAR], 60, 40), "got sure 60 and unsure 40"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_MAPS.values(), ids=WRONG_MAPS)
def test_what_is_no_label_map(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate.label_map(*arguments)


def test_probabilities_are_the_tokens_own(tokens, record):
    reader = Reader(tuple(tokens), 0.7, 0.5)
    chances = torch.cat([token.probabilities(record) for token in tokens])
    chances = F.interpolate(chances[None], (16, 24), mode="bilinear", align_corners=False)[0]
    found = reader(record, (16, 24))
    assert np.array_equal(found, generate.label_map(chances, [CAR, PERSON], 0.7, 0.5))
    assert {*np.unique(found)} == {0, CAR, PERSON, 255}


def test_only_the_classes_of_the_prompt(tokens, record):
    reader = Reader(tuple(tokens))
    for prompt, ids in (("a car, red", {CAR}), ("a scar and cars", set()), ("Person", set()), (None, set())):
        found = reader(dataclasses.replace(record, prompt=prompt), (16, 24))
        assert {*np.unique(found)} - {0, 255} == ids
    everything = Reader(tuple(tokens), named_only=False)(dataclasses.replace(record, prompt="a tree"), (16, 24))
    assert np.array_equal(everything, reader(record, (16, 24)))


def test_a_joint_token_is_read_by_its_softmax(record):
    token = token_for(record, "car", "person", "background", joint=True)
    scale, bias = (torch.tensor(n, device=record.device).view(-1, 1, 1) for n in (token.scale, token.bias))
    logits = scale * token.maps(record).values + bias
    assert_close(token.probabilities(record), logits.softmax(dim=0))
    for prompt, rows in (("a car and a person", [0, 1, 2]), ("a person", [1, 2])):
        chances = F.interpolate(logits[rows].softmax(0)[None], (16, 24), mode="bilinear", align_corners=False)[0]
        ids = [[CAR, PERSON][row] for row in rows[:-1]]
        found = Reader((token,))(dataclasses.replace(record, prompt=prompt), (16, 24))
        assert np.array_equal(found, generate.label_map(chances[:-1], ids))
        assert set(ids) < {*np.unique(found)}


def test_maps_of_more_steps_are_scaled_to_the_tokens(tokens, record):
    """Sums over the steps: twice the steps is twice the map, and the same label map."""
    layers = tuple(dataclasses.replace(layer, query_sum=2 * layer.query_sum) for layer in record.layers)
    twice = dataclasses.replace(record, layers=layers, timesteps=record.timesteps * 2)
    for passes in ([2], [1, 3]):
        token = dataclasses.replace(tokens[0], info={**tokens[0].info, "passes": passes})
        reader = Reader((token,))
        assert np.array_equal(reader(twice, (16, 24)), reader(record, (16, 24)))
    old = dataclasses.replace(tokens[0], info={"fingerprint": tokens[0].info["fingerprint"]})
    assert not np.array_equal(Reader((old,))(twice, (16, 24)), reader(record, (16, 24)))  # it does not say of how many


def test_daam_tokens_read_the_queries(sd1_pipe, tokens):
    record = traced(sd1_pipe, store="queries")
    embedding = record.text_embeddings("a car", padding=False).values
    token = dataclasses.replace(token_for(record, "car"), embedding=embedding, method="daam", rows=((2,),))
    maps = token.maps(record).values
    scale = float(2 / maps.std())
    token = dataclasses.replace(token, scale=(scale,), bias=(float(-scale * maps.mean()),))
    assert Reader((token, tokens[1])).store == "queries"
    assert Reader((tokens[1],)).store == "linear"
    reader = Reader((token,), named_only=False)
    chances = F.interpolate(token.probabilities(record)[None], (16, 24), mode="bilinear", align_corners=False)[0]
    assert np.array_equal(reader(record, (16, 24)), generate.label_map(chances, [CAR]))


def test_readers_that_cannot_be(record, tokens):
    car = tokens[0]
    for tokens_, options, message in (
        ((), {}, "no class to label: expected one optimised token or more"),
        ((token_for(record, "cat"),), {}, "a token's word must name its class: 'cat' is no Cityscapes label"),
        ((token_for(record, "token"),), {}, "'token' is no Cityscapes label"),
        ((car, car), {}, "two tokens read car"),
        ((token_for(record, "background"),), {}, "no class to label"),
        ((token_for(record, "car", loss="cross_entropy"),), {}, "learns no scale and bias"),
        ((token_for(record, "car", "person", joint=True),), {}, "use background=True"),
        ((car,), {"sure": {"person": 0.6}}, r"sure has thresholds for \['person'\], the tokens read \['car'\]"),
        ((car,), {"unsure": 0.7}, "got sure .* and unsure"),
    ):
        with pytest.raises(ValueError, match=message):
            Reader(tokens_, **options)


# -- in one process ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(sd1_pipe, tokens, tmp_path_factory):
    """An undisturbed run; read-only."""
    return generate.generate_labelled(sd1_pipe, PROMPTS, tmp_path_factory.mktemp("labelled") / "set", tokens, **OPTIONS)


def test_images_and_their_labels(labelled, sd1_pipe, tokens, tmp_path):
    plain = datasets.generate(sd1_pipe, PROMPTS, tmp_path / "set", **OPTIONS)
    reader = Reader(tuple(tokens))
    for i, prompt in enumerate(PROMPTS):
        assert (labelled.folder / labelled.manifest.file[i]).read_bytes() == plain._path("images", i).read_bytes()
        with daamlib.trace(sd1_pipe) as trace:
            generator = torch.Generator().manual_seed(int(labelled.manifest.seed[i]))
            sd1_pipe(prompt, num_inference_steps=2, guidance_scale=5.0, height=16, width=24, generator=generator)
        expected = reader(trace[0], (16, 24))
        assert (labelled.labels(i) != expected).mean() < 0.01  # summed in another order
    assert 255 in labelled.labels(2)
    assert not labelled.labels(1).any() and not labelled.labels(4).any()
    assert labelled.with_class("car", min_area=1e-6) == [i for i in (0, 2) if labelled.mask(i, "car").any()] != []
    settings = datasets.load(labelled.folder).settings
    assert settings["labels"] == ["daamlib.generate"]
    maps = settings["label_maps"]
    assert [token["words"] for token in maps["tokens"]] == [["car"], ["person"]]
    assert (maps["sure"], maps["unsure"], maps["named_only"]) == (0.6, 0.4, True)


def test_a_lost_file_is_made_again_and_a_corrected_one_stays(labelled, sd1_pipe, tokens, tmp_path):
    make = lambda: generate.generate_labelled(sd1_pipe, PROMPTS, tmp_path / "set", tokens, **OPTIONS)  # noqa: E731
    assert contents(make().folder) == contents(labelled.folder)
    for name in ("images/00000.png", "labels/00002.png", "manifest.csv"):
        (tmp_path / "set" / name).unlink()
    with pytest.raises(FileNotFoundError, match="lacks 3 files"):
        datasets.load(tmp_path / "set")
    (tmp_path / "set" / "images" / ".00003.png.1.part").write_text("half")
    assert contents(make().folder) == contents(labelled.folder)
    corrected = np.full((16, 24), PERSON, np.uint8)
    _dataset_folder.write_png(tmp_path / "set" / "labels" / "00000.png", corrected)
    (tmp_path / "set" / "images" / "00000.png").unlink()
    assert np.array_equal(make().labels(0), corrected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sure": 0.8}, "label_maps: .*'sure': 0.6.* there, .*'sure': 0.8.* here"),
        ({"unsure": {"car": 0.4, "person": 0.3}}, "label_maps"),
        ({"named_only": False}, "label_maps"),
        ({"tokens": []}, "label_maps: .* there, None here"),
        ({"seed": 1}, "seed: 3 there, 1 here"),
    ],
)
def test_other_settings_are_refused(labelled, sd1_pipe, tokens, change, message):
    before = contents(labelled.folder)
    arguments = {"tokens": tokens, **OPTIONS, **change}
    with pytest.raises(ValueError, match=message):
        generate.generate_labelled(sd1_pipe, PROMPTS, labelled.folder, **arguments)
    assert contents(labelled.folder) == before


def test_a_token_of_another_model(fresh, sd2_pipe, tokens, tmp_path):
    pipe = fresh("sd1")
    with torch.no_grad():
        pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.1)
    for other in (pipe, sd2_pipe):
        with pytest.raises(ValueError, match="another model"):
            generate.generate_labelled(other, PROMPTS, tmp_path / "set", tokens, **OPTIONS)
    assert not (tmp_path / "set").exists()


def test_without_tokens_it_is_the_plain_dataset(sd1_pipe, tmp_path):
    made = generate.generate_labelled(sd1_pipe, PROMPTS[:2], tmp_path / "a", [], **OPTIONS)
    plain = datasets.generate(sd1_pipe, PROMPTS[:2], tmp_path / "b", **OPTIONS)
    assert contents(made.folder) == contents(plain.folder)


# -- handing out shards ------------------------------------------------------------------------------------------


class Pool:
    """Workers in name only. script: what worker 0, 1, ... answers in turn; then, and all others, they do their work.

    deadly: the shard that begins there kills whoever takes it.
    """

    deadly = None

    def __init__(self, size, *script):
        self.size, self.script = size, [list(answers) for answers in script]
        self.started, self.queue, self.made, self.stopped, self.closed = 0, [], [], [], False

    def start(self):
        worker, self.started = self.started, self.started + 1
        self._answer(worker, 0)
        return worker

    def give(self, worker, shard):
        self._answer(worker, len(shard), shard)

    def _answer(self, worker, usual, shard=()):
        answers = self.script[worker] if worker < len(self.script) else []
        answer = answers.pop(0) if answers else usual
        if answer == "usual":
            answer = usual
        if shard and shard[0] == self.deadly:
            answer = DEAD
        if isinstance(answer, int):
            self.made.extend(shard)
        self.queue.append((worker, answer))

    def wait(self):
        return self.queue.pop(0)

    def stop(self, worker):
        self.stopped.append(worker)

    def close(self):
        self.closed = True


DEAD = Died("killed")


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "script", [[], [["usual", DEAD]], [["usual", "usual", DEAD], [DEAD], ["usual", DEAD]], [[DEAD], [DEAD]]]
)
def test_no_image_is_lost_or_doubled(size, script):
    pool, done = Pool(size, *script), []
    spread(generate.shards_of(11, 3), pool, done.append)
    assert Counter(pool.made) == Counter(range(11))
    assert sum(done) == 11
    assert pool.closed


def test_it_gives_up_when_workers_die_again_and_again():
    pool = Pool(1, *[["usual", DEAD]] * 3)
    with pytest.raises(WorkerError, match="3 workers died over the images 0 to 2, the last one: killed"):
        spread(generate.shards_of(11, 3), pool, lambda made: None)
    assert pool.closed and pool.started == 3
    pool = Pool(2, *[[DEAD]] * 9)
    with pytest.raises(WorkerError, match="3 workers died over loading the model"):
        spread(generate.shards_of(11, 3), pool, lambda made: None)
    assert pool.closed and pool.started == 4
    pool = Pool(2)
    pool.deadly = 3  # and all else goes well
    with pytest.raises(WorkerError, match="3 workers died over the images 3 to 5"):
        spread(generate.shards_of(999, 3), pool, lambda made: None)
    assert pool.closed and pool.started == 4


def test_what_is_wrong_everywhere_ends_the_run():
    pool = Pool(2, ["usual", ValueError("other settings")])
    with pytest.raises(ValueError, match="other settings"):
        spread(generate.shards_of(11, 3), pool, lambda made: None)
    assert pool.closed and pool.started == 2


def test_no_more_workers_than_shards():
    pool = Pool(9)
    spread(generate.shards_of(11, 4), pool, lambda made: None)
    assert pool.started == 3 and sorted(pool.stopped) == [0, 1, 2]


# -- several processes -------------------------------------------------------------------------------------------

MANY = tuple(PROMPTS[i % len(PROMPTS)] for i in range(12))


@pytest.fixture(scope="module")
def saved(sd1_pipe, record, tokens, tmp_path_factory):
    """A folder with the tiny model and two tokens, for other processes."""
    folder = tmp_path_factory.mktemp("saved")
    sd1_pipe.save_pretrained(folder / "tiny")
    for token in tokens:
        token.save(folder / f"{token.words[0]}.safetensors")
    return folder


def job_of(saved, folder, **changes):
    paths = tuple(saved / f"{name}.safetensors" for name in ("car", "person"))
    options = {"steps": 6, "size": (16, 24), "seed": 3, "device": "cpu"} | changes
    return generate.Job(folder, options.pop("prompts", MANY), paths, str(saved / "tiny"), **options)


@pytest.fixture(scope="module")
def undisturbed(saved, tmp_path_factory):
    return generate.run(job_of(saved, tmp_path_factory.mktemp("undisturbed") / "set"))


def kill_when(folder, shard, kill):
    """A thread that calls `kill` as soon as the first image of the shard is there, and notes what was there then."""

    def watch():
        while not (folder / "images" / f"{shard.start:05d}.png").is_file():
            if stop.wait(0.002):
                return
        kill()
        seen.append([i for i in shard if (folder / "images" / f"{i:05d}.png").is_file()])

    seen, stop = [], threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return seen, lambda: (stop.set(), thread.join())


def given(monkeypatch, pool):
    """{first image: worker} of the shards that a pool hands out."""
    workers, give = {}, pool.give

    def noted(self, worker, shard):
        workers.setdefault(shard.start, []).append(worker)
        give(self, worker, shard)

    monkeypatch.setattr(pool, "give", noted)
    return workers


@pytest.mark.slow
def test_a_killed_process_is_replaced(saved, undisturbed, tmp_path, monkeypatch):
    folder, workers = tmp_path / "set", given(monkeypatch, _generate_workers.Processes)
    seen, end = kill_when(folder, range(6), lambda: os.kill(workers[0][0].process.pid, signal.SIGKILL))
    dataset = generate.run(job_of(saved, folder), workers=2, shard_size=6)
    end()
    assert seen and 0 < len(seen[0]) < 6  # in the middle
    assert len(workers[0]) == 2 and workers[0][0] is not workers[0][1]
    assert len(workers[6]) == 1
    assert workers[0][0].process.exitcode == -signal.SIGKILL
    assert len(dataset) == 12
    assert contents(folder) == contents(undisturbed.folder)


@pytest.mark.slow
def test_a_worker_says_what_is_wrong(saved, tmp_path):
    generate.run(job_of(saved, tmp_path / "set", prompts=MANY[:2], steps=1))
    (tmp_path / "set" / "images" / "00001.png").unlink()
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match="was made with other settings .*steps: 1 there, 2 here"):
        generate.run(job_of(saved, tmp_path / "set", prompts=MANY[:2], steps=2), workers=2)
    assert contents(tmp_path / "set") == before


def makers():
    """The Ray actors that are at work on a shard right now: Ray shows it in a process' name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [process] * any("Maker.make" in part for part in process.cmdline())
        except psutil.Error:  # it has just ended
            pass
    return found


# psutil and Ray's own threads leave files and sockets to the garbage collector, which pytest would make errors of
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning")  # about CUDA_VISIBLE_DEVICES
@pytest.mark.slow
def test_a_killed_ray_actor_is_replaced(saved, undisturbed, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra daamlib[ray] is not installed")
    folder, workers = tmp_path / "set", given(monkeypatch, _generate_ray.Actors)
    killed = []

    def kill():
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for process in makers()[:1]:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False,
        object_store_memory=2**27,
    )  # fmt: skip
    try:
        with pytest.raises(ValueError, match="room for 2 workers, asked for 3: the cluster has 0 GPUs and 2 CPU cores"):
            generate.run(job_of(saved, folder), ray=True, workers=3)
        seen, end = kill_when(folder, range(6), kill)
        dataset = generate.run(job_of(saved, folder), ray=True, shard_size=6)
        end()
        handed = sorted((first, len(to)) for first, to in workers.items())
        with pytest.raises(ValueError, match="steps: 6 there, 5 here"):
            generate.run(job_of(saved, folder, steps=5), ray=True)
        assert ray.is_initialized()  # it is the caller's
    finally:
        ray.shutdown()
    assert killed and seen
    assert handed in ([(0, 1), (6, 2)], [(0, 2), (6, 1)])  # one of the two shards was made again, the other once
    assert len(dataset) == 12
    assert contents(folder) == contents(undisturbed.folder)


def test_what_is_finished_is_skipped(saved, undisturbed, monkeypatch):
    shards = []
    monkeypatch.setattr(generate, "make_here", lambda job, todo, done: shards.extend(todo))
    before = {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*.png")}
    generate.run(job_of(saved, undisturbed.folder), shard_size=5)
    assert shards == [range(5)]  # looked at, to compare the settings
    monkeypatch.undo()
    generate.run(job_of(saved, undisturbed.folder))
    assert {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*.png")} == before
    with pytest.raises(ValueError, match="steps: 6 there, 5 here"):
        generate.run(job_of(saved, undisturbed.folder, steps=5))


def test_only_unfinished_shards_are_handed_out(saved, undisturbed, tmp_path, monkeypatch):
    shards = []
    for part, number in (("images", 5), ("labels", 6), ("images", 7)):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / f"{number:05d}.png").write_text("")
    monkeypatch.setattr(generate, "make_here", lambda job, todo, done: shards.extend(todo))
    monkeypatch.setattr(generate, "finish", lambda folder: None)
    generate.run(job_of(saved, tmp_path), shard_size=1)
    assert shards == [range(i, i + 1) for i in range(12)]  # no one has both
    shards.clear()
    (tmp_path / "labels" / "00005.png").write_text("")
    generate.run(job_of(saved, tmp_path), shard_size=1)
    assert [shard.start for shard in shards] == [i for i in range(12) if i != 5]


def test_threads_are_the_callers_again(saved, undisturbed):
    assert undisturbed.settings["threads"] == 1
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generate.run(job_of(saved, undisturbed.folder))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_without_ray(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'daamlib\[ray\]'"):
        generate.run(job_of(saved, tmp_path / "set"), ray=True)
    assert not (tmp_path / "set").exists()


# -- the command line --------------------------------------------------------------------------------------------


def test_the_command_line(saved, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a car\n\n  a person \n")
    folder = tmp_path / "set"
    command = [str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--n", "3", "--model", str(saved / "tiny")]
    command += ["--tokens", str(saved / "car.safetensors"), "--steps", "1", "--size", "16", "24", "--device", "cpu"]
    command += ["--sure", "car=0.7", "--unsure", "0.3", "--seed", "4", "--guidance", "2"]
    assert generate.main([*command, "--estimate"]) == 0
    said = capsys.readouterr().out
    assert "s an image, measured with one worker" in said and "3 images on 1 such" in said
    assert not folder.exists()
    assert generate.main(command) == 0
    assert "3 images in " in capsys.readouterr().out
    dataset = datasets.load(folder)
    assert list(dataset.manifest.prompt) == ["a car", "a person", "a car"]
    settings = dataset.settings
    assert (settings["seed"], settings["steps"], settings["guidance"], settings["size"]) == (4, 1, 2.0, [16, 24])
    assert settings["label_maps"]["sure"] == {"car": 0.7}
    assert generate.main(command) == 0
    assert capsys.readouterr().out.startswith("0 images in ")
    assert generate.main([*command, "--steps", "2"]) == 2
    assert "steps: 1 there, 2 here" in capsys.readouterr().err


WRONG = {
    "no number": ([], "say how many images: --n, or --prompts"),
    "none": (["--n", "0"], "expected one image or more, got --n 0"),
    "three sides": (["--n", "1", "--size", "1", "2", "3"], "height and width"),
    "no prompts": (["--prompts", "{}/empty.txt"], "empty.txt has no prompts"),
    "no file": (["--prompts", "{}/nowhere.txt"], "No such file"),
    "no token": (["--n", "1", "--tokens", "{}/nowhere.safetensors"], "no optimised token at"),
    "a damaged token": (["--n", "1", "--tokens", "{}/empty.txt"], "is not a readable optimised token"),
    "a cat": (["--n", "1", "--tokens", "{}/cat.safetensors"], "'cat' is no Cityscapes label"),
    "a threshold": (["--n", "1", "--sure", "high"], "a threshold is a number, or CLASS=NUMBER"),
    "an address": (["--n", "1", "--address", "auto"], "ask for Ray too"),
    "no workers": (["--n", "1", "--workers", "0"], "one worker or more, got 0"),
    "no threads": (["--n", "1", "--threads", "0"], "threads must be 1 or more, got 0"),
    "no steps": (["--n", "1", "--steps", "0"], "steps must be 1 or more, got 0"),
    "no shards": (["--n", "1", "--shard-size", "0"], "shard size must be 1 or more, got 0"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_choices_on_the_command_line(arguments, message, record, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    token_for(record, "cat").save(tmp_path / "cat.safetensors")
    assert generate.main([str(tmp_path / "set"), *(text.format(tmp_path) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_hours():
    assert generate.hours(7200, 2.0, 4) == 1.0


def test_the_settings_are_jsons_own_types(tokens):
    settings = Reader(tuple(tokens), {"car": 0.6, "person": 0.5}).settings()
    assert json.loads(json.dumps(settings)) == settings
    other = dataclasses.replace(tokens[0], bias=(0.0,))
    assert Reader((other,)).settings()["tokens"][0]["sha256"] != settings["tokens"][0]["sha256"]
