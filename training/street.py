"""Fit the tokens of all classes that the bundled model comes with: `python -m training.street`.

They read `daamlib.label_map(record)` of its images, and are fitted to 20 rendered scenes that it was not trained on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import daamlib
from daamlib.resources import bundled
from daamlib_lab.urban.scenes import HELD_OUT, render

FIRST_SEED = HELD_OUT + 9_400_000
TIMESTEPS = (20, 100, 200, 300)


def main() -> None:
    """Read the command line, render, fit and write."""
    parser = argparse.ArgumentParser(prog="python -m training.street", description=__doc__)
    parser.add_argument("--out", type=Path, default=bundled("urban-tiny") / "street.safetensors")
    parser.add_argument("--scenes", type=int, default=20)
    args = parser.parse_args()
    pipe = daamlib.load_pipeline()
    scenes = [render(FIRST_SEED + i) for i in range(args.scenes)]
    records = [
        daamlib.trace_image(pipe, scene.image, prompt=scene.caption, timesteps=TIMESTEPS, seed=i)
        for i, scene in enumerate(scenes)
    ]
    tokens = daamlib.fit_classes(records, [scene.labels for scene in scenes], max_timestep=max(TIMESTEPS))
    tokens = replace(tokens, info={**tokens.info, "model": "urban-tiny"})  # not the folder on this machine
    tokens.save(args.out)
    print(f"{tokens}, weight decay {tokens.info['weight_decay']}, {args.out.stat().st_size:,} bytes in {args.out}")


if __name__ == "__main__":
    main()
