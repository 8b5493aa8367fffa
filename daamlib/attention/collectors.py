"""What is kept of one site while one pipeline call runs: its queries, their sum, or the maps of known texts.

A collector is told of every pass by `add` and gives what it kept of one image as fields of a `Layer` by `kept`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from .softmax import summed_probabilities


class Collector(Protocol):
    """See the module."""

    def add(self, queries: torch.Tensor) -> None:
        """Take one pass: (image, h*w, heads * d_head)."""

    def kept(self, image: int) -> dict[str, Any]:
        """The fields of the image's `Layer`, after the last pass."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


class Queries:
    """Every pass's queries, which any later text can be read with.

    Args:
        passes: how many are expected; more make the buffer grow.
        device: where they are kept; None: where they are made.
    """

    def __init__(self, passes: int, device: torch.device | None = None):
        self._passes, self._device, self._done = passes, device, 0
        self._buffer: torch.Tensor | None = None  # (image, step, h*w, channel)

    def add(self, queries: torch.Tensor) -> None:
        """Take one pass: (image, h*w, heads * d_head)."""
        if self._buffer is None:
            self._buffer = queries.new_empty((len(queries), self._passes, *queries.shape[1:]), device=self._device)
        if self._done == self._buffer.shape[1]:
            self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)], dim=1)
        self._buffer[:, self._done] = queries
        self._done += 1

    def kept(self, image: int) -> dict[str, Any]:
        """(step, h*w, heads * d_head)."""
        assert self._buffer is not None  # there was a pass
        if self._done < self._buffer.shape[1]:  # the room of steps that did not come
            self._buffer = self._buffer[:, : self._done].clone()
        return {"queries": self._buffer[image]}

    @property
    def nbytes(self) -> int:
        """Bytes of the steps made and expected."""
        return 0 if self._buffer is None else self._buffer.nbytes


class QuerySum:
    """The sum of the queries over the passes, enough for LDAAM."""

    def __init__(self, device: torch.device | None = None):
        self._device = device
        self._sum: torch.Tensor | None = None  # (image, h*w, channel)

    def add(self, queries: torch.Tensor) -> None:
        """Take one pass: (image, h*w, heads * d_head)."""
        if self._sum is None:
            self._sum = queries.new_zeros(queries.shape, dtype=torch.float32, device=self._device)
        self._sum += queries.to(self._sum.device)

    def kept(self, image: int) -> dict[str, Any]:
        """(h*w, heads * d_head) float32."""
        assert self._sum is not None  # there was a pass
        return {"query_sum": self._sum[image]}

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return 0 if self._sum is None else self._sum.nbytes


class OnlineMaps(QuerySum):
    """DAAM of texts that are known beforehand, and the sum of the queries: no query outlives its pass.

    Args:
        keys: for each image and text (None: its prompt) the keys (heads, m, d_head), scaled.
        grid: (h, w).
        device: where the maps and sums are kept; None: where they are made.
    """

    def __init__(
        self,
        keys: Sequence[Mapping[str | None, torch.Tensor]],
        grid: tuple[int, int],
        device: torch.device | None = None,
    ):
        super().__init__(device)
        self._keys, self._grid = keys, grid
        self._maps: list[dict[str | None, torch.Tensor]] = [{} for _ in keys]

    def add(self, queries: torch.Tensor) -> None:
        """Take one pass: (image, h*w, heads * d_head)."""
        super().add(queries)
        for of_image, maps, keys in zip(queries, self._maps, self._keys, strict=True):
            for text, of_text in keys.items():
                summed = summed_probabilities(of_image[None], of_text).unflatten(1, self._grid)
                summed = summed.to(self._device or summed.device)
                maps[text] = maps[text] + summed if text in maps else summed

    def kept(self, image: int) -> dict[str, Any]:
        """(h*w, heads * d_head) float32 and, by text, (m, h, w) float32."""
        return super().kept(image) | {"maps": self._maps[image]}

    @property
    def nbytes(self) -> int:
        """Bytes of the sums and maps."""
        maps = [tensor for of_image in self._maps for tensor in of_image.values()]
        return super().nbytes + sum(tensor.nbytes for tensor in maps)
