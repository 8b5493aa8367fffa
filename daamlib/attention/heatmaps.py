"""Heat maps: one map per token, looked up by word."""

from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch.nn import functional as F

from .text import TokenEmbeddings, Word, rows_of


@dataclass(frozen=True, eq=False)
class HeatMaps:
    """Attention heat maps of a text's tokens.

        maps = record.daam()
        maps["car"], maps["car", 0], maps[2]  # each (H, W)

    Attributes:
        values: (m, H, W) float32, unnormalised sums over steps, layers and heads (thesis: D_k[x, y] or LD(x)[x, y]).
        tokens: m names, the start token first and the end token last.
        words: the words the tokens make.
    """

    values: Float[torch.Tensor, "m height width"]
    tokens: tuple[str, ...]
    words: tuple[Word, ...] = ()

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or len(self.values) != len(self.tokens):
            raise ValueError(f"expected (m, H, W) maps of {len(self.tokens)} tokens, got {tuple(self.values.shape)}")

    @classmethod
    def unnamed(cls, values: torch.Tensor) -> "HeatMaps":
        """Return (m, H, W) maps of a text that is unknown; the tokens are numbered."""
        return cls(values, tuple(str(row) for row in range(len(values))))

    @classmethod
    def of(cls, values: torch.Tensor, embeddings: torch.Tensor | TokenEmbeddings) -> "HeatMaps":
        """Return (m, H, W) maps with the tokens and words of their embeddings; those of bare tensors are numbered."""
        if isinstance(embeddings, TokenEmbeddings):
            return cls(values, embeddings.tokens, embeddings.words)
        return cls.unnamed(values)

    @classmethod
    def of_words(cls, values: torch.Tensor, words: tuple[str, ...]) -> "HeatMaps":
        """Return (K, H, W) maps that are looked up by `words`, one row each."""
        return cls(values, words, tuple(Word(word, row, row + 1) for row, word in enumerate(words)))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, word: str | tuple[str, int] | SupportsIndex) -> Float[torch.Tensor, "height width"]:
        """Return the (H, W) map of a word, the mean over its tokens, of one of its occurrences, or of one row.

        Raises ValueError, listing the tokens, for a word that is not in the text, or not so often.
        """
        if isinstance(word, str | tuple):
            return self.values[rows_of(word, self.words, self.tokens)].mean(dim=0)
        if not hasattr(word, "__index__"):
            raise TypeError(f"look a map up by a word or a row number, got {type(word).__name__}")
        return self.values[word.__index__()]

    def to(self, device: str | torch.device) -> "HeatMaps":
        """Return the maps on `device`, such as "cpu"."""
        return replace(self, values=self.values.to(device))

    def numpy(self) -> Float[np.ndarray, "m height width"]:
        """Return a copy of the values as a NumPy array, wherever they lie."""
        return self.values.detach().cpu().numpy().copy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return what `np.asarray(maps)` is."""
        return self.numpy().astype(dtype or np.float32, copy=False)

    def resize(self, height: int, width: int) -> "HeatMaps":
        """Return new maps of (height, width), bilinear (`align_corners=False`)."""
        if min(height, width) < 1:
            raise ValueError(f"height and width must be positive, got {height} x {width}")
        resized = upsample(self.values, (height, width))
        return replace(self, values=resized.clone() if resized is self.values else resized)

    def normalized(self) -> "HeatMaps":
        """Return new maps, each scaled to its own [0, 1] (min-max); a constant map becomes zero."""
        return replace(self, values=normalize(self.values))

    def __repr__(self) -> str:
        return f"HeatMaps({tuple(self.values.shape)}, tokens={list(self.tokens)})"


def upsample(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (m, h, w) maps to (m, *size), bilinear with `align_corners=False`; the same tensor if it has that size."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def require_ratio(name: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    """ValueError for a (height, width) whose ratio is not that of an (h, w) grid, up to rounding by one cell."""
    (height, width), (h, w) = size, grid
    if not (h - 1) * width < height * w or not height * (w - 1) < h * width:
        raise ValueError(
            f"{name} is {height} x {width}, the image's maps are {h} x {w}: their ratios of height and width differ, "
            "so that it would be stretched. Give it at the image's size, or cropped and padded as the image was"
        )


def normalize(maps: Float[torch.Tensor, "m height width"]) -> Float[torch.Tensor, "m height width"]:
    """Scale each of (m, H, W) maps to its own [0, 1] (min-max); a constant map becomes zero."""
    low = maps.amin(dim=(1, 2), keepdim=True)
    span = maps.amax(dim=(1, 2), keepdim=True) - low
    return (maps - low) / span.where(span > 0, torch.ones_like(span))
