"""Custom denoising loops that `trace.loop` announces: what is read, and what is refused."""

import contextlib
import inspect

import pytest
import torch
from helpers import assert_close, capture, generate, naive_maps

import daamlib

GRIDS = [(16, 24), (8, 12)]


def noise(rows):
    return torch.randn(rows, 4, 16, 24, generator=torch.Generator().manual_seed(0))


def embed(pipe, prompts):
    return pipe.encode_prompt(prompts, pipe.device, 1, False)[0]


@torch.no_grad()
def test_rows_name_the_images(sd1_pipe):
    """Guidance with the prompts' half first: only `rows` can say so."""
    with daamlib.trace(sd1_pipe) as trace, capture(sd1_pipe.unet) as captures:
        text, negative = embed(sd1_pipe, ["a car", "a tree"]), embed(sd1_pipe, ["", ""])
        with trace.loop(["a car", "a tree"], rows=slice(0, 2)):
            for t in (900, 400):
                sd1_pipe.unet(noise(2).repeat(2, 1, 1, 1), t, encoder_hidden_states=torch.cat([text, negative]))
    for row, record in enumerate(trace):
        maps = record.daam()
        assert_close(maps.values, naive_maps(captures, GRIDS, image=row)[: len(maps)])


@torch.no_grad()
def test_an_inversion_in_a_pause_is_no_step(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace, trace.loop("a car") as loop:
        text = embed(sd1_pipe, ["a car"])
        with loop.pause():
            sd1_pipe.unet(noise(1), 100, encoder_hidden_states=text)
        with capture(sd1_pipe.unet) as captures:
            for t in (900, 400):
                sd1_pipe.unet(noise(1), t, encoder_hidden_states=text)
    assert list(trace[0].timesteps) == [900, 400]
    maps = trace[0].daam()
    assert_close(maps.values, naive_maps(captures, GRIDS, image=0)[: len(maps)])


def test_a_loop_names_the_words_of_embeddings(sd1_pipe):
    with torch.no_grad():
        text = embed(sd1_pipe, ["a red car"])
    with daamlib.trace(sd1_pipe) as trace, capture(sd1_pipe.unet) as captures, trace.loop(["a red car"]):
        generate(sd1_pipe, None, prompt_embeds=text, guidance_scale=1.0)
    maps = trace[0].daam()
    assert_close(maps["car"], naive_maps(captures, GRIDS, image=0)[maps.tokens.index("car")])


REFUSED = {
    "halves differ": (["a car", "a tree"], {}, ["a car", "a tree"] * 2, "two halves differ"),
    "rows beyond the batch": (["a car"], {"rows": [3]}, ["a car"], "do not fit"),
    "rows of another number": (["a car"], {"rows": [0, 1]}, ["a car", "a car"], "for 1 images"),
    "another prompt": (["a car"], {}, ["a tree"], "announced as 'a car'"),
}


@pytest.mark.parametrize("prompts, options, embedded, message", REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_rows_that_do_not_fit_are_refused_in_the_first_pass(sd1_pipe, prompts, options, embedded, message):
    with daamlib.trace(sd1_pipe) as trace:
        text = embed(sd1_pipe, embedded)
        with pytest.raises(ValueError, match=message), trace.loop(prompts, **options):
            sd1_pipe.unet(noise(len(text)), 900, encoder_hidden_states=text)
    assert len(trace) == 0


@torch.no_grad()
def test_the_same_latents_and_level_twice_are_refused(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace, pytest.raises(ValueError, match="twice"), trace.loop("a car"):
        text = embed(sd1_pipe, ["a car"])
        for _ in range(2):
            sd1_pipe.unet(noise(1), 900, encoder_hidden_states=text)


def test_loops_that_are_empty_nested_or_late_are_refused(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace:
        with pytest.raises(ValueError, match="no pass of the denoiser was made"), trace.loop("a car"):
            pass
        with pytest.raises(ValueError, match="one loop after the other"), trace.loop("a car"), trace.loop("a tree"):
            pass
    with pytest.raises(ValueError, match="trace has ended"), trace.loop("a car"):
        pass


def test_traces_closed_first_opened_first_closed_leave_nothing(sd1_pipe):
    before = generate(sd1_pipe)
    names = set(vars(sd1_pipe))
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(daamlib.trace(sd1_pipe))
        second.enter_context(daamlib.trace(sd1_pipe))
        first.pop_all().close()
    assert set(vars(sd1_pipe)) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sd1_pipe.unet.modules())
    assert torch.equal(generate(sd1_pipe), before)


@torch.no_grad()
def test_modular_diffusers_with_a_guider(sdxl_pipe):
    """Its guider makes a pass under each text; those of the prompt are the steps."""
    blocks = pytest.importorskip("diffusers").StableDiffusionXLAutoBlocks()
    modular = blocks.init_pipeline()
    modular.update_components(**{name: part for name, part in sdxl_pipe.components.items() if part is not None})
    text = sdxl_pipe.encode_prompt("a car", device=sdxl_pipe.device, do_classifier_free_guidance=False)[0]
    options = {"num_inference_steps": 2, "height": 32, "width": 48, "output": "latents", "output_type": "latent"}
    call = lambda: modular(prompt="a car", generator=torch.Generator().manual_seed(0), **options)  # noqa: E731
    plain = call()
    with daamlib.trace(sdxl_pipe) as trace, capture(sdxl_pipe.unet) as captures:
        texts = []
        hook = sdxl_pipe.unet.register_forward_pre_hook(
            lambda unet, args, kwargs: texts.append(
                inspect.signature(unet.forward).bind(*args, **kwargs).arguments["encoder_hidden_states"]
            ),
            with_kwargs=True,
        )
        with hook, trace.loop("a car", prompt_embeds=text):
            call()
    steps = [number for number, each in enumerate(texts) if torch.equal(each, text)]
    assert len(texts) == 4 and len(steps) == 2
    for each in captures.values():
        each.probabilities = [each.probabilities[number] for number in steps]
    maps = trace[0].daam()
    assert_close(maps.values, naive_maps(captures, GRIDS, image=0)[: len(maps)])
    assert torch.equal(call(), plain)


@torch.no_grad()
def test_masked_tokens_take_no_part(sd1_pipe):
    with daamlib.trace(sd1_pipe) as trace, trace.loop("a car"):
        text = embed(sd1_pipe, ["a car"])
        mask = torch.ones(text.shape[:2])
        mask[:, 4:] = 0
        sd1_pipe.unet(noise(1), 900, encoder_hidden_states=text, encoder_attention_mask=mask)
    with capture(sd1_pipe.unet) as captures:  # the softmax over the first tokens alone
        sd1_pipe.unet(noise(1), 900, encoder_hidden_states=text, encoder_attention_mask=mask)
    maps = trace[0].daam()
    assert_close(maps.values, naive_maps(captures, GRIDS, image=0)[: len(maps)])


def test_a_layer_that_is_skipped_in_a_later_pass_costs_the_record_alone(fresh):
    """As a cache of attention outputs does."""
    pipe = fresh("sd1")
    name = next(name for name in pipe.unet.attn_processors if "attn2" in name and "mid_block" not in name)
    attn = pipe.unet.get_submodule(name.removesuffix(".processor"))
    whole = attn.processor

    class Cache:
        kept, calls = None, 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 1:
                self.kept = whole(*args, **kwargs)
            elif self.calls < 3:
                return whole(*args, **kwargs)
            return self.kept

    attn.processor = Cache()
    plain = generate(pipe, num_inference_steps=4)
    attn.processor = Cache()
    with daamlib.trace(pipe) as trace, pytest.warns(UserWarning, match="leaves no record"):
        traced = generate(pipe, num_inference_steps=4)
    assert torch.equal(traced, plain) and len(trace) == 0 and len(trace.problems) == 1


class Edit:
    """Gives the last image the attention of the one before it from a step on, as prompt-to-prompt does."""

    def __init__(self, start):
        self.start, self.passes = start, 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = (attn.head_to_batch_dim(to(encoder_hidden_states)) for to in (attn.to_k, attn.to_v))
        probabilities = attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads))
        if self.passes >= self.start:
            probabilities[-1] = probabilities[-2]
        self.passes += 1
        return attn.to_out[0](attn.batch_to_head_dim(probabilities.flatten(0, 1) @ value))


@pytest.mark.parametrize("start", [0, 2])
def test_a_processor_that_edits_the_attention_of_one_image(fresh, start):
    """In the first pass it is refused; later the images stay and there is no record."""
    pipe = fresh("sd1")
    processors = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({name: Edit(start) if "attn2" in name else of for name, of in processors.items()})
    refused = pytest.raises(ValueError, match=r"does not compute softmax\(q k\) v .* its processor Edit")
    told = "did not end" if start == 0 else r"did not compute softmax\(q k\) v of its text in every pass"
    with pytest.warns(UserWarning, match=told), daamlib.trace(pipe) as trace:
        with refused if start == 0 else contextlib.nullcontext():
            generate(pipe, ["a car and a tree", "a bus and a tree"], num_inference_steps=4)
    assert len(trace) == 0


def passes_of(pipe, levels, latents, prompts=("a car",), **options):
    """Trace an announced loop of these noise levels and latents."""
    text = embed(pipe, list(prompts))
    with torch.no_grad(), daamlib.trace(pipe) as trace, trace.loop(prompts, **options):
        for level, sample in zip(levels, latents, strict=True):
            pipe.unet(sample, level, encoder_hidden_states=text)
    return trace


def test_rows_at_several_noise_levels_are_refused(sd1_pipe):
    with pytest.raises(ValueError, match="several noise levels at once"):
        passes_of(sd1_pipe, [torch.tensor([700, 300])], [noise(2)], ["a car", "a tree"])
    passes_of(sd1_pipe, [torch.tensor([700, 700])], [noise(2)], ["a car", "a tree"])


def test_a_row_that_is_named_twice_is_refused(sd1_pipe):
    with pytest.raises(ValueError, match="are 1 of the pass' 2 rows, for 2 images"):
        passes_of(sd1_pipe, [700], [noise(2)], ["a car", "a car"], rows=[0, 0])


def test_a_loop_that_starts_again_leaves_no_record(sd1_pipe):
    with pytest.warns(UserWarning, match="its first noise level again"):
        trace = passes_of(sd1_pipe, [900, 400, 900, 400], noise(4).split(1))
    assert len(trace) == 0


def test_a_loop_whose_latents_grow_leaves_no_record(sd1_pipe):
    with pytest.warns(UserWarning, match="followed"):
        trace = passes_of(sd1_pipe, [900, 400], [noise(1), noise(1).repeat(1, 1, 2, 2)])
    assert len(trace) == 0


def test_the_same_latents_beside_another_image_are_refused(fresh):
    """As in InstructPix2Pix a row at a time: the text is the same, the image is left out in the second pass."""
    pipe = fresh("sd1")
    pipe.unet.conv_in = torch.nn.Conv2d(8, 8, 3, padding=1)
    image = torch.cat([noise(1), noise(1).flip(-1)], 1)
    with pytest.raises(ValueError, match="twice with the same latents"):
        passes_of(pipe, [900, 900], [image, torch.cat([noise(1), 0 * noise(1)], 1)])


def test_another_image_at_each_level_is_refused_where_the_scheduler_plans_it_once(fresh):
    pipe, levels = fresh("sd1"), [1, 1]
    passes_of(pipe, levels, noise(2).split(1))  # as a second-order loop makes
    pipe.scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="planned once"):
        passes_of(pipe, levels, noise(2).split(1))
