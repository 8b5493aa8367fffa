"""Time daamlib against the plain way of doing the same; prints one table, writes one CSV file.

    python tests/benchmarks/run.py                                  # the bundled model and SD 1.5's shape
    python tests/benchmarks/run.py --rows daam ldaam --shapes sd15 --repeats 5
    python tests/benchmarks/run.py --shapes pixart_sigma sd3_medium --repeats 2 --name transformers
    python tests/benchmarks/run.py --device cuda --dtype float16 --shapes sd15 sdxl --size 1024 --steps 30 --batch 8

What is compared stands in rows.py, the plain ways in naive.py. Every round runs ours and theirs in turn; the ratio is
the median over the rounds. Run it on an idle machine.
"""

import argparse
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import models
import pandas as pd
import rows
import torch

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("daamlib", "torch", "diffusers", "transformers", "numpy")


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    started, table = time.perf_counter(), []
    path = options.folder / f"{options.name}.csv"
    path.parent.mkdir(exist_ok=True)
    for shape in options.shapes:
        model = models.load(
            shape,
            size=options.size,
            steps=options.steps,
            batch=options.batch,
            device=options.device,
            dtype=getattr(torch, options.dtype),
            few_channels=options.few_channels,
        )
        for name in [name for name in options.rows if rows.fits(name, model.shape)]:
            _forget_peak(options.device)
            for row in rows.ROWS[name](model, options.repeats, options.device):
                table.append(_entry(row, model, options))
                print(_line(table[-1]), flush=True)
            frame = pd.DataFrame(table)  # written after every row: a stop leaves what was done
            frame.to_csv(path, index=False, float_format="%.6g")
            gc.collect()
        del model
    print(f"\n{machine(options.device)}, {options.threads} threads, {options.dtype}; {_minutes(started)}; {path}")
    return frame


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=rows.ROWS, default=list(rows.ROWS))
    parser.add_argument("--shapes", nargs="+", choices=models.SHAPES, default=["bundled", "sd15"])
    parser.add_argument("--size", type=int, help="of the images in pixels, default: the model's own")
    parser.add_argument("--steps", type=int, help="of a timed generation")
    parser.add_argument("--batch", type=int, default=1, help="images of a timed generation")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--few-channels", action="store_true", help="shapes of few channels, to rehearse on a CPU")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the CSV file")
    parser.add_argument("--name", help="of the CSV file, default: the device")
    options = parser.parse_args(arguments)
    options.name = options.name or options.device
    return options


def _entry(row: rows.Row, model: models.Model, options: argparse.Namespace) -> dict:
    return {
        "what": row.what,
        "shape": model.shape,
        "against": row.against,
        "ours": statistics.median(row.ours),
        "theirs": statistics.median(row.theirs),
        "unit": row.unit,
        "ratio": row.ratio,
        "to_reach": "" if row.to_reach is None else f"{'<=' if row.cost else '>='} {row.to_reach:g}",
        "reached": {None: "", True: "yes", False: "no"}[row.reached],
        "ours_spread": max(row.ours) - min(row.ours),
        "theirs_spread": max(row.theirs) - min(row.theirs),
        "rounds": len(row.ours),
        "peak_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else "",
        "note": row.note,
        "machine": machine(options.device),
        "device": options.device,
        "dtype": options.dtype,
        "threads": 1 if "one thread" in row.note else options.threads,
        "date": datetime.date.today().isoformat(),
        "versions": " ".join(f"{name}={importlib.metadata.version(name)}" for name in VERSIONS),
    }


def _forget_peak(device: str) -> None:
    """`peak_bytes` is that of one function of rows.py, the model included."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _line(entry: dict) -> str:
    values = [_number(entry[name], entry["unit"]) for name in ("ours", "theirs")]
    return (
        f"{entry['what']:<38} {entry['shape']:<12} {entry['against']:<36} {values[0]:>10} {values[1]:>10} "
        f"{entry['ratio']:>9.3g} {entry['to_reach']:>8} {entry['reached']:>4}  {entry['note']}"
    )


def _number(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _minutes(started: float) -> str:
    return f"{(time.perf_counter() - started) / 60:.1f} minutes"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
