"""HeatMaps: look-up, size and range."""

import numpy as np
import pytest
import torch

from daamlib import HeatMaps
from daamlib.attention.text import Word

TOKENS = ("<start>", "a", "traf", "fic", "light", "a", "<end>")
WORDS = (Word("a", 1, 2), Word("traffic", 2, 4), Word("light", 4, 5), Word("a", 5, 6))


@pytest.fixture
def maps():
    return HeatMaps(torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(0)), TOKENS, WORDS)


def test_a_word_is_the_mean_of_its_tokens(maps):
    assert torch.equal(maps["traffic"], maps.values[2:4].mean(dim=0))
    assert torch.equal(maps["traffic light"], maps.values[2:5].mean(dim=0))
    assert torch.equal(maps["A"], maps.values[[1, 5]].mean(dim=0))
    assert torch.equal(maps[0], maps.values[0])
    assert torch.equal(maps[-1], maps.values[6])
    assert len(maps) == 7


def test_a_missing_word_is_an_error_that_lists_the_tokens(maps):
    with pytest.raises(ValueError, match=r"'tree' is not in the text; its tokens are \['<start>', 'a', 'traf'"):
        maps["tree"]
    with pytest.raises(TypeError, match="got float"):
        maps[1.0]
    with pytest.raises(IndexError):
        maps[7]


def test_maps_and_tokens_must_agree():
    with pytest.raises(ValueError, match=r"expected \(m, H, W\) maps of 7 tokens, got \(6, 4, 4\)"):
        HeatMaps(torch.zeros(6, 4, 4), TOKENS)
    with pytest.raises(ValueError, match="got"):
        HeatMaps(torch.zeros(7, 4), TOKENS)


def test_trap_width_and_height_swapped_on_resize(maps):
    resized = maps.resize(10, 33)
    assert resized.values.shape == (7, 10, 33)
    expected = torch.nn.functional.interpolate(maps.values[None], (10, 33), mode="bilinear", align_corners=False)[0]
    assert torch.equal(resized.values, expected)
    assert (resized.tokens, resized.words) == (TOKENS, WORDS)
    ramp = HeatMaps(torch.arange(6.0).expand(1, 4, 6), ("x",)).resize(8, 12).values[0]  # grows along the width alone
    assert (ramp[:, 1:] >= ramp[:, :-1]).all()
    assert torch.equal(ramp[0], ramp[7])


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
def test_resize_needs_a_size(maps, size):
    with pytest.raises(ValueError, match="must be positive"):
        maps.resize(*size)


def test_normalized_is_min_max_of_each_map(maps):
    values = maps.normalized().values
    assert torch.equal(values.amin(dim=(1, 2)), torch.zeros(7))
    assert torch.equal(values.amax(dim=(1, 2)), torch.ones(7))
    constant = HeatMaps(torch.full((1, 4, 6), 3.0), ("x",)).normalized()
    assert torch.equal(constant.values, torch.zeros(1, 4, 6))


def test_trap_in_place_edits_of_the_callers_array(maps):
    before = maps.values.clone()
    maps.normalized()
    maps.resize(3, 5)
    maps["a"].add_(1)
    assert torch.equal(maps.values, before)
    with pytest.raises(AttributeError):
        maps.values = before


def test_maps_of_one_token_repr_and_comparison(maps):
    assert repr(HeatMaps(torch.zeros(1, 2, 3), ("car",))) == "HeatMaps((1, 2, 3), tokens=['car'])"
    other = HeatMaps(maps.values, TOKENS, WORDS)
    assert maps in [other, maps]  # found by identity: comparing tensors would raise


def test_one_occurrence_of_a_word(maps):
    assert torch.equal(maps["a", 1], maps.values[5])
    assert torch.equal(maps["a", -1], maps.values[5])
    assert torch.equal(maps["traffic light", 0], maps["traffic light"])
    with pytest.raises(ValueError, match=r"occurs 2 times in .*there is no \[2\]"):
        maps["a", 2]
    with pytest.raises(TypeError, match=r'\["car", 1\], got \(1, 2\)'):
        maps[1, 2]


def test_maps_of_an_unknown_text_say_so():
    maps = HeatMaps.unnamed(torch.zeros(3, 4, 6))
    with pytest.raises(ValueError, match="text of these 3 rows is unknown, as of a prompt given as embeddings"):
        maps["car"]


def test_maps_as_numpy_arrays(maps):
    maps = HeatMaps(maps.values.clone().requires_grad_(), maps.tokens, maps.words)
    for array in (maps.numpy(), np.asarray(maps)):
        assert array.shape == (7, 4, 6) and array.dtype == np.float32
        assert np.array_equal(array, maps.values.detach().numpy())
        array[:] = 0  # a copy
    assert maps.values.abs().sum() > 0
    assert np.asarray(maps, dtype=np.float64).dtype == np.float64
    assert maps.to("cpu").tokens == maps.tokens


def test_resized_to_their_size_maps_are_a_copy(maps):
    before = maps.values.clone()
    maps.resize(4, 6).values.zero_()
    assert torch.equal(maps.values, before)
