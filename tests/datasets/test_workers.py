"""Datasets that tokens label: the same files by any number of workers, killed ones among them."""

import csv
import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from small_sets import CAR, PERSON, contents, token_for, traced

import daamlib
from daamlib import datasets
from daamlib import generate as command
from daamlib.datasets import TokenLabeller, run_shards, workers
from daamlib.datasets import folder as files

PROMPTS = ("a car", "a tree", "a car and a person", "a person", "a scar")
OPTIONS = {"steps": 2, "size": (16, 24), "seed": 3}


@pytest.fixture(scope="module")
def record(sd1_pipe):
    return traced(sd1_pipe)


@pytest.fixture(scope="module")
def tokens(record):
    return (token_for(record, "car"), token_for(record, "person", seed=1))


# -- in one process ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(sd1_pipe, tokens, tmp_path_factory):
    """An undisturbed run; read-only."""
    folder = tmp_path_factory.mktemp("labelled") / "set"
    return datasets.generate(sd1_pipe, PROMPTS, folder, labeller=TokenLabeller(tokens), **OPTIONS)


def test_images_and_their_labels(labelled, sd1_pipe, tokens, tmp_path):
    plain = datasets.generate(sd1_pipe, PROMPTS, tmp_path / "set", **OPTIONS)
    for i, prompt in enumerate(PROMPTS):
        assert labelled.path("images", i).read_bytes() == plain.path("images", i).read_bytes()
        with daamlib.trace(sd1_pipe, self_attention=True) as trace:
            generator = torch.Generator().manual_seed(int(labelled.manifest.seed[i]))
            sd1_pipe(prompt, num_inference_steps=2, guidance_scale=5.0, height=16, width=24, generator=generator)
        expected = TokenLabeller(tokens)(np.asarray(plain.image(i)), trace[0], prompt)
        assert (labelled.labels(i) != expected).mean() < 0.01  # summed in another order
    assert {*np.unique(labelled.labels(1))} == {*np.unique(labelled.labels(4))} == {0, 255}  # neither class is named
    assert labelled.with_class("car", min_area=1e-6) == [i for i in (0, 2) if labelled.mask(i, "car").any()] != []
    settings = datasets.load(labelled.folder).settings
    assert settings["labels"] == ["daamlib.datasets.TokenLabeller"]
    assert settings["label_maps"] == TokenLabeller(tokens).settings


def test_a_lost_file_is_made_again_and_a_corrected_one_stays(labelled, sd1_pipe, tokens, tmp_path):
    folder, labeller = tmp_path / "set", TokenLabeller(tokens)
    make = lambda: datasets.generate(sd1_pipe, PROMPTS, folder, labeller=labeller, **OPTIONS)  # noqa: E731
    assert contents(make().folder) == contents(labelled.folder)
    for name in ("images/00000.png", "labels/00002.png", "manifest.csv"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match="lacks 3"):
        datasets.load(folder)
    (folder / "images" / ".00003.png.1.part").write_text("half")
    assert contents(make().folder) == contents(labelled.folder)
    corrected = np.full((16, 24), PERSON, np.uint8)
    files.write_png(folder / "labels" / "00000.png", corrected)
    (folder / "images" / "00000.png").unlink()
    assert np.array_equal(make().labels(0), corrected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.8}, "label_maps: .*0.6.* there, .*0.8.* here"),
        ({"ignore_from": {"car": 0.4, "person": 0.3}}, "label_maps"),
        ({"named_only": False}, "label_maps"),
        (None, "label_maps"),
    ],
)
def test_other_label_maps_are_refused(labelled, sd1_pipe, tokens, change, message):
    before = contents(labelled.folder)
    labeller = None if change is None else TokenLabeller(tokens, **change)
    with pytest.raises(ValueError, match=message):
        datasets.generate(sd1_pipe, PROMPTS, labelled.folder, labeller=labeller, **OPTIONS)
    assert contents(labelled.folder) == before


