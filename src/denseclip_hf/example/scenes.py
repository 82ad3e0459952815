"""Drawn street scenes with a class for every pixel: the data of the built-in example, made without a download.

A scene is drawn back to front at three times its size. Each shape goes into an image, and the number of the thing it
belongs to into a map of the same size; the map becomes the mask.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm.contrib.concurrent import thread_map

from ..files import new_directory


# Each class with its color in masks, what its texture is made of and how strong that is.
CLASSES: dict[str, tuple[tuple[int, int, int], str, float]] = {
    "sky": ((122, 182, 232), "grain", 0.01),
    "cloud": ((236, 236, 246), "waves", 0.04),
    "mountain": ((148, 110, 160), "waves", 0.16),
    "grass": ((150, 196, 78), "blades", 0.20),
    "water": ((38, 92, 186), "waves", 0.13),
    "road": ((104, 104, 112), "grain", 0.06),
    "tree": ((24, 116, 56), "leaves", 0.26),
    "house": ((214, 128, 62), "grain", 0.05),
    "car": ((206, 44, 62), "grain", 0.03),
    "person": ((250, 208, 60), "grain", 0.04),
    "traffic light": ((20, 206, 196), "grain", 0.04),
}
NAMES = list(CLASSES)
IGNORE_INDEX = 255
SIZE = (128, 96)  # width, height in pixels
SPLITS = ("train", "val")
DRAWN_SIZE = 3  # times the final size
CLEAR_SHARE = 0.75  # a pixel is void where no class covers so much of it
DRAWING_VERSION = 2  # raise it when a seed draws something else

# How often a class is there; how many things at most, and between which depths (0 is the horizon, 1 the bottom).
BACKGROUND = {"cloud": 0.6, "mountain": 0.5, "water": 0.35, "road": 0.75}
PLACES: dict[str, tuple[float, int, float, float]] = {
    "tree": (0.8, 3, 0.2, 0.6),
    "house": (0.6, 2, 0.2, 0.4),
    "car": (0.65, 3, 0.35, 0.85),
    "person": (0.6, 3, 0.4, 0.95),
    "traffic light": (0.45, 2, 0.4, 0.85),
}

Color = tuple[int, int, int]
# Any of these may color a car, a wall, a roof or a shirt, so that color alone does not give the class away.
COLORS: dict[str, Color] = {
    "red": (189, 46, 41), "orange": (217, 125, 51), "yellow": (224, 194, 87), "green": (77, 133, 77),
    "blue": (61, 107, 179), "purple": (122, 92, 153), "pink": (219, 148, 158), "brown": (120, 87, 64),
    "white": (230, 227, 219), "grey": (143, 145, 148), "black": (43, 46, 51),
}  # fmt: skip
SKIES: dict[str, tuple[Color, Color]] = {  # at the zenith, at the horizon
    "blue": ((66, 122, 204), (179, 209, 235)), "pale": ((133, 173, 204), (219, 227, 224)),
    "grey": ((128, 138, 150), (189, 194, 199)), "orange": ((102, 112, 158), (245, 179, 112)),
    "dusky": ((50, 60, 104), (140, 118, 146)),
}  # fmt: skip
MATERIALS: dict[str, dict[str, Color]] = {
    "mountain": {"rocky": (125, 114, 108), "blue": (104, 122, 148), "green": (86, 110, 78)},
    "grass": {"green": (92, 128, 51), "lush": (61, 107, 48), "dry": (163, 143, 77), "brown": (120, 99, 64)},
    "water": {"blue": (66, 117, 163), "green": (66, 122, 117), "grey": (117, 132, 145)},
    "road": {"grey": (107, 107, 110), "dark": (69, 69, 74), "dirt": (148, 120, 89)},
    "tree": {"green": (62, 104, 42), "autumn": (176, 96, 36), "pine": (38, 74, 54), "blossoming": (212, 158, 172)},
}
GLASS, TYRE = (51, 66, 82), (26, 26, 28)


@dataclass(frozen=True)
class Thing:
    """Something in a scene: its class name, an adjective, its box (left, top, right, bottom) and visible pixels."""

    name: str
    adjective: str
    box: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class Scene:
    """`image` in RGB, `mask` of class ids or 255 (height, width), and the `things` of which something is visible."""

    image: Image.Image
    mask: np.ndarray
    things: list[Thing]


def draw_scene(index: int, *, seed: int = 0, split: str = "train", size: tuple[int, int] = SIZE) -> Scene:
    """
    Scene `index` of a seed and split ("train" or "val"); `size` is (width, height) in pixels, sides from 32.

    The same arguments give the same scene. Scene i holds class i modulo the number of classes, so that the first
    eleven show every class.
    """
    canvas = Canvas(size, np.random.default_rng((seed, SPLITS.index(split), index)))
    wanted = NAMES[index % len(NAMES)]
    draw_background(canvas, wanted)
    spots = []
    for name, (chance, most, near, far) in PLACES.items():
        if canvas.rng.random() < chance or name == wanted:
            spots += [(*canvas.free_spot(name, near, far), name) for _ in range(canvas.rng.integers(1, most + 1))]
    for depth, x, name in sorted(spots):
        DRAWINGS[name](Pen(canvas, x, depth))
    return canvas.developed()


class Canvas:
    """
    What a scene is drawn on: `image`, the `owner` of each pixel (a number in `things`) and `light`, 255 in full light.

    `things` holds (class name, adjective); `horizon` is a row and `meter` the pixels of a meter at the bottom.
    """

    def __init__(self, size: tuple[int, int], rng: np.random.Generator):
        self.rng, self.width, self.height = rng, DRAWN_SIZE * size[0], DRAWN_SIZE * size[1]
        self.image, self.owner, self.light = (Image.new(mode, (self.width, self.height)) for mode in ("RGB", "L", "L"))
        self.layers = [ImageDraw.Draw(layer) for layer in (self.image, self.owner, self.light)]
        self.things: list[tuple[str, str]] = []
        self.horizon = round(self.height * rng.uniform(0.34, 0.5))
        self.meter = self.height * rng.uniform(0.18, 0.23)
        self.taken: list[tuple[float, float]] = []

    def begin(self, name: str, adjective: str) -> None:
        """What is painted from now on belongs to a new thing."""
        self.things.append((name, adjective))

    def polygon(self, points: Sequence[tuple[float, float]], color: Color) -> None:
        """Paint a polygon with corners in pixels."""
        for draw, fill in zip(self.layers, (color, len(self.things) - 1, 255), strict=True):
            draw.polygon(list(points), fill=fill)  # type: ignore[arg-type]

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color, shadow: bool = False) -> None:
        """Paint an ellipse by center and radii in pixels; a shadow only darkens what is there."""
        fills = zip(self.layers, (color, len(self.things) - 1, 255), strict=True)
        for draw, fill in [(self.layers[2], 175)] if shadow else fills:
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)  # type: ignore[arg-type]

    def row(self, depth: float) -> float:
        """The row of a depth between 0 (horizon) and 1 (bottom)."""
        return self.horizon + depth * (self.height - self.horizon)

    def material(self, name: str) -> Color:
        """Begin a thing of one of a class's materials, whose color it returns."""
        adjective = str(self.rng.choice(list(MATERIALS[name])))
        self.begin(name, adjective)
        return jitter(self.rng, MATERIALS[name][adjective])

    def free_spot(self, name: str, near: float, far: float) -> tuple[float, float]:
        """A depth and x on fitting ground where nothing stands yet; the last of 30 tries if none is."""
        fitting = {"car": {"road"}, "person": {"road", "grass"}}.get(name, {"grass"})
        if not any(thing == "road" for thing, _ in self.things):
            fitting = {"grass"}
        for _ in range(30):
            depth, x = self.rng.uniform(near, far), self.rng.uniform(0.06, 0.94) * self.width
            ground = self.things[self.owner.getpixel((int(x), int(self.row(depth) - 1)))][0]  # type: ignore[call-overload]
            gap = 1.6 * self.meter * (0.4 + depth)
            if ground in fitting and all(abs(x - other) > gap or below < depth - 0.1 for below, other in self.taken):
                break
        self.taken.append((depth, x))
        return depth, x

    def developed(self) -> Scene:
        """The photograph, with texture, light, a vignette and noise, and its mask, both at the final size."""
        rng, height, width = self.rng, self.height, self.width
        owner = np.asarray(self.owner)
        names = [name for name, _ in self.things]
        textures = {
            "grain": smooth_noise(rng, height, width, (5, 5)), "leaves": smooth_noise(rng, height, width, (11, 11)),
            "blades": smooth_noise(rng, height, width, (22, 7)), "waves": smooth_noise(rng, height, width, (9, 44)),
        }  # fmt: skip
        relief = np.ones((height, width), np.float32)
        for texture, pattern in textures.items():
            amounts = [CLASSES[name][2] * (CLASSES[name][1] == texture) for name in names]
            relief += np.array(amounts, np.float32)[owner] * pattern
        y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
        relief *= rng.uniform(0.95, 1.12) * (1 - 0.22 * (x * x + y * y)) * (np.asarray(self.light) / 255)
        tint = rng.uniform(0.94, 1.04, 3)
        photo = np.clip(np.asarray(self.image) * tint * relief[..., None], 0, 255)
        photo = in_cells(photo).mean(2) + rng.normal(0, 3, (height // DRAWN_SIZE, width // DRAWN_SIZE, 3))
        cells = in_cells(np.array([NAMES.index(name) for name in names], np.uint8)[owner])
        mask = np.sort(cells, 2)[..., cells.shape[2] // 2]  # the median, which is any class of a clear majority
        mask[(cells == mask[..., None]).mean(2) < CLEAR_SHARE] = IGNORE_INDEX
        image = Image.fromarray(np.clip(np.round(photo), 0, 255).astype(np.uint8))
        return Scene(image, mask, list(self.visible(owner[1::DRAWN_SIZE, 1::DRAWN_SIZE])))

    def visible(self, owner: np.ndarray) -> Iterator[Thing]:
        """The things that are seen somewhere in a map of owners."""
        for number, (name, adjective) in enumerate(self.things):
            rows, columns = np.nonzero(owner == number)
            if rows.size:
                box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
                yield Thing(name, adjective, box, int(rows.size))


def in_cells(values: np.ndarray) -> np.ndarray:
    """(3 h, 3 w, ...) -> (h, w, 9, ...): what each final pixel is made of."""
    height, width = (side // DRAWN_SIZE for side in values.shape[:2])
    cells = values.reshape(height, DRAWN_SIZE, width, DRAWN_SIZE, *values.shape[2:]).swapaxes(1, 2)
    return cells.reshape(height, width, DRAWN_SIZE**2, *values.shape[2:])


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: tuple[int, int]) -> np.ndarray:
    """Noise (height, width) between about -1 and 1, its features `cell` pixels high and wide, and half of that."""
    total = np.zeros((height, width), np.float32)
    for octave in (1, 2):
        shape = (max(2, octave * height // cell[0]), max(2, octave * width // cell[1]))
        grid = Image.fromarray(rng.uniform(-1, 1, shape).astype(np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / octave
    return total / 1.5


def jitter(rng: np.random.Generator, color: Color, amount: int = 14) -> Color:
    """A shade of a color."""
    r, g, b = (int(np.clip(value + rng.integers(-amount, amount + 1), 0, 255)) for value in color)
    return r, g, b


def mix(first: Color, second: Color, share: float) -> Color:
    """`first` with `share` (0 to 1) of `second` in it."""
    r, g, b = (round((1 - share) * a + share * c) for a, c in zip(first, second, strict=True))
    return r, g, b


def darker(color: Color, factor: float = 0.65) -> Color:
    return mix((0, 0, 0), color, factor)


def any_color(rng: np.random.Generator) -> tuple[str, Color]:
    """A color's name and a shade of it."""
    name = str(rng.choice(list(COLORS)))
    return name, jitter(rng, COLORS[name])


# Background


def draw_background(canvas: Canvas, wanted: str) -> None:
    """Sky, clouds, mountains, grass, water and a road, as far as they are there."""
    rng, width, height, horizon = canvas.rng, canvas.width, canvas.height, canvas.horizon
    has = {name: rng.random() < chance or name == wanted for name, chance in BACKGROUND.items()}
    name = str(rng.choice(list(SKIES)))
    zenith, haze = (jitter(rng, color, 8) for color in SKIES[name])
    canvas.begin("sky", name)
    for row in range(height):
        canvas.polygon([(0, row), (width, row)], mix(zenith, haze, min(1, row / horizon) ** 1.3))
    if name != "grey" and rng.random() < 0.4:
        sun = (rng.uniform(0.1, 0.9) * width, rng.uniform(0.2, 0.8) * horizon)
        for radius, share in ((0.09, 0.25), (0.065, 0.5), (0.04, 1.0)):
            canvas.ellipse(*sun, radius * height, radius * height, mix(haze, (255, 246, 212), share))
    if has["cloud"]:
        draw_clouds(canvas, haze)
    if has["mountain"]:
        draw_mountains(canvas, haze)
    color = canvas.material("grass")
    swell = [(x * width / 12, horizon + rng.uniform(0, 0.012) * height) for x in range(13)]
    canvas.polygon([*swell, (width, height), (0, height)], color)
    for depth in np.linspace(0.1, 1, 10):  # nearer grass is darker
        canvas.polygon(
            [(0, canvas.row(depth)), (width, canvas.row(depth)), (width, height), (0, height)],
            darker(color, 1 - 0.2 * depth),
        )
    if has["water"]:
        color = mix(canvas.material("water"), haze, 0.25)
        middle, reach = canvas.row(rng.uniform(0.1, 0.5)), rng.uniform(0.05, 0.12) * height
        canvas.ellipse(
            rng.uniform(0, 1) * width, max(middle, horizon + reach), rng.uniform(0.3, 0.8) * width, reach, color
        )
    if has["road"]:
        draw_road(canvas)


def draw_clouds(canvas: Canvas, haze: Color) -> None:
    """One to four clouds, gray below and lit above."""
    rng = canvas.rng
    name, color = (("white", (247, 247, 245)), ("grey", (180, 182, 190)), ("dark", (130, 132, 142)))[
        rng.choice(3, p=[0.6, 0.25, 0.15])
    ]
    for _ in range(rng.integers(1, 5)):
        canvas.begin("cloud", name)
        wide = rng.uniform(0.09, 0.2) * canvas.width
        x, y = rng.uniform(0, canvas.width), rng.uniform(0.15, 0.6) * canvas.horizon
        puffs = [(rng.uniform(-0.8, 0.8), rng.uniform(0.28, 0.45) * wide) for _ in range(rng.integers(5, 9))]
        for lift, shade in ((0.0, mix(color, haze, 0.45)), (0.28, mix(color, haze, 0.1))):
            for off, radius in puffs:
                size = radius * (1.05 - 0.4 * abs(off))
                canvas.ellipse(x + off * wide, y - lift * size, 1.3 * size, size * (0.75 - 0.2 * lift), shade)


def draw_mountains(canvas: Canvas, haze: Color) -> None:
    """One or two ranges, the farther one paler, with a lit and a dark side and perhaps snow."""
    rng, height, base = canvas.rng, canvas.height, canvas.horizon + 6
    sun, snowy = rng.choice([-1, 1]), rng.random() < 0.5
    for veil in ((0.55, 0.15), (0.3,))[rng.integers(2)]:
        color = mix(canvas.material("mountain"), haze, veil)
        for _ in range(rng.integers(2, 5)):
            x, top = rng.uniform(-0.1, 1.1) * canvas.width, rng.uniform(0.1, 0.3) * height
            half = top * rng.uniform(0.9, 1.8)
            canvas.polygon([(x - half, base), (x, base - top), (x + half, base)], color)
            ridge = [(x, base - top), (x + 0.12 * half, base - 0.55 * top), (x - 0.08 * half, base)]
            canvas.polygon([*ridge, (x - sun * half, base)], darker(color, 0.8))
            if snowy and top > 0.15 * height:
                teeth = [
                    (x + part * half * 0.34, base - top * (0.66 + 0.1 * (i % 2)))
                    for i, part in enumerate((-1, -0.4, 0.2, 0.6, 1))
                ]
                canvas.polygon([(x, base - top), *teeth[::-1]], mix((243, 245, 250), haze, veil))


def draw_road(canvas: Canvas) -> None:
    """A road toward the horizon or across the image; all but dirt roads have markings."""
    rng, width = canvas.rng, canvas.width
    color = canvas.material("road")
    marked = canvas.things[-1][1] != "dirt"
    paint = (224, 219, 204) if rng.random() < 0.7 else (219, 179, 66)
    if rng.random() < 0.45:
        middle, tilt, half = rng.uniform(0.45, 0.75), rng.uniform(-0.06, 0.06), rng.uniform(0.12, 0.19)

        def point(along: float, across: float) -> tuple[float, float]:
            return along * width, canvas.row(middle + tilt * (along - 0.5) + across * half)

    else:
        start, end, bend = rng.uniform(0.2, 0.8), rng.uniform(0.25, 0.75), rng.uniform(-0.15, 0.15)
        wide = rng.uniform(0.25, 0.38)

        def point(along: float, across: float) -> tuple[float, float]:
            depth = along**2
            center = start + (end - start) * depth + bend * np.sin(np.pi * along)
            return (center + across * (0.012 + wide * depth)) * width, canvas.row(1.02 * depth)

    steps = np.linspace(0, 1, 25)

    def strip(left: float, right: float, along: np.ndarray, shade: Color) -> None:
        edges = [point(step, left) for step in along], [point(step, right) for step in along[::-1]]
        canvas.polygon([*edges[0], *edges[1]], shade)

    strip(-1, 1, steps, color)
    if marked:
        for begin in range(0, 24, 2):
            strip(-0.04, 0.04, steps[begin : begin + 2], paint)
        for side in (-0.94, 0.9):
            strip(side, side + 0.04, steps, paint)


# Things


class Pen:
    """Draws a thing in meters around its foot, x to the side it faces and y up."""

    def __init__(self, canvas: Canvas, x: float, depth: float):
        self.canvas, self.rng = canvas, canvas.rng
        self.x, self.y, self.scale = x, canvas.row(depth), depth * canvas.meter
        self.side = int(canvas.rng.choice([-1, 1]))

    def polygon(self, points: Sequence[tuple[float, float]], color: Color) -> None:
        self.canvas.polygon([(self.x + self.side * x * self.scale, self.y - y * self.scale) for x, y in points], color)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color, shadow: bool = False) -> None:
        scale = self.scale
        self.canvas.ellipse(self.x + self.side * x * scale, self.y - y * scale, rx * scale, ry * scale, color, shadow)

    def begin(self, name: str, adjective: str, width: float) -> None:
        """Begin a thing that throws a shadow of that width."""
        self.canvas.begin(name, adjective)
        self.ellipse(0.2 * width, 0.02, 0.6 * width, 0.1 * width, (0, 0, 0), shadow=True)


def tree(pen: Pen) -> None:
    """A broad tree of many round patches of leaves, or a conifer."""
    rng = pen.rng
    kind = str(rng.choice(list(MATERIALS["tree"]), p=[0.45, 0.2, 0.25, 0.1]))
    leaf = jitter(rng, MATERIALS["tree"][kind], 18)
    high, wide = rng.uniform(3.6, 6.0), rng.uniform(2.6, 4.2)
    pen.begin("tree", kind, wide)
    pen.polygon([(-0.2, 0), (0.2, 0), (0.1, 0.7 * high), (-0.1, 0.7 * high)], jitter(rng, (78, 58, 42)))
    if kind == "pine":
        for tier in np.linspace(0, 0.75, 5):
            low, half = (0.12 + tier) * high, 0.42 * wide * (1 - tier)
            teeth = [(half * part, low - (0.25 if i % 2 else 0)) for i, part in enumerate(np.linspace(1, -1, 7))]
            pen.polygon([*teeth, (0, min(high, low + 0.36 * high))], darker(leaf, 0.8 + 0.35 * tier))
        return
    for lift in (0.0, 0.5, 1.0):  # dark leaves below, lit ones above
        for _ in range(9):
            angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.3)
            x, y = far * wide * np.cos(angle), (0.62 + 0.1 * lift + 0.75 * far * np.sin(angle)) * high
            size = rng.uniform(0.16, 0.25) * wide * (1.1 - 0.45 * lift)
            pen.ellipse(x, y, size, size, mix(darker(leaf, 0.7), leaf, 0.6 * lift + rng.uniform(0, 0.4)))


def house(pen: Pen) -> None:
    """A house with a pitched roof, or a block with a flat one; two of its walls are seen."""
    rng = pen.rng
    name, wall = any_color(rng)
    wall, roof = mix(wall, (204, 199, 184), rng.uniform(0, 0.4)), mix(any_color(rng)[1], (89, 64, 56), 0.5)
    flat = rng.random() < 0.25
    floors = int(rng.integers(3, 5) if flat else rng.integers(1, 3))
    half, storey, deep = rng.uniform(2.2, 3.3), rng.uniform(1.9, 2.3), rng.uniform(1.0, 2.2)
    high, glass = floors * storey, (230, 199, 117) if rng.random() < 0.3 else jitter(rng, (77, 97, 117))
    peak = high + rng.uniform(1.3, 2.2)
    pen.begin("house", name, 2.4 * half)
    pen.polygon([(half, 0), (half + deep, 0.18 * deep), (half + deep, high), (half, high)], darker(wall, 0.72))
    pen.box(-half, 0, half, high, wall)
    if flat:
        pen.box(-half - 0.1, high, half + deep, high + 0.3, darker(wall))
    elif rng.random() < 0.5:
        pen.polygon([(-half, high), (half, high), (0, peak)], wall)
        pen.polygon([(0, peak), (half + 0.3, high - 0.2), (half + deep + 0.2, high), (deep, peak + 0.1)], roof)
        pen.polygon(
            [(-half - 0.3, high - 0.3), (0, peak - 0.25), (half + 0.3, high - 0.3), (0, peak + 0.15)],
            darker(roof, 0.8),
        )
    else:
        top = [(half + 0.45 * deep, peak), (-half + 0.6, peak)]
        pen.polygon([(half, high), (half + deep, high), top[0]], darker(wall, 0.72))
        pen.polygon([(-half - 0.3, high - 0.1), (half + 0.25, high - 0.1), *top], roof)
        pen.box(-0.3 * half, peak - 0.5, -0.3 * half + 0.5, peak + 0.6, jitter(rng, (115, 71, 56)))
    columns = int(rng.integers(2, 5))
    step = 2 * half / columns
    for x in np.arange(columns) * step - half + step / 2:
        for y in (np.arange(floors) + 0.55) * storey:
            pen.box(x - 0.33 * step, y - 0.27 * storey, x + 0.33 * step, y + 0.27 * storey, (224, 222, 212))
            pen.box(x - 0.25 * step, y - 0.2 * storey, x + 0.25 * step, y + 0.2 * storey, glass)
    door = rng.uniform(-0.6, 0.6) * half
    pen.box(door - 0.45, 0, door + 0.45, 1.6, darker(any_color(rng)[1]))


def car(pen: Pen) -> None:
    """A car from the side, the front or behind."""
    rng = pen.rng
    name, paint = any_color(rng)
    tall = rng.uniform(1.4, 1.7)
    if rng.random() < 0.55:
        pen.begin("car", name, 4.0)
        long, back = rng.uniform(1.8, 2.1), rng.uniform(0.55, 0.95)
        cabin = [(-back * long, 0.85), (0.8 * -back * long, tall), (0.3 * long, tall), (0.7 * long, 0.85)]
        pen.polygon(cabin, paint)
        pen.polygon([(0.85 * x, 0.88 + 0.85 * (y - 0.85)) for x, y in cabin], GLASS)
        pen.box(-0.2, 0.85, -0.08, tall, paint)
        pen.polygon([(-long, 0.28), (long, 0.28), (long, 0.66), (0.7 * long, 0.9), (-long, 0.86)], paint)
        pen.box(-long, 0.26, long, 0.4, darker(paint))
        pen.box(long - 0.16, 0.48, long, 0.64, (250, 240, 190))
        pen.box(-long, 0.55, -long + 0.14, 0.74, (191, 26, 26))
        for x in (-0.6 * long, 0.62 * long):
            pen.ellipse(x, 0.34, 0.36, 0.36, TYRE)
            pen.ellipse(x, 0.34, 0.17, 0.17, (158, 160, 166))
        return
    pen.begin("car", name, 2.4)
    half, lamp = rng.uniform(0.95, 1.1), (204, 31, 26) if rng.random() < 0.5 else (252, 245, 204)
    for x in (-half + 0.22, half - 0.22):
        pen.box(x - 0.18, 0, x + 0.18, 0.5, TYRE)
    pen.polygon([(-half, 0.9), (-0.72 * half, tall), (0.72 * half, tall), (half, 0.9)], paint)
    pen.polygon(
        [(-0.82 * half, 0.94), (-0.62 * half, tall - 0.12), (0.62 * half, tall - 0.12), (0.82 * half, 0.94)], GLASS
    )
    pen.box(-half, 0.24, half, 0.95, paint)
    pen.box(-half, 0.22, half, 0.38, darker(paint))
    pen.box(-0.26 * half, 0.42, 0.26 * half, 0.56, (235, 235, 224))
    for x in (-0.76 * half, 0.76 * half):
        pen.ellipse(x, 0.7, 0.18, 0.13, lamp)


def person(pen: Pen) -> None:
    """Someone standing or walking, in clothes of any color."""
    rng = pen.rng
    name, shirt = any_color(rng)
    trousers = darker(any_color(rng)[1], 0.75)
    skin = ((237, 194, 166), (204, 153, 117), (148, 105, 77), (97, 66, 51))[rng.integers(4)]
    hair = ((36, 28, 23), (92, 61, 36), (194, 153, 87), (158, 153, 148))[rng.integers(4)]
    pen.begin("person", name, 0.9)
    pace, swing = rng.uniform(0.1, 0.34), rng.uniform(0.33, 0.6)
    for side in (-1, 1):
        pen.polygon([(side * pace - 0.12, 0), (side * pace + 0.16, 0), (0.2, 0.95), (-0.2, 0.95)], trousers)
        pen.polygon(
            [(side * 0.18, 1.42), (side * 0.34, 1.36), (side * swing + 0.08, 0.8), (side * swing - 0.08, 0.8)],
            darker(shirt, 0.82),
        )
        pen.ellipse(side * swing, 0.8, 0.09, 0.09, skin)
    pen.polygon([(-0.25, 0.8), (0.25, 0.8), (0.31, 1.4), (0.12, 1.48), (-0.12, 1.48), (-0.31, 1.4)], shirt)
    pen.ellipse(0, 1.68, 0.2, 0.22, hair)
    pen.ellipse(0.06, 1.63, 0.15, 0.18, skin)


def traffic_light(pen: Pen) -> None:
    """Three lamps on a pole; one is lit."""
    rng = pen.rng
    lamps = {"green": (64, 235, 115), "yellow": (255, 209, 51), "red": (250, 56, 41)}
    lit = str(rng.choice(list(lamps)))
    housing, pole = ((33, 36, 38), (209, 173, 46), (56, 77, 66))[rng.integers(3)], jitter(rng, (107, 110, 112), 25)
    foot = rng.uniform(1.7, 2.2)
    pen.begin("traffic light", lit, 1.0)
    pen.box(-0.13, 0, 0.13, foot, pole)
    pen.box(-0.25, 0, 0.25, 0.22, darker(pole))
    pen.box(-0.43, foot, 0.43, foot + 1.75, housing)
    for place, (name, glow) in enumerate(lamps.items()):
        pen.ellipse(0, foot + 0.35 + 0.53 * place, 0.24, 0.22, glow if name == lit else darker(glow, 0.25))


DRAWINGS: dict[str, Callable[[Pen], None]] = {
    "tree": tree, "house": house, "car": car, "person": person, "traffic light": traffic_light
}  # fmt: skip


# Files


def make_example_dataset(
    output_dir: str | os.PathLike,
    num_train: int = 400,
    num_val: int = 80,
    size: tuple[int, int] = SIZE,
    seed: int = 0,
) -> Path:
    """
    Write the example in the layout of a data set of one's own, and return its path.

    `train/images/0000.jpg` with `train/masks/0000.png` (class ids, 255 for void, with a palette for viewers), the same
    under `val/`, and `classes.json`. A folder made before with the same arguments is kept.

    Args:
        output_dir (`str` or `os.PathLike`): a new directory.
        num_train, num_val (`int`): how many scenes.
        size (`tuple[int, int]`): width and height in pixels.
        seed (`int`): of the scenes.

    Raises:
        FileExistsError: if `output_dir` holds something else.
    """
    made_with = {"scenes": [num_train, num_val], "size": list(size), "seed": seed, "version": DRAWING_VERSION}
    colors = [channel for color, *_ in CLASSES.values() for channel in color]

    def write(job: tuple[Path, str, int]) -> None:
        folder, split, index = job
        scene = draw_scene(index, seed=seed, split=split, size=size)
        scene.image.save(folder / "images" / f"{index:04d}.jpg", quality=94, subsampling=0)
        mask = Image.fromarray(scene.mask)
        mask.putpalette(colors + [0] * (768 - len(colors)))
        mask.save(folder / "masks" / f"{index:04d}.png")

    with unless_made(Path(output_dir), made_with) as new:
        if new is not None:
            for split, count in zip(SPLITS, (num_train, num_val), strict=True):
                for kind in ("images", "masks"):
                    (new / split / kind).mkdir(parents=True)
                progress = {"desc": f"Drawing {split} scenes", "disable": count < 20}
                thread_map(write, [(new / split, split, index) for index in range(count)], max_workers=2, **progress)
            palette = [list(color) for color, *_ in CLASSES.values()]
            classes = {"id2label": dict(enumerate(NAMES)), "palette": palette, "ignore_index": IGNORE_INDEX}
            (new / "classes.json").write_text(json.dumps(classes, indent=2) + "\n")
    return Path(output_dir)


@contextmanager
def unless_made(folder: Path, made_with: dict) -> Iterator[Path | None]:
    """
    A new directory to fill, which becomes `folder` when all went well, or `None` where it was made with just this.

    Raises:
        FileExistsError: if `folder` holds something else.
    """
    record = folder / ".made_with.json"
    if record.is_file() and json.loads(record.read_text()) == made_with:
        yield None
        return
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty and was not made by this example with these options: name another"
        )
    with new_directory(folder) as new:
        yield new
        (new / record.name).write_text(json.dumps(made_with) + "\n")
