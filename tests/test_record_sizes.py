"""The tables of docs/size.md: by a function that says what `nbytes` is of tiny models, and as it says today."""

import helpers
import pytest
import record_sizes
import tiny_joint
import tiny_transformers

import daamlib


@pytest.mark.parametrize("family", ["U-Net", "PixArt-Sigma"])
@pytest.mark.parametrize("store", ["queries", "linear", "maps"])
def test_the_size_of_a_record_of_a_tiny_model(sd1_pipe, family, store):
    unet = family == "U-Net"
    pipe = sd1_pipe if unet else tiny_transformers.shared(family)
    with daamlib.trace(pipe, store=store) as trace:
        (helpers if unet else tiny_transformers).generate(pipe, num_inference_steps=3)
    record, denoiser = trace[0], pipe.unet if unet else pipe.transformer
    tokens, latent = len(record.prompt_embeddings.values), (16, 24) if unet else (16, 32)
    sizes = record_sizes.cross_bytes(denoiser, latent, steps=len(record.timesteps), tokens=tokens, item=4)
    assert record.nbytes == sizes[store]
    record.ldaam("car")
    assert record.nbytes == sizes[store] + sizes["linear map"]


@pytest.mark.parametrize("family", ["SD 3", "Flux.1"])
def test_the_size_of_a_joint_models_record(family):
    pipe = tiny_joint.shared(family)
    (record,) = tiny_joint.traced(pipe, num_inference_steps=6)
    tokens = len(record.prompt_embeddings.values)
    assert record.nbytes == record_sizes.joint_bytes(pipe.transformer, (16, 24), tokens=tokens, item=4)


def test_the_page_holds_the_tables():
    assert record_sizes.PAGE.read_text() == record_sizes.page()
