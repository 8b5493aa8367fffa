"""Joint models: SD 3, SD 3.5, Flux.1 and Qwen-Image, tiny and with random weights.

What is compared with is computed here: by an attention processor with explicit probabilities, or by the blocks
themselves.
"""

import functools
import math

import helpers
import pytest
import tiny_joint
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from diffusers.hooks import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    apply_first_block_cache,
    apply_pyramid_attention_broadcast,
)
from helpers import assert_close
from peft import LoraConfig
from tiny_joint import PROMPT, explicit, generate, hooks_of, shared, traced

import daamlib
from daamlib.attention.joint.families import family_of
from daamlib.attention.joint.maps import concept_map, lone_word, open_vocabulary_daam, prompt_daam
from daamlib.attention.joint.reading import passes_to_read
from daamlib.attention.joint.stream import Stream

FAMILIES = list(tiny_joint.BUILDERS)
WORDS = ["car", "traffic light", "road"]


def supports(feature, note=None):
    """Each family in turn, marked as one that has this feature where the test passes."""
    kept = {} if note is None else {"note": note}
    mark = functools.partial(pytest.mark.supports, feature=feature, **kept)
    params = [pytest.param(family, marks=mark(family=family)) for family in FAMILIES]
    return pytest.mark.parametrize("family", params)


def of_families(*families):
    return pytest.mark.parametrize("family", families or FAMILIES)


@functools.cache
def shared_record(family):
    """Of an image that words ran along with."""
    (record,) = traced(shared(family), words=WORDS)
    return record


