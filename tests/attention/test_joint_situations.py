"""Calls of joint models' pipelines that once gave a wrong map, or lost an image, without a word."""

import functools
import gc
import itertools
import weakref

import pytest
import tiny_joint
import torch
from diffusers import AutoencoderTiny
from diffusers.modular_pipelines import FluxAutoBlocks
from helpers import assert_close
from peft import LoraConfig
from tiny_joint import explicit, generate, shared, traced

import daamlib
from daamlib.attention.joint.maps import JointAttention, Sums, prompt_daam


def add_lora(module, *targets):
    torch.manual_seed(0)
    module.add_adapter(LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))


def embedded(pipe, text):
    """The arguments of a pass that a text gives, and of a call."""
    encoded = pipe.encode_prompt(text, None, max_sequence_length=32)
    return {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[1]}


def flux_pass(pipe, latents, ids, level=0.5):
    text = pipe.encode_prompt("a car", None, max_sequence_length=32)
    return pipe.transformer(
        hidden_states=latents, timestep=torch.tensor([level]), guidance=torch.tensor([3.5]), img_ids=ids,
        encoder_hidden_states=text[0], pooled_projections=text[1], txt_ids=text[2],
    ).sample  # fmt: skip


def positions(height, width, image=0):
    return torch.tensor(
        [[image, row, column] for row, column in itertools.product(range(height), range(width))]
    ).float()


# -- the keys of that pass, and later texts --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["SD 3", "Flux.1"])
def test_a_prompt_that_a_callback_swaps_leaves_no_record(family):
    pipe = tiny_joint.build(family)
    options = {"do_classifier_free_guidance": False, "prompt_3": None} if family == "SD 3" else {}

    def swap(pipe, step, *_):
        if step != 1:
            return {}
        return {"prompt_embeds": pipe.encode_prompt("a road", None, max_sequence_length=32, **options)[0]}

    with pytest.warns(UserWarning, match="no record: the text changed between passes"):
        records = traced(
            pipe, num_inference_steps=4, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        )
    assert not records


@pytest.mark.parametrize("changes", [False, True])
def test_the_passes_of_a_custom_loop_are_read_as_they_were(changes):
    pipe = tiny_joint.build("Flux.1")
    add_lora(pipe.transformer, "to_q", "to_v")
    pipe.scheduler.set_timesteps(6, mu=1.0)
    latents = torch.randn(1, 96, 16, generator=torch.Generator().manual_seed(0))

    def loop():
        for number, level in enumerate(pipe.scheduler.sigmas[:-1]):
            pipe.transformer.set_adapters("default", weights=1.0 - 0.1 * number * changes)
            flux_pass(pipe, latents * level, positions(8, 12), level)

    with torch.no_grad(), explicit(pipe, "Flux.1") as attention:
        loop()
    expected = sum(call["probabilities"][0] for number in (0, 2, 3, 5) for call in attention.calls[5 * number :][:5])
    if changes:
        with pytest.warns(UserWarning, match="no record.*LoRA"), torch.no_grad():
            with daamlib.trace(pipe) as trace, trace.loop("a car"):
                loop()
        assert len(trace) == 0
    else:
        with torch.no_grad(), daamlib.trace(pipe) as trace, trace.loop("a car"):
            loop()
        assert_close(trace[0].maps["prompt"].flatten(1), expected)
        assert trace[0].daam("a tree")["tree"].isfinite().all()


def test_text_encoders_are_compared_for_a_prompt_given_as_embeddings(tmp_path):
    pipe = tiny_joint.build("Flux.1")
    add_lora(pipe.text_encoder_2, "q", "v")
    (record,) = traced(pipe, None, **embedded(pipe, "a car"))
    values = record.daam("a tree").values
    record.save(tmp_path / "record.safetensors")
    loaded = daamlib.JointRecord.load(tmp_path / "record.safetensors", pipe=pipe)
    assert torch.equal(loaded.daam("a tree").values, values)
    pipe.text_encoder_2.disable_adapters()
    for each in (record, loaded):
        with pytest.raises(ValueError, match="text encoders do not embed.*LoRA"):
            each.daam("a tree")


def test_each_record_has_the_fingerprint_of_its_own_call(tmp_path):
    pipe = tiny_joint.build("SD 3")
    with daamlib.trace(pipe) as trace:
        generate(pipe)
        add_lora(pipe.transformer, "ff.net.2")
        generate(pipe)
    for number, record in enumerate(trace):
        record.save(tmp_path / f"{number}.safetensors")
    loaded = daamlib.JointRecord.load(tmp_path / "1.safetensors", pipe=pipe)
    assert torch.equal(loaded.daam("a tree").values, trace[1].daam("a tree").values)
    for read in (lambda: daamlib.JointRecord.load(tmp_path / "0.safetensors", pipe=pipe), lambda: trace[0].daam("a")):
        with pytest.raises(ValueError, match="LoRA"):
            read()


def test_a_record_does_not_keep_its_pipeline_alive():
    pipe = tiny_joint.build("SD 3")
    (record,) = traced(pipe)
    alive = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert alive() is None and record.pipe is None and record.daam()["car"].isfinite().all()
    with pytest.raises(ValueError, match="no model.*with_pipe"):
        record.daam("a tree")


def test_embeddings_are_not_the_records_own_memory():
    (record,) = traced(shared("SD 3"))
    before = record.prompt_embeddings.values.clone()
    record.text_embeddings().values.mul_(2)
    assert torch.equal(record.prompt_embeddings.values, before)


# -- whose rows and positions ----------------------------------------------------------------------------------------


