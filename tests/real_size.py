"""Run the notebooks on a pipeline of Stable Diffusion 1.5's shape with random weights: `make test-real-size`.

    python tests/real_size.py                         all notebooks, 512 px; hours on two cores
    python tests/real_size.py --pixels 256 00 03 04   a quarter of the positions, some notebooks

A notebook passes, or stops at its first cells with the reason. Each runs with the fewest steps and images it takes, by
the runner that `make reproduce` calls. Prints the seconds and the peak memory of each, and writes them as a table to
docs/gpu.md when all notebooks were chosen at 512 px.
"""

import argparse
import datetime
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pages import between
from shapes import SD15
from tiny import SCHEDULER, clip_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "real_size"  # ignored by git: 4 GB of random weights, and what the runs write
PAGE, START, END = ROOT / "docs/gpu.md", "<!-- make test-real-size -->\n", "<!-- real size ends -->\n"
FEWEST = {
    "00": {"N_IMAGES": 1},
    "01": {"N_IMAGES": 1, "SCALES": [1.0, 7.5], "TIMES": [0, 500]},
    "02": {"N_IMAGES": 2, "TIMESTEPS": [300]},
    "03": {"N_IMAGES": 1, "N_SCENES": 2},
    "04": {"N_IMAGES": 1, "N_SCENES": 3},
    "05": {"N_IMAGES": 1},
    "06": {},
    "08": {"N_IMAGES": 1, "N_SCENES": 24},
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TEXT = {
    "vocab_size": 592,  # of the tests' tokenizer; everything else is as published
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "bos_token_id": 590,
    "eos_token_id": 591,
    "pad_token_id": 591,
}


def build(folder: Path, pixels: int) -> Path:
    """Write the pipeline, unless it is there: 860 M parameters (U-Net), 84 M (VAE), 85 M (text encoder)."""
    path = folder / f"sd15-{pixels}"
    if not (path / "model_index.json").exists():
        torch.manual_seed(0)
        StableDiffusionPipeline(
            unet=UNet2DConditionModel(**SD15 | {"sample_size": pixels // 8}),
            vae=AutoencoderKL(**VAE, sample_size=pixels),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
            tokenizer=clip_tokenizer(77),
            scheduler=DDIMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(path)
    return path


def run(number: str, model: Path) -> dict:
    """Run a notebook; return its seconds, peak GiB and how it ended."""
    command = [sys.executable, "-m", "daamlib_lab.runs", "--model", str(model), "--device", "cpu", "--steps", "2"]
    command += ["--runs-dir", str(FOLDER / "runs"), "--jobs", "1"]
    for name, value in FEWEST[number].items():
        command += ["-p", name, json.dumps(value)]
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run([*command, number], cwd=ROOT, capture_output=True, text=True)
    peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 2**20
    last = (done.stdout + done.stderr).strip().splitlines()
    (FOLDER / f"{number}.log").write_text(done.stdout + done.stderr)
    return {
        "notebook": number,
        "outcome": "passed" if done.returncode == 0 else "stopped",
        "seconds": round(time.perf_counter() - started),
        "peak, GiB, of it and those before": round(peak, 1),
        "last line": "" if done.returncode == 0 else last[-1][:160],
    }


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if every chosen notebook passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", help="numbers, by default all")
    parser.add_argument("--pixels", type=int, default=512)
    options = parser.parse_args(arguments)
    model = build(FOLDER, options.pixels)
    rows = []
    for number in options.notebooks or FEWEST:
        rows.append(run(number, model))
        print(rows[-1], flush=True)
    if not options.notebooks and options.pixels == 512:
        lines = [f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
        lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
        table = "\n".join(lines) + f"\n\nWritten on {datetime.date.today()}.\n"
        PAGE.write_text(between(PAGE.read_text(), START, END, "\n" + table))
    return int(any(row["outcome"] != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
