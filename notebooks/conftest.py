"""How nbval compares the notebooks: text exactly, numbers nearly; pictures, bars and stderr never.

Two processors round alike in all but the last digits, so a number with decimals may lie `UNITS` units of the last
stored digit beside the stored one. A cell whose numbers need more says so, with the reason:

    # tolerance 0.8: a few of the annotator's pixels change sides

Whole numbers (counts, shapes, seeds) are equal everywhere, and so is every word, line and row.
"""

import copy
import functools
import re
from collections import defaultdict

UNITS = 3
WIDGET = "application/vnd.jupyter.widget-view+json"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.(\d+))?(?:e([-+]?\d+))?(?![\w.]*\w)")
TOLERANCE = re.compile(r"^# tolerance (\d+(?:\.\d+)?): (\S.*)$", re.MULTILINE)


def pytest_collectstart(collector):
    if collector.path.suffix == ".ipynb":
        # nbval leaves out images by itself. stderr holds warnings of libraries, which no result depends on.
        collector.skip_compare += ("stderr",)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.suffix == ".ipynb":
            item.compare_outputs = functools.partial(compare, item, item.compare_outputs)


def compare(item, nbval_compare, test, reference):
    """nbval's own comparison, of outputs in which every number near enough to the stored one is replaced by it."""
    declared = TOLERANCE.search(item.cell.source)
    tolerance = float(declared[1]) if declared else 0.0
    test, reference = (copy.deepcopy(visible(outputs)) for outputs in (test, reference))
    stored = defaultdict(list)
    for output in reference:
        for name, fields, key in texts(output):
            fields[key] = item.sanitize(fields[key])
            stored[name].append(fields[key])
    for output in test:
        for name, fields, key in texts(output):
            fields[key] = item.sanitize(fields[key])
            if stored[name]:  # else an output too many, which nbval reports
                fields[key] = settle(fields[key], stored[name].pop(0), tolerance)
    return nbval_compare(test, reference)


def visible(outputs):
    """The outputs without widgets, such as bars of tqdm, which differ run by run."""
    return [output for output in outputs if WIDGET not in output.get("data", {})]


def texts(output):
    """(stream or MIME type, dict, key in it) of each text of an output."""
    if "data" in output:
        yield from ((mime, output["data"], mime) for mime in output["data"] if mime.startswith("text/"))
    elif "text" in output:
        yield output["name"], output, "text"


def settle(text, stored, tolerance):
    """`stored` with the numbers of `text` where they differ by too much; `text` itself where the words differ."""
    if words(text) != words(stored):
        return text
    numbers = NUMBER.finditer(text)

    def settled(old):
        new = next(numbers)
        return old[0] if near(new, old, tolerance) else new[0]

    return NUMBER.sub(settled, stored)


def words(text):
    """A text without its numbers; the width of a column may change with them."""
    return re.sub(" +", " ", NUMBER.sub("\0", text))


def near(new, old, tolerance):
    decimals, exponent = old[1], old[2]
    whole = decimals is None and exponent is None
    if whole or (new[1] is None) != (decimals is None):
        return new[0] == old[0]
    unit = 10.0 ** (int(exponent or 0) - len(decimals or ""))
    return abs(float(new[0]) - float(old[0])) <= max(UNITS * unit, tolerance) * (1 + 1e-9)
