"""The wide world: the same things in scenes whose stuff varies, so that a word for stuff is needed.

In `backdrop` all scenes have sky, buildings, a sidewalk and a road: a caption that names them says nothing. Here each
of them is missing from many scenes, and something else is in its place: a front of houses or a wood without sky, trees,
hills or an open horizon without buildings, and as ground a road, a sidewalk, a square, grass, water or snow, far or
near. `place` returns the words for the stuff of a scene last.

A large area shows through nearly all noise, and so does its kind. A word must be needed while the noise shows where
something is, but not yet its kind: so the areas vary in place and shape (grounds side by side, a house or a wood on one
side that hides the sky), and grounds of different kinds may have the same colours.
"""

import numpy as np
from PIL import Image, ImageDraw

from . import backdrop as bd
from . import objects as ob

GROUNDS = ("road", "sidewalk", "grass", "square", "snow", "water")
NAME = {"buildings": "building", "trees": "vegetation", "a tree": "vegetation", "a fence": "fence"}  # of `STUFF`
MAIN = (0.46, 0.12, 0.16, 0.14, 0.12, 0.0)  # how often each is the ground that things stand on,
FAR = (0.12, 0.38, 0.16, 0.08, 0.08, 0.18)  # a strip behind it,
NEAR = (0.25, 0.4, 0.25, 0.0, 0.1, 0.0)  # or one before it
BEHIND = ("buildings", "trees", "hills", "nothing")  # under the sky
BEHIND_PARTS = (0.44, 0.2, 0.18, 0.18)
LAWNS = ob.palette("6a9e3e 4f8c46 86a84a 5c9434")
WATERS = ob.palette("3c7cae 46929e 2c649a 5a94bc")
SNOWS = ob.palette("eef2f8 e4eaf4 f4f4f2")
GREYS = ob.palette("5c5e64 6e6e72 807e7c 929090 a4a29e b6b2aa")  # of a road, a sidewalk or a square
TILES = (ob.palette("b8765a 985c46"), ob.palette("c8a878 a8865c"), ob.palette("a06470 7e4c5a"))
TILES += tuple((grey, ob.mix(grey, (20, 20, 30), 0.22)) for grey in GREYS)
WOODS = ob.palette("2e6e3c 467e30 24604e 5c8434")
FENCES = ob.palette("e8e4da 7c5434 4a5a50 9a3c34")


def _pick(rng, options, parts=None):
    return options[rng.choice(len(options), p=parts)]


def _houses(canvas, rng, time, ground, left, right, *, full=False):
    """One or two rows of houses between two sides; `full`: without a gap, up over the upper border."""
    for near in (True,) if full else (False, True):
        row = bd.stuff_pen(canvas, time, "building", 0.35 if near else 0.85, 0.06 if near else 0)
        u = left - (rng.uniform(0, 0.15) if left == 0 else 0)
        while u < right - 0.08:
            width = min(rng.uniform(0.17, 0.36) * (1.3 if full else 1), 1.2 if right == 1 else right - u)
            top = 1.02 if full else min(0.95, 1 - ground + rng.uniform(0.16, 0.46))
            wall = ob.mix(_pick(rng, bd.WALLS), (150, 158, 176), 0 if near else 0.4)
            if full or rng.random() > 0.15:
                bd.draw_building(row, rng, u, width, top, 0.998 - ground, wall, time == "night", near)
            u += width


def _wood(canvas, rng, time, ground, left, right, *, full=False):
    """The edge of a wood between two sides; `full`: up over the upper border."""
    leaves, rise = bd.stuff_pen(canvas, time, "vegetation", 0.3, 0.05), 1 - ground
    colour, height = _pick(rng, WOODS), 1.0 if full else rng.uniform(0.1, 0.26)
    if full:
        leaves.rect(left, rise, right, 1, ob.mix(colour, (0, 10, 20), 0.35))
    else:
        leaves.rect(left, rise, right, rise + 0.6 * height, ob.mix(colour, (0, 10, 20), 0.35))
    for layer, tint in enumerate(((0, 16, 20), colour, (255, 255, 190))):
        u = left
        while u < right:
            radius = rng.uniform(0.05, 0.1) * (1.3 if full else 1)
            for v in (0.85, 0.6, 0.3) if full else (1,):
                lift = height * (v - 0.14 * layer) + rng.uniform(-0.04, 0.04)
                at = min(max(u, left + radius), right - radius) if (left, right) != (0, 1) else u
                shade = ob.mix(colour, tint, 0.25 if layer != 1 else 0)
                leaves.disc(at, rise + lift - radius * 0.6, radius * (1, 0.85, 0.4)[layer], shade)
            u += radius * 1.3
    for _ in range(4):
        u = rng.uniform(left, right - 0.03)
        leaves.rect(u, rise, u + 0.024, rise + min(0.22, 0.7 * height), (84, 62, 44))


