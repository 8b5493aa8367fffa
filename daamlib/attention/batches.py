"""Which rows of a denoiser's batch are which images, read from the texts that are passed.

Guidance denoises every image twice, under its prompt and under a negative text, in one pass or in two, in either order.
The texts of the rows are compared with those that `encode_prompt` returned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Rows = slice | list[int]


@dataclass(frozen=True, eq=False)
class Encoding:
    """Arguments and results of one call of `encode_prompt`, for n images."""

    positive: torch.Tensor  # (n, token, width), the embeddings of the prompts
    negative: torch.Tensor | None = None  # (n, token, width), those of the negative texts
    prompts: tuple[str | None, ...] = ()  # the text of each image, None where embeddings were given
    negatives: tuple[str | None, ...] = ()  # likewise of the negative texts
    guided: bool = False  # whether a pass under guidance holds both
    options: Mapping[str, Any] = field(default_factory=dict)  # to embed later texts with, such as `clip_skip`

    def halves(self, text: torch.Tensor, *, perturbed: bool = False) -> dict[str, Rows] | None:
        """Return the rows of a (batch, token, width) text that are "conditional", and "unconditional", if it has them.

        `perturbed` says that the prompts' rows are repeated for a perturbed pass after them (PAG). None if a row has
        another text; ValueError if the prompts' rows occur more than once.
        """
        n, known = len(self.positive), {"conditional": self.positive, "unconditional": self.negative}
        chunks = text.split(n)  # a last one of fewer rows equals none
        kinds = [next((kind for kind, values in known.items() if _equal(values, chunk)), "other") for chunk in chunks]
        if "other" in kinds:
            return None
        if self.guided and len(kinds) > 1 and set(kinds) == {"conditional"}:  # both texts are the same
            kinds[0] = "unconditional"
        if kinds.count("conditional") > 1 + perturbed:
            raise ValueError(
                f"the denoiser was called with the texts of {n} images {kinds.count('conditional')} times in a batch "
                f"of {len(text)}, as several tiles, views or frames are: trace cannot tell which rows are the images"
            )
        return {kind: slice(n * kinds.index(kind), n * (kinds.index(kind) + 1)) for kind in kinds}

    def text_of(self, row: torch.Tensor) -> str | None:
        """Return the prompt or negative text whose (token, width) embeddings these are, None for others."""
        for values, names in ((self.positive, self.prompts), (self.negative, self.negatives)):
            for own, name in zip(() if values is None else values, names, strict=False):
                if _equal(own, row):
                    return name
        return None


def rows_of_images(
    inputs: Any, encodings: Sequence[Encoding], branch: str, channels: int | None, *, perturbed: bool
) -> tuple[Rows | None, Encoding]:
    """Return a branch's rows in a pass of a pipeline (None: it has none), and the encoding whose texts they have.

    Of the latents the first `channels` are noisy. Raises ValueError if nothing tells which rows are the images.
    """
    problem = (
        f"the denoiser was called with {len(inputs.sample)} latents for {len(encodings[-1].positive)} images, under a "
        "text that `encode_prompt` did not return: it mixes other passes in, or the prompt was changed on its way or "
        "by a callback; trace cannot tell the rows apart"
    )
    for encoding in reversed(encodings):
        try:
            halves = encoding.halves(inputs.text, perturbed=perturbed)
        except ValueError as error:
            problem, halves = str(error), None
        if halves is None:
            continue
        one, *other = (inputs.sample[rows][:, :channels] for rows in halves.values())
        if other and not torch.equal(one, other[0]):
            raise ValueError(
                "under guidance, the prompts' rows have other latents than the negative texts', as tiles of several "
                "prompts do: trace cannot tell which rows are the images"
            )
        return halves.get(branch), encoding
    raise ValueError(problem)


def _equal(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(one.to(other), other)
