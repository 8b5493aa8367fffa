"""Drawings of the things of a street scene: car, person, traffic light, rider and tree.

Every function takes a `Pen`: local coordinates (u to the right, v up, origin on the ground below the thing),
in units of the thing's size, so that one description serves every place, scale and facing. Details stay wider
than about 1.5 px of a 128 px image: finer ones are lost in the autoencoder.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np


def palette(text: str) -> tuple[tuple[int, ...], ...]:
    """Colours as tuples of three, 0..255: "d02628 2454cd" -> ((208, 38, 40), (36, 84, 205))."""
    return tuple(tuple(bytes.fromhex(colour)) for colour in text.split())


def points(text: str) -> tuple[tuple[float, ...], ...]:
    """A polygon as SVG writes it: "0,.07 1,.2" -> ((0.0, 0.07), (1.0, 0.2))."""
    return tuple(tuple(map(float, pair.split(","))) for pair in text.split())


def mix(a, b, share):
    """Colour `share` of the way from a to b (tuples of three, 0..255)."""
    return tuple(p + (q - p) * share for p, q in zip(a, b, strict=True))


@cache
def smooth(outline, rounds=2):
    """Chaikin's corner cutting of a closed outline."""
    p = np.array(outline)
    for _ in range(rounds):
        nxt = np.roll(p, -1, 0)
        p = np.stack((0.8 * p + 0.2 * nxt, 0.2 * p + 0.8 * nxt), 1).reshape(-1, 2)
    return tuple(map(tuple, p.tolist()))


_NAMES = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
COLOURS = dict(zip(_NAMES, palette("d02628 2454cd 22963e f0c822 f0f0ec 22232a f0801c 843aa8"), strict=True))
LIT = dict(zip(("red", "yellow", "green"), palette("ff3028 ffce28 34f070"), strict=True))
SKIN = palette("fad6b8 e8ba94 c69068 8e5e3e 603e2c")
HAIR = palette("281e1a 543620 96622e deb868 969492 8c381e")
TROUSERS = palette("262e54 40424a 604834 3a5480 b0a080 1e1e24")
GLASS, TYRE, LAMP = palette("9cc2d8 1e1e22 fff4c8")
BLACK, WHITE = (0, 0, 0), (255, 255, 255)

# Per body type: height in units of the length, outline, windows, wheel's radius; rear at 0, front at 1.
CARS = {
    "sedan": (
        0.385,
        points("0,.07 0,.23 .05,.255 .16,.265 .3,.385 .58,.385 .74,.26 .95,.225 1,.17 1,.07"),
        tuple(map(points, (".23,.265 .32,.355 .43,.355 .43,.265", ".46,.265 .46,.355 .57,.355 .67,.265"))),
        0.088,
    ),
    "hatchback": (
        0.43,
        points("0,.07 0,.25 .03,.31 .1,.42 .2,.43 .52,.43 .7,.285 .94,.245 1,.18 1,.07"),
        tuple(map(points, (".09,.29 .15,.395 .34,.395 .34,.29", ".375,.29 .375,.395 .51,.395 .63,.29"))),
        0.096,
    ),
    "van": (
        0.49,
        points("0,.08 0,.47 .02,.49 .7,.49 .76,.46 .88,.29 .98,.25 1,.2 1,.08"),
        tuple(map(points, (".34,.31 .34,.44 .55,.44 .55,.31", ".59,.31 .59,.44 .72,.44 .82,.31"))),
        0.09,
    ),
    "suv": (
        0.45,
        points("0,.1 0,.28 .02,.33 .06,.44 .12,.45 .6,.45 .73,.315 .96,.285 1,.24 1,.1"),
        tuple(map(points, (".08,.32 .11,.415 .34,.415 .34,.32", ".375,.32 .375,.415 .59,.415 .68,.32"))),
        0.105,
    ),
    "pickup": (
        0.43,
        points("0,.1 0,.285 .37,.285 .385,.32 .43,.43 .62,.43 .75,.295 .96,.27 1,.22 1,.1"),
        (points(".44,.29 .47,.395 .6,.395 .69,.29"),),
        0.1,
    ),
}
TORSO = smooth(points("-.125,.8 -.06,.83 .06,.83 .125,.8 .12,.66 .1,.47 -.1,.47 -.12,.66"), 1)
FRINGE = points("-.08,.9 -.075,.96 -.03,.995 .035,.995 .08,.95 .03,.94 -.02,.945 -.045,.9")
HAT = points("-.085,.945 -.07,1 0,1.02 .07,1 .08,.945")
SHOE = points("-.045,0 -.045,.05 .03,.055 .085,.02 .085,0")
HELMET = points("-.085,.005 -.075,.06 -.02,.095 .045,.085 .095,.025")


