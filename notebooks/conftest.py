"""How nbval compares the notebooks: printed text and values strictly; pictures, bars and stderr never."""

WIDGET = "application/vnd.jupyter.widget-view+json"


def pytest_collectstart(collector):
    if collector.path.suffix == ".ipynb":
        # nbval leaves out images by itself. stderr holds warnings of libraries, which no result depends on.
        collector.skip_compare += ("stderr",)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.suffix == ".ipynb":
            item.compare_outputs = without_widgets(item.compare_outputs)


def without_widgets(compare):
    """Wrap nbval's comparison so that it sees no widgets, such as bars of tqdm, which differ run by run."""

    def visible(outputs):
        return [output for output in outputs if WIDGET not in output.get("data", {})]

    return lambda test, reference: compare(visible(test), visible(reference))
