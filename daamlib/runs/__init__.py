"""Run the notebooks headless and gather what they measured: ``python -m daamlib.runs``."""

from .run import find_notebooks as find_notebooks
from .run import main as main
from .run import write_metrics as write_metrics
