"""A layer's softmax maps: the two ways to compute them, and their memory."""

import pytest
import torch
from helpers import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from daamlib.attention.daam import daam, summed_probabilities_plainly
from daamlib.attention.layers import KeyProjection, Layer
from daamlib.attention.softmax import summed_probabilities


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes; views and in-place results are none."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def layer_of(device, grid=(6, 7), heads=2, steps=5, d_head=8, d_text=5):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(steps, grid[0] * grid[1], heads * d_head, generator=generator)
    weight = torch.randn(heads * d_head, d_text, generator=generator)
    return Layer("a.attn2", grid, heads, d_head**-0.5, KeyProjection(weight.to(device)), queries=queries.to(device))


def embeddings_of(device, tokens, dtype=torch.float32):
    return torch.randn(tokens, 5, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("max_bytes", [500, 2**26])
def test_maps_are_the_same_with_and_without_gradients(device, tokens, max_bytes):
    layer, embeddings = layer_of(device), embeddings_of(device, tokens)
    maps = daam([layer], embeddings, layer.grid, max_bytes)
    with_gradients = daam([layer], embeddings.clone().requires_grad_(), layer.grid, max_bytes)
    assert with_gradients.requires_grad
    assert maps.shape == (tokens, 6, 7)
    assert_close(maps, with_gradients.detach(), 1e-6)
    assert_close(maps.sum(dim=0), torch.full((6, 7), 2.0 * 5), 1e-6)  # heads times steps


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 77])
def test_the_fast_sum_is_the_formulas(device, tokens, gradients):
    layer, embeddings = layer_of(device), embeddings_of(device, tokens).requires_grad_(gradients)
    keys = layer.keys(embeddings)
    plainly = summed_probabilities_plainly(layer.queries, keys)
    assert_close(summed_probabilities(layer.queries, keys, 2000).detach(), plainly.detach(), 1e-6)
    assert plainly.shape == (tokens, 6 * 7)


@pytest.mark.parametrize("largest", [43, 46, 800])  # 44.4 is 64 ln 2, from where on the largest is taken off
def test_scores_up_to_and_beyond_the_range_of_the_exponential(device, largest):
    layer, embeddings = layer_of(device), embeddings_of(device, 3, torch.float64)
    scores = (layer.queries.double().unflatten(2, (2, -1)).transpose(1, 2)) @ (
        (embeddings @ layer.key_weight.double().T * layer.scale).unflatten(1, (2, -1)).permute(1, 2, 0)
    )
    factor = largest / scores.abs().max()
    maps = daam([layer], (factor * embeddings).float(), layer.grid)
    expected = (factor * scores).softmax(dim=-1).sum(dim=(0, 1)).T.unflatten(1, (6, 7))
    assert_close(maps.double(), expected, 1e-3 if largest > 100 else 1e-5)


def test_what_is_held_at_a_time_is_bounded(device):
    layer, embeddings = layer_of(device, (16, 16), steps=10), embeddings_of(device, 20)
    with Largest() as all_at_once:
        daam([layer], embeddings, layer.grid)
    with Largest() as bounded:
        daam([layer], embeddings, layer.grid, 50_000)
    assert all_at_once.bytes == 10 * 2 * 16 * 16 * 20 * 4  # step, head, position, token
    assert bounded.bytes <= 50_000
