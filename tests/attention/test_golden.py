"""Maps of two published implementations (OVAM, DAAM) on a tiny checkpoint; tests/golden/README.md tells their making.

The file's arrays were computed with older versions of the libraries: 1e-5 of the maximum is a fair tolerance, and
another half, interpolation or set of layers is off by 4 % and more.
"""

import re

import numpy as np
import pytest
import torch
from helpers import assert_close
from tiny import GOLDEN
from torch.nn import functional as F

import daamlib

PROMPT = "a car in an urban environment"
TEXTS = [PROMPT, "a car and a tree in an urban environment", "tree", "car", "building"]


def stored(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def make(pipe, prompt):
    latents = torch.from_numpy(np.load(GOLDEN / "latents_tiny-sd15_a.npy"))
    return pipe(prompt, num_inference_steps=8, guidance_scale=7.5, latents=latents, output_type="latent").images


@pytest.fixture(scope="module")
def pipe(golden_pipe):
    return golden_pipe


@pytest.fixture(scope="module")
def run(golden_run):
    """(final latents, record of the conditional half, of the unconditional half) of the same call."""
    return golden_run


@pytest.fixture(scope="module")
def multitoken(pipe):
    """(record, the file) of a prompt with a word of seven tokens."""
    arrays = stored("daam_sd15_multitoken")
    with daamlib.trace(pipe) as trace:
        latents = make(pipe, "a bicycle and a car in an urban environment")
    assert_close(latents, arrays["final_latents"])
    return trace[0], arrays


# -- the pipeline itself -------------------------------------------------------------------------------------------


def test_the_pipeline_is_the_same_with_today_s_libraries(run):
    arrays = stored("plain_tiny-sd15")
    latents, record, other = run
    assert_close(latents, arrays["final"])
    assert_close(record.prompt_embeddings.values, arrays["te"][0])
    assert_close(record.encode(PROMPT, padding=True).values, arrays["te"][0])
    assert_close(record.encode("", padding=True).values, arrays["un"][0])
    assert record.timesteps == other.timesteps == arrays["ts"].tolist()


# -- OVAM ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["ovam_sd15_cond", "ovam_sd15_uncond_default"])
def ovam(request, run):
    """(record of the half that the file is of, the file)."""
    return run[1 if request.param == "ovam_sd15_cond" else 2], stored(request.param)


def key(text):
    return text.replace(" ", "_")


def module_name(block):
    """OVAM's block "up-2-attentions-1-transformer-1-attn2" is the U-Net's "up_blocks.1.attentions.0....attn2"."""
    side, *numbers = re.fullmatch(r"(up|down)-(\d)-attentions-(\d)-transformer-(\d)-attn2", block).groups()
    level, attention, transformer = (int(number) - 1 for number in numbers)
    return f"{side}_blocks.{level}.attentions.{attention}.transformer_blocks.{transformer}.attn2"


def blocks(arrays, prefix):
    return {module_name(name.removeprefix(prefix)): name for name in arrays if name.startswith(prefix)}


@pytest.mark.parametrize("text", TEXTS)
def test_ovam_softmax_maps(ovam, text):
    record, arrays = ovam
    maps = record.daam(text, padding=False)
    assert_close(maps.values, arrays[f"softmax/{key(text)}"][0])
    assert_close(maps.values.sum(dim=0), torch.full((64, 64), 8.0 * 8 * 15))  # steps, heads, blocks


@pytest.mark.parametrize("text", [PROMPT, "tree", "car", "building"])
def test_ovam_linear_maps(ovam, text):
    record, arrays = ovam
    assert_close(record.ldaam(text).values, arrays[f"linear/{key(text)}"][0])


@pytest.mark.parametrize("text", TEXTS)
def test_ovam_text_embeddings(ovam, text):
    record, arrays = ovam
    embeddings = record.encode(text)
    assert_close(embeddings.values, arrays[f"emb/{key(text)}"])
    ids = arrays[f"ids/{key(text)}"].tolist()
    assert record.pipe.tokenizer.convert_tokens_to_ids(["<|startoftext|>"]) + ids[-1:] == [590, 591]
    assert len(ids) == len(embeddings.tokens)


def test_ovam_maps_of_each_block_before_interpolation(ovam):
    record, arrays = ovam
    found = blocks(arrays, f"block_softmax/{key(PROMPT)}/")
    assert found.keys() == {layer.name for layer in record.layers}
    for layer in record.layers:
        part = record.select(layers=lambda other, name=layer.name: other.name == name)
        assert_close(part.daam(PROMPT, padding=False).values, arrays[found[layer.name]][0])
        assert_close(part.ldaam("car").values, arrays[blocks(arrays, "block_linear/car/")[layer.name]][0])


def test_ovam_stored_queries(ovam):
    record, arrays = ovam
    layers = {layer.name: layer for layer in record.layers}
    found = blocks(arrays, "queries_steps_0_3_7/")
    assert len(found) == 2
    for name, stored_as in found.items():
        queries = layers[name].queries[[0, 3, 7]].unflatten(2, (8, -1)).transpose(1, 2)  # (step, head, h*w, d_head)
        assert_close(queries, arrays[stored_as])


def test_ovam_tells_the_halves_apart(run):
    arrays = stored("ovam_sd15_uncond_default")
    expected = arrays["softmax/car"][0]
    error = (run[1].daam("car", padding=False).values.cpu() - expected).abs().max() / expected.max()
    assert error > 0.01


# -- DAAM ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daam():
    return stored("daam_sd15")


def as_daam(record):
    """DAAM's global map: each layer and head alone up-sampled bicubically, clamped, and the mean of them all.

    Without interpolation the clamp changes nothing, so heads are taken apart only where the layer is smaller.
    """
    maps = []
    for layer in record.layers:
        alone = record.select(layers=lambda other, name=layer.name: other.name == name)
        for head in range(layer.heads):
            values = alone.select(heads=[head]).daam().values[None]
            maps.append(F.interpolate(values, (64, 64), mode="bicubic", align_corners=False)[0].clamp(min=0))
    return torch.stack(maps).mean(dim=0)


def numbered(record, number):
    """DAAM counts the layers of the up blocks first."""
    names = sorted((layer.name for layer in record.layers), key=lambda name: name.startswith("down"))
    return record.select(layers=lambda layer: layer.name == names[number])


def by_factor(record, *factors):
    return record.select(layers=lambda layer: 64 // layer.grid[0] in factors)


def test_daam_global_heat_map_and_words(run, daam):
    record = run[1]
    heat_maps = daamlib.HeatMaps(as_daam(record), record.daam().tokens, record.daam().words)
    assert_close(heat_maps.values, daam["global"])
    for word in ("car", "urban", "an", "a", "environment"):
        assert_close(heat_maps[word], daam[f"word/{word}"])
    normalized = heat_maps.values / (heat_maps.values[1:-1].sum(dim=0) + 1e-6)
    assert_close(normalized, daam["global_normalized"])


def test_daam_raw_maps_of_layer_and_head(run, daam):
    for name in daam:
        if match := re.fullmatch(r"raw/factor(\d)_layer(\d+)(_head0)?", name):
            factor, number, one = match.groups()
            layer = numbered(run[1], int(number))
            assert 64 // layer.grid[0] == int(factor)
            heads = [layer.select(heads=[head]).daam().values for head in range(1 if one else 8)]
            assert_close(heads[0] if one else torch.stack(heads), daam[name])


@pytest.mark.parametrize("factors", [(1,), (2,), (4,), (1, 2)])
def test_daam_of_some_factors(run, daam, factors):
    assert_close(as_daam(by_factor(run[1], *factors)), daam["factors/" + "_".join(map(str, factors))])


def test_daam_of_one_head(run, daam):
    assert_close(as_daam(run[1].select(heads=[0])), daam["head/0"])


@pytest.mark.parametrize("number", [0, 10])
def test_daam_of_one_layer(run, daam, number):
    assert_close(as_daam(numbered(run[1], number)), daam[f"layer/{number}"])


def test_daam_of_a_full_size_layer_needs_no_interpolation(run, daam):
    """With every layer at the largest size, DAAM's mean is this package's sum over the number of maps."""
    part = by_factor(run[1], 1)
    assert_close(part.daam().values / (8 * len(part.layers)), daam["factors/1"])


def test_daam_of_a_word_of_several_tokens(multitoken):
    record, arrays = multitoken
    assert len(record.daam().tokens) == len(arrays["ids"]) == 17
    heat_maps = daamlib.HeatMaps(as_daam(record), record.daam().tokens, record.daam().words)
    assert_close(heat_maps.values, arrays["global"])
    for word in ("bicycle", "car", "a", "urban"):
        assert_close(heat_maps[word], arrays[f"word/{word}"])
