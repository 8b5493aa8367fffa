"""The notebooks are kept so that nbval checks them: parameters, counts and outputs are all there."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbformat.v4 import new_code_cell, new_notebook, new_output

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
def test_the_readme_has_a_papermill_command_whose_parameters_exist(path):
    command = re.search(rf"papermill notebooks/{path.name} .*", (ROOT / "README.md").read_text())[0]
    assert set(re.findall(r"-p (\w+)", command)) <= papermill.inspect_notebook(path).keys()


def nbval_flags():
    """The flags with which `make test` runs nbval."""
    return re.search(r"^NBVAL_FLAGS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


def test_nbval_compares_what_is_printed_and_no_pictures_bars_stderr_or_durations(tmp_path):
    picture = {"image/png": "bm90IHRoaXMgb25l", "text/plain": "<PIL.Image.Image image mode=RGB size=2x2>"}
    cells = {
        "print('iou 0.50')": [new_output("stream", text="iou 0.50\n")],
        "print('iou 0.51')": [new_output("stream", text="iou 0.50\n")],
        "1 / 2": [new_output("execute_result", data={"text/plain": "0.5"}, execution_count=3)],
        "1 / 4": [new_output("execute_result", data={"text/plain": "0.5"}, execution_count=4)],
        "print('new')": [],
        "import sys\nprint('a warning', file=sys.stderr)": [],
        "print('9.5 s for 3 images')": [new_output("stream", text="12 s for 3 images\n")],
        "print('9.5 s for 4 images')": [new_output("stream", text="12 s for 3 images\n")],
        "import PIL.Image\nPIL.Image.new('RGB', (2, 2))": [new_output("display_data", data=picture)],
        "from tqdm.auto import tqdm\nfor i in tqdm(range(2)): print(i)": [new_output("stream", text="0\n1\n")],
    }
    differ = [1, 3, 4, 7]
    stored = [
        new_code_cell(source, outputs=outputs, execution_count=count)
        for count, (source, outputs) in enumerate(cells.items(), start=1)
    ]
    nbformat.write(new_notebook(cells=stored), tmp_path / "00_test.ipynb")
    failed, passed = run_nbval(tmp_path)
    assert failed == differ
    assert sorted(failed + passed) == list(range(len(cells)))


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
