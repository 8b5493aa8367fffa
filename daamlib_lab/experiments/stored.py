"""Make the stored run of the thesis' experiment: ``python -m daamlib_lab.experiments.stored --folder work``.

The bundled model, 200 generated images with the annotator's masks and 200 rendered scenes with exact masks. Each draw
shuffles the images of a class anew, fits to its first k and reads the others. Nothing is chosen on test images.
Intervals come from a two-way bootstrap: draws and images are both drawn again, so the intervals include the luck of the
training images. A run that is stopped resumes after its last complete draw. It writes `results.csv`, `curves.csv`,
`differences.csv`, `iou.npz` (each image, each draw) and `metrics.json` to `data/tables-200`.
"""

import argparse
import itertools
import json
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import daamlib
from daamlib import datasets, metrics
from daamlib.extras import needs

from ..urban.annotator import labels_for
from ..urban.dataset import render_dataset
from ..urban.scenes import HELD_OUT
from ..urban.scenes import KINDS as CLASSES
from . import tables
from .tables import Example, count, fit, load_examples, train_test_split

with needs("experiments"):
    import pandas as pd

    from daamlib.datasets.dataset import Dataset

MOST = 5  # training images of a class: those of smaller numbers are the first of these, so all share the test images
LEVELS = np.linspace(0, 1, 101)  # the thresholds
TIMESTEPS = (100, 300, 500)  # noise levels at which a rendered scene is read
THESIS_LOSS = {"loss": "cross_entropy", "weight_decay": 1e-6, "iterations": 150}  # notebook 05 chose the weight decay
# (name, method of `fit`, k, options of `fit`): "chosen" are those of `choose_settings` on the training images
RUNS: tuple[tuple[str, str, int, Mapping[str, Any] | str], ...] = (
    ("DAAM", "DAAM", 0, {}),
    ("LDAAM", "LDAAM", 0, {}),
    ("DAAM", "DAAM", MOST, {}),
    ("LDAAM", "LDAAM", 1, {}),
    ("LDAAM", "LDAAM", 2, {}),
    ("LDAAM", "LDAAM", MOST, {}),
    ("LDAAM, chosen settings", "LDAAM", 1, "chosen"),
    ("LDAAM, chosen settings", "LDAAM", 2, "chosen"),
    ("LDAAM, chosen settings", "LDAAM", MOST, "chosen"),
    ("DAAM, thesis' loss", "DAAM", MOST, THESIS_LOSS),
    ("LDAAM, thesis' loss", "LDAAM", MOST, THESIS_LOSS),
)
Key = tuple[str, int, bool]  # name, k, refined
DIFFERENCES: dict[str, tuple[Key, Key]] = {
    "LDAAM - DAAM, words": (("LDAAM", 0, False), ("DAAM", 0, False)),
    "DAAM optimised - words": (("DAAM", MOST, False), ("DAAM", 0, False)),
    "LDAAM optimised - word": (("LDAAM", MOST, False), ("LDAAM", 0, False)),
    "LDAAM - DAAM, optimised": (("LDAAM", MOST, False), ("DAAM", MOST, False)),
    "LDAAM optimised on 1 - word": (("LDAAM", 1, False), ("LDAAM", 0, False)),
    "LDAAM optimised on 1, chosen settings - word": (("LDAAM, chosen settings", 1, False), ("LDAAM", 0, False)),
    "LDAAM optimised on 1 - on 5": (("LDAAM", 1, False), ("LDAAM", MOST, False)),
    "LDAAM optimised on 1 - on 5, chosen settings": (
        ("LDAAM, chosen settings", 1, False),
        ("LDAAM, chosen settings", MOST, False),
    ),
    "words refined - words, DAAM": (("DAAM", 0, True), ("DAAM", 0, False)),
    "tokens refined - tokens, LDAAM": (("LDAAM, chosen settings", MOST, True), ("LDAAM, chosen settings", MOST, False)),
    "LDAAM optimised, refined - words refined": (("LDAAM, chosen settings", MOST, True), ("DAAM", 0, True)),
    "DAAM optimised, refined - words refined": (("DAAM", MOST, True), ("DAAM", 0, True)),
    "thesis' loss - ours, DAAM": (("DAAM, thesis' loss", MOST, False), ("DAAM", MOST, False)),
    "thesis' loss - ours, LDAAM": (("LDAAM, thesis' loss", MOST, False), ("LDAAM", MOST, False)),
    "LDAAM - DAAM, optimised by the thesis' loss": (
        ("LDAAM, thesis' loss", MOST, False),
        ("DAAM, thesis' loss", MOST, False),
    ),
}


def dataset_of(truth: str, n: int, folder: Path, pipe: Any, *, seed: int = 0) -> Dataset:
    """Return a set of n images with label maps, made where the folder of the sets lacks it.

    It is "generated" (the annotator's masks) or "rendered" (held-out scenes, exact masks).
    """
    if truth == "rendered":
        return render_dataset(folder / f"rendered-{seed}-{n}", n, first_seed=HELD_OUT + 1000 * seed, size=128)
    made: dict[str, Any] = {"seed": seed, "steps": 25, "guidance": 5.0, "keep_steps": 5, "self_attention": True}
    labeller = datasets.AnnotatorLabeller(labels_for(pipe))
    prompts = datasets.urban_prompts(n, seed=seed)
    return datasets.generate(pipe, prompts, folder / f"images-{seed}-{n}", labeller=labeller, **made)


