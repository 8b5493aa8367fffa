"""daamlib beside the published `daam` 0.2.0, on the same tiny Stable Diffusion checkpoint (tests/golden/tiny-sd15).

`daam` needs its old diffusers and transformers, so it runs in an environment of its own, by the same measure:

    python tests/benchmarks/peers.py .venv-peers/bin/python     # prints the table, writes results/peers.csv

Both see one prompt, 4 steps, 512 x 512 pixels, in float32 on the CPU: seconds of a generation of latents with and
without tracing, of one word's heat map afterwards, and the bytes kept.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).parent
MODEL = HERE.parent / "golden" / "tiny-sd15"
PROMPT, WORD, ROUNDS = "a car in an urban environment", "car", 5


def with_daam() -> dict[str, list[float]]:
    import daam
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)

    def traced(generate):
        with daam.trace(pipe) as trace:
            generate()
            # what is asked of it once the image is there; the maps go with the `with`
            seconds = _seconds(lambda: trace.compute_global_heat_map().compute_word_heat_map(WORD))
            kept = sum(heat_map.nbytes for _, heat_map in trace.all_heat_maps)
        return seconds, kept

    return _measure(pipe, traced)


def with_daamlib() -> dict[str, list[float]]:
    import daamlib

    pipe = daamlib.load_pipeline(MODEL, device="cpu")

    def traced(generate):
        with daamlib.trace(pipe) as trace:
            generate()
        return _seconds(lambda: trace[0].daam()[WORD]), trace[0].nbytes

    return _measure(pipe, traced)


def _measure(pipe, traced) -> dict[str, list[float]]:
    import torch

    pipe.set_progress_bar_config(disable=True)
    found = {"plain": [], "traced": [], "map": [], "bytes": []}

    def generate():
        pipe(PROMPT, num_inference_steps=4, output_type="latent", generator=torch.Generator().manual_seed(0))

    for turn in range(ROUNDS + 1):  # the first is not counted
        plain = _seconds(generate)
        started = time.perf_counter()
        heat_map, kept = traced(generate)
        whole = time.perf_counter() - started
        if turn:
            for name, value in zip(found, (plain, whole - heat_map, heat_map, kept), strict=True):
                found[name].append(value)
    return found


def _seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main(python: str) -> None:
    script = [python, "-W", "ignore", str(Path(__file__).resolve()), "--with-daam"]
    lines = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    results = {"daamlib": with_daamlib(), "daam 0.2.0": json.loads(lines[-1])}
    rows = []
    for name, found in results.items():
        ratio = statistics.median(a / b for a, b in zip(found["traced"], found["plain"], strict=True))
        middle = {key: statistics.median(values) for key, values in found.items()}
        rows.append({"package": name, **{f"{key}_s": middle[key] for key in ("plain", "traced", "map")}})
        rows[-1] |= {"traced_over_plain": ratio, "bytes_kept": int(middle["bytes"])}
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    path = HERE / "results" / "peers.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "--with-daam":
        print(json.dumps(with_daam()))
    else:
        main(sys.argv[1])
