"""Later texts: embedded as the prompt was, by an encoder that still computes the same, and by a pipeline that lives."""

import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import torch
from helpers import assert_close, capture, generate, naive_maps, with_text
from peft import LoraConfig

import daamlib
from daamlib import AttentionRecord

GRIDS = [(16, 24), (8, 12)]
PROMPT, TEXT = "a car and a tree", "a bicycle"


def add_text_lora(pipe, name="default", seed=0):
    torch.manual_seed(seed)
    targets = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(targets, adapter_name=name)


def average_weights(pipe):
    """As an EMA does: `.data` changes no version of a weight."""
    for weight in pipe.text_encoder.parameters():
        weight.data.lerp_(torch.randn_like(weight), 0.3)


def scale_lora(pipe):
    for module in pipe.text_encoder.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.3)


def replace_vector(pipe):
    pipe.unload_textual_inversion()
    pipe.load_textual_inversion({"<toy>": torch.randn(24)}, token="<toy>")


def other_clip_layers(pipe):
    pipe.text_encoder.encoder.layers = pipe.text_encoder.encoder.layers[:1]


CHANGES = {
    "adapters off": lambda pipe: pipe.text_encoder.disable_adapters(),
    "another adapter": lambda pipe: (add_text_lora(pipe, "other", seed=1), pipe.text_encoder.set_adapter("other")),
    "another scale": scale_lora,
    "copied averages": average_weights,
    "another vector": replace_vector,
    "fewer layers": other_clip_layers,
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # of a second adapter
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_encoder_that_computes_something_else_is_refused(fresh, change):
    pipe = fresh("sd1")
    add_text_lora(pipe)
    pipe.load_textual_inversion({"<toy>": torch.ones(24).cumsum(dim=0)}, token="<toy>")
    with daamlib.trace(pipe) as trace:
        generate(pipe, "a <toy> car")
    record, before = trace[0], trace[0].daam(TEXT).values
    assert torch.equal(record.daam(TEXT).values, before)
    change(pipe)
    for read in (record.daam, record.ldaam, record.encode):
        with pytest.raises(
            ValueError, match=r"not the one that embedded this record's prompt.* differ by [\d.]+%.*LoRA"
        ):
            read(TEXT)
    assert record.daam()["<toy>"].isfinite().all()  # the prompt's own maps need no encoder


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # of a second adapter
@pytest.mark.parametrize("change", [CHANGES[name] for name in ("adapters off", "another scale", "copied averages")])
@pytest.mark.parametrize("weight", [1.0, 1.3])
def test_a_prompt_given_as_embeddings_is_read_with_the_encoder_of_then(fresh, tmp_path, change, weight):
    """Weighted ones, too: they are no encoder's, but later texts' keys are."""
    pipe = fresh("sd1")
    add_text_lora(pipe)
    values = weight * pipe.encode_prompt(PROMPT, pipe.device, 1, False)[0]
    negative = pipe.encode_prompt("", pipe.device, 1, False)[0]
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures:
        generate(pipe, None, prompt_embeds=values, negative_prompt_embeds=negative)
    record, later = trace[0], pipe.encode_prompt(TEXT, pipe.device, 1, False)[0][0]
    expected = naive_maps(with_text(pipe.unet, captures, later), GRIDS, image=1)
    maps = record.daam(TEXT)
    assert_close(maps.values, expected[: len(maps)], 1e-4)
    record.save(tmp_path / "a.safetensors")
    change(pipe)
    for each in (record, AttentionRecord.load(tmp_path / "a.safetensors", pipe=pipe)):
        with pytest.raises(ValueError, match="text encoder is not the one"):
            each.daam(TEXT)


@torch.no_grad()
def test_weighted_embeddings_of_a_named_text(fresh):
    """A custom loop says which text its embeddings stand for: later texts are read by the encoder, not refused."""
    pipe = fresh("sd1")
    add_text_lora(pipe)
    text = pipe.encode_prompt(PROMPT, pipe.device, 1, False)[0]
    text[:, 2] *= 1.5
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0)).to(pipe.device)
    pipe.scheduler.set_timesteps(2)
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures, trace.loop(PROMPT, prompt_embeds=text):
        for t in pipe.scheduler.timesteps:
            pipe.unet(latents, t, encoder_hidden_states=text)
    assert_close(trace[0].daam()["car"], naive_maps(captures, GRIDS, image=0)[trace[0].daam().tokens.index("car")])
    later = pipe.encode_prompt(TEXT, pipe.device, 1, False)[0][0]
    maps = trace[0].daam(TEXT)
    assert_close(maps.values, naive_maps(with_text(pipe.unet, captures, later), GRIDS, image=0)[: len(maps)], 1e-4)
    pipe.text_encoder.disable_adapters()
    with pytest.raises(ValueError, match="text encoder is not the one"):
        trace[0].daam(TEXT)


