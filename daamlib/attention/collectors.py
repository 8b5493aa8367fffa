"""Collectors of one site while a pipeline call runs: of its queries, their sum, or the maps of known texts.

A collector takes every pass by `add` and returns what it stored of one image as fields of a `Layer` by `of_image`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .placement import bytes_of
from .softmax import summed_probabilities

MOST_PASSES = 128  # that room is made for at once


class Queries:
    """Queries of every pass, on `device`, which any later text can be read with.

    Room for all `passes` is made at the second, so that the first can be refused; later passes cost a copy.
    """

    def __init__(self, passes: int, device: torch.device | None = None):
        self._passes, self._device, self._done = passes, device, 0
        self._buffers: list[torch.Tensor] = []  # of each image, (step, h*w, channel), so that a record holds its own

    def add(self, queries: torch.Tensor) -> None:
        """Take one pass: (image, h*w, heads * d_head)."""
        if not self._buffers:
            self._buffers = [queries.new_empty((1, *queries.shape[1:]), device=self._device) for _ in queries]
        if self._done == len(self._buffers[0]):
            more = max(self._done, min(self._passes, MOST_PASSES) - self._done)
            self._buffers = [torch.cat([each, each.new_empty((more, *each.shape[1:]))]) for each in self._buffers]
        for buffer, of_image in zip(self._buffers, queries, strict=True):
            buffer[self._done] = of_image
        self._done += 1

    def of_image(self, image: int) -> dict[str, Any]:
        """Return (step, h*w, heads * d_head) queries."""
        buffer = self._buffers[image]
        # not the room of steps that did not come
        return {"queries": buffer if self._done == len(buffer) else buffer[: self._done].clone()}

    @property
    def nbytes(self) -> int:
        """Bytes of the steps made and expected."""
        return max(self._done, self._passes) * sum(buffer[0].nbytes for buffer in self._buffers)


class QuerySum:
    """The sum of the queries over the passes, enough for LDAAM."""

    def __init__(self, device: torch.device | None = None):
        self._device = device
        self._sums: list[torch.Tensor] = []  # of each image, (h*w, channel)

    def add(self, queries: torch.Tensor) -> None:
        """Take one pass: (image, h*w, heads * d_head)."""
        if not self._sums:
            self._sums = [torch.zeros_like(own, dtype=torch.float32, device=self._device) for own in queries]
        for total, of_image in zip(self._sums, queries, strict=True):
            total += of_image.to(total.device)

    def of_image(self, image: int) -> dict[str, Any]:
        """Return the (h*w, heads * d_head) float32 sum."""
        return {"query_sum": self._sums[image]}

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(total.nbytes for total in self._sums)


class OnlineMaps(QuerySum):
    """DAAM of texts that are known beforehand, and the sum of the queries: no query outlives its pass.

    `keys` are (heads, m, d_head), scaled, of each image and text.
    """

    def __init__(
        self, keys: Sequence[Sequence[torch.Tensor]], grid: tuple[int, int], device: torch.device | None = None
    ):
        super().__init__(device)
        self._keys, self._grid = keys, grid
        self._maps: list[dict[int, torch.Tensor]] = [{} for _ in keys]  # of each image, by the number of the text

    def add(self, queries: torch.Tensor) -> None:
        """Take one pass: (image, h*w, heads * d_head)."""
        super().add(queries)
        for of_image, maps, keys in zip(queries, self._maps, self._keys, strict=True):
            for text, of_text in enumerate(keys):
                summed = summed_probabilities(of_image[None], of_text).unflatten(1, self._grid)
                summed = summed.to(self._device or summed.device)
                maps[text] = maps[text] + summed if text in maps else summed

    def of_image(self, image: int) -> dict[str, Any]:
        """Return the sum and, of each text, (m, h, w) float32 maps."""
        return super().of_image(image) | {"maps": tuple(self._maps[image].values())}

    @property
    def nbytes(self) -> int:
        """Bytes of the sums and maps."""
        return super().nbytes + bytes_of(self._maps)


Collector = Queries | QuerySum  # `OnlineMaps` is the latter
