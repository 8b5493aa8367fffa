"""Widgets for notebooks: look for a word's map by hand, and draw masks by hand.

    explorer = explore(record, image, mask)                           # turn the knobs ...
    explorer.state, explorer.result.mask                              # ... and go on with the result
    annotate(images, ["car", "person"], "masks")                      # draw ...
    datasets.import_masks(dataset, "masks/labels")                    # ... and use the masks as labels

Each is a view of a model without any view (`explorer_model`, `session`), which scripts can use alone.
"""

from ..extras import needs

with needs("widgets"):
    from .annotator import Annotator as Annotator
    from .annotator import annotate as annotate
    from .explorer import Explorer as Explorer
    from .explorer import explore as explore
