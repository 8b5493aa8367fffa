"""The names of the tokens of texts, also of texts that several encoders read."""

from collections.abc import Sequence

import torch

from ..readers.words import Names
from ..text import PAD, TokenEmbeddings, Word


def side_by_side(parts: Sequence[tuple[Names, int]]) -> Names:
    """The tokens of texts that stand one after the other, each padded to its length."""
    tokens: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()
    for (of_part, words_of_part), length in parts:
        at = len(tokens)
        fitting = [word for word in words_of_part if word.stop <= length]
        words += tuple(Word(word.text, word.start + at, word.stop + at) for word in fitting)
        tokens += (of_part + (PAD,) * length)[:length]
    return tokens, words


def one_after_another(embeddings: Sequence[TokenEmbeddings], words: Sequence[str]) -> TokenEmbeddings:
    """The word tokens (no special ones) of each text, side by side; `words` names the texts, one Word each.

    Raises ValueError for a text without a word.
    """
    values: list[torch.Tensor] = []
    tokens: list[str] = []
    named: list[Word] = []
    for word, text in zip(words, embeddings, strict=True):
        rows = [row for part in text.words for row in range(part.start, part.stop)]
        if not rows:
            raise ValueError(f"{word!r} has no word in it: its tokens are {list(text.tokens)}")
        values.append(text.values[rows])
        named.append(Word(word, len(tokens), len(tokens) + len(rows)))
        tokens.extend(text.tokens[row] for row in rows)
    return TokenEmbeddings(torch.cat(values), tuple(tokens), tuple(named))


def averages(embeddings: TokenEmbeddings) -> torch.Tensor:
    """(words, tokens): the matrix that averages the rows of each word."""
    matrix = torch.zeros(len(embeddings.words), len(embeddings.tokens))
    for row, word in enumerate(embeddings.words):
        matrix[row, word.start : word.stop] = 1 / (word.stop - word.start)
    return matrix