@dataclass
class Pen:
    """Draws polygons and ellipses at the same place of the image and of the index map.

    `index` is what the index map gets; None draws light only (shadows, markings). `tone` maps a colour to
    what it looks like at this depth and time of day; `glow` draws without it, and collects halos when the
    scene is dark.
    """

    canvas: Any
    x: float = 0.0
    y: float = 1.0
    scale: float = 1.0
    flip: int = 1
    index: int | None = None
    tone: Callable = tuple

    def _place(self, u, v):
        """Image coordinates (fractions of the side, y down) of a local point."""
        return self.x + self.flip * u * self.scale, self.y - v * self.scale

    def _draw(self, shape, corners, colour, lit):
        fill = tuple(min(255, max(0, round(c))) for c in (colour if lit else self.tone(colour)))
        getattr(self.canvas.ink, shape)(corners, fill=fill)
        if self.index is not None:
            getattr(self.canvas.map, shape)(corners, fill=self.index)

    def poly(self, outline, colour, lit=False):
        """A filled polygon."""
        corners = [c * self.canvas.side for u, v in outline for c in self._place(u, v)]
        self._draw("polygon", corners, colour, lit)

    def rect(self, u0, v0, u1, v1, colour, lit=False):
        """A filled rectangle between two corners."""
        self.poly(((u0, v0), (u1, v0), (u1, v1), (u0, v1)), colour, lit)

    def disc(self, u, v, ru, colour, rv=None, lit=False):
        """A filled disc, or an ellipse of the half axes ru and rv."""
        side, (x, y) = self.canvas.side, self._place(u, v)
        rx, ry = ru * self.scale * side, (ru if rv is None else rv) * self.scale * side
        self._draw("ellipse", (x * side - rx, y * side - ry, x * side + rx, y * side + ry), colour, lit)

    def shadow(self, u, ru, rv, colour=(44, 44, 50)):
        """Darkens the ground, which keeps its label."""
        replace(self, index=None).disc(u, 0, ru, colour, rv=rv)

    def limb(self, joints, radius, colour, end=None):
        """A bent tube with round joints; the radius goes linearly from `radius` to `end`."""
        radii = np.linspace(radius, radius if end is None else end, len(joints))
        for (u0, v0), (u1, v1), r0, r1 in zip(joints, joints[1:], radii, radii[1:], strict=False):
            length = max(1e-6, ((u1 - u0) ** 2 + (v1 - v0) ** 2) ** 0.5)
            nu, nv = (v0 - v1) / length, (u1 - u0) / length
            corners = ((u0, v0, r0), (u1, v1, r1), (u1, v1, -r1), (u0, v0, -r0))
            self.poly([(u + nu * r, v + nv * r) for u, v, r in corners], colour)
        for (u, v), r in zip(joints, radii, strict=True):
            self.disc(u, v, r, colour)

    def glow(self, u, v, radius, colour, strength=1.0):
        """Light around a lamp, added at the end."""
        self.canvas.glows.append((*self._place(u, v), radius * self.scale, colour, strength))


def _pick(rng, colours):
    return colours[rng.integers(len(colours))]


def _shade(colour):
    """Return the colour of clothes on the side away from the light; black grows lighter, or it would be invisible."""
    return mix(COLOURS[colour], (150, 150, 160) if colour == "black" else BLACK, 0.24)


def car(pen, rng, colour, night, body):
    """A side view, one unit long, centred on u = 0."""
    _, outline, windows, wheel = CARS[body]
    paint, pen.x = COLOURS[colour], pen.x - 0.5 * pen.flip * pen.scale  # the outlines start at the rear
    pen.shadow(0.5, 0.53, 0.045, (40, 40, 46))
    pen.poly(smooth(outline), paint)
    top = 0.21 if body in ("sedan", "pickup") else 0.24
    # the sill in shade
    pen.poly(((0.005, 0.10), (0.005, 0.15), (0.995, 0.15), (0.995, 0.10)), mix(paint, BLACK, 0.3))
    # light on the belt
    pen.rect(0.02, top - 0.012, 0.97, top + 0.012, mix(paint, WHITE, 0.28))
    glass = (255, 226, 150) if night and rng.random() < 0.3 else mix(GLASS, (70, 90, 110), rng.uniform(0, 0.7))
    for window in windows:
        pen.poly(window, glass)
        rear, top_rear, top_front, front = window
        pane = (top_rear, top_front, mix(top_front, front, 0.35), mix(top_rear, rear, 0.35))
        pen.poly(pane, mix(glass, WHITE, 0.35))
    for u in (0.2, 0.79):
        pen.disc(u, wheel, wheel * 1.2, (22, 22, 26))
        pen.disc(u, wheel, wheel, TYRE)
        pen.disc(u, wheel, wheel * 0.52, (176, 178, 184))
    lamp = outline[-2][1]
    pen.poly(((0.93, lamp - 0.015), (0.93, lamp + 0.03), (0.99, lamp + 0.015), (1, lamp - 0.03)), LAMP, lit=night)
    pen.rect(0, lamp - 0.02, 0.035, lamp + 0.045, (236, 30, 30), lit=night)
    if night:
        pen.glow(1.0, lamp, 0.17, (255, 236, 170), 0.7)
        pen.glow(0, lamp, 0.08, (255, 40, 30), 0.6)


