"""The figures of the notebooks' answers: made by cells, or marked "stored run:" and compared with the stored files.

Markdown may explain and conclude, but a figure in it needs a source; what is printed is compared with metrics.json,
after small runs with other seeds. 06, 07 and 09 print no verdict besides sentences that cells make of numbers: of them
it is tested that they run.
"""

import ast
import inspect
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

from daamlib_lab import diagrams
from daamlib_lab.experiments import thesis_values
from daamlib_lab.runs import main

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

STORED = ROOT / "data"  # whose results.csv, differences.csv, metrics.json and the like are stored runs
MEASURED = r"\d ?(%|percent|points?|times|s|ms|seconds|[MG]i?B|mIoU)(?!\w)|\b(minutes|hours?)\b"
SOURCES = {
    "a question": r"\?( \|)?$|^how (good|well|much|far|often)\b",
    "a condition": r"^where\b|\b(if|whether|may|might|would|unless|cannot)\b",
    "a source": r"\b(thesis|slides?|Table \d|papers?|published|known to|Cityscapes|model card)\b",
    "what it is true of": r"\b(stored run|default settings)\b",
    "a definition": r"\b(by definition|counts as|at least \d|95 %)",
    "an instruction": r"^(\d\. )?\**(Look|Compare|Find|Follow|Ask|Set|Take|Try|Change|Read|Repeat|Give|Add)\b",
}


def sentences(markdown):
    """The sentences, headings, items and table rows of a Markdown cell; code and formulae become an X."""
    text = markdown.split("## References")[0]
    text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", "X", text, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=[#|]|- |\d\. )", text):
        yield from filter(None, re.split(r"(?<=[.?!])\s+(?=[A-Z*(\"])", " ".join(block.split())))


def stored_numbers():
    """Every number of the stored runs as it is written with one decimal, without its sign."""
    texts = [path.read_text() for name in ("*.csv", "metrics.json") for path in STORED.glob(f"*/{name}")]
    numbers = {float(number) for text in texts for number in re.findall(r"\d+\.\d+", text)}
    return {f"{number:.1f}" for number in numbers}


def unsupported(sentence, stored):
    """The figures of a sentence that have no source: no "stored run:" that holds them, and none of `SOURCES`."""
    if "stored run:" in sentence.lower():
        said = sentence[sentence.lower().index("stored run:") :]
        return [number for number in re.findall(r"\d+\.\d(?!\d)", said) if number not in stored]
    if any(re.search(pattern, sentence, re.IGNORECASE) for pattern in SOURCES.values()):
        return []
    return [found[0] for found in re.finditer(MEASURED, sentence, re.IGNORECASE)]


@pytest.mark.parametrize(
    "sentence",
    [
        "A serious run takes about an hour on two CPU cores.",
        "The small default runs in minutes.",
        "Optimisation adds 14 points.",
        "Stored run: optimised DAAM reaches 12.3 %.",
        "Answer (stored run: 60.3 %, then 99.9 %).",
    ],
)
def test_a_figure_without_a_source_is_seen(sentence):
    assert unsupported(sentence, {"60.3", "74.0"})


@pytest.mark.parametrize(
    "sentence",
    [
        "In the stored run, propagating once helps words more than tokens.",
        "**Stored run:** DAAM goes from 60.3 to 74.0 %.",
        "A fine annotation of one street scene of Cityscapes took about 90 minutes.",
        "Tokens are better than words once both are propagated.",
        "A class counts as shown where it covers 2 % of the image.",
    ],
)
def test_other_sentences_pass(sentence):
    assert unsupported(sentence, {"60.3", "74.0"}) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_of_the_text_has_a_source(path):
    cells, stored = enumerate(nbformat.read(path, as_version=4).cells), stored_numbers()
    texts = [(i, text) for i, cell in cells if cell.cell_type == "markdown" for text in sentences(cell.source)]
    assert len(texts) > 20
    assert [f"[{i}] {found}: {text}" for i, text in texts if (found := unsupported(text, stored))] == []


