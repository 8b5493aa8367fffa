"""Sets of images with label maps: generated ones, and rendered scenes whose labels are exact.

    labeller = TokenLabeller((car, person))  # or AnnotatorLabeller(labels_for(pipe)), of daamlib_lab.urban.annotator
    dataset = generate(pipe, urban_prompts(200), "dataset", labeller=labeller)
    dataset = load("dataset")
    for i in dataset.with_class("car"):
        dataset.image(i), dataset.mask(i, "car")

Any of it can be killed at any moment and is finished by the same call again. `run_shards` and the command
``python -m daamlib.generate`` do the same with many workers.
"""

from ..cityscapes import MIN_AREA as MIN_AREA
from ..extras import lazy as _lazy
from .dataset import Dataset as Dataset
from .dataset import load as load
from .dataset import names as names
from .generation import generate as generate
from .generation import weight_hash as weight_hash
from .labelling import AnnotatorLabeller as AnnotatorLabeller
from .labelling import Labeller as Labeller
from .labelling import TokenLabeller as TokenLabeller
from .labelling import WordLabeller as WordLabeller
from .masks import check_masks as check_masks
from .masks import import_masks as import_masks
from .prompts import urban_prompts as urban_prompts
from .workers import Job as Job
from .workers import WorkerError as WorkerError
from .workers import run_shards as run_shards

__getattr__ = _lazy(__name__, "export")
