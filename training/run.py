"""Train a model within some minutes, by one command: scenes, autoencoder, latents, denoiser, weights.

    python -m training.run --minutes 9 --device cuda --out FOLDER
    python -m training.run --minutes 9 --device cuda --out FOLDER --vae data/urban-tiny

It renders on all cores, computes in bfloat16 and writes a Stable Diffusion folder of float16 weights in files below
16 MB. The minutes hold all of it but the loading of Python's packages. The same command goes on where it was stopped,
or trains the denoiser for as many minutes more. The stages are those of `training.train`, in the same
`--work` folder.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from . import train
from .trainer import add_options, launch

EXPORT_MINUTES = 0.2  # reserved for the last stage


def run(args: argparse.Namespace) -> None:
    """Do the stages in turn: the autoencoder has `--vae-part` of the minutes that rendering left, then the denoiser."""
    end = time.monotonic() + 60 * args.minutes

    def within(part: float, keep: float, decay_from: float) -> argparse.Namespace:
        minutes = max(0.0, part * ((end - time.monotonic()) / 60 - keep))
        return argparse.Namespace(**vars(args) | {"minutes": minutes, "decay_from": decay_from})

    train.begin(args)
    train.make_data(args)
    if not (args.work / "moments.json").exists():  # once it is there, latents are made of the autoencoder as it is
        if args.vae:
            train.restore_vae(args.vae, args.work)
        else:
            launch(train.train_vae, within(args.vae_part, EXPORT_MINUTES, 0.3))
    train.cache_latents(args)
    launch(train.train_unet, within(1, EXPORT_MINUTES, args.decay_from))
    train.export(args)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m training.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--vae", type=Path, help="the folder of a model to take the autoencoder of; else one is trained"
    )
    parser.add_argument("--vae-part", type=float, default=0.25, help="part of the minutes that trains the autoencoder")
    parser.add_argument("--size", type=int, choices=[64, 128], default=128, help="image size of the latents, px")
    train.add_recipe(parser)
    add_options(parser, minutes=9.0, batch=512, lr=1e-3, decay_from=0.5)
    args = parser.parse_args(argv)
    if args.out is None:
        parser.error("the following arguments are required: --out")
    run(args)


if __name__ == "__main__":
    main()
