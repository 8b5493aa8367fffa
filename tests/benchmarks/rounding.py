"""How far optimised tokens depend on the order in which a processor adds: `python tests/benchmarks/rounding.py`.

The same tokens are fitted, and the images traced, in one process for each of several settings that make PyTorch, oneDNN
and MKL compute as on other processors. Printed is the maximum mIoU on other scenes, by setting, and its spread.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import torch

import daamlib
from daamlib.cityscapes import BY_NAME
from daamlib_lab.experiments.tables import TEXT
from daamlib_lab.urban.scenes import HELD_OUT, KINDS, SIZE, render

FIRST_SEED = HELD_OUT + 5_000  # other scenes than those of the notebooks
SCENES = 48
TRAIN = 5
SETTINGS = {
    "as it is": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "without vector units, one thread": {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
}


def measure() -> dict[str, float]:
    """Maximum mIoU in percent by method and class."""
    pipe = daamlib.load_pipeline(device="cpu")
    scenes = [render(FIRST_SEED + i, SIZE) for i in range(SCENES)]
    records = [
        daamlib.trace_image(pipe, scene.image, prompt=scene.caption, timesteps=(100, 300, 500), seed=i)
        for i, scene in enumerate(scenes)
    ]
    found = {}
    for kind in KINDS:
        masks = [scene.labels == BY_NAME[kind].id for scene in scenes]
        shown = [i for i, mask in enumerate(masks) if mask.mean() >= 0.01]
        train, test = shown[:TRAIN], shown[TRAIN:]
        for method, text, count in (("ldaam", None, 1), ("ldaam", None, TRAIN), ("daam", TEXT.format(kind), TRAIN)):
            few = [records[i] for i in train[:count]], [masks[i] for i in train[:count]]
            token = daamlib.optimize_token(*few, method=method, word=kind, text=text)
            maps = torch.stack([token.maps(records[i])[kind] for i in test])
            name = f"{method.upper()} {kind}, training images: {count}"
            found[name] = 100 * daamlib.metrics.max_miou(maps, np.stack([masks[i] for i in test]))
    return found


def main() -> None:
    """Measure in a process of its own for each setting, and print the table."""
    found = {}
    for name, variables in SETTINGS.items():
        done = subprocess.run(
            [sys.executable, __file__, "--one"], env={**os.environ, **variables}, stdout=subprocess.PIPE, check=True
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    table = pd.DataFrame(found)
    table["spread"] = table.max(axis=1) - table.min(axis=1)
    print(table.round(3).to_string())


if __name__ == "__main__":
    if sys.argv[1:] == ["--one"]:
        print(json.dumps(measure()))
    else:
        main()
