"""Tracing: what is recorded of which call, and that nothing else changes or stays."""

import dataclasses
import gc
import logging
import math
import types
import weakref
from contextlib import nullcontext

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from helpers import assert_close, capture, generate, naive_maps
from peft import LoraConfig
from tiny import BLOCKS

import daamlib
from daamlib.attention import recording
from daamlib.attention.calls import EmptyTraceError
from daamlib.attention.layers import KeyProjection
from daamlib.attention.placement import free_bytes
from daamlib.attention.readers.unet import UNetReader

GRIDS = [(16, 24), (8, 12)]


def hooks(pipe):
    """All hooks of all modules of the pipeline."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [dict(getattr(module, kind)) for part in modules for module in part.modules() for kind in kinds]


def of_record(record):
    """What must agree between two records of the same image."""
    return record.prompt, record.timesteps, [(layer.name, layer.grid, layer.heads) for layer in record.layers]


def assert_same_records(a, b):
    assert of_record(a) == of_record(b)
    for one, other in zip(a.layers, b.layers, strict=True):
        assert torch.equal(one.queries, other.queries)
        assert torch.equal(one.key_weight, other.key_weight)


def raising(step):
    def callback(pipe, number, timestep, tensors):
        if number == step:
            raise RuntimeError("stop")
        return {}

    return callback


# -- the image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"store": "linear"}, {"branch": "unconditional"}, {"middle": True}],
    ids=["queries", "linear", "unconditional", "middle"],
)
def test_the_image_is_the_same_bit_for_bit(pipe, options):
    plain = generate(pipe, output_type="np")
    with daamlib.trace(pipe, **options) as trace:
        traced = generate(pipe, output_type="np")
    assert len(trace) == 1
    assert plain.dtype == np.float32
    assert plain.std() > 0
    assert plain.tobytes() == traced.tobytes()


# -- which layers, which half --------------------------------------------------------------------------------------


def test_the_middle_block_takes_part_only_if_asked(pipe):
    with daamlib.trace(pipe) as without, daamlib.trace(pipe, middle=True) as including:
        generate(pipe)
    names = {layer.name for layer in including[0].layers} - {layer.name for layer in without[0].layers}
    assert names
    assert all(name.startswith("mid_block") for name in names)
    assert not any(layer.name.startswith("mid_block") for layer in without[0].layers)


def test_trap_unconditional_half_stored_by_default(sd1_pipe):
    with daamlib.trace(sd1_pipe) as default, daamlib.trace(sd1_pipe, branch="unconditional") as other:
        with capture(sd1_pipe.unet) as captures:
            generate(sd1_pipe)
    assert (default[0].branch, other[0].branch) == ("conditional", "unconditional")
    rows = default[0].prompt_embeddings.length
    assert_close(default[0].daam().values, naive_maps(captures, GRIDS, image=1)[:rows])
    # the other half's queries with the negative text's keys, or the prompt's, which is what OVAM's default is
    assert not torch.equal(other[0].layers[-1].queries, default[0].layers[-1].queries)
    assert other[0].prompt == "" and other[0].daam().tokens == ("<|startoftext|>", "<|endoftext|>")
    assert_close(other[0].daam().values, naive_maps(captures, GRIDS, image=0)[:2])
    of_prompt = other[0].daam(default[0].prompt).values
    assert (of_prompt - default[0].daam().values).abs().max() > 0.01 * default[0].daam().values.max()


def test_trap_half_the_heads_dropped_when_guidance_is_off(pipe):
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures:
        generate(pipe, guidance_scale=1.0)
    (record,) = trace
    assert_close(record.daam().values, naive_maps(captures, GRIDS, image=0)[: record.prompt_embeddings.length])
    passes = 2 * sum(layer.heads for layer in record.layers)
    totals = record.daam("a tree", padding=False).values.sum(dim=0)
    assert_close(totals, torch.full_like(totals, passes))


def test_trap_last_cross_attention_down_block_lost(pipe):
    with daamlib.trace(pipe) as trace:
        generate(pipe)
    found = {name for name, module in pipe.unet.named_modules() if name.endswith("attn2")}
    names = [layer.name for layer in trace[0].layers]
    assert set(names) == {name for name in found if not name.startswith("mid_block")}
    assert any(name.startswith("down_blocks.1.") for name in names)
    assert len(names) == len(set(names)) == 6


def test_trap_self_attention_map_constant_by_construction(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe)
    assert all(layer.name.endswith(".attn2") for layer in trace[0].layers)
    assert (trace[0].daam("a tree", padding=False).values.std(dim=(1, 2)) > 0).all()


def test_trap_maps_kept_only_if_the_context_length_is_77(sd2_pipe):
    with daamlib.trace(sd2_pipe) as trace:
        generate(sd2_pipe)
    assert len(trace[0].prompt_embeddings.values) == 24
    assert trace[0].daam().values.shape == (7, 16, 24)


def test_the_unconditional_half_needs_guidance(sd1_pipe):
    with daamlib.trace(sd1_pipe, branch="unconditional") as trace:
        with pytest.raises(ValueError, match="needs classifier-free guidance"):
            generate(sd1_pipe, guidance_scale=1.0)
        generate(sd1_pipe)
    assert len(trace) == 1


def without_guidance(pipe, number, timestep, tensors):
    """diffusers' own example of a callback: guidance in the first steps alone."""
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]} if number == 0 else {}


