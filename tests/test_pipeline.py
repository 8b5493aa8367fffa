"""Loading pipelines."""

import pytest
import torch
from tiny import GOLDEN

import daamlib
from daamlib import pipeline


def test_a_folder(capfd, device):
    pipe = daamlib.load_pipeline(GOLDEN / "tiny-sd15", device=device)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert (pipe.unet.dtype, pipe.device) == (torch.float32 if device.type == "cpu" else torch.float16, device)
    pipe = pipe.to(torch.float32)
    pipe("a car", height=64, width=64, num_inference_steps=1, output_type="latent")
    assert "it/s" not in capfd.readouterr().err  # no bars


def test_the_precision_is_the_callers(device):
    pipe = daamlib.load_pipeline(str(GOLDEN / "tiny-sd15"), device=device, dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_a_missing_bundled_model_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "BUNDLED", tmp_path / "urban-tiny")
    with pytest.raises(FileNotFoundError, match="urban-tiny"):
        daamlib.load_pipeline()


def test_a_generator_for_each_seed():
    first, second = daamlib.generators([3, 4])
    assert (first.initial_seed(), second.initial_seed()) == (3, 4)
    assert first.device.type == "cpu"
