"""Background of a street scene: sky, buildings, sidewalk, road, trees, a lamp."""

from . import objects as ob

STUFF = (
    *("sky", "building", "sidewalk", "road", "vegetation", "pole"),
    *("grass", "hills", "fence", "water", "snow", "square"),  # of the wide world alone, see `wide`
)
# Where Cityscapes' name is another; "ground" is its fallback for level ground, which is not judged
LABEL = dict.fromkeys(("grass", "hills"), "terrain") | dict.fromkeys(("water", "snow", "square"), "ground")
SKIES = {  # two gradients per time: the colours at the top, in between and behind the roofs
    "day": (((62, 134, 222), (120, 182, 240), (206, 230, 248)), ((96, 150, 214), (158, 196, 232), (224, 234, 240))),
    "sunset": (((72, 66, 132), (214, 104, 104), (255, 190, 104)), ((54, 84, 150), (190, 130, 150), (255, 206, 140))),
    "night": (((8, 10, 32), (18, 24, 58), (40, 48, 88)), ((6, 8, 22), (22, 20, 50), (58, 44, 80))),
    "fog": (((176, 182, 190), (192, 197, 202), (206, 209, 211)), ((196, 194, 188), (206, 204, 200), (216, 214, 210))),
}
WALLS = ob.palette("b25442 ce9668 e2cea6 96a0ac c4b2be 8c7062 deba78 74889e d0d4ce a0423a a6b08e e4a890")
ROOFS = ob.palette("783a30 54545e 96523a 424c5c")
STONES = ob.palette("b8b2a8 a8aab0 c6b6a4")
ASPHALTS = ob.palette("5c5e64 4e525c 686464")
LEAVES = ob.palette("3a8438 589632 287046 789630 c4842c")


def toner(time, haze, lit=0.0):
    """Return a colour as it looks at this time of day; `haze` 0..1 is distance, `lit` is street light."""
    if time == "night":
        gain = tuple(g + lit * w for g, w in zip((0.34, 0.37, 0.50), (1.15, 1.0, 0.75), strict=True))
        return lambda c: tuple(v * g + a for v, g, a in zip(c, gain, (6, 8, 18), strict=True))
    if time == "sunset":
        return lambda c: ob.mix((c[0] * 0.96 + 10, c[1] * 0.86 + 2, c[2] * 0.80 + 6), (216, 130, 112), 0.28 * haze)
    if time == "fog":
        return lambda c: ob.mix(c, (200, 203, 206), 0.18 + 0.6 * haze)
    return lambda c: ob.mix(c, (196, 218, 240), 0.3 * haze)


def _sky_things(pen, rng, time):
    if time == "night":
        for _ in range(rng.integers(4, 10)):
            pen.disc(rng.random(), rng.uniform(0.6, 1), 0.006, (200, 206, 230))
    if time in ("night", "sunset") or (time == "day" and rng.random() < 0.4):
        u, r = rng.uniform(0.08, 0.92), rng.uniform(0.045, 0.065)
        v = rng.uniform(0.55, 0.75) if time == "sunset" else rng.uniform(0.84, 0.93)
        colour = {"night": (238, 238, 220), "sunset": (255, 226, 150), "day": (255, 240, 170)}[time]
        pen.disc(u, v, r, colour)
        pen.glow(u, v, r * 2.5, colour, 0.3)
    base = {"day": (250, 252, 255), "sunset": (246, 168, 140), "night": (40, 46, 76), "fog": (212, 214, 216)}[time]
    for _ in range(rng.integers(0, 4)):
        u, v, w = rng.uniform(0, 1), rng.uniform(0.68, 0.95), rng.uniform(0.06, 0.11)
        for du, dv, r in ((-1, 0, 0.55), (-0.3, 0.25, 0.7), (0.5, 0.15, 0.6), (1.1, 0, 0.45)):
            pen.disc(u + du * w, v + dv * w, r * w, base, rv=r * w * 0.75)
        pen.disc(u, v - 0.15 * w, 1.5 * w, base, rv=0.32 * w)


