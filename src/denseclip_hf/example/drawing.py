"""Drawing for the built-in example: a canvas that knows which thing owns each pixel, and the things themselves.

Everything is drawn larger than the final picture (see `SUPERSAMPLING`), back to front. Things are described in metres,
x to the right of and y above the point where they touch the ground.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw


SUPERSAMPLING = 3

Color = tuple[float, float, float]
Points = Sequence[tuple[float, float]]

# Any of these may colour a car, a wall, a roof or a shirt, so that colour alone does not give the class away.
COLORS: dict[str, Color] = {
    "red": (0.74, 0.18, 0.16),
    "orange": (0.85, 0.49, 0.20),
    "yellow": (0.88, 0.76, 0.34),
    "green": (0.30, 0.52, 0.30),
    "blue": (0.24, 0.42, 0.70),
    "purple": (0.48, 0.36, 0.60),
    "pink": (0.86, 0.58, 0.62),
    "brown": (0.47, 0.34, 0.25),
    "white": (0.90, 0.89, 0.86),
    "grey": (0.56, 0.57, 0.58),
    "black": (0.17, 0.18, 0.20),
}


def mix(first: Color, second: Color, share: float) -> Color:
    """`first` with `share` (0…1) of `second` in it."""
    r, g, b = ((1 - share) * a + share * c for a, c in zip(first, second, strict=True))
    return r, g, b


def scaled(color: Color, factor: float) -> Color:
    """The colour made darker (factor below 1) or lighter."""
    r, g, b = (min(1.0, channel * factor) for channel in color)
    return r, g, b


def jitter(rng: np.random.Generator, color: Color, amount: float = 0.06) -> Color:
    """The colour moved at random by up to `amount` per channel."""
    r, g, b = (float(np.clip(channel + rng.uniform(-amount, amount), 0, 1)) for channel in color)
    return r, g, b


def noise(
    rng: np.random.Generator, height: int, width: int, cell: tuple[float, float], octaves: int = 3
) -> np.ndarray:
    """Smooth noise of shape (height, width), about -1…1; `cell` is the (height, width) of its largest features."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        rows, columns = (
            max(2, round(side / size * 2**octave)) for side, size in zip((height, width), cell, strict=True)
        )
        grid = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
        total += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return total / 1.5


class Canvas:
    """Picture `rgb` (height, width, 3; 0…1) and `owner` (height, width): the number of the thing seen at each pixel.

    `things` lists (class name, adjective) by that number. `horizon` is a row; `metre` the pixels of a metre at the
    bottom of the picture; `sun` is -1 with the light from the left, 1 from the right.
    """

    def __init__(self, width: int, height: int, rng: np.random.Generator):
        self.width, self.height, self.rng = width, height, rng
        self.rgb = np.zeros((height, width, 3), np.float32)
        self.owner = np.zeros((height, width), np.int16)
        self.things: list[tuple[str, str]] = []
        self.horizon = round(height * rng.uniform(0.34, 0.5))
        self.metre = height * rng.uniform(0.18, 0.23)
        self.sun = int(rng.choice([-1, 1]))
        self.textures = {
            "leaves": noise(rng, height, width, (11, 11), 2),
            "blades": noise(rng, height, width, (22, 7)),
            "ripples": noise(rng, height, width, (7, 46)),
            "rock": noise(rng, height, width, (48, 30), 4),
            "grain": noise(rng, height, width, (5, 5), 2),
            "boards": np.repeat(np.sin(np.arange(height) * 2 * np.pi / 10)[:, None], width, 1).astype(np.float32),
        }
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
        self.rows, self.columns = rows, columns

    def begin(self, name: str, adjective: str) -> None:
        """What is painted from now on belongs to a new thing."""
        self.things.append((name, adjective))

    def paint(self, mask: np.ndarray, color: np.ndarray | Color, top: int = 0, left: int = 0) -> None:
        """Paint the pixels of `mask` (h, w), its corner at (top, left); `color` is one or an (h, w, 3) array."""
        region = np.s_[top : top + mask.shape[0], left : left + mask.shape[1]]
        np.copyto(self.rgb[region], np.asarray(color, np.float32), where=mask[..., None])
        self.owner[region][mask] = len(self.things) - 1

    def depth(self) -> np.ndarray:
        """0 at and above the horizon to 1 at the bottom row, shape (height, width)."""
        return np.clip((self.rows - self.horizon) / (self.height - self.horizon), 0, 1)

    def in_perspective(self, texture: str) -> np.ndarray:
        """A texture whose rows crowd together towards the horizon."""
        stretch = np.log1p(12 * self.depth()[:, 0]) / np.log(13)
        return self.textures[texture][np.minimum((stretch * self.height).astype(int), self.height - 1)]


