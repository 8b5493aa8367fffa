"""Each figure has a number and a caption, each question an answer, each exercise a solution."""

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBERED = [path for path in NOTEBOOKS if path.stem[:2] not in ("07", "09")]  # those number theirs in italics
FIRST = NOTEBOOKS[:4]  # 00 to 03, whose answers and solutions are numbered, too


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def cells_of(path):
    return nbformat.read(path, as_version=4).cells


def answers(cells):
    """The stored answers that cells made of numbers, as Markdown."""
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return [each["text/markdown"] for each in data if each.get("text/markdown", "").startswith("> **Answer")]


@each(NUMBERED)
def test_figures_are_numbered_in_order_and_each_has_its_caption_below_it(path):
    cells = cells_of(path)
    shown = [k for k, cell in enumerate(cells) if cell.cell_type == "code" and "plt.show()" in cell.source]
    captions = [re.match(r"\*\*Figure (\d+)\.\*\* ", cells[k + 1].source) for k in shown]
    assert [caption and int(caption[1]) for caption in captions] == list(range(1, 1 + len(shown)))
    for k in shown:
        pictures = [mime for output in cells[k].outputs for mime in output.get("data", {}) if mime.startswith("image/")]
        assert len(pictures) == 1


@each(FIRST)
def test_a_figure_whose_caption_asks_has_an_answer_with_numbers(path):
    cells = cells_of(path)
    captions = [re.match(r"\*\*Figure (\d+)\.\*\*([^#]*?)(?:\n\n|$)", cell.source) for cell in cells]
    asking = {int(caption[1]) for caption in captions if caption and "?" in caption[2]}
    found = answers(cells)
    answered = {int(n) for text in found for n in re.findall(r"\d+", re.match(r"> \*\*Answers? ?([^*]*)\*\*", text)[1])}
    assert asking - answered == set()
    assert len(found) >= 3 and all(re.search(r"\d", text.split("**")[2]) for text in found)


@each(FIRST)
def test_exercises_have_folded_solutions(path):
    (text,) = [cell.source for cell in cells_of(path) if "<details><summary>Solutions</summary>" in cell.source]
    solutions = " ".join(re.search(r"<details>(.*?)</details>", text, re.DOTALL)[1].split())
    assert [which for which in ("first", "second", "third") if f"or the {which}:" not in solutions] == []


@each(NOTEBOOKS)
def test_a_notebook_names_the_protocols(path):
    assert any("](../docs/protocols.md)" in cell.source for cell in cells_of(path))
