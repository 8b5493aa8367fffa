"""What people do with joint models' pipelines: guidance that perturbs, edits, ControlNets, LoRAs that come and go.

The expected values are computed here, by an attention processor with explicit probabilities or from the projections.
"""

import copy
import functools
import inspect
import math
import pickle
import threading

import diffusers
import pytest
import tiny_joint
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from helpers import assert_close
from peft import LoraConfig
from PIL import Image
from placement import Pretended
from tiny_joint import PROMPT, explicit, generate, hooks_of, shared, traced

import daamlib
from daamlib.attention.readers.words import BYTE_SPACE, read_pieces
from daamlib.attention.text import Word

FAMILIES = list(tiny_joint.BUILDERS)
WORDS = ["car", "traffic light", "road"]
SIZE = {"height": 32, "width": 48}


@functools.cache
def shared_record(family):
    (record,) = traced(shared(family), words=WORDS)
    return record


def random_weights(module, name="", *, scale=0.3, only=lambda name: True):
    """Move the module's weights, as fine-tuning does; written past the version counters, as an EMA's copy is."""
    generator = torch.Generator().manual_seed(0)
    for path, weight in module.named_parameters():
        if name in path and only(path):
            spread = weight.data.std(unbiased=False).clamp(min=0.05)
            weight.data = weight.data + scale * spread * torch.randn(weight.shape, generator=generator)
    return module


def with_parts(pipeline, family, *without, **parts):
    """A pipeline of another class with the tiny pipeline's parts."""
    components = {name: part for name, part in shared(family).components.items() if name not in without}
    pipe = pipeline(**{**components, **parts})
    pipe.set_progress_bar_config(disable=True)
    for name in ("prompt_template_encode_start_idx",):  # of the tiny tokenizer
        if hasattr(shared(family), name):
            setattr(pipe, name, getattr(shared(family), name))
    return pipe


def picture(color="red"):
    return Image.new("RGB", (48, 32), color)


# -- later texts: the pipeline must compute what it did --------------------------------------------------------------

READINGS = {
    "text": lambda record: record.daam("a tree"),
    "lone word": lambda record: record.ldaam("tree"),
    "words": lambda record: record.daam(["tree", "road"]),
    "concept map": lambda record: record.concept_map(["tree", "road"]),
    "probe": lambda record: record.probe_map(),
    "selection": lambda record: record.select(steps=[0]),
}


@pytest.mark.parametrize(
    ("family", "part"),
    [("SD 3", "attn.to_v"), ("SD 3", "ff.net"), ("SD 3", "norm1"), ("SD 3", "context_embedder"), ("SD 3", "time_text"),
     ("SD 3", "pos_embed.proj"), ("SD 3.5", "attn.norm_q"), ("SD 3.5", "attn2"), ("Flux.1", "x_embedder"),
     ("Flux.1", "single_transformer_blocks.1.attn.to_k"), ("Flux.1", "add_v_proj"), ("Qwen-Image", "img_mlp"),
     ("Qwen-Image", "txt_norm"), ("Qwen-Image", "attn.to_out")],
)  # fmt: skip
def test_other_weights_than_when_the_image_was_made_are_refused(family, part):
    pipe = tiny_joint.build(family)
    (record,) = traced(pipe, words=WORDS)
    before = READINGS["text"](record).values
    state = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    random_weights(pipe.transformer, part)
    for read in READINGS.values():
        with pytest.raises(ValueError, match=r"weights.*LoRA"):
            read(record)
    stored = shared_record(family)  # what needs no model
    assert torch.equal(record.daam().values, stored.daam().values)
    assert torch.equal(record.concept_map(WORDS).values, stored.concept_map(WORDS).values)
    pipe.transformer.load_state_dict(state)
    assert torch.equal(READINGS["text"](record).values, before)


