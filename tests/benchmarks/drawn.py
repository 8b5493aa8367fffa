"""The annotator network and the label maps against twenty generated images that were annotated by hand.

    python tests/benchmarks/drawn.py images new    # generates the images again, into the folder `new`
    python tests/benchmarks/drawn.py masks         # draws the masks of data/urban-drawn again, from strokes.json
    python tests/benchmarks/drawn.py measure --maps maps.npz

`measure` generates the images with their records, makes all label maps, and prints mean IoU in percent over nine
classes, all images' pixels together, with 95 % intervals over resampled images. Pixels that were drawn as undecided or
as a pole count for nobody; a pixel that a label map leaves 255 is left out of that row. `--maps` keeps the label maps
in a file, which the next call reads.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import daamlib
from daamlib.cityscapes import IGNORED, label_id
from daamlib.datasets import AnnotatorLabeller, folder, generate, import_masks, load, urban_prompts
from daamlib.metrics import draw_images
from daamlib.widgets.session import AnnotationSession
from daamlib_lab.urban.annotator import labels_for
from daamlib_lab.urban.captions import STREET_WORDS

FOLDER = Path(__file__).resolve().parents[2] / "data" / "urban-drawn"
STROKES = FOLDER / "strokes.json"
SEED, IMAGES = 61_281, 20  # of no other experiment
CLASSES = tuple(STREET_WORDS)
DRAWN = (*CLASSES, "pole")  # a post is none of the nine, and is not ignored by the one who draws
IDS = [label_id(name) for name in CLASSES]
MARGINS = (0.0, 0.1)  # all pixels, and the default of `label_map`
AGAIN = Path("again")  # the masks of the images that were annotated a second time


def make_images(pipe, target, labeller=None):
    """The dataset of the twenty images."""
    prompts = urban_prompts(IMAGES, seed=SEED)
    return generate(pipe, prompts, target, labeller=labeller, seed=SEED, steps=25, guidance=5.0)


def drawn_mask(image, actions):
    """The (H, W) ids that the annotator's session has after these actions; what is unlabelled is to be ignored."""
    with tempfile.TemporaryDirectory() as where:
        session = AnnotationSession([image], DRAWN, where)
        for action in actions:
            session.apply({**action, "value": label_id(action["class"])})
        return np.where(session.labels == 0, np.uint8(IGNORED), session.labels)


def mirrored(actions, width):
    """The actions of an image that was annotated as in a mirror."""
    return [{**action, "points": [[width - x, y] for x, y in action["points"]]} for action in actions]


def drawn_masks(dataset):
    """The masks by number, of the first and of the second time."""
    strokes = json.loads(STROKES.read_text())
    images = {i: np.asarray(dataset.image(i)) for i in dataset.indices}
    first = {int(i): drawn_mask(images[int(i)], actions) for i, actions in strokes["first"].items()}
    again = {int(i): mirrored(actions, images[int(i)].shape[1]) for i, actions in strokes["again"].items()}
    return first, {i: drawn_mask(images[i], actions) for i, actions in again.items()}


def write_masks():
    """Write the masks of data/urban-drawn, which `datasets.load` reads."""
    dataset = load(FOLDER)
    first, again = drawn_masks(dataset)
    with tempfile.TemporaryDirectory() as where:
        for i, mask in first.items():
            folder.write_png(Path(where) / "drawn" / Path(folder.file_name("images", i)).name, mask)
        import_masks(dataset, Path(where) / "drawn")
    for i, mask in again.items():
        folder.write_png(FOLDER / AGAIN / Path(folder.file_name("images", i)).name, mask)


def readings(record, image):
    """The label maps of one image by name; "" for what reads no more than the record, "edges" along the image."""
    maps = {}
    for name, classes in (("tokens", None), ("words", STREET_WORDS)):
        for edges, picture in (("", None), (" edges", image)):
            for margin in MARGINS:
                made = daamlib.label_map(record, classes, image=picture, size=image.shape[:2], margin=margin)
                maps[f"{name}{edges} {margin:g}"] = made
    return maps


def make_maps(dataset):
    """All label maps, (n, H, W) by name, made while the images are generated once more."""
    pipe, made = daamlib.load_pipeline(device="cpu"), []
    annotator = AnnotatorLabeller(labels_for(pipe))

    def labeller(image, record, prompt):
        made.append({"annotator": annotator(image, None, prompt), **readings(record, image)})
        return made[-1]["annotator"]

    with tempfile.TemporaryDirectory() as where:
        new = make_images(pipe, Path(where) / "set", labeller)
        pairs = [(np.asarray(new.image(i), int), np.asarray(dataset.image(i), int)) for i in range(len(new))]
    print(f"from the annotated images these differ by {max(np.abs(a - b).max() for a, b in pairs)} levels at most")
    return {name: np.stack([maps[name] for maps in made]) for name in made[0]}


