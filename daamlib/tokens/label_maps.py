"""Label maps read from an image's attention: from words alone (zero-shot), or from optimised tokens.

Maps are propagated along the image's self-attention, classes compete at every pixel, and each pixel takes the most
probable one, or 255 (ignored) where the best two are close.

    label_map(record, {"sky": "sky", "car": "cars"})    # {class: word}
    label_map(record, [token], size=(512, 512))         # optimised tokens
    label_map(record, image=np.asarray(image))          # the bundled model's, of all classes of the street
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, UInt8

from ..attention.heatmaps import HeatMaps, require_ratio, upsample
from ..attention.record import AttentionRecord
from ..attention.text import TextTooLongError, TokenEmbeddings, find_phrases, side_by_side
from ..cityscapes import IGNORED
from ..classes import ClassList, class_list
from ..resources import bundled
from .guided import guided_upsample
from .optimize import BACKGROUND
from .token import OptimizedToken, require_calibrated

# Of the softmax between words: at 1 the margin of `label_map` ignored 39 % of the pixels of 80 scenes, at 4 9 %
# (tests/benchmarks/label_maps.py, as all numbers here)
SHARPNESS = 4.0

SINGULAR = ("ss", "us", "is", "gas", "lens", "canvas", "atlas")  # what singular nouns in s end in, as bus and glass

Classes = Mapping[str, str] | OptimizedToken | Sequence[OptimizedToken]  # {class: word}, or tokens
Threshold = float | Mapping[str, float]  # one for all classes, or one for each by its name

_load = functools.cache(OptimizedToken.load)  # a set of images reads the bundled tokens once


def text_of(words: Mapping[str, str]) -> str:
    """Return the text in which the words of a class list compete: "a car, a bus, trees, an elephant, ...".

    Args:
        words: {class: word}.

    Returns:
        The text, one of those to give to `trace(pipe, store="maps", texts=[...])`.
    """
    return ", ".join(_with_article(word) for word in words.values())


def _with_article(word: str) -> str:
    """Return the word after "a" or "an", unless it has an article or is a plural."""
    lower = word.lower()
    plural = lower.endswith("s") and not lower.endswith(SINGULAR)
    if plural or lower.startswith(("a ", "an ", "the ")):
        return word
    vowel = lower.startswith(tuple("aeiou")) and not lower.startswith(("eu", "one", "uni", "use"))
    return f"{'an' if vowel else 'a'} {word}"


def word_probabilities(
    record: AttentionRecord,
    words: Mapping[str, str],
    names: Collection[str] | None = None,
    *,
    iterations: int = 1,
) -> HeatMaps:
    """How words compete for each pixel (zero-shot segmentation).

    All words stand in one text, so DAAM's softmax compares them; where they are more than the text encoder reads, in
    several, which stand side by side as the parts of a long prompt do. Start token, end token and padding are left out.
    Some words have more attention everywhere: each refined map is standardised, (D_k - mean) / deviation over the
    image, before a softmax over the words. A word whose thing is not there claims its place all the same, so name those
    that may be there. (Of 60 rendered scenes the most probable class had a mean IoU of 59 % over the four things where
    the things of the caption alone took part, and of 19 % where all four did; by each word's part of the attention 42
    and 23 %.)

    Args:
        record: Of the image; one made with `store="maps"` must hold the text (`text_of`), which is one for all.
        words: {class: word}.
        names: Of the classes that a pixel may be of, default all; the text is that of all.
        iterations: Of `record.refine` on the words' maps, before they compete; 0 leaves them as they are.

    Returns:
        (K, H, W) probabilities that sum to one at every pixel, by class.

    Raises:
        ValueError: There are less than two words, or see `AttentionRecord.daam` and `refine`.
    """
    return _competing_words(_word_scores(record, words, iterations=iterations), names)


def _word_scores(record: AttentionRecord, words: Mapping[str, str], *, iterations: int) -> HeatMaps:
    """(K, H, W) scores of the words' classes, of which a softmax makes probabilities."""
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
    """Return the words in as few texts as halving takes, each of them as long as the text encoder reads."""
    try:
        return [record.encode(text_of(words), padding=True)]
    except TextTooLongError:
        if len(words) == 1:
            raise
    names = list(words)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    return [text for half in halves for text in _texts(record, {name: words[name] for name in half})]


def _competing_words(scores: HeatMaps, names: Collection[str] | None = None) -> HeatMaps:
    """What `word_probabilities` makes of the scores of the named classes."""
    rows = [row for row, name in enumerate(scores.tokens) if names is None or name in names]
    return HeatMaps.of_words(scores.values[rows].softmax(dim=0), tuple(scores.tokens[row] for row in rows))


