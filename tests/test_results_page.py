"""The README and docs/results.md hold what the files of the stored run and the thesis' numbers say today."""

import re
from pathlib import Path

import pytest
from PIL import Image
from results_table import PAGES, ROOT, TRUTHS, draw, rewritten

from daamlib_lab.experiments import stored_results
from daamlib_lab.experiments.tables import STORED_RUN

COLUMNS = [("DAAM", 0), ("LDAAM", 0), ("DAAM", 5), ("LDAAM", 5)]  # method, training images
TABLES = [("README.md", 0, "max_miou"), ("docs/results.md", 0, "max_miou"), ("docs/results.md", 1, "auc")]


def tables(page):
    """The rows of each Markdown table of a page that has the four methods' columns, as lists of cells."""
    rows, found = (ROOT / page).read_text().splitlines(), []
    for k, row in enumerate(rows):
        if row.endswith("| DAAM | LDAAM | DAAM optimised | LDAAM optimised |"):
            end = next((i for i in range(k, len(rows)) if not rows[i].startswith("|")), len(rows))
            found.append([[cell.strip() for cell in line.strip("|").split("|")] for line in rows[k + 2 : end]])
    return found


@pytest.mark.parametrize(("page", "number", "metric"), TABLES)
def test_a_table_holds_the_stored_numbers(page, number, metric):
    thesis, *ours = tables(page)[number]
    stored = stored_results()
    stored = stored[(stored.metric == metric) & (stored["class"] == "all")]
    stored = stored.set_index(["ground_truth", "refined", "method", "train_images"]).sort_index()
    assert thesis[1:] == [f"{stored.thesis['generated', False, *column]:.1f}" for column in COLUMNS]
    keys = [(truth, refined) for truth in TRUTHS for refined in (False, True)]
    assert len(ours) == len(keys)
    for (title, *cells), key in zip(ours, keys, strict=True):
        assert key[0] in title or key[1], title
        assert [cell.split()[0] for cell in cells] == [f"{stored.value[(*key, *column)]:.1f}" for column in COLUMNS]
        for cell in cells:
            value, low, high = map(float, re.findall(r"[\d.]+", cell))
            assert low <= value <= high


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_the_stored_run_says(page):
    text = (ROOT / page).read_text()
    assert rewritten(text, PAGES[page]()) == text, "run `python tests/results_table.py`"


def test_the_figure_is_drawn_from_the_stored_curves(tmp_path):
    draw(tmp_path / "tables.png")
    with Image.open(tmp_path / "tables.png") as drawn, Image.open(ROOT / "docs" / "tables.png") as stored:
        assert drawn.size == stored.size


def test_the_stored_run_is_small():
    assert sum(path.stat().st_size for path in Path(STORED_RUN).iterdir()) < 300_000
