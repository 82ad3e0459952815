"""Data sets in a folder: where their files are, which belong together, and what is left out."""

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from .classes import ClassTable, ade20k_classes, cityscapes_classes, find_classes, parse_lines


IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm",
    ".pbm", ".jp2", ".j2k",
}  # fmt: skip
# Files beside images that nobody takes for one.
OTHER_SUFFIXES = {".txt", ".csv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".db", ".ini", ".npy"}
TRAIN_NAMES, VALIDATION_NAMES = ("train", "training"), ("val", "validation", "valid")
SPLIT_NAMES = (*TRAIN_NAMES, *VALIDATION_NAMES, "test", "testing")

# Where the images and the masks of a split are, tried in this order; upper and lower case do not matter. Both have
# the same names, or a mask's ends in one of `MASK_ENDINGS`, in one folder in one of `BESIDE_ENDINGS`.
LAYOUTS = (
    ("images/{split}", "annotations/{split}"),  # ADE20K, mmsegmentation
    ("images/{split}", "masks/{split}"),  # Kaggle
    ("images/{split}", "labels/{split}"),  # YOLO
    ("img_dir/{split}", "ann_dir/{split}"),  # mmsegmentation
    ("leftImg8bit/{split}", "gtFine/{split}"),  # Cityscapes
    ("{split}/images", "{split}/masks"),
    ("{split}/images", "{split}/labels"),
    ("{split}/images", "{split}/annotations"),
    ("{split}/image", "{split}/label"),
    ("{split}/image", "{split}/mask"),
    ("{split}", "{split}_labels"),  # CamVid
    ("{split}", "{split}_masks"),
    ("{split}", "{split}annot"),  # CamVid of SegNet
    ("images", "masks"),
    ("images", "labels"),
    ("images", "annotations"),
    ("JPEGImages", "SegmentationClassPNG"),  # labelme
    ("JPEGImages", "SegmentationClass"),  # Pascal VOC, CVAT, labelme; splits are lists in ImageSets/Segmentation
    ("{split}", "{split}"),  # Roboflow
    (".", "."),
)
BESIDE_ENDINGS = ("_mask", "-mask")
MASK_ENDINGS = (*BESIDE_ENDINGS, "_masks", "_label", "_labels", "_seg", "_gt", "_L", "_gtFine_labelIds")
IMAGE_ENDING = "_leftImg8bit"


@dataclass
class Pairs:
    """Rows of one split, an image and its mask each, in the order of their names; and what is left out, in words."""

    rows: list[tuple[str, Any]]
    left_out: list[str] = field(default_factory=list)


@dataclass
class Layout:
    """
    Where the files of a data set are, and its classes where the layout knows them.

    `splits` has a function by split name that pairs the split's files, and leaves out those without a partner if its
    argument is True: a split that nobody asks for may be without masks.
    """

    splits: Mapping[str, Callable[[bool], Pairs]]
    classes: ClassTable | None = None


def find_layout(root: Path) -> Layout | None:
    """
    The first of `LAYOUTS` that the files of a folder have; None for any other folder.

    Raises:
        FileNotFoundError: if there are images but no masks where one of them has its masks.
    """
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    lacking: tuple[Path, str] | None = None
    for images, masks in LAYOUTS:
        folders = _splits(root, images)
        if not folders or (images == masks and not any(map(_has_masks, folders.values()))):
            continue
        found = {name: _folder(root, masks.format(split=name)) for name in folders}
        if not any(found.values()):
            lacking = lacking or (next(iter(folders.values())), masks.format(split=next(iter(folders))))
            continue
        splits: dict[str, Callable[[bool], Pairs]] = {
            name: partial(_pairs, folder, found[name] or root / masks.format(split=name))
            for name, folder in folders.items()
        }
        if images == "JPEGImages":
            splits = _listed_splits(root, folders["train"], found["train"] or root)
        inside = [part for folder in folders.values() for part in (folder, folder.parent) if root in part.parents]
        classes = find_classes([root, *inside])
        if classes is None and images == "leftImg8bit/{split}":
            classes = cityscapes_classes()
        if classes is None and masks == "annotations/{split}" and {"training", "validation"} & set(splits):
            classes = ade20k_classes()
        return Layout(splits, classes)
    if lacking:
        folder, masks = lacking
        raise FileNotFoundError(
            f"{folder} holds images, but {root / masks} does not exist; put their masks there. {root} holds "
            f"{_some(_names(root))}."
        )
    return None


def _splits(root: Path, images: str) -> dict[str, Path]:
    """Name and folder of images of each split that a layout finds; "train" where it has no splits."""
    before, has_splits, after = images.partition("{split}")
    base = _folder(root, before)
    if base is None:
        return {}
    if not has_splits:
        return {"train": base}
    folders = {name: _folder(base / name, after) for name in _names(base) if (base / name).is_dir()}
    found = {name: folder for name, folder in folders.items() if folder is not None}
    # Only what is inside, or beside, a folder shows that it is a split where its name does not.
    known = {name: folder for name, folder in found.items() if name.lower() in SPLIT_NAMES}
    return found if after or (before and known) else known


def _folder(root: Path, path: str) -> Path | None:
    """The folder `path` below `root`, in whichever case its name is written."""
    for part in PurePosixPath(path.strip("/")).parts:
        if not (root / part).is_dir():
            alike = [name for name in _names(root) if name.lower() == part.lower() and (root / name).is_dir()]
            if not alike:
                return None
            part = alike[0]
        root = root / part
    return root


def _names(folder: Path) -> list[str]:
    """What a folder holds, without what systems and editors put there."""
    return sorted(name for name in os.listdir(folder) if _visible(name)) if folder.is_dir() else []


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in ("__MACOSX", "@eaDir")


def _has_masks(folder: Path) -> bool:
    return any(Path(name).stem.endswith(BESIDE_ENDINGS) for name in _names(folder) if _is_image(name))


def _is_image(name: str | Path) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _listed_splits(root: Path, images: Path, masks: Path) -> dict[str, Callable[[bool], Pairs]]:
    """The splits of Pascal VOC, one list of names each in ImageSets/Segmentation; without any, all that has masks."""
    lists = _folder(root, "ImageSets/Segmentation")
    files = {Path(name).stem: lists / name for name in _names(lists) if name.endswith(".txt")} if lists else {}
    if not set(map(str.lower, files)) & set(TRAIN_NAMES):
        return {"train": partial(_pairs, images, masks, masks_decide=True)}
    return {name: partial(_pairs, images, masks, listed=file) for name, file in files.items()}


def _pairs(
    images: Path, masks: Path, skip_unpaired: bool = False, *, listed: Path | None = None, masks_decide: bool = False
) -> Pairs:
    """
    The images and masks of two folders, and of those in them, that have the same name but for suffix and ending.

    Args:
        images, masks: the folders; masks in the folder of the images have an ending.
        skip_unpaired: leave out what has no partner.
        listed: a file with the names to take, one a line.
        masks_decide: leave out images without a mask.

    Raises:
        FileNotFoundError, ValueError: if a folder or a partner is missing, or two files have the same name.
    """
    left_out: list[str] = []
    image_files = _images_in(images, left_out)
    if images == masks:
        mask_files = [path for path in image_files if path.stem.endswith(BESIDE_ENDINGS)]
        image_files = [path for path in image_files if not path.stem.endswith(BESIDE_ENDINGS)]
    else:
        mask_files = _images_in(masks, left_out)
        mask_files = [p for p in mask_files if "_gtFine_" not in p.name or p.stem.endswith("_gtFine_labelIds")]
    image_of = _by_key((path, _key(path, images).removesuffix(IMAGE_ENDING)) for path in image_files)
    mask_of = _by_key((path, _mask_key(path, masks, image_of)) for path in mask_files)
    if listed is not None:
        names = [unicodedata.normalize("NFC", name) for name in parse_lines(listed) if name]
        if missing := [name for name in names if name not in image_of and name not in mask_of]:
            raise FileNotFoundError(f"{listed} names {_some(missing)}, of which there is no file; correct the list.")
        image_of, mask_of = ({name: files[name] for name in names if name in files} for files in (image_of, mask_of))
    for kind, other, files, partners in (("image", "mask", image_of, mask_of), ("mask", "image", mask_of, image_of)):
        lonely = sorted(path for key, path in files.items() if key not in partners)
        if not lonely:
            continue
        if not skip_unpaired and not (masks_decide and kind == "image"):
            unread = [n for n in _names(masks if kind == "image" else images) if Path(n).stem == lonely[0].stem]
            unread = [name for name in unread if not _is_image(name)]
            raise FileNotFoundError(
                f"The {kind} {lonely[0]}{f' (and {len(lonely) - 1} more)' if len(lonely) > 1 else ''} has no {other} "
                f"of that name{f' ({unread[0]} is of a kind that is not read; save it as PNG)' if unread else ''}; "
                "add it or remove it, or leave out all such files with skip_unpaired."
            )
        left_out.append(f"{len(lonely)} in {lonely[0].parent} without {other}: {_some([p.name for p in lonely])}")
    keys = sorted(image_of.keys() & mask_of.keys())
    return Pairs([(str(image_of[key]), str(mask_of[key])) for key in keys], left_out)


def _images_in(folder: Path, left_out: list[str]) -> list[Path]:
    """The image files in a folder and those below it; what else is there is told to `left_out`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder {folder} does not exist; put images and masks into folders of their own.")
    found, others = [], []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(filter(_visible, folders))
        for path in (Path(parent, name) for name in sorted(filter(_visible, names))):
            if _is_image(path):
                found.append(path)
            elif path.suffix.lower() not in OTHER_SUFFIXES:
                others.append(path.name)
    if not found:
        raise FileNotFoundError(
            f"The folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); put them there."
        )
    if others:
        left_out.append(f"{len(others)} in {folder} of a kind that is not read: {_some(others)}")
    return found


def _key(path: Path, folder: Path) -> str:
    """The path below a folder without suffix; accents in one form, as systems write the same name in two."""
    return unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())


def _mask_key(path: Path, folder: Path, images: Mapping[str, Path]) -> str:
    """The key of the image that a mask is of: its own, or what it is without an ending or a second suffix."""
    key = _key(path, folder)
    endings = [ending for ending in MASK_ENDINGS if key.endswith(ending)]
    shorter = [key.removesuffix(ending) for ending in endings]
    shorter += [key[: key.rfind(".")] for key in (key, *shorter) if _is_image(key)]
    return next((key for key in (key, *shorter) if key in images), key)


def _by_key(files: Iterable[tuple[Path, str]]) -> dict[str, Path]:
    by_key: dict[str, Path] = {}
    for path, key in files:
        if key in by_key:
            raise ValueError(f"{by_key[key]} and {path} differ only in their suffix; keep one of them.")
        by_key[key] = path
    return by_key


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *(["…"] if len(names) > 5 else [])]) or "nothing"


def pick_split(names: Iterable[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """
    `wanted`, or if that is `None` the first of the `usual` names that is in `names` (in any case), if any is.

    Raises:
        ValueError: if `wanted` is not in `names`.
    """
    names = list(names)
    if wanted is not None and wanted not in names:
        raise ValueError(f"There is no split {wanted!r}; the data set has {', '.join(map(str, names))}.")
    by_lower = {str(name).lower(): name for name in names}
    return wanted if wanted is not None else next((by_lower[name] for name in usual if name in by_lower), None)


def hold_out(rows: list[tuple[str, Any]], fraction: float) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Split off about `fraction` of the rows, at least one, by a hash of the name: stable as files are added."""
    share = [int(hashlib.sha256(Path(image).stem.encode()).hexdigest()[:8], 16) / 2**32 for image, _ in rows]
    chosen = [value < fraction for value in share]
    if fraction > 0 and len(rows) > 1 and len(set(chosen)) == 1:
        chosen = [False] * (len(rows) - 1) + [True]  # So few files that the hash chose none, or all.
    if all(chosen):
        chosen = [False] * len(rows)
    pairs = list(zip(rows, chosen, strict=True))
    return [row for row, out in pairs if not out], [row for row, out in pairs if out]