class Pen:
    """Draws one thing in metres around its foot at (x, y) pixels; `scale` is the pixels of a metre there."""

    def __init__(self, canvas: Canvas, x: float, y: float, scale: float):
        self.canvas, self.x, self.y, self.scale = canvas, x, y, scale
        self.rng = canvas.rng
        self.side = int(canvas.rng.choice([-1, 1]))

    def shapes(self, points: Points) -> tuple[np.ndarray, int, int] | None:
        """The mask of a polygon and its (top, left) corner, cut to the canvas; None when outside."""
        pixels = np.array([(self.x + self.side * x * self.scale, self.y - y * self.scale) for x, y in points])
        left, top = np.maximum(np.floor(pixels.min(0)).astype(int), 0)
        right, bottom = np.minimum(np.ceil(pixels.max(0)).astype(int) + 1, (self.canvas.width, self.canvas.height))
        if right <= left or bottom <= top:
            return None
        picture = Image.new("1", (int(right - left), int(bottom - top)))
        ImageDraw.Draw(picture).polygon([(x - left, y - top) for x, y in pixels.tolist()], fill=1)
        return np.asarray(picture), int(top), int(left)

    def polygon(self, points: Points, color: Color, texture: str = "grain", amount: float = 0.06) -> None:
        """Fill a polygon; `amount` is how strongly the texture darkens and lightens the colour."""
        found = self.shapes(points)
        if found is not None:
            mask, top, left = found
            shade = self.canvas.textures[texture][top : top + mask.shape[0], left : left + mask.shape[1], None]
            self.canvas.paint(mask, np.asarray(color, np.float32) * (1 + amount * shade), top, left)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, color: Color, texture: str = "grain", amount=0.06
    ) -> None:
        """An upright rectangle, corners in the coordinates of `polygon`."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color, texture, amount)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        """An ellipse by its centre and radii, as a polygon of 20 corners."""
        turns = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        self.polygon([(x + rx * float(np.cos(t)), y + ry * float(np.sin(t))) for t in turns], color)

    def shadow(self, width: float) -> None:
        """Darken the ground beside the foot, away from the sun; the ground keeps its class."""
        turns = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        centre = -0.25 * width * self.canvas.sun * self.side
        found = self.shapes([(centre + 0.62 * width * np.cos(t), 0.05 + 0.11 * width * np.sin(t)) for t in turns])
        if found is not None:
            mask, top, left = found
            mask = mask & (self.canvas.rows[top : top + mask.shape[0], :1] > self.canvas.horizon)
            self.canvas.rgb[top : top + mask.shape[0], left : left + mask.shape[1]][mask] *= 0.68

    def foliage(self, blobs: Sequence[tuple[float, float, float, float]], color: Color) -> None:
        """Leaves filling the union of ellipses (x, y, rx, ry), ragged at the edge and lit from above and the sun."""
        canvas = self.canvas
        x = (canvas.columns - self.x) / self.scale * self.side
        y = (self.y - canvas.rows) / self.scale
        reach = [(bx - 1.3 * rx, bx + 1.3 * rx, by - 1.3 * ry, by + 1.3 * ry) for bx, by, rx, ry in blobs]
        near = (x > min(r[0] for r in reach)) & (x < max(r[1] for r in reach))
        near &= (y > min(r[2] for r in reach)) & (y < max(r[3] for r in reach))
        if not near.any():
            return
        rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
        region = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        x, y, leaves = x[region], y[region], canvas.textures["leaves"][region]
        field = np.full(x.shape, -1.0, np.float32)
        light = np.zeros(x.shape, np.float32)
        for bx, by, rx, ry in blobs:
            u, v = (x - bx) / rx, (y - by) / ry
            inside = 1 - u * u - v * v
            light = np.where(inside > field, 0.6 * v + 0.35 * canvas.sun * self.side * u, light)
            field = np.maximum(field, inside)
        mask = field + 0.45 * leaves > 0.15
        shade = np.clip(1 + 0.3 * light + 0.28 * leaves, 0.45, 1.5)
        canvas.paint(mask, np.asarray(color, np.float32) * shade[..., None], int(rows[0]), int(columns[0]))


def any_color(rng: np.random.Generator) -> tuple[str, Color]:
    """A colour's name and a shade of it."""
    name = str(rng.choice(list(COLORS)))
    return name, jitter(rng, COLORS[name])


