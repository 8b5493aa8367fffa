"""Controls for attention maps: null models, randomised keys, and what the denoiser answers to a changed text.

They ask what a referee asks of a saliency map: does something simpler reach the same score, does the map depend on the
model (Adebayo et al. 2018, arXiv:1810.03292), and does it lie where the word acts?
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch.nn import functional as F

from daamlib import AttentionRecord, metrics
from daamlib.attention.real_images import add_noise, latents_of, noise_levels, pixels_of

Counts = Mapping[str, metrics.ThresholdCounts]  # of each class, its images in order


def mean_score(counts: Counts) -> float:
    """Return the maximum mIoU of each class at its best threshold, averaged over the classes, in percent.

    Args:
        counts: intersections and unions of each class, by `metrics.threshold_counts`.

    Returns:
        A number in [0, 100].
    """
    return 100 * float(np.mean([each.curve().max() for each in counts.values()]))


def score_interval(
    counts: Counts, shown: Mapping[str, Sequence[int]], *, minus: Counts | None = None, resamples: int = 1000
) -> tuple[float, float, float]:
    """Return a mean score, or how far it is ahead of another, and the ends of its 95 % bootstrap interval.

    Whole images are drawn, with all classes that they show, and both scores read the same draw (paired).

    Args:
        counts: of the classes, see `mean_score`.
        shown: the numbers of the images that each row of a class's counts belongs to.
        minus: counts of the other maps in the same images; None: the score itself.
        resamples: how many draws.

    Returns:
        The value and the two ends, in percent, or in points of a difference.
    """
    numbers = sorted({number for rows in shown.values() for number in rows})
    drawn = metrics.draw_images(len(numbers), resamples)
    place = {number: column for column, number in enumerate(numbers)}

    def resampled(of: Counts) -> np.ndarray:
        curves = [of[name].resampled_curves(drawn[:, [place[i] for i in shown[name]]]) for name in of]
        return np.nanmean([curve.max(axis=1) for curve in curves], axis=0)

    value, draws = mean_score(counts), resampled(counts)
    if minus is not None:
        value, draws = value - mean_score(minus), draws - resampled(minus)
    low, high = 100 * np.nanquantile(draws, [0.025, 0.975])
    return value, float(low), float(high)


def mean_interval(values: Sequence[float] | np.ndarray, *, resamples: int = 1000) -> tuple[float, float, float]:
    """Return a mean over images and the ends of its 95 % bootstrap interval.

    Args:
        values: one number an image; of a paired comparison the differences.
        resamples: how many draws.

    Returns:
        The mean and the two ends.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, float)
    if not values.size:
        raise ValueError("a mean needs one value or more")
    means = metrics.draw_images(len(values), resamples) @ values / len(values)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return Spearman's correlation of two (h, w) maps: Pearson's of the ranks of their cells, in [-1, 1]."""
    ranks = [heat.flatten().argsort().argsort().view(heat.shape).float() for heat in (one, other)]
    return metrics.correlation(*ranks)


def hits(heat: torch.Tensor, mask: Bool[np.ndarray, "H W"]) -> bool:
    """Return whether the largest value of an up-sampled map lies in the mask (the pointing game, Zhang et al. 2016).

    Args:
        heat: (h, w) map.
        mask: the truth, of any size.

    Returns:
        True for a hit.
    """
    large = F.interpolate(heat[None, None].float(), mask.shape, mode="bilinear", align_corners=False)
    return bool(np.asarray(mask).flat[int(large.argmax())])


def shuffled_keys(record: AttentionRecord, layers: Sequence[str], seed: int = 0) -> AttentionRecord:
    """Return the record with the key weights of some layers in a random order.

    A record keeps the keys as data, so its maps are exactly those of a model with shuffled keys that received the same
    queries. Mean and spread of the weights stay.

    Args:
        record: with queries.
        layers: names, as `record.layer_names()` gives them.
        seed: of the order.

    Returns:
        A new record.

    Raises:
        ValueError: the record has no such layer.
    """
    unknown = set(layers) - set(record.layer_names())
    if unknown:
        raise ValueError(f"the record has the layers {record.layer_names()}, got {sorted(unknown)}")
    changed = []
    for number, layer in enumerate(record.layers):
        if layer.name in layers:
            weight = layer.to_k.weight
            order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1000 * seed + number))
            shuffled = weight.flatten()[order.to(weight.device)].view_as(weight)
            layer = replace(layer, to_k=replace(layer.to_k, weight=shuffled))
        changed.append(layer)
    return replace(record, layers=tuple(changed))


def random_denoiser(pipe: Any, seed: int = 0) -> Any:
    """Return the pipeline with a U-Net of the same config and random weights, as before its training.

    Args:
        pipe: a pipeline with a U-Net; it stays as it is.
        seed: of the weights.

    Returns:
        A new pipeline that shares all other parts.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = type(pipe.unet).from_config(pipe.unet.config)
    unet = unet.to(pipe.device).eval()
    fresh = copy.copy(pipe)
    fresh.register_modules(unet=unet if unet.dtype == pipe.unet.dtype else unet.to(pipe.unet.dtype))
    return fresh