def _hills(canvas, rng, time, ground, left, right):
    for haze in (0.8, 0.5):
        grass, colour = bd.stuff_pen(canvas, time, "hills", haze), _pick(rng, LAWNS)
        middle, half = rng.uniform(left, right), rng.uniform(0.35, 0.6)
        height = rng.uniform(0.1, 0.24) * (1 if haze > 0.6 else 0.6)
        grass.disc(middle, 1 - ground, half, ob.mix(colour, (90, 110, 110), 0.25), rv=height)


def _fence(canvas, rng, time, ground):
    fence, colour, height = bd.stuff_pen(canvas, time, "fence", 0.2, 0.08), _pick(rng, FENCES), rng.uniform(0.07, 0.12)
    left, right = _pick(rng, ((0, 1), (0, 0.55), (0.45, 1)))
    fence.rect(left, 0.99 - ground, right, 1 - ground + height, colour)
    step = rng.uniform(0.03, 0.05)
    for k in range(int((right - left) / step)):
        u = left + k * step
        fence.rect(u, 0.99 - ground, u + 0.012, 1 - ground + height, ob.mix(colour, (30, 30, 30), 0.4))
    fence.rect(left, 1 - ground + height * 0.8, right, 1 - ground + height * 0.95, ob.mix(colour, (30, 30, 30), 0.25))


def draw_ground(canvas, rng, time, kind, top, bottom, *, far):
    """Draw one ground from `top` down to the lower border, `bottom` being where it will end; returns its colour."""
    pen = bd.stuff_pen(canvas, time, kind, 0.1, 0.07)
    tall = bottom - top

    def spot():
        """A random place, and how large things look there (1 at the lower border)."""
        depth = rng.random()
        v = 1 - top - tall * depth
        return rng.random(), v, 0.35 + 0.65 * (1 - v)

    if kind == "road":
        colour = _pick(rng, bd.ASPHALTS + GREYS)
        pen.rect(0, 0, 1, 1 - top, colour)
        bd.draw_markings(pen, rng, colour, top, bottom, zebras=0 if far or tall < 0.2 else 0.2)
    elif kind == "sidewalk":
        colour = _pick(rng, bd.STONES + GREYS)
        pen.rect(0, 0, 1, 1 - top, colour)
        bd.draw_joints(pen, rng, colour, top, bottom)
        if tall > 0.2:
            for share in (0.22, 0.55):
                pen.rect(0, 1 - top - share * tall, 1, 1.008 - top - share * tall, ob.mix(colour, (60, 60, 70), 0.2))
        bd.draw_kerb(pen, colour, bottom if far else top + 0.014)
    elif kind == "grass":
        colour = _pick(rng, LAWNS)
        pen.rect(0, 0, 1, 1 - top, colour)
        for _ in range(int(20 + 120 * tall)):
            u, v, near = spot()
            shade = ob.mix(colour, _pick(rng, ((20, 50, 20), (230, 240, 120))), 0.25)
            pen.poly(((u, v), (u + 0.016 * near, v), (u + 0.02 * near, v + 0.045 * near)), shade)
        for _ in range(rng.integers(0, 9)):
            u, v, near = spot()
            pen.disc(u, v, 0.011 * near, _pick(rng, ((250, 240, 120), (250, 250, 250), (230, 110, 140))))
    elif kind == "water":
        colour = _pick(rng, WATERS)
        pen.rect(0, 0, 1, 1 - top, colour)
        for _ in range(int(8 + 70 * tall)):
            u, v, near = spot()
            shade = ob.mix(colour, _pick(rng, ((240, 250, 255), (10, 30, 70))), 0.3)
            pen.disc(u, v, 0.1 * near, shade, rv=0.006 + 0.006 * near)
    elif kind == "snow":
        colour = _pick(rng, SNOWS)
        pen.rect(0, 0, 1, 1 - top, colour)
        for _ in range(int(4 + 24 * tall)):
            u, v, near = spot()
            pen.disc(u, v, 0.14 * near, ob.mix(colour, (150, 170, 210), 0.22), rv=0.014 * near)
            pen.disc(u - 0.03, v + 0.01 * near, 0.13 * near, colour, rv=0.014 * near)
    else:
        light, dark = _pick(rng, TILES)
        colour = light
        pen.rect(0, 0, 1, 1 - top, light)
        rows = 3 if far else max(2, round(tall / 0.06))
        edges = [top + tall * (k / rows) ** 1.4 for k in range(rows + 1)]
        for k, (a, b) in enumerate(zip(edges, [*edges[1:-1], 1.0], strict=False)):
            spread = [1 + 1.2 * (y - top) for y in (a, b)]
            for c in range(-8, 9):
                if (c + k) % 2:
                    (p, q), (r, s) = (((0.5 + (c + d) * 0.11 * w) for d in (0, 1)) for w in spread)
                    pen.poly(((p, 1 - a), (q, 1 - a), (s, 1 - b), (r, 1 - b)), dark)
    return colour


