"""Texts as the denoiser sees them: token embeddings, and which tokens make which word."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float

PAD = "<pad>"  # the name of padding rows


class Word(NamedTuple):
    """A word of a text and the rows `start ... stop - 1` of its tokens."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class TokenEmbeddings:
    """The embeddings of a text's tokens, as cross-attention receives them (thesis: x, the columns of X').

    Attributes:
        values: (m, d_text) float tensor, the start token first and the end token last, where a tokenizer has them (then
            padding, if asked for).
        tokens: the m tokens, readable.
        words: the words they make, without the special tokens.
    """

    values: Float[torch.Tensor, "m d_text"]
    tokens: tuple[str, ...]
    words: tuple[Word, ...] = ()

    @classmethod
    def unnamed(cls, values: torch.Tensor) -> "TokenEmbeddings":
        """Embeddings whose text nobody knows; the tokens are numbered."""
        return cls(values, tuple(str(row) for row in range(len(values))))

    @classmethod
    def stored(cls, values: torch.Tensor, tokens: Sequence[str], words: Sequence[Sequence]) -> "TokenEmbeddings":
        """Of a file, whose header has lists in the place of tuples."""
        return cls(values, tuple(tokens), tuple(Word(*word) for word in words))

    @property
    def length(self) -> int:
        """Tokens from start to end token: the rows that are not padding."""
        return self.tokens.index(PAD) if PAD in self.tokens else len(self.tokens)

    def __getitem__(self, word: str) -> Float[torch.Tensor, "k d_text"]:
        """The embeddings of all tokens of a word, wherever it stands. ValueError, with the tokens, if it does not."""
        return self.values[find_word(word, self.words, self.tokens)]

    def to(self, device: torch.device) -> "TokenEmbeddings":
        """The same on `device`."""
        return TokenEmbeddings(self.values.to(device), self.tokens, self.words)

    def take(self, kept: torch.Tensor) -> "TokenEmbeddings":
        """Return the rows that a (m,) mask keeps; a word that loses a row is no word any more."""
        rows = [row for row, takes_part in enumerate(kept.tolist()) if takes_part]
        place = {row: number for number, row in enumerate(rows)}
        whole = [word for word in self.words if all(row in place for row in range(word.start, word.stop))]
        words = tuple(Word(word.text, place[word.start], place[word.stop - 1] + 1) for word in whole)
        return TokenEmbeddings(self.values[rows], tuple(self.tokens[row] for row in rows), words)

    def without_padding(self) -> "TokenEmbeddings":
        """The rows from start to end token."""
        return TokenEmbeddings(self.values[: self.length], self.tokens[: self.length], self.words)


def check_embeddings(
    embeddings: torch.Tensor | TokenEmbeddings, d_text: int, device: torch.device
) -> Float[torch.Tensor, "m d_text"]:
    """The (m, d_text) values on `device`, in float32 (float64 stays); TypeError or ValueError if they are not that."""
    values = embeddings.values if isinstance(embeddings, TokenEmbeddings) else embeddings
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        got = f"a tensor of {values.dtype}" if isinstance(values, torch.Tensor) else type(values).__name__
        raise TypeError(f"embeddings must be a floating-point tensor or TokenEmbeddings, got {got}")
    if values.ndim != 2 or values.shape[1] != d_text or not len(values):
        raise ValueError(f"expected embeddings of shape (m, {d_text}) for this model, got {tuple(values.shape)}")
    return values.to(device, torch.promote_types(values.dtype, torch.float32))


def require_text(text: Any) -> None:
    """TypeError unless it is a string."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}: {text!r}")


def find_word(word: str, words: Sequence[Word], tokens: Sequence[str]) -> list[int]:
    """The rows of all tokens of `word` (one word or several, as "traffic light"), wherever it stands in the text.

    Raises ValueError, listing the tokens there are, if it does not occur as whole words.
    """
    wanted = "".join(word.lower().split())
    rows: list[int] = []
    for first in range(len(words)):
        seen = ""
        for last in range(first, len(words)):
            seen += "".join(words[last].text.lower().split())
            if seen == wanted:
                rows.extend(range(words[first].start, words[last].stop))
            if len(seen) >= len(wanted):
                break
    if not rows or not wanted:
        raise ValueError(
            f"the word {word!r} is not in the text; its tokens are {list(tokens)}. Any other word can be evaluated by "
            "giving its own text: record.daam(text) or record.ldaam(text)"
        )
    return rows