def counts(maps, truth, valid=True):
    """(n, 9, 2): pixels of intersection and union in each image, of those that both maps label; and their share."""
    judged = np.isin(truth, IDS) & valid
    both = judged & (maps != IGNORED)
    pairs = [((maps == i) & both, (truth == i) & both) for i in IDS]
    found = [np.stack([(a & b).sum(axis=(1, 2)), (a | b).sum(axis=(1, 2))], axis=-1) for a, b in pairs]
    return np.stack(found, axis=1), both.sum() / judged.sum()


def ious(of_images, weights):
    """(..., 9) IoU in percent of counts (n, 9, 2) with weights (..., n); NaN for a class that no image shows."""
    total = np.tensordot(weights, of_images, 1)
    with np.errstate(invalid="ignore"):
        return 100 * total[..., 0] / total[..., 1]


def interval(values):
    """The 95 % interval of resampled values."""
    return "{:.1f} to {:.1f}".format(*np.nanpercentile(values, (2.5, 97.5)))


def at_edges(truth):
    """(n, H, W): the pixels with one of another class above, below, left or right of them."""
    around = np.pad(truth, ((0, 0), (1, 1), (1, 1)), mode="edge")
    sides = (around[:, :-2, 1:-1], around[:, 2:, 1:-1], around[:, 1:-1, :-2], around[:, 1:-1, 2:])
    return np.any([side != truth for side in sides], axis=0)


def row(title, of_images, share=1.0):
    """Print a row: the mean of the classes, its interval if all images are in it, the labelled share, each class."""
    n = len(of_images)
    of_class, resampled = ious(of_images, np.ones(n)), np.nanmean(ious(of_images, draw_images(n)), axis=-1)
    mean = f"{np.nanmean(of_class):.1f}" + (f" ({interval(resampled)})" if n == IMAGES else "")
    cells = [title, mean, f"{100 * share:.1f}"]
    print("| " + " | ".join([*cells, *(f"{x:.1f}" for x in of_class)]) + " |", flush=True)
    return resampled


def measure(dataset, maps):
    """Print the tables."""
    truth = np.stack([dataset.labels(i) for i in range(len(dataset))])
    print("| | mean IoU | labelled | " + " | ".join(CLASSES) + " |\n" + "|---" * (3 + len(CLASSES)) + "|")
    paths = sorted((FOLDER / AGAIN).glob("*.png"))
    redone, again = [int(path.stem) for path in paths], np.stack([folder.read_png(path) for path in paths])
    row(f"the second drawing of {len(redone)}, against the first", *counts(again, truth[redone]))
    row("annotator, of the same images", *counts(maps["annotator"][redone], truth[redone]))
    drawn = {name: row(f"{name}, against the drawn", *counts(made, truth)) for name, made in maps.items()}
    readable, edges = np.isin(truth, IDS), at_edges(truth)
    clear = maps["tokens edges 0.1"] != IGNORED
    row("annotator, against the drawn, where tokens edges 0.1 label", *counts(maps["annotator"], truth, clear))
    for name in ("annotator", "tokens 0", "tokens edges 0"):
        row(f"{name}, against the drawn, off the edges", *counts(maps[name], truth, ~edges))
    for name, made in maps.items():
        if name != "annotator":
            row(f"{name}, against the annotator", *counts(made, maps["annotator"]))
            same = row(f"{name}, against the annotator, same pixels", *counts(made, maps["annotator"], readable))
            print(f"  on the same pixels the annotator says more by {interval(same - drawn[name])}")
    right = [(made == truth)[readable & (made != IGNORED)].mean() for made in maps.values()]
    print("right of the labelled pixels:", "  ".join(f"{n} {100 * r:.1f} %" for n, r in zip(maps, right, strict=True)))
    strange = [(readable & ~np.isin(made, [*IDS, IGNORED])).sum() / readable.sum() for made in maps.values()]
    print("of a class beyond the nine:", "  ".join(f"{n} {100 * s:.2f} %" for n, s in zip(maps, strange, strict=True)))
    undecided, edge = (truth == IGNORED).mean(), edges.mean()
    print(f"of all pixels not judged {1 - readable.mean():.1%}, undecided {undecided:.1%}, at edges {edge:.1%}")


def main():
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("images").add_argument("folder", type=Path)
    commands.add_parser("masks")
    commands.add_parser("measure").add_argument("--maps", type=Path)
    args = parser.parse_args()
    if args.command == "images":
        make_images(daamlib.load_pipeline(device="cpu"), args.folder)
    elif args.command == "masks":
        write_masks()
    else:
        dataset = load(FOLDER)
        maps = dict(np.load(args.maps)) if args.maps and args.maps.is_file() else make_maps(dataset)
        if args.maps and not args.maps.is_file():
            np.savez_compressed(args.maps, **maps)
        measure(dataset, maps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