def one_draw(examples: Sequence[Example], draw: int, *, losses: bool) -> dict[tuple[str, int, bool, str], Any]:
    """Fit and read all `RUNS` for one draw, the seed of the order of each class' images; `losses` adds the slow ones.

    Return (name, k, refined, class) -> (numbers of the test images, (n, 101) IoU, position of the best threshold on the
    training images).
    """
    found = {}
    for word in CLASSES:
        train, test = train_test_split(examples, word, MOST, seed=draw)
        numbers = [examples.index(example) for example in test]
        for name, method, k, options in RUNS:
            if options is THESIS_LOSS and not losses:
                continue
            seen, token = train[: k or MOST], None
            if options == "chosen":
                records, masks = [e.record for e in seen], [e.masks[word] for e in seen]
                token = fit(seen, word, method, **daamlib.choose_settings(records, masks, word=word))
            elif k and not isinstance(options, str):
                token = fit(seen, word, method, **options)
            calibrated = options is not THESIS_LOSS  # its tokens have no probabilities, which refinement propagates
            for refined in (False, True) if calibrated else (False,):
                counts = [count(of, word, method, token, iterations=int(refined)) for of in (seen, test)]
                best = int(counts[0].curve().argmax())
                found[name, k, refined, word] = numbers, _iou(counts[1]).astype(np.float32), best
    return found


def _iou(counts: metrics.ThresholdCounts) -> np.ndarray:
    return counts.intersection / counts.union