def test_what_leaves_the_embeddings_as_they_are_is_allowed(fresh):
    pipe = fresh("sd1")
    with daamlib.trace(pipe) as trace:
        generate(pipe, PROMPT)
    record, before = trace[0], trace[0].daam(TEXT).values
    pipe.text_encoder.load_state_dict({name: weight.clone() for name, weight in pipe.text_encoder.state_dict().items()})
    pipe.load_textual_inversion({"<toy>": torch.ones(24)}, token="<toy>")  # the prompt has no such word
    assert torch.equal(record.daam(TEXT).values, before)
    toy = record.encode("a <toy>")
    assert torch.equal(record.daam_from(toy).values, record.daam("a <toy>", padding=False).values)
    pipe.text_encoder.bfloat16()
    assert_close(record.daam(TEXT).values, before, 0.1)
    pipe.text_encoder.half()
    assert_close(record.daam(TEXT).values, before, 0.1)


def test_a_record_in_half_precision_reads_with_a_wide_encoder(fresh):
    pipe = fresh("sd1").to(dtype=torch.bfloat16)
    with daamlib.trace(pipe) as trace:
        generate(pipe, PROMPT)
    before = trace[0].daam(TEXT)
    pipe.text_encoder.float()
    after = trace[0].daam(TEXT)
    assert before.values.dtype == after.values.dtype == torch.float32
    assert_close(after.values, before.values, 0.1)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_a_lora_scale_is_part_of_the_model(fresh, tmp_path, scale):
    """A saved record loads with the pipeline that made it; later texts are embedded at the scale of its passes."""
    pipe = fresh("sd1")
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    add_text_lora(pipe)
    adapted = [module for module in pipe.unet.modules() if hasattr(module, "scale_layer")]
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures:
        generate(pipe, PROMPT, cross_attention_kwargs={"scale": scale})
    trace[0].save(tmp_path / "a.safetensors")
    before = [dict(module.scaling) for module in adapted]
    back = AttentionRecord.load(tmp_path / "a.safetensors", pipe=pipe)
    assert [dict(module.scaling) for module in adapted] == before
    # the pipeline's own way to this scale, by which the keys of a later text are computed
    values = pipe.encode_prompt(TEXT, pipe.device, 1, False, lora_scale=scale)[0][0]
    for module in adapted:
        module.scale_layer(scale)
    expected = naive_maps(with_text(pipe.unet, captures, values), GRIDS, image=1)
    for record in (trace[0], back):
        maps = record.daam(TEXT)
        assert_close(maps.values, expected[: len(maps)], 1e-4)
    for module, scaling in zip(adapted, before, strict=True):
        module.scaling.update(scaling)
    pipe.unet.delete_adapters("default")
    if scale:
        with pytest.raises(ValueError, match="give the model that made it, with its LoRA"):
            AttentionRecord.load(tmp_path / "a.safetensors", pipe=pipe)


def test_each_image_of_a_batch_has_its_own_second_prompt(fresh):
    pipe = fresh("sdxl")
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures:
        generate(pipe, ["a car", "a tree"], prompt_2=["red", "a green one"], num_images_per_prompt=2)
    assert [record.embedded_with["prompt_2"] for record in trace] == ["red", "red", "a green one", "a green one"]
    values = pipe.encode_prompt(TEXT, device=pipe.device, do_classifier_free_guidance=False)[0][0]
    for image, record in enumerate(trace):
        expected = naive_maps(with_text(pipe.unet, captures, values), [(8, 12)], image=4 + image)
        maps = record.daam(TEXT)
        assert_close(maps.values, expected[: len(maps)], 1e-4)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_unconditional_half_reads_the_negative_text(fresh, family):
    pipe = fresh(family)
    more = {"negative_prompt_2": ["a red one", "one"]} if family == "sdxl" else {}
    with daamlib.trace(pipe, branch="unconditional") as trace, capture(pipe.unet) as captures:
        generate(pipe, ["a car", "a bus"], negative_prompt=["a tree", "a bicycle and a car"], **more)
    assert [record.prompt for record in trace] == ["a tree", "a bicycle and a car"]
    for image, record in enumerate(trace):
        full = naive_maps(captures, GRIDS if family == "sd1" else [(8, 12)], image=image)
        maps = record.daam()
        assert_close(maps.values, full[: len(maps)], 1e-4)
        assert record.daam("a car")["car"].isfinite().all()  # the encoder is found to be the negative text's
    row = trace[1].prompt_embeddings.tokens.index("car")
    assert_close(trace[1].daam()["car"], full[row], 1e-4)


