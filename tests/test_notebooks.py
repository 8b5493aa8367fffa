"""The notebooks are kept so that nbval checks them: parameters, counts and outputs are all there."""

import ast
import base64
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import papermill
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
COMMON = {"MODEL", "DEVICE", "SEED", "N_IMAGES", "STEPS", "OUTPUT_DIR"}
UNCHECKED = ("NBVAL_IGNORE_OUTPUT", "NBVAL_SKIP")
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:root|home|work|tmp|mnt|opt|usr|Users)/")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def is_checked(cell):
    """Whether nbval compares the outputs of a cell."""
    tags = cell.metadata.get("tags", [])
    marks = {line.lstrip("# ").strip() for line in cell.source.splitlines() if line.strip().startswith("#")}
    return not any(mark in marks or mark.lower().replace("_", "-") in tags for mark in UNCHECKED)


def calls(source):
    """The names of the functions that the cell itself calls, not those that functions defined in it call."""
    names, nodes = set(), [ast.parse(TransformerManager().transform_cell(source))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Call):
            names.add(getattr(node.func, "id", getattr(node.func, "attr", None)))
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            nodes.extend(ast.iter_child_nodes(node))
    return names


def texts(cell):
    """The stored outputs of a cell that are text."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (str(value) for mime, value in output.get("data", {}).items() if "image/" not in mime)


def test_there_are_notebooks_and_all_are_numbered():
    assert NOTEBOOKS
    assert all(re.match(r"\d\d_\w+$", path.stem) for path in NOTEBOOKS)
    assert [int(path.stem[:2]) for path in NOTEBOOKS] == list(range(len(NOTEBOOKS)))


@each_notebook
def test_one_cell_holds_the_parameters_each_with_a_comment(path):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    parameters = papermill.inspect_notebook(path)
    assert parameters.keys() >= COMMON
    assert [name for name, parameter in parameters.items() if not parameter["help"]] == []
    statements = ast.parse(tagged[0].source).body
    assert all(isinstance(statement, ast.Assign | ast.AnnAssign) for statement in statements)
    for statement in statements:
        ast.literal_eval(statement.value)  # plain literals; what is derived from them comes in the next cell


@each_notebook
def test_a_parameter_that_says_how_small_it_may_be_is_no_smaller(path):
    parameters = papermill.inspect_notebook(path).values()
    least = {p["name"]: (p["default"], re.search(r"\bat least (\d+)", p["help"])) for p in parameters}
    assert [name for name, (value, bound) in least.items() if bound and int(value) < int(bound[1])] == []


@each_notebook
def test_the_notebook_was_run_in_order_from_a_fresh_kernel(path):
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_every_checked_cell_that_prints_has_stored_outputs(path):
    prints = [cell for cell in code_cells(path) if is_checked(cell) and calls(cell.source) & {"print", "display"}]
    assert [cell.source for cell in prints if not cell.outputs] == []
    assert prints, "nbval would compare nothing"


@each_notebook
def test_no_stored_output_is_an_error_or_tells_of_the_machine(path):
    for cell in code_cells(path):
        assert [output.ename for output in cell.outputs if output.output_type == "error"] == []
        assert [text for text in texts(cell) if MACHINE_PATH.search(text)] == []


@each_notebook
def test_no_cell_ends_with_a_semicolon(path):
    # nbval runs cells without history, where IPython shows the value of "plot();" in spite of the semicolon
    assert [cell.source for cell in code_cells(path) if cell.source.rstrip().endswith(";")] == []


def pictures(path):
    """The stored pictures of a notebook."""
    data = [output.get("data", {}) for cell in code_cells(path) for output in cell.outputs]
    found = [each[mime] for each in data for mime in ("image/png", "image/jpeg") if mime in each]
    return [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in found]


@each_notebook
def test_stored_pictures_have_a_colour_for_every_pixel(path):
    # with a palette, colour bars lose the ends of their map and one image has other colours in every figure
    assert [picture.mode for picture in pictures(path) if picture.mode != "RGB"] == []


@pytest.mark.parametrize("name", ["viridis", "RdBu_r"])
def test_a_shrunk_figure_keeps_its_colours(tmp_path, name):
    photograph = np.random.default_rng(0).uniform(size=(12, 12, 3)).repeat(8, 0).repeat(8, 1)
    figure, axes = plt.subplots(1, 2, dpi=100)
    axes[0].imshow(photograph)
    bar = figure.colorbar(axes[1].imshow(np.linspace(0, 1, 10_000).reshape(100, 100), cmap=name)).ax.get_window_extent()
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)
    data = {"image/png": base64.b64encode((tmp_path / "figure.png").read_bytes()).decode()}
    cell = new_code_cell("", outputs=[new_output("display_data", data=data)], execution_count=1)
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "00_test.ipynb")
    before = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"), float)
    subprocess.run([sys.executable, FOLDER / "shrink_pictures.py", tmp_path / "00_test.ipynb"], check=True)
    (picture,) = pictures(tmp_path / "00_test.ipynb")
    after = np.asarray(picture, float)
    assert np.abs(after - before).mean() < 2
    column = int((bar.x0 + bar.x1) / 2)
    ends = after[[int(len(after) - bar.y1) + 4, int(len(after) - bar.y0) - 4], column]
    colours = 255 * np.array(matplotlib.colormaps[name]([0.99, 0.01]))[:, :3]
    assert np.abs(ends - colours).max() < 8


@each_notebook
def test_the_last_cell_writes_the_metrics(path):
    assert "write_metrics" in calls(code_cells(path)[-1].source)


@each_notebook
def test_one_to_three_metrics_are_headlines(path):
    nodes = ast.walk(ast.parse(code_cells(path)[-1].source))
    written = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "write_metrics"]
    (headline,) = [keyword.value.elts for keyword in written[0].keywords if keyword.arg == "headline"]
    assert 1 <= len(headline) <= 3


@each_notebook
def test_the_docs_have_a_papermill_command_whose_parameters_exist(path):
    command = re.search(rf"papermill notebooks/{path.name} .*", (ROOT / "docs" / "running.md").read_text())[0]
    assert set(re.findall(r"-p (\w+)", command)) <= papermill.inspect_notebook(path).keys()


def nbval_flags():
    """The flags with which `make test` runs nbval."""
    return re.search(r"^NBVAL_FLAGS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


@each_notebook
def test_a_cell_with_a_tolerance_of_its_own_gives_the_reason(path):
    for cell in code_cells(path):
        lines = [line for line in cell.source.splitlines() if re.match(r"#.*\btolerance\b", line)]
        assert [line for line in lines if not re.fullmatch(r"# tolerance \d+(\.\d+)?: \S+( \S+){3,}", line)] == []
        assert len(lines) <= 1 and (not lines or is_checked(cell))


def printing(new, stored, *, remark=""):
    """A cell that prints `new`, and the stored output of one that printed `stored`."""
    return f"{remark}\nprint({new!r})", [new_output("stream", text=stored + "\n")]


PICTURE = {"image/png": "bm90IHRoaXMgb25l", "text/plain": "<PIL.Image.Image image mode=RGB size=2x2>"}
TABLE = """import pandas as pd
print(pd.DataFrame({"DAAM": [9.98, 31.4], "LDAAM": [50.0, 60.1]}, index=["car", "rider"]))"""
ROWS = "       DAAM  LDAAM\ncar    %s   50.0\n%s  31.40   60.1\n"
WIDER = "# tolerance 0.8: a few of the annotator's pixels change sides"


def table(text):
    return [new_output("stream", text=text)]


SAME = {
    "equal": printing("iou 0.50", "iou 0.50"),
    "a unit of the last digit": printing("iou 0.51", "iou 0.50"),
    "three units, with an exponent": printing("error 2.3e-07", "error 2.0e-07"),
    "a sign, a comma and a full stop": printing("-0.1, 0.52.", "+0.1, 0.50."),
    "a digit more, so that columns move": (TABLE, table(ROWS % ("10.00", "rider"))),
    "a picture": ("import PIL.Image\nPIL.Image.new('RGB', (2, 2))", [new_output("display_data", data=PICTURE)]),
    "stderr": ("import sys\nprint('a warning', file=sys.stderr)", []),
    "a bar": ("from tqdm.auto import tqdm\nfor i in tqdm(range(2)): print(i)", [new_output("stream", text="0\n1\n")]),
    "a duration": printing("9.5 s for 3 images", "12 s for 3 images"),
    "within the cell's own tolerance": printing("iou 50.7", "iou 50.0", remark=WIDER),
}
DIFFERENT = {
    "a wrong digit": printing("iou 0.54", "iou 0.50"),
    "a wrong exponent": printing("error 2.0e-06", "error 2.0e-07"),
    "a whole number": printing("4 images", "3 images"),
    "a shape": printing("(8, 128)", "(8, 127)"),
    "a whole number for one with decimals": printing("3 images", "3.0 images"),
    "a swapped label": printing("car 0.50, rider 0.51", "rider 0.50, car 0.51"),
    "a changed word": printing("the same: False", "the same: True"),
    "not a number": printing("iou nan", "iou 0.50"),
    "a number for a sign": printing("iou 0.50", "iou #"),
    "a lost line": printing("car 0.50", "car 0.50\nrider 0.50"),
    "a line more": printing("car 0.50\nrider 0.50", "car 0.50"),
    "a swapped row": (TABLE, table(ROWS % ("9.98", "person"))),
    "a wrong number in a table": (TABLE, table(ROWS % ("9.94", "rider"))),
    "an output that was not stored": ("print('new')", []),
    "no output": ("pass", [new_output("stream", text="iou 0.50\n")]),
    "an error": ("print('iou 0.50')\n1 / 0", [new_output("stream", text="iou 0.50\n")]),
    "outside the cell's own tolerance": printing("iou 50.9", "iou 50.0", remark=WIDER),
    "a whole number in a cell with a tolerance": printing("4 images", "3 images", remark=WIDER.replace("0.8", "2")),
}


def test_nbval_lets_numbers_round_and_nothing_else(tmp_path):
    cells = SAME | DIFFERENT
    stored = [new_code_cell(source, outputs=outputs, execution_count=1) for source, outputs in cells.values()]
    nbformat.write(new_notebook(cells=stored), tmp_path / "00_test.ipynb")
    failed, passed = run_nbval(tmp_path)
    names = list(cells)
    assert [names[number] for number in sorted(failed)] == list(DIFFERENT)
    assert [names[number] for number in sorted(passed)] == list(SAME)


@pytest.mark.slow
def test_one_digit_changed_in_a_stored_output_fails_that_cell_and_no_other(tmp_path):
    notebook = nbformat.read(FOLDER / "00_quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stored = [
        (i, output)
        for i, cell in enumerate(code)
        for output in cell.outputs
        if re.search(r"\d", output.get("text", ""))
    ]
    number, output = stored[0]
    output.text = re.sub(r"\d", lambda digit: str(9 - int(digit[0])), output.text, count=1)
    nbformat.write(notebook, tmp_path / "00_quickstart.ipynb")
    failed, passed = run_nbval(tmp_path)
    assert failed == [number]
    assert len(passed) == len(code) - 1


def run_nbval(folder):
    """The numbers of the code cells that fail and of those that pass when `make test` checks a folder."""
    shutil.copy(FOLDER / "conftest.py", folder)
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-rA", *nbval_flags(), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [re.findall(rf"^{how} .*::Cell (\d+)", done.stdout, re.MULTILINE) for how in ("FAILED", "PASSED")]
    assert any(found), done.stdout
    return [[int(number) for number in numbers] for numbers in found]
