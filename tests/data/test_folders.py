"""The layouts of folders that are read, and what is said about files that are not."""

import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from denseclip_hf.data import check_dataset, load_segmentation_dataset
from helpers.sample_data import NAMES, make_mask, make_pixels, write_classes, write_folder


LAYOUTS = [
    ("images/{}/x.jpg", "annotations/{}/x.png"),
    ("images/{}/x.jpg", "masks/{}/x.png"),
    ("images/{}/x.jpg", "labels/{}/x.png"),
    ("img_dir/{}/x.jpg", "ann_dir/{}/x.png"),
    ("{}/images/x.jpg", "{}/masks/x.png"),
    ("{}/images/x.jpg", "{}/labels/x.png"),
    ("{}/images/x.jpg", "{}/annotations/x.png"),
    ("{}/image/x.jpg", "{}/label/x.png"),
    ("{}/image/x.jpg", "{}/mask/x.png"),
    ("{}/x.jpg", "{}_labels/x_L.png"),
    ("{}/x.jpg", "{}_masks/x.png"),
    ("{}/x.png", "{}annot/x.png"),
    ("{}/x.jpg", "{}/x_mask.png"),
    ("{}/images/ulm/x.jpg", "{}/masks/ulm/x.png"),
    ("{}/images/x.jpg", "{}/masks/x.jpg.png"),
    ("{}/images/x.jfif", "{}/masks/x_mask.png"),
    ("{}/IMAGES/x.JPG", "{}/Masks/x.PNG"),
]


def put(root, image, mask, *numbers):
    for number in numbers:
        for file, pixels in ((image, make_pixels(number)), (mask, make_mask(number))):
            path = root / file.replace("x", f"no {number}", 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, {".jfif": "JPEG"}.get(path.suffix))


@pytest.mark.parametrize(
    ("image", "mask", "splits"),
    [*[(*layout, ("train", "val")) for layout in LAYOUTS], (*LAYOUTS[0], ("Training", "valid"))],
)
def test_layouts_with_splits(tmp_path, image, mask, splits):
    put(tmp_path, image.format(splits[0]), mask.format(splits[0]), 0, 1, 2)
    put(tmp_path, image.format(splits[1]), mask.format(splits[1]), 3)
    write_classes(tmp_path)
    data = load_segmentation_dataset(tmp_path)
    assert (len(data.train), len(data.validation)) == (3, 1)
    assert data.split_names == {"train": splits[0], "validation": splits[1]}
    assert np.array_equal(data.train[1]["mask"], make_mask(1))
    assert np.array_equal(data.validation[0]["mask"], make_mask(3))


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/x.jpg", "masks/x.png"),
        ("images/x.jpg", "labels/x.png"),
        ("images/x.jpg", "annotations/x.png"),
        ("JPEGImages/x.jpg", "SegmentationClass/x.png"),
        ("JPEGImages/x.jpg", "SegmentationClassPNG/x.png"),
        ("x.jpg", "x_mask.png"),
    ],
)
def test_layouts_without_splits_hold_some_out(tmp_path, image, mask):
    put(tmp_path, image, mask, *range(5))
    data = load_segmentation_dataset(tmp_path, classes=NAMES, validation_fraction=0.3)
    assert len(data.train) + len(data.validation) == 5 and len(data.validation) > 0
    assert data.split_names == {"train": "train"}


def test_pascal_voc_with_its_lists_and_without(tmp_path, caplog):
    put(tmp_path, "JPEGImages/x.jpg", "SegmentationClass/x.png", *range(5))
    Image.fromarray(make_pixels()).save(tmp_path / "JPEGImages/unlabeled.jpg")
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("no 0\nno 3\n")
    (lists / "val.txt").write_text("no 1\n")
    data = load_segmentation_dataset(tmp_path, classes=NAMES)
    assert (len(data.train), len(data.validation)) == (2, 1)
    assert np.array_equal(data.train[1]["mask"], make_mask(3))
    (lists / "train.txt").write_text("no 0\nno 9\n")
    with pytest.raises(FileNotFoundError, match="no 9"):
        load_segmentation_dataset(tmp_path, classes=NAMES)
    shutil.rmtree(tmp_path / "ImageSets")  # without lists: what has a mask, and the rest is named
    data = load_segmentation_dataset(tmp_path, classes=NAMES, validation_fraction=0)
    assert len(data.train) == 5 and "unlabeled.jpg" in caplog.text


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("_classes.csv", "Pixel Value, Class\n0, sky\n1, road\n2, car\n"),
        ("train/_classes.csv", "Pixel Value, Class\n0, sky\n1, road\n2, car\n"),
        ("class_names.txt", "__ignore__\nsky\nroad\ncar\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nsky:0,0,255::\nroad:128,64,128::\ncar:255,0,0::\n"),
    ],
)
def test_classes_in_the_files_of_annotation_tools(tmp_path, file, text):
    put(tmp_path, "train/x.jpg", "train/x_mask.png", 0, 1)
    (tmp_path / file).write_text(text)
    data = load_segmentation_dataset(tmp_path)
    assert data.id2label == dict(enumerate(NAMES))
    assert file != "labelmap.txt" or data.palette[1] == (128, 64, 128)


