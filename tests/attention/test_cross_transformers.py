"""PixArt and Sana: what a record says of them, against the attention of the running model."""

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, WanTransformer3DModel
from helpers import assert_close
from peft import LoraConfig
from safetensors import safe_open
from tiny_transformers import FAMILIES, build, generate, shared, supports

import daamlib
from daamlib import AttentionRecord
from daamlib.attention.ldaam import LinearMap
from daamlib.attention.readers import fingerprint_of, reader_of
from daamlib.attention.readers.cross_transformer import PROBE_POSITIONS
from daamlib.attention.readers.words import read_pieces
from daamlib.pipeline import image_size

NORMED = ("Sana 1.5",)  # whose keys are normalised
GRIDS = {"PixArt-alpha": (8, 16), "PixArt-Sigma": (8, 16), "Sana 1.0": (16, 32), "Sana 1.5": (16, 32)}
PROMPT, OTHER = "a car and a tree", "red traffic light, a tree in the street"


class Watched:
    """A softmax attention that keeps what every pass made: by batch row and head queries, keys and probabilities."""

    def __init__(self):
        self.texts, self.queries, self.keys, self.probabilities, self.masks = [], [], [], [], []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        norm_q, norm_k = (norm or torch.nn.Identity() for norm in (attn.norm_q, attn.norm_k))
        made = (norm_q(attn.to_q(hidden_states)), norm_k(attn.to_k(text)), attn.to_v(text))
        query, key, value = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in made)
        bias = 0 if attention_mask is None else attention_mask[:, None]
        probabilities = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5 + bias).softmax(dim=3)
        if hidden_states.shape[1] > PROBE_POSITIONS:  # not the pass that asks which attentions the text reaches
            self.texts.append(text)
            self.queries.append(query)
            self.keys.append(key)
            self.probabilities.append(probabilities)
            self.masks.append(attention_mask[:, 0] == 0)
        return attn.to_out[1](attn.to_out[0]((probabilities @ value).transpose(1, 2).flatten(2)))


@contextmanager
def watched(pipe):
    """A `Watched` for the cross-attention of each block."""
    attentions = [block.attn2 for block in pipe.transformer.transformer_blocks]
    before = [attention.processor for attention in attentions]
    found = [Watched() for _ in attentions]
    for attention, processor in zip(attentions, found, strict=True):
        attention.set_processor(processor)
    try:
        yield found
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.set_processor(processor)


def explicit_daam(layers, row):
    """(token, n): the probabilities of one row of the batch, of the tokens that its mask lets take part."""
    total = sum(p[row].sum(dim=0) for layer in layers for p in layer.probabilities)  # (n, token)
    return total[:, layers[0].masks[0][row]].T


@pytest.fixture
def run(device):
    """(pipe, watched layers, record) of one image of a family."""

    def of(family, **options):
        pipe = shared(family, device)
        with watched(pipe) as layers, daamlib.trace(pipe, **options.pop("trace", {})) as trace:
            generate(pipe, PROMPT, **options)
        return pipe, layers, trace[0]

    return of


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)


# -- the prompt's words ----------------------------------------------------------------------------------------------


@supports("prompt's words")
def test_daam_is_the_attention_of_the_running_model(family, run):
    pipe, layers, record = run(family)
    assert record.grid == GRIDS[family]
    assert_close(record.daam().values.flatten(1), explicit_daam(layers, row=1))
    assert torch.equal(record.daam(padding=False).values, record.daam().values)  # padding takes no part
    assert record.daam()["car"].shape == GRIDS[family]
    assert [word.text for word in record.prompt_embeddings.words] == PROMPT.split()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"self_attention": True}, {"store": "maps", "texts": ["a tree"]}], ids=str)