def token_probabilities(
    record: AttentionRecord,
    tokens: Sequence[OptimizedToken],
    names: Collection[str] | None = None,
    *,
    iterations: int = 1,
) -> HeatMaps:
    """The softmax of all tokens' calibrated logits and of a background, whose logit is 0.

    Of a token that was fitted with `background=True` the logits are those above its own background's. The probabilities
    of one token are thus its own (`OptimizedToken.probabilities`); several compete.

    Propagation averages, so that few pixels of an object stay above one half. What it knows is the order of the
    pixels: of each class the n-th most probable pixel afterwards gets the n-th highest probability from before. (Mean
    IoU of the most probable class over the four things of 80 rendered scenes, by tokens of five images: 70.3 % without
    propagation and 73.7 with it.)

    Args:
        record: Of the image.
        tokens: Fitted on the record's model, each for one class or several.
        names: Of the classes that take part, default all.
        iterations: Of `record.refine`; 0 leaves the probabilities as they are.

    Returns:
        (K + 1, H, W) probabilities that sum to one at every pixel, by class, the last one of the background.

    Raises:
        ValueError: There is no token, one has no calibration or is of another model, two read one class, or one was
            fitted to tell its classes apart but not from the background.
    """
    return _competing(record, _token_logits(record, tokens), names, iterations=iterations)


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


def _competing(
    record: AttentionRecord, logits: HeatMaps, names: Collection[str] | None = None, *, iterations: int
) -> HeatMaps:
    """What `token_probabilities` makes of the logits of the background and of the named classes."""
    rows = [i for i, name in enumerate(logits.tokens) if name == BACKGROUND or names is None or name in names]
    maps = HeatMaps.of_words(logits.values[rows].softmax(dim=0), tuple(logits.tokens[i] for i in rows))
    if not iterations:
        return maps
    values = _in_order_of(record.refine(maps, iterations=iterations).values, maps.values)
    return replace(maps, values=values / values.sum(dim=0))


def _in_order_of(ranking: Float[torch.Tensor, "K H W"], values: Float[torch.Tensor, "K H W"]) -> torch.Tensor:
    """The values of each map, placed so that its pixels have the order that they have in `ranking`."""
    ranks = ranking.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
    return values.flatten(1).sort(dim=1).values.gather(1, ranks).view_as(values)


def check_tokens(tokens: Sequence[OptimizedToken]) -> tuple[str, ...]:
    """The classes that tokens read together, in their order, the background left out.

    Args:
        tokens: As of `token_probabilities`.

    Returns:
        The names of the classes.

    Raises:
        ValueError: See `token_probabilities`.
    """
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
    """Whether these are tokens of `fit_classes`, which give every pixel a class and know no background."""
    return any(token.method == "keys" for token in tokens)


def ids_of(tokens: Sequence[OptimizedToken]) -> ClassList:
    """Return the class list of the tokens' label maps: the one they were fitted to, or that of their words."""
    return class_list(tokens[0].info["classes"] if is_complete(tokens) else check_tokens(tokens))


