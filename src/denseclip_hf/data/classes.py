"""Class names and what belongs to them, from `classes.json` or the files that annotation tools write."""

import colorsys
import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..model.class_names_denseclip import class_names


Color = tuple[int, int, int]

CLASSES_FILE = "classes.json"
TEXT_SUFFIXES, YAML_SUFFIXES = (".txt", ".names"), (".yaml", ".yml")
CLASS_SUFFIXES = (".json", ".csv", *TEXT_SUFFIXES, *YAML_SUFFIXES)
OPTIONS = ("palette", "ignore_index", "do_reduce_labels", "ignore_colors", "id_map")

# Stored id, name and color of the 19 Cityscapes classes that are evaluated; the other ids up to 33 mean no class.
CITYSCAPES_CLASSES: tuple[tuple[int, str, Color], ...] = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CITYSCAPES_HIGHEST_ID = 33


@dataclass
class ClassTable:
    """
    Class names by id 0…K − 1 and how masks store them; every field but `id2label` may be unknown (None or empty).

    Args:
        id2label: class names.
        palette: K colors (r, g, b), 0…255.
        ignore_index: id of pixels without a class.
        do_reduce_labels: masks hold 0 for no class and n for class n − 1.
        ignore_colors: colors of pixels without a class.
        id_map: stored ids, where they differ, to class ids; None means no class.
        colors: K colors to draw the classes in: those of the palette, or some that are easily told apart.
    """

    id2label: dict[int, str]
    palette: list[Color] | None = None
    ignore_index: int | None = None
    do_reduce_labels: bool | None = None
    ignore_colors: list[Color] = field(default_factory=list)
    id_map: dict[int, int | None] = field(default_factory=dict)
    colors: list[Color] = field(init=False)

    def __post_init__(self):
        self.colors = self.palette or default_palette(len(self.id2label))


def ade20k_classes() -> ClassTable:
    """The 150 classes of ADE20K; 0 in its masks means no class."""
    text = resources.files(__package__).joinpath("ade20k.json").read_text(encoding="utf-8")
    rows = json.loads(text)["classes"]
    names = {index: row["name"] for index, row in enumerate(rows)}
    return ClassTable(names, [tuple(row["color"]) for row in rows], ignore_index=255, do_reduce_labels=True)


def cityscapes_classes() -> ClassTable:
    """The 19 classes of Cityscapes, whose masks (`labelIds`) hold other ids."""
    id_map: dict[int, int | None] = dict.fromkeys([*range(CITYSCAPES_HIGHEST_ID + 1), 255])
    id_map |= {stored: index for index, (stored, _, _) in enumerate(CITYSCAPES_CLASSES)}
    names = {index: name for index, (_, name, _) in enumerate(CITYSCAPES_CLASSES)}
    return ClassTable(names, [color for _, _, color in CITYSCAPES_CLASSES], 255, False, id_map=id_map)


