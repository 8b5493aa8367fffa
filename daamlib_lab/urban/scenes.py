"""A bundled world of street scenes: image, exact Cityscapes label map and caption, all from one seed.

The scene is laid out in fractions of the image's side and drawn at three times the size, so that it is the
same scene at every size. The image is averaged down; the label map is never anti-aliased: it takes the centre
of each 3 x 3 cell. Shading is smooth and there is no noise, which an autoencoder could only blur.

Deviation from Cityscapes: `rider` (25) is the person AND the bicycle, wheels as filled discs.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from daamlib.cityscapes import BY_NAME, COLOURS, MIN_AREA, label_id

from . import objects as ob
from .backdrop import LABEL, SKIES, STUFF, backdrop, toner
from .captions import TIMES, caption, join_words, wide_caption
from .wide import GROUNDS, place

KINDS = ("car", "person", "traffic light", "rider")
DRAW: dict[str, Callable[..., None]] = dict(zip(KINDS, (ob.car, ob.person, ob.traffic_light, ob.rider), strict=True))
WORLDS = ("street", "wide")  # that of the bundled model, and that of `wide`
SIZE = 128  # px, of the bundled model
HELD_OUT = 10_000_000  # seeds from here on are never trained on
LEAST_SIDE = 16  # px: below it nothing can be recognised
SS = 3  # supersampling; not even, so that every cell has a centre
FIRST_THING = len(STUFF)
# How often each of `objects.COLOURS` is taken
PAINT, CLOTHES = (0.2, 0.18, 0.12, 0.14, 0.13, 0.09, 0.09, 0.05), (0.18, 0.18, 0.14, 0.14, 0.1, 0.08, 0.1, 0.08)


@dataclass(frozen=True)
class Thing:
    """A foreground object.

    Attributes:
        kind: one of `KINDS`.
        colour: of the paint, the clothes or the lit lamp.
        side: left, middle or right.
        box: left, top, right, bottom in fractions of the image's side; it may reach a little over the border.
        facing: 1 to the right, -1 to the left.
        body: the car's type, the pose, or the (width, height, bottom) of a traffic light's housing.
    """

    kind: str
    colour: str
    side: str
    box: tuple[float, float, float, float]
    facing: int
    body: Any


@dataclass(frozen=True, eq=False)
class Scene:
    """A street scene of S x S pixels.

    Attributes:
        image: uint8 (S, S, 3).
        labels: uint8 (S, S) of Cityscapes ids.
        caption: what the bundled model was trained with, see `captions.caption`.
        things: from back to front.
        time: a key of `captions.TIMES`.
        trees: how many.
        seed: what it was drawn from.
        stuff: words for what is behind the things, each kind that is there; empty in the world "street", whose
            captions have their own.
    """

    image: np.ndarray
    labels: np.ndarray
    caption: str
    things: tuple[Thing, ...]
    time: str
    trees: int
    seed: int
    stuff: tuple[str, ...] = ()

    def say(self, number: int) -> str:
        """Caption `number` of the scene, from 0 on."""
        rng = np.random.default_rng([self.seed, number])
        if self.stuff:
            return wide_caption(rng, self.things, self.time, self.stuff)
        return caption(rng, self.things, self.time, self.trees)

    @property
    def text(self) -> str:
        """The scene's things and nothing else, such as "a car and a person"; "a photo" of a scene without."""
        return " and ".join(f"a {thing.kind}" for thing in self.things) or "a photo"


class Canvas:
    """The supersampled image, its index map (an index per stuff class and per thing) and the halos."""

    def __init__(self, size, sky):
        self.side, self.glows = size * SS, []
        rows = np.linspace(0, 1, self.side)[:, None]
        ramp = np.concatenate([np.interp(rows, (0, 0.35, 0.6), [stop[c] for stop in sky]) for c in range(3)], 1)
        self.image = Image.fromarray(np.repeat(ramp.round().astype(np.uint8)[:, None], self.side, 1))
        self.indices = Image.new("L", (self.side, self.side), STUFF.index("sky"))
        self.ink, self.map = ImageDraw.Draw(self.image), ImageDraw.Draw(self.indices)