def tree(pen: Pen) -> None:
    """A broad tree, a conifer or a poplar; green, autumn coloured or in blossom."""
    rng = pen.rng
    kind = str(rng.choice(["green", "autumn", "pine", "blossoming", "tall"], p=[0.35, 0.2, 0.2, 0.1, 0.15]))
    greens: list[Color] = [(0.20, 0.38, 0.14), (0.32, 0.44, 0.16), (0.16, 0.32, 0.20), (0.42, 0.46, 0.18)]
    autumn: list[Color] = [(0.72, 0.40, 0.13), (0.62, 0.22, 0.12), (0.78, 0.58, 0.18), (0.48, 0.33, 0.16)]
    leaf = {"autumn": autumn[rng.integers(4)], "blossoming": (0.84, 0.62, 0.68), "pine": (0.13, 0.27, 0.19)}.get(
        kind, greens[rng.integers(4)]
    )
    leaf = jitter(rng, leaf, 0.05)
    height, width = rng.uniform(3.6, 6.2), rng.uniform(2.6, 4.4)
    pen.canvas.begin("tree", kind)
    pen.shadow(width)
    trunk = jitter(rng, (0.30, 0.22, 0.16), 0.05)
    thick = rng.uniform(0.14, 0.24)
    pen.polygon(
        [(-thick, 0), (thick, 0), (thick * 0.5, height * 0.7), (-thick * 0.5, height * 0.7)], trunk, "blades", 0.3
    )
    if kind == "pine":
        tiers = int(rng.integers(3, 6))
        for tier in range(tiers):
            share = tier / tiers
            low = height * (0.14 + 0.8 * share)
            half = width * 0.42 * (1 - 0.8 * share)
            top = min(height, low + height * 1.5 / tiers)
            teeth = [(half * (1 - i / 3.0), low - (0.22 if i % 2 else 0.0)) for i in range(7)]
            pen.polygon([*teeth, (0, top)], scaled(leaf, 0.85 + 0.4 * share), "leaves", 0.3)
    elif kind == "tall":
        pen.foliage([(0, height * (0.3 + 0.16 * i), width * (0.26 - 0.02 * i), height * 0.22) for i in range(5)], leaf)
    else:
        blobs = [(0.0, height * 0.68, width * 0.36, height * 0.27)]
        for _ in range(int(rng.integers(5, 9))):
            angle, far = rng.uniform(-0.5, np.pi + 0.5), rng.uniform(0.2, 0.34)
            x, y = width * far * np.cos(angle), height * (0.64 + 0.6 * far * np.sin(angle))
            blobs.append((float(x), float(y), width * rng.uniform(0.14, 0.24), height * rng.uniform(0.12, 0.18)))
        pen.foliage(blobs, leaf)


def windows(pen: Pen, left: float, right: float, floors: int, columns: int, storey: float) -> None:
    """A grid of framed windows on a wall from `left` to `right`."""
    lit = pen.rng.random() < 0.3
    glass: Color = (0.90, 0.78, 0.46) if lit else jitter(pen.rng, (0.30, 0.38, 0.46), 0.08)
    step = (right - left) / columns
    for floor in range(floors):
        for column in range(columns):
            x, y = left + (column + 0.5) * step, floor * storey + 0.55 * storey
            pen.box(x - 0.33 * step, y - 0.27 * storey, x + 0.33 * step, y + 0.27 * storey, (0.88, 0.87, 0.83))
            pen.box(x - 0.26 * step, y - 0.21 * storey, x + 0.26 * step, y + 0.21 * storey, glass)
            pen.box(x - 0.03, y - 0.21 * storey, x + 0.03, y + 0.21 * storey, (0.85, 0.84, 0.80))


