"""What the defaults of `daamlib.tokens.label_maps` rest on, measured on rendered scenes that no notebook reports.

    python tests/benchmarks/label_maps.py --scenes 80

Maximum mIoU of maps, mean IoU of label maps and the part of pixels that they ignore, in percent; of the four things.
"""

import argparse

import numpy as np
import torch

import daamlib
from daamlib import metrics
from daamlib.attention.heatmaps import HeatMaps
from daamlib.cityscapes import IGNORED, MIN_AREA, label_id
from daamlib.tokens import label_maps
from daamlib_lab.experiments.tables import Example, fit, train_test_split
from daamlib_lab.urban.captions import STREET_WORDS
from daamlib_lab.urban.scenes import HELD_OUT, KINDS, render

FIRST_SEED = HELD_OUT + 8_000_000
IDS = [label_id(kind) for kind in KINDS]


def read_scenes(pipe, n):
    """The scenes of `n` seeds that show a thing, read as real images under the nine words of `STREET_WORDS`."""
    scenes, examples = [], []
    for i in range(n):
        scene = render(FIRST_SEED + i)
        masks = {kind: scene.labels == id_ for kind, id_ in zip(KINDS, IDS, strict=True)}
        masks = {kind: mask for kind, mask in masks.items() if mask.mean() >= MIN_AREA}
        if masks:
            record = daamlib.trace_image(
                pipe, scene.image, prompt=scene.caption, timesteps=(100, 300, 500), seed=i, self_attention=True
            )
            scenes.append(scene)
            examples.append(Example(record, masks))
    return scenes, examples


def show_maps(title, by_class):
    """by_class: of each thing its (map, mask) pairs."""
    found = {
        kind: 100 * metrics.max_miou(torch.stack([heat for heat, _ in pairs]), np.stack([mask for _, mask in pairs]))
        for kind, pairs in by_class.items()
    }
    each = "  ".join(f"{kind} {value:.1f}" for kind, value in found.items())
    print(f"{title:52} {np.mean(list(found.values())):5.1f}   {each}", flush=True)


def show_labels(title, found, truths):
    """found, truths: (n, H, W) ids. Ignored pixels are counted as missed."""
    ious = [((found == i) & (truths == i)).sum() / ((found == i) | (truths == i)).sum() for i in IDS]
    print(f"{title:52} {100 * np.mean(ious):5.1f}   ignored {100 * (found == IGNORED).mean():.1f}", flush=True)


def words(scenes, examples, truths):
    """Words alone: the classes' maps, and label maps by the sharpness of their softmax."""
    text = label_maps.text_of(STREET_WORDS)
    readers = {
        "words of one text": lambda record: record.daam(text),
        "words of one text, refined": lambda record: record.refine(record.daam(text)),
        "words, competing": lambda record: label_maps.word_probabilities(record, STREET_WORDS, iterations=0),
        "words, competing and refined": lambda record: label_maps.word_probabilities(record, STREET_WORDS),
    }
    for title, reader in readers.items():
        maps = [reader(example.record) for example in examples]
        pairs = {
            kind: [(m[kind], e.masks[kind]) for m, e in zip(maps, examples, strict=True) if kind in e.masks]
            for kind in KINDS
        }
        show_maps(title, pairs)
    stuff = set(STREET_WORDS) - set(KINDS)
    found = [
        label_maps.label_map(e.record, STREET_WORDS, size=truths.shape[1:], names=stuff | set(e.masks), margin=0.0)
        for e in examples
    ]
    show_labels("label maps of words, things that are there", np.stack(found), truths)
    default = label_maps.SHARPNESS
    for sharpness in (1.0, 2.0, 4.0, 8.0):
        label_maps.SHARPNESS = sharpness
        found = np.stack(
            [label_maps.label_map(example.record, STREET_WORDS, size=truths.shape[1:]) for example in examples]
        )
        show_labels(f"label maps of words, sharpness {sharpness:g}", found, truths)
    label_maps.SHARPNESS = default


def tokens(scenes, examples, truths, n):
    """Tokens of `n` images: plain and refined, as they are and with settings chosen from the training masks."""
    pairs, fitted = {}, []
    for kind in KINDS:
        train, test = train_test_split(examples, kind, 5, seed=0)
        records, masks = [e.record for e in train[:n]], [e.masks[kind] for e in train[:n]]
        plain = fit(train[:n], kind, "LDAAM")
        chosen = fit(train[:n], kind, "LDAAM", **daamlib.choose_settings(records, masks, word=kind))
        fitted.append(chosen)
        for title, token in ((f"token of {n}", plain), (f"token of {n}, chosen settings", chosen)):
            for example in test:
                maps = HeatMaps.of_words(token.probabilities(example.record), (kind,))
                refined = example.record.refine(maps)
                pairs.setdefault(title, {}).setdefault(kind, []).append((maps[kind], example.masks[kind]))
                of_refined = pairs.setdefault(f"{title}, refined", {}).setdefault(kind, [])
                of_refined.append((refined[kind], example.masks[kind]))
    for title, by_class in pairs.items():
        show_maps(title, by_class)
    for title, options in (
        ("without propagation", {"iterations": 0}),
        ("", {}),
        ("two iterations", {"iterations": 2}),
        ("edges", {"edges": True}),
    ):
        edges = options.pop("edges", False)
        found = [
            label_maps.label_map(
                e.record, fitted, size=truths.shape[1:], margin=0.0, image=scene.image if edges else None, **options
            )
            for e, scene in zip(examples, scenes, strict=True)
        ]
        show_labels(f"label maps of tokens of {n} {title}", np.stack(found), truths)


def main():
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=80)
    args = parser.parse_args()
    scenes, examples = read_scenes(daamlib.load_pipeline(device="cpu"), args.scenes)
    truths = np.stack([scene.labels for scene in scenes])
    words(scenes, examples, truths)
    for n in (5, 1):
        tokens(scenes, examples, truths, n)


if __name__ == "__main__":
    main()