def draw_building(pen, rng, u, width, top, base, wall, night, near):
    """One front from `base` to `top` (v upwards) with roof, windows and, in the near row, a shop or a door."""
    roof, style = ROOFS[rng.integers(len(ROOFS))], rng.choice(4, p=(0.4, 0.25, 0.2, 0.15))
    pen.rect(u, base, u + width, top, wall)
    # the side away from the light
    pen.rect(u + width * 0.86, base, u + width, top, ob.mix(wall, (20, 20, 50), 0.22))
    if style == 0:
        pen.rect(u - 0.006, top - 0.018, u + width + 0.006, top + 0.008, ob.mix(wall, (255, 255, 255), 0.35))
    elif style == 1:
        pen.poly(((u - 0.015, top), (u + width + 0.015, top), (u + width / 2, top + min(0.11, width * 0.4))), roof)
    elif style == 2:
        slopes = ((u + width * 0.85, top + 0.06), (u + width * 0.15, top + 0.06))
        pen.poly(((u - 0.01, top), (u + width + 0.01, top), *slopes), roof)
    else:
        pen.rect(u + width * 0.25, top, u + width * 0.6, top + 0.05, ob.mix(wall, (40, 40, 60), 0.25))
    shop = 0.105 if near else 0.02
    columns = max(1, int(width / rng.uniform(0.062, 0.085)))
    rows = max(1, int((top - base - shop) / rng.uniform(0.08, 0.11)))
    step, rise, tall = width / columns, (top - base - shop - 0.02) / rows, rng.uniform(0.5, 0.68)
    pane = ob.mix((112, 148, 180), (48, 62, 84), rng.random())
    lights = rng.random((rows, columns)) < (0.45 if night else 0)
    glow = ((255, 214, 120), (255, 190, 90), (255, 236, 180))[rng.integers(3)]
    for r in range(rows):
        for c in range(columns):
            x, y = u + step * (c + 0.24), base + shop + rise * (r + 0.2)
            lit = bool(lights[r, c])
            colour = ob.mix(pen.tone(glow), glow, 0.85 if near else 0.6) if lit else pane
            pen.rect(x, y, x + step * 0.52, y + rise * tall, colour, lit=lit)
    if near and rng.random() < 0.65:
        shade = tuple(ob.COLOURS.values())[rng.integers(5)]
        window = ob.mix(glow, (255, 255, 255), 0.1) if night else ob.mix(pane, (220, 236, 244), 0.5)
        pen.rect(u + width * 0.08, base, u + width * 0.66, base + 0.068, window, lit=night)
        pen.rect(u + width * 0.72, base, u + width * 0.92, base + 0.075, ob.mix(shade, (40, 30, 30), 0.6))
        awning = ((0.03, 0.066), (0.97, 0.066), (0.93, 0.1), (0.07, 0.1))
        pen.poly([(u + width * across, base + up) for across, up in awning], ob.mix(shade, wall, 0.3))
    elif near:
        door = u + width * rng.uniform(0.3, 0.6)
        pen.rect(door, base, door + 0.055, base + 0.085, ob.mix(roof, (30, 24, 24), 0.4))


def stuff_pen(canvas, time, name, haze, lit=0.0, y=1.0):
    """The pen of a kind of stuff, its origin at the left of the image and at `y` from above."""
    return ob.Pen(canvas, 0, y, 1, 1, STUFF.index(name), toner(time, haze, lit))


def draw_sky(canvas, rng, time):
    """Stars, sun or moon, and clouds, in their own light."""
    sky = stuff_pen(canvas, time, "sky", 0)
    sky.tone = lambda colour: colour
    _sky_things(sky, rng, time)


def draw_joints(walk, rng, stone, ground, kerb):
    """The joints of a sidewalk from `ground` to `kerb`."""
    shift = rng.uniform(0, 0.16)
    for k in range(-4, 11):  # joints run towards the vanishing point above the middle
        x = shift + 0.16 * k
        front = ((x + 0.012 + (x - 0.5) * 0.3, 1 - kerb), (x + (x - 0.5) * 0.3, 1 - kerb))
        walk.poly(((x, 1 - ground), (x + 0.008, 1 - ground), *front), ob.mix(stone, (60, 60, 70), 0.2))


def draw_kerb(walk, stone, kerb):
    """The bright edge of a sidewalk that ends at `kerb`."""
    walk.rect(0, 1 - kerb - 0.004, 1, 1 - kerb + 0.014, ob.mix(stone, (255, 255, 255), 0.35))


