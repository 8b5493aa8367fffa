"""The readers: which attentions of a model can be read, and what a call of its denoiser means.

A reader is the one place that knows a model family, one module each. It offers

- `denoiser`: the module whose calls are the denoising passes;
- `sites`: its cross-attentions that can be read, and `self_sites`: self-attentions whose mean refines maps;
- `read`: the latents, the noise level and the text of one pass;
- `grid`: the (h, w) of a site's positions;
- `encode` and `name_tokens`: a text as this family embeds it;
- `denoise`: one pass on latents of our own.
"""

from typing import Any

from ..fingerprint import Fingerprint
from .unet import UNetReader


def reader_of(pipe: Any, *, middle: bool = False) -> UNetReader:
    """The reader of a pipeline's model family. TypeError for a pipeline of none."""
    return UNetReader(pipe, middle=middle)


def fingerprint_of(pipe: Any, *, middle: bool = False) -> Fingerprint:
    """The fingerprint of a pipeline as it is now. TypeError or ValueError for a pipeline that cannot be read."""
    return reader_of(pipe, middle=middle).fingerprint()
