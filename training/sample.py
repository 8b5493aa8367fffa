"""Make the small dataset of generated images that the repository holds: `python -m training.sample`.

24 images of the bundled model, labelled by the annotator, and a sheet of the images under their labels.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from daamlib import datasets
from daamlib.cityscapes import overlay
from daamlib.pipeline import load_pipeline
from daamlib.resources import bundled
from daamlib_lab.urban.annotator import labels_for
from daamlib_lab.urban.scenes import KINDS, contact_sheet

FOLDER = bundled("urban-sample")


def sheet(dataset: datasets.Dataset, *, columns: int = 8) -> Image.Image:
    """Every image, and below it the same under its labels."""
    images = {i: dataset.image(i) for i in dataset.manifest.index}
    return contact_sheet(
        [np.vstack([np.asarray(x), overlay(x, dataset.labels(i))]) for i, x in images.items()], columns
    )


def main() -> None:
    """Read the command line, generate, label, write the sheet, print the results."""
    parser = argparse.ArgumentParser(prog="python -m training.sample", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="a new folder, or one to go on in")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    prompts = datasets.urban_prompts(args.images, seed=args.seed)
    pipe = load_pipeline()
    labeller = datasets.AnnotatorLabeller(labels_for(pipe, any_model=True))
    dataset = datasets.generate(pipe, prompts, args.out, seed=args.seed, labeller=labeller)
    sheet(dataset).save(args.out / "overlays.png", optimize=True)
    for name in KINDS:
        named = sum(name in prompt for prompt in prompts)
        print(f"{name:13} named in {named} prompts, found in {len(dataset.with_class(name))} of their images")


if __name__ == "__main__":
    main()
