"""Texts as a joint model's pipeline embeds them."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..readers.sites import embedder_of
from ..text import TokenEmbeddings, require_text
from .families import Family
from .text import one_after_another, side_by_side, without_padding

EMBEDDED_WITH = ("clip_skip", "lora_scale", "max_sequence_length")  # arguments of `encode_prompt` that later texts need
MANY = 4096  # rows; more than any text has
# Whether a text of ours is embedded, not an image's prompt: traces leave it out. Each thread has a value.


@torch.no_grad()
def embed_prompt(pipe: Any, family: Family, prompts: Mapping[str, str], options: Mapping[str, Any]) -> tuple:
    """Return `pipe.encode_prompt`'s result for one prompt without a negative one.

    Args:
        pipe: the pipeline.
        family: its own.
        prompts: by the argument of `encode_prompt`, as {"prompt": ..., "prompt_2": ...}.
        options: further arguments, such as `clip_skip`.

    Returns:
        The embeddings, and what else the method returns.

    Raises:
        ValueError: the pipeline has no text encoder, or it embeds a text together with an image.
    """
    if "image" in inspect.signature(pipe.encode_prompt).parameters:
        raise ValueError(
            f"{type(pipe).__name__} embeds a prompt together with other images, as when editing: not supported. Use "
            "the text-to-image pipeline of the model"
        )
    lacking = [name for name in family.encoders if getattr(pipe, name, None) is None]
    if lacking:
        raise ValueError(
            f"the pipeline has no {' and no '.join(lacking)}, so it cannot embed a text: bring it back, or give the "
            "text's embeddings to daam_from or ldaam_from"
        )
    given = {**family.unused, **prompts, **options}
    return embedder_of(pipe)(device=pipe._execution_device, num_images_per_prompt=1, **given)


def name_prompt(pipe: Any, family: Family, texts: Mapping[str, str] | None, values: torch.Tensor) -> TokenEmbeddings:
    """The (rows, d_text) embeddings of a prompt with the names of their tokens; numbers without a prompt.

    texts: the prompt by the argument of `encode_prompt`, as {"prompt": ..., "prompt_2": ...}.
    """
    if texts is None:
        return TokenEmbeddings.unnamed(values)
    tokens, words = side_by_side([(family.names(pipe, texts, len(values)), len(values))])
    return TokenEmbeddings(values, tokens, words)


def encode_text(pipe: Any, family: Family, text: str, options: Mapping[str, Any]) -> TokenEmbeddings:
    """The tokens of any text, without padding: of each encoder whose tokens the model reads (SD 3: CLIP's, then T5's).

    Raises TypeError for what is no string, ValueError for a text that is too long.
    """
    require_text(text)
    values = embed_prompt(pipe, family, {"prompt": text}, options)[0][0]
    found = without_padding(name_prompt(pipe, family, {"prompt": text}, values))
    if len(found.words) < len(family.names(pipe, {"prompt": text}, MANY)[1]):
        raise ValueError(f"the text is longer than the text encoder reads, {len(values)} rows: shorten {text!r}")
    return found


def encode_words(pipe: Any, family: Family, words: Sequence[str], options: Mapping[str, Any]) -> TokenEmbeddings:
    """Words that stand side by side in one stream, each embedded alone; without special tokens.

    Raises TypeError or ValueError for what are no words.
    """
    return one_after_another([encode_text(pipe, family, word, options) for word in words], words)


def check_words(words: Any) -> tuple[str, ...]:
    """The words as a tuple; TypeError or ValueError unless they are two or more different strings."""
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"words must be a list of strings, got {words!r}")
    if len(set(words)) != len(words) or len(words) < 2:
        raise ValueError(
            f"expected two or more different words, got {list(words)}: words compete in a softmax, which is 1 "
            "everywhere for one alone. Name what else may be in the image, or use ldaam"
        )
    return tuple(words)
