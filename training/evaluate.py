"""Measure the bundled model: reconstructions, samples, whether it draws what it is asked for, its words, time.

    python -m training.evaluate --model data/urban-tiny                # everything
    python -m training.evaluate --model data/urban-tiny --only words  # or psnr, sheet, hits, time, street

Writes `metrics.json` (parts that were not measured again keep their numbers) and `samples.png` to `--out`. The
float16 weights that ship are run in float32, as a CPU has to.
"""

import argparse
import json
import os
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torchmetrics.functional.image import peak_signal_noise_ratio

from daamlib.cityscapes import BY_NAME, MIN_AREA
from daamlib.pipeline import generators
from daamlib_lab.urban.annotator import annotate, load_annotator
from daamlib_lab.urban.scenes import HELD_OUT, KINDS, SIZE, WORLDS, render, to_tensor

from .words import measure_street, measure_words

PARTS = ("psnr", "sheet", "hits", "words", "street", "time")
STEPS = 25
GUIDANCE = 5.0
BATCH = 8  # images generated together; each has a separate generator
SHEET_SEED, HITS_SEED, TIME_SEED = 0, 1_000, 2_000  # image i of a part has the seed of the part + i
WORDS_SEED = HELD_OUT + 5_000_000  # of the scenes that words are measured on; nothing was chosen on them
WORDS_SCENES = 120

PROMPTS = (
    "a car in an urban environment",
    "a person in an urban environment",
    "a traffic light in an urban environment",
    "a rider in an urban environment",
    "a red car on the left in a city street by day",
    "a blue car on the right on a street with a road",
    "a photo of a white car in the middle in the fog",
    "a yellow car in front of buildings at sunset",
    "a person in red on the left on a street by day",
    "a person in yellow on the right in front of a building",
    "a photo of a person in blue in the middle at night",
    "a green traffic light on the left in a city street",
    "a red traffic light on the right in an urban environment at night",
    "a yellow traffic light in the middle in a city in the fog",
    "a rider in green on the left in front of trees by day",
    "a rider in orange on the right on a street at sunset",
    "a car and a person in an urban environment",
    "a black car and a traffic light in a city at night",
    "a car and a rider in purple in a city street at sunset",
    "a person and a traffic light in an urban environment by day",
    "a person in white and a rider on a street in the fog",
    "a traffic light and a rider in an urban environment with trees and the sky",
    "a red car on the left and a person on the right in an urban environment at night",
    "a city street with a sidewalk and a tree by day",
)

TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a {} in an urban environment",
    "an urban environment with a {} and trees",
    "a {} in front of buildings",
    "a {} on the left in an urban environment",
    "a {} in a city street by day",
    "a {} on a street at sunset",
    "a {} in a city at night",
    "a photo of a {} in the fog",
)


@torch.inference_mode()
def measure_psnr(vae: AutoencoderKL, n: int) -> dict:
    """PSNR in dB of the decoded posterior means of `n` held-out scenes at 128 px."""
    values: list[float] = []
    for first in range(0, n, BATCH):
        seeds = range(HELD_OUT + first, HELD_OUT + min(first + BATCH, n))
        pixels = to_tensor(np.stack([render(seed, SIZE).image for seed in seeds]))
        pair = (vae.decode(vae.encode(pixels).latent_dist.mean).sample, pixels)
        values += peak_signal_noise_ratio(*pair, data_range=(-1.0, 1.0), dim=(1, 2, 3), reduction="none").tolist()
    return {"db": round(statistics.fmean(values), 2), "worst_db": round(min(values), 2), "images": n}


def generate(pipe, prompts: Sequence[str], first_seed: int) -> list[Image.Image]:
    """One image for each prompt, image i from the seed `first_seed + i` whatever it is generated with."""
    images = []
    for start in range(0, len(prompts), BATCH):
        chunk = list(prompts[start : start + BATCH])
        seeds = range(first_seed + start, first_seed + start + len(chunk))
        images += pipe(chunk, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators(seeds)).images
    return images


def draw_sheet(images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 6) -> Image.Image:
    """The images, of one size, in a grid with their captions beneath; ValueError if the counts differ."""
    if len(images) != len(captions) or not images:
        raise ValueError(f"expected as many captions as images, got {len(captions)} and {len(images)}")
    font, gap, line, (width, height) = ImageFont.load_default(12), 12, 14, images[0].size
    width = max(width, 128)  # of a cell: smaller images still need room for their words
    texts = [textwrap.fill(caption, width // 6) for caption in captions]
    below = line * max(text.count("\n") + 1 for text in texts) + 6
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + below + gap)), "white")
    ink = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + below + gap)
        sheet.paste(image, (x, y))
        ink.multiline_text((x, y + height + 4), text, fill="black", font=font, spacing=line - 12)
    return sheet


def hit_prompts(n: int) -> list[tuple[str, str]]:
    """Return `n` pairs (class, prompt), n / 4 for each class, going round the templates. ValueError unless n is 4 k."""
    if n < len(KINDS) or n % len(KINDS):
        raise ValueError(f"the number of images must be a multiple of {len(KINDS)} (the classes), got {n}")
    each = n // len(KINDS)
    return [(kind, TEMPLATES[i % len(TEMPLATES)].format(kind)) for kind in KINDS for i in range(each)]