def _propose(rng, kind, slot, ground, kerb, squeeze):
    """A thing of this kind near the horizontal position `slot`; `squeeze` (0..1) pulls its size to the small end."""

    def span(low, high):
        return low + (high - low) * rng.random() * (1 - 0.6 * squeeze)

    u, facing = slot + rng.uniform(-0.1, 0.1), 1 if rng.random() < 0.5 else -1
    body: str | tuple[float, float, float]
    if kind == "car":
        body = str(rng.choice(tuple(ob.CARS)))
        width, base = span(0.37, 0.62), rng.uniform(kerb + 0.13, 0.97)
        height, slack = width * ob.CARS[body][0], 0.07
    elif kind == "person":
        body = str(rng.choice(("standing", "walking", "waving"), p=(0.4, 0.4, 0.2)))
        height, base, slack = span(0.45, 0.66), rng.uniform(ground + 0.05, min(0.97, kerb + 0.2)), 0.0
        base = max(base, height + 0.03)
        width = height * (0.42 if body == "walking" else 0.38)
    elif kind == "rider":
        body = str(rng.choice(("upright", "leaning", "racing"), p=(0.35, 0.4, 0.25)))
        height, base, slack = span(0.40, 0.58), rng.uniform(kerb + 0.05, 0.96), 0.05
        width = height * 1.02
    else:
        width, tall = span(0.125, 0.17), span(0.29, 0.40)
        base, top = rng.uniform(ground + 0.03, kerb + 0.01), rng.uniform(0.05, 0.16)
        height, slack, body = base - top, 0.0, (width, tall, base - top - tall)
    u = min(max(u, width / 2 - slack * width / 0.37), 1 - width / 2 + slack * width / 0.37)
    side = "left" if u < 0.4 else "right" if u > 0.6 else "middle"
    weights = PAINT if kind == "car" else CLOTHES
    colour = str(rng.choice(tuple(ob.LIT)) if kind == "traffic light" else rng.choice(tuple(ob.COLOURS), p=weights))
    return Thing(kind, colour, side, (u - width / 2, base - height, u + width / 2, base), facing, body)


def _hidden(things):
    """The largest share of a thing's box that those before it cover (a traffic light counts without its pole)."""

    def solid(thing):
        x0, y0, x1, y1 = thing.box
        return (x0, y0, x1, y0 + thing.body[1]) if thing.kind == "traffic light" else thing.box

    worst = 0.0
    for k, back in enumerate(things):
        a, covered = solid(back), 0.0
        for b in map(solid, things[k + 1 :]):
            overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            covered += overlap / ((a[2] - a[0]) * (a[3] - a[1]))
        worst = max(worst, covered)
    return worst


def _place(rng, ground, kerb):
    kinds = [KINDS[i] for i in rng.permutation(4)[: rng.choice(4, p=(0.05, 0.35, 0.40, 0.20))]]
    best, least = (), np.inf
    for attempt in range(24):
        slots = rng.permutation((0.22, 0.5, 0.78))
        placed = zip(kinds, slots, strict=False)
        things = [_propose(rng, kind, slot, ground, kerb, attempt / 23) for kind, slot in placed]
        things.sort(key=lambda thing: thing.box[3])  # what stands lower in the image is nearer
        hidden = _hidden(things)
        if hidden < least:
            best, least = tuple(things), hidden
        if least < 0.22:
            break
    return best


