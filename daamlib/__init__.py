"""Cross-attention of latent diffusion models, read as segmentation masks."""

from . import metrics as metrics
from .heatmaps import HeatMaps as HeatMaps
from .linear import LinearMap as LinearMap
from .optimize import optimize_token as optimize_token
from .optimized import OptimizedToken as OptimizedToken
from .pipeline import load_pipeline as load_pipeline
from .real import trace_image as trace_image
from .record import AttentionRecord as AttentionRecord
from .record import require_same_model as require_same_model
from .text import TokenEmbeddings as TokenEmbeddings
from .trace import Trace as Trace
from .trace import trace as trace

__version__ = "0.1.0"
