"""Measurement of the model's words: their maps on held-out scenes against the exact masks, by class and layer."""

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from daamlib import metrics
from daamlib.attention.heatmaps import HeatMaps
from daamlib.attention.record import AttentionRecord
from daamlib.cityscapes import BY_NAME
from daamlib.tokens.label_maps import label_map, text_of
from daamlib.tokens.optimize import optimize_token
from daamlib.tracing import trace_image
from daamlib_lab.urban.captions import STREET_WORDS
from daamlib_lab.urban.scenes import KINDS, SIZE, render

TIMESTEPS = (20, 100, 200, 300)  # noise levels at which a scene is read as a real image
MIN_SHARE = 0.01  # a class is shown where it covers this part of the scene
SPOKEN = {"building": ("building",), "vegetation": ("tree",)}  # other words of a class in captions
TRAIN = 5  # images whose masks a token is fitted to; the others judge it


@dataclass(frozen=True, eq=False)
class Reading:
    """A scene read as a real image.

    Attributes:
        record: its attention.
        daam: the maps of its caption.
        by_layer: the same of each layer alone, by its name.
        masks: boolean (S, S), of the classes shown.
        named: those of them that the caption names.
    """

    record: AttentionRecord
    daam: HeatMaps
    by_layer: Mapping[str, HeatMaps]
    masks: Mapping[str, np.ndarray]
    named: tuple[str, ...]


def read_scenes(pipe, n: int, first_seed: int) -> list[Reading]:
    """Trace the scenes of `n` seeds as real images, each under its own caption."""
    readings = []
    for seed in range(first_seed, first_seed + n):
        scene = render(seed, SIZE)
        record = trace_image(pipe, scene.image, prompt=scene.caption, timesteps=TIMESTEPS, seed=seed)
        masks = {kind: scene.labels == BY_NAME[kind].id for kind in KINDS}
        masks = {kind: mask for kind, mask in masks.items() if mask.mean() >= MIN_SHARE}
        named = tuple(kind for kind in masks if f" {kind} " in f" {scene.caption.replace(',', ' ')} ")
        alone = [record.select(layers=functools.partial(operator.is_, layer)) for layer in record.layers]
        by_layer = {one.layers[0].name: one.daam() for one in alone}
        readings.append(Reading(record, record.daam(), by_layer, masks, named))
    return readings


def measure_words(pipe: DiffusionPipeline, n: int, first_seed: int) -> dict:
    """Measure how well words and tokens point at what they name, on held-out scenes.

    Args:
        pipe: the model; it may have cross-attention in any blocks.
        n: how many scenes.
        first_seed: that of the first scene; the others follow.

    Returns:
        Maximum mIoU in percent by class, and their mean. `whole_image`: all of the image as the mask, which a map that
        says nothing reaches. `daam`: DAAM of the class's word in the scene's own caption; `daam_by_layer`: the same of
        each layer alone, by its name. `ldaam`: LDAAM of the word alone. `token`: the calibrated probability of an LDAAM
        token fitted to five scenes, on the others.

    Raises:
        ValueError: if fewer than six scenes show a class, or none names it.
    """
    readings = read_scenes(pipe, n, first_seed)
    found: dict[str, dict] = {"whole_image": {}, "daam": {}, "ldaam": {}, "token": {}}
    layers: dict[str, dict] = {name: {} for name in readings[0].by_layer}
    for kind in KINDS:
        shown = [reading for reading in readings if kind in reading.masks]
        named = [reading for reading in shown if kind in reading.named]
        if len(shown) <= TRAIN or not named:
            raise ValueError(f"{len(shown)} of {n} scenes show a {kind}, {len(named)} name it: measure on more scenes")
        found["whole_image"][kind] = 100 * float(np.mean([reading.masks[kind].mean() for reading in shown]))
        found["daam"][kind] = _miou([r.daam[kind] for r in named], named, kind)
        found["ldaam"][kind] = _miou([r.record.ldaam(kind)[kind] for r in shown], shown, kind)
        train, test = shown[:TRAIN], shown[TRAIN:]
        token = optimize_token([r.record for r in train], [r.masks[kind] for r in train], word=kind)
        found["token"][kind] = _miou([token.probabilities(r.record)[0] for r in test], test, kind)
        for name, by_class in layers.items():
            by_class[kind] = _miou([r.by_layer[name][kind] for r in named], named, kind)
    return {
        **{name: _with_mean(by_class) for name, by_class in found.items()},
        "daam_by_layer": {name: _with_mean(by_class) for name, by_class in layers.items()},
        "scenes": n,
        "first_seed": first_seed,
        "timesteps": list(TIMESTEPS),
    }


