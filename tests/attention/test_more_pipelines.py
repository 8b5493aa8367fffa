"""Pipelines that embed their prompts by older names, against the processors of the running model."""

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from helpers import assert_close, capture, naive_maps
from tiny import build, of_components

import daamlib

GRIDS = [(16, 24), (8, 12)]


def test_instruct_pix2pix(device):
    """The passes have three rows: with text and image, with the image alone, with neither."""
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    base = build("sd1", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DConditionModel.from_config({**base.unet.config, "in_channels": 8}).eval().to(device)
    base.register_modules(unet=unet)
    pipe = of_components(StableDiffusionInstructPix2PixPipeline, base)
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures, torch.no_grad():
        pipe("a car", image=image, num_inference_steps=2, output_type="latent")
    (record,) = trace
    assert record.prompt == "a car"
    assert_close(record.daam().values, naive_maps(captures, GRIDS, image=0)[:4])


def test_a_pipeline_that_embeds_no_prompt(fresh, monkeypatch):
    """As LEDITS++ embeds edits alone: its images are made, and a later text is refused by what is missing."""
    pipe = fresh("sd1")
    values = pipe.encode_prompt("a car", pipe.device, 1, True)[:2]
    monkeypatch.setattr(pipe, "encode_prompt", lambda device, **_: values)
    monkeypatch.setattr(type(pipe), "__call__", edit)
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures:
        pipe()
    assert trace[0].prompt is None
    assert_close(trace[0].daam().values, naive_maps(captures, GRIDS, image=1))
    with pytest.raises(ValueError, match="no `encode_prompt` of a prompt"):
        trace[0].ldaam("a tree")


@torch.no_grad()
def edit(self):
    text, negative = self.encode_prompt(self.device)
    sample = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0)).to(self.device)
    self.scheduler.set_timesteps(2)
    for t in self.scheduler.timesteps:
        self.unet(torch.cat([sample] * 2), t, encoder_hidden_states=torch.cat([negative, text]))
    self.maybe_free_model_hooks()