def house(pen: Pen) -> None:
    """A house with a pitched roof seen from the gable or the eaves, or a block with a flat roof; two walls visible."""
    rng = pen.rng
    name, wall = any_color(rng)
    wall = mix(wall, (0.8, 0.78, 0.72), rng.uniform(0, 0.45))
    roof = mix(any_color(rng)[1], (0.35, 0.25, 0.22), 0.55)
    kind = str(rng.choice(["gable", "eaves", "flat"], p=[0.4, 0.4, 0.2]))
    floors = int(rng.integers(3, 5)) if kind == "flat" else int(rng.integers(1, 3))
    storey = rng.uniform(1.9, 2.3)
    half, high, deep = rng.uniform(2.2, 3.4), floors * storey, rng.uniform(1.0, 2.2)
    peak = high + (0.25 if kind == "flat" else rng.uniform(1.3, 2.2))
    texture, amount = ("boards", 0.1) if rng.random() < 0.5 else ("grain", 0.05)
    facing_sun = pen.side * pen.canvas.sun > 0
    front, side = (wall, scaled(wall, 1.1)) if facing_sun else (wall, scaled(wall, 0.66))
    pen.canvas.begin("house", name)
    pen.shadow(2.4 * half)
    back = 0.18 * deep
    pen.polygon(
        [(half, 0), (half + deep, back), (half + deep, high + 0.1 * back), (half, high)], side, texture, amount
    )
    pen.box(-half, 0, half, high, front, texture, amount)
    if kind == "gable":
        pen.polygon([(-half, high), (half, high), (0, peak)], front, texture, amount)
        edge = [(0, peak), (half + 0.3, high - 0.2), (half + deep + 0.2, high), (deep, peak + 0.1)]
        pen.polygon(edge, roof, "boards", 0.12)
        strip = [(-half - 0.3, high - 0.2), (0, peak + 0.12), (half + 0.3, high - 0.2), (half + 0.3, high - 0.45)]
        pen.polygon([*strip, (0, peak - 0.2), (-half - 0.3, high - 0.45)], scaled(roof, 0.8))
    elif kind == "eaves":
        pen.polygon([(half, high), (half + deep, high), (half + 0.45 * deep, peak)], side, texture, amount)
        slope = [(-half - 0.3, high - 0.1), (half + 0.25, high - 0.1), (half + 0.45 * deep, peak), (-half + 0.5, peak)]
        pen.polygon(slope, roof, "boards", 0.16)
    else:
        pen.box(-half - 0.1, high, half + 0.1, peak, scaled(wall, 0.8))
    if kind != "flat" and rng.random() < 0.6:
        x = rng.uniform(-0.4, 0.3) * half
        pen.box(x, peak - 0.7, x + 0.5, peak + 0.55, jitter(rng, (0.45, 0.28, 0.22)))
    windows(pen, -half, half, floors, int(rng.integers(2, 5)), storey)
    door = rng.uniform(-0.6, 0.6) * half
    pen.box(door - 0.48, 0, door + 0.48, 1.65, (0.85, 0.84, 0.8))
    pen.box(door - 0.4, 0, door + 0.4, 1.57, scaled(any_color(rng)[1], 0.7))


GLASS: Color = (0.20, 0.26, 0.32)
TYRE: Color = (0.10, 0.10, 0.11)


def car_from_side(pen: Pen, paint: Color) -> None:
    """A saloon, an estate or a van, side on, heading to the pen's side."""
    long, tall = pen.rng.uniform(1.7, 2.1), pen.rng.uniform(1.35, 1.6)
    roofs: list[tuple[float, float, float, float]] = [
        (-0.95, -0.55, 0.3, 0.75),
        (-0.99, -0.88, 0.3, 0.7),
        (-1, -0.97, 0.5, 0.8),
    ]
    kind = int(pen.rng.integers(3))
    a, b, c, d = (share * long for share in roofs[kind])
    tall += 0.35 * (kind == 2)
    belt = 0.88
    pen.polygon([(a, belt), (b, tall), (c, tall), (d, belt)], paint)
    pen.polygon([(a + 0.16, belt), (b + 0.1, tall - 0.12), (c - 0.06, tall - 0.12), (d - 0.16, belt)], GLASS)
    middle = (b + c) / 2
    pen.box(middle - 0.06, belt, middle + 0.06, tall - 0.05, paint)
    nose = 0.72 * belt
    hull = [(-long, 0.28), (long, 0.28), (long, nose), (d, belt + 0.02), (a, belt + 0.02), (-long, belt - 0.06)]
    pen.polygon(hull, paint)
    pen.box(-long, 0.26, long, 0.42, scaled(paint, 0.6))
    pen.box(long - 0.14, 0.5, long, 0.66, (0.98, 0.94, 0.74))
    pen.box(-long, 0.55, -long + 0.12, 0.74, (0.75, 0.10, 0.10))
    for x in (-0.6 * long, 0.62 * long):
        pen.ellipse(x, 0.34, 0.36, 0.36, TYRE)
        pen.ellipse(x, 0.34, 0.18, 0.18, (0.62, 0.63, 0.65))