def person(pen, rng, colour, night, body):
    """A standing, walking or waving person, one unit tall from the soles to the hair."""
    shirt, skin, hair, legs = COLOURS[colour], _pick(rng, SKIN), _pick(rng, HAIR), _pick(rng, TROUSERS)
    skirt, hat, long_hair, bag = rng.random(4) < (0.25, 0.22, 0.4, 0.2)
    stride = rng.uniform(0.10, 0.15) if body == "walking" else rng.uniform(0.045, 0.06)
    dark = _shade(colour)
    pen.shadow(0, 0.2, 0.025)
    if bag:
        pen.rect(-0.19, 0.52, -0.06, 0.78, mix(COLOURS["orange"], (70, 40, 20), 0.55))
    # far arm
    pen.limb(((-0.09, 0.75), (-0.135, 0.62), (-0.13 + 0.3 * (stride - 0.05), 0.47)), 0.034, dark)
    pen.disc(-0.13 + 0.3 * (stride - 0.05), 0.455, 0.032, skin)
    shin = skin if skirt else legs
    for side, tint in ((-1, 0.25), (1, 0.0)):
        foot = side * stride
        knee = (foot * 0.55 + (0.03 if body == "walking" else 0), 0.26)
        pen.limb(((side * 0.045, 0.48), knee, (foot, 0.045)), 0.055, mix(shin, BLACK, tint), 0.036)
        pen.poly([(foot + u, v) for u, v in SHOE], (34, 28, 28))
    if skirt:
        pen.poly(((-0.085, 0.53), (0.085, 0.53), (0.15, 0.27), (-0.15, 0.27)), legs)
    if long_hair and not hat:
        pen.disc(-0.025, 0.87, 0.088, hair, rv=0.115)
    pen.limb(((0, 0.8), (0, 0.86)), 0.034, mix(skin, BLACK, 0.15))
    pen.poly(TORSO, shirt)
    pen.rect(-0.10, 0.455, 0.10, 0.485, mix(legs, BLACK, 0.3))
    pen.disc(0.005, 0.905, 0.076, skin, rv=0.086)
    pen.poly(FRINGE, hair)
    if hat:
        pen.poly(HAT, dark)
        pen.rect(0.02, 0.935, 0.125, 0.96, dark)
    if body == "waving":
        pen.limb(((0.10, 0.77), (0.19, 0.82), (0.20, 0.96)), 0.036, dark)
        pen.disc(0.20, 0.98, 0.036, skin)
    else:
        hand = (0.135 + 0.5 * (stride - 0.05), 0.47)
        pen.limb(((0.105, 0.77), (0.135, 0.63), hand), 0.036, dark)
        pen.disc(hand[0], hand[1] - 0.015, 0.034, skin)


def traffic_light(pen, rng, colour, night, body, pole_index):
    """`body` = (width, height, bottom) of the housing and the pen's unit are in units of the image's side."""
    width, height, bottom = body
    half, top, cut, post = width / 2, bottom + height, width * 0.16, replace(pen, index=pole_index)
    pole = rng.uniform(0.013, 0.019)
    post.rect(-pole, -0.005, pole, bottom, (98, 102, 108))
    post.rect(-pole, -0.005, -pole * 0.2, bottom, (134, 138, 144))
    post.rect(-0.03, -0.008, 0.03, 0.018, (84, 86, 92))
    frame = ((196, 198, 200), (112, 114, 120), (222, 178, 40))[rng.choice(3, p=(0.4, 0.35, 0.25))]
    for edge, shade in ((0, frame), (0.013, (36, 40, 42))):
        right = [(half - cut, bottom + edge), (half - edge, bottom + cut)]
        right += [(half - edge, top - cut), (half - cut, top - edge)]
        left = [(-u, v) for u, v in reversed(right)]
        pen.poly((left[-1], *right, *left[:-1]), shade)
    radius = min(width * 0.37, height * 0.145)
    for name, share in (("red", 0.815), ("yellow", 0.5), ("green", 0.185)):
        v = bottom + share * height
        if name == colour:
            pen.disc(0, v, radius, LIT[name], lit=True)
            pen.disc(0, v + radius * 0.1, radius * 0.55, mix(LIT[name], WHITE, 0.5), lit=True)
            pen.glow(0, v, radius * (2.6 if night else 1.9), LIT[name], 0.6 if night else 0.25)
        else:
            pen.disc(0, v, radius, mix(LIT[name], (24, 24, 28), 0.76))


