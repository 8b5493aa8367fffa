"""Texts as the denoiser sees them: token embeddings, and which tokens make which word."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float

PAD = "<pad>"  # the name of padding rows
SPACE = "\u2581"  # sentencepiece's mark of a space


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

    @property
    def length(self) -> int:
        """Tokens from start to end token: the rows that are not padding."""
        return self.tokens.index(PAD) if PAD in self.tokens else len(self.tokens)

    def to(self, device: torch.device) -> "TokenEmbeddings":
        """The same on `device`."""
        return TokenEmbeddings(self.values.to(device), self.tokens, self.words)

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


def read_tokens(tokenizer, ids: Sequence[int]) -> tuple[tuple[str, ...], tuple[Word, ...]]:
    """The readable tokens of CLIP's `ids` (start token first) and the words they make, up to the first end token."""
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    end = next((i for i, id_ in enumerate(ids) if i and id_ == tokenizer.eos_token_id), len(raw))
    words, start = [], 1
    for i in range(1, end):
        # CLIP's BPE marks the last token of a word; a token without the mark goes on in the next
        if raw[i].endswith("</w>") or i + 1 == end or ids[i] in tokenizer.all_special_ids:
            words.append(Word(tokenizer.decode(list(ids[start : i + 1])).strip(), start, i + 1))
            start = i + 1
    return tuple(token.removesuffix("</w>") for token in raw), tuple(words)


def read_pieces(tokenizer, ids: Sequence[int], start: int = 0) -> tuple[tuple[str, ...], tuple[Word, ...]]:
    """The readable tokens of a sentencepiece tokenizer's `ids`, and the words they make from row `start` on.

    A word begins at the mark of a space, and where letters and digits meet other signs: "car," are two words.
    """
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    words: list[Word] = []
    first, seen = start, ""  # of the word under way

    def end(stop: int) -> None:
        if seen:
            words.append(Word(tokenizer.decode(list(ids[first:stop])).strip(), first, stop))

    for row in range(start, len(raw)):
        text, special = raw[row].removeprefix(SPACE), ids[row] in tokenizer.all_special_ids
        other_signs = bool(seen and text) and text[0].isalnum() != seen[-1].isalnum()
        if special or raw[row].startswith(SPACE) or other_signs:
            end(row)
            first, seen = row, ""
        if special:
            first = row + 1
        else:
            seen += text
    end(len(raw))
    return tuple(token.replace(SPACE, "") or token for token in raw), tuple(words)


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


def _tokenizer_of(pipe: Any) -> tuple:
    """The tokenizer whose tokens are shown, and its context length: the first of SDXL's two, its refiner's only one."""
    second = pipe.tokenizer is None
    tokenizer = pipe.tokenizer_2 if second else pipe.tokenizer
    config = (pipe.text_encoder_2 if second else pipe.text_encoder).config
    limit = getattr(config, "max_position_embeddings", None)
    return tokenizer, min(tokenizer.model_max_length, limit or tokenizer.model_max_length)


def _converted(pipe: Any, tokenizer, text: str) -> str:
    """With textual inversion, one name may stand for several vectors."""
    return pipe.maybe_convert_prompt(text, tokenizer) if hasattr(pipe, "maybe_convert_prompt") else text


def prompt_tokens(pipe: Any, prompt: str) -> tuple[tuple[str, ...], tuple[Word, ...]]:
    """Tokens and words of a prompt as the pipeline reads it: cut at the context length, never padded."""
    tokenizer, context = _tokenizer_of(pipe)
    ids = tokenizer(_converted(pipe, tokenizer, prompt), truncation=True, max_length=context).input_ids
    return read_tokens(tokenizer, ids)


@torch.no_grad()
def embed_prompt(pipe: Any, prompt: str, options: Mapping[str, Any] = {}) -> tuple:
    """What `pipe.encode_prompt` returns for one prompt without guidance; options: such as `clip_skip`."""
    device = pipe._execution_device
    return pipe.encode_prompt(
        prompt=prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, **options
    )


@torch.no_grad()
def encode(pipe: Any, text: str, *, padding: bool = False, options: Mapping[str, Any] | None = None) -> TokenEmbeddings:
    """Embed `text` with the pipeline's own text encoder(s), as for a prompt.

    CLIP's attention is causal, so the values of a token do not depend on the padding after it.

    Args:
        pipe: a Stable Diffusion pipeline.
        text: any words.
        padding: whether to keep the rows up to the context length.
        options: further arguments of `pipe.encode_prompt`, such as `clip_skip`.

    Returns:
        (m, d_text) values: m = 2 + the number of tokens (start and end token included), or the context length.

    Raises:
        TypeError: `text` is no string.
        ValueError: it is longer than the context length.
    """
    require_text(text)
    tokenizer, context = _tokenizer_of(pipe)
    # counted without truncation; `verbose=False` silences the tokenizer's own warning, the error says it better
    count = len(tokenizer(_converted(pipe, tokenizer, text), verbose=False).input_ids)
    if count > context:
        raise ValueError(
            f"the text has {count} tokens with its start and end token, the text encoder reads {context}: "
            f"shorten it by {count - context} tokens: {text!r}"
        )
    embeddings = name_tokens(pipe, text, embed_prompt(pipe, text, options or {})[0][0])
    return embeddings if padding else embeddings.without_padding()


def name_tokens(pipe: Any, prompt: str | None, values: torch.Tensor) -> TokenEmbeddings:
    """The (context, d_text) embeddings of a prompt with the names of their tokens; numbers without a prompt."""
    if prompt is None:
        return TokenEmbeddings.unnamed(values)
    tokens, words = prompt_tokens(pipe, prompt)
    return TokenEmbeddings(values, tokens + (PAD,) * (len(values) - len(tokens)), words)