def test_guidance_that_a_callback_ends(sd1_pipe):
    options = {"callback_on_step_end": without_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with daamlib.trace(sd1_pipe) as trace, capture(sd1_pipe.unet) as captures:
        generate(sd1_pipe, ["a car", "a tree"], num_inference_steps=3, **options)
    queries = trace[1].layers[0].queries
    assert queries.shape[0] == 3
    first = captures[trace[1].layers[0].name]
    assert [len(scores) for scores in first.scores] == [4, 2, 2]
    expected = sum(scores[-1].sum(dim=0) for scores in first.scores).T.unflatten(1, (16, 24))
    assert_close(trace[1].select(layers=lambda a: a.name == trace[1].layers[0].name).ldaam().values, expected[:4], 1e-4)
    with daamlib.trace(sd1_pipe, branch="unconditional") as trace:
        generate(sd1_pipe, num_inference_steps=3, **options)
    assert len(trace[0].timesteps) == 1  # the pass that had this half


# -- which images --------------------------------------------------------------------------------------------------


def test_trap_images_of_a_batch_averaged_together(pipe):
    """Each image of a batch has its own record, that of the same image made alone."""
    prompts = ["a car and a tree", "a bicycle"]
    latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    with daamlib.trace(pipe) as trace:
        generate(pipe, prompts, latents=latents)
        for i in range(2):
            generate(pipe, prompts[i], latents=latents[i : i + 1])
    assert [record.prompt for record in trace] == prompts + prompts
    for i in range(2):
        assert_close(trace[i].daam().values, trace[i + 2].daam().values)
    assert (trace[0].ldaam("a car").values - trace[1].ldaam("a car").values).abs().max() > 1


def test_several_images_per_prompt_in_order(pipe):
    prompts = ["a car", "a tree"]
    latents = torch.randn(4, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures:
        images = generate(pipe, prompts, num_images_per_prompt=2, latents=latents)
    assert len(images) == len(trace) == 4
    assert [record.prompt for record in trace] == ["a car", "a car", "a tree", "a tree"]
    for number, record in enumerate(trace):
        assert_close(record.daam().values, naive_maps(captures, GRIDS, image=4 + number)[:4])


def test_several_calls_in_one_trace(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace:
        assert len(trace) == 0
        generate(sd1_pipe, "a car")
        assert len(trace) == 1
        first = trace[0]
        generate(sd1_pipe, ["a tree", "a bicycle"], num_inference_steps=3, height=48, width=32)
        generate(sd1_pipe, "a car")
    assert [record.prompt for record in trace] == ["a car", "a tree", "a bicycle", "a car"]
    assert [len(record.timesteps) for record in trace] == [2, 3, 3, 2]
    assert [record.grid for record in trace] == [(16, 24), (24, 16), (24, 16), (16, 24)]
    assert trace[0] is first
    assert_same_records(trace[0], trace[3])
    assert trace[0].layers[0].key_weight is trace[3].layers[0].key_weight  # kept once
    assert [record.prompt for record in trace[1:3]] == ["a tree", "a bicycle"]
    assert trace[-1] is trace[3]
    assert trace.index(trace[2]) == 2
    assert trace[3] in trace


@pytest.mark.parametrize(
    ("latent", "grids"),
    [((16, 8), [(16, 8), (8, 4)]), ((15, 17), [(15, 17), (8, 9)]), ((7, 13), [(7, 13), (4, 7)])],
)
def test_trap_hw_from_sqrt(pipe, latent, grids):
    """Non-square and odd latents."""
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures:
        generate(pipe, latents=torch.randn(1, 4, *latent), num_inference_steps=1)
    (record,) = trace
    assert record.grid == (grids[1] if hasattr(pipe, "tokenizer_2") else grids[0])
    assert_close(record.daam().values, naive_maps(captures, grids, image=1)[: record.prompt_embeddings.length])


def test_a_layers_grid_comes_from_the_latents():
    assert UNetReader.grid((64, 96), 64 * 96) == (64, 96)
    assert UNetReader.grid((64, 96), 8 * 12) == (8, 12)
    assert UNetReader.grid((15, 17), 8 * 9) == (8, 9)
    assert UNetReader.grid((15, 17), 1) == (1, 1)
    with pytest.raises(ValueError, match="100 positions are no halving of the 16 x 16 latent"):
        UNetReader.grid((16, 16), 100)


@pytest.mark.parametrize("output_type", ["latent", "pil", "np", "pt"])
def test_trap_nothing_captured_with_output_type_latent(sd1_pipe, output_type):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, output_type=output_type)
    assert trace[0].daam()["car"].max() > 0


def test_trap_nothing_captured_with_attention_slicing(sd1_pipe, fresh):
    pipe = fresh("sd1")
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe)
    pipe.enable_attention_slicing(1)
    plain = generate(pipe)
    with daamlib.trace(pipe) as sliced:
        assert torch.equal(generate(pipe), plain)
    assert_close(sliced[0].daam().values, trace[0].daam().values, 1e-4)
    assert_close(sliced[0].ldaam().values, trace[0].ldaam().values, 1e-4)


# -- schedulers ----------------------------------------------------------------------------------------------------

SCHEDULERS = [
    ("DDIMScheduler", {}, 4),
    ("PNDMScheduler", {"skip_prk_steps": True}, 5),  # one timestep twice
    ("HeunDiscreteScheduler", {}, 7),  # all but the first twice
    ("EulerDiscreteScheduler", {}, 4),
    ("EulerAncestralDiscreteScheduler", {}, 4),
    ("DPMSolverMultistepScheduler", {}, 4),
    ("LMSDiscreteScheduler", {}, 4),
    ("UniPCMultistepScheduler", {}, 4),
]


@pytest.mark.parametrize(("name", "options", "passes"), SCHEDULERS, ids=[name for name, _, _ in SCHEDULERS])
def test_schedulers(sd1_pipe, monkeypatch, name, options, passes):
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy", reason="diffusers' LMS integrates with scipy")
    kind = getattr(diffusers, name)
    monkeypatch.setattr(sd1_pipe, "scheduler", kind.from_config(sd1_pipe.scheduler.config, **options))
    called = []
    watch = sd1_pipe.unet.register_forward_pre_hook(lambda module, args: called.append(round(float(args[1]))))
    try:
        plain = generate(sd1_pipe, num_inference_steps=4)
        called.clear()
        with daamlib.trace(sd1_pipe) as trace, daamlib.trace(sd1_pipe, store="linear") as sums:
            traced = generate(sd1_pipe, num_inference_steps=4)
        assert torch.equal(traced, plain)
        assert trace[0].timesteps == sums[0].timesteps == called
        assert len(called) == passes
        with daamlib.trace(sd1_pipe) as again, capture(sd1_pipe.unet) as captures:
            generate(sd1_pipe, num_inference_steps=4)
    finally:
        watch.remove()
    expected = naive_maps(captures, GRIDS, image=1)[:7]
    assert_close(again[0].daam().values, expected)
    assert_close(trace[0].daam().values, expected, 1e-3)  # sampling by other attention kernels
    assert_close(sums[0].ldaam("a tree").values, trace[0].ldaam("a tree").values, 1e-6)


def test_img2img(sd1_pipe):
    pipe = StableDiffusionImg2ImgPipeline(**sd1_pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    options = {"image": image, "strength": 0.5, "num_inference_steps": 4}
    plain = generate(pipe, **options)
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures:
        generate(pipe, **options)
        generate(pipe, ["a car", "a tree"], **{**options, "image": image.repeat(2, 1, 1, 1)})
    with daamlib.trace(pipe) as traced:
        assert torch.equal(generate(pipe, **options), plain)
    assert len(traced[0].timesteps) == 2
    assert [record.prompt for record in trace] == ["a car and a tree", "a car", "a tree"]
    first = {name: _first(captured, 2) for name, captured in captures.items()}
    assert_close(trace[0].daam().values, naive_maps(first, GRIDS, image=1)[:7])


def _first(captured, passes):
    return types.SimpleNamespace(probabilities=captured.probabilities[:passes], scores=captured.scores[:passes])


# -- LoRA, embeddings, precision -----------------------------------------------------------------------------------


def test_lora(fresh):
    pipe = fresh("sd1")
    with daamlib.trace(pipe) as base:
        generate(pipe)
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    plain = generate(pipe)
    with daamlib.trace(pipe) as trace:
        traced = generate(pipe)
        generate(pipe, cross_attention_kwargs={"scale": 0.5})
        generate(pipe, cross_attention_kwargs={"scale": 0.0})
    with daamlib.trace(pipe) as naive, capture(pipe.unet) as captures:
        generate(pipe)
    assert torch.equal(traced, plain)
    assert_close(naive[0].daam().values, naive_maps(captures, GRIDS, image=1)[:7])
    bare, full, half, off = (record.layers[0].key_weight for record in [base[0], *trace])
    assert (full - bare).norm() > 0.1 * bare.norm()
    assert_close(half, (full + bare) / 2)
    assert_close(off, bare)

    maps = trace[0].daam("a tree").values
    pipe.unload_lora_weights()
    assert_close(trace[0].daam("a tree").values, maps)  # the record keeps the keys it was made with
    with daamlib.trace(pipe) as after:
        generate(pipe)
    assert_same_records(after[0], base[0])
    with pytest.raises(ValueError, match="same LoRA"):
        daamlib.require_same_model([base[0], trace[0]])


def test_a_lora_loaded_inside_the_with_is_an_error(fresh):
    pipe = fresh("sd1")
    with daamlib.trace(pipe) as trace:
        generate(pipe)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(ValueError, match="were replaced inside the `with`, as a LoRA does: load it before"):
            generate(pipe)
    assert len(trace) == 1


def test_embeddings_instead_of_a_prompt(sd1_pipe):
    embeddings = sd1_pipe.encode_prompt(["a car", "a tree"], sd1_pipe.device, 1, False)[0]
    negative = sd1_pipe.encode_prompt(["", ""], sd1_pipe.device, 1, False)[0]
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, ["a car", "a tree"])
        generate(sd1_pipe, None, prompt_embeds=embeddings, negative_prompt_embeds=negative)
    assert [record.prompt for record in trace] == ["a car", "a tree", None, None]
    known, unknown = trace[1], trace[3]
    assert unknown.prompt_embeddings.tokens == tuple(str(i) for i in range(77))
    assert torch.equal(unknown.prompt_embeddings.values, embeddings[1])
    maps = unknown.daam()
    assert maps.values.shape == (77, 16, 24)  # which rows are padding, nobody knows
    assert_close(maps.values[:4], known.daam().values)
    assert_close(unknown.ldaam("tree").values, known.ldaam("tree").values)
    with pytest.raises(ValueError, match="'tree' cannot be looked up: the text of these 77 rows is unknown"):
        maps["tree"]


def test_a_prompt_over_the_context_length_is_cut_as_the_pipeline_cuts_it(sd2_pipe):
    with daamlib.trace(sd2_pipe) as trace:
        generate(sd2_pipe, "car " * 30 + "tree")
    maps = trace[0].daam()
    assert len(maps) == 24
    assert maps.tokens == ("<|startoftext|>", *["car"] * 22, "<|endoftext|>")
    with pytest.raises(ValueError, match="'tree' is not in the text"):
        maps["tree"]


def test_an_empty_prompt(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, "")
    assert trace[0].daam().tokens == ("<|startoftext|>", "<|endoftext|>")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines_have_float32_sums(fresh, dtype):
    pipe = fresh("sd1").to(dtype=dtype)
    plain = generate(pipe, num_inference_steps=3)
    with daamlib.trace(pipe) as trace, daamlib.trace(pipe, store="linear") as sums:
        assert torch.equal(generate(pipe, num_inference_steps=3), plain)
    record, linear = trace[0], sums[0]
    for layer, summed in zip(record.layers, linear.layers, strict=True):
        assert (layer.queries.dtype, layer.key_weight.dtype) == (dtype, dtype)
        assert summed.query_sum.dtype == torch.float32
        assert_close(summed.query_sum, layer.queries.double().sum(dim=0).float(), 1e-6)
    exact = [
        dataclasses.replace(layer, queries=layer.queries.float(), to_k=KeyProjection(layer.key_weight.float()))
        for layer in record.layers
    ]
    exact = dataclasses.replace(record, layers=tuple(exact))
    for text in (None, "a tree"):
        assert record.daam(text).values.dtype == record.ldaam(text).values.dtype == torch.float32
        assert_close(record.daam(text).values, exact.daam(text).values)
        assert_close(record.ldaam(text).values, exact.ldaam(text).values)
        assert_close(linear.ldaam(text).values, record.ldaam(text).values)


# -- calls that end early ------------------------------------------------------------------------------------------


def interrupt(pipe, number, timestep, tensors):
    pipe._interrupt = number == 1
    return {}


@pytest.mark.parametrize("store", ["queries", "linear"])
def test_an_interrupted_call_keeps_a_record_of_the_steps_made(sd1_pipe, store):
    with daamlib.trace(sd1_pipe, store=store) as trace:
        images = generate(sd1_pipe, ["a car", "a tree"], num_inference_steps=4, callback_on_step_end=interrupt)
        generate(sd1_pipe, "a bicycle", num_inference_steps=3)
    assert len(images) == 2
    assert [record.prompt for record in trace] == ["a car", "a tree", "a bicycle"]
    assert [len(record.timesteps) for record in trace] == [2, 2, 3]
    with daamlib.trace(sd1_pipe) as whole:
        generate(sd1_pipe, ["a car", "a tree"], num_inference_steps=4)
    expected = whole[1].select(steps=[0, 1])
    assert_close(trace[1].ldaam("a tree").values, expected.ldaam("a tree").values, 1e-6)
    if store == "queries":
        assert torch.equal(trace[1].daam().values, expected.daam().values)


def test_an_aborted_call_leaves_no_record_and_the_next_is_whole(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, "a car")
        with pytest.raises(RuntimeError, match="stop"):
            generate(sd1_pipe, "a bicycle", callback_on_step_end=raising(0))
        with pytest.warns(UserWarning, match="did not end"):
            generate(sd1_pipe, "a tree")
    assert [record.prompt for record in trace] == ["a car", "a tree"]
    with daamlib.trace(sd1_pipe) as alone:
        generate(sd1_pipe, "a tree")
    assert_same_records(trace[1], alone[0])


def test_records_of_earlier_calls_survive_an_exception(sd1_pipe):
    with pytest.raises(RuntimeError, match="stop"), daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, "a car")
        generate(sd1_pipe, "a tree", callback_on_step_end=raising(0))
    assert [record.prompt for record in trace] == ["a car"]
    assert trace[0].daam()["car"].max() > 0