def summarise(draws: Sequence[Mapping], *, resamples: int = 1000, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Return the tables "results", "curves" and "differences" of draws, in percent and in points.

    The value of a metric is its mean over the draws. An interval holds 95 % of `resamples` values; for each of these
    the draws and the images are drawn with replacement. An image that shows several classes is drawn for all of them.
    "curves" and "differences" are of the mean of all classes.
    """
    generator = np.random.default_rng(seed)
    n = 1 + max(max(numbers) for found in draws for numbers, _, _ in found.values())
    weights = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32)
    uniform = generator.random((resamples, len(draws)))
    keys = list(dict.fromkeys(key[:3] for found in draws for key in found))
    results, curves, drawn = [], [], {}
    for key in keys:
        having = [found for found in draws if (*key, CLASSES[0]) in found]
        for group, members in [(word, [word]) for word in CLASSES] + [("all", list(CLASSES))]:
            values, resampled, curve = _metrics([{w: found[(*key, w)] for w in members} for found in having], weights)
            if group == "all":
                curves += [(*key, t, v) for t, v in zip(LEVELS, curve, strict=True)]
            for metric, by_draw in values.items():
                ends = _interval(resampled[metric], uniform)
                results.append((*key, group, metric, by_draw.mean(), *ends, by_draw.min(), by_draw.max(), len(having)))
                drawn[key, group, metric] = by_draw, resampled[metric]
    names = ["method", "train_images", "refined"]
    numbers = ["value", "low", "high", "lowest_draw", "highest_draw", "draws"]
    return {
        "results": pd.DataFrame(results, columns=[*names, "class", "metric", *numbers]),
        "curves": pd.DataFrame(curves, columns=[*names, "threshold", "miou"]),
        "differences": _differences(drawn, uniform),
    }


def _differences(drawn: Mapping, uniform: np.ndarray) -> pd.DataFrame:
    """Return `DIFFERENCES` of the mean of all classes; both of a pair are judged on the same images and draws."""
    rows = []
    for (what, (one, other)), metric in itertools.product(DIFFERENCES.items(), ("max_miou", "auc")):
        if (one, "all", metric) in drawn and (other, "all", metric) in drawn:
            (a, a_drawn), (b, b_drawn) = drawn[one, "all", metric], drawn[other, "all", metric]
            m = min(len(a), len(b))  # runs with the thesis' loss take part in the first draws only
            ends = _interval(a_drawn[:, :m] - b_drawn[:, :m], uniform)
            rows.append((what, metric, (a[:m] - b[:m]).mean(), *ends, m))
    return pd.DataFrame(rows, columns=["what", "metric", "value", "low", "high", "draws"])


def _interval(resampled: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return the ends of the 95 % interval of (resamples, draws) numbers; `uniform` in [0, 1) draws the draws again."""
    m = resampled.shape[1]
    rows = (uniform[:, :m] * m).astype(int)
    return np.quantile(np.take_along_axis(resampled, rows, axis=1).mean(axis=1), [0.025, 0.975])


def _metrics(draws: Sequence[Mapping[str, tuple]], weights: np.ndarray) -> tuple[dict, dict, np.ndarray]:
    """By metric the value of each draw and (resamples, draws) of the resampled ones; and the mean curve.

    `miou_at_train_threshold` takes the threshold of each class from the training images of that class.
    """
    values: dict[str, list] = {"max_miou": [], "auc": [], "miou_at_train_threshold": []}
    resampled: dict[str, list] = {name: [] for name in values}
    mean = []
    for by_class in draws:
        best = [best for _, _, best in by_class.values()]
        plain = [iou.mean(axis=0) for _, iou, _ in by_class.values()]
        again = []
        for numbers, iou, _ in by_class.values():
            times = weights[:, numbers]
            again.append(times @ iou / times.sum(axis=1, keepdims=True))
        for curves, into in ((np.array(plain)[:, None], values), (np.array(again), resampled)):
            curve = curves.mean(axis=0)  # of the classes: (1 or resamples, 101)
            at = np.mean([of[:, b] for of, b in zip(curves, best, strict=True)], axis=0)
            for name, of in (
                ("max_miou", curve.max(axis=1)),
                ("auc", metrics.trapezoid(curve, LEVELS, axis=1)),
                ("miou_at_train_threshold", at),
            ):
                into[name].append(100 * of)
        mean.append(np.mean(plain, axis=0))
    stacked = {name: np.stack(drawn, axis=1) for name, drawn in resampled.items()}
    return {name: np.concatenate(of) for name, of in values.items()}, stacked, 100 * np.mean(mean, axis=0)


def by_image(draws: Sequence[Mapping]) -> tuple[list[str], np.ndarray]:
    """Return the names "method|k|refined|class" and their IoU, (names, draws, images), of each image.

    In half percent, at the threshold that is best for the test images of the class in that draw; 255 where an image was
    not tested.
    """
    n = 1 + max(max(numbers) for found in draws for numbers, _, _ in found.values())
    keys = list(dict.fromkeys(key for found in draws for key in found))
    table = np.full((len(keys), len(draws), n), 255, np.uint8)
    for draw, found in enumerate(draws):
        for key, (numbers, iou, _) in found.items():
            table[keys.index(key), draw, numbers] = np.round(200 * iou[:, iou.mean(axis=0).argmax()])
    return ["|".join(map(str, key)) for key in keys], table


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the images and of the complete draws")
    parser.add_argument("--images", type=int, default=200, help="of each set")
    parser.add_argument("--draws", type=int, default=10, help="of training images")
    parser.add_argument("--losses", type=int, default=3, help="of the draws, with the thesis' loss too")
    parser.add_argument("--sets", nargs="+", default=["rendered", "generated"])
    parser.add_argument("--output", type=Path, default=tables.STORED_RUN)
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    pipe, started = daamlib.load_pipeline(device="cpu"), time.process_time()
    done: dict[str, list] = {}
    floors = {}
    for truth in options.sets:
        path = options.folder / f"{truth}-{options.images}.pickle"
        done[truth] = pickle.loads(path.read_bytes())[: options.draws] if path.exists() else []
        images = dataset_of(truth, options.images, options.folder, pipe)
        floors[truth] = {w: [100 * images.mask(i, w).mean() for i in images.with_class(w)] for w in CLASSES}
        if len(done[truth]) == options.draws:
            continue
        examples = load_examples(images, pipe, timesteps=TIMESTEPS if truth == "rendered" else None, in_memory=True)
        for draw in range(len(done[truth]), options.draws):
            done[truth].append(one_draw(examples, draw, losses=draw < options.losses))
            path.write_bytes(pickle.dumps(done[truth]))
            seconds = time.process_time() - started
            print(f"{truth}: draw {draw + 1} of {options.draws}, {seconds:.0f} s of a core", flush=True)
    write(done, floors, options.output)


def write(done: Mapping[str, list], floors: Mapping[str, Mapping[str, list[float]]], folder: Path) -> None:
    """Write the tables of all sets and the facts of the run; floors: the percent of each image that a class covers."""
    made = {truth: summarise(draws) for truth, draws in done.items()}
    for name in ("results", "curves", "differences"):
        frame = pd.concat([of[name].assign(ground_truth=truth) for truth, of in made.items()], ignore_index=True)
        if name == "curves":  # what the figures show, at every second threshold
            frame = frame[~frame.refined & (np.arange(len(frame)) % len(LEVELS) % 2 == 0)]
        frame.to_csv(folder / f"{name}.csv", index=False, float_format="%.2f")
    images: dict[str, Any] = {}
    for truth, draws in done.items():
        images[f"{truth}_names"], images[truth] = by_image(draws)
    np.savez_compressed(folder / "iou.npz", **images)
    facts = {
        "draws": {truth: len(draws) for truth, draws in done.items()},
        "images": {truth: {word: len(of) for word, of in by_class.items()} for truth, by_class in floors.items()},
        "floor": {t: {word: round(float(np.mean(of)), 2) for word, of in by.items()} for t, by in floors.items()},
        "steps": 25,
        "guidance": 5.0,
        "kept_steps": 5,
        "command": "python -m daamlib_lab.experiments.stored --folder work",
    }
    (folder / "metrics.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
