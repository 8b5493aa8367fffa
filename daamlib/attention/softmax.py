"""The sum of DAAM, computed in pieces: what makes `daam` fast and its memory bounded. `daam` says what it computes."""

import math

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .precision import without_autocast

MAX_BYTES = 2**26  # of attention probabilities held at a time
IN_CACHE = 2**21  # bytes of attention probabilities that a CPU works on at a time; chosen by trial
QUERIES_IN_CACHE = 3 * 2**20  # bytes of queries, likewise
SAFE_POWER = 64  # of two: sums of such powers and their reciprocals stay far inside the range of float32


@without_autocast
def summed_probabilities(queries: torch.Tensor, keys: torch.Tensor, max_bytes: int = MAX_BYTES) -> torch.Tensor:
    """Return (m, n) attention probabilities, summed over steps and heads, differentiably in the keys and in their type.

    Of (step, n, head * d_head) queries of any floating-point type and (head, m, d_head) keys, scaled by d_head ** -0.5;
    the softmax is over the m tokens. It works through the steps (and, if one step is too large, the positions) in
    pieces of `max_bytes` of probabilities, on a CPU in pieces that stay in its cache. With gradients, each piece is
    computed again in the backward pass.
    """
    differentiable = keys.requires_grad and torch.is_grad_enabled()
    in_cache = keys.device.type == "cpu" and not differentiable
    size = min(max_bytes, IN_CACHE) if in_cache else max_bytes
    positions = queries.shape[1]
    row_bytes = keys.shape[0] * keys.shape[1] * keys.element_size()  # of one position of one step
    rows = max(1, min(positions, size // row_bytes))
    steps = max(1, size // (row_bytes * positions))
    maps = []
    for start in range(0, positions, rows):
        total = keys.new_zeros(())
        for part in queries[:, start : start + rows].split(steps):
            if differentiable:
                total = total + checkpoint(_attend, part, keys, use_reentrant=False)
            else:
                total = total + (_attend_in_place if in_cache else _attend)(part, keys)
        maps.append(total)
    return torch.cat(maps, dim=1)


def _attend(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return (m, n) probabilities of (step, n, head * d_head) and (head, m, d_head), summed over steps and heads."""
    probabilities = torch.softmax(torch.bmm(keys, _columns(queries, keys)), dim=1)
    return probabilities.unflatten(2, (len(queries), -1)).sum(dim=(0, 2))


def _attend_in_place(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the same on a CPU, up to rounding, by passes over the scores that stay in the cache.

    Each head reads a part of the same few steps' queries. 2 ** (x / ln 2) is e ** x, in half the time. The largest
    score of a position is taken off only where a power of two would leave the range of float32 without it.
    """
    tokens = keys.shape[1]
    keys = F.pad(keys, (0, 0, 0, max(0, 4 - tokens)))  # matrix products with 4 rows are faster than with 2 or 3
    keys = keys / math.log(2)
    steps, positions, channels = queries.shape
    scores = keys.new_empty(*keys.shape[:2], steps * positions)
    few = max(1, QUERIES_IN_CACHE // (positions * channels * keys.element_size()))
    for part, out in zip(queries.split(few), scores.split(few * positions, dim=2), strict=True):
        torch.bmm(keys, _columns(part, keys), out=out)
    scores = scores[:, :tokens]
    low, high = scores.aminmax()
    if not max(-low, high) < SAFE_POWER:
        scores -= scores.amax(dim=1, keepdim=True)
    scores.exp2_()
    weights = scores.sum(dim=1, keepdim=True).reciprocal_()
    total = scores[0] * weights[0]
    for of_head, weight in zip(scores[1:], weights[1:], strict=True):
        total.addcmul_(of_head, weight)
    return total.unflatten(1, (steps, -1)).sum(dim=1)


def _columns(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return (head, d_head, step * n): products stand as (token, position), so that a softmax over few is fast too."""
    return queries.to(keys.dtype).flatten(0, 1).unflatten(1, (len(keys), -1)).permute(1, 2, 0)


def attention_error(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return how far the output of an attention is from softmax(q k) v, of the latter's largest value.

    q is (n, head, p, d_head), k and v are (n, head, m, d_head), the output (n, p, head * d_head), and the mask says of
    the first tokens which take part.
    """
    scores = queries.float() @ keys.float().transpose(2, 3) * scale
    if mask is not None:
        scores[..., : mask.shape[1]].masked_fill_(~mask[:, None, None], -torch.inf)
    expected = (scores.softmax(dim=3) @ values.float()).transpose(1, 2).flatten(2)
    return (output.float() - expected).abs().amax() / expected.abs().amax()
