"""The widgets as a user meets them: a real JupyterLab on 127.0.0.1, driven through a headless Chromium.

With DAAMLIB_SCREENSHOTS=docs, it writes explorer.png and annotator.png there. Without a browser it is skipped, but with
DAAMLIB_REQUIRE_BROWSER=1 that is a failure, so that `make test-all` cannot lose it unseen.
"""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from daamlib import metrics
from daamlib.cityscapes import BY_NAME
from daamlib_lab.urban.scenes import HELD_OUT, render

CAR, PERSON = BY_NAME["car"].id, BY_NAME["person"].id
PROMPT = "a red car and a person in an urban environment"
CELLS = [
    # where it looks at a word of the prompt, with the labels of the bundled annotator as the truth
    f"""import json, torch, daamlib
from daamlib.datasets import MIN_AREA
from daamlib_lab.urban.annotator import annotate as label_images, load_annotator
from daamlib_lab.urban.scenes import HELD_OUT
from daamlib_lab.urban.scenes import render
from daamlib.widgets import annotate, explore
import numpy as np
torch.set_num_threads(1)
pipe = daamlib.load_pipeline(device="cpu")
with daamlib.trace(pipe) as trace:
    generator = torch.Generator().manual_seed(1)
    image = pipe({PROMPT!r}, num_inference_steps=10, generator=generator).images[0]
labels = label_images(load_annotator(), np.array(image)[None])[0]
mask = labels == {CAR}
if mask.mean() < MIN_AREA:  # the model may have left the car out
    mask = labels == np.bincount(labels.flat).argmax()""",
    "explorer = explore(trace[0], image, mask)\nexplorer",
    """scenes = [render(HELD_OUT + seed, 128).image for seed in (3, 4)]
annotator = annotate([*scenes, image], ["car", "person", "traffic light", "rider"], "masks")
annotator""",
    "print(json.dumps(explorer.state), explorer.result.iou, int((annotator.label_map > 0).sum()))",
]

pytestmark = pytest.mark.slow


def refuse(reason):
    (pytest.fail if os.environ.get("DAAMLIB_REQUIRE_BROWSER") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: Debian's, or the one at DAAMLIB_CHROMIUM; playwright's own is never downloaded."""
    executable = os.environ.get("DAAMLIB_CHROMIUM") or shutil.which("chromium")
    if not executable:
        refuse("no chromium on the PATH: apt-get install chromium, or name one in DAAMLIB_CHROMIUM")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        refuse("playwright is not installed: it is in daamlib[test]")
    with sync_playwright() as playwright:
        # /dev/shm is tiny in containers
        chromium = playwright.chromium.launch(executable_path=executable, args=["--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def lab(tmp_path):
    """(address, token, folder) of a JupyterLab that leaves nothing outside of its temporary folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    config = tmp_path / "config"
    (config / "labconfig").mkdir(parents=True)
    # it asks the network for news otherwise
    news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (config / "labconfig" / "page_config.json").write_text(json.dumps(news))
    places = {
        "JUPYTER_CONFIG_DIR": config,
        "JUPYTER_DATA_DIR": tmp_path / "data",
        "JUPYTER_RUNTIME_DIR": tmp_path / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": tmp_path / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": tmp_path / "workspaces",
        "IPYTHONDIR": tmp_path / "ipython",
    }
    options = ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--no-browser", "--allow-root"]
    options += [f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(path) for name, path in places.items()}}
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        found = wait_for(lambda: running_at(places["JUPYTER_RUNTIME_DIR"], server), 120, log)
        yield f"http://127.0.0.1:{found['port']}", found["token"], folder
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def running_at(runtime, server):
    assert server.poll() is None, "JupyterLab has ended"
    for path in runtime.glob("jpserver-*.json"):
        found = path.read_text()
        return json.loads(found) if found.endswith("}") else None


