"""Texts as a joint model's pipeline embeds them."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..readers.sites import embedder_of
from ..text import TokenEmbeddings, Word, require_text
from .families import Family
from .maps import TOLERANCE

EMBEDDED_WITH = ("clip_skip", "lora_scale", "max_sequence_length")  # arguments of `encode_prompt` that later texts need
MANY = 4096  # rows; more than any text has


class JointTexts:
    """Embeds texts by a pipeline's own `encode_prompt`."""

    def __init__(self, pipe: Any, family: Family):
        self.pipe, self.family = pipe, family

    @torch.no_grad()
    def encode_prompt(self, prompts: Mapping[str, str], options: Mapping[str, Any]) -> tuple:
        """Return `pipe.encode_prompt`'s result for one prompt, as {"prompt": ..., "prompt_2": ...}, without guidance.

        Of the options those of `EMBEDDED_WITH` are used. Raises ValueError if the pipeline has no text encoder, or
        embeds a text together with an image.
        """
        embed = embedder_of(self.pipe)
        if "image" in inspect.signature(embed).parameters:
            raise ValueError(
                f"{type(self.pipe).__name__} embeds a prompt together with other images, as when editing: not "
                "supported. Use the text-to-image pipeline of the model"
            )
        missing = [name for name in self.family.encoders if getattr(self.pipe, name, None) is None]
        if missing:
            raise ValueError(
                f"the pipeline has no {' and no '.join(missing)}, so it cannot embed a text: bring it back, or give "
                "the text's embeddings to daam_from or ldaam_from"
            )
        given = {name: value for name, value in options.items() if name in EMBEDDED_WITH}
        device = self.pipe._execution_device
        return embed(device=device, num_images_per_prompt=1, **{**self.family.unused, **prompts, **given})

    def embed(self, text: str, options: Mapping[str, Any]) -> torch.Tensor:
        """Return the (rows, d_text) embeddings of a text in the prompt's place."""
        return self.encode_prompt({"prompt": text}, options)[0][0]

    def require_same(self, given: TokenEmbeddings, prompts: Mapping[str, str], options: Mapping[str, Any]) -> None:
        """ValueError if prompts that were embedded while generating have other embeddings now."""
        now = self.encode_prompt(prompts, options)[0][0]
        rows = [row for row in given.rows if row < len(now)]
        then, tolerance = given.values[rows].float(), max(TOLERANCE[each.dtype] for each in (given.values, now)) / 2
        same = (now[rows].to(then) - then).norm(dim=1) <= tolerance * then.norm(dim=1)  # each token: of each encoder
        if len(rows) < given.length or not same.all():
            raise ValueError(
                "the pipeline's text encoders do not embed this record's prompt as they did, so a new text would not "
                "fit the image: was a LoRA loaded or unloaded since? Bring the pipeline back to what it was"
            )

    def named(self, prompts: Mapping[str, str] | None, values: torch.Tensor) -> TokenEmbeddings:
        """Return the (rows, d_text) embeddings of a prompt with its tokens; numbers without a prompt."""
        if prompts is None:
            return TokenEmbeddings.unnamed(values)
        try:
            return TokenEmbeddings(values, *self.family.names(self.pipe, prompts, len(values)))
        except AttributeError as error:
            raise ValueError(f"a prompt's tokens cannot be named, {error}: give trace.loop the text None") from error

    def encode(self, text: str, options: Mapping[str, Any]) -> TokenEmbeddings:
        """Return the tokens of any text without padding, those of each encoder in turn (SD 3: CLIP's, then T5's).

        Raises TypeError for what is no string, ValueError for a text that is too long.
        """
        require_text(text)
        values = self.embed(text, options)
        named = self.named({"prompt": text}, values).without_padding()
        if len(named.words) < len(self.family.names(self.pipe, {"prompt": text}, MANY)[1]):
            raise ValueError(f"the text is longer than the text encoder reads, {len(values)} rows: shorten {text!r}")
        return named


def encode_words(pipe: Any, family: Family, words: Sequence[str], options: Mapping[str, Any]) -> TokenEmbeddings:
    """Return words one after the other in one text, each embedded alone; without special tokens.

    Raises ValueError for a text without a word.
    """
    texts = JointTexts(pipe, family)
    values: list[torch.Tensor] = []
    tokens: list[str] = []
    named: list[Word] = []
    for word in words:
        text = texts.encode(word, options)
        rows = [row for part in text.words for row in range(part.start, part.stop)]
        if not rows:
            raise ValueError(f"{word!r} has no word in it: its tokens are {list(text.tokens)}")
        values.append(text.values[rows])
        named.append(Word(word, len(tokens), len(tokens) + len(rows)))
        tokens.extend(text.tokens[row] for row in rows)
    return TokenEmbeddings(torch.cat(values), tuple(tokens), tuple(named))


def averages(embeddings: TokenEmbeddings) -> torch.Tensor:
    """Return the (words, tokens) matrix that averages the rows of each word."""
    matrix = torch.zeros(len(embeddings.words), len(embeddings.tokens))
    for row, word in enumerate(embeddings.words):
        matrix[row, word.start : word.stop] = 1 / (word.stop - word.start)
    return matrix


def check_words(words: Any) -> tuple[str, ...]:
    """Return the words as a tuple; TypeError or ValueError unless they are two or more different strings."""
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"words must be a list of strings, got {words!r}")
    if len(set(words)) != len(words) or len(words) < 2:
        raise ValueError(
            f"expected two or more different words, got {list(words)}: words compete in a softmax, which is 1 "
            "everywhere for one alone. Name what else may be in the image, or use ldaam"
        )
    return tuple(words)
