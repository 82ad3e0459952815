"""Words for the built-in example: a sentence for a scene, and crops of its things with the names of what they show."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .scenes import CLASSES, IGNORE_INDEX, Scene, Thing


STUFF = ("sky", "mountain", "grass", "water", "road")
UNCOUNTED = ("grass", "water")
PLURALS = {"person": "people"}
NUMBERS = {2: "two", 3: "three"}
PHOTOS = ("a photo of {}.", "a picture of {}.", "{}.", "a drawing of {}.", "a small photo of {}.", "there is {} here.")
VIEWS = ("{}", "a photo of {}", "a picture of {}", "a view of {}", "a scene with {}")
# A thing with fewer visible pixels is not worth a word, nor a crop.
LEAST_AREA = 40
# The share that a crop's subject must fill: of the whole square for stuff, of its own box for a thing.
LEAST_SHARE = {"stuff": 0.6, "thing": 0.35}


def with_article(words: str) -> str:
    """ "car" -> "a car", "orange car" -> "an orange car"; nothing before what is not counted, as grass."""
    if words.split()[-1] in UNCOUNTED:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def subject(name: str, adjective: str = "") -> str:
    """What a caption calls a thing: "a red car", "dry grass", "a person in blue"."""
    if name == "person" and adjective:
        return f"a person in {adjective}"
    return with_article(f"{adjective} {name}".strip())


def counted(things: list[Thing]) -> str:
    """One phrase for things of one class: "a red car", "two cars", "several trees"."""
    name = things[0].name
    if len(things) == 1 or name in UNCOUNTED:
        return subject(name, things[0].adjective)
    return f"{NUMBERS.get(len(things), 'several')} {PLURALS.get(name, name + 's')}"


def listed(phrases: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def caption(scene: Scene, variant: int = 0) -> str:
    """A sentence, in lower case, that names everything well visible in the scene.

    "a red car and two trees on a grey road beside blue water in front of a white house under a cloudy sky"; other
    `variant` numbers word it differently. The same scene and variant give the same sentence.
    """
    rng = np.random.default_rng((*scene.key, variant))
    seen: dict[str, list[Thing]] = {}
    for thing in scene.things:
        if thing.area >= LEAST_AREA:
            seen.setdefault(thing.name, []).append(thing)
    front = [counted(seen[name]) for name in ("car", "person", "traffic light", "tree") if name in seen]
    rng.shuffle(front)
    back = [counted(seen[name]) for name in ("house", "mountain") if name in seen]
    ground = [counted(seen[name]) for name in ("road", "grass") if name in seen]
    rng.shuffle(ground)
    sentence = f"{listed(front)} on {' and '.join(ground)}" if front and ground else listed(front or ground)
    if "water" in seen:
        sentence += f" {rng.choice(['beside', 'near', 'by'])} {counted(seen['water'])}"
    if back:
        sentence += f" {rng.choice(['in front of', 'before', 'with'])} {listed(back)}"
    if "sky" in seen:
        clouds = f" with {counted(seen['cloud'])}" if "cloud" in seen else ""
        if clouds and rng.random() < 0.4:
            clouds, sky = "", "a cloudy sky"
        else:
            sky = counted(seen["sky"])
        sentence += f" {rng.choice(['under', 'below'])} {sky}{clouds}"
    return str(rng.choice(VIEWS)).format(sentence)


@dataclass(frozen=True)
class Crop:
    """A square cut from a scene, RGB, and the class name and adjective of what it shows."""

    image: Image.Image
    name: str
    adjective: str


def crops(scene: Scene) -> Iterator[Crop]:
    """A crop of every well visible thing of the scene, with some of its surroundings; squares from 20 pixels on."""
    rng = np.random.default_rng((*scene.key, len(CLASSES)))
    for thing in scene.things:
        own = scene.mask == CLASSES.index(thing.name)
        for left, top, side in squares(scene, thing, own, rng):
            box = (left, top, left + side, top + side)
            if fills(scene.mask, own, *(box if thing.name in STUFF else thing.box), stuff=thing.name in STUFF):
                yield Crop(scene.image.crop(box), thing.name, thing.adjective)
                break


def fills(mask: np.ndarray, own: np.ndarray, left: int, top: int, right: int, bottom: int, *, stuff: bool) -> bool:
    """Whether `own` pixels are enough of the labelled ones in a box."""
    area = own[top:bottom, left:right].sum()
    labelled = (mask[top:bottom, left:right] != IGNORE_INDEX).sum()
    return bool(area >= LEAST_AREA and area >= LEAST_SHARE["stuff" if stuff else "thing"] * labelled)


def squares(scene: Scene, thing: Thing, own: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[int, int, int]]:
    """(left, top, side) in pixels: the one around a thing, or some tries within what has no outline."""
    left, top, right, bottom = thing.box
    centres = [
        ((left + right) // 2, (top + bottom) // 2, round(max(right - left, bottom - top) * rng.uniform(1.05, 1.4)))
    ]
    if thing.name in STUFF:
        rows, columns = np.nonzero(own[top:bottom, left:right])
        pixels = rng.integers(rows.size, size=8).tolist() if rows.size else []
        centres = [(left + int(columns[i]), top + int(rows[i]), int(rng.integers(20, 45))) for i in pixels]
    width, height = scene.image.size
    for x, y, wanted in centres:
        side = min(max(wanted, 20), width, height)
        yield min(max(x - side // 2, 0), width - side), min(max(y - side // 2, 0), height - side), side
