"""DAAM: the attention that the image's positions pay to each token of a text.

In cross-attention layer i, head l and denoising step t, with queries q = W_q h[x, y] of the image and keys k of the
text (thesis, slides "DAAM" and "Open-Vocabulary DAAM"; Tang et al. 2022, equations 4 to 6):

    D_k[x, y] = sum_i Up( sum_t sum_l softmax_k( q[t,i,l,x,y] . k[i,l] / sqrt(d_head) ) )

With the prompt's own keys this is DAAM, with those of any other text OV-DAAM (thesis: X').
"""

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float

from .heatmaps import upsample
from .layers import Layer
from .softmax import MAX_BYTES, summed_probabilities


def daam(
    layers: Sequence[Layer],
    embeddings: Float[torch.Tensor, "m d_text"],
    grid: tuple[int, int],
    max_bytes: int = MAX_BYTES,
) -> Float[torch.Tensor, "m height width"]:
    """Return D of the module's formula, (m, H, W), differentiable in the embeddings and in their type.

    The softmax is over exactly these m tokens. Every layer's maps are up-sampled to `grid`; `max_bytes` bounds the
    attention probabilities held at a time.
    """
    maps = []
    for layer in layers:
        assert layer.queries is not None
        summed = summed_probabilities(layer.queries, layer.keys(embeddings), max_bytes)
        maps.append(upsample(summed.unflatten(1, layer.grid), grid))
    return functools.reduce(torch.add, maps)


def summed_probabilities_plainly(
    queries: Float[torch.Tensor, "steps n channels"], keys: Float[torch.Tensor, "heads m d_head"]
) -> Float[torch.Tensor, "m n"]:
    """Return the inner sum of the formula as it is written, in memory for all steps at once; keys are scaled.

    `softmax.summed_probabilities` is its fast form; tests hold the two equal.
    """
    by_head = queries.to(keys.dtype).unflatten(2, (len(keys), -1))
    scores = torch.einsum("tnlc,lkc->tlkn", by_head, keys)  # step t, position n, head l, token k
    return scores.softmax(dim=2).sum(dim=(0, 1))