def custom_loop(pipe, trace, text, fails=()):
    """Denoising without the pipeline's call, two steps without guidance; the passes of the numbers `fails` fail."""
    latents = torch.ones(1, 4, 16, 24, device=pipe.device)
    to_k = pipe.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k
    with trace.loop("a tree"):
        for number, t in enumerate(pipe.scheduler.timesteps):
            if number in fails:
                handle = to_k.register_forward_pre_hook(raising_hook)
                with pytest.raises(RuntimeError, match="stop"), torch.no_grad():
                    pipe.unet(latents, t, encoder_hidden_states=text)
                handle.remove()
            with torch.no_grad():
                noise = pipe.unet(latents, t, encoder_hidden_states=text).sample
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents


def raising_hook(module, args):
    raise RuntimeError("stop")


def test_custom_loops(fresh):
    pipe = fresh("sd1")
    pipe.scheduler.set_timesteps(2)
    text = pipe.encode_prompt("a tree", pipe.device, 1, False)[0]
    with daamlib.trace(pipe) as trace:
        custom_loop(pipe, trace, text)
        custom_loop(pipe, trace, text)  # of the same timesteps object
    assert len(trace) == 2
    assert_same_records(*trace)
    assert trace[0].prompt == "a tree"  # embedded before the trace
    assert trace[0].timesteps == pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("store", ["queries", "linear"])