def draw_markings(road, rng, asphalt, kerb, bottom=1.0, zebras=0.25):
    """The paint on a road from `kerb` to `bottom`; `zebras` is how often there is a crossing."""
    paint = ((232, 232, 226), (236, 200, 84))[int(rng.random() < 0.2)]
    lane = kerb + (bottom - kerb) * rng.uniform(0.42, 0.55)
    style, start, zebra = rng.random(), rng.uniform(-0.2, 0), rng.random() < zebras
    if style < 0.8:
        for k in range(6):
            x = start + 0.24 * k
            front = ((x + 0.135, 0.978 - lane), (x - 0.004, 0.978 - lane))
            road.poly(((x, 1 - lane), (x + 0.13, 1 - lane), *front), paint)
    else:
        road.rect(0, 0.984 - lane, 1, 1 - lane, paint)
        road.rect(0, 0.950 - lane, 1, 0.966 - lane, paint)
    if zebra:
        x, y, bars = rng.uniform(0.05, 0.6), kerb + 0.03, 5
        road.rect(x - 0.02, 0.0, x + 0.36, 1 - kerb - 0.02, asphalt)
        for k in range(bars):
            t0, t1 = (k / bars) ** 1.25, ((k + 0.55) / bars) ** 1.25
            a, b = y + (1 - y) * t0, y + (1 - y) * t1
            far = ((x - 0.05 * t0, 1 - a), (x + 0.27 + 0.05 * t0, 1 - a))
            front = ((x + 0.27 + 0.05 * t1, 1 - b), (x - 0.05 * t1, 1 - b))
            road.poly((*far, *front), (236, 236, 230))


def draw_lamp(lamp, rng, ground, night):
    """A street lamp that stands at `ground`."""
    u, side = rng.uniform(0.06, 0.94), 1 if rng.random() < 0.5 else -1
    v = 1 - ground + rng.uniform(0.3, 0.4)
    lamp.limb(((u, 0.985 - ground), (u, v), (u + side * 0.06, v + 0.025)), 0.008, (92, 98, 104))
    lamp.disc(u + side * 0.07, v + 0.02, 0.022, (255, 240, 190) if night else (214, 216, 210), rv=0.013, lit=night)
    if night:
        lamp.glow(u + side * 0.07, v, 0.16, (255, 220, 140), 0.55)


def backdrop(canvas, rng, time, ground, kerb):
    """Draw sky, buildings, sidewalk, road and trees: the colour of the road and the number of trees.

    The sidewalk reaches from `ground` down to `kerb`, in fractions of the image's side from above.
    """
    night = time == "night"

    def pen(name, haze, lit=0.0, y=1.0):
        return stuff_pen(canvas, time, name, haze, lit, y)

    draw_sky(canvas, rng, time)
    for near in (False, True):
        row, u = pen("building", 0.35 if near else 0.85, 0.06 if near else 0), rng.uniform(-0.15, 0)
        skip = rng.uniform(0.1, 0.3) if near else 0.1
        while u < 1:
            width = rng.uniform(0.17, 0.36) if near else rng.uniform(0.12, 0.24)
            top = 1 - ground + (rng.uniform(0.16, 0.42) if near else rng.uniform(0.22, 0.5))
            wall = ob.mix(WALLS[rng.integers(len(WALLS))], (150, 158, 176), 0 if near else 0.4)
            if rng.random() > skip:
                draw_building(row, rng, u, width, min(top, 0.95), 1 - ground - 0.002, wall, night, near)
            u += width + (rng.uniform(0, 0.02) if near else 0)
    stone, asphalt = STONES[rng.integers(3)], ASPHALTS[rng.integers(3)]
    walk, road = pen("sidewalk", 0.12, 0.08), pen("road", 0.08, 0.06)
    walk.rect(0, 1 - kerb, 1, 1 - ground, stone)
    draw_joints(walk, rng, stone, ground, kerb)
    road.rect(0, 0, 1, 1 - kerb, asphalt)
    draw_kerb(walk, stone, kerb)
    near_kerb = rng.random() < 0.25
    draw_markings(road, rng, asphalt, kerb)
    if near_kerb:
        walk.rect(0, 0, 1, 0.065, stone)
        walk.rect(0, 0.052, 1, 0.068, ob.mix(stone, (255, 255, 255), 0.35))
    trees, leaf = int(rng.choice(4, p=(0.3, 0.3, 0.25, 0.15))), LEAVES[rng.choice(5, p=(0.3, 0.25, 0.22, 0.13, 0.1))]
    for u in rng.permutation(4)[:trees]:
        y = ground + (kerb - ground) * rng.uniform(0.1, 0.4)
        draw_tree(pen("vegetation", 0.3, 0.08, y), rng, u, leaf)
    if rng.random() < 0.25:
        draw_lamp(pen("pole", 0.2, 0.1), rng, ground, night)
    return asphalt, trees


def draw_tree(wood, rng, quarter, leaf):
    """A tree in one quarter (0 to 3) of the width."""
    wood.x, wood.scale = (quarter + rng.uniform(0.25, 0.75)) / 4, rng.uniform(0.3, 0.52)
    ob.tree(wood, rng, rng.choice(("round", "conifer", "poplar"), p=(0.55, 0.25, 0.2)), leaf)
