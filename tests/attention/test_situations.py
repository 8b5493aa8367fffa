"""What a call is, in every situation that people generate in: one table, situations x pipelines.

Of each situation the table says which records a trace must hold; the maps are compared with the explicit probabilities
of the running model.
"""

import contextlib
import types

import numpy as np
import pytest
import torch
from diffusers import (
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from helpers import assert_close, capture, generate, naive_maps
from peft import LoraConfig
from tiny import SDXL, of_components

import daamlib
from daamlib import AttentionRecord

GRIDS = [(16, 24), (8, 12)]
GUIDED, UNGUIDED = {"guidance_scale": 5.0}, {"guidance_scale": 1.0}


def latents(pipe, images=1, seed=0):
    return torch.randn(images, 4, 16, 24, generator=torch.Generator().manual_seed(seed)).to(pipe.device)


def conditions(pipe, images):
    """What SDXL's U-Net wants besides the text."""
    if not hasattr(pipe, "tokenizer_2"):
        return None
    return {name: torch.zeros(images, n, device=pipe.device) for name, n in (("text_embeds", 16), ("time_ids", 6))}


def denoise(pipe, text, sample, *, negative=None, apart=None, steps=2):
    """A denoising loop by hand; with `negative` under guidance: both halves in one pass, or `apart`, a pass each.

    apart: the `trace.loop`s that are paused in the negative text's passes.
    """

    def predict(sample, t, text):
        with torch.no_grad():
            extra = conditions(pipe, len(sample))
            return pipe.unet(sample, t, encoder_hidden_states=text, added_cond_kwargs=extra).sample

    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        if negative is None:
            noise = predict(sample, t, text)
        else:
            if apart is not None:
                with contextlib.ExitStack() as stack:
                    for loop in apart:
                        stack.enter_context(loop.pause())
                    one = predict(sample, t, negative)
                other = predict(sample, t, text)
            else:
                one, other = predict(torch.cat([sample] * 2), t, torch.cat([negative, text])).chunk(2)
            noise = one + 5 * (other - one)
        sample = pipe.scheduler.step(noise, t, sample).prev_sample


def custom_loop(pipe, *traces, prompt="a car", images=1, guided=True, apart=False, **options):
    prompts = [prompt] if isinstance(prompt, str) else prompt
    text, negative, *_ = pipe.encode_prompt(
        prompts, device=pipe.device, num_images_per_prompt=images, do_classifier_free_guidance=guided
    )
    with contextlib.ExitStack() as stack:
        loops = [stack.enter_context(each.loop(prompts, num_images_per_prompt=images)) for each in traces]
        options["negative"] = negative if guided else None
        denoise(pipe, text, latents(pipe, len(text)), apart=loops if apart else None, **options)


def after_a_pipeline_call(pipe, trace):
    generate(pipe, "a tree", **GUIDED)
    custom_loop(pipe, trace)


def after_an_aborted_call(pipe, trace):
    def stop(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, "a tree", callback_on_step_end=stop, num_inference_steps=4)
    custom_loop(pipe, trace)


def a_real_image_after_a_guided_call(pipe, trace):
    """It has a record of its own; a trace around it is of what is generated."""
    generate(pipe, "a tree", **GUIDED)
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    daamlib.trace_image(pipe, image, prompt="a car", timesteps=(20, 300, 500))


def a_text_read_in_a_callback(pipe, trace):
    with daamlib.trace(pipe) as earlier:
        generate(pipe, "a tree")

    def read(pipe, number, timestep, tensors):
        earlier[0].daam("a bicycle")
        return {}

    generate(pipe, ["a car", "a tree"], callback_on_step_end=read)


BATCH = [("a car", 2), ("a car", 2), ("a tree", 2), ("a tree", 2)]
# situation -> (what is done, the (prompt, passes) of every record)
ANY_PIPELINE = {
    "one image": (lambda pipe, _: generate(pipe, "a car"), [("a car", 2)]),
    "no guidance": (lambda pipe, _: generate(pipe, "a car", **UNGUIDED), [("a car", 2)]),
    "a batch": (lambda pipe, _: generate(pipe, ["a car", "a tree"]), [("a car", 2), ("a tree", 2)]),
    "several of a prompt": (lambda pipe, _: generate(pipe, "a car", num_images_per_prompt=2), [("a car", 2)] * 2),
    "an empty prompt": (lambda pipe, _: generate(pipe, ""), [("", 2)]),
    "a negative prompt": (lambda pipe, _: generate(pipe, "a car", negative_prompt="a tree"), [("a car", 2)]),
    "custom loop": (custom_loop, [("a car", 2)]),
    "custom loop, no guidance": (lambda *to: custom_loop(*to, guided=False), [("a car", 2)]),
    "custom loop, halves apart": (lambda *to: custom_loop(*to, apart=True), [("a car", 2)]),
    "custom loop, a batch": (lambda *to: custom_loop(*to, prompt=["a car", "a tree"], images=2), BATCH),
    "custom loop, empty prompt": (lambda *to: custom_loop(*to, prompt=""), [("", 2)]),
    "custom loops": (lambda *to: (custom_loop(*to), custom_loop(*to, steps=3)), [("a car", 2), ("a car", 3)]),
    "custom loop after a call": (after_a_pipeline_call, [("a tree", 2), ("a car", 2)]),
    "a real image": (a_real_image_after_a_guided_call, [("a tree", 2)]),
    "a text read in a callback": (a_text_read_in_a_callback, [("a tree", 2), ("a car", 2), ("a tree", 2)]),
}  # fmt: skip


def of_passes(captures, passes):
    """What was captured in some passes of the U-Net."""
    return {name: types.SimpleNamespace(probabilities=each.probabilities[passes]) for name, each in captures.items()}


def expected_of(trace):
    return [(record.prompt, len(record.timesteps)) for record in trace]


@pytest.mark.parametrize("situation", ANY_PIPELINE)
def test_any_pipeline(pipe, situation):
    act, expected = ANY_PIPELINE[situation]
    with daamlib.trace(pipe) as trace:
        act(pipe, trace)
    assert expected_of(trace) == expected
    assert all(record.branch == "conditional" for record in trace)


@pytest.mark.parametrize("store", ["linear", "maps"])
@pytest.mark.parametrize("situation", ["a batch", "custom loops", "custom loop, halves apart"])
def test_any_store(sd1_pipe, situation, store):
    act, expected = ANY_PIPELINE[situation]
    with daamlib.trace(sd1_pipe, store=store) as trace:
        act(sd1_pipe, trace)
    assert expected_of(trace) == expected


@pytest.mark.parametrize("options", [{}, {"apart": True}, {"prompt": ["a car", "a tree"], "images": 2}])
def test_the_conditional_half_of_custom_loops(sd1_pipe, options):
    """The maps are those of the rows whose text is the prompt's."""
    apart = options.get("apart", False)
    with daamlib.trace(sd1_pipe) as trace, capture(sd1_pipe.unet) as captures:
        custom_loop(sd1_pipe, trace, **options)
    for number, record in enumerate(trace):
        row, passes = (number, slice(1, None, 2)) if apart else (number + len(trace), slice(None))
        expected = naive_maps(of_passes(captures, passes), GRIDS, image=row)
        assert_close(record.daam().values, expected[: len(record.daam())])


def test_the_unconditional_half_of_a_custom_loop(sd1_pipe):
    with daamlib.trace(sd1_pipe, branch="unconditional") as trace, capture(sd1_pipe.unet) as captures:
        custom_loop(sd1_pipe, trace)
    assert_close(trace[0].daam().values, naive_maps(captures, GRIDS, image=0)[: len(trace[0].daam())])


def test_a_scheduler_without_a_plan(fresh):
    pipe = fresh("sd1")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.timesteps is None
    record = daamlib.trace_image(pipe, np.zeros((32, 48, 3), np.uint8), prompt="a car", timesteps=(20, 300))
    assert record.timesteps == [20, 300]


def test_an_aborted_call_is_told_of(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace, pytest.warns(UserWarning, match="did not end"):
        after_an_aborted_call(sd1_pipe, trace)
    assert expected_of(trace) == [("a car", 2)]
    with pytest.raises(IndexError, match="1 calls left no record: .* did not end"):
        trace[1]


def test_a_with_that_ends_on_an_unfinished_call(sd1_pipe):
    def stop(*_):
        raise RuntimeError("stop")

    with pytest.warns(UserWarning, match="did not end"), daamlib.trace(sd1_pipe) as trace:
        with contextlib.suppress(RuntimeError):
            generate(sd1_pipe, callback_on_step_end=stop)
    with pytest.raises(IndexError, match="1 calls left no record: .* did not end"):
        trace[0]


# -- other pipelines on the same U-Net --------------------------------------------------------------------------------

IMAGE = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_another_pipeline_on_the_traced_unet(sd1_pipe):
    """The trace is that of one pipeline; the first pass of another on its U-Net says so, before work is lost."""
    other = of_components(StableDiffusionImg2ImgPipeline, sd1_pipe)
    options = {"image": IMAGE, "strength": 0.5, "num_inference_steps": 4}
    with daamlib.trace(sd1_pipe) as trace, capture(sd1_pipe.unet) as captures:
        with pytest.raises(ValueError, match=r"by itself, outside of a call .* trace\.loop\(prompts\)"):
            generate(other, "a car", **options)
        with trace.loop(["a car"]):
            generate(other, "a car", **options)
        generate(sd1_pipe, "a tree")
    assert expected_of(trace) == [("a car", 2), ("a tree", 2)]
    assert_close(trace[0].daam().values, naive_maps(of_passes(captures, slice(2)), GRIDS, image=1)[:4])


def test_sdxls_refiner(sdxl_pipe):
    """It goes on with the latents of the base model, at the last noise levels, with the second text encoder alone."""
    parts = dict(sdxl_pipe.components, tokenizer=None, text_encoder=None)
    parts["unet"] = refiner_unet().to(sdxl_pipe.device)
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=False, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "denoising_start": 0.8}
    with daamlib.trace(refiner) as trace:
        generate(refiner, "a car", image=latents(refiner), **options)
    assert expected_of(trace) == [("a car", 2)]
    assert trace[0].daam("a tree")["tree"].max() > 0


def refiner_unet():
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        **{**SDXL, "cross_attention_dim": 16},
    ).eval()


