"""Training of the bundled model and its annotator; nothing else in the package imports it."""

from daamlib.extras import needs

with needs("training"):
    import accelerate  # noqa: F401
    import torchmetrics  # noqa: F401
