"""Check and time daamlib on a GPU in nine minutes: `make gpu-check`.

    python tests/gpu_check.py                 on the GPU; writes gpu_check/ and the table of docs/gpu.md
    python tests/gpu_check.py --rehearse      the same parts on a CPU, with shapes of few channels; writes no page

Each part is a process with a time limit of its own and writes as it goes: what a stop or a failure leaves undone is
said, the rest stays. `gpu_check/summary.json` holds every part's outcome, `gpu_check/*.csv` the timed rows.
"""

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pages import between

ROOT = Path(__file__).resolve().parents[1]
PAGE, START, END = ROOT / "docs/gpu.md", "<!-- make gpu-check -->\n", "<!-- end -->\n"
LIMIT = 540  # seconds of all parts together
CORE = [f"tests/attention/test_{name}.py" for name in ("daam", "golden", "joint", "ldaam", "record", "trace")]
CORE += ["tests/attention/test_cross_transformers.py", "tests/tokens/test_optimize.py", "tests/test_pipeline.py"]
ROWS = ("generation", "memory", "ldaam", "daam", "refinement", "optimisation", "street", "joint")
SHAPES = {
    "sd15": "float16",
    "sdxl": "float16",
    "pixart_sigma": "bfloat16",
    "sd3_medium": "bfloat16",
    "flux": "bfloat16",
}

ENVIRONMENT = """
import json, platform, torch, diffusers, transformers
found = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
         "transformers": transformers.__version__, "device": "none"}
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "GiB": round(total / 2**30, 1)}
print(json.dumps(found))
"""
COMPILED = """
import sys, torch, daamlib
device, backend = sys.argv[1:]
pipe = daamlib.load_pipeline(device=device)
pipe.set_progress_bar_config(disable=True)
def made(**options):
    return pipe("a red car", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
plain = made()
pipe.unet = torch.compile(pipe.unet, backend=backend)
made()
with daamlib.trace(pipe) as trace:
    traced = made()
gap = float(abs(traced - plain).max())
assert gap < 0.02, f"traced images differ from plain ones by {gap}"
print(f"largest difference of a pixel, compiled and traced against plain: {gap:.1e}; {trace[0].daam()}")
"""


@dataclass(frozen=True)
class Part:
    """One check: its command, and the seconds that it may take."""

    name: str
    command: list[str]
    limit: int


@dataclass(frozen=True)
class Outcome:
    """What became of a part; `said` is the end of what it printed."""

    name: str
    outcome: str  # passed, failed, out of time, or not begun
    seconds: float
    said: str


def parts(folder: Path, *, rehearse: bool) -> list[Part]:
    """All parts, what matters most first."""
    python, device = sys.executable, "cpu" if rehearse else "cuda"
    tests = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *CORE]
    tests += ["--device", device]
    tests += ["-n", "4"] if importlib.util.find_spec("xdist") and not rehearse else []
    images = [
        python,
        "-m",
        "daamlib.generate",
        str(folder / "set"),
        "--device",
        device,
        "--n",
        "2" if rehearse else "64",
    ]
    made = [
        Part("environment", [python, "-c", ENVIRONMENT], 40),
        Part("tests of the core", tests, 150),
        Part("compiled denoiser", [python, "-c", COMPILED, device, "eager" if rehearse else "inductor"], 60),
        Part("images with full labels", images, 60),
    ]
    for shape, dtype in SHAPES.items():
        run = [python, "tests/benchmarks/run.py", "--shapes", shape, "--rows", *ROWS, "--device", device]
        run += ["--folder", str(folder), "--name", shape, "--repeats", "1"]
        small = ["--few-channels", "--size", "256", "--steps", "1", "--threads", "1"]
        made.append(Part(shape, [*run, *(small if rehearse else ["--dtype", dtype, "--steps", "10"])], 80))
    return made


def run(part: Part, limit: float) -> Outcome:
    """Run a part for at most `limit` seconds."""
    if limit < 5:
        return Outcome(part.name, "not begun", 0.0, "no time was left")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with subprocess.Popen(
        part.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
            outcome = "passed" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its workers, too
            output, _ = process.communicate()
            outcome = "out of time"
    return Outcome(part.name, outcome, time.perf_counter() - started, output.strip()[-3000:])


def table(folder: Path, outcomes: list[Outcome]) -> str:
    """The page's tables: the parts, then every timed row with its peak memory."""
    lines = ["| part | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {o.name} | {o.outcome} | {o.seconds:.0f} |" for o in outcomes]
    lines += [
        "",
        "| what | shape | against | daamlib | the other | ratio | peak, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        path = folder / f"{shape}.csv"
        for row in csv.DictReader(path.read_text().splitlines()) if path.exists() else ():
            factor, unit = (2**-20, "MiB") if row["unit"] == "bytes" else (1.0, "s")
            ours, theirs = (f"{factor * float(row[name]):.3g} {unit}" for name in ("ours", "theirs"))
            peak = f"{float(row['peak_bytes']) / 2**30:.1f}" if row["peak_bytes"] else ""
            cells = (row["what"], shape, row["against"], ours, theirs, f"{float(row['ratio']):.3g}", peak)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; return 0 if every one passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with shapes of few channels")
    parser.add_argument("--folder", type=Path, default=ROOT / "gpu_check")
    parser.add_argument("--only", nargs="+", help="names of parts")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = parts(folder, rehearse=options.rehearse)
    unknown = {*(options.only or ())} - {part.name for part in chosen}
    if unknown:
        parser.error(f"no such parts: {sorted(unknown)}; there are {[part.name for part in chosen]}")
    started, outcomes, patience = time.perf_counter(), [], 10 if options.rehearse else 1
    for part in chosen:
        if options.only and part.name not in options.only:
            continue
        left = LIMIT * patience - (time.perf_counter() - started)
        outcomes.append(run(part, min(part.limit * patience, left)))
        (folder / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
        last = outcomes[-1].said.splitlines()[-1:] or [""]
        print(f"{part.name:<24} {outcomes[-1].outcome:<12} {outcomes[-1].seconds:5.0f} s  {last[0][:90]}", flush=True)
    if not options.rehearse and not options.only:
        PAGE.write_text(between(PAGE.read_text(), START, END, "\n" + table(folder, outcomes)))
    return int(any(outcome.outcome != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