def test_negative_embeddings_have_no_text(sdxl_pipe):
    """Those of zeros, which SDXL takes for no negative prompt, and those that are given."""
    with daamlib.trace(sdxl_pipe, branch="unconditional") as trace:
        generate(sdxl_pipe, PROMPT)
    if sdxl_pipe.config.force_zeros_for_empty_prompt:
        assert trace[0].prompt is None
    embeddings = sdxl_pipe.encode_prompt(PROMPT, device=sdxl_pipe.device, negative_prompt="a tree")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with daamlib.trace(sdxl_pipe, branch="unconditional") as trace:
        generate(sdxl_pipe, None, **dict(zip(names, embeddings, strict=True)))
    assert trace[0].prompt is None
    assert torch.equal(trace[0].prompt_embeddings.values, embeddings[1][0])


# -- the pipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(fresh):
    pipe = fresh("sd1")
    with daamlib.trace(pipe) as trace:
        generate(pipe, PROMPT)
    return pipe, trace[0]


def test_a_record_does_not_keep_its_pipeline_alive(fresh):
    pipe = fresh("sd1")
    with daamlib.trace(pipe) as trace:
        generate(pipe, PROMPT)
    record = trace[0]
    unet, parts = weakref.ref(pipe.unet), [record.select(steps=[0]), record.to("cpu"), record.collapsed()]
    assert all(part.pipe is pipe for part in parts)
    maps = record.daam(TEXT).values
    del pipe
    gc.collect()
    assert unet() is None and record.pipe is None
    assert record.daam()["car"].isfinite().all()
    with pytest.raises(ValueError, match=r"no text encoder: .*AttentionRecord.load.*record.with_pipe\(pipe\).*alive"):
        record.daam(TEXT)
    again = fresh("sd1")
    assert torch.equal(record.with_pipe(again).daam(TEXT).values, maps)
    assert record.pipe is None and dataclasses.replace(record, pipe=again).pipe is again
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.pipe = again


def test_another_models_pipeline_is_refused(traced, sdxl_pipe, sd2_pipe):
    for pipe in (sdxl_pipe, sd2_pipe):
        with pytest.raises(ValueError, match="this record and the pipeline have other"):
            traced[1].with_pipe(pipe)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_copies_and_pickles_are_without_the_pipeline(traced, copied):
    pipe, record = traced
    linear = record.linear_map()
    other = copied(record)
    assert other.pipe is None and record.pipe is pipe
    assert torch.equal(other.daam().values, record.daam().values)
    assert torch.equal(other.linear_map().weight, linear.weight)
    assert len(pickle.dumps(record)) < 2 * record.nbytes + 200_000  # the weights of the U-Net alone are more
    assert torch.equal(other.with_pipe(pipe).daam(TEXT).values, record.daam(TEXT).values)


# -- what is returned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["queries", "linear", "maps"])
def test_what_is_returned_is_not_the_records_memory(sd1_pipe, store):
    texts = {"texts": [TEXT]} if store == "maps" else {}
    with daamlib.trace(sd1_pipe, store=store, self_attention=True, **texts) as trace:
        generate(sd1_pipe, PROMPT)
    for record in (trace[0], trace[0].select(layers=lambda layer: layer is trace[0].layers[0])):
        reads = {
            "ldaam": lambda record=record: record.ldaam().values,
            "linear map": lambda record=record: record.linear_map().weight,
            "embeddings": lambda record=record: record.text_embeddings().values,
            "refined": lambda record=record: record.refine(record.ldaam()).values,
            "text's embeddings": lambda record=record: record.text_embeddings(padding=False).values,
        }
        if store != "linear":
            reads |= {"daam": lambda record=record: record.daam().values}
            reads |= {"later": lambda record=record: record.daam(TEXT).values}
        before = {name: read().clone() for name, read in reads.items()}
        for read in reads.values():
            read().mul_(2)
        assert all(torch.equal(read(), before[name]) for name, read in reads.items())


def test_bytes_of_all_that_a_record_holds(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, PROMPT)
    before = trace[0].nbytes
    assert before == sum(layer.queries.nbytes for layer in trace[0].layers)
    linear = trace[0].linear_map()
    assert trace[0].nbytes == before + linear.weight.nbytes


