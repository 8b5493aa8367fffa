"""How the things of a street scene are drawn: car, person, traffic light, rider and tree.

Every function takes a `Pen`: local coordinates (u to the right, v up, origin on the ground below the thing),
in units of the thing's size, so that one description serves every place, scale and facing. Details stay wider
than about 1.5 px of a 128 px image: finer ones are lost in the autoencoder."""

from functools import cache

import numpy as np

COLOURS = {
    "red": (208, 38, 40),
    "blue": (36, 84, 205),
    "green": (34, 150, 62),
    "yellow": (240, 200, 34),
    "white": (240, 240, 236),
    "black": (34, 35, 42),
    "orange": (240, 128, 28),
    "purple": (132, 58, 168),
}
SKIN = ((250, 214, 184), (232, 186, 148), (198, 144, 104), (142, 94, 62), (96, 62, 44))
HAIR = ((40, 30, 26), (84, 54, 32), (150, 98, 46), (222, 184, 104), (150, 148, 146), (140, 56, 30))
TROUSERS = ((38, 46, 84), (64, 66, 74), (96, 72, 52), (58, 84, 128), (176, 160, 128), (30, 30, 36))
GLASS, TYRE, LAMP = (156, 194, 216), (30, 30, 34), (255, 244, 200)
LIT = {"red": (255, 48, 40), "yellow": (255, 206, 40), "green": (52, 240, 112)}


def mix(a, b, share):
    """Colour `share` of the way from a to b (tuples of three, 0..255)."""
    return tuple(p + (q - p) * share for p, q in zip(a, b, strict=True))


class Pen:
    """Draws polygons and ellipses at the same place of the image and of the index map.

    `index` is what the index map gets; None draws light only (shadows, markings). `tone` maps a colour to
    what it looks like at this depth and time of day; `glow` draws without it, and collects halos when the
    scene is dark."""

    def __init__(self, canvas, x=0.0, y=1.0, scale=1.0, flip=1, index=None, tone=lambda colour: colour):
        self.canvas, self.x, self.y, self.index, self.tone = canvas, x, y, index, tone
        self.scale, self.flip = scale, flip

    def place(self, u, v):
        """Image coordinates (fractions of the side, y down) of a local point."""
        return self.x + self.flip * u * self.scale, self.y - v * self.scale

    def _colour(self, colour, lit):
        return tuple(min(255, max(0, round(c))) for c in (colour if lit else self.tone(colour)))

    def poly(self, points, colour, lit=False):
        side, flip = self.canvas.side, self.flip * self.scale
        flat = [c for u, v in points for c in ((self.x + flip * u) * side, (self.y - v * self.scale) * side)]
        self.canvas.ink.polygon(flat, fill=self._colour(colour, lit))
        if self.index is not None:
            self.canvas.map.polygon(flat, fill=self.index)

    def rect(self, u0, v0, u1, v1, colour, lit=False):
        self.poly(((u0, v0), (u1, v0), (u1, v1), (u0, v1)), colour, lit)

    def disc(self, u, v, ru, colour, rv=None, lit=False):
        side, (x, y) = self.canvas.side, self.place(u, v)
        rx, ry = ru * self.scale * side, (ru if rv is None else rv) * self.scale * side
        box = (x * side - rx, y * side - ry, x * side + rx, y * side + ry)
        self.canvas.ink.ellipse(box, fill=self._colour(colour, lit))
        if self.index is not None:
            self.canvas.map.ellipse(box, fill=self.index)

    def limb(self, points, radius, colour, end=None):
        """A bent tube with round joints through `points`; the radius goes linearly from `radius` to `end`."""
        radii = np.linspace(radius, radius if end is None else end, len(points))
        for (u0, v0), (u1, v1), r0, r1 in zip(points, points[1:], radii, radii[1:], strict=False):
            length = max(1e-6, ((u1 - u0) ** 2 + (v1 - v0) ** 2) ** 0.5)
            nu, nv = (v0 - v1) / length, (u1 - u0) / length
            self.poly(
                (
                    (u0 + nu * r0, v0 + nv * r0),
                    (u1 + nu * r1, v1 + nv * r1),
                    (u1 - nu * r1, v1 - nv * r1),
                    (u0 - nu * r0, v0 - nv * r0),
                ),
                colour,
            )
        for (u, v), r in zip(points, radii, strict=True):
            self.disc(u, v, r, colour)

    def glow(self, u, v, radius, colour, strength=1.0):
        self.canvas.glows.append((*self.place(u, v), radius * self.scale, colour, strength))