def test_a_lora_that_was_deleted_switched_off_or_scaled_is_noticed(tmp_path):
    pipe = tiny_joint.build("SD 3")
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v", "ff.net.2"], init_lora_weights=False))
    (record,) = traced(pipe)
    before, path = record.daam("a tree").values, tmp_path / "record.safetensors"
    record.save(path)
    assert torch.equal(daamlib.JointRecord.load(path, pipe=pipe).daam("a tree").values, before)

    def refused():
        with pytest.raises(ValueError, match="LoRA"):
            record.daam("a tree")
        with pytest.raises(ValueError, match="LoRA"):
            daamlib.JointRecord.load(path, pipe=pipe)

    pipe.transformer.disable_adapters()
    refused()
    pipe.transformer.enable_adapters()
    assert torch.equal(record.daam("a tree").values, before)
    pipe.transformer.set_adapters("default", weights=0.5)
    refused()
    pipe.transformer.set_adapters("default", weights=1.0)
    assert torch.equal(record.daam("a tree").values, before)
    pipe.transformer.delete_adapters("default")
    refused()


def test_a_lora_that_changes_in_the_middle_of_a_call_is_noticed():
    pipe = tiny_joint.build("Flux.1")
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))

    def scale(pipe, step, *_):
        pipe.transformer.set_adapters("default", weights=1.0 - 0.4 * step)
        return {}

    (record,) = traced(pipe, callback_on_step_end=scale)
    with pytest.raises(ValueError, match="LoRA"):
        record.daam("a tree")


def test_weights_without_a_fingerprint_are_noticed_when_a_text_is_read(tmp_path):
    """A norm's weights are in no linear layer."""
    pipe, path = tiny_joint.build("SD 3.5"), tmp_path / "record.safetensors"
    traced(pipe)[0].save(path)
    random_weights(pipe.transformer, "norm_added_k")
    loaded = daamlib.JointRecord.load(path, pipe=pipe)
    assert torch.equal(loaded.daam().values, shared_record("SD 3.5").daam().values)
    with pytest.raises(ValueError, match="weights"):
        loaded.daam("a tree")


@pytest.mark.parametrize(
    ("family", "encoder"),
    [
        ("SD 3", "text_encoder"),
        ("SD 3", "text_encoder_3"),
        ("Flux.1", "text_encoder_2"),
        ("Qwen-Image", "text_encoder"),
    ],
)
def test_another_text_encoder_is_refused(family, encoder):
    pipe = tiny_joint.build(family)
    (record,) = traced(pipe, words=WORDS)
    random_weights(getattr(pipe, encoder))
    for name, read in READINGS.items():
        if name == "probe":
            assert torch.equal(read(record).weight, read(shared_record(family)).weight)  # which reads no text
            continue
        with pytest.raises(ValueError, match="text encoders.*LoRA"):
            read(record)
    setattr(pipe, encoder, None)
    if encoder != "text_encoder_3":
        with pytest.raises(ValueError, match=f"no {encoder}.*daam_from"):
            record.daam("a tree")


def test_each_text_encoders_own_prompt_is_compared(tmp_path):
    pipe = tiny_joint.build("SD 3")
    (record,) = traced(pipe, prompt_3="a tree", prompt_2="a road")
    values = record.daam("a car").values
    record.save(tmp_path / "record.safetensors")
    loaded = daamlib.JointRecord.load(tmp_path / "record.safetensors", pipe=pipe)
    assert loaded.prompts == {"prompt": PROMPT, "prompt_2": "a road", "prompt_3": "a tree"}
    assert torch.equal(loaded.daam("a car").values, values)


def test_another_precision_is_refused_and_the_same_is_not():
    pipe = tiny_joint.build("SD 3").to(dtype=torch.bfloat16)
    (record,) = traced(pipe)
    half = record.daam("a tree").values
    first, second = traced(pipe, ["a car", PROMPT])
    assert second.daam("a tree").values.isfinite().all() and first.daam("a tree").values.isfinite().all()
    pipe.to(dtype=torch.float32)
    with pytest.raises(ValueError, match="bfloat16.*float32"):
        record.daam("a tree")
    pipe.to(dtype=torch.bfloat16)
    assert torch.equal(record.daam("a tree").values, half)


def test_maps_that_overflowed_are_refused():
    pipe = tiny_joint.build("SD 3")
    pipe.transformer.transformer_blocks[1].attn.to_q.bias.data.fill_(float("nan"))
    (record,) = traced(pipe, words=WORDS)
    for read in (*READINGS.values(), lambda record: record.daam(), lambda record: record.daam(WORDS)):
        with pytest.raises(ValueError, match="NaN"):
            read(record)


