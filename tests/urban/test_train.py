"""The training stages, on a handful of scenes and a few steps: each goes on from the last."""

import argparse
import json
import signal

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from daamlib.pipeline import BUNDLED
from training import networks, run, train, trainer


def call(main, *arguments):
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    try:
        main([*map(str, arguments), "--device", "cpu"])
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, handler)


SMALL = ["--scenes", 48, "--batch", 8]
RECIPE = ["--context", 32, "--text-layers", 0, "--channels", 16, 32, 32]
RECIPE += ["--attention-levels", 2, "--null-padding", 0.5]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is here")
def test_a_device_that_is_not_here_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cuda"):
        trainer.Trainer(torch.nn.Linear(1, 1), tmp_path / "x.pt", argparse.Namespace(device="cuda"))


@pytest.mark.slow
def test_a_model_is_trained_written_and_trained_on(tmp_path):
    work, out, again = tmp_path / "work", tmp_path / "out", tmp_path / "again"
    call(train.main, "data", "--work", work, *SMALL, *RECIPE)
    call(train.main, "vae", "--work", work, *SMALL, "--samples", 8)
    call(train.main, "latents", "--work", work, *SMALL)
    call(train.main, "unet", "--work", work, *SMALL, "--samples", 16, "--null-small-words", "--least-weight", 0.3)
    call(train.main, "export", "--work", work, "--out", out)

    pipe = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    assert pipe.text_encoder.config.num_hidden_layers == 0
    assert pipe.text_encoder.config.max_position_embeddings == pipe.tokenizer.model_max_length == 32
    assert tuple(pipe.unet.config.block_out_channels) == (16, 32, 32)
    assert [("CrossAttn" in kind) for kind in pipe.unet.config.down_block_types] == [True, True, False]
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a car", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)

    call(train.main, "restore", "--work", again, "--out", out, "--null-padding", 0.5)
    assert train.Recipe.read(again) == train.Recipe.read(work)
    (again / "scenes").symlink_to(work / "scenes")
    call(train.main, "latents", "--work", again, *SMALL)
    # two processes, each with its half of a step's 16 samples
    call(train.main, "unet", "--work", again, *SMALL, "--samples", 48, "--processes", 2)
    state = torch.load(again / "unet.pt", weights_only=True)
    assert state["samples"] == 48
    assert any((state["module"][name] != weight).any() for name, weight in state["ema"].items())
    with pytest.raises(ValueError, match="exists"):
        call(train.main, "restore", "--work", again, "--out", out, "--null-padding", 0.5)
    with pytest.raises(ValueError, match="recipe"):
        call(train.main, "data", "--work", again, *SMALL)
    assert json.loads((out / "training.json").read_text())["unet"]["samples"] == 16


def test_a_model_goes_on_in_another_world_with_the_words_that_it_knows(tmp_path):
    call(train.main, "data", "--work", tmp_path, "--scenes", 400, "--world", "wide")
    call(train.main, "restore", "--work", tmp_path, "--out", BUNDLED, "--forget", "sky")
    old, new = (
        CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer"),
        CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
    )
    weights = CLIPTextModel.from_pretrained(BUNDLED / "text_encoder", dtype=torch.float32).get_input_embeddings().weight
    assert "grass</w>" in new.get_vocab() and "grass</w>" not in old.get_vocab()
    state = torch.load(tmp_path / "unet.pt", weights_only=True)["module"]
    denoiser = train.Recipe.read(tmp_path).denoiser(new)
    denoiser.load_state_dict(state)
    rows = denoiser.text_encoder.get_input_embeddings().weight
    for word in ("road", "buildings", "person"):
        ids = [tokenizer.get_vocab()[f"{word}</w>"] for tokenizer in (old, new)]
        assert torch.equal(rows[ids[1]], weights[ids[0]])
    assert torch.equal(rows[new.eos_token_id], weights[old.eos_token_id])
    assert not torch.equal(rows[new.get_vocab()["sky</w>"]], weights[old.get_vocab()["sky</w>"]])
    for word in ("grass", "sky"):
        assert 0.7 < rows[new.get_vocab()[f"{word}</w>"]].norm() / weights[old.get_vocab()["road</w>"]].norm() < 1.4


def test_end_padding_and_small_words_are_silent():
    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")
    ids = networks.tokenize(tokenizer, ["a red car, the sky", ""])
    small = torch.tensor([tokenizer.get_vocab()[f"{word}</w>"] for word in ("a", "the", ",")])
    silent = train.find_silent(ids, tokenizer.eos_token_id, small)
    assert silent[0, :7].tolist() == [False, True, False, False, True, True, False] and silent[0, 7:].all()
    assert silent[1].tolist() == [False] + [True] * 31
    assert train.find_silent(ids, tokenizer.eos_token_id, small[:0])[0].sum() == 32 - 7


def test_one_command_trains_within_its_minutes_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD", "200KB")
    options = ["--work", tmp_path / "work", "--out", tmp_path / "out", "--size", 64, *SMALL, *RECIPE]
    call(run.main, *options, "--samples", 8)
    first = json.loads((tmp_path / "out" / "training.json").read_text())
    assert first["vae"]["samples"] == first["unet"]["samples"] == 8
    call(run.main, *options, "--samples", 24)  # the autoencoder stays what its latents were made with
    spent = json.loads((tmp_path / "out" / "training.json").read_text())
    assert spent["vae"] == first["vae"] and spent["unet"]["samples"] == 24
    call(run.main, *options, "--minutes", 0)  # no time for a step: all is written all the same
    assert json.loads((tmp_path / "out" / "training.json").read_text())["unet"]["samples"] == 24

    shards = sorted((tmp_path / "out" / "unet").glob("*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 250_000 for shard in shards)
    assert all(value.dtype == torch.float16 for shard in shards for value in load_file(shard).values())
    weights = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32).unet.state_dict()
    averaged = torch.load(tmp_path / "work" / "unet.pt", weights_only=True)["ema"]
    for name, value in weights.items():
        assert torch.equal(value, averaged[f"unet.{name}"].half().float()), name


def test_one_command_takes_the_shipped_autoencoder(tmp_path):
    options = ["--work", tmp_path / "work", "--out", tmp_path / "out", "--size", 64, *SMALL, *RECIPE]
    call(run.main, *options, "--samples", 8, "--vae", BUNDLED)
    found, shipped = (AutoencoderKL.from_pretrained(path / "vae").state_dict() for path in (tmp_path / "out", BUNDLED))
    assert all(torch.equal(value, shipped[name]) for name, value in found.items())