def rider(pen, rng, colour, night, body, ground):
    """A person on a bicycle, one unit tall. The wheels are filled (a blur of spokes): part of the mask."""
    shirt, skin, legs = COLOURS[colour], _pick(rng, SKIN), _pick(rng, TROUSERS)
    names = [n for n in ("red", "blue", "green", "white", "orange", "yellow") if n != colour]
    frame, helmet = (COLOURS[names[i]] for i in rng.permutation(len(names))[:2])
    shoulder = {"upright": (-0.02, 0.80), "leaning": (0.06, 0.785), "racing": (0.125, 0.735)}[body]
    bar = (0.225, 0.60) if body != "racing" else (0.26, 0.55)
    hip, pedals, phase = (-0.125, 0.545), (-0.03, 0.2), rng.uniform(0, 2 * np.pi)
    dark = _shade(colour)
    pen.shadow(0, 0.5, 0.028)

    def leg(angle, tint):
        foot = np.array(pedals) + 0.085 * np.array((np.cos(angle), np.sin(angle)))
        span = foot - hip
        reach = min(0.999, np.hypot(*span) / 0.5)  # thigh and shin are .25 long; the knee bends forward
        bend = 0.25 * (1 - reach**2) ** 0.5 / np.hypot(*span)
        knee = np.array(hip) + span / 2 + bend * np.array((-span[1], span[0]))
        pen.limb((hip, tuple(knee), tuple(foot + (0, 0.02))), 0.056, mix(legs, BLACK, tint), 0.036)
        pen.rect(foot[0] - 0.045, foot[1] - 0.03, foot[0] + 0.07, foot[1] + 0.015, (28, 26, 30))

    for u in (-0.29, 0.30):
        pen.disc(u, 0.205, 0.205, TYRE)
        pen.disc(u, 0.205, 0.165, mix(ground, (215, 218, 225), 0.45))
        pen.disc(u, 0.205, 0.035, (110, 112, 118))
    leg(phase + np.pi, 0.35)
    pen.limb((shoulder, mix(shoulder, bar, 0.5), bar), 0.03, dark)
    pen.limb(((-0.29, 0.205), pedals, (0.19, 0.50), (-0.13, 0.45), (-0.29, 0.205)), 0.019, frame)
    pen.limb((pedals, (-0.145, 0.50)), 0.019, frame)
    pen.limb(((0.30, 0.205), (0.185, 0.52), bar), 0.019, frame)
    pen.rect(-0.21, 0.50, -0.06, 0.53, (30, 28, 30))
    leg(phase, 0)
    pen.limb((hip, mix(hip, shoulder, 0.5), shoulder), 0.075, shirt, 0.082)
    elbow = mix(shoulder, bar, 0.5)
    pen.limb((shoulder, (elbow[0] - 0.015, elbow[1] - 0.035), bar), 0.034, dark)
    pen.disc(*bar, 0.036, skin)
    x, y = shoulder[0] + 0.075, shoulder[1] + 0.125
    pen.disc(x, y, 0.074, skin, rv=0.08)
    pen.poly([(x + u, y + v) for u, v in HELMET], helmet)
    if night:
        pen.disc(bar[0] + 0.03, bar[1] - 0.06, 0.025, LAMP, lit=True)
        pen.glow(bar[0] + 0.05, bar[1] - 0.06, 0.13, (255, 236, 170), 0.6)


def tree(pen, rng, kind, leaf):
    """One unit tall, trunk included (Cityscapes counts the trunk as vegetation)."""
    light, dark = mix(leaf, (255, 255, 190), 0.2), mix(leaf, (0, 16, 20), 0.28)
    pen.rect(-0.03, 0, 0.03, 0.5, (96, 70, 48))
    if kind == "conifer":
        for v, half in ((0.16, 0.25), (0.38, 0.205), (0.6, 0.155)):
            pen.poly(((-half, v), (half, v), (0, v + 0.42)), dark)
            pen.poly(((-half, v), (half * 0.25, v), (0, v + 0.42)), leaf)
    elif kind == "poplar":
        pen.disc(0, 0.57, 0.15, dark, rv=0.43)
        pen.disc(-0.025, 0.59, 0.115, leaf, rv=0.39)
        pen.disc(-0.05, 0.66, 0.055, light, rv=0.24)
    else:
        blobs = [(rng.uniform(-0.17, 0.17), rng.uniform(0.55, 0.8), rng.uniform(0.14, 0.2)) for _ in range(5)]
        blobs.append((0, 0.68, 0.24))
        for lift, shrink, tint in ((0, 1, dark), (0.025, 0.86, leaf), (0.07, 0.45, light)):
            for u, v, r in blobs:
                pen.disc(u - lift * 0.6, v + lift, r * shrink, tint)