@cache
def smooth(points, rounds=2):
    """Chaikin's corner cutting of a closed outline."""
    p = np.array(points)
    for _ in range(rounds):
        nxt = np.roll(p, -1, 0)
        p = np.stack((0.8 * p + 0.2 * nxt, 0.2 * p + 0.8 * nxt), 1).reshape(-1, 2)
    return tuple(map(tuple, p.tolist()))


# Per body type: height in units of the length, outline, windows, wheel's radius; rear at 0, front at 1.
CARS = {
    "sedan": (
        0.385,
        (
            (0, 0.07),
            (0, 0.23),
            (0.05, 0.255),
            (0.16, 0.265),
            (0.30, 0.385),
            (0.58, 0.385),
            (0.74, 0.26),
            (0.95, 0.225),
            (1, 0.17),
            (1, 0.07),
        ),
        (
            ((0.23, 0.265), (0.32, 0.355), (0.43, 0.355), (0.43, 0.265)),
            ((0.46, 0.265), (0.46, 0.355), (0.57, 0.355), (0.67, 0.265)),
        ),
        0.088,
    ),
    "hatchback": (
        0.43,
        (
            (0, 0.07),
            (0, 0.25),
            (0.03, 0.31),
            (0.10, 0.42),
            (0.20, 0.43),
            (0.52, 0.43),
            (0.70, 0.285),
            (0.94, 0.245),
            (1, 0.18),
            (1, 0.07),
        ),
        (
            ((0.09, 0.29), (0.15, 0.395), (0.34, 0.395), (0.34, 0.29)),
            ((0.375, 0.29), (0.375, 0.395), (0.51, 0.395), (0.63, 0.29)),
        ),
        0.096,
    ),
    "van": (
        0.49,
        (
            (0, 0.08),
            (0, 0.47),
            (0.02, 0.49),
            (0.70, 0.49),
            (0.76, 0.46),
            (0.88, 0.29),
            (0.98, 0.25),
            (1, 0.2),
            (1, 0.08),
        ),
        (
            ((0.34, 0.31), (0.34, 0.44), (0.55, 0.44), (0.55, 0.31)),
            ((0.59, 0.31), (0.59, 0.44), (0.72, 0.44), (0.82, 0.31)),
        ),
        0.09,
    ),
    "suv": (
        0.45,
        (
            (0, 0.10),
            (0, 0.28),
            (0.02, 0.33),
            (0.06, 0.44),
            (0.12, 0.45),
            (0.60, 0.45),
            (0.73, 0.315),
            (0.96, 0.285),
            (1, 0.24),
            (1, 0.10),
        ),
        (
            ((0.08, 0.32), (0.11, 0.415), (0.34, 0.415), (0.34, 0.32)),
            ((0.375, 0.32), (0.375, 0.415), (0.59, 0.415), (0.68, 0.32)),
        ),
        0.105,
    ),
    "pickup": (
        0.43,
        (
            (0, 0.10),
            (0, 0.285),
            (0.37, 0.285),
            (0.385, 0.32),
            (0.43, 0.43),
            (0.62, 0.43),
            (0.75, 0.295),
            (0.96, 0.27),
            (1, 0.22),
            (1, 0.10),
        ),
        (((0.44, 0.29), (0.47, 0.395), (0.60, 0.395), (0.69, 0.29)),),
        0.1,
    ),
}


