"""Label maps of whole street scenes from a few annotated ones, by `daamlib.fit_classes`.

    python tests/benchmarks/street.py --scenes 60 --draws 10

The training scenes of each draw show every class together. Mean IoU of nine classes and of the four things, all test
scenes' pixels together, mean and range of the draws; then, by margin, the share of labelled pixels and how many are
right. Its seeds chose no setting: those were chosen on HELD_OUT + 9,200,000 ... and 9,300,000 ...
"""

import argparse

import numpy as np
import torch

import daamlib
from daamlib.cityscapes import IGNORED, label_id
from daamlib.tokens.guided import guided_upsample
from daamlib.tokens.label_maps import assign_labels, token_probabilities
from daamlib_lab.urban.captions import STREET_WORDS
from daamlib_lab.urban.scenes import HELD_OUT, KINDS, render

TIMESTEPS = (20, 100, 200, 300)
POOL, TEST = HELD_OUT + 9_400_000, HELD_OUT + 9_500_000
IDS = [label_id(name) for name in STREET_WORDS]
MARGINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def read(pipe, first, n):
    """The scenes of `n` seeds and their records."""
    scenes = [render(first + i) for i in range(n)]
    options = {"timesteps": TIMESTEPS, "self_attention": True}
    return scenes, [
        daamlib.trace_image(pipe, scene.image, prompt=scene.caption, seed=i, **options)
        for i, scene in enumerate(scenes)
    ]


def draws(scenes, k, n):
    """Numbers of k scenes that show every class, `n` times."""
    random, found = np.random.default_rng(0), []
    while len(found) < n:
        drawn = random.permutation(len(scenes))[:k]
        if set(IDS) <= set(np.unique(np.stack([scenes[i].labels for i in drawn])).tolist()):
            found.append(drawn)
    return found


def measure(tokens, scenes, records):
    """(9,) IoU in percent, and for each margin the shares of pixels that are labelled, and labelled rightly."""
    ids = [label_id(word) for word in tokens.words]
    counts, kept = np.zeros((2, len(IDS))), np.zeros((2, len(MARGINS)))
    for scene, record in zip(scenes, records, strict=True):
        probabilities = guided_upsample(token_probabilities(record, [tokens]).values, scene.image).clamp(0, 1)
        labels = [assign_labels(probabilities, ids, margin=margin) for margin in MARGINS]
        both = [[((labels[0] == i) & (scene.labels == i)).sum() for i in IDS]]
        counts += both + [[((labels[0] == i) | (scene.labels == i)).sum() for i in IDS]]
        kept += [[(found != IGNORED).mean() for found in labels], [(found == scene.labels).mean() for found in labels]]
    return 100 * counts[0] / counts[1], 100 * kept / len(scenes)


def main():
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--pool", type=int, default=40)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--k", type=int, nargs="+", default=(5, 20))
    args = parser.parse_args()
    pipe = daamlib.load_pipeline(device="cpu")
    (pool, annotated), (scenes, records) = read(pipe, POOL, args.pool), read(pipe, TEST, args.scenes)
    things = [list(STREET_WORDS).index(kind) for kind in KINDS]
    for k in args.k:
        ious, kept = [], []
        for drawn in draws(pool, k, args.draws):
            tokens = daamlib.fit_classes([annotated[i] for i in drawn], [pool[i].labels for i in drawn])
            of_draw, of_margins = measure(tokens, scenes, records)
            ious.append(of_draw)
            kept.append(of_margins)
            print(
                f"  {of_draw.mean():.1f} / {of_draw[things].mean():.1f}  fitted in {tokens.seconds:.0f} s", flush=True
            )
        means, of_things = np.mean(ious, axis=1), np.mean(ious, axis=0)[things].mean()
        print(f"{k} scenes: {means.mean():.1f} ({means.min():.1f} ... {means.max():.1f}), things {of_things:.1f}")
        print("  ".join(f"{name} {iou:.1f}" for name, iou in zip(STREET_WORDS, np.mean(ious, axis=0), strict=True)))
        for margin, labelled, right in zip(MARGINS, *np.mean(kept, axis=0), strict=True):
            print(f"margin {margin:.1f}: labelled {labelled:.1f} %, of these right {100 * right / labelled:.1f} %")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