def test_the_image_is_the_same_bit_for_bit(family, device, options):
    pipe = shared(family, device)
    plain = generate(pipe)
    with daamlib.trace(pipe, **options):
        traced = generate(pipe)
    assert torch.equal(plain, traced)
    assert torch.equal(plain, generate(pipe))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_image_of_a_batch_has_its_own_prompt_and_mask(family, device):
    """Prompts of other lengths; Sana's pipeline gives images the masks of other prompts, which a record says too."""
    pipe, prompts = shared(family, device), ["a car", "a red traffic light and a tree"]
    with watched(pipe) as layers, daamlib.trace(pipe) as trace:
        generate(pipe, prompts, num_images_per_prompt=2)
    assert [record.prompt for record in trace] == [prompts[0], prompts[0], prompts[1], prompts[1]]
    for image, record in enumerate(trace):
        mask = layers[0].masks[0][4 + image]
        assert torch.equal(record.prompt_embeddings.values, layers[0].texts[0][4 + image][mask])
        every = record.daam_from(record.prompt_embeddings).values
        assert_close(every.flatten(1), explicit_daam(layers, row=4 + image))
        assert torch.equal(record.daam().values, every[: record.prompt_embeddings.length])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_half_of_guidance_and_none(family, device):
    pipe = shared(family, device)
    with watched(pipe) as layers, daamlib.trace(pipe, branch="unconditional") as trace, daamlib.trace(pipe) as other:
        generate(pipe, PROMPT)
    assert_close(other[0].daam().values.flatten(1), explicit_daam(layers, row=1))
    assert trace[0].prompt == ""
    # of the keys: the negative text, and the prompt; Sana's negative text, as later ones, is without its instruction
    for row, text in enumerate((None,) if "Sana" in family else (None, PROMPT)):
        scores = sum(
            (q[0] @ k[row].transpose(1, 2) * q.shape[3] ** -0.5)[..., layer.masks[0][row]].softmax(dim=2).sum(dim=0)
            for layer in layers
            for q, k in zip(layer.queries, layer.keys, strict=True)
        )
        assert_close(trace[0].daam(text).values.flatten(1), scores.T)
    assert trace[0].daam("a car")["car"].isfinite().all()
    with watched(pipe) as layers, daamlib.trace(pipe) as trace:
        generate(pipe, PROMPT, guidance_scale=1.0)
    assert_close(trace[0].daam().values.flatten(1), explicit_daam(layers, row=0))


@pytest.mark.parametrize("family", [name for name in FAMILIES if "Sana" in name])
def test_words_are_found_after_an_instruction(family, device):
    """Sana's instruction stands before the prompt; the pipeline keeps its first and last token."""
    pipe = shared(family, device)
    with daamlib.trace(pipe) as trace:
        generate(pipe, PROMPT)  # by default with an instruction
        generate(pipe, PROMPT, complex_human_instruction=["red light:", "street"])
        generate(pipe, PROMPT, complex_human_instruction=None)
    assert [record.embedded_with.get("complex_human_instruction") is not None for record in trace] == [
        True,
        True,
        False,
    ]
    for record in trace:
        words = record.prompt_embeddings.words
        assert [word.text for word in words] == PROMPT.split()
        assert words[-1].stop == len(record.prompt_embeddings.tokens)
        assert_close(record.encode(PROMPT).values, record.prompt_embeddings.values)
    assert [record.prompt_embeddings.tokens[0] for record in trace] == ["<bos>"] * 3
    assert not torch.allclose(trace[1].encode("a tree").values[-1], trace[2].encode("a tree").values[-1])


# -- any text --------------------------------------------------------------------------------------------------------