def car(pen, rng, colour, night, body):
    """A side view, one unit long, centred on u = 0."""
    height, outline, windows, wheel = CARS[body]
    paint, pen.x = COLOURS[colour], pen.x - 0.5 * pen.flip * pen.scale  # the outlines start at the rear
    shadow = Pen(pen.canvas, pen.x, pen.y, pen.scale, pen.flip, None, pen.tone)
    shadow.disc(0.5, 0.0, 0.53, (40, 40, 46), rv=0.045)
    pen.poly(smooth(outline), paint)
    top = 0.21 if body in ("sedan", "pickup") else 0.24
    # the sill in shade
    pen.poly(((0.005, 0.10), (0.005, 0.15), (0.995, 0.15), (0.995, 0.10)), mix(paint, (0, 0, 0), 0.3))
    # light on the belt
    pen.rect(0.02, top - 0.012, 0.97, top + 0.012, mix(paint, (255, 255, 255), 0.28))
    glass = (255, 226, 150) if night and rng.random() < 0.3 else mix(GLASS, (70, 90, 110), rng.uniform(0, 0.7))
    for window in windows:
        pen.poly(window, glass)
        pen.poly(
            (window[1], window[2], mix(window[2], window[3], 0.35), mix(window[1], window[0], 0.35)),
            mix(glass, (255, 255, 255), 0.35),
        )
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
    shirt, skin = COLOURS[colour], SKIN[rng.integers(len(SKIN))]
    hair, legs = HAIR[rng.integers(len(HAIR))], TROUSERS[rng.integers(len(TROUSERS))]
    skirt, hat, long_hair, bag = rng.random(4) < (0.25, 0.22, 0.4, 0.2)
    stride = rng.uniform(0.10, 0.15) if body == "walking" else rng.uniform(0.045, 0.06)
    dark = mix(shirt, (0, 0, 0) if colour != "black" else (150, 150, 160), 0.24)
    Pen(pen.canvas, pen.x, pen.y, pen.scale, pen.flip, None, pen.tone).disc(0, 0, 0.2, (44, 44, 50), rv=0.025)
    if bag:
        pen.rect(-0.19, 0.52, -0.06, 0.78, mix(COLOURS["orange"], (70, 40, 20), 0.55))
    # far arm
    pen.limb(((-0.09, 0.75), (-0.135, 0.62), (-0.13 + 0.3 * (stride - 0.05), 0.47)), 0.034, dark)
    pen.disc(-0.13 + 0.3 * (stride - 0.05), 0.455, 0.032, skin)
    shin = skin if skirt else legs
    for side, tint in ((-1, 0.25), (1, 0.0)):
        foot = side * stride
        knee = (foot * 0.55 + (0.03 if body == "walking" else 0), 0.26)
        pen.limb(((side * 0.045, 0.48), knee, (foot, 0.045)), 0.055, mix(shin, (0, 0, 0), tint), 0.036)
        pen.poly(
            ((foot - 0.045, 0), (foot - 0.045, 0.05), (foot + 0.03, 0.055), (foot + 0.085, 0.02), (foot + 0.085, 0)),
            (34, 28, 28),
        )
    if skirt:
        pen.poly(((-0.085, 0.53), (0.085, 0.53), (0.15, 0.27), (-0.15, 0.27)), legs)
    if long_hair and not hat:
        pen.disc(-0.025, 0.87, 0.088, hair, rv=0.115)
    pen.limb(((0, 0.8), (0, 0.86)), 0.034, mix(skin, (0, 0, 0), 0.15))
    pen.poly(
        smooth(
            (
                (-0.125, 0.80),
                (-0.06, 0.83),
                (0.06, 0.83),
                (0.125, 0.80),
                (0.12, 0.66),
                (0.10, 0.47),
                (-0.10, 0.47),
                (-0.12, 0.66),
            ),
            1,
        ),
        shirt,
    )
    pen.rect(-0.10, 0.455, 0.10, 0.485, mix(legs, (0, 0, 0), 0.3))
    pen.disc(0.005, 0.905, 0.076, skin, rv=0.086)
    pen.poly(
        (
            (-0.08, 0.90),
            (-0.075, 0.96),
            (-0.03, 0.995),
            (0.035, 0.995),
            (0.08, 0.95),
            (0.03, 0.94),
            (-0.02, 0.945),
            (-0.045, 0.9),
        ),
        hair,
    )
    if hat:
        pen.poly(((-0.085, 0.945), (-0.07, 1.0), (0, 1.02), (0.07, 1.0), (0.08, 0.945)), dark)
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
    half, top, index = width / 2, bottom + height, pen.index
    pen.index, pole = pole_index, rng.uniform(0.013, 0.019)
    pen.rect(-pole, -0.005, pole, bottom, (98, 102, 108))
    pen.rect(-pole, -0.005, -pole * 0.2, bottom, (134, 138, 144))
    pen.rect(-0.03, -0.008, 0.03, 0.018, (84, 86, 92))
    pen.index = index
    frame = ((196, 198, 200), (112, 114, 120), (222, 178, 40))[rng.choice(3, p=(0.4, 0.35, 0.25))]
    cut = width * 0.16
    pen.poly(
        (
            (-half + cut, bottom),
            (half - cut, bottom),
            (half, bottom + cut),
            (half, top - cut),
            (half - cut, top),
            (-half + cut, top),
            (-half, top - cut),
            (-half, bottom + cut),
        ),
        frame,
    )
    edge = 0.013
    pen.poly(
        (
            (-half + cut, bottom + edge),
            (half - cut, bottom + edge),
            (half - edge, bottom + cut),
            (half - edge, top - cut),
            (half - cut, top - edge),
            (-half + cut, top - edge),
            (-half + edge, top - cut),
            (-half + edge, bottom + cut),
        ),
        (36, 40, 42),
    )
    radius = min(width * 0.37, height * 0.145)
    for name, share in (("red", 0.815), ("yellow", 0.5), ("green", 0.185)):
        v = bottom + share * height
        if name == colour:
            pen.disc(0, v, radius, LIT[name], lit=True)
            pen.disc(0, v + radius * 0.1, radius * 0.55, mix(LIT[name], (255, 255, 255), 0.5), lit=True)
            pen.glow(0, v, radius * (2.6 if night else 1.9), LIT[name], 0.6 if night else 0.25)
        else:
            pen.disc(0, v, radius, mix(LIT[name], (24, 24, 28), 0.76))


