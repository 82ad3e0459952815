"""COCO's annotations, polygons of instances or panoptic PNGs, as rows whose masks are drawn when they are read."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..devices import needed
from .classes import ClassTable, parse_classes


MARK = b"COCO "  # what the content of a mask begins with that has yet to be drawn
BACKGROUND = "background"
PATTERNS = (
    "annotations/panoptic_*.json",
    "annotations/instances_*.json",
    "annotations/*.json",
    "*/_annotations.coco.json",  # Roboflow
    "_annotations.coco.json",
    "annotations.json",
    "instances*.json",
    "result.json",  # Label Studio
)


def find_annotations(root: Path) -> dict[str, Path]:
    """The annotation file of each split, panoptic ones first; "train" where the only one names no split."""
    found: dict[str, Path] = {}
    for pattern in PATTERNS:
        for file in sorted(path for path in root.glob(pattern) if path.is_file()):
            name = file.parent.name if file.name == "_annotations.coco.json" else file.stem.split("_", 1)[-1]
            split = re.sub(r"20\d\d$", "", name)
            if _is_coco(file):
                found.setdefault(split, file)
        if found:
            break
    is_only = len(found) == 1 and not {"train", "val", "valid", "validation", "test"} & set(found)
    return {"train": next(iter(found.values()))} if is_only else found


def _is_coco(file: Path) -> bool:
    with open(file, "rb") as opened:
        start = opened.read(1 << 16)
    return any(f'"{key}"'.encode() in start for key in ("images", "annotations", "categories"))


def read_annotations(files: Mapping[str, Path], root: Path, skip_unpaired: bool) -> tuple[dict[str, list], ClassTable]:
    """
    Rows of an image's path and a mask yet to be drawn, by split; and the classes, which all splits share.

    With polygons, pixels that none covers are of a class "background"; with panoptic PNGs they have no class.

    Raises:
        ImportError, FileNotFoundError, ValueError: without pycocotools, for missing images, and for files that are no
            COCO annotations.
    """
    needed("pycocotools", "reading COCO annotations", "pycocotools")
    contents: dict[str, Any] = {}
    names: list[str] = []
    for split, file in files.items():
        try:
            contents[split] = content = json.loads(file.read_bytes())
            if not names:
                is_panoptic = any("segments_info" in annotation for annotation in content["annotations"][:1])
                names = _names(content, [] if is_panoptic else [BACKGROUND])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} does not hold COCO annotations ({error}); export it again.") from error
    classes = parse_classes(names, str(next(iter(files.values()))))
    rows = {split: _rows(contents[split], names, file, root, skip_unpaired) for split, file in files.items()}
    return rows, classes


def _names(content: dict[str, Any], first: list[str]) -> list[str]:
    """Class names in the order of their ids, without the group that Roboflow adds as a category of its own."""
    used = {segment["category_id"] for a in content["annotations"] for segment in a.get("segments_info", [a])}
    groups = {category.get("supercategory") for category in content["categories"]}
    kept = [c for c in content["categories"] if c["id"] in used or c["name"] not in groups]
    names = [category["name"] for category in sorted(kept, key=lambda category: category["id"])]
    return first + [name for name in names if name not in first]


def _rows(content: dict[str, Any], names: list[str], file: Path, root: Path, skip_unpaired: bool) -> list[tuple]:
    class_of = {c["id"]: names.index(c["name"]) for c in content["categories"] if c["name"] in names}
    objects: dict[Any, list] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    folders = [file.parent, root / "images" / file.stem.split("_")[-1], root / file.stem.split("_")[-1]]
    folders += [root / "images" / "default", root / "images", root]
    rows = []
    for image in content["images"]:
        name = image["file_name"]
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            if skip_unpaired:
                continue
            raise FileNotFoundError(
                f"{file} names the image {name}, which is in none of {', '.join(map(str, folders))}; add it, or leave "
                "out all such files with skip_unpaired."
            )
        mask: dict[str, Any] = {"size": [image["height"], image["width"]], "objects": []}
        for annotation in sorted(objects[image["id"]], key=lambda one: -one.get("area", 0)):  # the small on top
            if "segments_info" in annotation:
                mask["file"] = str(file.with_suffix("") / annotation["file_name"])
                segments = annotation["segments_info"]
                mask["objects"] = [[class_of[segment["category_id"]], segment["id"]] for segment in segments]
            elif annotation.get("segmentation"):
                mask["objects"].append([class_of[annotation["category_id"]], annotation["segmentation"]])
        rows.append((str(path), {"path": f"{file}#{name}", "bytes": MARK + json.dumps(mask).encode()}))
    return sorted(rows, key=lambda row: row[0])


def draw(mask: Mapping[str, Any], segments: np.ndarray | None, void: int) -> np.ndarray:
    """
    The class ids of a mask that [`read_annotations`] made.

    Args:
        mask: its content after `MARK`, as JSON.
        segments: the pixels of its panoptic PNG, an (h, w, 3) array, if it has one.
        void: the id of pixels in no segment of it.

    Returns:
        An (h, w) array of integers.
    """
    height, width = mask["size"]
    if segments is not None:
        numbers = segments.astype(np.int64) @ np.array([1, 256, 256**2])
        ids = np.full(numbers.shape, void)
        for class_id, number in mask["objects"]:
            ids[numbers == number] = class_id
        return ids
    from pycocotools import mask as coco

    ids = np.zeros((height, width), dtype=np.int64)
    for class_id, shape in mask["objects"]:
        is_compressed = isinstance(shape, dict) and isinstance(shape["counts"], str)
        parts = shape if is_compressed else coco.frPyObjects(shape, height, width)
        ids[coco.decode(coco.merge(parts) if isinstance(parts, list) else parts) > 0] = class_id
    return ids
