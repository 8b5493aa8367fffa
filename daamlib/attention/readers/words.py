"""Tokens of texts, and which of them make which word: by where a tokenizer marks the words."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..text import PAD, Word, without_spaces

SPACE = "\u2581"  # sentencepiece's mark of a space
BYTE_SPACE = "\u0120"  # that of byte-level BPE
PART = "\ufffd"  # what a piece decodes to that is a part of a character's bytes
CHECK_TEXT = "a photo of a street with a car, a person and a tree"  # shows whether a text encoder is as it was
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # of a pipeline

Names = tuple[tuple[str, ...], tuple[Word, ...]]  # readable tokens, and the words they make


def token_ids(tokenizer: Any, text: str, length: int) -> list[int]:
    """Return the ids of a text's tokens, special ones included, cut at `length`."""
    return tokenizer(text, truncation=True, max_length=length).input_ids


def side_by_side(parts: Sequence[tuple[Names, int]]) -> Names:
    """Return the tokens and words of texts that stand one after the other, each padded to its length."""
    tokens: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()
    for (of_part, words_of_part), length in parts:
        words += tuple(word.moved(len(tokens)) for word in words_of_part if word.stop <= length)
        tokens += (of_part + (PAD,) * length)[:length]
    return tokens, words


def require_text_encoder(pipe: Any) -> None:
    """ValueError for a pipeline without a text encoder."""
    if all(getattr(pipe, name, None) is None for name in ENCODERS):
        raise ValueError(
            "the pipeline has no text encoder (was it deleted after the prompt was embedded?): a text cannot be "
            "embedded. Give embeddings to daam_from / ldaam_from"
        )


def check_text(reader: Any, options: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the (m, d_text) embeddings of `CHECK_TEXT`, None where a text encoder is not where the pipeline computes.

    It is then not moved, which would cost memory while an image is made.
    """
    encoders = [encoder for name in ENCODERS if (encoder := getattr(reader.pipe, name, None)) is not None]
    device = reader.pipe._execution_device
    if not encoders or any(weight.device != device for encoder in encoders for weight in encoder.parameters()):
        return None
    options = {name: value for name, value in options.items() if name != "prompt_2"}
    try:
        return reader.embed(CHECK_TEXT, options)
    except ValueError:  # of a reader that embeds no later text, nothing is to be checked
        return None


def is_rough(pipe: Any, *, projected: bool) -> bool:
    """Return whether a pipeline's text encoders are quantised, or the denoiser projects what they return."""
    encoders = [encoder for name in ENCODERS if (encoder := getattr(pipe, name, None)) is not None]
    return projected or any(weight.element_size() < 2 for encoder in encoders for weight in encoder.parameters())


def read_names(tokenizer: Any, ids: Sequence[int]) -> Names:
    """Return the tokens and words of a text by the marks of its tokenizer, CLIP's or sentencepiece's."""
    pieces = any(token.startswith(SPACE) for token in tokenizer.convert_ids_to_tokens(list(ids)))
    return (read_pieces if pieces else read_tokens)(tokenizer, ids)


def read_tokens(tokenizer: Any, ids: Sequence[int]) -> Names:
    """Return the tokens and words of a text whose tokenizer marks the last token of a word, as CLIP's.

    A token that was added to the tokenizer, as by textual inversion, is a word, together with those of its further
    vectors: <toy>, <toy>_1, <toy>_2. The end token belongs to no word, also where it stands for an unknown sign.
    """
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    added = set(tokenizer.get_added_vocab().values())  # their ids, for the names may be in other case
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    words: list[Word] = []
    first, end = 1, len(raw) - (ids[-1] == tokenizer.eos_token_id)
    for row in range(2, end + 1):
        further = row < end and ids[first] in added and raw[row] == f"{raw[first]}_{row - first}"
        ended = row == end or raw[row - 1].endswith("</w>") or ids[row - 1] in added or ids[row] in added
        if ended and not further:
            if ids[first] not in added:
                words.extend(_cut(tokenizer, ids, first, row))
            elif ids[first] not in special:
                words.append(Word(raw[first], first, row))
            first = row
    return tuple(token.removesuffix("</w>") for token in raw), tuple(words)


def read_pieces(
    tokenizer: Any, ids: Sequence[int], start: int = 0, *, mark: str = SPACE, end: str | None = None
) -> Names:
    """Return the tokens and words of a text whose tokenizer marks the first token of a word, as T5's, Gemma's, Qwen's.

    A word begins at the mark, and where letters and digits meet other signs: "car..." is two words. Special tokens and
    line breaks belong to no word. A token that was added to the tokenizer, as by textual inversion, is a word together
    with those of its further vectors: <toy>, <toy>_1. The text's own tokens are those from row `start` to `end`.
    """
    raw, special = tokenizer.convert_ids_to_tokens(list(ids)), set(tokenizer.all_special_ids)
    stop, added = raw.index(end) if end in raw else len(raw), set(tokenizer.get_added_vocab().values())
    words: list[Word] = []
    first, seen = start, ""  # of the word under way

    def finish(row: int) -> None:
        if seen and ids[first] in added:
            words.append(Word(raw[first], first, row))
        elif seen:
            words.extend(_cut(tokenizer, ids, first, row))

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


def _cut(tokenizer: Any, ids: Sequence[int], first: int, stop: int) -> Iterator[Word]:
    """Yield the word of these rows, or its parts: one after each sign without spaces where a token ends there."""
    for row in range(first, stop):
        last = row + 1 == stop
        text = "" if last else tokenizer.decode(list(ids[first : row + 1])).strip()
        if last or (text and PART not in text and without_spaces(text[-1])):
            yield Word(tokenizer.decode(list(ids[first : row + 1])).strip(), first, row + 1)
            first = row + 1


def _is_letter(sign: str) -> bool:
    return sign.isalnum() or sign == PART