def test_a_token_of_another_model(fresh, sd2_pipe, tokens, tmp_path):
    pipe = fresh("sd1")
    with torch.no_grad():
        pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.1)
    for other in (pipe, sd2_pipe):
        with pytest.raises(ValueError, match="another model"):
            datasets.generate(other, PROMPTS, tmp_path / "set", labeller=TokenLabeller(tokens), **OPTIONS)
    assert not (tmp_path / "set").exists()


# -- several processes -------------------------------------------------------------------------------------------

MANY = [PROMPTS[i % len(PROMPTS)] for i in range(12)]


@pytest.fixture(scope="module")
def saved(sd1_pipe, tokens, tmp_path_factory):
    """A folder with the tiny model and two tokens, for other processes."""
    folder = tmp_path_factory.mktemp("saved")
    sd1_pipe.save_pretrained(folder / "tiny")
    for token in tokens:
        token.save(folder / f"{token.words[0]}.safetensors")
    return folder


def job_of(saved, folder, **changes):
    paths = [saved / f"{name}.safetensors" for name in ("car", "person")]
    options = {"prompts": MANY, "steps": 2, "size": (16, 24), "seed": 3, "device": "cpu"} | changes
    return datasets.Job(folder, tokens=paths, model=str(saved / "tiny"), **options)


@pytest.fixture(scope="module")
def undisturbed(saved, tmp_path_factory):
    return run_shards(job_of(saved, tmp_path_factory.mktemp("undisturbed") / "set"))


KILLS = """
import os, signal
from pathlib import Path

replace = Path.replace

def killing(self, target):
    if Path(target).parts[-2:] == ("images", os.environ["KILL_AT"]):
        marks = Path(os.environ["KILL_MARKS"])
        number = len(list(marks.iterdir()))
        if number < int(os.environ["KILL_TIMES"]):
            (marks / f"{number}").write_text(str(os.getpid()))
            os.kill(os.getppid() if os.environ["KILL"] == "driver" else os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = killing
"""


@pytest.fixture
def killer(tmp_path, monkeypatch):
    """Make processes that start from now on kill themselves when they name that image, `times` times.

    Python runs a module of the name sitecustomize when it starts. Returns the folder of files with the killers' ids.
    """

    def install(name, times=1, whom="worker"):
        (tmp_path / "site").mkdir()
        (tmp_path / "marks").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(KILLS)
        paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        for key, value in {"AT": name, "MARKS": tmp_path / "marks", "TIMES": times}.items():
            monkeypatch.setenv(f"KILL_{key}", str(value))
        monkeypatch.setenv("KILL", whom)
        return tmp_path / "marks"

    return install


@pytest.mark.slow
def test_a_killed_process_is_replaced(saved, undisturbed, tmp_path, killer):
    marks = killer("00003.png")
    dataset = run_shards(job_of(saved, tmp_path / "set"), workers=2, shard_size=4)
    assert len(list(marks.iterdir())) == 1
    assert len(dataset) == 12
    assert contents(dataset.folder) == contents(undisturbed.folder)


@pytest.mark.slow
def test_it_gives_up_when_workers_die_again_and_again(saved, tmp_path, killer, capfd):
    marks = killer("00000.png", times=99)
    arguments = ["--tokens", str(saved / "car.safetensors"), "--model", str(saved / "tiny"), "--device", "cpu"]
    arguments += ["--n", "2", "--steps", "1", "--size", "16", "--workers", "2", "--shard-size", "2"]
    assert command.main([str(tmp_path / "set"), *arguments]) == 1
    assert "same command" in capfd.readouterr().err
    assert len(list(marks.iterdir())) == workers.DEATHS
    assert not list((tmp_path / "set" / "images").glob("0*"))


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from test_workers import job_of
from daamlib.datasets import run_shards

if __name__ == "__main__":
    run_shards(job_of(Path(sys.argv[1]), sys.argv[2]), workers=2, shard_size=4)
