"""Texts as the denoiser sees them: token embeddings, and which tokens make which word."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

PAD = "<pad>"  # the name of padding rows
# what the Unicode names of letters begin with whose words stand without spaces between them
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


class TextTooLongError(ValueError):
    """A text has more tokens than the text encoder reads."""


@dataclass(frozen=True)
class Word:
    """A word of a text and the rows `start ... stop - 1` of its tokens."""

    text: str
    start: int
    stop: int

    def moved(self, rows: int) -> "Word":
        """Return the word so many rows further on."""
        return Word(self.text, self.start + rows, self.stop + rows)


@dataclass(frozen=True, eq=False)
class TokenEmbeddings:
    """The embeddings of a text's tokens, as cross-attention receives them (thesis: x, the columns of X').

        record.encode("a traffic light")["traffic light"]  # (tokens, d_text)

    Attributes:
        values: (m, d_text): the start token, the text and the end token, where a tokenizer has them, and padding.
        tokens: the m tokens, readable.
        words: the words they make, without the special tokens.
    """

    values: Float[torch.Tensor, "m d_text"]
    tokens: tuple[str, ...]
    words: tuple[Word, ...] = ()

    def __post_init__(self) -> None:
        if len(self.values) != len(self.tokens):
            raise ValueError(f"it has {len(self.tokens)} tokens and embeddings of shape {tuple(self.values.shape)}")
        if any(word.stop > len(self.tokens) for word in self.words):
            raise ValueError(f"its words {self.words} are not of its {len(self.tokens)} tokens")

    @classmethod
    def unnamed(cls, values: torch.Tensor) -> "TokenEmbeddings":
        """Return embeddings whose text is unknown; the tokens are numbered."""
        return cls(values, tuple(str(row) for row in range(len(values))))

    @classmethod
    def padded(
        cls, values: torch.Tensor, tokens: tuple[str, ...], words: tuple[Word, ...], *, left: bool = False
    ) -> "TokenEmbeddings":
        """Name the rows of a text and of the padding after it, or before it (`left`)."""
        count = len(values) - len(tokens)
        words = tuple(word.moved(count) for word in words) if left else words
        return cls(values, (PAD,) * count + tokens if left else tokens + (PAD,) * count, words)

    @property
    def rows(self) -> list[int]:
        """Numbers of the rows that are not padding."""
        return [row for row, token in enumerate(self.tokens) if token != PAD]

    @property
    def length(self) -> int:
        """Number of tokens from start to end token: the rows that are not padding."""
        return len(self.rows)

    def __getitem__(self, word: str | tuple[str, int]) -> Float[torch.Tensor, "k d_text"]:
        """Return the embeddings of the tokens of a word, of all its occurrences, or of one, as in `["car", 1]`."""
        return self.values[rows_of(word, self.words, self.tokens)]

    def to(self, device: torch.device) -> "TokenEmbeddings":
        """Return the same on `device`."""
        return TokenEmbeddings(self.values.to(device), self.tokens, self.words)

    def take(self, mask: torch.Tensor) -> "TokenEmbeddings":
        """Return the rows that a (m,) mask keeps; a word that loses a row is no word any more."""
        rows = mask.nonzero().flatten().tolist()
        place = {row: number for number, row in enumerate(rows)}
        whole = [word for word in self.words if all(row in place for row in range(word.start, word.stop))]
        words = tuple(Word(word.text, place[word.start], place[word.stop - 1] + 1) for word in whole)
        return TokenEmbeddings(self.values[rows], tuple(self.tokens[row] for row in rows), words)

    def without_padding(self) -> "TokenEmbeddings":
        """Return the rows from start to end token, wherever the padding stands."""
        return self.take(torch.tensor([token != PAD for token in self.tokens]))


def side_by_side(texts: Sequence[TokenEmbeddings]) -> TokenEmbeddings:
    """Return several texts as one, all rows one after the other, as prompts of several context lengths are read."""
    starts = [sum(len(text.tokens) for text in texts[:number]) for number in range(len(texts))]
    return TokenEmbeddings(
        torch.cat([text.values for text in texts]),
        tuple(token for text in texts for token in text.tokens),
        tuple(word.moved(start) for start, text in zip(starts, texts, strict=True) for word in text.words),
    )


def check_embeddings(
    embeddings: torch.Tensor | TokenEmbeddings, d_text: int, device: torch.device
) -> Float[torch.Tensor, "m d_text"]:
    """Return the (m, d_text) values on `device`, in float32 (float64 stays); TypeError or ValueError for others."""
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


def without_spaces(sign: str) -> bool:
    """Return whether words of this sign's script stand without spaces between them: Chinese, Thai, emoji and others."""
    return unicodedata.category(sign) == "So" or unicodedata.name(sign, "").startswith(UNSPACED)


