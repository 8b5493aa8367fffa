"""Records of real images."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from helpers import assert_close, capture, generate, naive_maps
from PIL import Image

import daamlib

GRIDS = [(16, 24), (8, 12)]


@pytest.fixture(scope="module")
def array():
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


@pytest.mark.supports(feature="real images")
def test_the_record_is_that_of_the_noised_image(pipe, array):
    """Against the formula, z_t = sqrt(a_t) z + sqrt(1 - a_t) e, with one pass each through a capturing processor."""
    with capture(pipe.unet) as captures:
        record = daamlib.trace_image(pipe, array, prompt="a car and a tree", timesteps=(50, 600), seed=3)
    assert record.prompt == "a car and a tree"
    assert record.timesteps == [50, 600]
    assert record.branch == "conditional"
    assert_close(record.daam().values, naive_maps(captures, GRIDS, image=0)[:7])
    assert_close(record.ldaam().values, naive_maps(captures, GRIDS, image=0, kind="scores")[:7], 1e-4)

    pixels = torch.from_numpy(array).permute(2, 0, 1)[None].to(pipe.device).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        z = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    expected = []
    for t in (50, 600):
        a = pipe.scheduler.alphas_cumprod[t]
        expected.append(a.sqrt() * z + (1 - a).sqrt() * torch.randn(z.shape, generator=generator).to(z))
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append((args[0], int(args[1]))))
    try:
        daamlib.trace_image(pipe, array, timesteps=(50, 600), seed=3)
    finally:
        handle.remove()
    assert [t for _, t in seen] == [50, 600]
    for (latents, _), wanted in zip(seen, expected, strict=True):
        assert_close(latents, wanted)


def test_images_of_every_kind_are_the_same_image(sd1_pipe, array):
    image = Image.fromarray(array)
    reference = daamlib.trace_image(sd1_pipe, image).daam("a car").values
    for other in (array, image.convert("RGBA"), torch.from_numpy(array).permute(2, 0, 1) / 255):
        assert_close(daamlib.trace_image(sd1_pipe, other).daam("a car").values, reference)
    assert daamlib.trace_image(sd1_pipe, image.convert("L")).grid == (16, 24)


def test_defaults(sd1_pipe, array):
    record = daamlib.trace_image(sd1_pipe, array)
    assert record.prompt == ""
    assert record.timesteps == [100, 300, 500]
    assert record.grid == (16, 24)
    assert record.daam().tokens == ("<|startoftext|>", "<|endoftext|>")


def test_the_seed_decides(sd1_pipe, array):
    first, again, other = (daamlib.trace_image(sd1_pipe, array, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.layers[0].queries, again.layers[0].queries)
    assert not torch.equal(first.layers[0].queries, other.layers[0].queries)


def test_a_timestep_given_twice_has_two_noises(sd1_pipe, array):
    record = daamlib.trace_image(sd1_pipe, array, timesteps=[300, 300])
    assert record.timesteps == [300, 300]
    assert not torch.equal(*record.layers[0].queries)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDPMScheduler])
def test_the_sampler_does_not_matter(sd1_pipe, array, monkeypatch, kind):
    expected = daamlib.trace_image(sd1_pipe, array).daam("a car").values
    monkeypatch.setattr(sd1_pipe, "scheduler", kind.from_config(sd1_pipe.scheduler.config))
    assert_close(daamlib.trace_image(sd1_pipe, array).daam("a car").values, expected)


def test_earlier_calls_of_the_pipeline_do_not_matter(fresh, array):
    pipe = fresh("sd1")
    first = daamlib.trace_image(pipe, array, timesteps=(100, 200, 300))
    generate(pipe, ["a car", "a tree"], num_inference_steps=2)  # leaves guidance on, and another number of steps
    again = daamlib.trace_image(pipe, array, timesteps=(100, 200, 300))
    assert again.timesteps == first.timesteps == [100, 200, 300]
    assert torch.equal(first.layers[0].queries, again.layers[0].queries)


def test_real_and_generated_images_share_a_model(sd1_pipe, array):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe)
    daamlib.require_same_model([trace[0], daamlib.trace_image(sd1_pipe, array)])


def test_half_precision(fresh, array):
    pipe = fresh("sd1").to(dtype=torch.bfloat16)
    record = daamlib.trace_image(pipe, array)
    assert record.layers[0].queries.dtype == torch.bfloat16
    assert record.daam("a car").values.dtype == torch.float32


@pytest.mark.parametrize("fails", [False, True])
def test_a_vae_that_overflows_in_half_precision(fresh, array, monkeypatch, fails):
    """SDXL's leaves the range of float16, and says so in its config."""
    pipe = fresh("sdxl")
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(3e5)  # float16 ends at 65504
    expected = daamlib.trace_image(pipe, array)
    pipe.unet.half(), pipe.vae.half(), pipe.text_encoder.half(), pipe.text_encoder_2.half()
    before = {name: (weight, weight.clone()) for name, weight in pipe.vae.named_parameters()}
    encode = pipe.vae.encode
    with monkeypatch.context() as patch:
        if fails:
            patch.setattr(pipe.vae, "encode", lambda pixels: encode(pixels[:, :2]))
        with pytest.raises(RuntimeError, match="to have 3 channels") if fails else nullcontext():
            record = daamlib.trace_image(pipe, array)
    for name, weight in pipe.vae.named_parameters():
        assert weight is before[name][0] and torch.equal(weight, before[name][1]), name
    if not fails:
        assert record.layers[0].queries.dtype == torch.float16
        assert_close(record.daam().values, expected.daam().values, 0.05)
        pipe.vae.register_to_config(force_upcast=False)
        with pytest.raises(
            ValueError, match="attn2 computes NaN or infinite values: the model overflows in torch.float16"
        ):
            daamlib.trace_image(pipe, array).daam()