def test_accents_pair_however_they_are_written(tmp_path):
    image, mask = (unicodedata.normalize(form, "Grün é") for form in ("NFC", "NFD"))
    put(tmp_path, f"images/{image}.jpg", f"masks/{mask}.png", 0)
    assert len(load_segmentation_dataset(tmp_path, classes=NAMES).train) == 1


# What does not fit


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


@pytest.mark.parametrize("lonely", ["train/images/003.jpg", "train/masks/003.png"])
def test_files_without_a_partner_are_left_out_only_on_demand(folder, lonely, caplog):
    (folder / lonely).unlink()
    with pytest.raises(FileNotFoundError, match="skip_unpaired"):
        load_segmentation_dataset(folder)
    data = load_segmentation_dataset(folder, skip_unpaired=True)
    assert len(data.train) == 3 and "003" in caplog.text and "003" in str(check_dataset(data))


def test_files_of_other_kinds_are_named(folder):
    (folder / "train/images/photo.heic").write_bytes(b"x")
    for noise in ("Thumbs.db", ".DS_Store", "._000.jpg"):
        (folder / "train/images" / noise).write_bytes(b"x")
    data = load_segmentation_dataset(folder)
    (said,) = data.left_out["train"]
    assert said.startswith("1 in") and "photo.heic" in said and said in str(check_dataset(data))
    (folder / "train/images/000.jpg").rename(folder / "train/images/000.HEIC")
    with pytest.raises(FileNotFoundError, match="000.HEIC"):
        load_segmentation_dataset(folder)


def test_what_is_there_is_named_when_nothing_fits(tmp_path):
    (tmp_path / "bilder").mkdir()
    with pytest.raises(FileNotFoundError, match="bilder"):
        load_segmentation_dataset(tmp_path)
    put(tmp_path, "images/x.jpg", "polygons/x.png", 0)
    with pytest.raises(FileNotFoundError, match="polygons"):
        load_segmentation_dataset(tmp_path)


def test_images_in_folders_that_are_no_splits_are_read(tmp_path):
    put(tmp_path, "images/ulm/x.jpg", "masks/ulm/x.png", 0, 1)
    put(tmp_path, "images/bonn/x.jpg", "masks/bonn/x.png", 0)
    put(tmp_path, "images/x.jpg", "masks/x.png", 5)
    assert len(load_segmentation_dataset(tmp_path, classes=NAMES, validation_fraction=0).train) == 4


# Masks that cannot teach anything


def all_masks(folder, values):
    for mask in folder.glob("*/masks/*.png"):
        Image.fromarray(np.resize(np.array(values, np.uint8), (6, 8))).save(mask)


def test_white_that_means_no_class_is_refused_with_two_classes(folder):
    write_classes(folder, id2label=["ground", "crack"], palette=None)
    all_masks(folder, [0, 255])
    with pytest.raises(ValueError, match="255"):
        load_segmentation_dataset(folder)
    report = check_dataset(load_segmentation_dataset(folder, read_first=False), max_samples=1)
    assert "255" in report.problems[0]
    # One mask that shows the second class shows that 255 is void in the others.
    Image.fromarray(np.resize(np.array([0, 1, 255], np.uint8), (6, 8))).save(folder / "train/masks/003.png")
    data = load_segmentation_dataset(folder)
    assert check_dataset(data, max_samples=1).ok and set(np.unique(data.train[0]["mask"])) == {0, 255}


def test_masks_without_any_class_and_one_class_alone_are_refused(folder):
    all_masks(folder, [255])
    with pytest.raises(ValueError, match="every mask"):
        load_segmentation_dataset(folder)
    assert "every mask" in check_dataset(load_segmentation_dataset(folder, read_first=False)).problems[0]
    write_classes(folder, id2label=["crack"], palette=None)
    with pytest.raises(ValueError, match="background"):
        load_segmentation_dataset(folder)


def test_id_map_of_classes_json(folder):
    write_classes(folder, id_map={"0": 1, "1": "car", "2": None})
    expected = np.array([1, 2, 255] + [255] * 253)[make_mask(0)]
    assert np.array_equal(load_segmentation_dataset(folder).train[0]["mask"], expected)