def spelling(parts: Iterable[str]) -> str:
    """Return words as one string without case, width, and spaces between other signs than letters."""
    text = ""
    for part in (piece for word in parts for piece in unicodedata.normalize("NFKC", word).casefold().split()):
        apart = text and all(sign.isalpha() and not without_spaces(sign) for sign in (text[-1], part[0]))
        text += f" {part}" if apart else part
    return text


def occurrences(word: str, words: Sequence[Word]) -> list[range]:
    """Return the rows of each occurrence of `word` (one word or several, as "traffic light"), in order."""
    spelled, found, first = spelling([word]), [], 0
    while spelled and first < len(words):
        last = first + 1
        while last < len(words) and len(spelling(each.text for each in words[first:last])) < len(spelled):
            last += 1
        if spelling(each.text for each in words[first:last]) == spelled:
            found.append(range(words[first].start, words[last - 1].stop))
            first = last
        else:
            first += 1
    return found


def find_word(word: str, words: Sequence[Word], tokens: Sequence[str], occurrence: int | None = None) -> list[int]:
    """Return the rows of all tokens of `word` (one word or several, as "traffic light"): of one occurrence, or all.

    Raises ValueError, listing the tokens, if it does not occur as whole words, or not so often.
    """
    found = occurrences(word, words)
    if not found and not words and tokens and all(token.isdigit() for token in tokens):
        raise ValueError(
            f"the word {word!r} cannot be looked up: the text of these {len(tokens)} rows is unknown, as of a prompt "
            "given as embeddings. Look rows up by number, or give a text: record.daam(text) or record.ldaam(text)"
        )
    if not found:
        raise ValueError(
            f"the word {word!r} is not in the text; its tokens are {list(tokens)}. Any other word can be evaluated by "
            "giving its own text: record.daam(text) or record.ldaam(text)"
        )
    if occurrence is None:
        return [row for rows in found for row in rows]
    if not -len(found) <= occurrence < len(found):
        raise ValueError(f"the word {word!r} occurs {len(found)} times in {list(tokens)}: there is no [{occurrence}]")
    return list(found[occurrence])


def rows_of(word: str | tuple[str, int], words: Sequence[Word], tokens: Sequence[str]) -> list[int]:
    """Return the rows of a word, or of one of its occurrences as (word, number). TypeError for another key."""
    name, number = word if isinstance(word, tuple) and len(word) == 2 else (word, None)
    if not isinstance(name, str) or not (number is None or hasattr(number, "__index__")):
        raise TypeError(f'look up a word, or one of its occurrences as ["car", 1], got {word!r}')
    return find_word(name, words, tokens, None if number is None else number.__index__())


def find_phrases(phrases: Sequence[str], words: Sequence[Word], tokens: Sequence[str]) -> list[list[int]]:
    """Return the rows of each phrase of a text that lists them in this order; ValueError if one does not follow.

    A text that several encoders embed is listed several times (SD 3: CLIP's tokens, then T5's); a phrase has all rows.
    """
    found: list[list[int]] = [[] for _ in phrases]
    rest = list(words)
    while True:
        for rows, phrase in zip(found, phrases, strict=True):
            rows += find_word(phrase, rest, tokens, 0)
            rest = [word for word in rest if word.start > rows[-1]]
        if not all(occurrences(phrase, rest) for phrase in phrases):
            return found


def texts_of_images(texts: str | Sequence[str | None] | None, images: int) -> tuple[str | None, ...]:
    """Return the text of each image of a call: one for all, one for as many images in a row, or None if unknown."""
    given: Sequence[str | None] = [texts] if isinstance(texts, str) else texts or [None]
    count, rest = divmod(images, len(given))
    return (None,) * images if rest else tuple(text for text in given for _ in range(count))


def options_of_images(options: Mapping[str, Any], images: int) -> list[dict[str, Any]]:
    """Return the arguments of `encode_prompt` of each image by itself: of a list of texts, as `prompt_2`, its text."""
    texts = {name: texts_of_images(value, images) for name, value in options.items() if name.startswith("prompt")}
    return [{**options, **{name: of_image[image] for name, of_image in texts.items()}} for image in range(images)]
