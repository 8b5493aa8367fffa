"""Which rows of a denoiser's batch are which images, read from the texts that are passed.

Guidance denoises every image twice, under its prompt and under a negative text, in one pass or in two, in either order.
The texts of the rows are compared with those that `encode_prompt` returned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Rows = slice | list[int]


@dataclass(frozen=True, eq=False)
class Encoding:
    """What one call of `encode_prompt` took and returned, for n images.

    Attributes:
        positive: (n, token, width), the embeddings of the prompts.
        negative: (n, token, width), those of the negative texts, or None.
        prompts: the text of each image, None where embeddings were given.
        negatives: likewise of the negative texts.
        guided: whether a pass under guidance holds both.
        options: the arguments that later texts are to be embedded with, such as `clip_skip`.
    """

    positive: torch.Tensor
    negative: torch.Tensor | None = None
    prompts: tuple[str | None, ...] = ()
    negatives: tuple[str | None, ...] = ()
    guided: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def halves(self, text: torch.Tensor, *, perturbed: bool = False) -> dict[str, Rows] | None:
        """Find the rows of a pass that are the images under their prompts, and those under the negative texts.

        Args:
            text: (batch, token, width) of the pass.
            perturbed: whether the pipeline repeats the prompts' rows for a perturbed pass after them (PAG).

        Returns:
            {"conditional": rows, "unconditional": rows}, as far as the pass has them; None if a row has another text.

        Raises:
            ValueError: the prompts' rows occur more than once.
        """
        n = len(self.positive)
        found = [None] if len(text) % n else [self._kind(chunk) for chunk in text.split(n)]
        kinds = [kind for kind in found if kind is not None]
        if len(kinds) < len(found):
            return None
        if self.guided and len(kinds) > 1 and set(kinds) == {"conditional"}:  # both texts are the same
            kinds[0] = "unconditional"
        if kinds.count("conditional") > 1 + perturbed:
            raise ValueError(
                f"the denoiser was called with the texts of {n} images {kinds.count('conditional')} times in a batch "
                f"of {len(text)}, as several tiles, views or frames of a prompt are: trace cannot tell which rows are "
                "the images"
            )
        return {kind: slice(n * kinds.index(kind), n * (kinds.index(kind) + 1)) for kind in kinds}

    def _kind(self, chunk: torch.Tensor) -> str | None:
        known = {"conditional": self.positive, "unconditional": self.negative}
        return next((kind for kind, values in known.items() if _equal(values, chunk)), None)

    def text_of(self, row: torch.Tensor) -> str | None:
        """Return the prompt or negative text whose (token, width) embeddings these are, None if it is none of them."""
        for values, names in ((self.positive, self.prompts), (self.negative, self.negatives)):
            for own, name in zip(() if values is None else values, names, strict=False):
                if _equal(own, row):
                    return name
        return None


def _equal(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(one.to(other), other)
