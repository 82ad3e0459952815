"""The built-in example: drawn street and landscape scenes with a class for every pixel, made without any download."""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.contrib.concurrent import thread_map

from . import landscape
from .drawing import SUPERSAMPLING, THINGS, Canvas, Pen, car


logger = logging.getLogger(__name__)

CLASSES: tuple[str, ...] = (
    "sky",
    "cloud",
    "mountain",
    "grass",
    "water",
    "road",
    "tree",
    "house",
    "car",
    "person",
    "traffic light",
)
PALETTE: tuple[tuple[int, int, int], ...] = (
    (122, 182, 232),
    (236, 236, 246),
    (148, 110, 160),
    (150, 196, 78),
    (38, 92, 186),
    (104, 104, 112),
    (24, 116, 56),
    (214, 128, 62),
    (206, 44, 62),
    (250, 208, 60),
    (20, 206, 196),
)
IGNORE_INDEX = 255
SIZE = (128, 96)
SPLITS = ("train", "val")

# How often each class that a scene may lack is wanted, and the range of depths (0 horizon, 1 bottom) where it stands.
CHANCES = {"cloud": 0.6, "mountain": 0.5, "water": 0.4, "road": 0.75}
PLACES: dict[str, tuple[float, int, float, float]] = {
    "tree": (0.8, 3, 0.2, 0.65),
    "house": (0.6, 2, 0.2, 0.42),
    "car": (0.65, 3, 0.35, 0.85),
    "person": (0.6, 3, 0.4, 0.95),
    "traffic light": (0.45, 2, 0.4, 0.85),
}
# A pixel is void when its commonest class covers less than this share of it.
CLEAR_SHARE = 0.75
# Bumped when the same seed no longer draws the same scenes, so that a data set on disk is made anew.
DRAWING_VERSION = 1


@dataclass(frozen=True)
class Thing:
    """Something in a scene: its class name, an adjective, its box (left, top, right, bottom) and visible pixels."""

    name: str
    adjective: str
    box: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    `image` is RGB of the asked size; `mask` holds ids of `CLASSES` or 255, uint8 of shape (height, width); `things`
    are those of which something is visible; `key` is the (seed, split, index) that draws it.
    """

    image: Image.Image
    mask: np.ndarray
    things: list[Thing] = field(default_factory=list)
    key: tuple[int, int, int] = (0, 0, 0)


def draw_scene(index: int, *, seed: int = 0, split: str = "train", size: tuple[int, int] = SIZE) -> Scene:
    """Scene `index` of a seed and split ("train" or "val"); `size` is (width, height) in pixels.

    The same arguments give the same scene, whatever else is drawn. Scene i is made to hold class i modulo the number
    of classes, so the first eleven scenes show every class.

    Raises:
        ValueError: for an unknown split, a negative index or seed, or a side below 32 pixels.
    """
    if split not in SPLITS or index < 0 or seed < 0 or min(size) < 32:
        raise ValueError(f"no scene for split={split!r} (of {SPLITS}), {index=}, {seed=}, {size=} (sides from 32)")
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(key)
    canvas = Canvas(size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING, rng)
    wanted = CLASSES[index % len(CLASSES)]
    tint, across = draw_landscape(canvas, wanted)
    draw_things(canvas, wanted, across)
    classes, things = visible(canvas)
    return Scene(develop(canvas, tint), classes, things, key)


def draw_landscape(canvas: Canvas, wanted: str) -> tuple[np.ndarray, bool]:
    """Everything behind the things; returns the light's tint (3,) and whether cars are seen from the side."""
    has = {name: bool(canvas.rng.random() < chance) or name == wanted for name, chance in CHANCES.items()}
    haze, tint = landscape.sky(canvas)
    if has["cloud"]:
        landscape.clouds(canvas, haze)
    if has["mountain"]:
        landscape.mountains(canvas, haze)
    landscape.grass(canvas)
    if has["water"]:
        landscape.water(canvas, haze)
    across = landscape.road(canvas) if has["road"] else bool(canvas.rng.random() < 0.5)
    return np.asarray(tint, np.float32), across


def draw_things(canvas: Canvas, wanted: str, across: bool) -> None:
    """Place and draw the things, the farthest first."""
    rng = canvas.rng
    ground = np.array([CLASSES.index(name) for name, _ in canvas.things])[canvas.owner]
    spots: list[tuple[float, float, str]] = []
    for name, (chance, most, near, far) in PLACES.items():
        count = int(rng.integers(1, most + 1)) if rng.random() < chance or name == wanted else 0
        spots += [(*find_spot(canvas, ground, spots, name, near, far), name) for _ in range(count)]
    for depth, x, name in sorted(spots):
        y = canvas.horizon + depth * (canvas.height - canvas.horizon)
        pen = Pen(canvas, x, y, depth * canvas.metre)
        if name == "car":
            car(pen, side_on=across if rng.random() < 0.85 else not across)
        else:
            THINGS[name](pen)


def find_spot(
    canvas: Canvas, ground: np.ndarray, taken: list[tuple[float, float, str]], name: str, near: float, far: float
) -> tuple[float, float]:
    """A (depth, x) on fitting ground and not behind what already stands there; the last try if none fits."""
    rng = canvas.rng
    fitting = {"car": {"road"}, "person": {"road", "grass"}}.get(name, {"grass"})
    if "road" in fitting and CLASSES.index("road") not in ground:
        fitting = {"grass"}
    depth = x = 0.0
    for attempt in range(30):
        depth, x = float(rng.uniform(near, far)), float(rng.uniform(0.06, 0.94)) * canvas.width
        row = int(canvas.horizon + depth * (canvas.height - canvas.horizon))
        below = CLASSES[ground[min(row, canvas.height - 1), int(x)]]
        gap = 1.6 * canvas.metre * (0.4 + depth)
        clear = all(abs(x - other) > gap or (other_depth < depth - 0.1) for other_depth, other, _ in taken)
        if (below in fitting or (attempt >= 20 and below != "water")) and clear:
            break
    return depth, x


