"""The controls of attention maps, on a tiny pipeline and on numbers that can be checked by hand."""

import numpy as np
import pytest
import torch

import daamlib
from daamlib import metrics
from daamlib_lab.experiments import sanity

SHAPE = (12, 16)


def maps_and_masks(n, *, seed=0):
    """Random maps with larger values inside of random rectangles."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *SHAPE), bool)
    for mask in masks:
        y, x = rng.integers(0, 8, 2)
        mask[y : y + 4, x : x + 6] = True
    return torch.from_numpy(rng.uniform(size=masks.shape) + 0.3 * masks), masks


@pytest.fixture(scope="module")
def counts():
    return {name: metrics.threshold_counts(*maps_and_masks(n, seed=n)) for name, n in {"car": 6, "rider": 4}.items()}


@pytest.fixture(scope="module")
def record(sd1_pipe):
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return daamlib.trace_image(sd1_pipe, image, prompt="a car and a tree", timesteps=(100, 300), seed=3)


SHOWN = {"car": [0, 1, 2, 3, 4, 7], "rider": [1, 4, 5, 7]}


def test_a_score_is_the_mean_of_the_classes_at_their_own_thresholds(counts):
    each = [metrics.max_miou(*maps_and_masks(n, seed=n)) for n in (6, 4)]
    assert sanity.mean_score(counts) == pytest.approx(100 * np.mean(each))
    value, low, high = sanity.score_interval(counts, SHOWN)
    assert value == sanity.mean_score(counts)
    assert low < value < high


def test_a_paired_difference_draws_the_same_images(counts):
    assert sanity.score_interval(counts, SHOWN, minus=counts) == (0.0, 0.0, 0.0)
    better = {
        name: metrics.ThresholdCounts(of.thresholds, np.minimum(of.intersection + 1, of.union), of.union)
        for name, of in counts.items()
    }
    value, low, high = sanity.score_interval(better, SHOWN, minus=counts)
    assert 0 < low <= value <= high < 10  # far narrower than the interval of either score


def test_a_mean_and_its_interval():
    values = np.random.default_rng(0).normal(size=400)
    value, low, high = sanity.mean_interval(values)
    assert value == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    with pytest.raises(ValueError, match="one value"):
        sanity.mean_interval([])


def test_the_rank_correlation_knows_the_order_alone():
    heat = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    assert sanity.rank_correlation(heat, heat.exp()) == pytest.approx(1)
    assert sanity.rank_correlation(heat, -heat) == pytest.approx(-1)
    assert metrics.correlation(heat, (20 * heat).exp()) < 0.9


def test_the_pointing_game():
    heat, mask = torch.zeros(3, 4), np.zeros(SHAPE, bool)
    heat[1, 2] = 1
    mask[4:8, 8:12] = True  # the cell, four times as large
    assert sanity.hits(heat, mask)
    assert not sanity.hits(heat, ~mask)


def test_shuffled_keys_are_those_of_a_model_with_shuffled_weights(record):
    first, *others = record.layer_names()
    shuffled = sanity.shuffled_keys(record, [first], seed=1)
    for before, after in zip(record.layers, shuffled.layers, strict=True):
        assert torch.equal(before.queries, after.queries)
        assert torch.equal(before.key_weight.flatten().sort().values, after.key_weight.flatten().sort().values)
        assert torch.equal(before.key_weight, after.key_weight) == (before.name != first)
    rest = [each.select(layers=lambda layer: layer.name in others).daam().values for each in (record, shuffled)]
    assert torch.equal(*rest)
    assert not torch.allclose(record.daam().values, shuffled.daam().values)
    again = sanity.shuffled_keys(record, [first], seed=1)
    assert torch.equal(shuffled.daam().values, again.daam().values)
    with pytest.raises(ValueError, match="nothing"):
        sanity.shuffled_keys(record, ["nothing"])


def test_a_random_denoiser_has_the_config_and_no_weight_of_the_trained_one(sd1_pipe):
    trained = sd1_pipe.unet
    state = torch.random.get_rng_state()
    fresh = sanity.random_denoiser(sd1_pipe, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert sd1_pipe.unet is trained and fresh.text_encoder is sd1_pipe.text_encoder and fresh.vae is sd1_pipe.vae
    assert fresh.unet.config == trained.config
    weight = lambda pipe: pipe.unet.conv_in.weight  # noqa: E731
    assert not torch.equal(weight(fresh), weight(sd1_pipe))
    assert torch.equal(weight(fresh), weight(sanity.random_denoiser(sd1_pipe, seed=1)))
    image = np.zeros((32, 48, 3), np.uint8)
    assert daamlib.trace_image(fresh, image, prompt="a car", timesteps=(100,)).grid == (16, 24)


def test_noisy_latents_are_those_that_a_record_was_read_from(sd1_pipe, record):
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    noisy = sanity.noisy(sd1_pipe, sanity.latents(sd1_pipe, image), (100, 300), seed=3)
    seen = []
    hook = sd1_pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["sample"]), with_kwargs=True
    )
    try:
        daamlib.trace_image(sd1_pipe, image, prompt="a car and a tree", timesteps=(100, 300), seed=3)
    finally:
        hook.remove()
    assert len(noisy) == len(seen) == 2
    assert all(torch.equal(*pair) for pair in zip(noisy, seen, strict=True))


def test_logistic_regression_finds_the_minimum():
    rng = np.random.default_rng(0)
    features = sanity.latent_features(torch.from_numpy(rng.normal(size=(1, 4, 8, 8))))
    assert features.shape == (64, 13)
    targets = (features[:, 0] + 0.5 * rng.normal(size=64) > 0).astype(float)
    weights = sanity.logistic_regression(features, targets, weight_decay=0.01)
    leaf = torch.from_numpy(weights).requires_grad_()
    logits = torch.from_numpy(features) @ leaf[:-1] + leaf[-1]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(targets))
    (loss + 0.005 * leaf[:-1].square().sum()).backward()
    assert leaf.grad.abs().max() < 1e-6
    assert ((features @ weights[:-1] + weights[-1] > 0) == (targets > 0)).mean() > 0.8