def _beside(canvas, rng, top, draw):
    """Call `draw`, and undo it on one side of a line from `top` to the lower border."""
    side, (above, below) = canvas.side, np.clip(0.5 + rng.normal(0, (0.15, 0.3)), -0.3, 1.3)
    kept, edge = Image.new("L", (side, side), 255), 1.0 if rng.random() < 0.5 else 0.0
    corners = ((above, top), (below, 1), (edge, 1), (edge, top))
    ImageDraw.Draw(kept).polygon([(u * side, v * side) for u, v in corners], fill=0)
    before = canvas.image.copy(), canvas.indices.copy()
    draw()
    canvas.image.paste(before[0], mask=kept)
    canvas.indices.paste(before[1], mask=kept)


def _draw_horizon(canvas, rng, time, ground):
    """Draw all above the ground, and return the words for it."""
    words, single = [], rng.random() < 0.5
    top = _pick(rng, ("sky", "houses", "wood"), (0.74, 0.13, 0.13))
    if top == "houses":
        bd.stuff_pen(canvas, time, "building", 0.4).rect(0, 1 - ground, 1, 1, _pick(rng, bd.WALLS))
        _houses(canvas, rng, time, ground, 0, 1, full=True)
        words.append("buildings")
    elif top == "wood":
        _wood(canvas, rng, time, ground, 0, 1, full=True)
        words.append("trees")
    else:
        bd.draw_sky(canvas, rng, time)
        words.append("sky")
        middle = rng.uniform(0.35, 0.65)
        order = rng.choice(4, 2, replace=False, p=BEHIND_PARTS)
        sides = ((0, 1),) if single else ((0, middle), (middle, 1))
        for kind, (left, right) in zip((BEHIND[i] for i in order), sides, strict=False):
            if kind != "nothing":
                {"buildings": _houses, "trees": _wood, "hills": _hills}[kind](canvas, rng, time, ground, left, right)
                words.append(kind)
        if rng.random() < 0.35:
            wide, kind = rng.uniform(0.2, 0.5), "buildings" if rng.random() < 0.7 else "trees"
            left, right = (0, wide) if rng.random() < 0.5 else (1 - wide, 1)
            {"buildings": _houses, "trees": _wood}[kind](canvas, rng, time, ground, left, right, full=True)
            words.append(kind)
    return words


def place(canvas, rng, time, ground):
    """Draw all stuff of a scene whose ground begins at `ground`, in fractions of the image's side from above.

    Returns the upper and lower end of the strip at whose edge things stand, the colour of the ground below, the number
    of single trees, and the words for all stuff there, such as ("sky", "buildings", "road").
    """
    words = _draw_horizon(canvas, rng, time, ground)
    if rng.random() < 0.15:
        _fence(canvas, rng, time, ground)
        words.append("a fence")
    main = _pick(rng, GROUNDS, MAIN)
    far = _pick(rng, GROUNDS, FAR) if rng.random() < 0.72 else main
    near = _pick(rng, GROUNDS, NEAR) if rng.random() < 0.35 else main
    kerb = ground + (rng.uniform(0.07, 0.17) if far != main else 0.05)
    low = 1 - rng.uniform(0.06, 0.15)
    if far != main:
        draw_ground(canvas, rng, time, far, ground, kerb, far=True)
    begin = kerb if far != main else ground
    surface = draw_ground(canvas, rng, time, main, begin, 1.0, far=False)
    words += [far, main]
    if rng.random() < 0.4:
        other = _pick(rng, GROUNDS, MAIN)
        _beside(canvas, rng, begin, lambda: draw_ground(canvas, rng, time, other, begin, 1.0, far=False))
        words.append(other)
    if near not in words:
        draw_ground(canvas, rng, time, near, low, 1.0, far=False)
        words.append(near)
    trees, leaf = int(rng.choice(4, p=(0.55, 0.2, 0.15, 0.1))), _pick(rng, bd.LEAVES, (0.3, 0.25, 0.22, 0.13, 0.1))
    for quarter in rng.permutation(4)[:trees]:
        y = ground + (0.002 if far == "water" else (kerb - ground) * rng.uniform(0.1, 0.4))
        bd.draw_tree(bd.stuff_pen(canvas, time, "vegetation", 0.3, 0.08, y), rng, quarter, leaf)
    if trees and "trees" not in words:
        words.append("trees" if trees > 1 else "a tree")
    if rng.random() < 0.2:
        bd.draw_lamp(bd.stuff_pen(canvas, time, "pole", 0.2, 0.1), rng, ground, time == "night")
    there = {bd.STUFF[i] for i in np.unique(np.asarray(canvas.indices))}  # not all of it: some is hidden
    seen = tuple(word for word in dict.fromkeys(words) if NAME.get(word, word) in there)
    return kerb - 0.03 if far == "water" else ground, kerb, surface, trees, seen