@pytest.mark.parametrize("situation", ["a batch", "custom loop, halves apart", "custom loop after a call"])
def test_compiled_unets(fresh, situation):
    act, expected = ANY_PIPELINE[situation]
    pipe = fresh("sd1")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with daamlib.trace(pipe) as trace:
        act(pipe, trace)
    assert expected_of(trace) == expected


@pytest.mark.supports(family="AnimateDiff", feature="refused", note="it makes videos")
def test_videos_are_refused():
    unet = UNetMotionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=24,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
    )
    pipe = types.SimpleNamespace(unet=unet, scheduler=types.SimpleNamespace(timesteps=torch.arange(3)))
    with pytest.raises(TypeError, match="UNetMotionModel is not read: makes videos"), daamlib.trace(pipe):
        pass


@pytest.mark.supports(family="Custom Diffusion", feature="refused", note="its attention processors make other keys")
def test_keys_of_a_processors_own_are_refused(fresh):
    pipe = fresh("sd1")
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attention.processor.to_k_custom_diffusion = torch.nn.Linear(24, 8)
    with pytest.raises(ValueError, match="Custom Diffusion"), daamlib.trace(pipe):
        pass


# -- how a text is embedded later -------------------------------------------------------------------------------------


def test_a_later_text_is_embedded_as_the_prompt_was(sd1_pipe, tmp_path):
    with daamlib.trace(sd1_pipe) as trace:
        try:
            generate(sd1_pipe, "a car and a tree", clip_skip=1)
        except (AttributeError, TypeError) as error:
            pytest.skip(f"this diffusers cannot skip CLIP's layers with this transformers: {error}")
    record = trace[0]
    assert record.embedded_with == {"clip_skip": 1}
    skipped, plain = (
        record.encode("a car and a tree"),
        sd1_pipe.encode_prompt("a car and a tree", sd1_pipe.device, 1, False)[0],
    )
    assert_close(skipped.values, record.prompt_embeddings.values[: len(skipped.values)])
    assert (skipped.values - plain[0, : len(skipped.values)]).norm() > 0.01 * plain.norm()
    record.save(tmp_path / "a.safetensors")
    assert AttentionRecord.load(tmp_path / "a.safetensors", pipe=sd1_pipe).embedded_with == {"clip_skip": 1}


