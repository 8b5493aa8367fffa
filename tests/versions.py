"""Run the core's tests with the oldest versions that pyproject.toml allows and with the newest there are.

    python tests/versions.py [oldest] [newest]

Each has a separate environment, `.venv-oldest` and `.venv-newest`, of several gigabytes if torch's build is for CUDA;
an existing one is updated. If all tests pass, the versions are written to docs/install.md.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pages import between

ROOT = Path(__file__).resolve().parents[1]
PAGE, START, END = ROOT / "docs/install.md", "<!-- make test-versions -->\n", "<!-- end -->\n"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [text.partition(">=")[::2] for text in PROJECT["dependencies"]]
PYTHONS = {"oldest": "3.10", "newest": "3.13"}
TESTERS = ("pytest", "beartype", "peft", "packaging", "psutil", "accelerate", "torchmetrics")  # the last two: training
TESTS = (
    "tests/attention/test_daam.py",
    "tests/attention/test_golden.py",
    "tests/attention/test_ldaam.py",
    "tests/attention/test_record_file.py",
    "tests/test_metrics.py",
    "tests/test_pipeline.py",
)


def make_environment(name: str) -> Path:
    """Make or update the environment; return its interpreter."""
    python = ROOT / f".venv-{name}/bin/python"
    if not python.exists():
        subprocess.run([f"python{PYTHONS[name]}", "-m", "venv", python.parents[1]], check=True)
    pins = [package + ("" if name == "newest" else f"=={version}") for package, version in CORE]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *pins, *TESTERS], check=True)
    return python


def run_tests(python: Path, name: str) -> dict[str, str]:
    """A column of the table; SystemExit if a test fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # old versions warn of what later ones changed: warnings are errors with the pinned versions alone
    options = ["-q", "-o", "filterwarnings=", "-W", "ignore", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", *options, f"--junitxml={report}", *TESTS]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}\na test fails with the {name} versions")
        suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    code = "import json, sys; from importlib.metadata import version; "
    code += "print(json.dumps(['.'.join(map(str, sys.version_info[:3])), *map(version, sys.argv[1:])]))"
    packages = [package for package, _ in CORE]
    found = json.loads(subprocess.run([python, "-c", code, *packages], check=True, capture_output=True).stdout)
    passed = int(suite.get("tests")) - int(suite.get("skipped"))
    versions = dict(zip(["Python", *packages], found, strict=True))
    return {**versions, "tests passed": str(passed), "date": f"{datetime.date.today()}"}


def write_table(columns: dict[str, dict[str, str]]) -> None:
    """Put the table in its place on the page."""
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    rows += [[row, *(column[row] for column in columns.values())] for row in next(iter(columns.values()))]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    PAGE.write_text(between(PAGE.read_text(), START, END, table))


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(PYTHONS)
    pythons = {name: make_environment(name) for name in chosen}
    with ThreadPoolExecutor() as pool:  # one thread each
        columns = dict(zip(pythons, pool.map(run_tests, pythons.values(), pythons), strict=True))
    if columns.keys() == PYTHONS.keys():
        write_table(columns)
    print(json.dumps(columns, indent=2))
