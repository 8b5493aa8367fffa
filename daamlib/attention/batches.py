"""Which rows of a denoiser's batch are which images' prompts, read from the texts that are passed.

Guidance denoises every image twice, under its prompt and under a negative text, in one pass or in two, in either order.
The rows' texts are compared with those that `encode_prompt` returned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .text import TokenEmbeddings


@dataclass(frozen=True, eq=False)
class Encoding:
    """What one call of `encode_prompt` took and returned: n rows of (token, d_text) each."""

    prompts: tuple[str | None, ...]
    positive: torch.Tensor
    negative: torch.Tensor | None
    guided: bool
    options: Mapping[str, Any]
    texts: Mapping[str, TokenEmbeddings]  # further texts embedded in the same way
    mask: torch.Tensor | None = None  # of the positive text: which tokens take part
    negative_prompts: tuple[str | None, ...] = ()

    def kinds(self, text: torch.Tensor) -> list[str]:
        """For each chunk of n rows of a batch whether it is the "conditional", "unconditional" or an "other" text."""
        if len(text) % len(self.positive) or text.shape[1:] != self.positive.shape[1:]:
            return ["other"]
        return [self._kind(chunk) for chunk in text.split(len(self.positive))]

    def _kind(self, chunk: torch.Tensor) -> str:
        if torch.equal(chunk, self.positive.to(chunk)):
            return "conditional"
        if self.negative is not None and torch.equal(chunk, self.negative.to(chunk)):
            return "unconditional"
        return "other"


@dataclass(frozen=True, eq=False)
class Batch:
    """How the rows of a pass are to be read; `conditional` or `unconditional` is None where it takes no part."""

    conditional: slice | None
    unconditional: slice | None
    encoding: Encoding | None  # whose texts they are
    prompts: tuple[str | None, ...]  # of the images


def known_batch(text: torch.Tensor, encodings: Sequence[Encoding]) -> Batch | None:
    """The batch of a text that one call of `encode_prompt` returned, the latest first."""
    for encoding in reversed(encodings):
        kinds, n = encoding.kinds(text), len(encoding.positive)
        if "other" in kinds:
            continue
        if encoding.guided and kinds == ["conditional"] * 2:  # both texts are the same, as with an empty prompt
            kinds = ["unconditional", "conditional"]
        found = {kind: slice(n * kinds.index(kind), n * (kinds.index(kind) + 1)) for kind in set(kinds)}
        return Batch(found.get("conditional"), found.get("unconditional"), encoding, encoding.prompts)
    return None


def halves(rows: int, guided: bool) -> tuple[slice, slice | None]:
    """The conditional half, which is the last one by convention, and the other."""
    return (slice(rows // 2, rows), slice(0, rows // 2)) if guided else (slice(0, rows), None)


def own_batch(sample: torch.Tensor, text: torch.Tensor, encodings: Sequence[Encoding]) -> Batch:
    """The batch of a loop of one's own: guided where both halves hold the same latents."""
    rows = len(sample)
    guided = rows % 2 == 0 and torch.equal(sample[: rows // 2], sample[rows // 2 :])
    conditional, unconditional = halves(rows, guided)
    known = [
        (row, prompt)
        for encoding in reversed(encodings)
        for row, prompt in zip(encoding.positive, encoding.prompts, strict=True)
    ]
    prompts = tuple(
        next((prompt for row, prompt in known if row.shape == own.shape and torch.equal(row.to(own), own)), None)
        for own in text[conditional]
    )
    return Batch(conditional, unconditional, None, prompts)