def test_true_guidance_over_embeddings_inside_a_loop_reads_the_prompts_passes():
    pipe = shared("Flux.1")
    negative = {f"negative_{name}": value for name, value in embedded(pipe, "a tree").items()}
    options = {**embedded(pipe, "a car"), **negative, "true_cfg_scale": 3.0}
    with explicit(pipe, "Flux.1") as attention:
        generate(pipe, None, **options)
    expected = sum(call["probabilities"][0] for start in (0, 10, 20) for call in attention.calls[start : start + 5])
    with daamlib.trace(pipe) as trace, trace.loop("a car"):
        generate(pipe, None, **options)
    (record,) = trace
    assert record.prompt == "a car" and len(record.timesteps) == 3
    assert_close(record.maps["prompt"].flatten(1), expected)


def test_positions_of_two_images_are_refused_even_where_they_fill_a_grid():
    """4 x 6 and 8 x 3 positions have 8 rows, 6 columns and 48 positions in all."""
    pipe, passes = shared("Flux.1"), []
    ids = torch.cat([positions(4, 6), positions(8, 3, image=1)])
    hook = pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match="img_ids.*other images"), torch.no_grad():
        with daamlib.trace(pipe) as trace, trace.loop("a car"):
            flux_pass(pipe, torch.randn(1, 48, 16), ids)
    hook.remove()
    assert not passes


@pytest.mark.parametrize("family", ["SD 3", "SD 3.5", "Flux.1", "Qwen-Image"])
@pytest.mark.parametrize("late", [False, True])
def test_a_processor_that_weights_words_is_refused_or_leaves_no_record(family, late):
    pipe, passes = tiny_joint.build(family), []
    attention = pipe.transformer.transformer_blocks[1].attn
    plain, begins = attention.processor, 1 if late else 0
    pipe.transformer.register_forward_hook(lambda *_: passes.append(1))

    def louder(module, args, output):
        """Make some keys three times as long in the softmax as the projections made them."""
        factors = torch.where(torch.arange(output.shape[1]) == 1, 3.0, 1.0)
        return output * factors.view(1, -1, *[1] * (output.ndim - 2))

    class Weighted:
        @functools.wraps(type(plain).__call__)  # diffusers gives a processor what its signature names
        def __call__(self, attn, *args, **kwargs):
            if len(passes) < begins:
                return plain(attn, *args, **kwargs)
            hook = (attn.norm_added_k or attn.add_k_proj).register_forward_hook(louder)  # after the trace's own
            try:
                return plain(attn, *args, **kwargs)
            finally:
                hook.remove()

    attention.set_processor(Weighted())
    if late:
        with pytest.warns(UserWarning, match=r"no record: transformer_blocks.1.attn does not compute softmax"):
            assert not traced(pipe)
    else:
        with pytest.raises(ValueError, match=r"transformer_blocks.1.attn does not compute softmax"):
            traced(pipe)
        assert not passes


def test_an_image_of_another_size_is_read_inside_a_trace_whose_call_failed():
    pipe = tiny_joint.build("SD 3")
    (record,) = traced(pipe)
    expected = record.daam("a tree").values

    def fail(*_):
        raise KeyError

    with daamlib.trace(pipe) as trace, pytest.warns(UserWarning, match="did not end"):
        hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            generate(pipe, height=48, width=64)
        hook.remove()
        assert torch.equal(record.daam("a tree").values, expected)
        generate(pipe)
    assert torch.equal(trace[0].daam().values, record.daam().values)


def test_a_modular_pipeline_in_a_loop():
    pipe, modular = shared("Flux.1"), FluxAutoBlocks().init_pipeline()
    modular.update_components(**{name: part for name, part in pipe.components.items() if part is not None})
    modular.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 32, "output": "latents"}
    with daamlib.trace(modular) as trace, trace.loop("a car"):
        modular(prompt="a car", generator=torch.Generator().manual_seed(0), **options)
    (expected,) = traced(pipe, "a car", num_inference_steps=2)
    assert torch.equal(trace[0].daam().values, expected.daam().values)
    assert trace[0].daam().words == expected.daam().words
    embeddings = expected.encode("a tree")
    assert torch.equal(trace[0].daam_from(embeddings).values, expected.daam_from(embeddings).values)
    with pytest.raises(ValueError, match="no `encode_prompt`.*daam_from"):
        trace[0].daam("a tree")


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_maps_are_summed_in_float32_inside_autocast():
    generator = torch.Generator().manual_seed(0)
    queries, image_keys, text_keys = (torch.randn(1, 2, n, 8, generator=generator) for n in (6, 6, 5))
    vectors = queries.transpose(1, 2).flatten(2)
    attention = JointAttention(
        "attn", 8**-0.5, queries, image_keys, text_keys, None, vectors, None, torch.zeros(1, 11, 16)
    )
    sums = Sums(lambda image, texts: {"prompt": prompt_daam(image)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums.read(attention, ())
    assert torch.equal(sums["prompt"], prompt_daam(attention))
    assert torch.equal(sums.numbers[0], attention.numbers())


def test_a_vae_without_a_distribution_encodes_real_images():
    pipe = tiny_joint.build("Flux.1")
    sides = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    pipe.vae = AutoencoderTiny(**sides, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=2.0).eval()
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    record = daamlib.trace_image(pipe, image, prompt="a car", timesteps=[0])
    with torch.no_grad():
        latents = 2 * pipe.vae.encode(2 * image[None] - 1).latents
    assert_close(record.calls[0]["hidden_states"], pipe._pack_latents(latents, 1, 4, 16, 24))
