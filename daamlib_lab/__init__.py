"""The laboratory of the notebooks: drawn streets, the thesis' experiments, diagrams and the headless runner."""

from daamlib.extras import lazy as _lazy

__getattr__ = _lazy(__name__, "diagrams", "experiments", "runs", "urban")
