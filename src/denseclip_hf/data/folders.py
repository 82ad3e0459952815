"""Data sets in a folder: where their files are, which belong together, and what is left out."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .classes import ClassTable, ade20k_classes, cityscapes_classes, find_classes, parse_lines
from .coco import find_annotations, read_annotations


IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm",
    ".pbm", ".jp2", ".j2k",
}  # fmt: skip
# Files that often lie beside images without being one.
OTHER_SUFFIXES = {".txt", ".csv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".db", ".ini", ".npy"}
TRAIN_NAMES, VALIDATION_NAMES = ("train", "training"), ("val", "validation", "valid")
SPLIT_NAMES = (*TRAIN_NAMES, *VALIDATION_NAMES, "test", "testing")

# Where the images and the masks of a split are, tried in this order; upper and lower case do not matter. A mask
# has its image's name, perhaps with one of `MASK_ENDINGS`; where both are in one folder, it ends in one of
# `BESIDE_ENDINGS`.
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


Row = tuple[str, Any]  # an image's path, and a mask as [`SampleReader`] takes it


@dataclass
class FolderData:
    """
    What is in a folder, by "train" and "validation".

    Args:
        names: what the folder calls the splits.
        rows: the images and masks, in the order of their names.
        left_out: which files are not used, in words.
        classes: the classes, where the folder says or its layout knows them.
    """

    names: dict[str, str]
    rows: dict[str, list[Row]]
    left_out: dict[str, list[str]]
    classes: ClassTable | None


def read_folder(
    root: Path, train: str | None, validation: str | None, held_out: float, skip_unpaired: bool
) -> FolderData | None:
    """
    The files of a folder in the first of `LAYOUTS` that it has, or of COCO's annotations; None for any other folder.

    Args:
        root: the folder.
        train, validation: names of the splits; None for the usual names.
        held_out: share of the training rows that is held out where there is no validation split.
        skip_unpaired: leave out files without a partner.

    Raises:
        FileNotFoundError, ValueError: if there are images but no masks where one of the layouts has its masks, and for
            splits, partners and classes that are missing.
        ImportError: for COCO's annotations without pycocotools.
    """
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    lacking: tuple[Path, str] | None = None
    for images, masks in LAYOUTS:
        folders = _splits(root, images)
        if not folders or (images == masks and not any(map(_has_masks, folders.values()))):
            continue
        mask_folders = {name: _folder(root, masks.format(split=name)) for name in folders}
        if any(folder and _holds_images(folder) for folder in mask_folders.values()):
            break
        if images != "{split}":  # what any folder may be
            lacking = lacking or (next(iter(folders.values())), masks.format(split=next(iter(folders))))
    else:
        if annotations := find_annotations(root):
            names = split_names(annotations, train, validation)
            chosen = {kind: annotations[name] for kind, name in names.items()}
            drawn, classes = read_annotations(chosen, root, skip_unpaired)
            if "validation" not in drawn:
                drawn["train"], drawn["validation"] = _hold_out(drawn["train"], held_out)
            return FolderData(names, drawn, {}, find_classes([root]) or classes)
        if lacking is None:
            return None
        raise FileNotFoundError(
            f"{lacking[0]} holds images, but {root / lacking[1]} does not exist; put their masks there. {root} holds "
            f"{_some(_names(root))}."
        )
    lists = _lists(root) if images == "JPEGImages" else {}
    names = split_names(lists or folders, train, validation)
    rows: dict[str, list[Row]] = {}
    left_out: dict[str, list[str]] = {}
    for kind, name in names.items():
        key = name if name in folders else "train"
        found = mask_folders[key] or root / masks.format(split=name)
        skipped = {"image", "mask"} if skip_unpaired else {"image"} if images == "JPEGImages" and not lists else set()
        rows[kind], left_out[kind] = _pairs(folders[key], found, skipped, lists.get(name))
    if "validation" not in rows:
        rows["train"], rows["validation"] = _hold_out(rows["train"], held_out)
    inside = [part for folder in folders.values() for part in (folder, folder.parent) if root in part.parents]
    known = find_classes([root, *inside])
    if known is None and images == "leftImg8bit/{split}":
        known = cityscapes_classes()
    if known is None and masks == "annotations/{split}" and {"training", "validation"} & set(folders):
        known = ade20k_classes()
    return FolderData(names, rows, left_out, known)


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


def _holds_images(folder: Path) -> bool:
    """Whether there are images in a folder or below it, but for COCO's panoptic ones, which only its JSON explains."""
    found = ((path, name) for path, _, names in os.walk(folder) for name in names if _is_image(name))
    return any(not Path(path).name.startswith("panoptic_") for path, _ in found)


