"""What generated images with full label maps are worth to a network, beside the few scenes that a person annotated.

    python tests/benchmarks/synthetic.py --draws 5        # goes on where it was stopped, after the last whole draw
    python tests/benchmarks/synthetic.py --name large --first 5 --draws 5 --k 5 --images 96 --train-steps 800
    python tests/benchmarks/synthetic.py --cost 6         # processor time of labelled images beside that of plain ones

Each draw has k annotated scenes of its own (10 of the 20, 5 of the 10), tokens fitted to exactly these by
`daamlib.fit_classes`, generated images of its own with the label maps of these tokens, and as many exact scenes.
Networks are compared on one set of test scenes by the mean IoU of nine classes; early stopping uses other scenes. The
label maps' probabilities are counted on two more sets: one to choose a margin on, one to report it on. One file a draw
in data/street-sets, which notebook 07 reads. The size of the large run was chosen on draws 0 and 1.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from street import IDS, MARGINS, TIMESTEPS, draws, read

import daamlib
from daamlib.cityscapes import IGNORED, label_id
from daamlib.datasets import TokenLabeller, generate, urban_prompts
from daamlib.pipeline import generators
from daamlib.resources import bundled
from daamlib.tokens.guided import guided_upsample
from daamlib.tokens.label_maps import assign_labels, token_probabilities
from daamlib_lab.experiments import segmentation
from daamlib_lab.urban.captions import STREET_WORDS
from daamlib_lab.urban.scenes import HELD_OUT, render

FOLDER = Path(__file__).resolve().parents[2] / "data" / "street-sets"
POOL, TEST, VALIDATION, EXACT, CHOICE, REPORT = (HELD_OUT + 9_600_000 + 10_000 * i for i in range(6))
CLASSES = tuple(STREET_WORDS)
BINS = 10


def as_targets(labels, side):
    """Numbers of the nine classes at `side` pixels, 255 elsewhere."""
    targets = np.full(labels.shape, IGNORED, np.uint8)
    for number, i in enumerate(IDS):
        targets[labels == i] = number
    return np.array(Image.fromarray(targets).resize((side, side), Image.Resampling.NEAREST))


def labelled(images, label_maps, side):
    """Images and maps of ids as a network takes them."""
    small = [np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BOX)) for image in images]
    targets = [as_targets(labels, side) for labels in label_maps]
    return segmentation.Labelled(np.stack(small), np.stack(targets), CLASSES)


def exact(first, n, side):
    """Rendered scenes of n seeds."""
    scenes = [render(first + i) for i in range(n)]
    return labelled([scene.image for scene in scenes], [scene.labels for scene in scenes], side)


def synthetic(pipe, tokens, args, draw):
    """The images of a draw, and for each of the tokens their label maps."""
    images, maps = [], [[] for _ in tokens]
    for i, prompt in enumerate(urban_prompts(args.images, seed=1000 + draw)):
        options = {"num_inference_steps": args.steps, "guidance_scale": 5.0}
        with daamlib.trace(pipe, self_attention=True) as trace:
            made = pipe(prompt, generator=generators([100_000 * (1 + draw) + i]), **options)
        images.append(np.array(made.images[0]))
        for of_tokens, one in zip(maps, tokens, strict=True):
            of_tokens.append(daamlib.label_map(trace[0], one, image=images[-1]))
    return images, maps


def reliability(tokens, scenes, records):
    """Counts of pixels and of right ones by bin of the highest probability, and the sum of these; shares by margin."""
    ids = np.array([label_id(word) for word in tokens.words])
    bins, kept = np.zeros((3, BINS)), np.zeros((2, len(MARGINS)))
    for scene, record in zip(scenes, records, strict=True):
        values = guided_upsample(token_probabilities(record, [tokens]).values, scene.image).clamp(0, 1).numpy()
        highest, right = values.max(axis=0).ravel(), (ids[values.argmax(axis=0)] == scene.labels).ravel()
        number = np.minimum((highest * BINS).astype(int), BINS - 1)
        bins += [np.bincount(number, weights, BINS) for weights in (None, right, highest)]
        for m, margin in enumerate(MARGINS):
            found = assign_labels(values, ids.tolist(), margin=margin)
            kept[:, m] += (found != IGNORED).mean(), (found == scene.labels).mean()
    return {
        "pixels": bins[0].tolist(),
        "right": bins[1].tolist(),
        "expected": bins[2].round(1).tolist(),
        "labelled": (kept[0] / len(scenes)).round(5).tolist(),
        "labelled rightly": (kept[1] / len(scenes)).round(5).tolist(),
    }


def one_draw(pipe, args, draw, pool, records, test, validation, held_out):
    """All that is stored of a draw."""
    start, order = time.perf_counter(), draws(pool, min(args.k), draw + 1)[draw].tolist()
    rest = np.random.default_rng(draw).permutation([i for i in range(len(pool)) if i not in order]).tolist()
    order += rest  # the first k of them are the annotated scenes
    tokens = []
    for k in args.k:
        maps = [pool[i].labels for i in order[:k]]
        options = {"max_timestep": max(TIMESTEPS), "weight_decays": (args.weight_decay / k,)}
        tokens.append(daamlib.fit_classes([records[i] for i in order[:k]], maps, **options))
        print(f"  {k} scenes fitted in {tokens[-1].seconds:.0f} s", flush=True)
    images, maps = synthetic(pipe, tokens, args, draw)
    print(f"  {len(images)} images, {time.perf_counter() - start:.0f} s", flush=True)
    ceiling = exact(EXACT + 1000 * draw, args.images, args.side)
    jobs = {("exact scenes", args.images, 0): ceiling}
    for k, of_k in zip(args.k, maps, strict=True):
        scenes = [pool[i] for i in order[:k]]
        few = labelled([scene.image for scene in scenes], [scene.labels for scene in scenes], args.side)
        generated = labelled(images, of_k, args.side)
        jobs |= {("scenes", k, 0): few, ("synthetic", k, args.images): generated}
        jobs["both", k, args.images] = few + generated
    rows = []
    for (name, k, n), data in jobs.items():
        options = {"steps": args.train_steps, "seed": draw, "validation": validation}
        iou = segmentation.evaluate(segmentation.train(data, **options), test)
        print(f"  {name:12} k = {k:3} n = {n:3}: {iou['mean']:.1f}  {time.perf_counter() - start:.0f} s", flush=True)
        rows.append({"trained on": name, "k": k, "images": n, "IoU": {c: round(v, 2) for c, v in iou.items()}})
    counts = [
        {"k": k, "scenes": name, **reliability(one, *of)}
        for k, one in zip(args.k, tokens, strict=True)
        for name, of in held_out.items()
    ]
    shares = [np.mean([(m == i).mean() for m in of_k]) for of_k in maps[:1] for i in IDS]
    ignored = [float(np.mean([(m == IGNORED).mean() for m in of_k])) for of_k in maps]
    of_set = {"shares": dict(zip(CLASSES, np.round(shares, 4).tolist(), strict=True)), "ignored": ignored}
    return {"draw": draw, "settings": vars(args), "scenes": order[: max(args.k)], "networks": rows, "maps": counts} | {
        "synthetic set": of_set,
        "seconds": round(time.perf_counter() - start),
    }


def cost(pipe, n):
    """Print the processor time of n images with and without label maps, of the same seeds, in turns."""
    token = daamlib.OptimizedToken.load(bundled("urban-tiny") / "street.safetensors")
    labellers = {"plain": None, "labelled": TokenLabeller.of([token])}
    seconds = {name: [] for name in labellers}
    for i, prompt in enumerate(urban_prompts(n + 1)):
        for name, labeller in labellers.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                generate(pipe, [prompt], Path(folder) / "set", labeller=labeller, seed=i)
                seconds[name] += [time.process_time() - start] * (i > 0)  # the first warms up
    ratios = np.array(seconds["labelled"]) / seconds["plain"]
    means = ", ".join(f"{name} {np.mean(of):.2f} s" for name, of in seconds.items())
    print(f"{means} an image of 25 steps; n = {n}")
    print(f"ratio {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})")


def main():
    """Read the command line; make the draws that are not stored yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--name", default="draw", help="of the files: data/street-sets/NAME-0.json and so on")
    parser.add_argument("--k", type=int, nargs="+", default=(5, 10, 20))
    parser.add_argument("--images", type=int, default=16, help="generated images of a draw")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps of an image")
    parser.add_argument("--train-steps", type=int, default=100, help="of each network, in batches of 8")
    parser.add_argument("--side", type=int, default=48, help="pixels, of the networks' images")
    parser.add_argument("--pool", type=int, default=24, help="scenes that the annotated ones are drawn from")
    parser.add_argument("--test", type=int, default=60)
    parser.add_argument("--validation", type=int, default=20)
    parser.add_argument("--maps", type=int, default=5, help="scenes to choose a margin on, and as many to report it")
    parser.add_argument("--cost", type=int, metavar="N", help="only compare the times of so many images")
    parser.add_argument("--weight-decay", type=float, default=0.06, help="of tokens of one scene; / k of k scenes")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = {draw: FOLDER / f"{args.name}-{draw}.json" for draw in range(args.first, args.first + args.draws)}
    pipe = daamlib.load_pipeline(device="cpu")
    if args.cost:
        cost(pipe, args.cost)
        return
    pool, records = read(pipe, POOL, args.pool)
    held_out = {"choice": read(pipe, CHOICE, args.maps), "report": read(pipe, REPORT, args.maps)}
    test, validation = exact(TEST, args.test, args.side), exact(VALIDATION, args.validation, args.side)
    for draw, path in paths.items():
        if path.is_file():
            continue
        print(f"draw {draw}", flush=True)
        made = one_draw(pipe, args, draw, pool, records, test, validation, held_out)
        path.write_text(json.dumps(made) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