# -- which rows: perturbed passes, edits, control --------------------------------------------------------------------


class Projections:
    """q and k of SD 3's joint attentions, of every call of a projection, in order."""

    def __init__(self, transformer):
        self.passes, self.handles = [], []
        self.handles.append(transformer.register_forward_pre_hook(lambda *_: self.passes.append({})))
        self.blocks = transformer.transformer_blocks
        for number, block in enumerate(self.blocks):
            for name in ("to_q", "to_k", "add_k_proj"):
                hook = functools.partial(self.keep, number, name)
                self.handles.append(getattr(block.attn, name).register_forward_hook(hook))

    def keep(self, number, name, module, args, output):
        self.passes[-1].setdefault((number, name), []).append(output.detach())

    def close(self):
        for handle in self.handles:
            handle.remove()

    def daam(self, row):
        """(token, position) of one row of the batch; rows of later calls of a projection come after."""
        total = 0
        for kept in self.passes:
            for number, block in enumerate(self.blocks):
                q, k, text = (
                    torch.cat(kept[number, name])[row].unflatten(1, (block.attn.heads, -1)).transpose(0, 1)
                    for name in ("to_q", "to_k", "add_k_proj")
                )
                scores = q @ torch.cat([text, k], dim=1).transpose(1, 2) / math.sqrt(q.shape[-1])
                total = total + scores.softmax(dim=-1)[..., : text.shape[1]].sum(dim=0).T
        return total


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guidance", [0.0, 5.0])
@pytest.mark.parametrize("applied", [["blocks.1"], ["blocks.0", "blocks.1", "blocks.3"]])
def test_of_perturbed_attention_guidance_the_unperturbed_rows_of_the_prompt_are_read(applied, guidance, images):
    pag = with_parts(
        diffusers.StableDiffusion3PAGPipeline, "SD 3", "image_encoder", "feature_extractor", pag_applied_layers=applied
    )
    prompts = ["a car", "a red tree and a road"][:images]
    options = {"guidance_scale": guidance, "pag_scale": 5.0, "num_inference_steps": 2}
    seen = Projections(pag.transformer)
    (*bare,) = traced(pag, prompts, **options)
    seen.close()
    with daamlib.trace(pag, words=WORDS) as trace:
        generate(pag, prompts, **options)
    assert [record.prompt for record in bare] == prompts and len(trace) == images
    for image, record in enumerate(bare):
        row = image + images * (guidance > 1)
        expected = seen.daam(row)
        assert_close(record.maps["prompt"].flatten(1), expected, 1e-4)
        perturbed = seen.daam(row + images)
        assert (perturbed - expected).abs().max() > 1e-3 * expected.max()  # the other rows would not pass
        # words read while generating and later, in passes of this row alone and without a perturbation
        assert_close(trace[image].daam(WORDS).values, record.daam(WORDS).values, 1e-4)
        assert_close(trace[image].concept_map(WORDS).values, record.concept_map(WORDS).values, 1e-4)


def test_a_processor_that_repeats_rows_is_refused_in_the_first_pass():
    pipe = tiny_joint.build("SD 3")
    attention, plain = pipe.transformer.transformer_blocks[2].attn, None
    plain = attention.processor

    class Twice:
        def __call__(self, attn, hidden_states, **kwargs):
            attn.to_q(hidden_states)
            return plain(attn, hidden_states, **kwargs)

    attention.set_processor(Twice())
    passes = []
    pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=r"transformer_blocks.2.attn computed .*rows.*perturbed"):
        traced(pipe, num_inference_steps=3)
    assert not passes


