"""The names of the tokens of texts, also of texts that several encoders read."""

from collections.abc import Sequence
from typing import Any

import torch

from ..text import PAD, TokenEmbeddings, Word, read_tokens

Names = tuple[tuple[str, ...], tuple[Word, ...]]  # tokens, and the words they make


def clip_names(tokenizer: Any, text: str, length: int) -> Names:
    """The tokens of CLIP's tokenizer, start token first, cut at `length`."""
    return read_tokens(tokenizer, tokenizer(text, truncation=True, max_length=length).input_ids)


def piece_names(tokenizer: Any, ids: Sequence[int], *, mark: str, end: str) -> Names:
    """The tokens `ids` of a tokenizer that marks the first token of a word, as T5's and Qwen's do.

    Args:
        tokenizer: its own.
        ids: of a text.
        mark: what a word's first token begins with; punctuation is a word of its own.
        end: the token that ends the text; what follows it belongs to no word.

    Returns:
        The tokens without the mark, and the words.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    stop = pieces.index(end) if end in pieces else len(pieces)
    bare = [piece.removeprefix(mark) for piece in pieces]

    def punctuation(i: int) -> bool:
        return bool(bare[i]) and not any(letter.isalnum() for letter in bare[i])

    starts = [i for i in range(stop) if i == 0 or pieces[i].startswith(mark) or punctuation(i) or punctuation(i - 1)]
    spans = zip(starts, [*starts, stop][1:], strict=True)
    words = [Word(tokenizer.decode(list(ids[start:after])).strip(), start, after) for start, after in spans]
    return tuple(bare), tuple(word for word in words if word.text)


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


def rows_of_text(embeddings: TokenEmbeddings) -> list[int]:
    """The rows that are not padding, which stands after each encoder's tokens."""
    return [row for row, token in enumerate(embeddings.tokens) if token != PAD]


def without_padding(embeddings: TokenEmbeddings) -> TokenEmbeddings:
    """The rows that are not padding, with their words."""
    rows = rows_of_text(embeddings)
    place = {row: number for number, row in enumerate(rows)}
    words = tuple(Word(word.text, place[word.start], place[word.stop - 1] + 1) for word in embeddings.words)
    return TokenEmbeddings(embeddings.values[rows], tuple(embeddings.tokens[row] for row in rows), words)


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