def arguments_of_a_pass(pipe, **options):
    """What the pipeline calls its transformer with in the first pass."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    generate(pipe, num_inference_steps=1, **options)
    hook.remove()
    return seen[0]


# -- the image and the stream --------------------------------------------------------------------------------------


@of_families()
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
def test_the_image_is_the_same(family, guided):
    pipe = shared(family)
    options = {"guidance_scale": 5.0} if family.startswith("SD") else {"negative_prompt": "road", "true_cfg_scale": 4.0}
    options = options if guided else {}
    before, hooks = generate(pipe, num_inference_steps=6, **options), hooks_of(pipe.transformer)
    with daamlib.trace(pipe, words=WORDS) as trace:
        now = generate(pipe, num_inference_steps=6, **options)
        assert hooks_of(pipe.transformer) != hooks
    assert torch.equal(before, now)
    assert len(trace) == 1 and len(trace[0].timesteps) == 4
    assert hooks_of(pipe.transformer) == hooks
    assert not {"encode_prompt", "check_inputs", "maybe_free_model_hooks"} & vars(pipe).keys()


@of_families()
def test_the_prompt_as_a_text_of_ours_equals_the_text_in_every_block(family, monkeypatch):
    pipe = shared(family)
    arguments = arguments_of_a_pass(pipe)
    blocks = [block for name in family_of(pipe).blocks for block in getattr(pipe.transformer, name)]
    returned, seen = [], []
    for block in blocks:  # a hook on the block would not see its second call
        forward = block.forward
        monkeypatch.setattr(
            block, "forward", lambda forward=forward, **kw: returned.append(forward(**kw)) or returned[-1]
        )
    with torch.no_grad(), Stream(family_of(pipe), pipe.transformer) as stream:
        text = arguments["encoder_hidden_states"][0]
        stream.begin(arguments, slice(None), [text], lambda image, texts: seen.append((image, *texts)))
        pipe.transformer(**arguments)
    real, second = returned[::2], returned[1::2]
    assert len(real) == len(second) == len(seen) == len(blocks)
    for (text, image), (other_text, other_image) in zip(real, second, strict=True):
        assert torch.equal(image, other_image)
        assert (text is None and other_text is None) or torch.equal(text, other_text)
    assert [text is None for text, _ in real] == [False] * (len(blocks) - 1) + [family.startswith("SD")]
    for image, text in seen:
        assert torch.equal(image.text_keys, text.text_keys)
        assert (image.text_vectors is None) == (text.text_vectors is None)
        assert text.text_vectors is None or torch.equal(image.text_vectors, text.text_vectors)


@of_families()
def test_the_formulae_equal_explicit_attention(family):
    pipe = shared(family)
    arguments, seen = arguments_of_a_pass(pipe), []
    text = arguments["encoder_hidden_states"][0]
    with torch.no_grad(), explicit(pipe, family) as attention:
        with Stream(family_of(pipe), pipe.transformer) as stream:
            stream.begin(arguments, slice(None), [text], lambda image, texts: seen.append((image, *texts)))
            pipe.transformer(**arguments)
    calls = attention.calls[::2]  # without the second ones
    assert len(calls) == len(seen)
    pool = torch.zeros(3, len(text))
    pool[0, 1], pool[1, 2:4], pool[2, 5] = 1, 0.5, 1
    for call, (image, own) in zip(calls, seen, strict=True):
        scores = pool @ call["scores"]
        assert_close(prompt_daam(image), call["probabilities"])
        assert_close(prompt_daam(image, max_bytes=2**14), call["probabilities"])
        assert_close(open_vocabulary_daam(image, own, pool), scores.softmax(dim=2).sum(dim=1))
        assert_close(lone_word(image, own, pool), scores.sum(dim=1))
        concepts = concept_map(image, own, pool)
        if call["text"] is None:
            assert concepts is None
        else:
            assert_close(concepts, ((pool @ call["text"]) @ call["image"].transpose(1, 2)).softmax(dim=1), 1e-4)
    assert [call["text"] is None for call in calls] == [False] * (len(calls) - 1) + [family.startswith("SD")]


# -- records ---------------------------------------------------------------------------------------------------------


@supports("prompt's words")
def test_daam_of_the_prompt_equals_explicit_probabilities(family):
    pipe = shared(family)
    options = {"guidance_scale": 5.0} if family.startswith("SD") else {"negative_prompt": "road", "true_cfg_scale": 4.0}
    with explicit(pipe, family) as attention:
        (record,) = traced(pipe, **options)
    blocks = len(record.layer_names())
    passes = [attention.calls[at : at + blocks] for at in range(0, len(attention.calls), blocks)]
    if family.startswith("SD"):  # both halves in one batch, the prompt last
        own = [call["probabilities"][1] for calls in passes for call in calls]
    else:  # two passes, the prompt first
        own = [call["probabilities"][0] for calls in passes[::2] for call in calls]
    assert len(own) == 3 * blocks
    rows = [row for row, token in enumerate(record.prompt_embeddings.tokens) if token != "<pad>"]
    expected = sum(own)[rows].unflatten(1, record.grid)
    maps = record.daam()
    assert_close(maps.values, expected)
    assert record.prompt == PROMPT and record.grid == ((4, 6) if family == "Qwen-Image" else (8, 12))
    at = maps.tokens.index("car")
    same = [row for row, token in enumerate(maps.tokens) if token == "car"]
    assert torch.equal(maps["car"], maps.values[same].mean(dim=0)) and at in same


@supports("any text", "The model runs the stored passes again, with the text in addition.")
def test_words_read_later_equal_those_read_while_generating(family):
    record, (bare,) = shared_record(family), traced(shared(family))
    assert record.words == tuple(WORDS) and bare.words == ()
    kept, later = record.daam(WORDS), bare.daam(WORDS)
    assert torch.equal(kept.values, later.values) and kept.tokens == later.tokens == tuple(WORDS)
    assert torch.equal(record.daam().values, bare.daam().values)
    blocks, passes = len(record.layer_names()), len(record.timesteps)
    heads = shared(family).transformer.config.num_attention_heads
    assert record.summands == blocks * passes * heads
    assert_close(kept.values.sum(dim=0), torch.full(record.grid, float(record.summands)))
    text = bare.daam_from(bare.encode(PROMPT))  # its tokens, without padding, compete with each other alone
    assert text.tokens == bare.daam().tokens and text["traffic light"].shape == record.grid
    assert_close(text.values.sum(dim=0), torch.full(record.grid, float(record.summands)))


@supports("concept map")
def test_a_concept_map_read_later_equals_the_one_read_while_generating(family):
    record, (bare,) = shared_record(family), traced(shared(family))
    kept, later = record.concept_map(WORDS), bare.concept_map(WORDS)
    assert torch.equal(kept.values, later.values)
    blocks = len(record.layer_names()) - family.startswith("SD")  # the last one makes nothing of the text
    assert_close(kept.values.sum(dim=0), torch.full(record.grid, float(blocks * len(record.timesteps))))
    assert kept["traffic light"].std() > 0
    for bad, error in ((["car"], ValueError), (["car", "car"], ValueError), ("car", TypeError), ([1, 2], TypeError)):
        with pytest.raises(error, match="words"):
            bare.concept_map(bad)


@supports("lone word", "`record.ldaam(word)` alone: a separate text, not linear in the word's embedding.")
def test_a_lone_word_has_a_stream_of_its_own_and_no_softmax(family):
    record, pipe = shared_record(family), shared(family)
    maps = record.ldaam("tree")
    embeddings = record.encode("tree")
    assert maps.tokens == embeddings.tokens and maps["tree"].shape == record.grid
    scores = []
    with torch.no_grad(), explicit(pipe, family) as attention:
        for call in record.calls:  # the image's queries of the real pass, with the keys of the word in front of it
            with Stream(family_of(pipe), pipe.transformer) as stream:
                stream.begin(
                    call, slice(None), [embeddings.values], lambda image, texts: scores.append((image, *texts))
                )
                pipe.transformer(**call)
    expected = 0
    for (image, own), second in zip(scores, attention.calls[1::2], strict=True):
        keys, queries = own.text_keys[0], image.queries[0]
        ours = queries @ keys.transpose(1, 2) / math.sqrt(queries.shape[-1])
        assert_close(ours.transpose(1, 2), second["scores"][0])  # the processor saw the same two meet
        expected = expected + ours.sum(dim=0).T
    assert_close(maps.values, expected.unflatten(1, record.grid))
    with pytest.raises(TypeError, match="string"):
        record.ldaam(["tree"])


@supports("real images")
def test_a_real_image_is_read_as_the_pipeline_would_denoise_it(family):
    pipe = tiny_joint.build(family)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    hooks = hooks_of(pipe.transformer)
    record = daamlib.trace_image(pipe, image, prompt="a car", timesteps=(250,), seed=3)
    assert hooks_of(pipe.transformer) == hooks
    with torch.no_grad():
        pixels = image[None] * 2 - 1
        if family == "Qwen-Image":
            latents = pipe.vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
            mean, std = (torch.tensor(pipe.vae.config[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("mean", "std"))
            latents = (latents - mean) / std
        else:
            latents = (pipe.vae.encode(pixels).latent_dist.mean - 0.06) * 1.5
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    noisy = 0.75 * latents + 0.25 * noise
    if not family.startswith("SD"):
        noisy = pipe._pack_latents(noisy, 1, 4, *noisy.shape[-2:])
    length = {"SD 3": 256, "SD 3.5": 256, "Flux.1": 512, "Qwen-Image": 1024}[family]
    options = {"sigmas": [0.25], "num_inference_steps": 1, "max_sequence_length": length}
    (expected,) = traced(pipe, "a car", latents=noisy, **options)
    assert record.timesteps == expected.timesteps == [250]
    assert_close(record.daam().values, expected.daam().values, 1e-4)
    assert_close(record.concept_map(WORDS).values, expected.concept_map(WORDS).values, 1e-4)
    assert record.prompt == "a car" and record.daam()["car"].shape == record.grid
    for bad in ({"timesteps": ()}, {"timesteps": (1001,)}, {"self_attention": True}):
        with pytest.raises(ValueError, match="timesteps|self_attention"):
            daamlib.trace_image(pipe, image, **bad)
    with pytest.raises(ValueError, match="multiples"):
        daamlib.trace_image(pipe, image[:, :30])


@supports("token", "`optimize_probe`: a vector for each block in the output space, which no prompt can hold.")
def test_a_probe_token_recovers_a_synthetic_mask(family):
    pipe = shared(family)
    records = [shared_record(family), *traced(pipe, "a tree and sky", seed=1)]
    hidden = torch.randn(1, records[0].probe_map().weight.shape[2], generator=torch.Generator().manual_seed(0))
    scores = [record.probe_map()(hidden)[0] for record in records]
    masks = [score > score.median() for score in scores]
    token = daamlib.optimize_probe(records, masks, word="car")
    assert token.method == "probe" and token.gradient_norm < 1e-6 and token.losses[-1] < 0.1 * token.losses[0]
    for record, mask in zip(records, masks, strict=True):
        found = token.probabilities(record)[0] > 0.5
        assert (found == mask).float().mean() > 0.99
        assert_close(token.maps(record)["car"], record.probe_map()(token.embedding)[0])
    part = daamlib.optimize_probe(records, masks, layers=records[0].layer_names()[1:2])
    assert part.embedding.shape[1] == pipe.transformer.inner_dim
    assert part.maps(records[0]).values.shape == (1, *records[0].grid)
    both = [torch.stack([mask, ~mask]) for mask in masks]
    classes = daamlib.optimize_probe(records, both, word=["car", "road"], multiclass=True)
    assert_close(classes.probabilities(records[0]).sum(dim=0), torch.ones(records[0].grid))


def test_a_probe_token_is_the_minimum_over_all_channels(tmp_path):
    record = shared_record("SD 3")
    mask = record.daam()["car"] > record.daam()["car"].median()
    token = daamlib.optimize_probe([record], [mask], weight_decay=0.0, iterations=3)
    rows = record.probe_map().weight.flatten(0, 1).double()
    assert len(rows) < rows.shape[1]  # more unknowns than pixels
    off = token.embedding.double() - token.embedding.double() @ torch.linalg.pinv(rows) @ rows
    assert off.norm() < 1e-5 * token.embedding.norm()
    token.save(tmp_path / "probe.safetensors")
    again = daamlib.OptimizedToken.load(tmp_path / "probe.safetensors")
    assert torch.equal(again.maps(record).values, token.maps(record).values)
    with pytest.raises(ValueError, match="model"):
        again.maps(shared_record("SD 3.5"))
    with pytest.raises(TypeError, match="AttentionRecord"):
        daamlib.optimize_token([record], [mask])
    with pytest.raises(ValueError, match="layers"):
        daamlib.optimize_probe([record], [mask], layers=["attn2"])


def test_probe_tokens_and_others_do_not_read_each_others_records(sd1_pipe):
    record = shared_record("Flux.1")
    mask = record.daam()["car"] > record.daam()["car"].median()
    token = daamlib.optimize_probe([record], [mask])
    with daamlib.trace(sd1_pipe) as trace:
        helpers.generate(sd1_pipe)
    with pytest.raises(TypeError, match="probe"):
        token.maps(trace[0])
    with pytest.raises(TypeError, match="JointRecord"):
        daamlib.optimize_probe([trace[0]], [mask])


# -- calls -----------------------------------------------------------------------------------------------------------


@of_families()
def test_a_batch_gives_the_records_of_its_images(family):
    pipe, prompts, count = shared(family), ["a car", "a red tree and a road"], 2
    size = {"height": 32, "width": 48}
    if family == "Qwen-Image":
        size = {"height": 64, "width": 96}  # its VAE makes a quarter of it
        count = 1  # diffusers 0.42 gives the images of several prompts each other's masks if there are more
    noise = torch.randn(2 * count, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    if not family.startswith("SD"):
        noise = pipe._pack_latents(noise, 2 * count, 4, 16, 24)
    options = {"guidance_scale": 5.0} if family.startswith("SD") else {}
    records = traced(pipe, prompts, words=WORDS, num_images_per_prompt=count, latents=noise, **size, **options)
    assert [record.prompt for record in records] == [prompts[0]] * count + [prompts[1]] * count
    for number in (0, len(records) - 1):
        record = records[number]
        (alone,) = traced(pipe, record.prompt, words=WORDS, latents=noise[number : number + 1], **size, **options)
        assert record.daam().tokens == alone.daam().tokens
        assert_close(record.daam().values, alone.daam().values, 1e-3)
        assert_close(record.concept_map(WORDS).values, alone.concept_map(WORDS).values, 1e-3)
        later = record.daam(["sky", "tree"])  # of its own passes, made again one by one
        assert_close(later.values, alone.daam(["sky", "tree"]).values, 1e-3)


@of_families("SD 3", "SD 3.5")
def test_of_guidance_in_two_halves_the_conditional_one_is_read(family):
    pipe = shared(family)
    (plain,) = traced(pipe, words=WORDS, num_inference_steps=1)
    (guided,) = traced(pipe, words=WORDS, num_inference_steps=1, guidance_scale=5.0, negative_prompt="sky")
    assert_close(guided.daam().values, plain.daam().values)
    assert_close(guided.concept_map(WORDS).values, plain.concept_map(WORDS).values)
    assert all(len(call["hidden_states"]) == len(call["timestep"]) == 1 for call in guided.calls)
    (empty,) = traced(pipe, "", guidance_scale=5.0)  # both halves have the same text
    assert len(empty.timesteps) == 3


@of_families("Flux.1", "Qwen-Image")
def test_of_guidance_in_two_passes_the_prompts_are_read(family):
    pipe = shared(family)
    (plain,) = traced(pipe, num_inference_steps=1)
    for negative in ("sky", PROMPT):
        (guided,) = traced(pipe, num_inference_steps=1, true_cfg_scale=4.0, negative_prompt=negative)
        assert torch.equal(guided.daam().values, plain.daam().values) and guided.prompt == PROMPT
    (guided,) = traced(pipe, true_cfg_scale=4.0, negative_prompt=PROMPT)
    assert len(guided.timesteps) == 3


def test_embedded_guidance_is_kept():
    pipe = shared("Flux.1")
    (weak,), (strong,) = (
        traced(pipe, words=WORDS, num_inference_steps=1, guidance_scale=scale) for scale in (1.0, 90.0)
    )
    assert not torch.equal(weak.daam().values, strong.daam().values)
    assert [record.calls[0]["guidance"].tolist() for record in (weak, strong)] == [[1.0], [90.0]]
    for record in (weak, strong):
        (again,) = traced(pipe, num_inference_steps=1, guidance_scale=record.calls[0]["guidance"].item())
        assert torch.equal(again.daam(WORDS).values, record.daam(WORDS).values)


def test_qwens_words_may_be_longer_than_its_prompt():
    pipe = shared("Qwen-Image")
    (record,) = traced(pipe, "a")
    words = [f"{word} and a {word}" for word in ("car", "tree", "sky", "road", "light")]
    assert sum(len(record.encode(word).words) for word in words) > len(record.prompt_embeddings.tokens)
    assert record.daam(words).values.isfinite().all()


def test_masked_rows_of_qwens_prompts_are_no_tokens():
    short, long = traced(shared("Qwen-Image"), ["a car", PROMPT])
    assert len(short.prompt_embeddings.tokens) == len(long.prompt_embeddings.tokens)
    assert "<pad>" in short.prompt_embeddings.tokens and "<pad>" not in long.prompt_embeddings.tokens
    assert short.calls[0]["encoder_hidden_states_mask"].sum() == len(short.daam().tokens)
    pad = short.prompt_embeddings.tokens.index("<pad>")
    assert short.maps["prompt"][pad:].abs().max() == 0


def test_several_calls_and_nested_traces():
    pipe = shared("Flux.1")
    with daamlib.trace(pipe, words=WORDS) as outer, daamlib.trace(pipe, words=WORDS[:2]) as inner:
        generate(pipe)
        outer[0].daam("sky")  # passes made again inside of the `with` are no image's
        generate(pipe, "a tree", num_inference_steps=9)
    assert len(outer) == len(inner) == 2
    expected = shared_record("Flux.1")
    assert torch.equal(outer[0].daam(WORDS).values, expected.daam(WORDS).values)
    assert torch.equal(inner[0].daam(WORDS[:2]).values, expected.daam(WORDS[:2]).values)
    assert len(outer[1].timesteps) == 4 and outer[1].prompt == "a tree"


@pytest.mark.parametrize(("count", "kept"), [(1, {0}), (4, {0, 1, 2, 3}), (6, {0, 2, 3, 5}), (28, {3, 10, 17, 24})])
def test_four_passes_are_kept(count, kept):
    assert passes_to_read(count) == kept


def test_an_aborted_call_leaves_no_record():
    pipe = shared("SD 3")
    hooks = hooks_of(pipe.transformer)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), daamlib.trace(pipe, words=WORDS) as trace:
        generate(pipe)
        generate(pipe, callback_on_step_end=stop)
    assert len(trace) == 1 and hooks_of(pipe.transformer) == hooks and "encode_prompt" not in vars(pipe)
    with daamlib.trace(pipe) as trace:
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, callback_on_step_end=stop)
        with pytest.warns(UserWarning, match="did not end"):
            generate(pipe)
    assert len(trace) == 1 and len(trace.problems) == 1
    assert torch.equal(trace[0].daam().values, shared_record("SD 3").daam().values)


def test_an_interrupted_call_leaves_the_passes_it_made():
    def interrupt(pipe, step, *_):
        pipe._interrupt = step == 1
        return {}

    (record,) = traced(shared("SD 3"), callback_on_step_end=interrupt)
    assert len(record.timesteps) == 2


def test_image_to_image():
    pipe = StableDiffusion3Img2ImgPipeline(**shared("SD 3").components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with daamlib.trace(pipe, words=WORDS) as trace:
        pipe(PROMPT, image=image, strength=0.5, num_inference_steps=12, generator=torch.Generator().manual_seed(0))
    assert len(trace[0].timesteps) == 4 and max(trace[0].timesteps) < 900
    assert trace[0].concept_map(["tree", "sky"]).values.isfinite().all()


def test_skipped_layers_of_guidance_are_no_pass_of_the_prompt():
    pipe = shared("SD 3.5")
    options = {"guidance_scale": 5.0, "num_inference_steps": 4}
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    (record,) = traced(pipe, **options, **skip)
    (plain,) = traced(pipe, **options)
    assert record.timesteps == plain.timesteps and "skip_layers" not in record.calls[-1]


def test_embeddings_instead_of_a_prompt_have_numbered_tokens():
    pipe = shared("Flux.1")
    with torch.no_grad():
        embeddings, pooled, _ = pipe.encode_prompt(PROMPT, max_sequence_length=12)
    with daamlib.trace(pipe) as trace:
        generate(pipe, None, prompt_embeds=embeddings, pooled_prompt_embeds=pooled)
    assert trace[0].prompt is None and trace[0].daam().tokens == tuple(str(row) for row in range(12))


def test_half_precision_and_inference_mode():
    pipe = tiny_joint.build("Flux.1").to(dtype=torch.bfloat16)
    with torch.inference_mode():
        (record,) = traced(pipe, words=WORDS)
    assert record.daam().values.dtype == torch.float32 and not record.daam().values.is_inference()
    assert record.calls[0]["hidden_states"].dtype == torch.bfloat16
    (bare,) = traced(pipe)
    assert torch.equal(bare.daam(WORDS).values, record.daam(WORDS).values)


@of_families()
def test_streams_do_not_see_each_other_and_are_not_linear_in_the_text(family):
    pipe, record = shared(family), shared_record(family)
    first, second = record.encode("a car").values, record.encode("sky and tree").values

    def keys(*texts):
        """Of each text in the third block."""
        seen = []
        with torch.no_grad(), Stream(family_of(pipe), pipe.transformer) as stream:
            stream.begin(record.calls[0], slice(None), texts, lambda image, found: seen.append(found))
            pipe.transformer(**record.calls[0])
        return [text.text_keys for text in seen[2]]

    together = keys(first, second)
    assert torch.equal(together[0], keys(first)[0]) and torch.equal(together[1], keys(second)[0])
    side = keys(torch.cat([first, second]))[0]
    assert not torch.allclose(side[:, :, : len(first)], together[0], rtol=1e-3)
    base, doubled = keys(0 * first)[0], keys(2 * first)[0]
    assert (doubled - 2 * together[0] + base).norm() > 0.1 * (doubled - base).norm()


def test_reading_inside_a_call_leaves_the_call_as_it_is():
    maps = []

    def read(pipe, step, *_):
        maps.append(trace[0].daam(WORDS).values) if len(trace) else None
        return {}

    pipe = shared("SD 3.5")
    plain = generate(pipe, seed=1)
    with daamlib.trace(pipe) as trace:
        generate(pipe)
        assert torch.equal(generate(pipe, seed=1, callback_on_step_end=read), plain)
    assert len(trace) == 2 and len(maps) == 3 and len(trace[1].timesteps) == 3
    assert torch.equal(maps[0], maps[2]) and torch.equal(maps[0], shared_record("SD 3.5").daam(WORDS).values)


def test_a_lora_counts():
    pipe, plain = tiny_joint.build("Flux.1"), shared_record("Flux.1")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "add_k_proj", "to_out.0"]))
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    with explicit(pipe, "Flux.1") as attention:
        (record,) = traced(pipe)
    expected = sum(call["probabilities"][0] for call in attention.calls)
    assert_close(record.daam().values, expected[: len(record.daam().tokens)].unflatten(1, record.grid))
    assert record.fingerprint.difference(plain.fingerprint)
    (again,) = traced(pipe, words=WORDS)
    assert_close(again.concept_map(WORDS).values, record.concept_map(WORDS).values, 1e-3)


@pytest.mark.parametrize("compile_", ["whole", "in place", "blocks"])
def test_a_compiled_transformer_runs_uncompiled(compile_):
    pipe = tiny_joint.build("SD 3")
    if compile_ == "whole":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    elif compile_ == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer.transformer_blocks[1] = torch.compile(pipe.transformer.transformer_blocks[1], backend="eager")
    (record,) = traced(pipe, words=WORDS)
    assert torch.equal(record.concept_map(WORDS).values, shared_record("SD 3").concept_map(WORDS).values)
    assert torch.equal(record.ldaam("tree").values, shared_record("SD 3").ldaam("tree").values)
    assert record.layer_names() == shared_record("SD 3").layer_names()


@of_families("SD 3", "Flux.1")
def test_blocks_that_are_off_loaded_can_be_read(family):
    pipe, cpu = tiny_joint.build(family), torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    (record,) = traced(pipe, words=WORDS)
    assert torch.equal(record.concept_map(WORDS).values, shared_record(family).concept_map(WORDS).values)
    assert torch.equal(record.ldaam("tree").values, shared_record(family).ldaam("tree").values)


def test_records_go_where_they_are_wanted():
    with daamlib.trace(shared("Flux.1"), store_device="meta") as trace:
        generate(shared("Flux.1"))
    assert trace[0].device.type == "meta"


# -- texts -----------------------------------------------------------------------------------------------------------


def test_tokens_have_names():
    record = shared_record("SD 3")
    tokens = record.encode("a traffic light, sky")
    clip = ("<|startoftext|>", "a", "traffic", "light", ",", "sky", "<|endoftext|>")
    assert tokens.tokens == (*clip, "a", "traf", "fic", "light", ",", "sky", "</s>")
    assert [word.text for word in tokens.words] == ["a", "traffic", "light", ",", "sky"] * 2
    assert (tokens.words[6].start, tokens.words[6].stop) == (8, 10)
    flux = shared_record("Flux.1").encode("a traffic light, sky")
    assert flux.tokens == tokens.tokens[7:] and flux.values.shape == (7, 32)
    qwen = shared_record("Qwen-Image").encode("a traffic light, sky")
    assert qwen.tokens[:6] == ("a", "traffic", "light", ",", "sky", "<|im_end|>")
    assert [word.text for word in qwen.words] == ["a", "traffic", "light", ",", "sky"]


@of_families()
def test_bad_texts_are_refused(family):
    record = shared_record(family)
    with pytest.raises(TypeError, match="string"):
        record.encode(3)
    with pytest.raises(ValueError, match="tree"):
        record.daam()["tree"]
    with pytest.raises(ValueError, match="word"):
        record.daam(["car", " "])
    if family != "Qwen-Image":  # which reads 1024 tokens
        (short,) = traced(shared(family), max_sequence_length=8)
        assert short.embedded_with == {"max_sequence_length": 8}
        with pytest.raises(ValueError, match="longer"):
            short.encode("a car and a tree and a car and a tree")


def test_each_encoders_own_prompt_names_its_tokens():
    (record,) = traced(shared("SD 3"), prompt_3="a tree")
    assert record.prompt == PROMPT and record.daam().tokens[-3:] == ("a", "tree", "</s>")
    assert {"car", "tree"} <= {word.text for word in record.daam().words}


# -- refusals --------------------------------------------------------------------------------------------------------


@of_families("SD 3", "Flux.1")
def test_fused_projections_are_refused(family):
    pipe = tiny_joint.build(family)
    record = traced(pipe)[0]
    pipe.transformer.fuse_qkv_projections()
    for read in (
        lambda: traced(pipe),
        lambda: record.daam(WORDS),
        lambda: daamlib.trace_image(pipe, torch.rand(3, 32, 48)),
    ):
        with pytest.raises(ValueError, match="fused"):
            read()
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(traced(pipe)[0].daam().values, record.daam().values)


@pytest.mark.parametrize("cache", ["first block", "pyramid"])
@of_families("SD 3", "Flux.1", "Qwen-Image")
def test_caches_that_skip_blocks_are_refused(family, cache):
    pipe = tiny_joint.build(family)
    if cache == "first block":
        apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.2))
    else:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
        apply_pyramid_attention_broadcast(pipe.transformer, config)
    hooks = hooks_of(pipe.transformer)
    with pytest.raises(ValueError, match="cache"):
        traced(pipe)
    assert hooks_of(pipe.transformer) == hooks


def test_a_block_that_made_no_attention_is_noticed():
    pipe = tiny_joint.build("Flux.1")
    block, out = pipe.transformer.transformer_blocks[1], []
    forward = block.forward
    block.forward = lambda **kwargs: out[-1] if len(out) > 1 else out.append(forward(**kwargs)) or out[-1]
    with pytest.warns(UserWarning, match="no record.*made 0 joint attentions.*cache"), daamlib.trace(pipe) as trace:
        generate(pipe)
    assert len(trace) == 0


def test_layers_replaced_inside_are_noticed():
    pipe = tiny_joint.build("SD 3")
    with pytest.raises(ValueError, match="LoRA"), daamlib.trace(pipe):
        attention = pipe.transformer.transformer_blocks[0].attn
        attention.to_q = torch.nn.Linear(32, 32)
        generate(pipe)


@pytest.mark.parametrize(
    "options",
    [{"branch": "unconditional"}, {"store": "linear"}, {"texts": ["car"], "store": "maps"}, {"self_attention": True},
     {"middle": True}],
)  # fmt: skip
def test_options_of_other_models_are_refused(options):
    with pytest.raises(ValueError, match="joint"), daamlib.trace(shared("SD 3"), **options):
        raise AssertionError("the trace began")


def test_there_is_no_linear_map():
    for ask in (daamlib.trace(shared("SD 3"), store="linear").__enter__, shared_record("SD 3").linear_map):
        with pytest.raises(ValueError, match="nothing to collapse.*ldaam.*optimize_probe"):
            ask()


def test_words_are_refused_for_other_models_and_where_they_cannot_compete(sd1_pipe):
    with pytest.raises(ValueError, match="joint"), daamlib.trace(sd1_pipe, words=WORDS):
        raise AssertionError("the trace began")
    for words, error in ((["car"], ValueError), ("car", TypeError)):
        with pytest.raises(error, match="words"), daamlib.trace(shared("SD 3"), words=words):
            raise AssertionError("the trace began")


def test_passes_that_cannot_be_told_are_refused():
    pipe = shared("Flux.1")
    arguments = arguments_of_a_pass(pipe)
    with torch.no_grad(), pytest.raises(ValueError, match=r"trace\.loop\(prompts\)"), daamlib.trace(pipe):
        pipe.transformer(**arguments)

    def other_text(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1}

    options = {"callback_on_step_end": other_text, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.warns(UserWarning, match="leaves no record: .* `encode_prompt` did not"), daamlib.trace(pipe) as trace:
        generate(pipe, **options)  # the image is made: it was too late to refuse
    assert len(trace) == 0
    states = arguments["hidden_states"]
    for reason, changed in {
        "joint_attention_kwargs.*ip_hidden_states": {"joint_attention_kwargs": {"ip_hidden_states": [0]}},
        "positions.*other images": {
            "img_ids": torch.cat([arguments["img_ids"]] * 2),
            "hidden_states": states.repeat(1, 2, 1),
        },
        "1 texts for 2 latents": {"hidden_states": states.repeat(2, 1, 1)},
    }.items():
        hook = pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs, changed=changed: (args, {**kwargs, **changed}), with_kwargs=True
        )
        passes = []
        end = pipe.transformer.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        try:
            with pytest.raises(ValueError, match=reason), daamlib.trace(pipe):
                generate(pipe, num_inference_steps=9)
        finally:
            hook.remove()
            end.remove()
        assert not passes  # refused in the first one


# -- files -----------------------------------------------------------------------------------------------------------


@supports("save and load")
def test_a_saved_record_knows_its_maps_and_with_a_model_any_text(family, tmp_path):
    record, path = shared_record(family), tmp_path / "record.safetensors"
    record.save(path)
    alone = daamlib.JointRecord.load(path)
    assert alone.pipe is None and alone.timesteps == record.timesteps and alone.words == record.words
    assert torch.equal(alone.daam().values, record.daam().values) and alone.daam().tokens == record.daam().tokens
    assert torch.equal(alone.concept_map(WORDS).values, record.concept_map(WORDS).values)
    for read in (alone.daam, alone.ldaam, alone.encode):
        with pytest.raises(ValueError, match="model"):
            read("tree")
    with pytest.raises(ValueError, match="model"):
        alone.probe_map()
    loaded = daamlib.JointRecord.load(path, pipe=shared(family))
    assert torch.equal(loaded.concept_map(["car", "sky"]).values, record.concept_map(["car", "sky"]).values)
    assert torch.equal(loaded.probe_map().weight, record.probe_map().weight)
    assert loaded.nbytes == record.nbytes and record.to("cpu").nbytes == record.nbytes
    assert path.stat().st_size < record.nbytes + record.prompt_embeddings.values.nbytes + 60_000
    other = shared("SD 3.5" if family == "SD 3" else "SD 3")
    with pytest.raises(ValueError, match="model"):
        daamlib.JointRecord.load(path, pipe=other)
    with pytest.raises(ValueError, match="format"):
        daamlib.AttentionRecord.load(path)


def test_a_records_text_is_kept_once():
    record = shared_record("Flux.1")
    assert all(call["encoder_hidden_states"] is record.calls[0]["encoder_hidden_states"] for call in record.calls)
    assert record.calls[0]["hidden_states"] is not record.calls[1]["hidden_states"]