def car_from_front(pen: Pen, paint: Color) -> None:
    """A car head on or from behind."""
    half, tall = pen.rng.uniform(0.95, 1.1), pen.rng.uniform(1.45, 1.85)
    behind = bool(pen.rng.random() < 0.5)
    lamp: Color = (0.80, 0.12, 0.10) if behind else (0.99, 0.96, 0.80)
    for x in (-half + 0.22, half - 0.22):
        pen.box(x - 0.18, 0, x + 0.18, 0.5, TYRE)
    pen.polygon([(-half, 0.9), (-0.72 * half, tall), (0.72 * half, tall), (half, 0.9)], paint)
    pen.polygon(
        [(-0.84 * half, 0.92), (-0.64 * half, tall - 0.12), (0.64 * half, tall - 0.12), (0.84 * half, 0.92)], GLASS
    )
    pen.box(-half, 0.24, half, 0.95, paint)
    pen.box(-half, 0.22, half, 0.38, scaled(paint, 0.6))
    if not behind:
        pen.box(-0.5 * half, 0.48, 0.5 * half, 0.68, scaled(paint, 0.4))
    pen.box(-0.26 * half, 0.32, 0.26 * half, 0.46, (0.92, 0.92, 0.88))
    for x in (-0.76 * half, 0.76 * half):
        pen.ellipse(x, 0.68, 0.17, 0.13, lamp)


def car(pen: Pen, side_on: bool) -> None:
    """A car of any colour, seen from the side or along the road."""
    name, paint = any_color(pen.rng)
    pen.canvas.begin("car", name)
    pen.shadow(4.0 if side_on else 2.4)
    (car_from_side if side_on else car_from_front)(pen, paint)


def person(pen: Pen) -> None:
    """Someone standing or walking, in clothes of any colour."""
    rng = pen.rng
    name, shirt = any_color(rng)
    trousers = scaled(any_color(rng)[1], 0.75)
    skins: list[Color] = [(0.93, 0.76, 0.65), (0.80, 0.60, 0.46), (0.58, 0.41, 0.30), (0.38, 0.26, 0.20)]
    hairs: list[Color] = [(0.14, 0.11, 0.09), (0.36, 0.24, 0.14), (0.76, 0.60, 0.34), (0.62, 0.60, 0.58)]
    skin, hair = skins[rng.integers(4)], hairs[rng.integers(4)]
    pen.canvas.begin("person", name)
    pen.shadow(0.9)
    pace = rng.uniform(0.08, 0.34)
    for x in (-pace, pace):
        pen.polygon(
            [(x - 0.11, 0), (x + 0.15, 0), (0.21 if x > 0 else 0.01, 0.9), (-0.01 if x > 0 else -0.21, 0.9)], trousers
        )
        pen.box(x - 0.12, 0, x + 0.22, 0.09, (0.14, 0.12, 0.12))
    swing = rng.uniform(0.05, 0.35)
    for x in (-1, 1):
        hand = x * (0.28 + swing)
        pen.polygon([(x * 0.2, 1.42), (x * 0.34, 1.36), (hand + 0.07, 0.82), (hand - 0.07, 0.8)], scaled(shirt, 0.82))
        pen.ellipse(hand, 0.8, 0.08, 0.08, skin)
    pen.polygon([(-0.24, 0.8), (0.24, 0.8), (0.3, 1.4), (0.12, 1.48), (-0.12, 1.48), (-0.3, 1.4)], shirt)
    pen.ellipse(0, 1.66, 0.19, 0.22, hair)
    pen.ellipse(0.05, 1.62, 0.15, 0.18, skin)


def traffic_light(pen: Pen) -> None:
    """Three lamps in a housing on a pole; one is lit."""
    rng = pen.rng
    lamps: list[tuple[str, Color]] = [
        ("green", (0.25, 0.92, 0.45)),
        ("yellow", (1.0, 0.82, 0.2)),
        ("red", (0.98, 0.22, 0.16)),
    ]
    lit = int(rng.integers(3))
    housing: Color = ((0.13, 0.14, 0.15), (0.82, 0.68, 0.18), (0.22, 0.30, 0.26))[rng.integers(3)]
    pole = jitter(rng, (0.42, 0.43, 0.44), 0.12)
    foot = rng.uniform(1.7, 2.2)
    pen.canvas.begin("traffic light", lamps[lit][0])
    pen.shadow(1.0)
    pen.box(-0.12, 0, 0.12, foot, pole, "grain", 0.1)
    pen.box(-0.24, 0, 0.24, 0.22, scaled(pole, 0.7))
    pen.box(-0.42, foot, 0.42, foot + 1.75, housing)
    for i, (_, glow) in enumerate(lamps):
        y = foot + 0.35 + 0.53 * i
        pen.ellipse(0, y, 0.24, 0.22, glow if i == lit else scaled(mix(glow, (0.1, 0.1, 0.1), 0.75), 0.6))


THINGS: dict[str, Callable[[Pen], None]] = {
    "tree": tree,
    "house": house,
    "person": person,
    "traffic light": traffic_light,
}
