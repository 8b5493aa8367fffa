"""Sets of images with label maps: generated ones, and rendered scenes whose labels are exact.

    prompts = urban_prompts(200)
    dataset = generate(pipe, prompts, "dataset", labels=labels_for(pipe))  # of daamlib.urban.annotator
    dataset = load("dataset")
    for i in dataset.with_class("car"):
        dataset.image(i), dataset.mask(i, "car")

Any of it can be killed at any moment and is finished by the same call again.
"""

from .build import add_labels as add_labels
from .build import check_masks as check_masks
from .build import generate as generate
from .build import import_masks as import_masks
from .build import load as load
from .build import render as render
from .build import urban_prompts as urban_prompts
from .dataset import CLASSES as CLASSES
from .dataset import MIN_AREA as MIN_AREA
from .dataset import Dataset as Dataset
from .drawing import weight_hash as weight_hash