def measure_street(
    pipe: DiffusionPipeline, n: int, first_seed: int, *, world: str = "street", size: int = SIZE
) -> dict[str, Any]:
    """Measure how well the words of things and of stuff point, and zero-shot label maps of them, on held-out scenes.

    Args:
        pipe: the model.
        n: how many scenes.
        first_seed: that of the first scene; the others follow.
        world: of the scenes.
        size: their side in pixels.

    Returns:
        In percent, by class and their mean. `floor`: the mean IoU of the whole image as the mask. `daam`: maximum mIoU
        of DAAM of the class's word in the scene's own caption, over the scenes that name it. `listed`: the same of the
        word in the list of all nine (`STREET_WORDS`). `zero_shot`: IoU of `label_map`, all scenes' pixels together, the
        nine classes against each other; `zero_shot_present`: of the scene's classes alone. `things`: their mean.
    """
    maps: dict[str, list] = {f"{kind} {name}": [] for kind in ("daam", "listed") for name in STREET_WORDS}
    masks: dict[str, list] = {name: [] for name in maps}
    ids = np.array([BY_NAME[name].id for name in STREET_WORDS])
    counts = np.zeros((2, 256, 256), np.int64)  # (all words or those in the scene, truth, prediction)
    for seed in range(first_seed, first_seed + n):
        scene = render(seed, size, world)
        options: dict[str, Any] = {"timesteps": TIMESTEPS, "seed": seed, "self_attention": True}
        record = trace_image(pipe, scene.image, prompt=scene.caption, **options)
        daam, listed = record.daam(), record.daam(text_of(STREET_WORDS))
        said = f" {' '.join(word.text.strip() for word in daam.words)} "  # the words of the caption that the model read
        present = []
        for name, word in STREET_WORDS.items():
            mask = scene.labels == BY_NAME[name].id
            if mask.mean() < MIN_SHARE:
                continue
            present.append(name)
            maps[f"listed {name}"].append(listed[word])
            masks[f"listed {name}"].append(mask)
            spoken = next((w for w in (word, *SPOKEN.get(name, ())) if f" {w} " in said), None)
            if spoken:
                maps[f"daam {name}"].append(daam[spoken])
                masks[f"daam {name}"].append(mask)
        for k, names in enumerate((None, present)):
            found = label_map(record, STREET_WORDS, size=scene.labels.shape, names=names, margin=0.0, iterations=1)
            np.add.at(counts[k], (scene.labels.ravel(), found.ravel()), 1)
    result: dict[str, Any] = {
        "floor": {name: 100 * float(np.mean([m.mean() for m in masks[f"listed {name}"]])) for name in STREET_WORDS}
    }
    for kind in ("daam", "listed"):
        result[kind] = {
            name: 100 * metrics.max_miou(torch.stack(maps[f"{kind} {name}"]), np.stack(masks[f"{kind} {name}"]))
            for name in STREET_WORDS
        }
    for kind, table in zip(("zero_shot", "zero_shot_present"), counts, strict=True):
        result[kind] = _ious(table[ids][:, ids])
    rounded = {kind: _with_mean(by_class) for kind, by_class in result.items()}
    for by_class in rounded.values():
        by_class["things"] = round(float(np.mean([by_class[kind] for kind in KINDS])), 1)
    return {**rounded, "scenes": n, "first_seed": first_seed, "world": world, "timesteps": list(TIMESTEPS)}


def _ious(table: np.ndarray) -> dict[str, float]:
    """IoU in percent of each class of a confusion matrix."""
    right = table.diagonal()
    return dict(zip(STREET_WORDS, (100 * right / (table.sum(0) + table.sum(1) - right)).tolist(), strict=True))


def _miou(maps: Sequence[torch.Tensor], readings: Sequence[Reading], kind: str) -> float:
    return 100 * metrics.max_miou(torch.stack(list(maps)), np.stack([reading.masks[kind] for reading in readings]))


def _with_mean(by_class: Mapping[str, float]) -> dict[str, float]:
    values = {**by_class, "mean": float(np.mean(list(by_class.values())))}
    return {name: round(value, 1) for name, value in values.items()}