def latents(pipe: Any, image: Any) -> Float[torch.Tensor, "1 C h w"]:
    """Return the float32 latents of an image, without noise, as `daamlib.trace_image` gives them to the denoiser."""
    with torch.no_grad():
        return latents_of(pipe.vae, pixels_of(image, pipe.vae_scale_factor).to(pipe.device))


def noisy(pipe: Any, clean: torch.Tensor, timesteps: Sequence[int], seed: int = 0) -> list[torch.Tensor]:
    """Return the noisy latents that `daamlib.trace_image` reads at each of the timesteps, for the same seed.

    Args:
        pipe: whose scheduler says how much noise a timestep means.
        clean: latents without noise.
        timesteps: of the training schedule.
        seed: of the noise.

    Returns:
        A tensor of the shape of `clean` for each timestep.
    """
    return add_noise(clean, [noise_levels(pipe.scheduler, step, clean.device) for step in timesteps], seed)


def latent_features(clean: Float[torch.Tensor, "1 C h w"]) -> Float[np.ndarray, "cells features"]:
    """Return what a probe without attention may use of each cell: its latents, its position, and their squares.

    Args:
        clean: latents without noise.

    Returns:
        Channels, their squares, x, y, x^2, y^2 and x y, in float64.
    """
    channels = clean[0].double().cpu().flatten(1).numpy()
    height, width = clean.shape[-2:]
    y, x = (each.ravel() for each in np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"))
    return np.stack([*channels, *channels**2, x, y, x * x, y * y, x * y], axis=1)


def logistic_regression(
    features: Float[np.ndarray, "cells features"], targets: np.ndarray, *, weight_decay: float = 1e-3
) -> Float[np.ndarray, " features_and_bias"]:
    """Fit the weights and the bias of a logistic regression by Newton's method.

    Args:
        features: of each cell.
        targets: (cells,) of 0 and 1.
        weight_decay: of the weights, not of the bias, added to the mean cross-entropy.

    Returns:
        The weights, the bias last.
    """
    design = np.column_stack([features, np.ones(len(features))])
    decay = np.append(np.full(features.shape[1], weight_decay), 0.0)
    weights = np.zeros(design.shape[1])

    def loss(at: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, design @ at) - targets * (design @ at)) + decay @ at**2 / 2)

    for _ in range(50):
        chance = 1 / (1 + np.exp(-(design @ weights)))
        gradient = design.T @ (chance - targets) / len(design) + decay * weights
        hessian = (design * (chance * (1 - chance))[:, None]).T @ design / len(design) + np.diag(decay)
        step, length = np.linalg.solve(hessian + 1e-12 * np.eye(len(weights)), gradient), 1.0
        while loss(weights - length * step) > loss(weights) and length > 1e-6:
            length /= 2
        weights = weights - length * step
        if gradient @ step < 1e-14:
            break
    return weights
