"""The image's self-attention, and the propagation of maps along it.

In self-attention layer i, head l and step t the image's positions attend to one another. With its queries q and keys k,

    A = mean over i, l, t of softmax(q k^T / sqrt(d_head)),        (n, n), every row sums to one

and A M averages a map M over what each position attends to: parts of one object share their values (DiffSegmenter,
Wang et al. 2023; Dataset Diffusion, Nguyen et al. 2023). The matrix of a head is never stored: M is the VALUE of an
attention with these queries and keys, or A is accumulated as one running mean.

A linear attention (Xie et al. 2024, arXiv:2410.10629, equation 2) has relu(q) relu(k)^T, divided by the sums of its
rows, in the place of the softmax. A position whose relu(q) is zero attends to nothing: its row of A is zero.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch.nn import functional as F

from .heatmaps import upsample
from .placement import bytes_of
from .precision import without_autocast

LARGEST = 32 * 32  # positions of the grid that is read: the largest one of the model with no more
LATE = 0.5  # part of the noise schedule: self-attention follows the objects' outlines in the later half of denoising
STORED_PASSES = 8  # whose queries and keys are stored, evenly spaced


@dataclass(frozen=True, eq=False)
class SelfAttention:
    """One image's self-attention, of the layers of one grid: queries and keys of layers and steps, or their mean A."""

    grid: tuple[int, int]  # (h, w), n positions
    heads: int
    scale: float  # d_head ** -0.5
    queries: Float[torch.Tensor, "passes positions channels"] | None = None
    keys: Float[torch.Tensor, "passes positions channels"] | None = None
    mean: Float[torch.Tensor, "positions positions"] | None = None  # float32
    linear: bool = False  # whether it is a linear attention

    @without_autocast
    def propagate(self, maps: Float[torch.Tensor, "m positions"]) -> Float[torch.Tensor, "m positions"]:
        """Return A M for each map M: (m, n) -> (m, n), differentiable in the maps."""
        if self.mean is not None:
            return maps @ self.mean.to(maps).T
        assert self.queries is not None and self.keys is not None
        width = self.queries.shape[2] // self.heads
        # as wide as the queries: the fast kernels of PyTorch take no others
        values = F.pad(maps.T, (0, max(0, width - len(maps)))).expand(1, self.heads, -1, -1)  # (1, head, n, m or more)
        means = []
        for pair in zip(self.queries, self.keys, strict=True):
            q, k = (part.to(maps.dtype).unflatten(1, (self.heads, -1)).transpose(0, 1)[None] for part in pair)
            if self.linear:
                means.append(_linear_attention(q, k, values).mean(dim=1)[0])
            else:
                means.append(F.scaled_dot_product_attention(q, k, values, scale=self.scale).mean(dim=1)[0])
        return (functools.reduce(torch.add, means) / len(means)).T[: len(maps)]

    def refine(self, maps: Float[torch.Tensor, "m height width"], iterations: int) -> torch.Tensor:
        """Return (m, H, W) maps propagated so often on this grid. ValueError if the attention is not finite."""
        refined = F.adaptive_avg_pool2d(maps[None], self.grid)[0].flatten(1)
        for _ in range(iterations):
            refined = self.propagate(refined)
        if not refined.isfinite().all() and maps.isfinite().all():
            raise ValueError("the self-attention holds NaN or infinite values: generate in bfloat16 or float32")
        return upsample(refined.unflatten(1, self.grid), (maps.shape[1], maps.shape[2]))

    @property
    def nbytes(self) -> int:
        """Bytes of the queries and keys, or of the mean."""
        return bytes_of(self)