"""


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_along_and_the_same_call_goes_on(saved, undisturbed, tmp_path, killer):
    marks = killer("00003.png", whom="driver")
    (tmp_path / "driver.py").write_text(DRIVER)
    done = subprocess.run([sys.executable, tmp_path / "driver.py", saved, tmp_path / "set", *sys.path])
    assert done.returncode < 0
    worker = int((marks / "0").read_text())
    deadline = time.monotonic() + 60
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    dataset = run_shards(job_of(saved, tmp_path / "set"))
    assert contents(dataset.folder) == contents(undisturbed.folder)


@pytest.mark.slow
def test_a_worker_says_what_is_wrong(saved, tmp_path):
    run_shards(job_of(saved, tmp_path / "set", prompts=MANY[:2], steps=1))
    (tmp_path / "set" / "images" / "00001.png").unlink()
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match="steps: 1 there, 2 here"):
        run_shards(job_of(saved, tmp_path / "set", prompts=MANY[:2]), workers=2)
    assert contents(tmp_path / "set") == before


# psutil and Ray's own threads leave files and sockets to the garbage collector, which pytest would make errors of
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning")  # about CUDA_VISIBLE_DEVICES
@pytest.mark.slow
def test_a_killed_ray_actor_is_replaced(saved, undisturbed, tmp_path, killer):
    ray = pytest.importorskip("ray", reason="the extra daamlib[ray] is not installed")
    folder, marks = tmp_path / "set", killer("00003.png")
    local = {"address": "local", "include_dashboard": False, "object_store_memory": 2**27}
    ray.init(**local, num_cpus=2, logging_level="error", log_to_driver=False)
    try:
        with pytest.raises(ValueError, match="room"):
            run_shards(job_of(saved, folder), ray=True, workers=3)
        dataset = run_shards(job_of(saved, folder), ray=True, shard_size=4)
        with pytest.raises(ValueError, match="steps: 2 there, 5 here"):
            run_shards(job_of(saved, folder, steps=5), ray=True)
        assert ray.is_initialized()  # it is the caller's
    finally:
        ray.shutdown()
    assert len(list(marks.iterdir())) == 1
    assert len(dataset) == 12
    assert contents(folder) == contents(undisturbed.folder)


def test_a_hiccup_of_the_network_does_not_end_a_run(saved, undisturbed, tmp_path, monkeypatch, caplog):
    calls, load = [], workers.load_pipeline

    def unstable(*arguments, **options):
        calls.append(arguments)
        if len(calls) < 3:
            raise ConnectionResetError("the hub is away")
        return load(*arguments, **options)

    monkeypatch.setattr(workers, "PAUSES", (0, 0))
    monkeypatch.setattr(workers, "load_pipeline", unstable)
    dataset = run_shards(job_of(saved, tmp_path / "set"))
    assert contents(dataset.folder) == contents(undisturbed.folder)
    assert len(calls) == 3 and caplog.text.count("the hub is away") == 2
    calls.clear()
    monkeypatch.setattr(workers, "PAUSES", (0,))
    with pytest.raises(OSError, match="away"):
        run_shards(job_of(saved, tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_batches_are_those_of_one_call(saved, sd1_pipe, tokens, tmp_path):
    made = run_shards(job_of(saved, tmp_path / "a", batch_size=3), shard_size=4)
    with_tokens = {"labeller": TokenLabeller(tokens), "batch_size": 3, **OPTIONS}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipe = daamlib.load_pipeline(saved / "tiny", device="cpu")
        plain = datasets.generate(pipe, MANY, tmp_path / "b", **with_tokens)
    finally:
        torch.set_num_threads(before)
    assert contents(made.folder) == contents(plain.folder)


def test_what_is_finished_is_skipped(saved, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")}
    run_shards(job_of(saved, undisturbed.folder), shard_size=5)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.folder.rglob("*")} == before
    with pytest.raises(ValueError, match="steps"):
        run_shards(job_of(saved, undisturbed.folder, steps=5))


def test_threads_are_the_callers_again(saved, undisturbed):
    assert undisturbed.settings["threads"] == 1
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_shards(job_of(saved, undisturbed.folder))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_without_ray(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="ray"):
        run_shards(job_of(saved, tmp_path / "set"), ray=True)
    assert not (tmp_path / "set").exists()


# -- the command line --------------------------------------------------------------------------------------------


def test_the_command_line(saved, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a car\n\n  a person \n")
    folder = tmp_path / "set"
    arguments = [str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--n", "3", "--model", str(saved / "tiny")]
    arguments += ["--tokens", str(saved / "car.safetensors"), "--steps", "1", "--size", "16", "24", "--device", "cpu"]
    arguments += ["--threshold", "car=0.7", "--ignore-from", "0.3", "--seed", "4", "--guidance", "2", "--edge-aware"]
    assert command.main([*arguments, "--estimate"]) == 0
    said = capsys.readouterr().out
    assert "s an image, measured with one worker" in said and "3 images on 1 such" in said
    assert not folder.exists()
    assert command.main(arguments) == 0
    assert "3 images in " in capsys.readouterr().out
    dataset = datasets.load(folder)
    assert list(dataset.manifest.prompt) == ["a car", "a person", "a car"]
    settings = dataset.settings
    assert (settings["seed"], settings["steps"], settings["guidance"], settings["size"]) == (4, 1, 2.0, [16, 24])
    assert (settings["label_maps"]["threshold"], settings["label_maps"]["ignore_from"]) == ({"car": 0.7}, 0.3)
    assert settings["label_maps"]["edge_aware"] is True
    assert CAR in dataset.labels(0)
    assert command.main(arguments) == 0
    assert capsys.readouterr().out.startswith("0 images in ")
    assert command.main([*arguments, "--steps", "2"]) == 2
    assert "steps: 1 there, 2 here" in capsys.readouterr().err


def test_any_prompts_file_and_more_of_them(saved, tmp_path, capsys):
    lines = [
        "a car",
        "a\u2028car",
        " two\x0bcars ",
        "NA",
        "a\x00car",
        "a\tcar",
        '"',
        "日本の車",
        "=1+1",
        "a\x85car",
        "\x0c",
    ]
    arguments = [str(tmp_path / "set"), "--prompts", str(tmp_path / "p.txt"), "--model", str(saved / "tiny")]
    arguments += ["--tokens", str(saved / "car.safetensors"), "--steps", "1", "--size", "16", "--device", "cpu"]
    expected = [line.strip() for line in lines if line.strip()]
    for end, count in (("\n", 4), ("\r\n", 10), ("\r", 10)):
        (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + end.join(lines[:count]).encode())
        assert command.main(arguments) == 0, capsys.readouterr().err
        assert list(datasets.load(tmp_path / "set").manifest.prompt) == expected[:count]
    with (tmp_path / "set" / "manifest.csv").open(encoding="utf-8", newline="") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == expected
    (tmp_path / "p.txt").write_bytes("über".encode("utf-16"))
    assert command.main(arguments) == 2 and "UTF-8" in capsys.readouterr().err


def test_a_cat_with_options_on_the_command_line(saved, record, tmp_path, capsys):
    token_for(record, "cat").save(tmp_path / "cat.safetensors")
    arguments = [str(tmp_path / "set"), "--n", "2", "--model", str(saved / "tiny"), "--device", "cpu", "--steps", "1"]
    arguments += ["--tokens", str(tmp_path / "cat.safetensors"), "--size", "16", "--all-classes"]
    arguments += ["--classes", "cat=9", "--option", "negative_prompt=a dog", "eta=0.5"]
    assert command.main(arguments) == 0, capsys.readouterr().err
    dataset = datasets.load(tmp_path / "set")
    assert dataset.classes.ids == {"unlabeled": 0, "cat": 9} and 9 in dataset.labels(0)
    assert dataset.settings["options"] == {"negative_prompt": "a dog", "eta": 0.5}
    assert command.main([*arguments, "--classes", "voc"]) == 2
    assert "'cat' is 9 here, it is 8 there" in capsys.readouterr().err


def test_full_label_maps_and_their_statistics_on_the_command_line(saved, record, tmp_path, capsys):
    ids = np.full((16, 24), 7, np.uint8)
    ids[:, 12:] = CAR
    daamlib.fit_classes([record], [ids], weight_decays=(0.01,)).save(tmp_path / "full.safetensors")
    arguments = [str(tmp_path / "set"), "--n", "2", "--model", str(saved / "tiny"), "--device", "cpu", "--steps", "1"]
    arguments += ["--tokens", str(tmp_path / "full.safetensors"), "--size", "16", "24"]
    assert command.main(arguments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    dataset = datasets.load(tmp_path / "set")
    every = np.stack([dataset.labels(i) for i in dataset.indices])
    assert {*np.unique(every)} <= {7, CAR, 255} and dataset.settings["label_maps"]["margin"] == 0.1
    found = json.loads((tmp_path / "set" / "statistics.json").read_text())
    names = {"road": 7, "car": CAR, "ignored": 255}
    assert found == {name: (every == i).mean() for name, i in names.items() if (every == i).any()}
    assert all(f"{name:16} {share:6.1%} of the pixels" in printed for name, share in found.items())
    assert command.main([*arguments, "--margin", "0.5"]) == 2
    assert "label_maps" in capsys.readouterr().err


def test_by_default_the_command_line_labels_the_bundled_models_streets(tmp_path, monkeypatch):
    jobs = []

    def stop(job, **kind):
        jobs.append(job)
        raise ValueError("stop")

    monkeypatch.setattr(command, "run_shards", stop)
    for more in ([], ["--images-only"], ["--model", "some/model"]):
        assert command.main([str(tmp_path / "set"), "--n", "1", *more]) == 2
    assert [len(job.tokens) for job in jobs] == [1, 0, 0]
    assert jobs[0].tokens[0].endswith("street.safetensors") and jobs[0].labeller().margin == 0.1


WRONG = {
    "no number": ([], "--n"),
    "none": (["--n", "0"], "--n"),
    "three sides": (["--n", "1", "--size", "1", "2", "3"], "size is a side"),
    "no prompts": (["--prompts", "{}/empty.txt"], "empty.txt"),
    "no file": (["--prompts", "{}/nowhere.txt"], "nowhere.txt"),
    "no token": (["--n", "1", "--tokens", "{}/nowhere.safetensors"], "nowhere.safetensors"),
    "a damaged token": (["--n", "1", "--tokens", "{}/empty.txt"], "empty.txt"),
    "a cat": (["--n", "1", "--tokens", "{}/cat.safetensors", "--classes", "voc", "dog=1"], "NAME=ID"),
    "another cat": (["--n", "1", "--tokens", "{}/cat.safetensors", "--classes", "dog=1"], "'cat'"),
    "a threshold": (["--n", "1", "--threshold", "high"], "CLASS=NUMBER"),
    "an address": (["--n", "1", "--address", "auto"], "Ray"),
    "no workers": (["--n", "1", "--workers", "0"], "worker"),
    "no threads": (["--n", "1", "--threads", "0"], "threads"),
    "no steps": (["--n", "1", "--steps", "0"], "steps"),
    "no batch": (["--n", "1", "--batch-size", "0"], "batch_size"),
    "no shards": (["--n", "1", "--shard-size", "0"], "shard size"),
    "too many": (["--n", "1000000000"], "--n"),
    "too many workers": (["--n", "1", "--workers", "100000"], "workers"),
    "too many threads": (["--n", "1", "--threads", "100000"], "threads"),
    "a seed": (["--n", "1", "--seed", "-1"], "seed"),
    "no guidance": (["--n", "1", "--guidance", "nan"], "guidance"),
    "no size": (["--n", "1", "--size", "0"], "size"),
    "no device": (["--n", "1", "--device", "gpu"], "'gpu' is no device"),
    "no such GPU": (["--n", "1", "--device", "cuda:99"], "no device 'cuda:99'"),
    "no option": (["--n", "1", "--option", "blurry"], "NAME=VALUE"),
    "a record": (["--n", "1", "--tokens", "{}/record.safetensors"], "an attention record"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_choices_on_the_command_line(arguments, message, record, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    token_for(record, "cat").save(tmp_path / "cat.safetensors")
    record.save(tmp_path / "record.safetensors")
    assert command.main([str(tmp_path / "set"), *(text.format(tmp_path) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_a_job_is_plain_data(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = job_of(saved, "set")
    assert job.folder == str(tmp_path / "set")
    assert json.dumps(job.tokens)