def test_a_pass_that_fails_ends_the_call(fresh, store):
    """Its sums would hold some layers twice if the pass were made again."""
    pipe = fresh("sd1")
    pipe.scheduler.set_timesteps(2)
    text = pipe.encode_prompt("a tree", pipe.device, 1, False)[0]
    with daamlib.trace(pipe, store=store) as trace:
        with pytest.warns(UserWarning, match="a pass of the denoiser failed"):
            custom_loop(pipe, trace, text, fails=[1])
    assert len(trace) == 0


# -- afterwards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("options", [{}, {"store": "linear"}])
def test_nothing_stays_on_the_pipeline(pipe, fails, options):
    generate(pipe)  # the pipeline keeps settings of its latest call itself
    before, attributes, processors = hooks(pipe), dict(vars(pipe)), pipe.unet.attn_processors
    callback = raising(0) if fails else None
    with pytest.raises(RuntimeError, match="stop") if fails else nullcontext():
        with daamlib.trace(pipe, **options):
            assert hooks(pipe) != before
            generate(pipe, callback_on_step_end=callback)
    assert hooks(pipe) == before
    assert vars(pipe).keys() == attributes.keys()
    assert not {"encode_prompt", "maybe_free_model_hooks"} & vars(pipe).keys()
    assert pipe.unet.attn_processors == processors


