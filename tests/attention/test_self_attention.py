"""Propagation along the image's self-attention, against the explicit matrix."""

import dataclasses

import pytest
import torch
from helpers import assert_close, capture, generate

import daamlib
from daamlib import AttentionRecord, HeatMaps


def last_of_up_blocks(pipe):
    """The self-attentions that are read: the last one of each up transformer."""
    names = [name for name, _ in pipe.unet.named_modules() if name.startswith("up_blocks") and name.endswith("attn1")]
    last = {name.split(".transformer_blocks")[0]: name for name in names}
    return list(last.values())


def traced(pipe, store="queries", steps=4, **options):
    """A record of the second image of a batch, and the explicit mean matrix A (n, n) of it."""
    with capture(pipe.unet, last_of_up_blocks(pipe)) as explicit:
        with daamlib.trace(pipe, store=store, self_attention=True) as trace:
            generate(pipe, ["a car", "a tree"], num_inference_steps=steps, **options)
    record = trace[1]
    positions = record.self_attention.grid[0] * record.self_attention.grid[1]
    late = [i for i, t in enumerate(record.timesteps) if t <= 500] or [len(record.timesteps) - 1]
    matrices = [
        each.probabilities[i][3].mean(dim=0)  # of the conditional half the second image
        for each in explicit.values()
        if each.probabilities[0].shape[-1] == positions
        for i in late
    ]
    return record, torch.stack(matrices).mean(dim=0)


@pytest.fixture(scope="module", params=["queries", "linear", "maps"])
def of_image(request, sd1_pipe):
    return traced(sd1_pipe, request.param)


def test_refined_maps_are_those_of_the_explicit_matrix(of_image):
    record, matrix = of_image
    assert_close(matrix.sum(dim=1), torch.ones(len(matrix), device=matrix.device), 1e-5)
    maps = record.ldaam("a car and a tree")
    expected = maps.values
    for iterations in (1, 2, 5):
        expected = maps.values.flatten(1)
        for _ in range(iterations):
            expected = expected @ matrix.T
        refined = record.refine(maps, iterations=iterations)
        assert refined.tokens == maps.tokens and refined.words == maps.words
        assert_close(refined.values.flatten(1), expected, 1e-5)


@pytest.mark.supports(feature="self-attention")
@pytest.mark.parametrize("store", ["queries", "linear"])
def test_every_family(pipe, store):
    record, matrix = traced(pipe, store)
    maps = record.ldaam("a tree")
    assert record.self_attention.grid == record.grid
    assert_close(record.refine(maps).values.flatten(1), maps.values.flatten(1) @ matrix.T, 1e-5)


def test_a_pass_without_a_late_one_is_better_than_none(sd1_pipe):
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    noisy = daamlib.trace_image(sd1_pipe, image, timesteps=(900, 700), self_attention=True)
    with capture(sd1_pipe.unet, last_of_up_blocks(sd1_pipe)) as explicit:
        daamlib.trace_image(sd1_pipe, image, timesteps=(900, 700))
    second = [each.probabilities[1][0] for each in explicit.values()]  # (head, n, n)
    last = [matrices.mean(dim=0) for matrices in second if matrices.shape[-1] == 384]
    maps = noisy.ldaam("a tree")
    expected = maps.values.flatten(1) @ torch.stack(last).mean(dim=0).T
    assert_close(noisy.refine(maps).values.flatten(1), expected, 1e-5)


def test_many_passes_are_thinned(sd1_pipe):
    with daamlib.trace(sd1_pipe, self_attention=True) as few:
        with daamlib.trace(sd1_pipe, store="linear", self_attention=True) as sums:
            generate(sd1_pipe, num_inference_steps=40)
    assert len(few[0].self_attention.queries) == 2 * 5  # layers, and every fourth of 20 late passes
    assert sums[0].self_attention.mean.shape == (384, 384)


def test_constant_maps_stay_and_values_keep_their_range(of_image):
    record, _ = of_image
    values = torch.stack([torch.full(record.grid, 3.0), torch.rand(record.grid)]).to(record.device)
    refined = record.refine(HeatMaps.unnamed(values)).values
    assert_close(refined[0], values[0], 1e-5)
    assert values[1].min() <= refined[1].min() and refined[1].max() <= values[1].max()


def test_refining_is_differentiable(of_image):
    record, _ = of_image
    embeddings = record.text_embeddings("a tree", padding=False).values.clone().requires_grad_()
    record.refine(record.ldaam_from(embeddings)).values.sum().backward()
    assert embeddings.grad.abs().max() > 0


def test_the_image_is_the_same_bit_for_bit(pipe):
    plain = generate(pipe, output_type="np")
    with daamlib.trace(pipe, self_attention=True):
        assert plain.tobytes() == generate(pipe, output_type="np").tobytes()


def test_it_is_saved_with_the_record(of_image, tmp_path):
    record, _ = of_image
    record.save(tmp_path / "a.safetensors")
    back = AttentionRecord.load(tmp_path / "a.safetensors", device=record.device)
    maps = record.daam() if record.layers[0].queries is not None else record.ldaam()
    assert back.nbytes == dataclasses.replace(record).nbytes > dataclasses.replace(record, self_attention=None).nbytes
    assert torch.equal(back.refine(maps).values, record.refine(maps).values)


def test_real_images(sd1_pipe):
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    record = daamlib.trace_image(sd1_pipe, image, prompt="a car", timesteps=(20, 300, 700), self_attention=True)
    assert record.refine(record.daam())["car"].shape == (16, 24)


def test_wrong_input(of_image, sd1_pipe):
    record, _ = of_image
    maps = record.ldaam("a tree")
    with pytest.raises(ValueError, match="grid"):
        record.refine(maps.resize(8, 12))
    with pytest.raises(ValueError, match="iterations"):
        record.refine(maps, iterations=0)
    with pytest.raises(ValueError, match="self_attention=True"):
        dataclasses.replace(record, self_attention=None).refine(maps)