def wait_for(condition, seconds, log=None):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.2)
    raise AssertionError(f"nothing after {seconds} s\n" + (log.read_text()[-3000:] if log else ""))


@pytest.fixture
def page(browser, lab):
    """JupyterLab with the notebook open, no cell run yet."""
    address, token, folder = lab
    notebook = new_notebook(cells=[new_code_cell(source) for source in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "quickstart.ipynb")
    context = browser.new_context(viewport={"width": 1120, "height": 2000})
    context.set_default_timeout(20_000)
    page = context.new_page()
    page.goto(f"{address}/doc/tree/quickstart.ipynb?token={token}")
    page.locator(".jp-Notebook .jp-Cell").nth(3).wait_for()
    page.get_by_text("| Idle").wait_for()  # what is run before the kernel is there is lost
    yield page
    page.screenshot(path=folder.parent / "page.png")  # what to look at after a failure
    context.close()


def run_cell(page, number):
    page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-editor").nth(number).click()
    page.keyboard.press("Shift+Enter")


def output(page, number):
    return page.locator(".jp-Notebook .jp-CodeCell").nth(number).locator(".jp-OutputArea-output").last


def picture(page, start):
    """The pixels of the explorer's picture whose text begins so."""
    source = page.locator(f'img[alt^="{start}"]').get_attribute("src")
    return np.array(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def shown_iou(page):
    return float(page.locator("figcaption", has_text="IoU").first.inner_text().split("IoU ")[1].split(";")[0])


def drag(page, canvas, *points, button="left"):
    """A stroke through points in [0, 1] of the canvas."""
    box = canvas.bounding_box()
    x, y = zip(*((box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in points), strict=True)
    page.mouse.move(x[0], y[0])
    page.mouse.down(button=button)
    for corner in zip(x[1:], y[1:], strict=True):
        page.mouse.move(*corner, steps=8)
    page.mouse.up(button=button)


def shoot(widget, name):
    if folder := os.environ.get("DAAMLIB_SCREENSHOTS"):
        widget.page.mouse.move(5, 5)
        widget.screenshot(path=Path(folder) / name)


def test_a_word_a_threshold_and_a_stroke(page, lab):
    masks = lab[2] / "masks"
    run_cell(page, 0)
    run_cell(page, 1)
    word = page.get_by_label("Word")
    word.wait_for(timeout=120_000)
    page.locator('img[alt^="heat map"]').wait_for()

    # -- the explorer: a word of the prompt, any other word, a bad one, and back
    before = picture(page, "heat map")
    word.fill("tree")
    page.locator('img[alt*="LDAAM of “tree”"]').wait_for()
    tree = picture(page, "heat map")
    assert tree.shape == before.shape and (tree != before).any()
    page.get_by_label("Method").select_option("DAAM")
    message = page.get_by_text("'tree' is not in the prompt, which DAAM reads")
    message.wait_for()
    assert page.locator('img[alt^="heat map"]').count() == 0
    page.get_by_label("Method").select_option("LDAAM")
    page.locator('img[alt*="LDAAM of “tree”"]').wait_for()
    message.wait_for(state="detached")
    assert (picture(page, "heat map") == tree).all()
    word.fill("car")
    page.locator('img[alt*="LDAAM of “car”"]').wait_for()

    # -- the threshold moves the mask, its IoU and the point on the curve, and not the map
    heat, mask, iou = picture(page, "heat map"), picture(page, "thresholded mask"), shown_iou(page)
    point = page.locator("figure svg circle").get_attribute("cx")
    handle = page.locator(".widget-slider", has_text="Threshold").locator(".noUi-handle")
    handle.focus()
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    page.locator("figcaption", has_text="map > 0.62").wait_for()
    assert shown_iou(page) != iou
    assert page.locator("figure svg circle").get_attribute("cx") != point
    assert (picture(page, "thresholded mask") != mask).any()
    assert (picture(page, "heat map") == heat).all()
    shoot(output(page, 1), "explorer.png")

    # -- the annotator: a stroke is on disk as soon as it is drawn
    run_cell(page, 2)
    canvas = page.locator(".daamlib-annotator canvas")
    canvas.wait_for()
    page.get_by_text("0 of 3 labelled").wait_for()
    canvas.scroll_into_view_if_needed()
    drag(page, canvas, (0.25, 0.5), (0.75, 0.5))
    page.get_by_text("saved as labels/00000.png").wait_for()
    page.get_by_text("1 of 3 labelled").wait_for()
    labels = np.array(Image.open(masks / "labels" / "00000.png"))
    assert labels.shape == (128, 128) and labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, CAR}
    rows, columns = np.nonzero(labels)
    assert (abs(rows - 63.5) <= 4).all() and columns.min() in range(28, 33) and columns.max() in range(95, 100)
    assert (masks / "images" / "00000.png").is_file()
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("0 of 3 labelled").wait_for()
    assert not (masks / "labels" / "00000.png").exists()

    # -- a polygon of another class, keys that JupyterLab must not take for its own, and the next image
    page.get_by_label("person").check()
    canvas.focus()
    page.keyboard.press("p")
    assert page.get_by_label("Polygon").is_checked()
    box = canvas.bounding_box()
    for u, v in [(0.1, 0.1), (0.4, 0.1), (0.4, 0.4), (0.1, 0.4)]:
        page.mouse.click(box["x"] + u * box["width"], box["y"] + v * box["height"])
    page.keyboard.press("Enter")
    page.get_by_text("1 of 3 labelled").wait_for()
    labels = np.array(Image.open(masks / "labels" / "00000.png"))
    assert set(np.unique(labels)) == {0, PERSON} and (labels[14:50, 14:50] == PERSON).all()
    page.keyboard.press("Control+z")
    page.get_by_text("0 of 3 labelled").wait_for()

    # -- two scribbles, one with the right button, grow to a mask of the person
    page.keyboard.press("g")
    drag(page, canvas, (0.53, 0.08), (0.52, 0.3), (0.5, 0.45), (0.48, 0.62))
    page.get_by_text("1 of 3 labelled").wait_for()
    around = (0.33, 0.1), (0.33, 0.6), (0.42, 0.72), (0.62, 0.72), (0.75, 0.5), (0.75, 0.25), (0.65, 0.05)
    before = (masks / "labels" / "00000.png").read_bytes()
    drag(page, canvas, *around, button="right")
    wait_for(lambda: (masks / "labels" / "00000.png").read_bytes() != before, 10)
    labels = np.array(Image.open(masks / "labels" / "00000.png"))
    assert metrics.iou(labels == PERSON, render(HELD_OUT + 3, 128).labels == PERSON) > 0.7
    canvas.focus()
    page.keyboard.press("d")  # twice, JupyterLab deletes the cell
    page.keyboard.press("d")
    assert page.locator(".jp-Notebook .jp-CodeCell").count() == len(CELLS)
    page.get_by_role("button", name="Next").click()
    page.get_by_text("Image 2").wait_for()
    assert json.loads((masks / "annotation.json").read_text())["image"] == 1
    page.get_by_role("button", name="Previous").click()
    page.get_by_text("Image 1").wait_for()
    page.get_by_text("saved as labels/00000.png").wait_for()

    # -- what was found by hand goes on in code
    run_cell(page, 3)
    printed = output(page, 3).locator("pre")
    printed.wait_for()
    text = printed.inner_text()
    state, end = json.JSONDecoder().raw_decode(text)
    iou, painted = map(float, text[end:].split())
    assert (state["word"], state["method"], state["threshold"]) == ("car", "ldaam", 0.62)
    assert iou == pytest.approx(shown_iou(page), abs=5e-4)
    assert painted == (labels > 0).sum()
    shoot(output(page, 2), "annotator.png")