def test_nothing_stays_if_opening_the_trace_fails(sd1_pipe, monkeypatch):
    before = hooks(sd1_pipe)
    monkeypatch.setattr(sd1_pipe.unet, "register_forward_hook", None)
    with pytest.raises(TypeError), daamlib.trace(sd1_pipe):
        pass
    assert hooks(sd1_pipe) == before
    assert "encode_prompt" not in vars(sd1_pipe)


def test_trap_class_level_patching_with_no_undo(sd1_pipe, sd2_pipe):
    classes = (type(sd1_pipe), type(sd1_pipe.unet), type(sd1_pipe.scheduler), Attention, torch.nn.Linear)
    before = [dict(vars(kind)) for kind in classes]
    with daamlib.trace(sd1_pipe) as trace:
        assert [dict(vars(kind)) for kind in classes] == before
        generate(sd2_pipe)  # another pipeline is not traced
        generate(sd1_pipe)
    assert [dict(vars(kind)) for kind in classes] == before
    assert len(trace) == 1
    assert trace[0].pipe is sd1_pipe


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_keeps_activations_alive(sd1_pipe, fails):
    outputs = []

    def watch(module, args, output):
        outputs.append(weakref.ref(output))

    watched = (".to_q", "attn2", "resnets.0")
    modules = [module for name, module in sd1_pipe.unet.named_modules() if name.endswith(watched)]
    handles = [module.register_forward_hook(watch) for module in modules]
    handles.append(sd1_pipe.unet.register_forward_pre_hook(lambda module, args: outputs.append(weakref.ref(args[0]))))
    try:
        with pytest.warns(UserWarning, match="did not end") if fails else nullcontext():
            with daamlib.trace(sd1_pipe) as trace, daamlib.trace(sd1_pipe, store="linear") as sums:
                generate(sd1_pipe, "a tree")
                if fails:
                    with pytest.raises(RuntimeError, match="stop"):
                        generate(sd1_pipe, ["a car", "a tree"], callback_on_step_end=raising(0))
    finally:
        for handle in handles:
            handle.remove()
    gc.collect()
    assert len(trace) == len(sums) == 1
    assert len(outputs) > 50
    assert not [output for output in outputs if output() is not None]
    assert trace.bytes_needed == (0 if fails else trace[0].nbytes)  # no half-made call


