"""The table of supported pipelines, docs/supported.md, made of the tests that passed.

A test that is marked `supports(family=..., feature=...)` proves one cell. Either half may come from the mark of a
parameter or of a fixture's parameter: a test proves each feature that it names for each family that it names. A `note`
becomes a footnote, such as how far from exact a feature is; of the feature "refused" it is the reason. A cell says yes
where tests are marked and all of them passed.

    python tests/support_table.py            run these tests and write the table
    python tests/support_table.py --check    run none: does the table say yes where tests are marked, and nowhere else?
"""

import argparse
import itertools
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from pipelines import DECISIONS

TABLE = Path(__file__).parents[1] / "docs" / "supported.md"
FEATURES = {
    "prompt's words": "`record.daam()`: DAAM of the prompt",
    "any text": "`record.daam(text)`: open-vocabulary DAAM, the softmax over the text's tokens",
    "lone word": "`record.ldaam(word)`, `record.linear_map()`: linear DAAM, without a softmax",
    "token": "`optimize_token(records, masks)`, and `token.maps(record)` of other records",
    "concept map": "`record.concept_map(words)`: agreement with words in the attention's output space",
    "real images": "`trace_image(pipe, image)`",
    "self-attention": "`trace(pipe, self_attention=True)`, `record.refine(maps)`",
    "store=maps": '`trace(pipe, store="maps", texts=[...])`: maps of known texts in memory that steps do not add to',
    "save and load": "`record.save(path)`, `AttentionRecord.load(path, pipe=pipe)`, and new texts afterwards; of joint "
    "models `JointRecord.load`",
}
REFUSED = "refused"
HEAD = """\
# Supported pipelines: SD, SDXL, SD 3, Flux, PixArt, Sana and others

Written by `make support-table` from the tests that are marked `supports` and passed: change these, not this file. They
run on tiny models of each family, built from config with random weights. So the table says that what is read is what
the running model computes, up to rounding unless a footnote says more; how good the maps of a trained model are it does
not say ([Limits](limits.md)). An empty cell means that no test shows it. `trace` and what a record reads are in the
[reference](api/daamlib.md).

"""
CLASSES = """\
## Every pipeline of diffusers that is given a text

Decided in `tests/pipelines.py` by the class of the denoiser. Those that a reader takes are proved only where the table
above has a row; what breaks a law of records is refused as it runs. Modular pipelines are read by `trace.loop`.

"""
Cell = tuple[str, str]  # family, feature


class Marked:
    """A pytest plugin: keeps the marked tests alone, and what became of them.

    Attributes:
        cells: the marked tests of each cell, by their ids.
        notes: of the cells that have one.
        outcomes: of each test "passed", "failed" or "skipped".
    """

    def __init__(self):
        self.cells: dict[Cell, list[str]] = defaultdict(list)
        self.notes: dict[Cell, str] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config, items):
        kept, others = [], []
        for item in items:
            (kept if self._keep(item) else others).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=others)

    def _keep(self, item) -> bool:
        said = defaultdict(list)
        for mark in item.iter_markers("supports"):
            for name, value in mark.kwargs.items():
                said[name].append(value)
        cells = list(itertools.product(said["family"], said["feature"]))
        for cell in cells:
            if cell[1] not in (*FEATURES, REFUSED):
                raise pytest.UsageError(f"{item.nodeid} supports {cell[1]!r}; features are {[*FEATURES, REFUSED]}")
            self.cells[cell].append(item.nodeid)
            if said["note"]:
                self.notes[cell] = said["note"][0]
        return bool(cells)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.outcomes[report.nodeid] = report.outcome if report.when != "teardown" else "failed"

    @property
    def proved(self) -> set[Cell]:
        """The cells whose tests all passed."""
        return {cell for cell, tests in self.cells.items() if {self.outcomes.get(test) for test in tests} == {"passed"}}


def render(cells, notes) -> str:
    """The table that says yes in `cells`, with the notes of these."""
    families = sorted({family for family, feature in cells if feature != REFUSED}, key=str.casefold)
    footnotes = sorted({notes[cell] for cell in cells if cell in notes and cell[1] != REFUSED})
    lines = [["", *FEATURES], ["---"] * (1 + len(FEATURES))]
    for family in families:
        row = []
        for cell in ((family, feature) for feature in FEATURES):
            footnote = f" [^{1 + footnotes.index(notes[cell])}]" if cell in cells and cell in notes else ""
            row.append(f"yes{footnote}" if cell in cells else "")
        lines.append([family, *row])
    text = HEAD + _rows(lines) + "\n"
    text += "".join(f"[^{number}]: {note}\n" for number, note in enumerate(footnotes, start=1)) + "\n" * bool(footnotes)
    text += "".join(f"- **{feature}**: {what}\n" for feature, what in FEATURES.items())
    refused = sorted((family for family, feature in cells if feature == REFUSED), key=str.casefold)
    lines = [["refused by `trace`", "because"], ["---"] * 2]
    text += "\n" + _rows(lines + [[family, notes[family, REFUSED]] for family in refused])
    classes = [f"- {decision}: {', '.join(sorted(names.split()))}\n" for decision, names in DECISIONS.items()]
    return text + "\n" + CLASSES + "".join(classes)


def _rows(lines) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def read(text: str) -> set[Cell]:
    """The cells where a table says yes."""
    cells, head = set(), []
    for line in text.splitlines():
        if not line.startswith("|"):
            head = []
            continue
        family, *values = [value.strip() for value in line.strip("|").split("|")]
        if not head:
            head = values
        elif head == ["because"] and family != "---":
            cells.add((family, REFUSED))
        cells |= {(family, feature) for feature, value in zip(head, values, strict=True) if value.startswith("yes")}
    return cells


def main(argv=None) -> int:
    """The exit code: 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=[str(Path(__file__).parent)], help="files or folders of tests")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    marked = Marked()
    options = ["--collect-only", "-qq"] if arguments.check else ["-q"]
    code = pytest.main([*options, *arguments.tests], plugins=[marked])
    if arguments.check:
        different = read(arguments.table.read_text()) ^ set(marked.cells)
        if different:
            print(f"{arguments.table} and the marked tests differ in {sorted(different)}: run `make support-table`")
        return code or bool(different)
    if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):  # else they did not all run
        arguments.table.write_text(render(marked.proved, marked.notes))
    return code


if __name__ == "__main__":
    sys.exit(main())
