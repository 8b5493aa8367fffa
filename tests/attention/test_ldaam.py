"""Linear DAAM collapsed to one tensor."""

import pytest
import torch

from daamlib import LinearMap, TokenEmbeddings
from daamlib.attention.heatmaps import upsample
from daamlib.attention.layers import KeyProjection, Layer
from daamlib.attention.ldaam import collapse


@pytest.fixture
def layers(device):
    generator = torch.Generator().manual_seed(0)
    layers = []
    for name, grid, heads, d_head in [("a", (4, 6), 2, 3), ("b", (2, 3), 4, 2), ("c", (4, 6), 2, 3)]:
        queries = torch.randn(5, grid[0] * grid[1], heads * d_head, generator=generator)
        keys = torch.randn(heads * d_head, 7, generator=generator)
        layers.append(
            Layer(name, grid, heads, d_head**-0.5, KeyProjection(keys.to(device)), queries=queries.to(device))
        )
    return layers


def random_embeddings(device, count=2, dtype=torch.float32):
    return torch.randn(count, 7, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(device)


def test_the_collapse_is_the_sum_over_layers_steps_and_heads(device, layers):
    embeddings = random_embeddings(device, 3)
    expected = torch.zeros(3, 4, 6, device=device)
    for layer in layers:
        d_head = len(layer.key_weight) // layer.heads
        for step in range(5):
            for head in range(layer.heads):
                columns = slice(head * d_head, (head + 1) * d_head)
                keys = embeddings @ layer.key_weight[columns].T
                maps = (layer.queries[step][:, columns] @ keys.T * layer.scale).T.unflatten(1, layer.grid)
                expected += upsample(maps, (4, 6))
    got = collapse(layers, (4, 6))
    assert got.weight.shape == (4, 6, 7)
    torch.testing.assert_close(got(embeddings), expected, rtol=1e-4, atol=1e-4)


def test_a_map_is_linear_in_the_embedding(device, layers):
    linear = collapse(layers, (4, 6))
    x, y = random_embeddings(device)
    mixed = linear((2 * x - 3 * y)[None])[0]
    torch.testing.assert_close(mixed, 2 * linear(x[None])[0] - 3 * linear(y[None])[0], rtol=1e-4, atol=1e-4)


def test_embeddings_are_computed_in_their_precision_but_never_below_float32(device, layers):
    linear = collapse(layers, (4, 6))
    embeddings = random_embeddings(device)
    assert linear(embeddings.double()).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        low = embeddings.to(dtype)
        assert torch.equal(linear(low), linear(low.float()))
    named = TokenEmbeddings(embeddings, ("a", "b"), ())
    assert torch.equal(linear(named), linear(embeddings))


@pytest.mark.parametrize("shape", [(7,), (2, 6), (1, 2, 7), (0, 7)])
def test_embeddings_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"expected embeddings of shape \(m, 7\) for this model, got \("):
        LinearMap(torch.zeros(4, 6, 7))(torch.zeros(shape))


@pytest.mark.parametrize("embeddings", [torch.zeros(2, 7, dtype=torch.long), [[0.0] * 7], "a car", None])
def test_embeddings_of_another_kind(embeddings):
    with pytest.raises(TypeError, match="must be a floating-point tensor or TokenEmbeddings, got"):
        LinearMap(torch.zeros(4, 6, 7))(embeddings)


def test_gradients(device, layers):
    linear = collapse(layers, (4, 6))
    embeddings = random_embeddings(device, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(linear, embeddings)


def test_trap_result_of_to_device_thrown_away(device):
    linear = LinearMap(torch.ones(4, 6, 7, device=device))
    assert linear(torch.ones(1, 7)).device == device  # embeddings come from anywhere
