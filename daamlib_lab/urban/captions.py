"""Captions of the street scenes: a small grammar over what is in the scene."""

from collections.abc import Sequence

import numpy as np

TIMES = {"day": "by day", "sunset": "at sunset", "night": "at night", "fog": "in the fog"}
PLACES = ("an urban environment", "a city street", "a street", "a city")
RARE = {"car": "vehicle", "person": "pedestrian", "traffic light": "stop light", "rider": "cyclist"}
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
LONGEST = 29  # words and commas of a caption: with start and end token they fit a context of 32 tokens


def _phrase(rng, thing, colour, side):
    """Name a thing, as in "a red car on the left" or "a rider"; colour, side: how often they are said."""
    word = RARE[thing.kind] if rng.random() < 0.03 else thing.kind
    coloured, placed = rng.random() < colour, rng.random() < side
    if coloured:
        after = thing.kind in ("person", "rider")
        word = f"{word} in {thing.colour}" if after else f"{thing.colour} {word}"
    if placed:
        word += " in the middle" if thing.side == "middle" else f" on the {thing.side}"
    return ("an " if word[0] in "aeiou" else "a ") + word


def _bare(phrase):
    """The phrase without its article: "red car"."""
    return phrase.removeprefix("a ").removeprefix("an ").removeprefix("the ")


def _check(time):
    if time not in TIMES:
        raise ValueError(f"time must be one of {tuple(TIMES)}, got {time!r}")


def _place(rng):
    """Such as "a city" and "in a city"."""
    place = PLACES[rng.choice(len(PLACES), p=(0.45, 0.25, 0.2, 0.1))]
    return place, ("on " if place == "a street" else "in ") + place


def join_words(parts):
    """Such as "a car, a person and a tree"; `parts` holds at least one."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(rng: np.random.Generator, things: Sequence, time: str, trees: int) -> str:
    """One caption of at most `LONGEST` words and commas, in lower case.

    It names every thing, and half of the time all stuff too. A word that is always said when its thing is there stands
    for the thing; where everything has a separate word, no word need stand for the rest of the picture. One caption
    in seven names things alone, as short prompts do; one in eight is a list without articles, so that a lone word is
    nothing new.

    Args:
        rng: a numpy Generator.
        things: the scene's `Thing`s.
        time: a key of `TIMES`.
        trees: how many trees there are.

    Returns:
        The caption.

    Raises:
        ValueError: for an unknown time.
    """
    _check(time)
    style = rng.random()
    colour, side = (0.85, 0.5) if style < 0.75 else (0.3, 0.15) if style < 0.85 else (0.0, 0.0)
    parts = [_phrase(rng, things[i], colour, side) for i in rng.permutation(len(things))]
    place, where = _place(rng)
    when = " " + TIMES[time] if rng.random() < 0.6 else ""
    stuff = ["a building" if rng.random() < 0.3 else "buildings"]
    stuff += ["a road", "a sidewalk", "the sky"] if rng.random() < 0.4 else ["road", "sidewalk", "sky"]
    stuff += ["trees" if trees > 1 else "a tree"] if trees else []
    stuff = [stuff[i] for i in rng.permutation(len(stuff))]
    if style >= 0.5:
        stuff = stuff[: rng.choice(3, p=(0.6, 0.25, 0.15))]
    kind, everything = rng.random(), parts + stuff
    if not everything:
        text = f"{rng.choice(('', 'a photo of '))}{place}{when}"
    elif rng.random() < 0.12:
        text = ", ".join(map(_bare, everything)) + when * (kind < 0.3)
    elif not parts:
        text = f"{place} with {join_words(stuff)}{when}"
    elif kind < 0.35:
        text = f"{join_words(parts)} {where}{' with ' * (len(stuff) > 0)}{join_words(stuff) if stuff else ''}{when}"
    elif kind < 0.5:
        text = f"a photo of {place} with {join_words(everything)}{when}"
    elif kind < 0.65 and len(stuff) <= 2:
        behind = [name for name in stuff if name in ("buildings", "a building", "trees", "a tree", "the sky", "sky")]
        text = f"{join_words(parts)} in front of {[*behind, 'buildings'][0]}{when}"
    elif kind < 0.8:
        text = f"{place}{when} with {join_words(everything)}"
    else:
        text = f"{'a photo of ' * (kind < 0.9)}{join_words(everything)}{when}"
    shorter = (join_words(everything), join_words(parts + stuff[:2])) if parts else ()
    return next((t for t in (text, *shorter) if len(t.replace(",", " ,").split()) <= LONGEST), text)


ARTICLES = {"sky": "the ", "road": "a ", "sidewalk": "a ", "square": "a "}  # of stuff, half of the time


def wide_caption(rng: np.random.Generator, things: Sequence, time: str, stuff: Sequence[str]) -> str:
    """One caption of a scene of the wide world, of at most `LONGEST` words and commas, in lower case.

    Most name all things and all stuff; where that is too long, colours and sides are left out. One in eight names
    things alone, as short prompts do, and one in eight some of all there is, down to a lone word. Only where there is a
    road the place may be a street.

    Args:
        rng: a numpy Generator.
        things: the scene's `Thing`s.
        time: a key of `TIMES`.
        stuff: the words for what else is there.

    Returns:
        The caption.

    Raises:
        ValueError: for an unknown time.
    """
    _check(time)
    style, form, articles = rng.random(), rng.random(), rng.random() < 0.5
    order = [things[i] for i in rng.permutation(len(things))]
    full, short = ([_phrase(rng, thing, *often) for thing in order] for often in ((0.8, 0.4), (0, 0)))
    if style > 0.7:
        full = short
    words = ["a building" if word == "buildings" and rng.random() < 0.2 else word for word in stuff]
    words = [ARTICLES.get(word, "") * articles + word for word in rng.permutation(words).tolist()]
    some = [*full, *words]
    if style < 0.125 and things:
        words = []
    elif style < 0.25:
        some = [some[i] for i in rng.permutation(len(some))[: rng.choice((1, 2, 3), p=(0.6, 0.25, 0.15))]]
        full, words = [part for part in some if part in full], [part for part in some if part in words]
        short = full
    place, where = _place(rng) if "road" in stuff else (PLACES[0], f"in {PLACES[0]}")
    when = " " + TIMES[time] if rng.random() < 0.6 else ""
    parts, fewer = ([*some, *words] if articles else [*words, *some] for some in (full, short))
    bare, sentence = ", ".join(map(_bare, parts)), join_words(parts)
    if form < 0.2:
        text = bare + when * (form < 0.1)
    elif form < 0.45:
        text = f"{sentence} {where}{when}"
    elif form < 0.6:
        text = f"{place}{when} with {sentence}"
    else:
        text = f"{'a photo of ' * (form < 0.7)}{sentence}{when}"
    texts = (text, sentence, join_words(fewer), ", ".join(map(_bare, fewer)))
    return next(text for text in texts if len(text.replace(",", " ,").split()) <= LONGEST)