def test_a_record_holds_nothing_of_the_rest_of_its_batch(sd1_pipe):
    """So the other records of a call, and the half of the negative text, can be freed."""
    with daamlib.trace(sd1_pipe, self_attention=True) as trace, daamlib.trace(sd1_pipe, store="linear") as sums:
        generate(sd1_pipe, ["a car", "a tree"])
    tensors = [layer.queries for layer in trace[0].layers] + [layer.query_sum for layer in sums[0].layers]
    for tensor in [*tensors, trace[0].prompt_embeddings.values]:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_traces_nest(sd1_pipe):
    before = hooks(sd1_pipe)
    with daamlib.trace(sd1_pipe) as outer:
        generate(sd1_pipe, "a car")
        with daamlib.trace(sd1_pipe) as inner:
            generate(sd1_pipe, "a tree")
        with pytest.raises(RuntimeError, match="stop"), daamlib.trace(sd1_pipe, store="linear"):
            raise RuntimeError("stop")
        generate(sd1_pipe, "a bicycle")
    assert [record.prompt for record in outer] == ["a car", "a tree", "a bicycle"]
    assert [record.prompt for record in inner] == ["a tree"]
    assert_same_records(outer[1], inner[0])
    assert hooks(sd1_pipe) == before
    assert "encode_prompt" not in vars(sd1_pipe)