def default_palette(num_labels: int) -> list[Color]:
    """`num_labels` colors (r, g, b), 0…255, spread over the hue circle; the same on every call."""
    golden_ratio = (math.sqrt(5) - 1) / 2
    colors = [
        colorsys.hsv_to_rgb(i * golden_ratio % 1, (0.65, 0.9, 0.4)[i % 3], (0.95, 0.7, 0.85)[i // 3 % 3])
        for i in range(num_labels)
    ]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colors]


def parse_classes(value: Any, source: str = "the class list") -> ClassTable:
    """
    Class names from any of the forms in which users have them.

    Args:
        value: a list of names, a mapping from id to name, a mapping with the keys of `classes.json` (`id2label`, and
            optionally `palette`, `ignore_index`, `do_reduce_labels`, `ignore_colors`, `id_map`), names with commas
            between them, or a file: JSON of any of these, text with one name a line (.txt, .names), CSV of ids and
            names (Roboflow's `_classes.csv`), CVAT's `labelmap.txt`, or YAML with `names` (YOLO's `data.yaml`).
        source: what to call it in a message.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or its content is not as described.
    """
    if isinstance(value, str) and not value.lower().endswith(CLASS_SUFFIXES):
        if "," not in value and os.path.isfile(value):
            raise ValueError(f"{value} is none of the files that class names are read from ({_list(CLASS_SUFFIXES)}).")
        value = [name.strip() for name in value.split(",")]
    if isinstance(value, (str, Path)):
        source, value = str(value), _content(Path(value))
    options: Mapping[str, Any] = {}
    if isinstance(value, Mapping) and "id2label" in value:
        options = {key: option for key, option in value.items() if key != "id2label"}
        value = value["id2label"]
    ignore_index, reduce = options.get("ignore_index"), options.get("do_reduce_labels")
    for key in options:
        if key not in OPTIONS and (meant := get_close_matches(key, OPTIONS, 1)):  # others are the user's own notes
            raise ValueError(
                f"{source} has the unknown key `{key}`: write `{meant[0]}` if that is meant, or rename it."
            )
    if type(ignore_index) not in (int, type(None)) or type(reduce) not in (bool, type(None)):
        raise ValueError(f"{source} needs a whole number as ignore_index and true or false as do_reduce_labels.")
    id2label = _numbered(value, source, 1 if reduce else 0)
    palette = options.get("palette")
    return ClassTable(
        id2label,
        None if palette is None else _colors(palette, source, len(id2label)),
        ignore_index,
        reduce,
        _colors(options.get("ignore_colors", []), source),
        _id_map(options.get("id_map", {}), id2label, ignore_index, source),
    )


def find_classes(folders: Sequence[Path]) -> ClassTable | None:
    """The classes that `classes.json`, or a file that an annotation tool wrote, names in the first folder with one."""
    for folder in folders:
        for name in (CLASSES_FILE, "_classes.csv", "labelmap.txt", "class_names.txt"):
            if (folder / name).is_file():
                return parse_classes(folder / name)
    return None


def _content(file: Path) -> Any:
    """What is in a file of class names, as [`parse_classes`] takes it; in UTF-8 or, with its mark, UTF-16."""
    try:
        text = _text(file)
        if file.suffix.lower() == ".json":
            return json.loads(text)
        if file.suffix.lower() in YAML_SUFFIXES:
            content = yaml.safe_load(text)
            return content.get("names", content) if isinstance(content, Mapping) else content
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no {file.suffix[1:].upper()} file ({error}); correct it.") from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if file.suffix.lower() == ".csv":
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
        return {row[0]: row[1] for row in rows if len(row) > 1 and row[0].isdecimal()}
    if lines and lines[0].startswith("# label:color_rgb"):
        return _labelmap([line.split(":") for line in lines if line and line[0] != "#"])
    return [line for line in lines if line != "__ignore__"]  # labelme's name for no class


def _text(file: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark, as Windows writes them."""
    raw = file.read_bytes()
    return raw.decode(json.detect_encoding(raw))


def parse_lines(file: Path) -> list[str]:
    """The lines of a text file, stripped, without empty ones at the end."""
    return [line.strip() for line in _text(file).rstrip().splitlines()]


def _labelmap(rows: list[list[str]]) -> dict[str, Any]:
    """CVAT's lines `name:r,g,b:parts:actions`, as `classes.json` would say it."""
    palette = [[int(value) for value in row[1].split(",")] for row in rows if len(row) > 1 and row[1]]
    return {"id2label": [row[0] for row in rows], **({"palette": palette} if len(palette) == len(rows) else {})}


def _numbered(names: Any, source: str, first: int) -> dict[int, str]:
    """Names by their id 0…K − 1, in that order; ids in a mapping may begin with `first`, too."""
    try:
        if isinstance(names, Mapping):
            by_id = {int(key): name for key, name in names.items()}
            shift = first if first in by_id and 0 not in by_id else 0
            names = {index - shift: name for index, name in by_id.items()}
        id2label = dict(enumerate(class_names(names)))
        "".join(id2label.values()).encode()  # half a character (a lone surrogate) fits into no file
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{source} must name the classes 0…K-1, as a list of names or a mapping from id to name ({error}). Where "
            'masks hold 0 for no class and ids from 1, add "do_reduce_labels": true; where they hold other ids, add '
            'id_map, such as "id_map": {"5": 1, "10": 2, "99": null}.'
        ) from error
    return id2label


def _id_map(value: Any, id2label: Mapping[int, str], ignore_index: int | None, source: str) -> dict[int, int | None]:
    """Class by stored id; a class may be given by its name, and None or `ignore_index` means no class."""
    void = 255 if ignore_index is None else ignore_index
    ids: dict[Any, int | None] = {None: None, void: None, **{name: index for index, name in id2label.items()}}
    ids |= {index: index for index in id2label}
    try:
        return {int(stored): ids[meant] for stored, meant in value.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} needs a mapping from stored ids to class ids, class names or null as id_map ({error} is none); "
            f"the classes are 0…{len(id2label) - 1}."
        ) from error


def _colors(colors: Any, source: str, count: int | None = None) -> list[Color]:
    """Colors, `count` of them if that is given."""

    def is_color(color: object) -> bool:
        return isinstance(color, Sequence) and len(color) == 3 and all(type(v) is int and 0 <= v <= 255 for v in color)

    are_colors = isinstance(colors, Sequence) and all(is_color(color) for color in colors)
    if not are_colors or len(colors) != (count or len(colors)):
        raise ValueError(
            f"{source} needs its colors as lists of three whole numbers 0…255, and in palette one for each class."
        )
    return [tuple(color) for color in colors]


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