def with_bad_queries(record, layer, step, value):
    layers = [dataclasses.replace(each, queries=each.queries.clone()) for each in record.layers]
    layers[layer].queries[step, 5, 3] = value
    if step + 1 < len(record.timesteps):
        layers[0].queries[step + 1 :] = value  # all that follows is lost too
    return dataclasses.replace(record, layers=tuple(layers))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_names_where_it_begins(sd1_pipe, value):
    with daamlib.trace(sd1_pipe) as trace:
        generate(sd1_pipe, PROMPT, num_inference_steps=3)
    bad = with_bad_queries(trace[0], 4, 1, value)
    where = rf"begin in {bad.layers[4].name} at step 1 \(timestep {bad.timesteps[1]}\)"
    for read in (bad.daam, bad.ldaam, bad.linear_map, bad.collapsed, lambda: bad.daam(TEXT)):
        with pytest.raises(ValueError, match=f"hold NaN or infinite values, which {where}"):
            read()
    for method in ("ldaam", "daam"):
        with pytest.raises(ValueError, match=where):
            daamlib.optimize_token([bad], [torch.eye(16, 24) > 0], word="car", method=method)
    assert bad.select(steps=[0]).daam().values.isfinite().all()
    summed = [dataclasses.replace(each, queries=None, query_sum=each.summed_queries()) for each in bad.layers]
    with pytest.raises(ValueError, match=rf"begin in {bad.layers[0].name}:"):  # a sum does not show the step
        dataclasses.replace(bad, layers=tuple(summed)).ldaam()
    with pytest.raises(ValueError, match="the text's embeddings hold NaN"):
        trace[0].daam_from(torch.full((2, 24), value))


def test_self_attention_that_is_not_finite_is_an_error(sd1_pipe):
    for store, field in (("queries", "queries"), ("linear", "mean")):
        with daamlib.trace(sd1_pipe, store=store, self_attention=True) as trace:
            generate(sd1_pipe, PROMPT)
        attention = trace[0].self_attention
        bad = getattr(attention, field).clone()
        bad[..., 3] = float("nan")
        record = dataclasses.replace(trace[0], self_attention=dataclasses.replace(attention, **{field: bad}))
        with pytest.raises(ValueError, match="the self-attention holds NaN"):
            record.refine(record.ldaam())


# -- precision -------------------------------------------------------------------------------------------------------


def test_reading_inside_autocast_is_in_float32(sd1_pipe):
    with daamlib.trace(sd1_pipe, self_attention=True) as trace:
        generate(sd1_pipe, PROMPT)
    record = trace[0]
    maps, linear = record.daam(), record.ldaam()
    refined = record.refine(maps)
    again = dataclasses.replace(record)  # without its linear map
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again.daam().values, maps.values)
        assert torch.equal(again.ldaam().values, linear.values)
        assert torch.equal(again.refine(maps).values, refined.values)


def test_maps_stored_inside_autocast_are_summed_in_float32(sd1_pipe):
    """The queries are the model's, in half precision; their products with the keys are not."""
    with torch.autocast("cpu", torch.bfloat16), daamlib.trace(sd1_pipe) as trace:
        with daamlib.trace(sd1_pipe, store="maps") as online:
            generate(sd1_pipe, PROMPT)
    assert online[0].daam().values.dtype == torch.float32
    assert_close(online[0].daam().values, trace[0].daam().values, 1e-5)


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["queries", "maps"])
def test_maps_of_a_text_that_is_padded_on_the_left(fresh, store):
    pipe = fresh("sd1")
    pipe.tokenizer.padding_side = "left"
    texts = {"texts": ["a car"]} if store == "maps" else {}
    with daamlib.trace(pipe, store=store, **texts) as trace, capture(pipe.unet) as captures:
        generate(pipe, PROMPT)
    full = naive_maps(captures, GRIDS, image=1)
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=77).input_ids
    raw = pipe.tokenizer.convert_ids_to_tokens(ids)
    maps = trace[0].daam()
    assert maps.tokens[0] == "<|startoftext|>" and "<pad>" not in maps.tokens
    assert_close(maps.values, full[raw.index("<|startoftext|>") :])
    assert_close(maps["car"], full[raw.index("car</w>")])
    values = pipe.encode_prompt("a car", pipe.device, 1, False)[0][0]
    later, expected = trace[0].daam("a car"), naive_maps(with_text(pipe.unet, captures, values), GRIDS, image=1)
    assert_close(later.values, expected[-4:])


def test_maps_of_a_textual_inversion_and_of_both_cars(fresh):
    pipe = fresh("sd1")
    vectors = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))
    pipe.load_textual_inversion({"<toy>": vectors}, token="<toy>")
    with daamlib.trace(pipe) as trace, capture(pipe.unet) as captures:
        generate(pipe, "a <toy> car and a car")
    full, maps = naive_maps(captures, GRIDS, image=1), trace[0].daam()
    assert_close(maps["<toy>"], full[2:5].mean(dim=0))
    cars = [row for row, token in enumerate(maps.tokens) if token == "car"]
    assert cars[0] == 5 and len(cars) == 2
    assert_close(maps["car"], full[cars].mean(dim=0))
    assert_close(maps["car", 1], full[cars[1]])
    assert_close(maps["<toy> car"], full[2:6].mean(dim=0))