def test_nothing_stays_on_the_pipeline_and_its_input(sd1_pipe, array):
    before, attributes, state = array.copy(), set(vars(sd1_pipe)), torch.get_rng_state()
    record = daamlib.trace_image(sd1_pipe, array)
    assert np.array_equal(array, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vars(sd1_pipe)) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sd1_pipe.unet.modules())
    assert not record.layers[0].queries.requires_grad


@pytest.mark.parametrize("timesteps", [(), (-1,), (100, 1000)])
def test_timesteps_outside_the_schedule(sd1_pipe, array, timesteps):
    with pytest.raises(ValueError, match="timesteps must be one or more of 0 ... 999, got"):
        daamlib.trace_image(sd1_pipe, array, timesteps=timesteps)


def test_sizes_that_do_not_fit_the_vae(sd1_pipe):
    for image in (np.zeros((31, 48, 3), np.uint8), Image.new("RGB", (48, 31)), torch.zeros(3, 31, 48)):
        with pytest.raises(ValueError, match="image is 31 x 48 px; both must be multiples of 2 for this"):
            daamlib.trace_image(sd1_pipe, image)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 48), np.uint8),
        np.zeros((32, 48, 3), np.float32),
        np.zeros((32, 48, 4), np.uint8),
        torch.zeros(32, 48, 3),
        torch.zeros(3, 32, 48, dtype=torch.uint8),
        "image.png",
        None,
    ],
    ids=lambda image: str(getattr(image, "shape", image)),
)
def test_images_of_another_kind(sd1_pipe, image):
    with pytest.raises(ValueError, match=r"expected a PIL image, an \(H, W, 3\) uint8 array or a \(3, H, W\) float"):
        daamlib.trace_image(sd1_pipe, image)


def test_a_pipeline_without_cross_attention_is_refused_as_by_trace(array):
    with pytest.raises(TypeError, match="pipeline with a U-Net"):
        daamlib.trace_image("a model", array)
