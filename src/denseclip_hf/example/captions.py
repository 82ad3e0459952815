"""Words for the built-in example: crops of the things in a scene, with what a caption calls them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from .scenes import NAMES, Scene, Thing


STUFF = ("sky", "mountain", "grass", "water", "road")
PHOTOS = ("a photo of {}.", "a picture of {}.", "{}.", "a drawing of {}.", "a small photo of {}.", "there is {} here.")
# Visible pixels below which a thing is not worth a crop, and the share of a crop, or of a thing's box, to be filled.
LEAST_AREA, LEAST_SHARE = 40, 0.35


class Crop(NamedTuple):
    """A square cut from a scene, and the class name and adjective of what it shows."""

    image: Image.Image
    name: str
    adjective: str


def subject(name: str, adjective: str = "") -> str:
    """What a caption calls a thing: "a red car", "dry grass", "a person in blue"."""
    if name == "person" and adjective:
        return f"a person in {adjective}"
    words = f"{adjective} {name}".strip()
    if name in ("grass", "water"):
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def crops(scene: Scene, rng: np.random.Generator) -> Iterator[Crop]:
    """A crop of every well visible thing, with some of its surroundings; squares of 20 pixels or more."""
    for thing in scene.things:
        x, y, side = square(scene, thing, rng)
        left, top, right, bottom = (x, y, x + side, y + side) if thing.name in STUFF else thing.box
        own = scene.mask[top:bottom, left:right] == NAMES.index(thing.name)
        if thing.area >= LEAST_AREA and own.mean() >= LEAST_SHARE:
            yield Crop(scene.image.crop((x, y, x + side, y + side)), thing.name, thing.adjective)


def square(scene: Scene, thing: Thing, rng: np.random.Generator) -> tuple[int, int, int]:
    """(left, top, side) in pixels: around a thing, or somewhere within what has no outline."""
    left, top, right, bottom = thing.box
    x, y, wanted = (left + right) // 2, (top + bottom) // 2, round(max(right - left, bottom - top) * 1.2)
    if thing.name in STUFF:
        rows, columns = np.nonzero(scene.mask == NAMES.index(thing.name))
        pixel = rng.integers(rows.size) if rows.size else 0
        x, y = (int(columns[pixel]), int(rows[pixel])) if rows.size else (x, y)
        wanted = int(rng.integers(20, 45))
    width, height = scene.image.size
    side = min(max(wanted, 20), width, height)
    return min(max(x - side // 2, 0), width - side), min(max(y - side // 2, 0), height - side), side