def _is_image(name: str | Path) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _lists(root: Path) -> dict[str, Path]:
    """The splits of Pascal VOC, one list of names each in ImageSets/Segmentation; none if none is for training."""
    folder = _folder(root, "ImageSets/Segmentation")
    lists = {Path(name).stem: folder / name for name in _names(folder) if name.endswith(".txt")} if folder else {}
    return lists if {name.lower() for name in lists} & set(TRAIN_NAMES) else {}


def _pairs(images: Path, masks: Path, skipped: set[str], listed: Path | None) -> tuple[list[Row], list[str]]:
    """
    The images and masks of two folders, and of those in them, that have the same name but for suffix and ending; and
    what is left out, in words.

    Args:
        images, masks: the folders; masks in the folder of the images have an ending.
        skipped: "image" to leave out images without a mask, "mask" for masks without an image.
        listed: a file with the names to take, one a line.

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
        if kind not in skipped:
            unread = [n for n in _names(masks if kind == "image" else images) if Path(n).stem == lonely[0].stem]
            unread = [name for name in unread if not _is_image(name)]
            raise FileNotFoundError(
                f"The {kind} {lonely[0]}{f' (and {len(lonely) - 1} more)' if len(lonely) > 1 else ''} has no {other} "
                f"of that name{f' ({unread[0]} is of a kind that is not read; save it as PNG)' if unread else ''}; "
                "add it or remove it, or leave out all such files with skip_unpaired."
            )
        left_out.append(f"{len(lonely)} in {lonely[0].parent} without {other}: {_some([p.name for p in lonely])}")
    keys = sorted(image_of.keys() & mask_of.keys())
    return [(str(image_of[key]), str(mask_of[key])) for key in keys], left_out


def _images_in(folder: Path, left_out: list[str]) -> list[Path]:
    """The image files in a folder and those below it; other files are added to `left_out`."""
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
            f"The folder {folder} is missing or holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); put them there."
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


def split_names(splits: Iterable[str], train: str | None, validation: str | None) -> dict[str, str]:
    """
    What the splits for training and validation are called, where there are such: as asked, or by the usual names.

    Raises:
        ValueError: if none is for either, or there is none of that name.
    """
    by_lower = {str(name).lower(): name for name in splits}
    picked = {}
    for kind, asked, usual in (("train", train, TRAIN_NAMES), ("validation", validation, VALIDATION_NAMES)):
        if asked is not None and asked not in by_lower.values():
            raise ValueError(f"There is no split {asked!r}; the data set has {', '.join(by_lower.values())}.")
        name = asked or next((by_lower[name] for name in usual if name in by_lower), None)
        if name is not None:
            picked[kind] = name
    if not picked:
        raise ValueError(f"Which split trains? Set train_split to one of {', '.join(by_lower.values())}.")
    return picked


def _hold_out(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Split off about `fraction` of the rows, at least one, by a hash of the name: stable as files are added."""
    share = [int(hashlib.sha256(Path(image).stem.encode()).hexdigest()[:8], 16) / 2**32 for image, _ in rows]
    chosen = [value < fraction for value in share]
    if fraction > 0 and len(rows) > 1 and len(set(chosen)) == 1:
        chosen = [False] * (len(rows) - 1) + [True]  # So few files that the hash chose none, or all.
    kept = [row for row, is_out in zip(rows, chosen, strict=True) if not is_out]
    held_out = [row for row, is_out in zip(rows, chosen, strict=True) if is_out]
    return (kept, held_out) if kept else (rows, [])
