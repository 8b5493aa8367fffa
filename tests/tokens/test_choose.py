"""Settings of a token chosen from its training masks: known answers, and that the token reads on as it was fitted."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_close

import daamlib
from daamlib import choose_settings, optimize_token
from daamlib.attention.layers import KeyProjection, Layer

GRID = 8, 12
GOOD, BAD = "up_blocks.1.good", "down_blocks.0.bad"


@pytest.fixture(scope="module")
def template(sd1_pipe):
    """A record whose layers and timesteps the tests replace."""
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    return daamlib.trace_image(sd1_pipe, image, timesteps=(100, 900))


def made(template, seed, *, steps=(100, 900), noise=0.2):
    """A record in whose good layer one direction shows the mask, in the less noisy pass alone; and the mask.

    The other pass and the other layer hold noise, and so much of it that it can be fitted but helps no other image.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(GRID, dtype=torch.bool)
    y, x = (int(torch.randint(0, side // 2, (1,), generator=generator)) for side in GRID)
    mask[y : y + 4, x : x + 6] = True
    device, d_text = template.device, template.d_text
    keys, width = torch.eye(d_text).to(device), d_text

    def noisy(strength):
        return strength * torch.randn(GRID[0] * GRID[1], width, generator=generator)

    shown = noisy(noise)
    shown[:, 0] += mask.flatten().float()
    good = torch.stack([shown if step < 500 else noisy(3.0) for step in steps]).to(device)
    bad = torch.stack([noisy(3.0) for _ in steps]).to(device)
    layers = tuple(
        Layer(name, GRID, 1, 1.0, KeyProjection(keys), queries=each) for name, each in ((GOOD, good), (BAD, bad))
    )
    return replace(template, layers=layers, timesteps=list(steps)), mask


@pytest.fixture(scope="module")
def several(template):
    pairs = [made(template, seed) for seed in range(4)]
    return [record for record, _ in pairs], [mask for _, mask in pairs]


@pytest.mark.parametrize("count", [1, 4])
def test_what_shows_the_masks_is_chosen(several, template, count):
    records, masks = (part[:count] for part in several)
    settings = choose_settings(records, masks)
    assert settings["layers"] == [GOOD] and settings["max_timestep"] == 100
    token, plain = optimize_token(records, masks, **settings), optimize_token(records, masks)
    other, mask = made(template, 77)
    inside = mask.to(template.device)

    def loss(token):
        maps = token.probabilities(other)[0]
        return torch.nn.functional.binary_cross_entropy(maps.clamp(1e-6, 1 - 1e-6), inside.to(maps))

    assert loss(token) < loss(plain)


def test_the_weight_decay_is_the_one_that_serves_the_images_left_out(several):
    records, masks = several
    assert choose_settings(records, masks, weight_decays=(1e9, 1e-4))["weight_decay"] == 1e-4  # nothing is learned
    assert choose_settings(records, masks, weight_decays=[1e9])["weight_decay"] == 1e9


def test_it_reads_other_records_as_it_was_fitted(several, template, tmp_path):
    records, masks = several
    token = optimize_token(records, masks, layers=[GOOD], max_timestep=100)
    assert token.info["layers"] == [GOOD] and token.info["max_timestep"] == 100 and token.info["passes"] == [1] * 4
    token.save(tmp_path / "token.safetensors")
    back = daamlib.OptimizedToken.load(tmp_path / "token.safetensors")
    other, _ = made(template, 9, steps=(900, 100, 700))
    part = other.select(layers=lambda layer: layer.name == GOOD, steps=[1])
    expected = part.ldaam_from(token.embedding.to(part.device)).values
    assert_close(back.maps(other).values, expected)
    # one pass was fitted and one is read: nothing is scaled
    assert_close(back.logits(other), back.scale[0] * expected + back.bias[0])
    alone = optimize_token(
        [record.select(layers=lambda layer: layer.name == GOOD, steps=[0]) for record in records], masks
    )
    assert_close(token.embedding, alone.embedding)


def test_maps_of_smaller_layers_have_the_records_size(records_of_two_sizes):
    record, masks = records_of_two_sizes
    small = min(record.layers, key=lambda layer: layer.grid)
    token = optimize_token([record], masks, layers=[small.name], weight_decay=1e-2)
    assert small.grid != record.grid and token.maps(record).values.shape[1:] == record.grid
    assert record.refine(token.maps(record)).values.shape[1:] == record.grid


@pytest.fixture
def records_of_two_sizes(sd1_pipe):
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(32, 48, dtype=torch.bool)
    mask[8:24, 10:30] = True
    return daamlib.trace_image(sd1_pipe, image, timesteps=(100, 400), self_attention=True), [mask]


def test_several_classes_and_other_options(several):
    records, masks = several
    pairs = [torch.stack([mask, mask.roll(4, dims=0) & ~mask]) for mask in masks]
    options = {"word": ["car", "person"], "background": True}
    settings = choose_settings(records, pairs, **options)
    assert settings["layers"] == [GOOD]
    assert optimize_token(records, pairs, **options, **settings).words == ("car", "person", "background")


def test_records_of_sums_have_no_steps_to_choose(several):
    records, masks = several
    sums = [
        replace(
            record, layers=tuple(replace(each, queries=None, query_sum=each.summed_queries()) for each in record.layers)
        )
        for record in records
    ]
    settings = choose_settings(sums, masks)
    assert settings["max_timestep"] is None
    token = optimize_token(records, masks, max_timestep=100)
    with pytest.raises(ValueError, match="steps"):
        token.maps(sums[0])


def test_a_record_without_so_late_a_pass_is_read_by_its_least_noisy_one(several):
    records, masks = several
    token = optimize_token(records, masks, layers=[GOOD], max_timestep=min(records[0].timesteps) - 1)
    last = [record.timesteps.index(min(record.timesteps)) for record in records]
    late = [record.select(steps=[step]) for record, step in zip(records, last, strict=True)]
    expected = optimize_token(late, masks, layers=[GOOD])
    torch.testing.assert_close(token.embedding, expected.embedding)
    torch.testing.assert_close(token.maps(records[0]).values, expected.maps(late[0]).values)


def test_what_cannot_be_chosen_from(several):
    records, masks = several
    for options, message in (
        ({"method": "daam"}, "LDAAM"),
        ({"loss": "dice"}, "LDAAM"),
        ({"weight_decays": [1e-3, -1.0]}, "weight_decays"),
        ({"weight_decays": []}, "weight_decays"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_settings(records, masks, **options)
    nowhere = torch.zeros(GRID, dtype=torch.bool)
    pairs = [torch.stack([masks[0], nowhere]), torch.stack([nowhere, masks[1]])]  # one class an image
    with pytest.raises(ValueError, match="missing"):
        choose_settings(records[:2], pairs)
    with pytest.raises(ValueError, match=r"no layers \['no such layer'\]"):
        optimize_token(records, masks, layers=["no such layer"])
