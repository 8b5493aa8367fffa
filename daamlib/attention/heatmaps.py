"""Heat maps: one map per token, looked up by word."""

from dataclasses import dataclass, replace
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch.nn import functional as F

from .text import Word, find_word


@dataclass(frozen=True, eq=False)
class HeatMaps:
    """Attention heat maps of a text's tokens.

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
        """(m, H, W) maps of a text that nobody knows; the tokens are numbered."""
        return cls(values, tuple(str(row) for row in range(len(values))))

    @classmethod
    def of_words(cls, values: torch.Tensor, words: tuple[str, ...]) -> "HeatMaps":
        """(K, H, W) maps that are looked up by `words`, one row each."""
        return cls(values, words, tuple(Word(word, row, row + 1) for row, word in enumerate(words)))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, word: str | SupportsIndex) -> Float[torch.Tensor, "height width"]:
        """The (H, W) map of a word, or of one row by its number.

        The tokens of a word, and of all its occurrences, are averaged. Raises ValueError, listing the tokens, for a
        word that is not in the text.
        """
        if isinstance(word, str):
            return self.values[find_word(word, self.words, self.tokens)].mean(dim=0)
        if not hasattr(word, "__index__"):
            raise TypeError(f"look a map up by a word or a row number, got {type(word).__name__}")
        return self.values[word.__index__()]

    def resize(self, height: int, width: int) -> "HeatMaps":
        """New maps of (height, width), bilinear (`align_corners=False`)."""
        if min(height, width) < 1:
            raise ValueError(f"height and width must be positive, got {height} x {width}")
        return replace(self, values=upsample(self.values, (height, width)))

    def normalized(self) -> "HeatMaps":
        """New maps, each scaled to its own [0, 1] (min-max); a constant map becomes zero."""
        return replace(self, values=normalize(self.values))

    def __repr__(self) -> str:
        return f"HeatMaps({tuple(self.values.shape)}, tokens={list(self.tokens)})"


def upsample(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(m, h, w) -> (m, *size), bilinear with `align_corners=False`; the same tensor if it has that size."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def normalize(
    maps: Float[torch.Tensor, "m height width"],
) -> Float[torch.Tensor, "m height width"]:
    """(m, H, W) maps, each scaled to its own [0, 1] (min-max); a constant map becomes zero."""
    low = maps.amin(dim=(1, 2), keepdim=True)
    span = maps.amax(dim=(1, 2), keepdim=True) - low
    return (maps - low) / span.where(span > 0, torch.ones_like(span))