def test_a_later_pass_without_its_blocks_costs_the_record_and_not_the_image():
    pipe = tiny_joint.build("Flux.1")
    expected = generate(pipe)
    forward, results = pipe.transformer.forward, []

    @functools.wraps(forward)
    def reuse(*args, **kwargs):  # as a cache that keeps the output of a step
        results.append(forward(*args, **kwargs) if len(results) != 1 else results[0])
        return results[-1]

    pipe.transformer.forward = reuse
    with daamlib.trace(pipe) as trace, pytest.warns(UserWarning, match="no record.*called 0 of 5 blocks.*cache"):
        assert generate(pipe).shape == expected.shape
    assert len(results) == 3 and len(trace) == 0
    pipe.transformer.forward = lambda *args, **kwargs: results[0]
    pipe.transformer.forward.__signature__ = inspect.signature(forward)
    with pytest.raises(ValueError, match="called 0 of 5 blocks.*cache"):
        traced(pipe)


def test_a_cache_enabled_inside_is_refused_in_the_first_pass():
    pipe = tiny_joint.build("Flux.1")
    with pytest.raises(ValueError, match="cache"), daamlib.trace(pipe):
        apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.2))
        generate(pipe)
    pipe.transformer.disable_cache()


KONTEXT = {"max_area": 32 * 48, "_auto_resize": False, **SIZE}


@pytest.mark.parametrize("words", [(), WORDS])
@pytest.mark.parametrize(
    ("pipeline", "options"),
    [(diffusers.FluxKontextPipeline, KONTEXT), (diffusers.FluxKontextInpaintPipeline, KONTEXT)],
)
def test_edits_that_read_another_image_are_refused_in_the_first_pass(pipeline, options, words):
    pipe = with_parts(pipeline, "Flux.1", "image_encoder", "feature_extractor")
    if "Inpaint" in pipeline.__name__:
        options = {**options, "mask_image": Image.new("L", (48, 32), 255)}
    passes = []
    hook = pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(ValueError, match="other images"), daamlib.trace(pipe, words=words):
            pipe(image=picture(), prompt=PROMPT, num_inference_steps=9, output_type="latent", **options)
    finally:
        hook.remove()
    assert not passes


def test_other_images_in_qwens_sequence_are_refused_in_the_first_pass():
    pipe, passes = tiny_joint.build("Qwen-Image"), []

    def edit(module, args, kwargs):  # as QwenImageEditPipeline, whose prompt is embedded with the image
        shapes = [[*kwargs["img_shapes"][0], (1, 4, 6)]]
        states = torch.cat([kwargs["hidden_states"]] * 2, dim=1)
        return args, {**kwargs, "hidden_states": states, "img_shapes": shapes}

    pipe.transformer.register_forward_pre_hook(edit, with_kwargs=True)
    pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match="other images"):
        traced(pipe)
    encode = pipe.encode_prompt

    def encode_prompt(prompt=None, image=None, **options):
        assert prompt == PROMPT
        return encode(prompt, **options)

    pipe.encode_prompt = encode_prompt
    for read in (lambda: traced(pipe, words=WORDS), lambda: daamlib.trace_image(pipe, torch.rand(3, 32, 48))):
        with pytest.raises(ValueError, match="other images"):
            read()
    assert not passes


def fill_transformer(channels):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=channels, out_channels=16, num_layers=2, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        ).eval()  # fmt: skip


