"""The tables of the README and of docs/results.md hold the numbers of the stored run and of the thesis."""

from pathlib import Path

import pytest

from daamlib_lab.experiments import stored_results

ROOT = Path(__file__).resolve().parents[1]
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
    keys = [(truth, refined) for truth in ("generated", "rendered") for refined in (False, True)]
    assert len(ours) == len(keys)
    for (title, *cells), key in zip(ours, keys, strict=True):
        assert key[0] in title or key[1], title
        assert cells == [f"{stored.value[(*key, *column)]:.1f}" for column in COLUMNS]
