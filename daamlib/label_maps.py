"""Label maps read from an image's attention: from words alone (zero-shot), or from optimised tokens.

Classes compete at every pixel, the probabilities are propagated along the image's self-attention where the record holds
it, and each pixel takes the most probable class, or 255 (ignore) where the best two are close.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .attention.heatmaps import HeatMaps, upsample
from .attention.record import AttentionRecord
from .cityscapes import BY_NAME, IGNORED
from .tokens.token import OptimizedToken

# class -> the word that stands for it; the surroundings take part, so that no thing need claim what is not its own
STREET_WORDS = {
    "car": "car",
    "person": "person",
    "traffic light": "traffic light",
    "rider": "rider",
    "building": "buildings",
    "road": "road",
    "sidewalk": "sidewalk",
    "sky": "sky",
    "vegetation": "trees",
}
BACKGROUND = "background"


def word_probabilities(record: AttentionRecord, words: Mapping[str, str] | None = None) -> HeatMaps:
    """How the words of a class list share each pixel's attention (zero-shot segmentation).

    All words stand in one text, "a car, a person, ...", so DAAM's softmax compares them; start token, end token and
    padding are left out, and each pixel's attention is divided among the rest.

    Args:
        record: of the image; made with `store="maps"`, it must have been told the text (`text_of`).
        words: {class: word}, default `STREET_WORDS`.

    Returns:
        (K, H, W) shares that sum to one at every pixel, by class.
    """
    words = STREET_WORDS if words is None else words
    maps = record.daam(text_of(words))
    shares = torch.stack([maps[word] for word in words.values()])
    return HeatMaps.of_words(shares / shares.sum(dim=0), tuple(words))


def text_of(words: Mapping[str, str]) -> str:
    """The text in which the words of a class list compete."""
    return ", ".join(word if word.endswith("s") else f"a {word}" for word in words.values())


def token_probabilities(record: AttentionRecord, tokens: Sequence[OptimizedToken]) -> HeatMaps:
    """The softmax of all tokens' calibrated logits, and of a background whose logit is 0.

    Args:
        record: of the image.
        tokens: fitted on the record's model with a scale and a bias, each for one class or several.

    Returns:
        (K + 1, H, W) probabilities that sum to one at every pixel, by class, the last one of the background.

    Raises:
        ValueError: a token has no calibration, or is of another model.
    """
    logits, names = [], []
    for token in tokens:
        of_token = token.logits(record)
        keep = [row for row, word in enumerate(token.words) if word != BACKGROUND]
        logits.append(of_token[keep])
        names += [token.words[row] for row in keep]
    every = torch.cat(logits)
    return HeatMaps.of_words(torch.cat([every, torch.zeros_like(every[:1])]).softmax(dim=0), (*names, BACKGROUND))


def label_map(
    record: AttentionRecord,
    *,
    tokens: Sequence[OptimizedToken] = (),
    words: Mapping[str, str] | None = None,
    size: tuple[int, int] | None = None,
    iterations: int = 1,
    margin: float = 0.1,
) -> np.ndarray:
    """The label map of an image, from optimised tokens or, without any, from words alone.

    Args:
        record: of the image; its maps are refined where it holds self-attention.
        tokens: one for each class, or several classes each.
        words: {class: word} for zero-shot label maps, default `STREET_WORDS`.
        size: (height, width); default the record's grid.
        iterations: of `record.refine`; 0 leaves the probabilities as they are.
        margin: a pixel whose best two probabilities differ by less is 255.

    Returns:
        (height, width) uint8 Cityscapes ids: 0 for the background, 255 where it is not clear.

    Raises:
        ValueError: a class is no Cityscapes label, a token does not fit, or see `word_probabilities`.
    """
    maps = token_probabilities(record, tokens) if tokens else word_probabilities(record, words)
    unknown = [name for name in maps.tokens if name != BACKGROUND and name not in BY_NAME]
    if unknown:
        raise ValueError(f"the classes {unknown} are no Cityscapes labels: expected names such as {list(STREET_WORDS)}")
    if iterations and record.self_attention is not None:
        maps = record.refine(maps, iterations=iterations)
    probabilities = upsample(maps.values, size or record.grid)
    best, second = probabilities.topk(2, dim=0)[0] if len(probabilities) > 1 else (probabilities[0], 0)
    ids = torch.tensor([0 if name == BACKGROUND else BY_NAME[name].id for name in maps.tokens], dtype=torch.uint8)
    found = ids.to(probabilities.device)[probabilities.argmax(dim=0)]
    return found.masked_fill(best - second < margin, IGNORED).cpu().numpy()
