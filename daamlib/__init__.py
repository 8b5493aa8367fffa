"""Cross-attention of latent diffusion models, read as segmentation masks."""

from . import metrics as metrics
from .attention.calls import Trace as Trace
from .attention.heatmaps import HeatMaps as HeatMaps
from .attention.joint.record import JointRecord as JointRecord
from .attention.ldaam import LinearMap as LinearMap
from .attention.pictures import label_picture as label_picture
from .attention.pictures import overlay as overlay
from .attention.readers import encode as encode
from .attention.record import AttentionRecord as AttentionRecord
from .attention.record import require_same_model as require_same_model
from .attention.text import TokenEmbeddings as TokenEmbeddings
from .extras import lazy as _lazy
from .pipeline import generators as generators
from .pipeline import image_size as image_size
from .pipeline import load_pipeline as load_pipeline
from .tokens.choose import choose_settings as choose_settings
from .tokens.classes import fit_classes as fit_classes
from .tokens.label_maps import label_map as label_map
from .tokens.label_maps import text_of as text_of
from .tokens.label_maps import token_probabilities as token_probabilities
from .tokens.optimize import optimize_token as optimize_token
from .tokens.optimize import token_objective as token_objective
from .tokens.probe import optimize_probe as optimize_probe
from .tokens.token import OptimizedToken as OptimizedToken
from .tracing import trace as trace
from .tracing import trace_image as trace_image

__version__ = "0.2.0"

__getattr__ = _lazy(__name__, "datasets", "generate", "plots", "widgets")
