"""The maps of joint attention: one function a formula. All are of one block and step; their sums are the maps.

n images, h heads, p positions of the image, m tokens of a text, s = d_head ** -0.5. q and k are as the softmax meets
them, after the norms and the rotation; o is what a token's attention returns, before the output projection.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float

from ..batches import Rows
from ..fingerprint import random_signs
from ..precision import without_autocast
from ..softmax import MAX_BYTES, attention_error

# How far two computations of one thing may differ between processors, as a part of its length: the largest difference,
# and four times their root mean square
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.12}
CHECKED = 4  # positions at which the attention's output is compared with its formula


@dataclass(frozen=True, eq=False)
class JointAttention:
    """Tensors of one joint attention of the image and a text in one pass."""

    name: str  # its module path in the denoiser
    scale: float  # s
    queries: Float[torch.Tensor, "n h p d"]  # q of the image
    image_keys: Float[torch.Tensor, "n h p d"]
    text_keys: Float[torch.Tensor, "n h m d"]
    mask: Bool[torch.Tensor, "n m"] | None  # which tokens take part; None: all
    image_vectors: Float[torch.Tensor, "n p channels"]  # o of the image
    text_vectors: Float[torch.Tensor, "n m channels"] | None  # None where the model uses none (the last block of SD 3)
    values: Float[torch.Tensor, "n k channels"]  # v of the text and then of the image

    def numbers(self) -> Float[torch.Tensor, "n 5 probes"]:
        """Return products u_j^T X v_j with fixed random signs of all that maps are made of: q, both k, and both o."""
        parts = [part.transpose(1, 2).flatten(2) for part in (self.queries, self.image_keys, self.text_keys)]
        parts += [self.image_vectors, self.image_vectors[:, :0] if self.text_vectors is None else self.text_vectors]
        dtype = torch.promote_types(self.queries.dtype, torch.float32)
        products = []
        for part in parts:
            rows, columns = (random_signs(size, seed=3).to(part.device, dtype) for size in part.shape[1:])
            products.append(((rows @ part.to(dtype)) * columns).sum(dim=2))
        return torch.stack(products, dim=1)

    @without_autocast
    def require_softmax(self) -> None:
        """ValueError unless the image's o is softmax(s q k) v, here at a few positions."""
        places = slice(0, None, max(1, self.queries.shape[2] // CHECKED))
        queries, output = self.queries[:, :, places], self.image_vectors[:, places]
        keys = torch.cat([self.text_keys, self.image_keys], dim=2)
        values = self.values.unflatten(2, (queries.shape[1], -1)).transpose(1, 2)
        error = float(attention_error(queries, keys, values, output, self.scale, self.mask))
        if error > TOLERANCE[output.dtype]:  # NaN is an error where it is read
            raise ValueError(
                f"{self.name} does not compute softmax(q k) v of its text and image, it is off by {error:.1%}: its "
                "processor masks, re-weights or re-uses the attention. Its maps are not DAAM's"
            )

    def rows(self, rows: Rows) -> "JointAttention":
        """Return the same of some images of the batch."""
        tensors: dict[str, Any] = {name: part for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        return replace(self, **{name: part[rows] for name, part in tensors.items()})


def prompt_daam(image: JointAttention, max_bytes: int = MAX_BYTES) -> Float[torch.Tensor, "n m p"]:
    """Return DAAM of the prompt (Tang et al. 2022): the block image -> text of the joint softmax, summed over heads.

        D[m, p] = sum_h  exp(s q_p . k_m) / ( sum_text exp(s q_p . k) + sum_image exp(s q_p . k) )

    Exact: these are the probabilities that the model works with. The image's positions share the softmax, so the maps
    of all tokens do not sum to one. They are in float32 or wider; `max_bytes` bounds the probabilities held at a time.
    """
    dtype = torch.promote_types(image.queries.dtype, torch.float32)
    keys = torch.cat([image.text_keys, image.image_keys], dim=2).to(dtype) * image.scale
    n, heads, total, _ = keys.shape
    tokens = image.text_keys.shape[2]
    rows = max(1, max_bytes // (n * heads * total * keys.element_size()))
    maps = []
    for queries in image.queries.split(rows, dim=2):
        scores = queries.to(dtype) @ keys.transpose(2, 3)
        if image.mask is not None:
            scores[..., :tokens].masked_fill_(~image.mask[:, None, None], -torch.inf)
        maps.append(scores.softmax(dim=3)[..., :tokens].sum(dim=1).transpose(1, 2))
    return torch.cat(maps, dim=2)


def open_vocabulary_daam(
    image: JointAttention, text: JointAttention, pool: Float[torch.Tensor, "k m"]
) -> Float[torch.Tensor, "n k p"]:
    """Return open-vocabulary DAAM: the same scores against the keys of another text, softmax over its words.

        D[k, p] = sum_h softmax_k ( s q_p . k_k )

    The keys are those that the text would have in the prompt's place; `pool` averages those of a word's tokens. Words
    compete with each other alone. Over the k the maps sum to the number of heads.
    """
    return _scores(image, text, pool).softmax(dim=2).sum(dim=1)


def lone_word(
    image: JointAttention, text: JointAttention, pool: Float[torch.Tensor, "k m"]
) -> Float[torch.Tensor, "n k p"]:
    """Return the scores of a text that is run by itself, without a softmax, as LDAAM has none.

        L[k, p] = sum_h s q_p . k_k

    Linear in the key k_k of each block, but NOT in the text's embedding: between the two lie the blocks that the text
    ran through, together with the image. Maps have any sign.
    """
    return _scores(image, text, pool).sum(dim=1)


def concept_map(
    image: JointAttention, text: JointAttention, pool: Float[torch.Tensor, "k m"]
) -> Float[torch.Tensor, "n k p"] | None:
    """Return the concept map, in the output space of the attention (ConceptAttention, Helbling et al., ICML 2025).

        C[k, p] = softmax_k <o_p, o_k>

    o_k is the mean of a word's tokens. Published with a mean over blocks and steps, and with words modulated by a
    pooled text of zeros; here with a sum, and the prompt's. Over the k the maps sum to 1. None without text vectors.
    """
    if text.text_vectors is None:
        return None
    dtype = torch.promote_types(image.queries.dtype, torch.float32)
    vectors = pool.to(text.text_vectors.device, dtype) @ text.text_vectors.to(dtype)
    return (vectors @ image.image_vectors.to(dtype).transpose(1, 2)).softmax(dim=1)


def _scores(image: JointAttention, text: JointAttention, pool: torch.Tensor) -> torch.Tensor:
    """Return s q . k, (n, h, k, p)."""
    dtype = torch.promote_types(image.queries.dtype, torch.float32)
    keys = pool.to(text.text_keys.device, dtype) @ text.text_keys.to(dtype) * image.scale
    return keys @ image.queries.to(dtype).transpose(2, 3)


Formula = Callable[[JointAttention, JointAttention, torch.Tensor], torch.Tensor | None]  # of image, text and pool
Formulae = Callable[[JointAttention, tuple[JointAttention, ...]], Mapping[str, torch.Tensor | None]]


class Sums(dict[str, torch.Tensor]):
    """Sums of what formulae make of the image and of each further text, over the blocks and passes that are read."""

    def __init__(self, formulae: Formulae):
        super().__init__()
        self._formulae = formulae
        self.numbers: list[torch.Tensor] = []  # `JointAttention.numbers` of each block

    @without_autocast
    def read(self, image: JointAttention, texts: tuple[JointAttention, ...]) -> None:
        """Add what the formulae make of one block; blocks may lie on several devices."""
        self.numbers.append(image.numbers())
        for name, value in self._formulae(image, texts).items():
            if value is not None:
                self[name] = self[name] + value.to(self[name].device) if name in self else value

    def computed(self, image: int, passes: int) -> Float[torch.Tensor, "passes blocks 5 probes"]:
        """Return the numbers of one image of the batch, on the CPU."""
        return torch.stack([of_block[image].float().cpu() for of_block in self.numbers]).unflatten(0, (passes, -1))
