"""Small data sets for the tests of reading them."""

import json

import datasets
import numpy as np
from PIL import Image

from denseclip_hf.data import SampleReader


NAMES = ["sky", "road", "car"]
PALETTE = [[0, 0, 255], [128, 64, 128], [255, 0, 0]]
SIZE = (8, 6)  # width, height
SIZES_OF_SAVED = [(80, 64), (64, 70), (80, 64), (64, 64), (90, 65)]  # what `save_data` writes


def make_mask(seed=0, highest=2, size=SIZE):
    mask = np.random.default_rng(seed).integers(0, highest + 1, size[::-1], dtype=np.uint8)
    mask[0, 0] = 255
    return mask


def make_pixels(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)


def write_pairs(folder, count, images="images", masks="masks", mask_of=make_mask, suffix=".jpg"):
    for name in (images, masks):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(make_pixels(index)).save(folder / images / f"{index:03}{suffix}")
        Image.fromarray(mask_of(index)).save(folder / masks / f"{index:03}.png")


def write_classes(folder, **changes):
    classes = {"id2label": dict(enumerate(NAMES)), "palette": PALETTE, "ignore_index": 255, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({k: v for k, v in classes.items() if v is not None}))


def write_folder(root):
    write_pairs(root / "train", 4)
    write_pairs(root / "val", 2)
    write_classes(root)
    return root


def reader(**options):
    return SampleReader(**{"num_labels": 3, "palette": PALETTE, **options})


def hub_like(count=4, image="image", label="annotation", **extra):
    rows = {image: [Image.fromarray(make_pixels(i)) for i in range(count)]}
    rows[label] = [Image.fromarray(make_mask(i)) for i in range(count)]
    features = {image: datasets.Image(), label: datasets.Image()}
    for name in extra:
        rows[name], features[name] = list(range(count)), datasets.Value("int64")
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


def truncated(path, file_format="JPEG"):
    Image.fromarray(make_pixels(size=(64, 64))).save(path, file_format)
    path.write_bytes(path.read_bytes()[:-500])


def save_data(folder, names=("class 0", "class 1", "class 2"), ids=(0, 1, 2), **extra):
    """A validation split whose masks hold `ids`, and some pixels without a class."""
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate(SIZES_OF_SAVED):
        for kind in ("images", "masks"):
            (folder / "val" / kind).mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / "val" / "images" / f"p{index}.png")
        mask = np.array(ids)[rng.integers(0, 3, (height // 8 + 1, width // 8 + 1))].repeat(8, 0).repeat(8, 1)
        mask = mask[:height, :width].astype(np.uint8)
        mask[:4] = 255
        Image.fromarray(mask).save(folder / "val" / "masks" / f"p{index}.png")
    classes = {"id2label": dict(enumerate(names)), **extra}
    (folder / "classes.json").write_text(json.dumps(classes))
    return str(folder)
