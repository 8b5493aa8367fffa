"""What `import daamlib` gives: soon, and every name that the pages write. All in fresh interpreters."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("data/*/README.md")]
NAMES = {
    name
    for page in PAGES
    for name in re.findall(r"\bdaamlib(?:_lab)?(?:\.[A-Za-z_]\w*)+", page.read_text())
    if not name.endswith(".md")
}
ROOMS = {}  # names with the same beginning, all of the laboratory's together: a process each, longest first
for name in sorted(NAMES, key=len, reverse=True):
    ROOMS.setdefault(".".join(name.split(".")[: 1 if name.startswith("daamlib_lab") else 2]), []).append(name)
TRY = """
import os, daamlib, daamlib_lab
for names in rooms:
    if not os.fork():
        for name in names:
            try:
                eval(name)
            except (AttributeError, ImportError) as error:
                print(name, error, flush=True)
        os._exit(0)
    os.wait()
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_importing_daamlib_imports_no_library_that_takes_seconds():
    code = "import daamlib, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run(code).split())
    assert "torch" in loaded
    assert (
        loaded & {"diffusers", "huggingface_hub", "transformers", "matplotlib", "pandas", "skimage", "ipywidgets"}
        == set()
    )


def test_every_dotted_name_of_the_pages_is_there():
    assert {"daamlib.trace", "daamlib.plots.show_maps", "daamlib.datasets.export"} <= NAMES
    assert run(f"rooms = {list(ROOMS.values())}" + TRY) == ""
    assert run("rooms = [['daamlib.plots.nothing']]" + TRY).startswith("daamlib.plots.nothing module")