@supports("any text")
def test_open_vocabulary_daam_is_that_of_the_texts_own_keys(family, run, device):
    """The other text's keys are those that the running model makes of it."""
    pipe, layers, record = run(family)
    with watched(pipe) as others:
        generate(pipe, OTHER)
    total = 0
    for layer, other in zip(layers, others, strict=True):
        keys = other.keys[0][1][:, other.masks[0][1]]
        total = total + sum((q[1] @ keys.transpose(1, 2) * q.shape[3] ** -0.5).softmax(dim=2) for q in layer.queries)
    maps = record.daam(OTHER)
    assert_close(maps.values.flatten(1), total.sum(dim=0).T)
    assert torch.equal(record.daam(OTHER, padding=False).values, maps.values)
    assert maps["traffic light"].shape == record.grid
    assert_close(record.encode(OTHER).values, others[0].texts[0][1][others[0].masks[0][1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_is_too_long(family, device):
    pipe = shared(family, device)
    with daamlib.trace(pipe) as trace:
        generate(pipe, PROMPT, max_sequence_length=12)
        generate(pipe, "a car and " * 8, max_sequence_length=12)  # cut by the pipeline
    assert trace[0].embedded_with["max_sequence_length"] == 12
    assert len(trace[1].daam()) == 12
    for record in trace:
        record.daam("a red car")
        with pytest.raises(ValueError, match="reads 12"):
            record.encode("a car and " * 8)
    with pytest.raises(TypeError, match="list"):
        trace[0].encode(["a car"])


def test_words_of_sentence_pieces():
    pipe = shared("PixArt-alpha")
    ids = pipe.tokenizer("a red traffic light, and x:car.").input_ids
    tokens, words = read_pieces(pipe.tokenizer, ids)
    assert [word.text for word in words] == ["a", "red", "traffic", "light", ",", "and", "x", ":", "car", "."]
    assert tokens[2:4] == ("traf", "fic") and (words[2].start, words[2].stop) == (2, 4)
    assert tokens[-1] == "</s>" and words[-1].stop == len(tokens) - 1


# -- a word alone ----------------------------------------------------------------------------------------------------


@supports("lone word")
def test_the_collapsed_linear_map_is_the_loop_over_steps_layers_and_heads(family, run, device):
    pipe, layers, record = run(family)
    with watched(pipe) as others:
        generate(pipe, OTHER)
    total = 0
    for layer, other in zip(layers, others, strict=True):
        keys = other.keys[0][1][:, other.masks[0][1]].double()
        for queries in layer.queries:
            for q, k in zip(queries[1].double(), keys, strict=True):
                total = total + q @ k.T * q.shape[1] ** -0.5
    assert_close(record.ldaam(OTHER).values.flatten(1).double(), total.T, 1e-6)
    alone = record.ldaam_from(record.encode(OTHER).values[2:3]).values
    assert_close(alone[0], record.ldaam(OTHER).values[2], 1e-6)
    linear = record.linear_map()
    assert isinstance(linear, LinearMap) == (family not in NORMED)
    if family not in NORMED:
        assert linear.weight.shape == (*record.grid, record.d_text) and linear.bias.shape == record.grid
    assert linear.shape == ((len(layers),) if family in NORMED else ()) + (*record.grid, record.d_text)
    x = record.encode("a tree").values.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: linear(x).sum(dim=(1, 2)), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_alone_are_enough_for_it(family, run):
    _, _, record = run(family)
    _, _, sums = run(family, trace={"store": "linear"})
    assert sums.nbytes == record.nbytes // len(record.timesteps)  # both float32
    assert_close(sums.ldaam(OTHER).values, record.ldaam(OTHER).values)
    with pytest.raises(ValueError, match="store"):
        sums.daam(OTHER)


@supports("store=maps")
def test_kept_maps_are_those_of_the_queries(family, run):
    _, _, record = run(family)
    _, _, kept = run(family, trace={"store": "maps", "texts": [OTHER]})
    assert_close(kept.daam().values, record.daam().values)
    assert_close(kept.daam(OTHER).values, record.daam(OTHER).values)
    assert kept.daam(OTHER)["traffic light"].shape == record.grid


# -- tokens ----------------------------------------------------------------------------------------------------------


@supports("token")
@pytest.mark.parametrize("method", ["ldaam", "daam"])
def test_a_token_fitted_to_a_synthetic_mask_recovers_it(family, run, method):
    """The mask of a map of a hidden token, or with the softmax of a hidden text, is found again."""
    _, _, record = run(family)
    text = record.encode("light" if method == "ldaam" else "a car")
    row = text.words[-1].start
    hidden = text.values[row : row + 1] if method == "ldaam" else text.values
    read = record.ldaam_from if method == "ldaam" else record.daam_from
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    maps = read(hidden + 0.5 * hidden.std() * noise)
    of_word = maps.values[0 if method == "ldaam" else row]
    mask = of_word > of_word.median()
    options = {"word": "car", "text": "a car"} if method == "daam" else {"word": "car"}
    token = daamlib.optimize_token([record], [mask.cpu()], method=method, iterations=600, **options)
    found = token.probabilities(record)[0] > 0.5
    start = daamlib.optimize_token([record], [mask.cpu()], method=method, iterations=1, **options)
    assert token.losses[-1] < (0.6 if method == "ldaam" else 0.9) * start.losses[0]
    # descent is still on its way, while a convex problem is solved
    assert (found == mask).float().mean() > (0.95 if method == "ldaam" else 0.85)
    convex = method == "ldaam" and family not in NORMED
    assert token.info["optimizer"] == ("newton" if convex else "novograd")
    assert not convex or token.gradient_norm < 1e-6
    _, _, other = run(family, seed=1)
    assert token.maps(other)["car"].shape == other.grid


def test_a_fit_with_a_bias_in_the_keys_is_the_minimum(run):
    """Newton's method sees the offset that the bias makes of every pixel: nothing near is better."""
    _, _, record = run("PixArt-alpha")
    mask = torch.arange(record.grid[0] * record.grid[1]).view(record.grid) % 7 < 3
    options = {"word": ("car", "tree"), "weight_decay": 1e-3}
    for multiclass in (False, True):
        masks = [torch.stack([mask, ~mask])]
        token = daamlib.optimize_token([record], masks, multiclass=multiclass, **options)
        assert token.gradient_norm < 1e-8
        assert len(token.losses) < 30


@pytest.mark.parametrize("family", FAMILIES)
def test_the_background_of_a_text_is_a_token_of_no_word(family, run):
    _, _, record = run(family)
    mask = record.daam()["car"] > record.daam()["car"].median()
    token = daamlib.optimize_token([record], [mask.cpu()], method="daam", word="car", background=True, iterations=2)
    words = {row for word in record.prompt_embeddings.words for row in range(word.start, word.stop)}
    assert not set(token.rows[1]) & words


# -- real images -----------------------------------------------------------------------------------------------------


@supports("real images")
def test_a_real_image_is_noised_as_in_training(family, device, image):
    """PixArt by the alphas of its schedule, Sana along the straight line of flow matching."""
    pipe, seen = shared(family, device), []
    keep = lambda _, args, kwargs: seen.append(kwargs)  # noqa: E731
    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with watched(pipe) as layers:
            record = daamlib.trace_image(pipe, image, prompt=PROMPT, timesteps=(100, 600), seed=3)
    finally:
        handle.remove()
    assert record.timesteps == [100, 600]
    assert_close(record.daam().values.flatten(1), explicit_daam(layers, row=0))
    assert record.daam("a red light")["red"].shape == record.grid == GRIDS[family]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1
    with torch.no_grad():
        encoded = pipe.vae.encode(pixels)
    latents = encoded.latent if "Sana" in family else encoded.latent_dist.mean
    latents = latents * pipe.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(3)
    for step, kwargs in zip((100, 600), seen, strict=True):
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        alpha = pipe.scheduler.alphas_cumprod[step] if "PixArt" in family else None
        levels = (1 - step / 1000, step / 1000) if alpha is None else (alpha.sqrt(), (1 - alpha).sqrt())
        assert_close(kwargs["hidden_states"], levels[0] * latents + levels[1] * noise)
        scale = 0.5 if family == "Sana 1.5" else 1.0  # of its config
        assert kwargs["timestep"].tolist() == [step * scale]


def test_a_real_image_is_told_its_size(device, image):
    pipe = build("PixArt-alpha", device)
    pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config, use_additional_conditions=True)
    pipe.transformer.to(device).eval()
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    record = daamlib.trace_image(pipe, image, prompt=PROMPT, timesteps=(100,))
    assert seen[0]["added_cond_kwargs"]["resolution"].tolist() == [[32, 64]]
    assert seen[0]["added_cond_kwargs"]["aspect_ratio"].tolist() == [[0.5]]
    assert record.grid == (8, 16)


def test_an_image_of_half_a_patch(device, image):
    with pytest.raises(ValueError, match="multiples of 4"):
        daamlib.trace_image(shared("PixArt-alpha", device), image[:30])


# -- self-attention --------------------------------------------------------------------------------------------------


def explicit_self_attention(attention, hidden, row):
    """(n, n), rows summing to one: softmax(q k^T s), or in Sana relu(q) relu(k)^T over the sums of its rows."""
    norm_q, norm_k = (norm or torch.nn.Identity() for norm in (attention.norm_q, attention.norm_k))
    made = (norm_q(attention.to_q(hidden)), norm_k(attention.to_k(hidden)))
    q, k = (part[row].unflatten(1, (attention.heads, -1)).transpose(0, 1) for part in made)
    if "Linear" in type(attention.processor).__name__:
        weights = q.relu() @ k.relu().transpose(1, 2)
        return (weights / (weights.sum(dim=2, keepdim=True) + 1e-15)).mean(dim=0)
    return (q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(dim=2).mean(dim=0)


@supports("self-attention")
@pytest.mark.parametrize("store", ["queries", "linear"])
def test_maps_are_refined_along_the_images_own_attention(family, device, store):
    pipe, seen = shared(family, device), []
    attentions = [block.attn1 for block in pipe.transformer.transformer_blocks]
    late = attentions[len(attentions) // 2 :]

    def keep(attention, args):
        if args[0].shape[1] > PROBE_POSITIONS:
            seen.append(explicit_self_attention(attention, args[0], row=1))

    handles = [attention.register_forward_pre_hook(keep) for attention in late]
    try:
        with torch.no_grad(), daamlib.trace(pipe, store=store, self_attention=True) as trace:
            generate(pipe, PROMPT)
    finally:
        for handle in handles:
            handle.remove()
    (record,) = trace
    less_noisy = [step for step, t in enumerate(record.timesteps) if t <= 500] or [1]
    mean = torch.stack([seen[step * len(late) + i] for step in less_noisy for i in range(len(late))]).mean(dim=0)
    maps = record.ldaam()
    refined = record.refine(maps)
    assert_close(refined.values.flatten(1), maps.values.flatten(1) @ mean.T, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_collapsed_record(family, run, tmp_path):
    pipe, _, whole = run(family)
    if family in NORMED:
        with pytest.raises(ValueError, match="normalises its keys"):
            whole.collapsed()
        return
    small = whole.collapsed()
    assert small.nbytes == 4 * math.prod(whole.grid) * (whole.d_text + 1)  # the last column is of the bias
    for record in (small, small.to("cpu")):
        assert_close(record.ldaam(OTHER).values.to(whole.device), whole.ldaam(OTHER).values, 1e-6)
    small.save(tmp_path / "a.safetensors")
    back = AttentionRecord.load(tmp_path / "a.safetensors", pipe=pipe)
    assert torch.equal(back.ldaam(OTHER).values, small.ldaam(OTHER).values)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert not any("quer" in name for name in file.keys())


# -- files, folders, models ------------------------------------------------------------------------------------------


@supports("save and load")
def test_a_record_comes_back_as_it_was(family, run, tmp_path, device):
    pipe, _, record = run(family, trace={"self_attention": True})
    record.save(tmp_path / "a.safetensors")
    back = AttentionRecord.load(tmp_path / "a.safetensors", pipe=pipe)
    assert all(a.to_k.equals(b.to_k) for a, b in zip(back.layers, record.layers, strict=True))
    for read in (lambda r: r.daam(), lambda r: r.daam(OTHER), lambda r: r.ldaam(OTHER), lambda r: r.refine(r.daam())):
        assert torch.equal(read(back).values, read(record).values)
    assert back.embedded_with == record.embedded_with
    assert_close(AttentionRecord.load(tmp_path / "a.safetensors").daam().values, record.daam().values)
    other = build(family, device)
    with torch.no_grad():
        other.transformer.transformer_blocks[0].attn2.to_k.bias.normal_()
    with pytest.raises(ValueError, match="transformer_blocks.0.attn2"):
        AttentionRecord.load(tmp_path / "a.safetensors", pipe=other)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        names = {name.removeprefix("layers.0.") for name in file.keys() if name.startswith("layers.0.")}
    assert names == {"to_k.weight", "to_k.bias", "queries"} | ({"to_k.norm"} if family in NORMED else set())


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_a_text_of_another_encoder_or_projection_is_refused(part, device):
    pipe = build("Sana 1.0", device)
    with daamlib.trace(pipe) as trace:
        generate(pipe)
    trace[0].encode("a tree")
    module = pipe.text_encoder if part == "text_encoder" else pipe.transformer.caption_projection
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight))
    with pytest.raises(ValueError, match="text encoder"):
        trace[0].encode("a tree")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder(family, device, tmp_path):
    build(family).save_pretrained(tmp_path / "model")
    pipe = daamlib.load_pipeline(tmp_path / "model", device=device, dtype=torch.float32)
    cells = {"PixArt-alpha": 8, "PixArt-Sigma": 16}.get(family, 32)
    assert image_size(pipe) == (2 * cells, 2 * cells)
    with daamlib.trace(pipe) as trace:
        latents = generate(pipe)
    with daamlib.trace(shared(family, device)) as expected:
        assert torch.equal(generate(shared(family, device)), latents)
    assert_close(trace[0].daam(OTHER).values, expected[0].daam(OTHER).values)
    daamlib.require_same_model([trace[0], expected[0]])
    assert fingerprint_of(pipe).difference(trace[0].fingerprint) is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_key_projections_are_those_of_the_layer_in_any_precision(family, dtype):
    """A bias that is large beside the weights costs them no digits."""
    pipe = build(family).to(dtype)
    (site, *_) = reader_of(pipe).sites
    with torch.no_grad():
        site.module.to_k.bias.add_(3)
        found = site.key_projection(torch.zeros(1, dtype=dtype))
    assert {tensor.dtype for tensor in found.tensors.values()} == {dtype}
    digits = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert_close(found.weight.float(), site.module.to_k.weight.detach().float(), digits)
    assert_close(found.bias.float(), site.module.to_k.bias.detach().float(), digits)
    x = torch.randn(5, site.d_text, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        keys = site.keys(site.module.to_k(x.to(dtype))) if family in NORMED else site.module.to_k(x.to(dtype))
    assert_close(found(x), keys.float(), 10 * digits)


def test_a_lora_counts(device):
    pipe = build("Sana 1.5", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_k"], init_lora_weights=False))
    with watched(pipe) as layers, daamlib.trace(pipe) as trace:
        generate(pipe)
    assert_close(trace[0].daam().values.flatten(1), explicit_daam(layers, row=1))
    with daamlib.trace(shared("Sana 1.5", device)) as other:
        generate(shared("Sana 1.5", device))
    with pytest.raises(ValueError, match="key weights"):
        daamlib.require_same_model([trace[0], other[0]])


# -- what is refused -------------------------------------------------------------------------------------------------


def test_the_text_is_asked_which_attentions_it_reaches(device):
    """Never the name: an `attn2` that no text reaches is a self-attention, as in SD 3.5."""
    pipe = build("Sana 1.0", device)
    block = pipe.transformer.transformer_blocks[1]
    forward = block.attn2.forward
    block.attn2.forward = lambda hidden_states, **_: forward(hidden_states)
    assert [site.name for site in reader_of(pipe).sites] == [f"transformer_blocks.{i}.attn2" for i in (0, 2)]
    assert "transformer_blocks.1.attn2" in {site.name for site in reader_of(pipe).self_sites}
    block.attn2.forward = lambda hidden_states, encoder_hidden_states, **options: forward(
        hidden_states, encoder_hidden_states=2 * encoder_hidden_states, **options
    )
    with pytest.raises(ValueError, match="blocks.1.attn2"):
        _ = reader_of(pipe).sites


def test_models_that_no_reader_knows():
    """A joint model is none of cross-attention."""
    transformer = SD3Transformer2DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16
    )
    with pytest.raises(TypeError, match="SD3Transformer2DModel"):
        reader_of(SimpleNamespace(transformer=transformer))


@pytest.mark.supports(
    family="Wan", feature="refused", note="its maps are over time, height and width; ours are of images"
)
def test_videos():
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        num_layers=1,
        ffn_dim=16,
    )
    with pytest.raises(TypeError, match="time"), daamlib.trace(SimpleNamespace(transformer=transformer)):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_needed_is_known_after_the_first_step(family, device):
    pipe, stated = shared(family, device), []
    with daamlib.trace(pipe) as trace:
        handle = pipe.transformer.register_forward_hook(lambda *_: stated.append(trace.bytes_needed))
        try:
            generate(pipe, num_inference_steps=5)
        finally:
            handle.remove()
    assert set(stated) == {trace[0].nbytes} and len(stated) == 5


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            "guidance",
            marks=pytest.mark.supports(
                family="Sana Sprint", feature="refused", note="its noise levels are of another schedule"
            ),
        ),
        "fused",
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_computed(device, change):
    pipe = build("PixArt-alpha", device)
    if change == "guidance":
        pipe.transformer.register_to_config(guidance_embeds=True)
    else:
        pipe.transformer.fuse_qkv_projections()
        for block in pipe.transformer.transformer_blocks:
            del block.attn2.to_k
    with pytest.raises(ValueError, match="guidance|unfuse"), daamlib.trace(pipe):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


def test_heads_of_normalised_keys_are_not_taken_apart(run):
    _, _, record = run("Sana 1.5")
    with pytest.raises(ValueError, match="heads"):
        record.select(heads=[0])
    _, layers, record = run("PixArt-alpha")
    total = sum(p[1, 1] for layer in layers for p in layer.probabilities)[:, layers[0].masks[0][1]]
    assert_close(record.select(heads=[1]).daam().values.flatten(1), total.T)


def test_a_file_with_a_bias_of_another_length(run, tmp_path):
    _, _, record = run("PixArt-alpha")
    layer, *others = record.layers
    short = replace(layer, to_k=replace(layer.to_k, bias=layer.to_k.bias[:5].clone()))
    replace(record, layers=(short, *others)).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="bias"):
        AttentionRecord.load(tmp_path / "a.safetensors")


def test_an_image_that_is_cut_out_of_a_larger_one_is_refused(monkeypatch):
    """As by `use_resolution_binning` for a size of another ratio than the pipeline's own sizes."""
    sizes = {"0.5": [32, 64], "1.0": [64, 64], "2.0": [64, 32]}
    monkeypatch.setattr("diffusers.pipelines.sana.pipeline_sana.ASPECT_RATIO_1024_BIN", sizes)
    pipe = build("Sana 1.0")
    options = {"use_resolution_binning": True, "output_type": "np", "num_inference_steps": 1}
    with daamlib.trace(pipe) as trace:
        image = generate(pipe, height=64, width=128, **options)  # made at 32 x 64 and enlarged, none of it lost
        assert image.shape == (1, 64, 128, 3) and trace[0].grid == (16, 32)
        passes = []
        pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
        with pytest.raises(ValueError, match="cut out of one of 32 x 64.*use_resolution_binning=False"):
            generate(pipe, height=32, width=96, **options)
    assert len(trace) == 1 and not passes
    assert "classify_height_width_bin" not in vars(pipe.image_processor)