def rider(pen, rng, colour, night, body, ground):
    """A person on a bicycle, one unit tall. The wheels are filled (a blur of spokes): part of the mask."""
    shirt, skin, legs = COLOURS[colour], SKIN[rng.integers(len(SKIN))], TROUSERS[rng.integers(len(TROUSERS))]
    names = [n for n in ("red", "blue", "green", "white", "orange", "yellow") if n != colour]
    frame, helmet = (COLOURS[names[i]] for i in rng.permutation(len(names))[:2])
    shoulder = {"upright": (-0.02, 0.80), "leaning": (0.06, 0.785), "racing": (0.125, 0.735)}[body]
    bar = (0.225, 0.60) if body != "racing" else (0.26, 0.55)
    hip, pedals, phase = (-0.125, 0.545), (-0.03, 0.2), rng.uniform(0, 2 * np.pi)
    dark = mix(shirt, (0, 0, 0) if colour != "black" else (150, 150, 160), 0.24)
    Pen(pen.canvas, pen.x, pen.y, pen.scale, pen.flip, None, pen.tone).disc(0, 0, 0.5, (44, 44, 50), rv=0.028)

    def leg(angle, tint):
        foot = np.array(pedals) + 0.085 * np.array((np.cos(angle), np.sin(angle)))
        span = foot - hip
        reach = min(0.999, np.hypot(*span) / 0.5)  # thigh and shin are .25 long; the knee bends forward
        bend = 0.25 * (1 - reach**2) ** 0.5 / np.hypot(*span)
        knee = np.array(hip) + span / 2 + bend * np.array((-span[1], span[0]))
        pen.limb((hip, tuple(knee), tuple(foot + (0, 0.02))), 0.056, mix(legs, (0, 0, 0), tint), 0.036)
        pen.rect(foot[0] - 0.045, foot[1] - 0.03, foot[0] + 0.07, foot[1] + 0.015, (28, 26, 30))

    for u in (-0.29, 0.30):
        pen.disc(u, 0.205, 0.205, TYRE)
        pen.disc(u, 0.205, 0.165, mix(ground, (215, 218, 225), 0.45))
        pen.disc(u, 0.205, 0.035, (110, 112, 118))
    leg(phase + np.pi, 0.35)
    pen.limb((shoulder, mix(shoulder, bar, 0.5), bar), 0.03, dark)
    for line in (
        ((-0.29, 0.205), pedals, (0.19, 0.50), (-0.13, 0.45), (-0.29, 0.205)),
        (pedals, (-0.145, 0.50)),
        ((0.30, 0.205), (0.185, 0.52), bar),
    ):
        pen.limb(line, 0.019, frame)
    pen.rect(-0.21, 0.50, -0.06, 0.53, (30, 28, 30))
    leg(phase, 0)
    pen.limb((hip, mix(hip, shoulder, 0.5), shoulder), 0.075, shirt, 0.082)
    elbow = mix(shoulder, bar, 0.5)
    pen.limb((shoulder, (elbow[0] - 0.015, elbow[1] - 0.035), bar), 0.034, dark)
    pen.disc(*bar, 0.036, skin)
    head = (shoulder[0] + 0.075, shoulder[1] + 0.125)
    pen.disc(*head, 0.074, skin, rv=0.08)
    pen.poly(
        (
            (head[0] - 0.085, head[1] + 0.005),
            (head[0] - 0.075, head[1] + 0.06),
            (head[0] - 0.02, head[1] + 0.095),
            (head[0] + 0.045, head[1] + 0.085),
            (head[0] + 0.095, head[1] + 0.025),
        ),
        helmet,
    )
    if night:
        pen.disc(bar[0] + 0.03, bar[1] - 0.06, 0.025, LAMP, lit=True)
        pen.glow(bar[0] + 0.05, bar[1] - 0.06, 0.13, (255, 236, 170), 0.6)


def tree(pen, rng, kind, leaf):
    """One unit tall, trunk included (Cityscapes counts the trunk as vegetation)."""
    light, dark = mix(leaf, (255, 255, 190), 0.2), mix(leaf, (0, 16, 20), 0.28)
    trunk = (96, 70, 48)
    pen.rect(-0.03, 0, 0.03, 0.5, trunk)
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
