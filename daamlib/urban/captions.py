"""Captions of the street scenes: a small grammar over what is in the scene."""

TIMES = {"day": "by day", "sunset": "at sunset", "night": "at night", "fog": "in the fog"}
PLACES = ("an urban environment", "a city street", "a street", "a city")
RARE = {"car": "vehicle", "person": "pedestrian", "traffic light": "stop light", "rider": "cyclist"}


def _phrase(rng, thing, colours=True):
    """ "a red car on the left", "a person in blue", "a rider"."""
    word = RARE[thing.kind] if rng.random() < 0.03 else thing.kind
    coloured, placed = rng.random() < 0.5, rng.random() < 0.35
    if colours and coloured:
        after = thing.kind in ("person", "rider")
        word = f"{word} in {thing.colour}" if after else f"{thing.colour} {word}"
    if colours and placed:
        word += " in the middle" if thing.side == "middle" else f" on the {thing.side}"
    return ("an " if word[0] in "aeiou" else "a ") + word


def _join(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(rng, things, time, trees):
    """One caption of at most 40 words, lower case.

    rng: numpy Generator; things: the scene's `Thing`s; time: a key of `TIMES`; trees: how many trees there
    are. Raises ValueError for an unknown time."""
    if time not in TIMES:
        raise ValueError(f"time must be one of {tuple(TIMES)}, got {time!r}")
    named = [things[i] for i in rng.permutation(len(things)) if rng.random() > 0.12]
    short, timed, stuffed = rng.random() < 0.22, rng.random() < 0.6, rng.random() < 0.4
    place = PLACES[rng.choice(len(PLACES), p=(0.45, 0.25, 0.2, 0.1))]
    where = ("in " if place != "a street" else "on ") + place
    when = " " + TIMES[time] if timed else ""
    parts = [_phrase(rng, thing, colours=not short) for thing in named]
    if short and parts:
        return _join(parts) + (f" {where}" if rng.random() < 0.5 else "")
    green = ["trees" if trees > 1 else "a tree"] if trees else []
    options = ["buildings", "a building", "a road", "a sidewalk", "the sky"] + green * 3
    stuff = [options[i] for i in rng.permutation(len(options))[: 1 + (rng.random() < 0.4)]]
    if {"buildings", "a building"} <= set(stuff) or len(set(stuff)) < len(stuff):
        stuff = stuff[:1]
    backdrop = f" with {_join(stuff)}" if stuffed else ""
    if not parts:
        return f"{rng.choice(('', 'a photo of '))}{place}{backdrop}{when}"
    kind = rng.random()
    if kind < 0.45:
        return f"{_join(parts)} {where}{backdrop}{when}"
    if kind < 0.6:
        return f"a photo of {place} with {_join(parts + stuff if stuffed else parts)}{when}"
    if kind < 0.75:
        front = "in front of " + ("buildings", "a building", "trees" if trees > 1 else "a building")[rng.integers(3)]
        return f"{_join(parts)} {front}{when}"
    if kind < 0.9:
        return f"{place}{when} with {_join(parts + stuff if stuffed else parts)}"
    return f"a photo of {_join(parts)}{when}"
