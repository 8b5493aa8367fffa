"""Label maps read from an image's attention: from words alone (zero-shot), or from optimised tokens.

Maps are propagated along the image's self-attention, classes compete at every pixel, and each pixel takes the most
probable one, or 255 (ignored) where the best two are close.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from ..attention.heatmaps import HeatMaps, require_ratio, upsample
from ..attention.record import AttentionRecord
from ..attention.text import TextTooLongError, TokenEmbeddings, find_phrases, side_by_side
from ..cityscapes import IGNORED
from ..classes import ClassList, class_list
from ..resources import bundled
from .guided import guided_upsample
from .inputs import BACKGROUND
from .token import OptimizedToken, require_calibrated

# Factor of the scores in the softmax between words. At 1 the margin of `label_map` ignored 39 % of the pixels of 80
# scenes, at 4 9 % (tests/benchmarks/label_maps.py, as all numbers here)
SHARPNESS = 4.0

SINGULAR = ("ss", "us", "is", "gas", "lens", "canvas", "atlas")  # ends of singular nouns in s, as bus and glass

Classes = Mapping[str, str] | OptimizedToken | Sequence[OptimizedToken]  # {class: word}, or tokens
Threshold = float | Mapping[str, float]  # one for all classes, or one for each by its name

_load = functools.cache(OptimizedToken.load)  # a set of images reads the bundled tokens once


def text_of(words: Mapping[str, str]) -> str:
    """Return the text in which the words of {class: word} compete: "a car, a bus, trees, an elephant, ...".

        text = daamlib.text_of({"car": "car", "vegetation": "trees"})
        record.daam(text)["trees"]

    `trace(pipe, store="maps", texts=[text])` stores its maps.
    """
    return ", ".join(_with_article(word) for word in words.values())


def _with_article(word: str) -> str:
    """The word after "a" or "an", unless it has an article or is a plural."""
    lower = word.lower()
    plural = lower.endswith("s") and not lower.endswith(SINGULAR)
    if plural or lower.startswith(("a ", "an ", "the ")):
        return word
    vowel = lower.startswith(tuple("aeiou")) and not lower.startswith(("eu", "one", "uni", "use"))
    return f"{'an' if vowel else 'a'} {word}"


def word_probabilities(
    record: AttentionRecord, words: Mapping[str, str], names: Collection[str] | None = None, *, iterations: int = 1
) -> HeatMaps:
    """Return the probabilities of words that compete for each pixel (zero-shot segmentation), (K, H, W) by class.

        word_probabilities(record, {"car": "car", "sky": "sky"}, iterations=0)["car"]

    All words stand in one text, so DAAM's softmax compares them; if they are more than the text encoder reads, in
    several, side by side as the parts of a long prompt. Start token, end token and padding are left out. Some words
    have more attention everywhere: each refined map is standardised, (D_k - mean) / deviation over the image, before a
    softmax over the words. A word whose thing is not in the image claims its place all the same, so name those that may
    be there (mean IoU of four things, 60 rendered scenes: 59 % by the caption's things alone, 19 % by all four).

    A record made with `store="maps"` must hold the text (`text_of`) of all words. `names` are the classes that a pixel
    may be of (None: all). `iterations` of `record.refine` come first; 0: none. Raises ValueError for fewer than two
    words, and as `AttentionRecord.daam` and `refine`.
    """
    return _competition(record, words, iterations)(names)


def token_probabilities(
    record: AttentionRecord,
    tokens: Sequence[OptimizedToken],
    names: Collection[str] | None = None,
    *,
    iterations: int = 1,
) -> HeatMaps:
    """Return the softmax of all tokens' logits and of a background, whose logit is 0, by class: (K + 1, H, W).

        daamlib.token_probabilities(record, [car, person])["car"]

    The logits of a token fitted with `background=True` are those above its background's. One token thus has the
    probabilities of `OptimizedToken.probabilities`; several compete.

    Propagation (`iterations` of `record.refine`; 0: none) lowers the probabilities, so only its ranking of the pixels
    is used: of each class the n-th most probable pixel afterwards gets the n-th highest probability from before. (Mean
    IoU over the four things of 80 rendered scenes, tokens of five images: 70.3 % without propagation, 73.7 with it.)

    `names` are the classes that take part (None: all). Raises ValueError if there is no token, one has no calibration
    or is of another model, two read one class, or one was fitted to tell its classes apart but not from the background.
    """
    return _competition(record, tokens, iterations)(names)


def _competition(
    record: AttentionRecord, classes: Mapping[str, str] | Sequence[OptimizedToken], iterations: int
) -> Callable[[Collection[str] | None], HeatMaps]:
    """The function from names to the probabilities of these classes of words or tokens, and of a background."""
    words = isinstance(classes, Mapping)
    if isinstance(classes, Mapping):
        scores = _word_scores(record, classes, iterations)
    else:
        scores = _token_logits(record, classes)

    def compete(names: Collection[str] | None) -> HeatMaps:
        def takes_part(name: str) -> bool:
            return names is None or name in names or (not words and name == BACKGROUND)

        if unknown := sorted(set([names] if isinstance(names, str) else names or ()) - set(scores.tokens)):
            raise ValueError(f"names has {', '.join(unknown)}, the classes are {', '.join(scores.tokens)}")
        rows = [row for row, name in enumerate(scores.tokens) if takes_part(name)]
        maps = HeatMaps.of_words(scores.values[rows].softmax(dim=0), tuple(scores.tokens[row] for row in rows))
        if words or not iterations:
            return maps
        ranks = record.refine(maps, iterations=iterations).values.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
        values = maps.values.flatten(1).sort(dim=1).values.gather(1, ranks).view_as(maps.values)
        return replace(maps, values=values / values.sum(dim=0))

    return compete


def _word_scores(record: AttentionRecord, words: Mapping[str, str], iterations: int) -> HeatMaps:
    """(K, H, W) scores of the words' classes, whose softmax are their probabilities."""
    if len(words) < 2:
        raise ValueError(f"words compete with each other: expected two or more, got {list(words)}")
    try:
        of_text = record.daam(text_of(words))
    except TextTooLongError:
        of_text = record.daam_from(side_by_side(_texts(record, words)))
    rows = find_phrases(list(words.values()), of_text.words, of_text.tokens)
    maps = HeatMaps.of_words(torch.stack([of_text.values[of_word].mean(dim=0) for of_word in rows]), tuple(words))
    values = (record.refine(maps, iterations=iterations) if iterations else maps).values
    deviation = values.std(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    standardised = (values - values.mean(dim=(1, 2), keepdim=True)) / deviation
    return replace(maps, values=SHARPNESS * standardised)


def _texts(record: AttentionRecord, words: Mapping[str, str]) -> list[TokenEmbeddings]:
    """The words in as few texts as halving takes, each of them as long as the text encoder reads."""
    try:
        return [record.encode(text_of(words), padding=True)]
    except TextTooLongError:
        if len(words) == 1:
            raise
    names = list(words)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    return [text for half in halves for text in _texts(record, {name: words[name] for name in half})]


def _token_logits(record: AttentionRecord, tokens: Sequence[OptimizedToken]) -> HeatMaps:
    """(K + 1, H, W) logits of all tokens' classes, and last 0 of the background."""
    classes = check_tokens(tokens)
    if is_complete(tokens):
        return HeatMaps.of_words(tokens[0].logits(record), tokens[0].words)
    logits = []
    for token in tokens:
        of_token = token.logits(record)
        if BACKGROUND in token.words:
            of_token = of_token - of_token[token.words.index(BACKGROUND)]
        logits.append(of_token[[row for row, word in enumerate(token.words) if word != BACKGROUND]])
    logits.append(torch.zeros(1, *record.grid, device=record.device))
    return HeatMaps.of_words(torch.cat(logits), (*classes, BACKGROUND))


def check_tokens(tokens: Sequence[OptimizedToken]) -> tuple[str, ...]:
    """Return the classes that tokens read together but for the background; errors as of `token_probabilities`."""
    if other := [each for each in tokens if not isinstance(each, OptimizedToken)]:
        raise TypeError(f"expected optimised tokens, or words as {{class: word}}, got {other[0]!r}")
    classes = [word for token in tokens for word in token.words if word != BACKGROUND]
    if not classes:
        raise ValueError("there is no class to label: expected one optimised token or more")
    twice = sorted({word for word in classes if classes.count(word) > 1})
    if twice:
        raise ValueError(f"two tokens read {', '.join(twice)}: give one token a class")
    if is_complete(tokens) and len(tokens) > 1:
        raise ValueError("tokens of fit_classes label every pixel by themselves: give no others with them")
    for token in tokens:
        require_calibrated(token)
        if token.info.get("multiclass") and token.method != "keys" and BACKGROUND not in token.words:
            raise ValueError(
                f"the token of {', '.join(token.words)} was fitted to tell its classes apart, not to tell them "
                "from the rest of an image: use background=True, or multiclass=False"
            )
    return tuple(classes)


def is_complete(tokens: Sequence[OptimizedToken]) -> bool:
    """Return whether these are tokens of `fit_classes`, which give every pixel a class and know no background."""
    return any(token.method == "keys" for token in tokens)


def ids_of(tokens: Sequence[OptimizedToken]) -> ClassList:
    """Return the class list of the tokens' label maps: the one they were fitted to, or that of their words."""
    words = check_tokens(tokens)
    return class_list(tokens[0].info["classes"] if is_complete(tokens) else words)


def _bundled_tokens(record: AttentionRecord) -> OptimizedToken:
    """The tokens of street scenes that come with the bundled model. ValueError for another model's record."""
    tokens = _load(bundled("urban-tiny") / "street.safetensors")
    try:
        tokens.require_model(record.fingerprint)
    except ValueError as error:
        raise ValueError(
            "only the bundled model comes with tokens of its classes: give words, label_map(record, {'car': 'car', "
            "'sky': 'sky'}), or tokens, label_map(record, daamlib.fit_classes(records, label_maps))"
        ) from error
    return tokens


def label_map(
    record: AttentionRecord,
    classes: Classes | None = None,
    *,
    size: tuple[int, int] | None = None,
    image: Image.Image | UInt8[np.ndarray, "height width 3"] | None = None,
    iterations: int = 1,
    margin: float = 0.1,
    threshold: Threshold | None = None,
    ignore_from: Threshold = 0.0,
    names: Collection[str] | None = None,
    ids: Mapping[str, int] | None = None,
) -> UInt8[np.ndarray, "height width"]:
    """Return the label map of an image, from optimised tokens or, zero-shot, from words alone.

        daamlib.label_map(record, {"car": "car", "sky": "sky"})
        daamlib.label_map(record, [car, person], image=np.asarray(image))

    Without a threshold a pixel has the most probable class (0: the tokens' background), or 255 where it is not clear.

    Args:
        record: Record of the image, traced with `self_attention=True`.
        classes: Tokens, or {class: word}. Default: the street's tokens of the bundled model, of its records.
        size: (height, width); default the image's, without one the record's grid.
        image: The picture, PIL's or an array, whose edges the probabilities follow, at its size. (By tokens of five
            images the mIoU over the four things of 80 rendered scenes was 73.7 % without and 76.4 with it.)
        iterations: Steps of `record.refine`; 0 for a record without self-attention.
        margin: A pixel whose best two probabilities differ by less is 255.
        threshold: Probability from which on a pixel is of a class; one number, or {class: number}.
        ignore_from: Lower end of the ignore band below the threshold; one number, or {class: number}.
        names: Classes that a pixel may be of, such as those that the prompt names; default all. With a threshold, a
            pixel where another class may be is ignored.
        ids: {class: id}; default the ids of Cityscapes, or numbers from 1 for other classes.

    Returns:
        (height, width) ids.

    Raises:
        ValueError: A class has no id, the image is of another size, or see the functions above and `guided_upsample`.
    """
    image = np.asarray(image) if isinstance(image, Image.Image) else image
    if image is not None and size is not None and image.shape[:2] != tuple(size):
        raise ValueError(f"label maps that follow an image have its size {image.shape[:2]}, got size={size}")
    shape = size or (record.grid if image is None or image.ndim != 3 else image.shape[:2])
    require_ratio("the image", (shape[0], shape[1]), record.grid)
    classes = _bundled_tokens(record) if classes is None else classes
    classes = [classes] if isinstance(classes, OptimizedToken) else classes
    if ids is None:
        ids = (class_list(list(classes)) if isinstance(classes, Mapping) else ids_of(classes)).ids
    compete = _competition(record, classes, iterations)
    maps, among = compete(None), None if names is None else compete(names)
    competing = [name for name in maps.tokens if threshold is None or name != BACKGROUND]
    # classes that are not named take no part in the softmax of those that are
    of_class = {name: among[name] if among is not None and name in among.tokens else maps[name] for name in competing}
    values = torch.stack(list(of_class.values()))
    values = upsample(values, size or record.grid) if image is None else guided_upsample(values, image)
    numbers = [0 if name == BACKGROUND else ids[name] for name in competing]
    named = None if among is None else [name in among.tokens for name in competing]
    limits = (0.0, 0.0) if threshold is None else (of_each(threshold, competing), of_each(ignore_from, competing))
    return assign_labels(values.clamp(0, 1), numbers, *limits, margin=margin, named=named)


def of_each(threshold: Threshold, names: Sequence[str]) -> float | list[float]:
    """Return one number for all classes as it is, or the number of each of these."""
    return [threshold[name] for name in names] if isinstance(threshold, Mapping) else threshold


def assign_labels(
    probabilities: Float[torch.Tensor, "K H W"] | Float[np.ndarray, "K H W"],
    ids: Sequence[int],
    threshold: float | Sequence[float] = 0.0,
    ignore_from: float | Sequence[float] = 0.0,
    *,
    margin: float = 0.0,
    named: Sequence[bool] | None = None,
) -> UInt8[np.ndarray, "H W"]:
    """Return the id of each pixel's most probable class, 255 where that is in the ignore band, 0 below it.

        assign_labels(np.array([[[0.9, 0.5, 0.1]]]), [26], 0.6, 0.4)  # 26, 255, 0

    A pixel has the id of the named class with the highest probability p (the first of equals) if p >= threshold and p
    is `margin` above the second. It is 255, to be ignored, if only the margin is missing, if p >= ignore_from, or if
    that holds of any class that is not named; else 0, none of these. `named` says of each class whether a pixel may be
    of it (None: all). Thresholds are one number, or K.

    Raises ValueError for probabilities or a margin outside of [0, 1], or thresholds without 0 <= ignore_from <=
    threshold <= 1.
    """
    if isinstance(probabilities, torch.Tensor):
        probabilities = probabilities.detach().float().cpu().numpy()
    values = np.asarray(probabilities, np.float32)
    if not all(0 <= number < IGNORED for number in ids):
        raise ValueError(f"ids of classes are 0 ... {IGNORED - 1}, got {list(ids)}")
    if values.ndim != 3 or len(values) != len(ids):
        raise ValueError(f"expected (K, H, W) probabilities of {len(ids)} classes, got shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():  # false for NaN too
        raise ValueError("the probabilities are not all in [0, 1], some may be NaN: look at the model's dtype")
    upper, lower = (np.broadcast_to(np.asarray(t, np.float32), len(ids)) for t in (threshold, ignore_from))
    if not ((lower >= 0) & (lower <= upper) & (upper <= 1)).all():
        raise ValueError(f"expected 0 <= ignore_from <= threshold <= 1, got {ignore_from} and {threshold}")
    if not 0 <= margin <= 1:
        raise ValueError(f"margin must be in [0, 1], got {margin}")
    chosen = np.ones(len(ids), bool) if named is None else np.asarray(named, bool)
    ignored = (values[~chosen] >= lower[~chosen, None, None]).any(axis=0)
    if not chosen.any():
        return np.where(ignored, np.uint8(IGNORED), np.uint8(0))
    values, upper, lower, numbers = values[chosen], upper[chosen], lower[chosen], np.asarray(ids, np.uint8)[chosen]
    best, ordered = values.argmax(axis=0), np.sort(values, axis=0)
    highest, second = ordered[-1], ordered[-2] if len(values) > 1 else -1.0
    clear = (highest >= upper[best]) & (highest - second >= margin)
    ignored |= highest >= lower[best]  # among them those that miss the margin alone
    return np.where(clear, numbers[best], np.where(ignored, np.uint8(IGNORED), np.uint8(0)))