class SelfAttentionCollector:
    """Collects what `SelfAttention` holds of one layer while a call runs.

    That is the running mean of A (`mean`), or the queries and keys of some passes, on `device` (None: where they are
    made). Passes of the noisier half are passed over, unless there are no others: then the last one counts.
    """

    def __init__(
        self, heads: int, scale: float, *, mean: bool, linear: bool = False, device: torch.device | None = None
    ):
        self._heads, self._scale, self._mean, self._linear, self._device = heads, scale, mean, linear, device
        self.stored: list[Any] = []  # of each pass (image, n, n), or (2, image, n, heads * d_head)
        self._late, self._stride = 0, 1

    def add(self, queries: torch.Tensor, keys: torch.Tensor, *, late: bool) -> None:
        """Take one pass: both (image, n, heads * d_head); late: of the less noisy half."""
        if late and not self._late:
            self.stored = []
        self._late += late
        if not late and self._late:
            return
        if not late:
            self.stored = [self._of_pass(queries, keys)]
        elif self._mean:
            before = self.stored[0] * ((self._late - 1) / self._late) if self.stored else 0.0
            self.stored = [before + self._of_pass(queries, keys) / self._late]
        elif (self._late - 1) % self._stride == 0:
            self.stored.append(self._of_pass(queries, keys))
            if len(self.stored) > STORED_PASSES:
                self.stored, self._stride = self.stored[::2], 2 * self._stride

    @without_autocast
    def _of_pass(self, queries: torch.Tensor, keys: torch.Tensor) -> Any:
        device = self._device or queries.device
        if not self._mean:
            return torch.stack([queries, keys]).to(device)
        total = queries.new_zeros(len(queries), queries.shape[1], queries.shape[1], dtype=torch.float32)
        by_head = [part.unflatten(2, (self._heads, -1)).unbind(dim=2) for part in (queries, keys)]
        for q, k in zip(*by_head, strict=True):  # one head at a time
            if self._linear:
                total += _linear_attention(q.float(), k.float(), torch.eye(q.shape[1], device=q.device))
            else:
                total += torch.softmax((q.float() @ k.float().transpose(1, 2)) * self._scale, dim=-1)
        return (total / self._heads).to(device)

    def of_image(self, image: int) -> torch.Tensor:
        """Return (1, n, n) of the image, or its (pass, 2, n, heads * d_head) queries and keys."""
        return self.stored[0][image, None] if self._mean else torch.stack([each[:, image] for each in self.stored])


class SelfAttentions:
    """The self-attentions of one call, of the largest grid with no more than `LARGEST` positions."""

    def __init__(self, mean: bool = False, device: torch.device | None = None):
        self._mean, self._device = mean, device
        self.collectors: dict[str, SelfAttentionCollector] = {}  # by the attention's name
        self.queries: dict[str, torch.Tensor] = {}  # of the pass under way, whose keys are about to come
        self._sites: dict[str, tuple[Any, int]] = {}  # the attention and the number of its positions

    def see_keys(self, site: Any, keys: torch.Tensor, rows: Any, *, first: bool, late: bool) -> None:
        """Take the (batch, n, channels) keys of a `Site` in a pass, the first of the call or a later one."""
        queries, positions = self.queries.pop(site.name, None), keys.shape[1]
        if queries is None or positions > LARGEST or not (first or positions == self._largest):
            return
        if site.name not in self.collectors:
            self._sites[site.name] = site, positions
            self.collectors[site.name] = SelfAttentionCollector(
                site.heads, site.scale, linear=site.linear, mean=self._mean, device=self._device
            )
        self.collectors[site.name].add(queries[rows].clone(), keys[rows].clone(), late=late)

    @property
    def _largest(self) -> int:
        return max((positions for _, positions in self._sites.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return bytes_of([collector.stored for collector in self.collectors.values()])

    def expected(self, passes: int) -> int:
        """Return the bytes that come on top after the first of so many passes."""
        return 0 if self._mean else self.nbytes * (min(passes, STORED_PASSES) - 1)

    def of_image(self, image: int, grid: Callable[[int], tuple[int, int]]) -> SelfAttention | None:
        """Return the self-attention of an image, None if nothing was read; `grid` is that of a number of positions."""
        largest = self._largest
        sites = [site for site, positions in self._sites.values() if positions == largest]
        if not sites:
            return None
        stored, site = torch.cat([self.collectors[each.name].of_image(image) for each in sites]), sites[0]
        parts = {"mean": stored.mean(dim=0)} if stored.ndim == 3 else {"queries": stored[:, 0], "keys": stored[:, 1]}
        return SelfAttention(grid(largest), site.heads, site.scale, linear=site.linear, **parts)


def _linear_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return (..., n, m) values that each position attends to, of (..., n, d_head) queries and keys and such values."""
    queries, keys = F.relu(queries), F.relu(keys)
    totals = queries @ keys.sum(dim=-2).unsqueeze(-1)
    return queries @ (keys.transpose(-2, -1) @ values) / totals.clamp(min=torch.finfo(totals.dtype).tiny)
