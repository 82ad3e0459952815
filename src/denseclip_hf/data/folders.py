"""Data sets lying in a folder: which files belong together, and what their classes are called."""

import colorsys
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any


Color = tuple[int, int, int]
Pair = tuple[Path, Path]

IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm",
}  # fmt: skip
TRAIN_FOLDERS = ("train", "training")
ADE20K_FOLDERS = ("training", "validation")
VALIDATION_FOLDERS = ("val", "validation", "valid")

# Stored id, name and colour of the 19 Cityscapes classes that are evaluated; the other ids up to 33 mean no class.
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
    """Class names and what belongs to them; every field but `id2label` may be unknown (None)."""

    id2label: dict[int, str]
    palette: list[Color] | None = None
    ignore_index: int | None = None
    do_reduce_labels: bool | None = None
    ignore_colors: list[Color] = field(default_factory=list)


@dataclass
class Layout:
    """
    The files of a data set, and its classes where the layout knows them.

    `splits` has a function by split name that looks for the split's (picture, mask) pairs: one that nobody asks for
    may be without masks.
    """

    splits: dict[str, Callable[[], list[Pair]]]
    classes: ClassTable | None = None
    id_table: list[int] | None = None


def ade20k_classes() -> ClassTable:
    """The 150 classes of ADE20K; 0 in its masks means no class."""
    text = resources.files(__package__).joinpath("ade20k.json").read_text(encoding="utf-8")
    rows = json.loads(text)["classes"]
    names = {index: row["name"] for index, row in enumerate(rows)}
    return ClassTable(names, [tuple(row["color"]) for row in rows], ignore_index=255, do_reduce_labels=True)


def default_palette(num_labels: int) -> list[Color]:
    """`num_labels` colours (r, g, b), 0…255, spread over the hue circle; the same on every call."""
    golden_ratio = (math.sqrt(5) - 1) / 2
    colors = [
        colorsys.hsv_to_rgb(i * golden_ratio % 1, (0.65, 0.9, 0.4)[i % 3], (0.95, 0.7, 0.85)[i // 3 % 3])
        for i in range(num_labels)
    ]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colors]


def parse_classes(value: Any, source: str = "the class list") -> ClassTable:
    """
    Class names from a list, a mapping id → name, a JSON file of either (its name ends in `.json`), a text file with
    one name a line (`.txt`), one string with commas between the names, or a mapping with the keys of `classes.json`:
    `id2label`, and optionally `palette`, `ignore_index`, `do_reduce_labels`, `ignore_colors`. Other keys are ignored.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or its content is not as described.
    """
    if isinstance(value, str) and not value.endswith((".json", ".txt")):
        value = [name.strip() for name in value.split(",")]
    if isinstance(value, (str, Path)):
        source, is_text = str(value), str(value).endswith(".txt")
        try:
            value = read_names(value) if is_text else json.loads(Path(value).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{source}, which should hold the class names, does not exist; add it.") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{source} is not a {'text' if is_text else 'JSON'} file ({error}); correct it."
            ) from error
    if isinstance(value, Mapping) and "id2label" in value:
        names, options = value["id2label"], value
    else:
        names, options = value, {}
    id2label = _numbered(names, source)
    palette = options.get("palette")
    if palette is not None and len(_colors(palette, source)) != len(id2label):
        raise ValueError(f"{source} has {len(id2label)} classes but {len(palette)} palette colours; give one each.")
    ignore_index, reduce = options.get("ignore_index"), options.get("do_reduce_labels")
    if type(ignore_index) not in (int, type(None)) or type(reduce) not in (bool, type(None)):
        raise ValueError(f"{source} needs a whole number as ignore_index and true or false as do_reduce_labels.")
    return ClassTable(
        id2label,
        _colors(palette, source) if palette is not None else None,
        ignore_index,
        reduce,
        _colors(options.get("ignore_colors", []), source),
    )


def read_names(file: str | Path) -> list[str]:
    """The names in a text file, one a line, so that they may hold commas."""
    return [line.strip() for line in Path(file).read_text("utf-8-sig").rstrip().splitlines()]


def _numbered(names: Any, source: str) -> dict[int, str]:
    """Names by their id 0…K − 1, in that order."""
    message = f"{source} must name the classes 0…K-1, each once, as a list of names or a mapping from id to name"
    if isinstance(names, Sequence) and not isinstance(names, str):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping) or not names:
        raise ValueError(f"{message}.")
    try:
        id2label = {int(key): name for key, name in sorted(names.items(), key=lambda item: int(item[0]))}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{message}; {list(names)[:3]} are no ids.") from error
    if list(id2label) != list(range(len(names))):
        missing = [i for i in range(len(names)) if i not in id2label][:5]
        raise ValueError(f"{message}; the ids {missing or list(id2label)[:5]} are missing, negative or double.")
    if not all(isinstance(name, str) and name.strip() for name in id2label.values()):
        raise ValueError(f"{message}; one is empty or no text.")
    if any("\ud800" <= character <= "\udfff" for name in id2label.values() for character in name):
        raise ValueError(f"{message}; one holds half a character (a lone surrogate), which no file can.")
    (double, times), *_ = Counter(" ".join(name.split()).casefold() for name in id2label.values()).most_common(1)
    if times > 1:
        raise ValueError(f"{message}; {double!r} stands there twice (capital letters and blanks do not count).")
    return id2label


def _colors(colors: Any, source: str) -> list[Color]:
    def is_color(color: Any) -> bool:
        return isinstance(color, Sequence) and len(color) == 3 and all(type(v) is int and 0 <= v <= 255 for v in color)

    if not isinstance(colors, Sequence) or not all(is_color(color) for color in colors):
        raise ValueError(f"{source} needs its colours as lists of three whole numbers 0…255.")
    return [tuple(color) for color in colors]