MASK = Image.new("L", (48, 32), 0)
MASK.paste(255, (8, 8, 30, 30))
NO_IMAGE = ("image_encoder", "feature_extractor")
CALLS = {
    "Flux image to image": ("Flux.1", diffusers.FluxImg2ImgPipeline, NO_IMAGE, {}, {"image": picture()}),
    "Flux inpainting": (
        "Flux.1", diffusers.FluxInpaintPipeline, NO_IMAGE, {}, {"image": picture(), "mask_image": MASK, "strength": 0.9}
    ),
    "Flux control": (
        "Flux.1", diffusers.FluxControlPipeline, NO_IMAGE, {"transformer": 32}, {"control_image": picture()}
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_pipelines_that_start_from_an_image_are_read(call):
    family, pipeline, without, parts, options = CALLS[call]
    parts = {name: fill_transformer(channels) for name, channels in parts.items()}
    pipe = with_parts(pipeline, family, *without, *parts, **parts)

    def call():
        generator = torch.Generator().manual_seed(0)
        pipe(prompt=PROMPT, num_inference_steps=4, output_type="latent", generator=generator, **SIZE, **options)

    with explicit(pipe, family) as attention, daamlib.trace(pipe) as trace:
        call()
    (record,) = trace
    rows = [row for row, token in enumerate(record.prompt_embeddings.tokens) if token != "<pad>"]
    expected = sum(each["probabilities"][0] for each in attention.calls)
    assert record.daam().tokens.count("car") and len(record.timesteps) > 1
    assert_close(record.daam().values, expected[rows].unflatten(1, record.grid), 1e-4)
    with daamlib.trace(pipe, words=WORDS) as trace:
        call()
    assert_close(record.daam(WORDS).values, trace[0].daam(WORDS).values, 1e-4)


def test_a_real_image_in_front_of_a_transformer_of_more_channels_is_refused():
    pipe = with_parts(diffusers.FluxFillPipeline, "Flux.1", *NO_IMAGE, "transformer", transformer=fill_transformer(48))
    with pytest.raises(ValueError, match="48 channels, got 16.*Fill"):
        daamlib.trace_image(pipe, torch.rand(3, 32, 48), prompt=PROMPT)


def controlnet(family):
    small = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    if family == "SD 3":
        kind, config = diffusers.SD3ControlNetModel, {
            "sample_size": 16, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
            "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 24,
            "pos_embed_max_size": 16,
        }  # fmt: skip
    elif family == "Flux.1":
        kind, config = diffusers.FluxControlNetModel, {
            **small, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
        }  # fmt: skip
    else:
        kind, config = diffusers.QwenImageControlNetModel, {
            **small, "in_channels": 16, "out_channels": 4, "num_layers": 1, "num_attention_heads": 3,
            "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4),
        }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return random_weights(kind(**config).eval())


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")  # diffusers' own
@pytest.mark.parametrize("family", ["SD 3", "Flux.1", "Qwen-Image"])
def test_of_a_controlnet_the_prompts_maps_and_the_words_are_read(family, tmp_path):
    pipeline = {"SD 3": "StableDiffusion3ControlNetPipeline", "Flux.1": "FluxControlNetPipeline",
                "Qwen-Image": "QwenImageControlNetPipeline"}[family]  # fmt: skip
    pipe = with_parts(getattr(diffusers, pipeline), family, *NO_IMAGE, controlnet=controlnet(family))
    size = {"height": 64, "width": 96} if family == "Qwen-Image" else SIZE

    def call():
        torch.manual_seed(0)  # of the control image's latents, which take no generator
        return pipe(
            prompt=PROMPT, control_image=picture(), controlnet_conditioning_scale=1.0, num_inference_steps=3,
            output_type="latent", generator=torch.Generator().manual_seed(0), **size,
            **({"guidance_scale": 1.0} if family == "SD 3" else {}),
        ).images  # fmt: skip

    plain = call()
    with explicit(pipe, family) as attention, daamlib.trace(pipe) as bare:
        call()
    with daamlib.trace(pipe, words=WORDS) as trace:
        assert torch.equal(call(), plain)
    (record,) = trace
    rows = [row for row, token in enumerate(record.prompt_embeddings.tokens) if token != "<pad>"]
    expected = sum(each["probabilities"][0] for each in attention.calls)
    assert len(attention.calls) == len(record.timesteps) * len(record.layer_names())
    assert_close(bare[0].daam().values, expected[rows].unflatten(1, record.grid), 1e-4)
    assert_close(record.daam().values, bare[0].daam().values, 1e-4)
    assert_close(record.daam(WORDS).values.sum(dim=0), torch.full(record.grid, float(record.summands)))
    record.save(tmp_path / "record.safetensors")
    loaded = daamlib.JointRecord.load(tmp_path / "record.safetensors", pipe=pipe)
    assert torch.equal(loaded.daam(WORDS).values, record.daam(WORDS).values)
    for read in READINGS.values():
        with pytest.raises(ValueError, match="ControlNet.*words"):
            read(loaded)
    pipe.controlnet = random_weights(pipe.controlnet, scale=1.0)
    assert not torch.equal(call(), plain)  # the control does something


def test_a_call_stopped_before_the_first_pass_that_is_read_is_told_of():
    def interrupt(pipe, step, *_):
        pipe._interrupt = True
        return {}

    with daamlib.trace(shared("SD 3")) as trace, pytest.warns(UserWarning, match="leaves no record"):
        generate(shared("SD 3"), num_inference_steps=20, callback_on_step_end=interrupt)  # reads the third pass first
    assert len(trace) == 0 and len(trace.problems) == 1
    with pytest.raises(IndexError, match="1 calls left no record: it ended before the first pass that is read"):
        trace[0]


# -- devices, threads, hooks -----------------------------------------------------------------------------------------


def test_a_transformer_on_two_devices_is_read():
    words = shared_record("SD 3")
    with Pretended("cuda") as device:
        pipe = tiny_joint.build("SD 3")
        pipe.transformer.transformer_blocks[2:].to(device)

        def move(where):
            def hook(module, args, kwargs):
                to = lambda value: value.to(where) if isinstance(value, torch.Tensor) else value  # noqa: E731
                return tuple(map(to, args)), {name: to(value) for name, value in kwargs.items()}

            return hook

        for block in pipe.transformer.transformer_blocks[2:]:
            block.register_forward_pre_hook(move(device), with_kwargs=True)
        pipe.transformer.norm_out.register_forward_pre_hook(move("cpu"), with_kwargs=True)
        with daamlib.trace(pipe, words=WORDS) as trace:
            generate(pipe)
        found = [trace[0].daam(), trace[0].daam(WORDS), trace[0].concept_map(WORDS)]
        found = [maps.values.cpu() for maps in found]
    expected = [words.daam(), words.daam(WORDS), words.concept_map(WORDS)]
    for values, maps in zip(found, expected, strict=True):
        assert_close(values, maps.values)


@pytest.mark.parametrize("where", ["second call of a block", "embedding of the words"])
def test_traces_in_two_threads_do_not_see_each_other(where):
    slow, fast = tiny_joint.build("SD 3"), tiny_joint.build("Flux.1")
    done, waiting, results = threading.Event(), threading.Event(), {}
    target, name, at = (slow.transformer.transformer_blocks[1], "forward", 2)
    if where == "embedding of the words":
        target, name, at = slow.text_encoder_3, "forward", 2
    original, calls = getattr(target, name), []

    def wait(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:  # not the image's own: one of ours
            waiting.set()
            assert done.wait(60)
        return original(*args, **kwargs)

    setattr(target, name, wait)

    def first():
        results["slow"] = traced(slow, words=WORDS)

    def second():
        assert waiting.wait(60)
        try:
            results["fast"] = traced(fast, words=WORDS)
        finally:
            done.set()

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, family in (("slow", "SD 3"), ("fast", "Flux.1")):
        (record,) = results[key]
        expected = shared_record(family)
        assert torch.equal(record.daam().values, expected.daam().values)
        assert torch.equal(record.daam(WORDS).values, expected.daam(WORDS).values)


def test_an_error_while_hooking_leaves_no_hook(monkeypatch):
    pipe = tiny_joint.build("Flux.1")
    hooks = hooks_of(pipe.transformer)

    def refuse(*args, **kwargs):
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(pipe.transformer.single_transformer_blocks[1], "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks"):
        traced(pipe)
    assert hooks_of(pipe.transformer) == hooks and "encode_prompt" not in vars(pipe)


# -- reading records -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_its_own_text(family):
    record = shared_record(family)
    maps, again = record.daam(), record.daam(record.prompt)
    assert torch.equal(maps.values, again.values) and maps.tokens == again.tokens and maps.words == again.words
    alone = record.daam_from(record.encode(record.prompt))  # without the image's positions in the softmax
    assert_close(alone.values.sum(dim=0), torch.full(record.grid, float(record.summands)))


def test_embeddings_are_read_as_the_text_they_are_of():
    record = shared_record("SD 3")
    embeddings = record.encode("a tree")
    for from_text, from_values in ((record.daam, record.daam_from), (record.ldaam, record.ldaam_from)):
        assert torch.equal(from_text("a tree").values, from_values(embeddings).values)
        assert from_values(embeddings).tokens == embeddings.tokens
        assert from_values(embeddings.values).tokens == tuple(map(str, range(len(embeddings.tokens))))
        with pytest.raises(ValueError, match="32"):
            from_values(torch.zeros(2, 31))
        with pytest.raises(ValueError, match="differentiable"):
            from_values(torch.zeros(2, 32, requires_grad=True))
    assert torch.equal(record.ldaam().values, record.ldaam_from(record.encode(PROMPT)).values)


def test_blocks_and_passes_can_be_selected(tmp_path):
    pipe = shared("SD 3")
    with explicit(pipe, "SD 3") as attention:
        (bare,) = traced(pipe)
    record, names = shared_record("SD 3"), shared_record("SD 3").layer_names()
    rows = [row for row, token in enumerate(record.prompt_embeddings.tokens) if token != "<pad>"]
    part = record.select(layers=lambda block: block.name in names[1:3] and block.heads == 4, steps=[0, 2])
    expected = sum(attention.calls[4 * step + block]["probabilities"][0] for step in (0, 2) for block in (1, 2))
    assert_close(part.daam().values, expected[rows].unflatten(1, record.grid), 1e-4)
    assert part.layer_names() == names[1:3] and part.timesteps == [record.timesteps[step] for step in (0, 2)]
    assert part.summands == 2 * 2 * 4 and part.probe_map().weight.shape[2] == 2 * 32
    assert_close(part.daam(WORDS).values.sum(dim=0), torch.full(record.grid, 16.0))
    parts = [record.select(layers=lambda block, name=name: block.name == name) for name in names]
    for whole, piece in ((record.daam(WORDS), [each.daam(WORDS) for each in parts]),
                         (record.daam("a tree"), [each.daam("a tree") for each in parts])):  # fmt: skip
        assert_close(sum(maps.values for maps in piece), whole.values)
    with pytest.raises(ValueError, match="no vectors of a text"):
        parts[-1].concept_map(WORDS)  # the last block of SD 3
    part.save(tmp_path / "part.safetensors")
    loaded = daamlib.JointRecord.load(tmp_path / "part.safetensors", pipe=pipe)
    assert loaded.layer_names() == names[1:3] and torch.equal(loaded.daam("sky").values, part.daam("sky").values)
    assert torch.equal(bare.select(layers=lambda block: True).daam().values, bare.daam().values)
    for options in ({"layers": lambda block: False}, {"steps": []}, {"heads": [0]}):
        with pytest.raises(ValueError, match="nothing is left|heads"):
            record.select(**options)
    with pytest.raises(IndexError):
        record.select(steps=[3])


def test_what_a_joint_record_cannot_do_says_what_to_use():
    record = shared_record("SD 3")
    for ask in (record.linear_map, record.collapsed):
        with pytest.raises(ValueError, match="nothing to collapse.*ldaam"):
            ask()
    with pytest.raises(ValueError, match="self-attention.*iterations=0"):
        record.refine(record.daam())
    classes = {"car": "car", "sky": "sky"}
    with pytest.raises(ValueError, match="iterations=0"):
        daamlib.label_map(record, classes)
    labels = daamlib.label_map(record, classes, iterations=0, margin=0.0)
    maps = record.daam("a car, a sky")
    scores = torch.stack([maps[word] for word in classes])
    scores = (scores - scores.mean(dim=(1, 2), keepdim=True)) / scores.std(dim=(1, 2), keepdim=True)
    car = scores[0] > scores[1]
    assert car.any() and not car.all()
    assert torch.equal(torch.as_tensor(labels == daamlib.cityscapes.label_id("car")), car)


def test_a_copy_has_no_pipeline_until_it_is_given():
    record = shared_record("SD 3")
    for again in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record)):
        assert again.pipe is None and torch.equal(again.daam(WORDS).values, record.daam(WORDS).values)
        with pytest.raises(ValueError, match="with_pipe"):
            again.daam("sky")
        assert torch.equal(again.with_pipe(shared("SD 3")).daam("sky").values, record.daam("sky").values)
        with pytest.raises(ValueError, match="this record and the pipeline"):
            again.with_pipe(shared("SD 3.5"))


def test_what_records_share_is_there():
    record = shared_record("Flux.1")
    assert record.d_text == 32 and [layer.name for layer in record.layers] == record.layer_names()
    assert {(layer.grid, layer.heads) for layer in record.layers} == {(record.grid, 2)}
    assert torch.equal(record.text_embeddings().values, record.prompt_embeddings.values)
    assert record.text_embeddings(PROMPT, padding=False).tokens == record.daam().tokens
    assert torch.equal(record.text_embeddings("sky").values, record.encode("sky").values)
    with pytest.raises(TypeError, match="AttentionRecord"):
        daamlib.choose_settings([record], [torch.zeros(8, 12, dtype=torch.bool)])


def test_maps_are_not_the_records_own_memory():
    record = traced(shared("SD 3"), words=WORDS)[0]
    for read in (record.daam, lambda: record.daam(WORDS), lambda: record.concept_map(WORDS)):
        before = read().values.clone()
        read().values.zero_()
        assert torch.equal(read().values, before)


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["T5", "Qwen"])
def test_added_tokens_are_words(tokenizer):
    pieces = tiny_joint.t5_tokenizer(64) if tokenizer == "T5" else tiny_joint.qwen_tokenizer()
    pieces.add_tokens(["<toy>", "<toy>_1"])
    options = {} if tokenizer == "T5" else {"mark": BYTE_SPACE}
    ids = pieces("a car, <toy><toy>_1 tree<toy>, sky").input_ids
    _, words = read_pieces(pieces, ids, **options)
    names = pieces.convert_ids_to_tokens(ids)
    assert [word.text for word in words] == ["a", "car", ",", "<toy>", "tree", "<toy>", ",", "sky"]
    first, second = (word for word in words if word.text == "<toy>")
    assert names[first.start : first.stop] == ["<toy>", "<toy>_1"] and names[second.start : second.stop] == ["<toy>"]