def _develop(canvas, size, things, time, ground, kerb, wide):
    """Average down, shade smoothly from top to bottom, add the halos: image and index map at `size`."""
    image = np.asarray(canvas.image.reduce(SS), np.float32)
    index = np.asarray(canvas.indices)[SS // 2 :: SS, SS // 2 :: SS]
    y = (np.arange(size, dtype=np.float32) + 0.5) / size
    gain = np.ones((FIRST_THING + len(things), size), np.float32)  # per index and row
    gain[STUFF.index("building")] = np.interp(y, (ground - 0.4, ground), (1.06, 0.88))
    if wide:
        gain[[STUFF.index(kind) for kind in GROUNDS]] = np.interp(y, (ground, 1), (1.1, 0.86))
    else:
        gain[STUFF.index("road")] = np.interp(y, (kerb, 1), (1.12, 0.84))
        gain[STUFF.index("sidewalk")] = np.interp(y, (ground, kerb), (0.92, 1.04))
    for k, thing in enumerate(things):
        if thing.kind != "traffic light":
            gain[FIRST_THING + k] = np.interp(y, (thing.box[1], thing.box[3]), (1.12, 0.84))
    image = image * gain[index, np.arange(size)[:, None]][..., None]
    for u, v, radius, colour, strength in canvas.glows:
        strength *= 1.0 if time == "night" else 0.6
        x0, x1 = (int(np.clip((u + s * 2 * radius) * size, 0, size)) for s in (-1, 1))
        y0, y1 = (int(np.clip((v + s * 2 * radius) * size, 0, size)) for s in (-1, 1))
        gx = np.exp(-((((np.arange(x0, x1) + 0.5) / size - u) / radius) ** 2) * 1.6)
        gy = np.exp(-(((y[y0:y1] - v) / radius) ** 2) * 1.6)
        halo = (gy[:, None] * gx)[..., None].astype(np.float32) * strength
        patch = image[y0:y1, x0:x1]
        patch += (np.array(colour, np.float32) - patch).clip(0) * halo
    return (image + 0.5).clip(0, 255).astype(np.uint8), index


def render(seed: int, size: int = SIZE, world: str = "street") -> Scene:
    """Draw the street scene number `seed`.

    Args:
        seed: an integer >= 0; the same seed gives the same bytes, and the same layout and caption at every size.
        size: side S of the square image in pixels, at least 16; the bundled model is trained at 128.
        world: one of `WORLDS`; the bundled model knows "street".

    Returns:
        The scene, its image (S, S, 3) and its labels (S, S).

    Raises:
        ValueError: for a negative seed, a size below 16 or another world.
        TypeError: when either is not an integer.
    """
    for name, value, least in (("seed", seed, 0), ("size", size, LEAST_SIDE)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if world not in WORLDS:
        raise ValueError(f"world must be one of {WORLDS}, got {world!r}")
    rng, wide = np.random.default_rng(int(seed)), world == "wide"
    time = str(rng.choice(tuple(TIMES), p=(0.4, 0.22, 0.23, 0.15)))
    ground = rng.uniform(0.40, 0.60) if wide else rng.uniform(0.48, 0.62)
    kerb = ground if wide else ground + rng.uniform(0.08, 0.14)
    canvas, stuff = Canvas(int(size), SKIES[time][rng.integers(2)]), ()
    if wide:
        ground, kerb, surface, trees, stuff = place(canvas, rng, time, ground)
    else:
        surface, trees = backdrop(canvas, rng, time, ground, kerb)
    things, night = _place(rng, ground, kerb), time == "night"
    for k, thing in enumerate(things):
        x0, y0, x1, y1 = thing.box
        tone = toner(time, 0.15 * (1 - y1), 0.36)
        scale = {"car": x1 - x0, "traffic light": 1.0}.get(thing.kind, y1 - y0)
        pen = ob.Pen(canvas, (x0 + x1) / 2, y1, scale, thing.facing, FIRST_THING + k, tone)
        extra = {"traffic light": (STUFF.index("pole"),), "rider": (surface,)}.get(thing.kind, ())
        DRAW[thing.kind](pen, rng, thing.colour, night, thing.body, *extra)
    image, index = _develop(canvas, int(size), things, time, ground, kerb, wide)
    names = (*(LABEL.get(name, name) for name in STUFF), *(thing.kind for thing in things))
    table = np.array([BY_NAME[name].id for name in names], np.uint8)
    scene = Scene(image, table[index], "", things, time, trees, int(seed), stuff)
    return replace(scene, caption=scene.say(0))  # the first of those it is trained with


def scene_prompt(ids: np.ndarray) -> str:
    """Return the short prompt of a rendered scene, which names the `KINDS` that cover `MIN_AREA` of its label map.

    Args:
        ids: (H, W) Cityscapes ids.

    Returns:
        Such as "a car and a rider in an urban environment", or "an urban environment".
    """
    seen = [f"a {name}" for name in KINDS if (ids == label_id(name)).mean() >= MIN_AREA]
    return f"{join_words(seen)} in an urban environment" if seen else "an urban environment"


def to_tensor(images: np.ndarray | torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Images as the networks take them.

    Args:
        images: (B, S, S, 3) uint8, an array or a tensor on any device.
        size: the side of the result, in pixels; a smaller one than S is reached by averaging.

    Returns:
        (B, 3, size, size) float32 in [-1, 1], on the images' device.
    """
    images = images if isinstance(images, torch.Tensor) else torch.from_numpy(np.array(images))
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels if size == pixels.shape[-1] else torch.nn.functional.interpolate(pixels, (size, size), mode="area")


def contact_sheet(tiles: Sequence[np.ndarray], columns: int) -> Image.Image:
    """The (H, W, 3) uint8 tiles, all of one size, row by row in one image; the rest of the last row is white."""
    tiles = [*tiles, *[np.full_like(tiles[0], 255)] * (-len(tiles) % columns)]
    return Image.fromarray(np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]))


def main(argv: Sequence[str] | None = None) -> None:
    """Write a contact sheet: `python -m daamlib_lab.urban.scenes --out sheet.png --n 40 [--labels] [--captions]`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--n", type=int, default=40, help="number of scenes")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--size", type=int, default=SIZE, help="side of a scene in pixels")
    parser.add_argument("--world", choices=WORLDS, default="street")
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--labels", action="store_true", help="show each label map under its scene")
    parser.add_argument("--captions", action="store_true", help="print the captions")
    args = parser.parse_args(argv)
    scenes = [render(seed, args.size, args.world) for seed in range(args.start, args.start + args.n)]
    for scene in scenes if args.captions else ():
        print(f"{scene.seed}: {scene.caption}")
    tiles = [np.vstack((scene.image, COLOURS[scene.labels])) if args.labels else scene.image for scene in scenes]
    contact_sheet(tiles, args.columns).save(args.out)


if __name__ == "__main__":
    main()
