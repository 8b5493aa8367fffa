"""The training stages, on a handful of scenes and a few steps: each goes on from the last."""

import json
import signal
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline

from daamlib.urban.training import train


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    try:
        train.main()
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.slow
def test_a_model_is_trained_written_and_trained_on(tmp_path, monkeypatch):
    work, out, again = tmp_path / "work", tmp_path / "out", tmp_path / "again"
    # `spawn` starts processes, which would load everything once more for each stage
    spawn = lambda worker, arguments, **_: worker(0, *arguments)  # noqa: E731
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    small = ["--scenes", 48, "--batch", 8]
    what = ["--captions", "dense", "--context", 32, "--text-layers", 0, "--channels", 16, 32, 32]
    run(monkeypatch, "data", "--work", work, *small, *what)
    run(monkeypatch, "vae", "--work", work, *small, "--samples", 8)
    run(monkeypatch, "latents", "--work", work, *small)
    run(monkeypatch, "unet", "--work", work, *small, "--samples", 16)
    run(monkeypatch, "export", "--work", work, "--out", out)

    pipe = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    assert pipe.text_encoder.config.num_hidden_layers == 0
    assert pipe.text_encoder.config.max_position_embeddings == pipe.tokenizer.model_max_length == 32
    assert tuple(pipe.unet.config.block_out_channels) == (16, 32, 32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a car", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)

    run(monkeypatch, "restore", "--work", again, "--out", out, "--captions", "dense")
    assert train.Recipe.read(again) == train.Recipe.read(work)
    (again / "scenes").symlink_to(work / "scenes")
    run(monkeypatch, "latents", "--work", again, *small)
    run(monkeypatch, "unet", "--work", again, *small, "--samples", 24)
    assert torch.load(again / "unet.pt", weights_only=True)["samples"] == 24
    with pytest.raises(ValueError, match="exists"):
        run(monkeypatch, "restore", "--work", again, "--out", out)
    assert json.loads((out / "training.json").read_text())["unet"]["samples"] == 16
