"""AudioLDM2: the words that its T5 reads, over time x mel, and the vectors that its GPT-2 generates."""

import pytest
import torch
from diffusers import AudioLDMPipeline, MusicLDMPipeline
from helpers import assert_close, capture, iou, naive_maps, with_text
from tiny_audio import CONTEXT, GPT2, MEL, T5, TIME, audioldm, audioldm2, build, unet

import daamlib
from daamlib import AttentionRecord

GRIDS = [(TIME, MEL), (TIME // 2, MEL // 2)]
PROMPT, SHORT = "a dog barking and rain", "a dog"
WORDS = ("a", "dog", "barking", "and", "rain")
TEXT = "thunderstorms, a dog"


def proves(feature, family="AudioLDM2", **more):
    return pytest.mark.supports(family=family, feature=feature, **more)


@pytest.fixture(scope="module")
def pipe(device):
    return build(audioldm2, device)


def hear(pipe, prompt=PROMPT, *, seed=0, **options):
    """Latents of 16 x 8 (time x mel), by two steps with guidance."""
    defaults = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}
    return pipe(prompt, **{**defaults, **options}, generator=torch.Generator().manual_seed(seed)).audios


def reading(pipe, width):
    """The names of the cross-attentions that read vectors of a width."""
    modules = pipe.unet.named_modules()
    return [name for name, part in modules if name.endswith("attn2") and part.to_k.in_features == width]


def captured(pipe, width=T5):
    """As `helpers.capture`, of the attentions outside of the middle block that read vectors of a width."""
    return capture(pipe.unet, [name for name in reading(pipe, width) if not name.startswith("mid_block")])


def embedded(pipe, text):
    """(m, T5) and (8, GPT2) of a text alone."""
    t5, mask, gpt2 = pipe.encode_prompt(text, pipe.device, 1, False)
    assert mask.all()
    return t5[0], gpt2[0]


@pytest.fixture(scope="module")
def heard(pipe):
    """(record, what the processors of the running model saw) of the second of two prompts, the shorter one, guided."""
    with daamlib.trace(pipe) as trace, captured(pipe) as captures:
        hear(pipe, [PROMPT, SHORT])
    return trace[1], captures


ROW = 3  # of a batch of two negative and two positive texts, of the record in `heard`


# -- the T5 tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"stream": "gpt2"}, {"store": "linear"}, {"self_attention": True}], ids=str)
def test_the_audio_is_the_same_bit_for_bit(pipe, options):
    plain = hear(pipe, output_type="np")
    with daamlib.trace(pipe, **options) as trace:
        traced = hear(pipe, output_type="np")
    assert len(trace) == 1
    assert plain.shape == (1, 4 * 2 * TIME) and plain.std() > 0
    assert plain.tobytes() == traced.tobytes()


@proves("prompt's words")
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_the_words_of_the_prompts(pipe, guidance):
    """Padding to the longest prompt is masked: it takes nothing from the words."""
    with daamlib.trace(pipe) as trace, captured(pipe) as captures:
        hear(pipe, [PROMPT, SHORT], guidance_scale=guidance)
    for number, (prompt, rows) in enumerate([(PROMPT, 7), (SHORT, 3)]):
        record = trace[number]
        expected = naive_maps(captures, GRIDS, image=number + (2 if guidance > 1 else 0))
        assert record.prompt == prompt and record.grid == (TIME, MEL)
        assert expected.shape == (7, TIME, MEL) and not expected[rows:].any()
        for padding in (True, False):
            maps = record.daam(padding=padding)
            assert_close(maps.values, expected[:rows])
            assert maps.tokens[-1] == "</s>"
    maps = trace[0].daam()
    assert tuple(word.text for word in maps.words) == WORDS
    assert_close(maps["barking"], maps.values[2:4].mean(dim=0))  # two tokens


def test_the_negative_texts_are_the_other_half(pipe):
    with daamlib.trace(pipe, branch="unconditional") as trace, captured(pipe) as captures:
        hear(pipe, PROMPT, negative_prompt="thunder")
    (record,) = trace
    assert record.prompt == "thunder" and "".join(word.text for word in record.daam().words) == "thunder"
    with torch.no_grad():
        for text in ("thunder", PROMPT):
            expected = naive_maps(with_text(pipe.unet, captures, embedded(pipe, text)[0]), GRIDS, image=0)
            assert_close(record.daam(text).values, expected)


@proves("any text")
@torch.no_grad()
def test_any_text(pipe, heard):
    record, captures = heard
    maps, values = record.daam(TEXT), embedded(pipe, TEXT)[0]
    assert_close(maps.values, naive_maps(with_text(pipe.unet, captures, values), GRIDS, image=ROW))
    assert [word.text for word in maps.words][0].startswith("thunderstorms")
    assert_close(record.daam_from(values).values, maps.values, 1e-6)


@proves("lone word")
@torch.no_grad()
def test_a_word_alone_is_the_sum_over_steps_layers_and_heads(pipe, heard):
    record, captures = heard
    values = embedded(pipe, "rain")[0]
    expected = naive_maps(with_text(pipe.unet, captures, values), GRIDS, image=ROW, kind="scores")
    assert record.linear_map().weight.shape == (TIME, MEL, T5)
    assert_close(record.linear_map()(values), expected, 1e-6)
    assert_close(record.ldaam("rain")["rain"], expected[0], 1e-6)
    assert_close(record.linear_map()(values.sum(dim=0, keepdim=True)), expected.sum(dim=0, keepdim=True), 1e-6)


@proves("token")
def test_a_token_recovers_a_mask(heard):
    record, _ = heard
    some = torch.randn(1, T5, generator=torch.Generator().manual_seed(0))
    values = record.ldaam_from(some).values[0]
    mask = values > values.median()
    token = daamlib.optimize_token([record], [mask], weight_decay=1e-8)
    assert iou(token.probabilities(record)[0] > 0.5, mask) > 0.98


@proves("store=maps")
def test_maps_kept_while_generating(pipe, heard):
    with daamlib.trace(pipe, store="maps", texts=[TEXT]) as trace:
        hear(pipe, [PROMPT, SHORT])
    for text in (None, SHORT, TEXT):
        assert_close(trace[1].daam(text).values, heard[0].daam(text).values)
    assert all(layer.queries is None for layer in trace[1].layers)


@proves("save and load")
def test_a_record_from_a_file(pipe, heard, tmp_path):
    record, _ = heard
    record.save(tmp_path / "a.safetensors")
    back = AttentionRecord.load(tmp_path / "a.safetensors", pipe=pipe)
    for text in (None, TEXT):
        assert torch.equal(back.daam(text).values, record.daam(text).values)
        assert torch.equal(back.ldaam(text).values, record.ldaam(text).values)
    assert back.daam().words == record.daam().words
    other = build(audioldm2, pipe.device, seed=1)
    with pytest.raises(ValueError, match="key weights"):
        AttentionRecord.load(tmp_path / "a.safetensors", pipe=other)


def test_sounds_of_several_lengths_and_the_middle_block(pipe):
    """13 frames of latents are halved to 7."""
    with daamlib.trace(pipe, middle=True) as trace, captured(pipe) as captures:
        hear(pipe, audio_length_in_s=13 * 2 * 4 / 16_000)
    (record,) = trace
    assert record.grid == (13, MEL)
    outer = record.select(layers=lambda layer: not layer.name.startswith("mid_block"))
    assert len(record.layers) == len(reading(pipe, T5)) > len(outer.layers)
    assert_close(outer.daam().values, naive_maps(captures, [(13, MEL), (7, MEL // 2)], image=1))


def test_several_sounds_of_a_prompt_in_order(pipe):
    with daamlib.trace(pipe) as trace, captured(pipe) as captures:
        hear(pipe, [SHORT, PROMPT], num_waveforms_per_prompt=2)
    assert [record.prompt for record in trace] == [SHORT, SHORT, PROMPT, PROMPT]
    for row, record in enumerate(trace, start=4):
        assert_close(record.daam().values, naive_maps(captures, GRIDS, image=row)[: len(record.daam())])


def test_embeddings_instead_of_a_prompt(pipe):
    values, mask, generated = pipe.encode_prompt([PROMPT, SHORT], pipe.device, 1, False)
    with daamlib.trace(pipe) as trace, captured(pipe) as captures:
        texts = {"prompt_embeds": values, "attention_mask": mask, "generated_prompt_embeds": generated}
        hear(pipe, None, guidance_scale=1.0, **texts)
    assert [record.prompt for record in trace] == [None, None]
    for row, (record, tokens) in enumerate(zip(trace, (7, 3), strict=True)):
        maps = record.daam()
        assert maps.tokens[:3] == ("0", "1", "2") and maps.words == ()
        assert_close(maps.values[:tokens], naive_maps(captures, GRIDS, image=row)[:tokens])


@pytest.mark.parametrize("guided", [True, False])
def test_a_custom_loop(pipe, guided):
    with daamlib.trace(pipe) as trace, captured(pipe) as captures, torch.no_grad():
        values, mask, generated = pipe.encode_prompt([PROMPT, SHORT], pipe.device, 1, guided)
        sample = torch.randn(2, 4, TIME, MEL, generator=torch.Generator().manual_seed(0)).to(pipe.device)
        pipe.scheduler.set_timesteps(2)
        with trace.loop([PROMPT, SHORT]):
            for t in pipe.scheduler.timesteps:
                batch = torch.cat([sample] * 2) if guided else sample
                texts = {"encoder_hidden_states_1": values, "encoder_attention_mask_1": mask}
                pipe.unet(batch, t, generated, **texts)
    assert [record.prompt for record in trace] == [PROMPT, SHORT]
    expected = naive_maps(captures, GRIDS, image=3 if guided else 1)
    assert_close(trace[1].daam().values, expected[:3])


@proves("self-attention")
def test_maps_are_refined_along_the_self_attention(pipe):
    modules = pipe.unet.named_modules()
    names = [name for name, _ in modules if name.startswith("up_blocks.1") and name.endswith("attn1")]
    with daamlib.trace(pipe, self_attention=True) as trace, capture(pipe.unet, names) as captures:
        hear(pipe)
    (record,) = trace
    assert record.self_attention.grid == (TIME, MEL) and record.timesteps[1] <= 500 < record.timesteps[0]
    matrix = torch.stack([each.probabilities[1][1].mean(dim=0) for each in captures.values()]).mean(dim=0)
    maps = record.ldaam("rain")
    assert_close(record.refine(maps).values.flatten(1), maps.values.flatten(1) @ matrix.T)


# -- the GPT-2 vectors -------------------------------------------------------------------------------------------------


def test_the_generated_vectors_are_read_by_position(pipe, tmp_path):
    with daamlib.trace(pipe, stream="gpt2") as trace, daamlib.trace(pipe) as words:
        with captured(pipe, GPT2) as captures:
            hear(pipe, [PROMPT, SHORT])
    record = trace[1]
    assert record.prompt == SHORT and record.stream == "gpt2"
    maps = record.daam()
    assert maps.tokens == tuple("01234567") and maps.words == ()
    assert_close(maps.values, naive_maps(captures, GRIDS, image=ROW))
    assert_close(record.ldaam().values, naive_maps(captures, GRIDS, image=ROW, kind="scores"), 1e-6)
    assert record.linear_map().weight.shape == (TIME, MEL, GPT2)
    record.save(tmp_path / "a.safetensors")
    back = AttentionRecord.load(tmp_path / "a.safetensors", pipe=pipe)
    assert torch.equal(back.daam().values, maps.values)

    for other in (record, back):
        with pytest.raises(ValueError, match="no words"):
            other.daam(TEXT)
    with pytest.raises(ValueError, match="'dog'"):
        maps["dog"]
    with pytest.raises(ValueError, match="layers"):
        daamlib.require_same_model([record, words[1]])


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=proves("refused", name, note="it has no text tokens: one CLAP vector of the whole text")
        )
        for name, kind in (("AudioLDM", AudioLDMPipeline), ("MusicLDM", MusicLDMPipeline))
    ],
)
def test_one_vector_of_a_whole_text_has_no_tokens(kind):
    pipe = build(lambda: audioldm(kind))
    with pytest.raises(ValueError, match="CLAP"), daamlib.trace(pipe):
        pass


def test_a_model_that_reads_no_words(device):
    """The one that speaks a transcription has GPT-2 vectors alone."""
    speaking = build(audioldm2, device)
    speaking.register_modules(unet=unet(((None, GPT2),) * 2).to(device))
    with pytest.raises(ValueError, match="T5"), daamlib.trace(speaking):
        pass
    with daamlib.trace(speaking, stream="gpt2") as trace:
        hear(speaking)
    assert len(trace[0].daam()) == 8


def test_a_stream_that_there_is_not(pipe, sd1_pipe):
    for model, name in ((pipe, "clap"), (sd1_pipe, "gpt2")):
        with pytest.raises(ValueError, match=name), daamlib.trace(model, stream=name):
            pass


def test_a_call_without_the_words(pipe):
    """The U-Net would read the GPT-2 vectors in their place."""
    refused = pytest.raises(ValueError, match="encoder_hidden_states_1")
    with daamlib.trace(pipe) as trace, refused, torch.no_grad(), trace.loop("rain"):
        pipe.unet(torch.zeros(1, 4, TIME, MEL, device=pipe.device), 1, torch.zeros(1, 8, T5, device=pipe.device))
    assert len(trace) == 0


def test_a_text_that_is_too_long(heard):
    with pytest.raises(ValueError, match=f"{CONTEXT}"):
        heard[0].daam("rain " * CONTEXT)


def test_real_images_are_no_sounds(pipe):
    with pytest.raises(ValueError, match="sounds"):
        daamlib.trace_image(pipe, torch.rand(3, 32, 16))