def test_a_pipelines_own_override_is_restored(fresh):
    pipe = fresh("sd1")
    mine = lambda *args, **kwargs: type(pipe).encode_prompt(pipe, *args, **kwargs)  # noqa: E731
    pipe.encode_prompt = mine
    with daamlib.trace(pipe) as trace:
        generate(pipe)
    assert vars(pipe)["encode_prompt"] is mine
    assert len(trace) == 1


def test_texts_may_be_embedded_inside_the_with(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, "a car")
        maps = trace[0].daam("a tree").values
        generate(sd1_pipe, "a bicycle")
    assert [record.prompt for record in trace] == ["a car", "a bicycle"]
    assert torch.equal(trace[0].daam("a tree").values, maps)


# -- memory --------------------------------------------------------------------------------------------------------


def test_a_call_that_would_take_too_much_is_refused_in_its_first_step(sd1_pipe):
    steps, before, plain = [], hooks(sd1_pipe), generate(sd1_pipe, output_type="np")
    note = {"callback_on_step_end": lambda pipe, number, *_: steps.append(number) or {}}
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, ["a car", "a tree"], num_inference_steps=4)
    needed = trace.bytes_needed
    message = r'2 images of 4 steps, take .* GiB of max_bytes: give store="maps" or "linear".*half.*store_device'
    with pytest.raises(ValueError, match=message), daamlib.trace(sd1_pipe, max_bytes=needed - 1) as trace:
        generate(sd1_pipe, ["a car", "a tree"], num_inference_steps=4, **note)
    assert steps == [] and len(trace) == trace.bytes_needed == 0
    assert hooks(sd1_pipe) == before
    assert generate(sd1_pipe, output_type="np").tobytes() == plain.tobytes()
    for options in ({"max_bytes": needed}, {"max_bytes": needed - 1, "store": "linear"}, {"max_bytes": None}):
        with daamlib.trace(sd1_pipe, **options) as trace:
            generate(sd1_pipe, ["a car", "a tree"], num_inference_steps=4)
        assert len(trace) == 2


def test_the_self_attention_counts_from_the_first_step(sd1_pipe):
    options = {"num_inference_steps": 8, "guidance_scale": 1.0}
    with daamlib.trace(sd1_pipe, self_attention=True) as trace:
        generate(sd1_pipe, **options)
    with pytest.raises(ValueError, match="8 steps"):
        with daamlib.trace(sd1_pipe, self_attention=True, max_bytes=trace.bytes_needed - 1):
            generate(sd1_pipe, **options)


def test_the_default_is_a_share_of_what_is_free_where_records_are_stored(sd1_pipe, monkeypatch):
    asked, free = [], {"bytes": 2**40}
    monkeypatch.setattr(recording, "free_bytes", lambda device: asked.append(device) or free["bytes"])
    with daamlib.trace(sd1_pipe, store_device="cpu") as trace:
        generate(sd1_pipe)
        free["bytes"] = 1.9 * trace.bytes_needed
        with pytest.raises(ValueError, match="max_bytes"):
            generate(sd1_pipe)
    assert len(trace) == 1 and asked == [torch.device("cpu")] * 2
    assert 2**20 < free_bytes(torch.device("cpu")) and free_bytes(torch.device("meta")) == math.inf
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="max_bytes"), daamlib.trace(sd1_pipe, max_bytes=wrong):
            pass


def test_a_loop_of_unknown_length_loses_its_record_alone(sd1_pipe):
    text, _ = sd1_pipe.encode_prompt("a tree", sd1_pipe.device, 1, do_classifier_free_guidance=False)
    sd1_pipe.scheduler.set_timesteps(3)
    with daamlib.trace(sd1_pipe) as trace:
        latents = custom_loop(sd1_pipe, trace, text)
    with pytest.warns(UserWarning, match="1 images of 3 steps, take"):
        with daamlib.trace(sd1_pipe, max_bytes=trace.bytes_needed - 1) as short:
            assert torch.equal(custom_loop(sd1_pipe, short, text), latents)
    assert len(trace) == 1 and len(short) == 0