@pytest.mark.parametrize("name", ["04_linear_daam", "05_token_optimization", "06_tables", "08_refinement"])
def test_answers_are_made_by_cells(name):
    cells = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    answers = [each["text/markdown"] for each in data if "text/markdown" in each]
    assert len(answers) >= 5 and all(re.search(r"\d", text) for text in answers)


def test_the_page_of_protocols_names_scores_that_the_notebooks_print():
    page = (ROOT / "docs" / "protocols.md").read_text()
    rows = re.findall(r"^\| (\d\d)[^|]*\| (\d+\.\d) \| \d+", page, re.MULTILINE)
    assert len(rows) >= 7
    for number, score in rows:
        (path,) = FOLDER.glob(f"{number}_*.ipynb")
        outputs = [each for cell in nbformat.read(path, as_version=4).cells for each in cell.get("outputs", [])]
        texts = [each.get("text", each.get("data", {}).get("text/plain", "")) for each in outputs]
        assert any(re.search(rf"(?<![\d.]){re.escape(score)}(?!\d)", text) for text in texts), (number, score)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_ends_with_three_exercises_and_where_to_go_next(path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    exercises = re.search(r"^## (?:Three e|E)xercises$(.*?)^## Where to go", text, re.MULTILINE | re.DOTALL)
    assert exercises and re.findall(r"^(\d)\. ", exercises[1], re.MULTILINE) == ["1", "2", "3"]


def test_every_diagram_is_shown_in_a_notebook():
    shown = set()
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                nodes = ast.walk(ast.parse(cell.source))
                calls = [node.func for node in nodes if isinstance(node, ast.Call)]
                shown |= {getattr(call, "id", getattr(call, "attr", None)) for call in calls}
    public = [name for name, value in vars(diagrams).items() if inspect.isfunction(value) and name[0] != "_"]
    assert {name for name in public if getattr(diagrams, name).__module__ == diagrams.__name__} <= shown


def listed(names):
    """As the notebooks print a list that may be empty."""
    return ", ".join(map(re.escape, names)) if names else "(none|no )"


def quickstart(metrics):
    yield r"correlation of DAAM and LDAAM"


def fundamentals(metrics):
    plain, strong = (metrics["guidance"][name] for name in ("no text", "g = 15"))
    for measure in ("contrast", "variety"):
        yield rf"{measure} {plain[measure]:.2f} to {strong[measure]:.2f}"


def limitations(metrics):
    daam, floor = metrics["best mIoU (%)"], metrics["floor (%)"]
    ahead = [group for group, row in metrics["layers"].items() if row["miou"] > np.mean(list(daam.values()))]
    yield rf"Better alone than the sum: {listed(ahead)}\."
    for name, value in daam.items():
        yield rf"^{name} +{value:.1f} +{floor[name]:.1f} +\d+ +[\d.]+$"
    near = [name for name, value in daam.items() if value < 1.25 * floor[name]]
    yield rf"Classes near the floor: {listed(near)}\."
    lost = [name for name, row in metrics["thresholds"].items() if row["own"] - row["common"] > 2]
    yield rf"lose more than 2 points by the common threshold: {listed(lost)}\."


def open_vocabulary(metrics):
    rows = metrics["best_miou (%)"]
    low = [word for word, row in rows.items() if max(row.values()) < 1.25 * row["floor"]]
    yield rf"Near the floor \(less than a quarter above it\) by every text: {listed(low)}\."
    hardly = metrics["car_mask_iou"]["with"] > 0.9
    yield "other words hardly move the mask" if hardly else "Other words move the mask"


def signed(points):
    return re.escape(f"{points:+.1f}")


def linear(metrics):
    thesis = thesis_values().query("table == '4.2' and `class` == 'all' and not optimised").set_index("method").value
    same = (metrics["ldaam_alone_minus_daam_of_the_prompt"] > 0) == (thesis["LDAAM"] > thesis["DAAM"])
    yield "plain DAAM is found here" if same else "plain DAAM is not found here"
    yield f"an article alone brings {signed(metrics['softmax_or_text_gains']['softmax: article - lone word'])} of the"
    rows = metrics["best_miou"]
    floor = rows.pop("whole image")
    low = [f"{how} of {name}" for how, row in rows.items() for name in row if row[name] < floor[name] + 2]
    yield f"nothing is measured: {listed(low)}"


def optimisation(metrics):
    for method in ("DAAM", "LDAAM"):
        yield f"{method} {signed(metrics['miou'][f'{method}, optimised'] - metrics['miou'][f'{method}, word'])}"
    above = metrics["loss_of_gradient_descent"] > metrics["ldaam_loss"] + 1e-3
    yield "gradient descent is still above the minimum" if above else "gradient descent is at the minimum"
    for count, miou in metrics["miou_by_training_images"].items():
        yield rf"^{count} images?, \d sets +\S+ +{miou:.1f}"
    loss, area = metrics["miou_by_loss"], metrics["auc_by_loss"]
    yield rf"minus ours: {signed(loss['cross_entropy'] - loss['bce'])}"
    yield rf"points of best mIoU, {signed(area['cross_entropy'] - area['bce'])}"


def refinement(metrics):
    for what, gain in metrics["gain"].items():
        steps = "competition", "propagation"
        yield f"{what.capitalize()}: " + ".*".join(f"{step} {signed(gain[step])}" for step in steps)
    yield f"tokens - words {signed(metrics['tokens_minus_words'])}"
    for how, times in metrics["chosen_times"].items():
        yield f"{how.capitalize()}: chosen r = {times}, with {metrics['max_miou'][f'{how}, {times} times']:.1f}"


def nothing(metrics):
    """No verdict: see the module's docstring."""
    return ()


SMALL = {
    "00_quickstart": (quickstart, {"SEED": 11, "N_IMAGES": 2, "STEPS": 4}),
    "01_diffusion_fundamentals": (fundamentals, {"SEED": 12, "N_IMAGES": 2, "STEPS": 4}),
    "02_daam_limitations": (limitations, {"SEED": 13, "N_IMAGES": 2, "STEPS": 4}),
    "03_open_vocabulary_daam": (open_vocabulary, {"SEED": 14, "N_IMAGES": 2, "STEPS": 4, "N_SCENES": 8}),
    "04_linear_daam": (linear, {"SEED": 15, "N_IMAGES": 2, "STEPS": 4, "N_SCENES": 4}),
    "05_token_optimization": (optimisation, {"SEED": 16, "N_IMAGES": 1, "STEPS": 4, "N_SCENES": 28}),
    "06_tables": (nothing, {"SEED": 18, "STEPS": 4}),
    "07_synthetic_segmentation": (nothing, {"SEED": 19, "N_IMAGES": 2, "STEPS": 4}),
    "08_refinement": (refinement, {"SEED": 17, "N_IMAGES": 1, "STEPS": 4, "N_SCENES": 24}),
    "09_are_the_maps_true": (nothing, {"SEED": 20, "N_IMAGES": 7, "CASES": 2, "STEPS": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_with_another_seed_and_size_what_is_printed_agrees_with_the_metrics(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "true")  # no bars
    verdicts, parameters = SMALL[name]
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    assert main([name[:2], *given, "--notebooks-dir", str(FOLDER), "--runs-dir", str(tmp_path)]) == 0
    (run_dir,) = tmp_path.iterdir()
    cells = nbformat.read(run_dir / f"{name}.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    data = [each.get("data", {}) | {"stream": each.get("text")} for each in outputs]
    printed = "".join((of["stream"] or of.get("text/markdown") or of.get("text/plain", "")) + "\n" for of in data)
    expected = list(verdicts(json.loads((run_dir / name / "metrics.json").read_text())))
    assert [verdict for verdict in expected if not re.search(verdict, printed, re.MULTILINE)] == [], printed