def find_layout(root: Path) -> Layout | None:
    """The files of a folder laid out like ADE20K, like Cityscapes or as images/ and masks/; None for any other."""
    for ade20k in (root, root / "ADEChallengeData2016"):
        if (ade20k / "annotations").is_dir() and any((ade20k / "images" / name).is_dir() for name in ADE20K_FOLDERS):
            return _ade20k(ade20k)
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root)
    classes = parse_classes(root / "classes.json") if (root / "classes.json").is_file() else None
    if _has_pairs(root):
        return Layout({"train": partial(_pairs, root / "images", root / "masks")}, classes)
    splits = {d.name: d for d in sorted(root.iterdir()) if d.is_dir() and _has_pairs(d)}
    if not splits:
        return None
    return Layout({name: partial(_pairs, d / "images", d / "masks") for name, d in splits.items()}, classes)


def _has_pairs(folder: Path) -> bool:
    return (folder / "images").is_dir() or (folder / "masks").is_dir()


def _ade20k(root: Path) -> Layout:
    splits: dict[str, Callable[[], list[Pair]]] = {
        name: partial(_pairs, root / "images" / name, root / "annotations" / name)
        for name in ADE20K_FOLDERS
        if (root / "images" / name).is_dir()
    }
    classes = parse_classes(root / "classes.json") if (root / "classes.json").is_file() else ade20k_classes()
    return Layout(splits, classes)


def _cityscapes(root: Path) -> Layout:
    splits: dict[str, Callable[[], list[Pair]]] = {}
    for name in ("train", "val"):
        images = sorted((root / "leftImg8bit" / name).glob("*/*_leftImg8bit.png"))
        masks = sorted((root / "gtFine" / name).glob("*/*_gtFine_labelIds.png"))
        if images or masks:
            key_of = {p: f"{p.parent.name}/{p.name.rsplit('_', 1)[0]}" for p in images}
            mask_key_of = {p: f"{p.parent.name}/{p.name.removesuffix('_gtFine_labelIds.png')}" for p in masks}
            splits[name] = partial(_matched, key_of, mask_key_of)
    if not splits:
        raise FileNotFoundError(
            f"{root / 'leftImg8bit'} holds no train/CITY/*_leftImg8bit.png; unpack Cityscapes there."
        )
    id_table = [255] * (CITYSCAPES_HIGHEST_ID + 1)
    for index, (stored_id, _, _) in enumerate(CITYSCAPES_CLASSES):
        id_table[stored_id] = index
    id2label = {index: name for index, (_, name, _) in enumerate(CITYSCAPES_CLASSES)}
    classes = ClassTable(id2label, [color for _, _, color in CITYSCAPES_CLASSES], 255, False)
    return Layout(splits, classes, id_table)


def _pairs(images: Path, masks: Path) -> list[Pair]:
    """Pictures and masks of two folders with the same name but for the suffix."""
    return _matched({p: p.stem for p in _pictures(images)}, {p: p.stem for p in _pictures(masks)})


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {folder} does not exist; pictures go into images/, masks into masks/.")
    found = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise FileNotFoundError(
            f"The folder {folder} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}); put them there."
        )
    return found


def _matched(images: dict[Path, str], masks: dict[Path, str]) -> list[Pair]:
    """Pairs with equal keys, in order; every picture needs one mask and every mask one picture."""
    mask_of = _by_key(masks)
    image_of = _by_key(images)
    for kind, other, lonely in (
        ("picture", "mask", [image_of[key] for key in image_of.keys() - mask_of.keys()]),
        ("mask", "picture", [mask_of[key] for key in mask_of.keys() - image_of.keys()]),
    ):
        if lonely:
            more = f" (and {len(lonely) - 1} more)" if len(lonely) > 1 else ""
            raise FileNotFoundError(
                f"The {kind} {min(lonely)}{more} has no {other} of that name; add it or remove it."
            )
    return [(image_of[key], mask_of[key]) for key in sorted(image_of)]


def _by_key(files: dict[Path, str]) -> dict[str, Path]:
    by_key: dict[str, Path] = {}
    for path, key in files.items():
        if key in by_key:
            raise ValueError(f"{by_key[key]} and {path} differ only in their suffix; keep one of them.")
        by_key[key] = path
    return by_key


def pick_split(names: Iterable[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """
    `wanted`, or if that is `None` the first of the `usual` names that is in `names`, if any is.

    Raises:
        ValueError: if `wanted` is not in `names`.
    """
    names = list(names)
    if wanted is not None and wanted not in names:
        raise ValueError(f"There is no split {wanted!r}; the data set has {', '.join(map(str, names))}.")
    return wanted if wanted is not None else next((name for name in usual if name in names), None)


def hold_out(pairs: list[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Split off about `fraction` of the pairs, at least one, by a hash of the name: stable as files are added."""

    def is_held_out(pair: Pair) -> bool:
        return int(hashlib.sha256(pair[0].stem.encode()).hexdigest()[:8], 16) < fraction * 2**32

    held_out = [pair for pair in pairs if is_held_out(pair)]
    if fraction > 0 and len(pairs) > 1 and len(held_out) in (0, len(pairs)):
        # So few files that the hash chose none, or all.
        held_out = pairs[-1:]
    if len(held_out) == len(pairs):
        held_out = []
    chosen = set(held_out)
    return [pair for pair in pairs if pair not in chosen], held_out