def count_hits(maps: np.ndarray, prompted: Sequence[str], *, min_area: float = MIN_AREA) -> dict:
    """Count how often the annotator sees the prompted class, and how often a class that the prompt does not name.

    Args:
        maps: (N, H, W) Cityscapes ids of what the annotator sees.
        prompted: the N classes asked for.
        min_area: the part of the image that a class must cover to count.

    Returns:
        Parts in 0..1: `overall`, `per_class`, and `unprompted`, by class over the images of the other classes' prompts
        (left out where there are none).

    Raises:
        ValueError: if the counts differ or a class is none of the four.
    """
    unknown = sorted(set(prompted) - set(KINDS))
    if unknown:
        raise ValueError(f"the classes must be among {KINDS}, got {unknown}")
    if np.ndim(maps) != 3 or len(maps) != len(prompted) or not len(maps):
        raise ValueError(f"expected (N, H, W) maps, one per class asked for ({len(prompted)}), got {np.shape(maps)}")
    found = {kind: (maps == BY_NAME[kind].id).mean((1, 2)) >= min_area for kind in KINDS}
    asked = {kind: np.array([name == kind for name in prompted]) for kind in KINDS}
    hits = sum(int((found[kind] & asked[kind]).sum()) for kind in KINDS)
    return {
        "overall": round(hits / len(maps), 4),
        "per_class": {k: round(float(found[k][asked[k]].mean()), 4) for k in KINDS if asked[k].any()},
        "unprompted": {k: round(float(found[k][~asked[k]].mean()), 4) for k in KINDS if not asked[k].all()},
        "images": len(maps),
        "min_area": min_area,
    }


def measure_hits(pipe, annotator, n: int) -> dict:
    """Generate `n` images, n / 4 for each class, and count those in which the annotator finds it."""
    kinds, prompts = zip(*hit_prompts(n), strict=True)
    return count_hits(annotate(annotator, generate(pipe, prompts, HITS_SEED)), kinds)


def measure_time(pipe, *, runs: int = 5) -> dict:
    """Seconds for one image: the median of `runs`, after one that warms up."""
    seconds = []
    for i in range(runs + 1):
        start = time.perf_counter()
        generate(pipe, PROMPTS[:1], TIME_SEED + i)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds_per_image": round(statistics.median(seconds[1:]), 2),
        "slowest": round(max(seconds[1:]), 2),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "runs": runs,
    }


def folder_sizes(folder: Path) -> dict:
    """Megabytes (10^6 bytes) of each sub-folder and in all."""
    sizes: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file():
            first, *rest = path.relative_to(folder).parts
            sizes.update({"total": path.stat().st_size} | ({first: path.stat().st_size} if rest else {}))
    return {name: round(size / 1e6, 3) for name, size in sorted(sizes.items())}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, and write `metrics.json` and `samples.png`."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=Path("data/urban-tiny"), help="the pipeline's folder")
    parser.add_argument("--annotator", type=Path, help="the annotator's folder; else `annotator` in --model")
    parser.add_argument("--out", type=Path, help="where to write; else --model")
    parser.add_argument("--images", type=int, default=200, help="images for the PSNR and for the hit rate")
    parser.add_argument("--scenes", type=int, default=WORDS_SCENES, help="scenes that the words are measured on")
    parser.add_argument("--first-seed", type=int, default=WORDS_SEED, help="theirs; choose a model on other scenes")
    parser.add_argument("--world", choices=WORLDS, default="street", help="of the scenes of the part `street`")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to measure")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args(argv)
    out = args.out or args.model
    torch.set_num_threads(args.threads)
    if "hits" in args.only:  # what would fail late is checked before the first image
        hit_prompts(args.images)
        annotator = load_annotator(args.annotator or args.model / "annotator")
    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def keep(part: str, values: dict) -> None:
        metrics[part] = values
        print(f"{part}: {json.dumps(values)}", flush=True)
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

    if "psnr" in args.only:
        keep("psnr", measure_psnr(pipe.vae, args.images))
    if "sheet" in args.only:
        draw_sheet(generate(pipe, PROMPTS, SHEET_SEED), PROMPTS).save(out / "samples.png", optimize=True)
        keep("sheet", {"images": len(PROMPTS), "first_seed": SHEET_SEED, "steps": STEPS, "guidance": GUIDANCE})
    if "hits" in args.only:
        settings = {"first_seed": HITS_SEED, "steps": STEPS, "guidance": GUIDANCE}
        keep("hits", measure_hits(pipe, annotator, args.images) | settings)
    if "words" in args.only:
        keep("words", measure_words(pipe, args.scenes, args.first_seed))
    if "street" in args.only:
        keep("street", measure_street(pipe, args.scenes, args.first_seed, world=args.world))
    if "time" in args.only:
        keep("time", measure_time(pipe) | {"steps": STEPS})
    keep("size_mb", folder_sizes(args.model))


if __name__ == "__main__":
    main()