def visible(canvas: Canvas) -> tuple[np.ndarray, list[Thing]]:
    """The label map at the final size, void where classes share a pixel, and the things still to be seen."""
    step = SUPERSAMPLING
    class_of = np.array([CLASSES.index(name) for name, _ in canvas.things])
    height, width = canvas.height // step, canvas.width // step
    cells = np.arange(height * width).reshape(height, 1, width, 1)
    classes_there = class_of[canvas.owner].reshape(height, step, width, step) + len(CLASSES) * cells
    counts = np.bincount(classes_there.ravel(), minlength=len(CLASSES) * cells.size)
    counts = counts.reshape(height, width, len(CLASSES))
    mask = counts.argmax(2).astype(np.uint8)
    mask[counts.max(2) < CLEAR_SHARE * step * step] = IGNORE_INDEX
    owner = canvas.owner[step // 2 :: step, step // 2 :: step]
    things = []
    for number, (name, adjective) in enumerate(canvas.things):
        rows, columns = np.nonzero(owner == number)
        if rows.size:
            box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
            things.append(Thing(name, adjective, box, int(rows.size)))
    return mask, things


def develop(canvas: Canvas, tint: np.ndarray) -> Image.Image:
    """The photograph: light, exposure and vignette, then sampled down, with a little sensor noise."""
    rng, step = canvas.rng, SUPERSAMPLING
    u, v = canvas.columns / canvas.width - 0.5, canvas.rows / canvas.height - 0.5
    light = rng.uniform(0.98, 1.16) * (1 - 0.22 * (u * u + v * v))
    rgb = np.clip(canvas.rgb * tint * light[..., None], 0, 1)
    small = rgb.reshape(canvas.height // step, step, canvas.width // step, step, 3).mean((1, 3))
    small = small + rng.normal(0, 0.012, small.shape)
    return Image.fromarray(np.round(255 * np.clip(small, 0, 1)).astype(np.uint8))


def make_example_dataset(
    output_dir: str | os.PathLike,
    num_train: int = 400,
    num_val: int = 80,
    size: tuple[int, int] = SIZE,
    seed: int = 0,
) -> Path:
    """Write the example in the folder layout of a data set of one's own, and return its path.

    `train/images/0000.jpg` with `train/masks/0000.png` (ids of `CLASSES`, 255 = void, with a palette for viewers),
    the same under `val/`, and `classes.json` with "id2label", "palette" and "ignore_index". `size` is (width, height)
    in pixels. A folder made before with the same arguments is kept; the pictures depend on nothing else.

    Raises:
        FileExistsError: when `output_dir` holds something that this function did not write.
        ValueError: for a negative number of scenes, and as `draw_scene`.
    """
    output_dir = Path(output_dir)
    if num_train < 0 or num_val < 0:
        raise ValueError(f"the number of scenes cannot be negative: {num_train=}, {num_val=}")
    made_with = {
        "num_train": num_train,
        "num_val": num_val,
        "size": list(size),
        "seed": seed,
        "version": DRAWING_VERSION,
    }
    with finished_folder(output_dir, made_with) as folder:
        if folder is not None:
            for split, count in zip(SPLITS, (num_train, num_val), strict=True):
                write_split(folder / split, split, count, size, seed)
            classes = {
                "id2label": {str(label): name for label, name in enumerate(CLASSES)},
                "palette": [list(color) for color in PALETTE],
                "ignore_index": IGNORE_INDEX,
            }
            (folder / "classes.json").write_text(json.dumps(classes, indent=2) + "\n")
    return output_dir


def write_split(folder: Path, split: str, count: int, size: tuple[int, int], seed: int) -> None:
    """Draw `count` scenes of a split into `images` and `masks` below `folder`."""
    colors = [channel for color in PALETTE for channel in color]
    colors += [0] * (3 * 256 - len(colors))
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)

    def write_scene(index: int) -> None:
        scene = draw_scene(index, seed=seed, split=split, size=size)
        scene.image.save(folder / "images" / f"{index:04d}.jpg", quality=94, subsampling=0)
        mask = Image.fromarray(scene.mask)
        mask.putpalette(colors)
        mask.save(folder / "masks" / f"{index:04d}.png")

    bar = {"desc": f"Drawing {split} scenes", "unit": "scene", "disable": count < 20}
    thread_map(write_scene, range(count), max_workers=2, **bar)


def _count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


@contextmanager
def finished_folder(folder: Path, made_with: dict) -> Iterator[Path | None]:
    """Yield a temporary sibling that becomes `folder` when all went well, or None when `folder` is already as wanted.

    `made_with` (JSON) is kept in the folder as `.made_with.json`, by which a later call knows it.

    Raises:
        FileExistsError: when `folder` holds something, but not just what was made with its `.made_with.json`.
    """
    record = folder / ".made_with.json"
    before = json.loads(record.read_text()) if record.is_file() else {}
    num_files = before.pop("num_files", None)
    if before == made_with:
        logger.info("%s is complete already", folder)
        yield None
        return
    if folder.exists() and any(folder.iterdir()) and num_files != _count_files(folder):
        what = "holds other files than this example made" if record.is_file() else "was not made by this example"
        raise FileExistsError(f"{folder} is not empty and {what}; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        record_text = json.dumps(made_with | {"num_files": _count_files(temporary) + 1}) + "\n"
        (temporary / record.name).write_text(record_text)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