def test_the_prompts_own_words_are_the_prompt(sdxl_pipe):
    with daamlib.trace(sdxl_pipe) as trace:
        generate(sdxl_pipe, "a car", prompt_2="a tree")
    record = trace[0]
    assert torch.equal(record.daam("a car").values, record.daam().values)
    assert record.embedded_with == {"prompt_2": "a tree"}
    assert record.daam("a bicycle")["bicycle"].max() > 0


def test_a_text_encoder_that_is_not_as_it_was(fresh, tmp_path):
    pipe = fresh("sd1")
    torch.manual_seed(0)
    pipe.text_encoder.add_adapter(
        LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    with daamlib.trace(pipe) as trace:
        generate(pipe, "a car")
    before = trace[0].daam("a tree").values
    trace[0].save(tmp_path / "a.safetensors")
    pipe.text_encoder.delete_adapter("default") if hasattr(
        pipe.text_encoder, "delete_adapter"
    ) else pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="LoRA"):
        trace[0].daam("a tree")
    with pytest.raises(ValueError, match="LoRA"):
        AttentionRecord.load(tmp_path / "a.safetensors", pipe=pipe).ldaam("a tree")
    assert trace[0].daam().values.shape[0] == 4  # the prompt's own map needs no encoder
    assert before.max() > 0


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [GUIDED, UNGUIDED], ids=["guided", "unguided"])
def test_maps_kept_online_are_those_read_afterwards(pipe, guidance, tmp_path):
    texts = ["a tree", "a bicycle, a car"]
    with daamlib.trace(pipe) as later, daamlib.trace(pipe, store="maps", texts=texts) as online:
        generate(pipe, ["a car", "a car and a tree"], **guidance)
    for expected, record in zip(later, online, strict=True):
        assert all(layer.queries is None for layer in record.layers)
        for text in (None, record.prompt, *texts):
            assert_close(record.daam(text).values, expected.daam(text).values)
            assert record.daam(text).words == expected.daam(text).words
        assert_close(record.ldaam("a dog").values, expected.ldaam("a dog").values)
        with pytest.raises(ValueError, match="texts="):
            record.daam("a dog")
        with pytest.raises(ValueError, match="padding"):
            record.daam(padding=False)
        record.save(tmp_path / "a.safetensors")
        back = AttentionRecord.load(tmp_path / "a.safetensors")  # which needs no pipeline
        assert torch.equal(back.daam("a tree")["tree"].cpu(), record.daam("a tree")["tree"].cpu())


