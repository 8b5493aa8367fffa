"""Texts as the U-Net sees them: token embeddings, and which tokens make which word."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

PAD = "<pad>"  # the name of padding rows


class Word(NamedTuple):
    """A word of a text and the rows `start ... stop - 1` of its tokens."""

    text: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class TokenEmbeddings:
    """The embeddings of a text's tokens, as cross-attention receives them (thesis: x, the columns of X').

    values: (m, d_text) float tensor, the start token first and the end token last (then padding, if asked for).
    tokens: the m tokens, readable. words: the words they make, without the special tokens.
    """

    values: torch.Tensor
    tokens: tuple[str, ...]
    words: tuple[Word, ...]

    @property
    def length(self) -> int:
        """Tokens from start to end token: the rows that are not padding."""
        return self.tokens.index(PAD) if PAD in self.tokens else len(self.tokens)


def read_tokens(tokenizer, ids: Sequence[int]) -> tuple[tuple[str, ...], tuple[Word, ...]]:
    """The readable tokens of `ids` (start token first) and the words they make, up to the first end token."""
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    end = next((i for i, id_ in enumerate(ids) if i and id_ == tokenizer.eos_token_id), len(raw))
    words, start = [], 1
    for i in range(1, end):
        # CLIP's BPE marks the last token of a word; a token without the mark goes on in the next
        if raw[i].endswith("</w>") or i + 1 == end or ids[i] in tokenizer.all_special_ids:
            words.append(Word(tokenizer.decode(list(ids[start : i + 1])).strip(), start, i + 1))
            start = i + 1
    return tuple(token.removesuffix("</w>") for token in raw), tuple(words)


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


def _reader(pipe) -> tuple:
    """The tokenizer whose tokens are shown, and its context length: the first of SDXL's two, its refiner's only one."""
    second = pipe.tokenizer is None
    tokenizer = pipe.tokenizer_2 if second else pipe.tokenizer
    config = (pipe.text_encoder_2 if second else pipe.text_encoder).config
    limit = getattr(config, "max_position_embeddings", None)
    return tokenizer, min(tokenizer.model_max_length, limit or tokenizer.model_max_length)


def _converted(pipe, tokenizer, text: str) -> str:
    """With textual inversion, one name may stand for several vectors."""
    return pipe.maybe_convert_prompt(text, tokenizer) if hasattr(pipe, "maybe_convert_prompt") else text


def prompt_tokens(pipe, prompt: str) -> tuple[tuple[str, ...], tuple[Word, ...]]:
    """Tokens and words of a prompt as the pipeline reads it: cut at the context length, never padded."""
    tokenizer, context = _reader(pipe)
    ids = tokenizer(_converted(pipe, tokenizer, prompt), truncation=True, max_length=context).input_ids
    return read_tokens(tokenizer, ids)


@torch.no_grad()
def encode(pipe, text: str, *, padding: bool = False) -> TokenEmbeddings:
    """Embed `text` with the pipeline's own text encoder(s), as for a prompt.

    Returns (m, d_text) values: m = 2 + the number of tokens (start and end token included), or the context length
    with `padding`. CLIP's attention is causal, so the values of a token do not depend on the padding after it.
    Raises TypeError if `text` is no string, ValueError if it is longer than the context length.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}: {text!r}")
    tokenizer, context = _reader(pipe)
    # counted without truncation; `verbose=False` silences the tokenizer's own warning, the error says it better
    count = len(tokenizer(_converted(pipe, tokenizer, text), verbose=False).input_ids)
    if count > context:
        raise ValueError(
            f"the text has {count} tokens with its start and end token, the text encoder reads {context}: "
            f"shorten it by {count - context} tokens: {text!r}"
        )
    embeddings = pipe.encode_prompt(
        prompt=text, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0][0]
    tokens, words = prompt_tokens(pipe, text)
    if padding:
        tokens += (PAD,) * (len(embeddings) - len(tokens))
    return TokenEmbeddings(embeddings[: len(tokens)], tokens, words)
