"""Tokens of texts, and which of them make which word: by where a tokenizer marks the words."""

from collections.abc import Sequence
from typing import Any

from ..text import Word

SPACE = "\u2581"  # sentencepiece's mark of a space
BYTE_SPACE = "\u0120"  # that of byte-level BPE
PART = "\ufffd"  # what a piece decodes to that is a part of a character's bytes

Names = tuple[tuple[str, ...], tuple[Word, ...]]  # readable tokens, and the words they make


def token_ids(tokenizer: Any, text: str, length: int) -> list[int]:
    """The ids of a text's tokens, special ones included, cut at `length`."""
    return tokenizer(text, truncation=True, max_length=length).input_ids


def read_tokens(tokenizer: Any, ids: Sequence[int]) -> Names:
    """Tokens of a tokenizer that marks the last one of a word, as CLIP's (start token first), up to the end token."""
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    end = next((i for i, id_ in enumerate(ids) if i and id_ == tokenizer.eos_token_id), len(raw))
    words, start = [], 1
    for i in range(1, end):
        # a token without the mark goes on in the next
        if raw[i].endswith("</w>") or i + 1 == end or ids[i] in tokenizer.all_special_ids:
            words.append(Word(tokenizer.decode(list(ids[start : i + 1])).strip(), start, i + 1))
            start = i + 1
    return tuple(token.removesuffix("</w>") for token in raw), tuple(words)


def read_pieces(
    tokenizer: Any, ids: Sequence[int], start: int = 0, *, mark: str = SPACE, end: str | None = None
) -> Names:
    """Tokens of a tokenizer that marks the first one of a word, as those of T5, Gemma and Qwen.

    A word begins at the mark, and where letters and digits meet other signs: "car..." is two words. Special tokens and
    line breaks belong to no word. A token that was added to the tokenizer, as by textual inversion, is a word together
    with those of its further vectors: <toy>, <toy>_1.

    Args:
        tokenizer: its own.
        ids: of a text.
        start: the row of the text's own first token.
        mark: of a space.
        end: the token that ends the text, where more tokens follow, which belong to no word.

    Returns:
        All tokens without the mark, and the words.
    """
    raw, special = tokenizer.convert_ids_to_tokens(list(ids)), set(tokenizer.all_special_ids)
    stop, added = raw.index(end) if end in raw else len(raw), set(tokenizer.get_added_vocab().values())
    words: list[Word] = []
    first, seen = start, ""  # of the word under way

    def finish(row: int) -> None:
        if seen and ids[first] in added:
            words.append(Word(raw[first], first, row))
        elif seen:
            words.append(Word(tokenizer.decode(list(ids[first:row])).strip(), first, row))

    for row in range(start, stop):
        marked = raw[row].startswith(mark)
        piece = "" if ids[row] in special else tokenizer.decode([ids[row]]).strip()
        outside = ids[row] in special or not (piece or marked)
        other_signs = bool(seen and piece) and _is_letter(piece[0]) != _is_letter(seen[-1])
        further = ids[first] in added and raw[row] == f"{raw[first]}_{row - first}"
        beside_added = row > start and (ids[row] in added or ids[row - 1] in added)
        if outside or ((marked or other_signs or beside_added) and not further):
            finish(row)
            first, seen = row + outside, ""
        seen += piece
    finish(stop)
    return tuple(token.replace(mark, "") or token for token in raw), tuple(words)


def _is_letter(sign: str) -> bool:
    return sign.isalnum() or sign == PART
