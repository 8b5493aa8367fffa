"""IoU over thresholds equals a plain loop, and bad input is refused."""

import numpy as np
import pytest
import torch

from daamlib import metrics
from daamlib.attention.heatmaps import HeatMaps


def naive_curve(maps, masks, thresholds):
    """What miou_curve is meant to be: up-sample, normalise, threshold, one image and one threshold at a time."""
    rows = []
    for heat, mask in zip(maps, masks, strict=True):
        heat = HeatMaps(heat[None], ("word",)).resize(*mask.shape).normalized()[0]
        row = []
        for threshold in thresholds:
            prediction = heat > threshold
            row.append(((prediction & mask).sum() / (prediction | mask).sum()).item())
        rows.append(row)
    return np.mean(rows, axis=0)


@pytest.fixture
def some():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 9, 13, generator=generator) * 40 - 10
    maps[2] = 7.0  # constant
    masks = torch.rand(6, 9, 13, generator=generator) > 0.7
    masks[4] = True
    return maps, masks


@pytest.mark.parametrize("thresholds", [metrics.THRESHOLDS, (0.0, 0.5, 1.0), (0.3,), np.linspace(0, 0.9, 500)])
@pytest.mark.parametrize("size", [(9, 13), (36, 52), (20, 29)])
def test_the_curve_equals_a_plain_loop(some, thresholds, size):
    maps, masks = some
    masks = torch.nn.functional.interpolate(masks[None].float(), size, mode="nearest")[0] > 0.5
    levels, values = metrics.miou_curve(maps, masks, thresholds=thresholds)
    assert levels == pytest.approx(np.asarray(thresholds), abs=1e-7)
    assert values.dtype == np.float64
    assert values == pytest.approx(naive_curve(maps, masks, np.asarray(thresholds, np.float32)), abs=1e-6)


def test_values_on_a_threshold_do_not_exceed_it():
    heat = torch.tensor([[[0.0, 0.25, 0.5, 1.0]]])  # exact in binary, and min-max normalised already
    mask = torch.tensor([[[False, False, True, True]]])
    _, values = metrics.miou_curve(heat, mask, thresholds=(0, 0.25, 0.5, 1))
    assert values.tolist() == [2 / 3, 1.0, 0.5, 0.0]
    assert metrics.max_miou(heat, mask, thresholds=(0, 0.25, 0.5, 1)) == 1.0
    area = 0.25 * (2 / 3 + 1) / 2 + 0.25 * 0.75 + 0.5 * 0.25
    assert metrics.area_under_curve(heat, mask, thresholds=(0, 0.25, 0.5, 1)) == pytest.approx(area, abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 100, 101, 1000])
def test_even_thresholds_are_exact_at_their_neighbours(count):
    levels = torch.arange(count) / (count - 1)
    near = [torch.nextafter(levels, levels + side) for side in (-1, 0, 1)]
    values = torch.cat([*near, levels[:-1] + levels.diff() / 2, torch.rand(10_000)]).clamp(0, 1)  # min-max already
    counts = metrics.threshold_counts(values[None, None], torch.ones(1, 1, len(values)) > 0, thresholds=levels)
    assert counts.intersection[0].tolist() == [(values > level).sum().item() for level in levels]


def test_a_perfect_map_and_a_constant_one(some):
    _, masks = some
    assert metrics.max_miou(masks[:4].float(), masks[:4]) == 1.0
    assert metrics.area_under_curve(masks[:4].float(), masks[:4]) == pytest.approx(0.995)  # nothing exceeds 1
    assert metrics.max_miou(torch.ones(4, 9, 13), masks[:4]) == 0.0


def test_iou_of_two_masks():
    prediction, mask = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    prediction[1:3, :4], mask[1:4, 2:] = True, True
    assert metrics.iou(prediction, mask) == 4 / 16
    assert metrics.iou(torch.tensor(prediction), mask) == 4 / 16
    assert metrics.iou(np.zeros((4, 6), bool), mask) == 0.0
    assert metrics.iou(mask, mask) == 1.0


def test_arrays_are_taken_and_left_as_they_were(some):
    maps, masks = (tensor.numpy() for tensor in some)
    before = maps.copy(), masks.copy()
    expected = metrics.miou_curve(*some)[1]
    assert (metrics.miou_curve(maps.astype(np.float64), masks)[1] == expected).all()
    assert (maps == before[0]).all() and (masks == before[1]).all()


def nan(maps, masks):
    maps = maps.clone()
    maps[3, 0, 0] = float("nan")
    return maps, masks