def test_maps_kept_online_take_the_same_bytes_at_any_number_of_steps(sd1_pipe):
    with daamlib.trace(sd1_pipe, store="maps", texts=["a tree"]) as trace:
        generate(sd1_pipe, num_inference_steps=2)
        generate(sd1_pipe, num_inference_steps=9)
    assert trace[0].nbytes == trace[1].nbytes


@pytest.mark.parametrize("options", [{"texts": ["a tree"]}, {"store": "maps", "texts": "a tree"}])
def test_texts_need_maps(sd1_pipe, options):
    with pytest.raises(ValueError, match="texts"), daamlib.trace(sd1_pipe, **options):
        pass


@pytest.mark.parametrize("store", ["queries", "linear", "maps"])
def test_what_is_kept_lies_on_the_store_device(sd1_pipe, store):
    with daamlib.trace(sd1_pipe, store=store, store_device="cpu") as trace, daamlib.trace(sd1_pipe) as plain:
        generate(sd1_pipe, ["a car", "a tree"])
    for record, expected in zip(trace, plain, strict=True):
        assert record.device.type == "cpu"
        kept = [layer.queries if store == "queries" else layer.query_sum for layer in record.layers]
        assert {tensor.device.type for tensor in kept} == {"cpu"}
        assert_close(record.ldaam("a bicycle").values, expected.ldaam("a bicycle").values.cpu())
    assert trace[0].layers[0].key_weight is trace[1].layers[0].key_weight


@pytest.mark.parametrize("number", [1, np.int64(1), torch.tensor(1)])
def test_maps_are_found_by_any_whole_number(sd1_pipe, number):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, "a car")
    maps = trace[0].daam()
    assert torch.equal(maps[number], maps.values[1])
    with pytest.raises(TypeError, match="float"):
        maps[1.5]