def test_a_textual_inversion_of_several_vectors_names_flux_rows():
    pipe = tiny_joint.build("Flux.1")
    pipe.tokenizer_2.add_tokens(["<toy>", "<toy>_1"])
    pipe.text_encoder_2.resize_token_embeddings(len(pipe.tokenizer_2))
    (record,) = traced(pipe, "a <toy> car and a car")
    assert record.daam().tokens == ("a", "<toy>", "<toy>_1", "car", "and", "a", "car", "</s>")
    assert Word("<toy>", 1, 3) in record.daam().words
    assert torch.equal(record.daam()["<toy>"], record.daam().values[1:3].mean(dim=0))
    assert record.encode("a <toy>").tokens == ("a", "<toy>", "<toy>_1", "</s>")


# -- probe tokens ----------------------------------------------------------------------------------------------------


def test_a_probe_of_few_blocks_at_a_time_is_the_same_and_one_too_large_is_refused():
    pipe, record = shared("Flux.1"), shared_record("Flux.1")
    mask = record.daam()["a"] > record.daam()["a"].median()
    pixels, blocks = 96, 5
    needed = 8 * (3 * pixels**2 + 3 * (pixels + 1) ** 2)
    whole = daamlib.optimize_probe([record], [mask])
    made = []
    hook = pipe.transformer.context_embedder.register_forward_hook(lambda *_: made.append(1))
    few = daamlib.optimize_probe([record], [mask], max_bytes=needed)
    hook.remove()
    assert len(made) == 3 * 2 * 2  # passes, for four blocks and for one, for the products and for the embedding
    assert whole.embedding.shape == (1, blocks * 32) and pixels < blocks * 32
    assert_close(few.embedding, whole.embedding, 1e-4)
    assert_close(few.maps(record).values, whole.maps(record).values, 1e-4)
    with pytest.raises(ValueError, match=r"96 pixels.*GiB.*max_bytes"):
        daamlib.optimize_probe([record], [mask], max_bytes=needed - 1)


def test_an_unknown_transformer_is_told_which_are_read(sd1_pipe):
    class Unknown(torch.nn.Module):
        pass

    pipe = shared("SD 3")
    other = with_parts(diffusers.StableDiffusion3Pipeline, "SD 3")
    other.transformer = Unknown()
    with pytest.raises(TypeError, match=r"SD 3.*Flux\.1.*Qwen-Image.*Unknown"), daamlib.trace(other):
        raise AssertionError("the trace began")
    assert pipe.transformer is not other.transformer