def empty_mask(maps, masks):
    masks = masks.clone()
    masks[[1, 5]] = False
    return maps, masks


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda maps, masks: (maps[:5], masks), "5 maps"),
        (lambda maps, masks: (maps[0], masks), "shape"),
        (lambda maps, masks: (maps, masks[0]), "shape"),
        (lambda maps, masks: (maps[:0], masks[:0]), "one or more"),
        (lambda maps, masks: (maps, masks.float()), "float32"),
        (lambda maps, masks: (maps, masks.byte().numpy()), "uint8"),
        (lambda maps, masks: (maps, masks.repeat_interleave(3, dim=2)), "ratios of height and width differ"),
        (nan, "maps 3"),
        (empty_mask, "1, 5"),
    ],
)
@pytest.mark.parametrize("function", [metrics.miou_curve, metrics.max_miou, metrics.area_under_curve])
def test_bad_maps_and_masks_are_refused(some, spoil, message, function):
    with pytest.raises(ValueError, match=message):
        function(*spoil(*some))


@pytest.mark.parametrize(
    "thresholds", [(), (0.5, 0.5), (0.5, 0.2), (-0.1, 0.5), (0.5, 1.1), (0.5, float("nan")), np.eye(2)]
)
def test_bad_thresholds_are_refused(some, thresholds):
    with pytest.raises(ValueError, match="thresholds"):
        metrics.miou_curve(*some, thresholds=thresholds)


def test_iou_refuses_what_has_no_answer():
    mask = np.ones((3, 4), bool)
    with pytest.raises(ValueError, match="agree"):
        metrics.iou(np.ones((4, 3), bool), mask)
    with pytest.raises(ValueError, match="prediction"):
        metrics.iou(mask.astype(float), mask)
    with pytest.raises(ValueError, match="empty"):
        metrics.iou(mask, ~mask)


def test_pooled_counts_the_pixels_of_all_images(some):
    maps, masks = some
    levels, values = metrics.miou_curve(maps, masks, thresholds=(0.2, 0.6), pooled=True)
    for level, value in zip(levels, values, strict=True):
        found = torch.stack([HeatMaps(heat[None], ("word",)).normalized()[0] > level for heat in maps])
        assert value == pytest.approx(((found & masks).sum() / (found | masks).sum()).item(), abs=1e-7)
    assert metrics.max_miou(maps, masks, thresholds=(0.2, 0.6), pooled=True) == values.max()
    area = 0.4 * values.mean()
    assert metrics.area_under_curve(maps, masks, thresholds=(0.2, 0.6), pooled=True) == pytest.approx(area)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_bootstrap_draws_images(some, pooled):
    counts = metrics.threshold_counts(*some, thresholds=(0.2, 0.6))
    drawn = counts.resampled_curves(metrics.draw_images(6, 2000, seed=1), pooled=pooled)
    assert drawn.shape == (2000, 2)
    assert (drawn == counts.resampled_curves(metrics.draw_images(6, 2000, seed=1), pooled=pooled)).all()
    assert (drawn != counts.resampled_curves(metrics.draw_images(6, 2000, seed=2), pooled=pooled)).any()
    # against numpy's way of drawing with replacement: the same mean and deviation
    rng = np.random.default_rng(0)
    naive = []
    for _ in range(2000):
        which = rng.integers(6, size=6)
        inside, union = counts.intersection[which], counts.union[which]
        naive.append(inside.sum(0) / union.sum(0) if pooled else (inside / union).mean(0))
    assert drawn.mean(axis=0) == pytest.approx(np.mean(naive, axis=0), abs=0.01)
    assert drawn.std(axis=0) == pytest.approx(np.std(naive, axis=0), rel=0.1)


def test_one_image_has_no_spread(some):
    counts = metrics.threshold_counts(some[0][:1], some[1][:1])
    assert (counts.resampled_curves(metrics.draw_images(1, 10)) == counts.curve()).all()


@pytest.mark.parametrize("pooled", [False, True])
def test_a_resample_without_any_of_the_images_has_no_curve(some, pooled):
    counts = metrics.threshold_counts(*some)
    drawn = np.array([[0] * 6, [0, 2, 0, 0, 0, 0]])
    nothing, second = counts.resampled_curves(drawn, pooled=pooled)
    assert np.isnan(nothing).all()
    assert second == pytest.approx(counts.intersection[1] / counts.union[1])


def test_the_correlation_is_of_shape_alone():
    heat = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    assert metrics.correlation(heat, 3 * heat - 2) == pytest.approx(1)
    assert metrics.correlation(heat.numpy(), -heat) == pytest.approx(-1)
    other = torch.rand(5, 7, generator=torch.Generator().manual_seed(1))
    expected = np.corrcoef(heat.flatten(), other.flatten())[0, 1]
    assert metrics.correlation(heat, other) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        metrics.correlation(heat, heat[:2])
