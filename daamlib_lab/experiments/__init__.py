"""The experiments of the thesis: its tables, networks trained on label maps (`segmentation`), controls (`sanity`)."""

from daamlib.extras import lazy as _lazy

from .tables import STORED_RUN as STORED_RUN
from .tables import TEXT as TEXT
from .tables import THESIS_TABLES as THESIS_TABLES
from .tables import TRAIN_IMAGES as TRAIN_IMAGES
from .tables import Comparison as Comparison
from .tables import Example as Example
from .tables import claims as claims
from .tables import compare as compare
from .tables import count as count
from .tables import difference as difference
from .tables import evaluate_transfer as evaluate_transfer
from .tables import fit as fit
from .tables import load_examples as load_examples
from .tables import refined_map as refined_map
from .tables import stored_results as stored_results
from .tables import stored_table as stored_table
from .tables import summary as summary
from .tables import thesis_values as thesis_values
from .tables import train_test_split as train_test_split
from .tables import with_thesis as with_thesis

__getattr__ = _lazy(__name__, "sanity", "segmentation", "stored")