def test_linear_sums_take_the_same_bytes_at_any_number_of_steps(sd1_pipe):
    small = {"height": 16, "width": 16, "guidance_scale": 1.0}
    with daamlib.trace(sd1_pipe, store="linear") as trace:
        generate(sd1_pipe, num_inference_steps=50, **small)
        generate(sd1_pipe, num_inference_steps=5, **small)
    assert [len(record.timesteps) for record in trace] == [50, 5]
    assert (
        trace[0].nbytes
        == trace[1].nbytes
        == 4 * sum(layer.grid[0] * layer.grid[1] * len(layer.key_weight) for layer in trace[0].layers)
    )
    held = [sum(layer.query_sum.untyped_storage().nbytes() for layer in record.layers) for record in trace]
    assert held == [trace[0].nbytes] * 2


def test_queries_state_what_they_need_from_the_first_step(sd1_pipe, caplog):
    stated = []

    def note(pipe, number, timestep, tensors):
        stated.append(trace.bytes_needed)
        return {}

    with caplog.at_level(logging.INFO, "daamlib"), daamlib.trace(sd1_pipe) as trace:
        assert trace.bytes_needed == 0
        generate(sd1_pipe, ["a car", "a tree"], num_inference_steps=3, callback_on_step_end=note)
    layers = trace[0].layers
    formula = 3 * sum(layer.grid[0] * layer.grid[1] * len(layer.key_weight) for layer in layers) * 4
    assert stated == [2 * formula] * 3
    assert trace[0].nbytes == trace[1].nbytes == formula
    assert f"queries of 2 images: {2 * formula / 2**20:.1f} MiB" in caplog.text
    assert repr(trace).startswith("Trace(2 records, ")


# -- bad input -----------------------------------------------------------------------------------------------------


def test_a_pipeline_without_a_unet():
    pipe = types.SimpleNamespace(transformer=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="got SimpleNamespace with a Linear, which no reader knows"):
        with daamlib.trace(pipe):
            pass
    with pytest.raises(TypeError, match="got str: DAAM reads"), daamlib.trace("a model"):
        pass


def test_a_unet_without_cross_attention():
    unet = UNet2DConditionModel(
        **{**BLOCKS, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
        mid_block_type=None,
        cross_attention_dim=24,
    )
    pipe = types.SimpleNamespace(unet=unet)
    with pytest.raises(ValueError, match="UNet2DConditionModel of this pipeline has no cross-attention"):
        with daamlib.trace(pipe):
            pass
    assert vars(pipe) == {"unet": unet}


@pytest.mark.parametrize(("name", "value"), [("branch", "both"), ("branch", True), ("store", "sums"), ("store", None)])
def test_unknown_options(sd1_pipe, name, value):
    before = hooks(sd1_pipe)
    with pytest.raises(ValueError, match=f"{name} must be one of \\('.*'\\), got {value!r}"):
        with daamlib.trace(sd1_pipe, **{name: value}):
            pass
    assert hooks(sd1_pipe) == before


def test_a_processor_that_makes_no_queries_is_an_error(sd1_pipe, monkeypatch):
    attention = sd1_pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    monkeypatch.setattr(attention, "processor", lambda attn, hidden_states, *_, **__: hidden_states)
    with daamlib.trace(sd1_pipe) as trace:
        with pytest.raises(ValueError, match=r"no queries through `to_q`.*\['down_blocks.1.attentions.0"):
            generate(sd1_pipe)
    assert len(trace) == 0


@pytest.mark.parametrize("error", [IndexError, ValueError, EmptyTraceError])
def test_an_empty_trace(sd1_pipe, error):
    with daamlib.trace(sd1_pipe) as trace:
        pass
    with pytest.raises(error, match="the trace is empty"):
        trace[0]
    assert len(trace) == 0
    assert list(trace) == trace[:] == []
    assert trace.bytes_needed == 0
    assert repr(trace) == "Trace(0 records, 0.0 MiB in the latest call)"


def test_a_record_that_is_not_there(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe)
    for number in (1, -2):
        with pytest.raises(EmptyTraceError, match=f"no record {number}: the trace holds 1"):
            trace[number]