def _bundled_tokens(record: AttentionRecord) -> OptimizedToken:
    """Return the tokens of street scenes that come with the bundled model. ValueError for another model's record."""
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
    image: UInt8[np.ndarray, "height width 3"] | None = None,
    iterations: int = 1,
    margin: float = 0.1,
    threshold: Threshold | None = None,
    ignore_from: Threshold = 0.0,
    names: Collection[str] | None = None,
    ids: Mapping[str, int] | None = None,
) -> UInt8[np.ndarray, "height width"]:
    """The label map of an image, from optimised tokens or, zero-shot, from words alone.

    Without a threshold a pixel has the most probable class (0: the tokens' background), or 255 where it is not clear.

    Args:
        record: Of the image, traced with `self_attention=True`.
        classes: Tokens, or {class: word}. Default: the street's tokens of the bundled model, of its records.
        size: (height, width); default the image's, without one the record's grid.
        image: The picture itself, whose edges the probabilities follow (`guided_upsample`), at its size. (By tokens of
            five images the mean IoU over the four things of 80 rendered scenes was 73.7 % without and 76.4 with it.)
        iterations: Of `record.refine`; 0 for a record without self-attention.
        margin: A pixel whose best two probabilities differ by less is 255.
        threshold: Probability from which on a pixel is of a class; one number, or {class: number}.
        ignore_from: With a threshold, the lower end of the ignore band, likewise.
        names: Of the classes that a pixel may be of, such as those that the prompt names; default all. With a
            threshold, a pixel where another may be is ignored.
        ids: {class: id}; default those of Cityscapes, and of classes that it has not their numbers from 1.

    Returns:
        (height, width) ids: 0 for the background of tokens, 255 where it is not clear.

    Raises:
        ValueError: A class has no id, the record holds no self-attention, the image is of another size, or see
            `word_probabilities`, `token_probabilities`, `guided_upsample` and `assign_labels`.
    """
    if image is not None and size is not None and image.shape[:2] != tuple(size):
        raise ValueError(f"label maps that follow an image have its size {image.shape[:2]}, got size={size}")
    if image is not None and image.ndim == 3:
        require_ratio("the image", (image.shape[0], image.shape[1]), record.grid)
    classes = _bundled_tokens(record) if classes is None else classes
    classes = [classes] if isinstance(classes, OptimizedToken) else classes
    if ids is None:
        ids = (class_list(list(classes)) if isinstance(classes, Mapping) else ids_of(classes)).ids
    if isinstance(classes, Mapping):
        compete = functools.partial(_competing_words, _word_scores(record, classes, iterations=iterations))
    else:
        compete = functools.partial(_competing, record, _token_logits(record, classes), iterations=iterations)
    maps, among = compete(), None if names is None else compete(names=names)
    competing = [name for name in maps.tokens if threshold is None or name != BACKGROUND]
    # what is not named takes no part in the softmax of what is
    found = {name: among[name] if among is not None and name in among.tokens else maps[name] for name in competing}
    values = torch.stack(list(found.values()))
    values = upsample(values, size or record.grid) if image is None else guided_upsample(values, image)
    numbers = [0 if name == BACKGROUND else ids[name] for name in competing]
    named = None if among is None else [name in among.tokens for name in competing]
    limits = (0.0, 0.0) if threshold is None else (of_each(threshold, competing), of_each(ignore_from, competing))
    return assign_labels(values.clamp(0, 1), numbers, *limits, margin=margin, named=named)


def of_each(threshold: Threshold, names: Sequence[str]) -> float | list[float]:
    """One number, or that of each class.

    Args:
        threshold: One number, or {class: number}.
        names: Of the classes.

    Returns:
        The number, or a number for each name.
    """
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
    """The id of each pixel's most probable class where that is probable enough, 255 in the ignore band, 0 below it.

    A pixel has the id of the named class with the highest probability p (the first of equals) if p >= threshold and p
    is `margin` above the second. It is 255, to be ignored, if only the margin is missing, if p >= ignore_from, or if
    that holds of any class that is not named; else 0, none of these.

    Args:
        probabilities: In [0, 1].
        ids: Of the K classes.
        threshold: One number, or K of them.
        ignore_from: The ignore band's lower end, one number or K of them, at most the threshold.
        margin: Between the best two named classes.
        named: K times whether a pixel may be of the class; None: all.

    Returns:
        The ids.

    Raises:
        ValueError: Other probabilities, thresholds without 0 <= ignore_from <= threshold <= 1, or a margin outside of
            [0, 1].
    """
    if isinstance(probabilities, torch.Tensor):
        probabilities = probabilities.detach().float().cpu().numpy()
    values = np.asarray(probabilities, np.float32)
    if values.ndim != 3 or len(values) != len(ids):
        raise ValueError(f"expected (K, H, W) probabilities of {len(ids)} classes, got shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():  # false for NaN too
        raise ValueError("the probabilities are not all in [0, 1], some may be NaN: look at the model's dtype")
    upper, lower = (np.broadcast_to(np.asarray(t, np.float32), len(ids)) for t in (threshold, ignore_from))
    if not ((lower >= 0) & (lower <= upper) & (upper <= 1)).all():
        raise ValueError(f"expected 0 <= ignore_from <= threshold <= 1, got {ignore_from} and {threshold}")
    if not 0 <= margin <= 1:
        raise ValueError(f"margin must be in [0, 1], got {margin}")
    chosen = np.flatnonzero(np.ones(len(ids), bool) if named is None else named)
    others = np.setdiff1d(np.arange(len(ids)), chosen)
    ignored = (values[others] >= lower[others, None, None]).any(axis=0)
    labels = np.zeros(values.shape[1:], np.uint8)
    if not len(chosen):
        return np.where(ignored, np.uint8(IGNORED), labels)
    best, ordered = chosen[values[chosen].argmax(axis=0)], np.sort(values[chosen], axis=0)
    highest = ordered[-1]
    probable = highest >= upper[best]
    ignored |= highest >= lower[best]
    labels = np.where(probable, np.asarray(ids, np.uint8)[best], np.where(ignored, np.uint8(IGNORED), labels))
    close = highest - ordered[-2] < margin if len(chosen) > 1 else np.zeros_like(probable)
    return np.where(probable & close, np.uint8(IGNORED), labels)
