"""Run the notebooks headless and gather what they measured: ``python -m daamlib_lab.runs``."""

from daamlib.extras import needs

with needs("notebooks"):
    from .metrics import read_metrics as read_metrics
    from .metrics import write_metrics as write_metrics
    from .run import find_notebooks as find_notebooks
    from .run import main as main
    from .timing import milliseconds as milliseconds
