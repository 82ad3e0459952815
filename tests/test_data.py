"""Data sets: every layout and file type that is read, and every refusal with its words."""

import json
import runpy
import shutil
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps, features

from denseclip_hf import data_layouts
from denseclip_hf.data import load_segmentation_dataset, read_sample
from denseclip_hf.data_check import check_dataset
from denseclip_hf.data_files import SampleReader, read_image
from denseclip_hf.transforms import AugmentedDataset, AugmentedStream, TrainTransform


NAMES = ["sky", "road", "car"]
PALETTE = [[0, 0, 255], [128, 64, 128], [255, 0, 0]]
SIZE = (8, 6)  # width, height
NEEDS_AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


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


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    write_pairs(root / "train", 4)
    write_pairs(root / "val", 2)
    write_classes(root)
    return root


def reader(**options):
    return SampleReader(**{"num_labels": 3, "palette": PALETTE, **options})


# Layouts on disk


def test_folder_with_splits(folder):
    data = load_segmentation_dataset(folder)
    assert data.id2label == dict(enumerate(NAMES)) and data.label2id["car"] == 2
    assert data.palette == [tuple(color) for color in PALETTE]
    assert (data.ignore_index, data.do_reduce_labels) == (255, False)
    assert (len(data.train), len(data.validation)) == (4, 2)
    sample = data.train[3]
    assert sample["image"].mode == "RGB" and sample["image"].size == SIZE
    assert np.array_equal(sample["mask"], make_mask(3))
    assert np.array_equal(data.train.select([2, 1])[0]["mask"], make_mask(2))


def test_folder_without_splits_holds_the_same_samples_out_every_time(tmp_path):
    write_pairs(tmp_path, 30)
    write_classes(tmp_path)
    first, second = (load_segmentation_dataset(tmp_path, validation_fraction=0.3) for _ in range(2))
    assert len(first.train) + len(first.validation) == 30 and 2 <= len(first.validation) <= 18
    paths = [[row["mask"]["path"] for row in data.validation.with_format(None)] for data in (first, second)]
    assert paths[0] == paths[1]
    assert load_segmentation_dataset(tmp_path, validation_fraction=0).validation is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_held_out_share_of_few_samples(tmp_path, count):
    write_pairs(tmp_path, count)
    data = load_segmentation_dataset(tmp_path, classes=NAMES)
    assert len(data.train) == max(1, count - 1)
    assert (data.validation is None) == (count == 1)


def test_files_added_later_do_not_move_others():
    pairs = [(Path(f"{i}.jpg"), Path(f"{i}.png")) for i in range(200)]
    few, many = (set(data_layouts.hold_out(chosen, 0.2)[1]) for chosen in (pairs[:100], pairs))
    assert few <= many and 20 < len(many) < 60


@pytest.mark.parametrize(
    "classes",
    [NAMES, dict(enumerate(NAMES)), {"2": "car", "0": "sky", "1": "road"}, {"id2label": NAMES}],
    ids=["list", "mapping", "text keys", "id2label"],
)
def test_classes_given_by_the_caller(tmp_path, classes):
    write_pairs(tmp_path / "training", 2)
    data = load_segmentation_dataset(tmp_path, classes=classes, ignore_index=255)
    assert list(data.id2label.items()) == list(enumerate(NAMES))
    assert len(set(data.palette)) == 3


def test_classes_given_as_a_file_replace_those_of_the_folder(folder, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps(["a", "b", "c"]))
    data = load_segmentation_dataset(folder, classes=tmp_path / "names.json")
    assert data.id2label[2] == "c" and data.palette[0] == (0, 0, 255)


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        masks = partial(make_mask, highest=150)
        write_pairs(root, 2, f"images/{split}", f"annotations/{split}", masks)
    for path in (tmp_path, root):
        data = load_segmentation_dataset(path)
        assert (len(data.train), len(data.validation)) == (2, 2)
        assert len(data.id2label) == 150 and data.id2label[0] == "wall" and data.id2label[7] == "bed"
        assert data.palette[0] == (120, 120, 120) and data.do_reduce_labels and data.ignore_index == 255


def test_cityscapes(tmp_path):
    stored = np.array([[7, 8, 0], [33, 29, 255]], dtype=np.uint8)
    for split in ("train", "val"):
        images, masks = tmp_path / "leftImg8bit" / split / "ulm", tmp_path / "gtFine" / split / "ulm"
        images.mkdir(parents=True), masks.mkdir(parents=True)
        Image.new("RGB", (3, 2)).save(images / "ulm_000_019_leftImg8bit.png")
        Image.fromarray(stored).save(masks / "ulm_000_019_gtFine_labelIds.png")
        Image.fromarray(stored).save(masks / "ulm_000_019_gtFine_instanceIds.png")
    for ignore_index in (255, 200, -100):
        data = load_segmentation_dataset(tmp_path, ignore_index=ignore_index)
        i = ignore_index
        assert data.train[0]["mask"].tolist() == [[0, 1, i], [18, i, i]]
    assert len(data.id2label) == 19 and data.id2label[18] == "bicycle" and not data.do_reduce_labels


# `datasets`


def hub_like(count=4, image="image", label="annotation", **extra):
    rows = {image: [Image.fromarray(make_pixels(i)) for i in range(count)]}
    rows[label] = [Image.fromarray(make_mask(i)) for i in range(count)]
    features = {image: datasets.Image(), label: datasets.Image()}
    for name in extra:
        rows[name], features[name] = list(range(count)), datasets.Value("int64")
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


@pytest.mark.parametrize(
    ("image", "label"), [("image", "label"), ("pixel_values", "annotation"), ("image", "whatever"), ("photo", "mask")]
)
def test_columns_are_detected(image, label):
    data = load_segmentation_dataset(hub_like(image=image, label=label, scene=1), classes=NAMES)
    assert data.train.column_names == ["image", "mask"]
    assert data.train[0]["image"].size == SIZE and data.train[0]["mask"].shape == SIZE[::-1]


def test_columns_given_by_the_caller():
    data = load_segmentation_dataset(
        hub_like(image="left", label="right"), classes=NAMES, image_column="left", label_column="right"
    )
    assert np.array_equal(data.train[0]["mask"], make_mask(0)) or len(data.validation) == 1


def test_a_class_number_per_picture_is_not_a_mask():
    rows = hub_like(label="annotation").add_column("label", [0, 1, 2, 0])
    assert load_segmentation_dataset(rows, classes=NAMES).train[0]["mask"].shape == SIZE[::-1]


def test_splits_in_a_mapping_and_on_disk(tmp_path):
    splits = datasets.DatasetDict({"train": hub_like(3), "validation": hub_like(2), "test": hub_like(1)})
    splits.save_to_disk(tmp_path / "saved")
    splits["train"].to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    for source, sizes in ((splits, (3, 2)), (tmp_path / "saved", (3, 2)), (tmp_path / "hub", (2, 1))):
        data = load_segmentation_dataset(source, classes=NAMES)
        assert (len(data.train), len(data.validation)) == sizes


def test_class_names_from_features():
    feature = datasets.Sequence(datasets.Sequence(datasets.ClassLabel(names=NAMES)))
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    masks = [make_mask(i).clip(max=2).tolist() for i in range(3)]
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(make_pixels(i)) for i in range(3)], "label": masks}, features
    )
    data = load_segmentation_dataset(rows, validation_fraction=0)
    assert data.id2label == dict(enumerate(NAMES))
    assert data.train[1]["mask"].tolist() == masks[1]


def test_streams(tmp_path):
    hub_like(4).to_parquet(tmp_path / "train.parquet")
    data = load_segmentation_dataset(tmp_path, classes=NAMES, streaming=True)
    samples = list(data.train)
    assert len(samples) == 4 and data.validation is None
    assert np.array_equal(samples[2]["mask"], make_mask(2))
    augmented = list(AugmentedStream(data.train, TrainTransform(crop_size=8)))
    assert augmented[3]["pixel_values"].shape == (3, 8, 8)
    assert check_dataset(data, full=True).splits["train"].num_checked == 4


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (partial(hub_like, image="a", label="b"), {}, "Which columns .* a, b; set image_column"),
        (hub_like, {"image_column": "picture"}, "no column 'picture'"),
        (hub_like, {"classes": None}, "class names are unknown"),
        (hub_like, {"train_split": "trian"}, "no split 'trian'; the data set has train"),
        (hub_like, {"validation_fraction": 1.5}, "validation_fraction is 1.5"),
        (lambda: {"test": hub_like()}, {}, "Which split trains.* test"),
        (lambda: {"train": hub_like().select([])}, {}, "A split has no samples; remove it or fill it"),
    ],
)
def test_refusals_about_datasets(rows, options, words):
    with pytest.raises(ValueError, match=words):
        load_segmentation_dataset(rows(), **{"classes": NAMES, **options})


# File types


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", ".png"), ("P", ".png"), ("RGBA", ".png"), ("LA", ".png"), ("1", ".png"), ("CMYK", ".jpg"), ("L", ".jpg")],
)
def test_other_pictures_become_rgb(tmp_path, mode, suffix):
    original = Image.fromarray(make_pixels())
    path = tmp_path / f"picture{suffix}"
    original.convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == SIZE
    if suffix == ".png":
        assert np.array_equal(image, original.convert(mode).convert("RGB"))


def test_alpha_is_dropped(tmp_path):
    pixels = np.dstack([make_pixels(), np.zeros(SIZE[::-1], dtype=np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    assert np.array_equal(read_image(tmp_path / "clear.png"), pixels[..., :3])


@pytest.mark.parametrize(
    ("values", "suffix"),
    [(np.array([[0, 257, 65535]], np.uint16), ".png"), (np.array([[0, 1 / 255, 1]], np.float32), ".tif")],
)
def test_more_than_8_bits_are_scaled(tmp_path, values, suffix):
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(values).save(path)
    assert np.asarray(read_image(path))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


FORMATS = ["JPEG", "MPO", "WEBP", "PNG", "TIFF", pytest.param("AVIF", marks=NEEDS_AVIF)]


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_as_pillow_turns_them(tmp_path, file_format, orientation, decode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(make_pixels()).save(tmp_path / "lying", file_format, exif=exif)
    with Image.open(tmp_path / "lying") as lying:
        expected = np.asarray(ImageOps.exif_transpose(lying).convert("RGB"))
    assert expected.shape == (*(SIZE if orientation > 4 else SIZE[::-1]), 3)
    image = read_image(tmp_path / "lying", decode)
    assert np.array_equal(read_image(image), expected)  # what is upright stays so


def test_plain_files_can_be_left_undecoded(folder):
    data = load_segmentation_dataset(folder, decode=False)
    assert data.train[0]["image"].tile  # what Pillow still has to decode
    transform = TrainTransform(crop_size=4, scale=(8, 4), fast_jpeg=True)
    assert AugmentedDataset(data.train, transform)[0]["labels"].shape == (4, 4)


IDS = np.array([[0, 1], [2, 255]], dtype=np.uint8)


def palette_picture():
    picture = Image.fromarray(IDS).convert("P")
    picture.putdata(IDS.ravel().tolist())
    picture.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
    return picture


@pytest.mark.parametrize(
    ("picture", "suffix"),
    [
        (Image.fromarray(IDS), ".png"),
        (palette_picture(), ".png"),
        (Image.fromarray(IDS.astype(np.uint16)), ".png"),
        (Image.fromarray(IDS.astype(np.int32)), ".tif"),
    ],
    ids=["L", "P", "I;16", "I"],
)
def test_masks_of_ids(tmp_path, picture, suffix):
    path = tmp_path / f"mask{suffix}"
    picture.save(path)
    assert reader().read_mask(path).tolist() == IDS.tolist()
    assert reader().read_mask({"path": None, "bytes": path.read_bytes()}).tolist() == IDS.tolist()


@pytest.mark.parametrize("reduce", [False, True])
def test_masks_in_the_colours_of_the_palette(tmp_path, reduce):
    colors = np.array([[PALETTE[2], PALETTE[0], [1, 2, 3]]], dtype=np.uint8)
    Image.fromarray(colors).save(tmp_path / "mask.png")
    rules = reader(ignore_colors=[[1, 2, 3]], do_reduce_labels=reduce)
    mask = rules.read_mask(tmp_path / "mask.png")
    assert mask.tolist() == ([[3, 1, 0]] if reduce else [[2, 0, 255]])
    assert rules.class_ids(mask).tolist() == [[2, 0, 255]]


def test_reduced_labels_may_be_one_higher():
    rules = reader(do_reduce_labels=True)
    assert rules.class_ids(rules.read_mask(np.array([[0, 1, 3, 255]]))).tolist() == [[255, 0, 2, 255]]
    with pytest.raises(ValueError, match=r"ids 4, .* 0…3 and 255"):
        rules.read_mask(np.array([[4]]))


# Refusals of files


def truncated(path, file_format="JPEG"):
    Image.fromarray(make_pixels(size=(64, 64))).save(path, file_format)
    path.write_bytes(path.read_bytes()[:-500])


def save_mask(array, path):
    Image.fromarray(np.asarray(array)).save(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: save_mask(np.full((6, 8), 7, np.uint8), p), r"mask.png holds the ids 7, .* 0…2 and 255"),
        (lambda p: save_mask(np.full((6, 8, 3), 9, np.uint8), p), r"mask.png holds the colour \(9, 9, 9\)"),
        (lambda p: save_mask(np.zeros((8, 6), np.uint8), p), r"image.png is 8x6 pixels but .*mask.png is 6x8"),
        (lambda p: Image.new("LA", SIZE).save(p), "mask.png has mode LA"),
        (lambda p: truncated(p, "PNG"), "mask.png cannot be read as a picture"),
        (lambda p: p.write_bytes(b"no picture"), "mask.png cannot be read as a picture"),
        (lambda p: Image.new("L", SIZE).save(p, "JPEG"), "mask.png is a JPEG"),
        (lambda p: None, "mask.png is missing"),
    ],
    ids=["ids", "colour", "size", "mode", "truncated", "no picture", "jpeg", "missing"],
)
def test_masks_that_are_refused(tmp_path, make, words):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", SIZE).save(image)
    make(mask)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        reader().read(image, mask)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, "image.tif cannot be read .* truncated"),
        (lambda p: save_mask(np.array([[0, np.nan]], np.float32), p), "image.tif holds values that are not numbers"),
        (lambda p: save_mask(np.array([[0, 300]], np.float32), p), "image.tif has values from 0.0 to 300.0"),
        (lambda p: save_mask(np.array([[-1, 300]], np.int32), p), "image.tif has values from -1 to 300"),
        (lambda p: p.write_bytes(b""), "image.tif cannot be read"),
        (lambda p: None, "image.tif is missing; restore"),
    ],
    ids=["truncated", "nan", "float range", "negative", "empty", "missing"],
)
def test_pictures_that_are_refused(tmp_path, make, words):
    make(tmp_path / "image.tif")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_image(tmp_path / "image.tif")


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="bomb.png has more pixels than are decoded"):
        read_image(tmp_path / "bomb.png")


def test_a_colour_mask_needs_a_palette_of_different_colours():
    mask = Image.fromarray(np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="no palette is given"):
        reader(palette=None).read_mask(mask)
    with pytest.raises(ValueError, match="two classes share one"):
        reader(palette=[[0, 0, 0], [0, 0, 0], [1, 1, 1]]).read_mask(mask)


@pytest.mark.parametrize("array", [np.zeros((2, 2)), np.zeros((2, 2, 1), int)], ids=["float", "3-d"])
def test_arrays_that_are_no_mask(array):
    with pytest.raises(ValueError, match=r"give \(h, w\) integer ids"):
        reader().read_mask(array)


# Refusals of folders


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "train/masks/002.png").unlink(), r"picture .*002.jpg has no mask"),
        (lambda f: (f / "train/images/002.jpg").unlink(), r"mask .*002.png has no picture"),
        (lambda f: [p.unlink() for p in (f / "train/images").iterdir()], r"train.images holds no pictures"),
        (lambda f: (f / "train/masks").rename(f / "train/annotation"), r"train.masks does not exist"),
        (lambda f: (f / "train/images/000.png").write_bytes(b""), "differ only in their suffix"),
        (lambda f: (f / "classes.json").unlink(), "class names of .* are unknown; give `classes`"),
        (lambda f: (f / "classes.json").write_text("{"), "classes.json is not a JSON file"),
        (lambda f: write_classes(f, id2label={"0": "sky", "2": "car"}), r"ids \[1\] are missing"),
        (lambda f: write_classes(f, id2label=["a", "b", "a"]), "'a' stands there twice"),
        (lambda f: write_classes(f, id2label=["a", "", "b"]), "one is empty"),
        (lambda f: write_classes(f, id2label=["a", "\ud800", "b"]), "holds half a character"),
        (lambda f: write_classes(f, id2label=7), "must name the classes"),
        (lambda f: write_classes(f, id2label={"x": "a"}), r"\['x'\] are no ids"),
        (lambda f: write_classes(f, palette=PALETTE[:2]), "3 classes but 2 palette colours"),
        (lambda f: write_classes(f, palette=[[0, 0, 256]] * 3), "three whole numbers 0…255"),
        (lambda f: write_classes(f, ignore_index="255"), "whole number as ignore_index"),
        (lambda f: write_classes(f, id2label=["a", "b"], palette=None), r"holds the ids 2, .* with 2 classes"),
    ],
)
def test_folders_that_are_refused(folder, break_it, words):
    break_it(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_segmentation_dataset(folder)


def test_refusals_are_one_sentence_per_file(folder):
    (folder / "train/images/001.jpg").unlink()
    (folder / "train/images/002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"001.png \(and 1 more\)"):
        load_segmentation_dataset(folder)


@pytest.mark.parametrize(("name", "words"), [("empty", "no data set that is recognised"), ("absent", "is no folder")])
def test_no_data_set_there(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=words):
        load_segmentation_dataset(tmp_path / name)


def test_a_folder_whose_splits_have_other_names(folder):
    (folder / "val").rename(folder / "held_out")
    (folder / "train").rename(folder / "first")
    with pytest.raises(ValueError, match="Which split trains. Set train_split to one of first, held_out"):
        load_segmentation_dataset(folder)


def test_a_name_that_is_no_data_set(monkeypatch):
    def absent(*args, **kwargs):
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(FileNotFoundError, match="nobody/nothing can be read neither .* nor .*no route .* check the"):
        load_segmentation_dataset("nobody/nothing")


def test_a_file_of_class_names_that_is_missing(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="names.json, which should hold the class names, does not exist"):
        load_segmentation_dataset(folder, classes=tmp_path / "names.json")


def test_missing_cityscapes_masks(tmp_path):
    (tmp_path / "leftImg8bit/train/ulm").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="unpack Cityscapes"):
        load_segmentation_dataset(tmp_path)
    Image.new("RGB", (3, 2)).save(tmp_path / "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png")
    with pytest.raises(FileNotFoundError, match="ulm_0_leftImg8bit.png has no mask"):
        load_segmentation_dataset(tmp_path)


def test_paths_in_classes_json_are_not_followed(folder, tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps(["x", "y", "z"]))
    write_classes(folder, id2label=str(tmp_path / "secret.json"))
    with pytest.raises(ValueError, match="must name the classes"):
        load_segmentation_dataset(folder)


# The check


def test_report_counts_by_hand(folder):
    mask = np.array([[0, 0, 0, 1], [255, 255, 1, 1]], dtype=np.uint8)
    for index in range(4):
        Image.new("RGB", (4, 2)).save(folder / f"train/images/{index:03}.jpg")
        Image.fromarray(mask).save(folder / f"train/masks/{index:03}.png")
    report = check_dataset(load_segmentation_dataset(folder), full=True)
    train = report.splits["train"]
    assert train.pixels_per_class.tolist() == [12, 12, 0] and train.images_per_class.tolist() == [4, 4, 0]
    assert train.void_share == 0.25 and train.sizes == [(4, 2)] * 4
    assert report.ok and report.unseen_classes == []  # the validation masks show the third class
    assert "all 4x2 pixels" in str(report) and "No problems." in str(report)


def test_report_names_every_problem(folder):
    truncated(folder / "train/images/000.jpg")
    Image.fromarray(np.full(SIZE[::-1], 9, np.uint8)).save(folder / "val/masks/001.png")
    data = load_segmentation_dataset(folder, read_first=False)
    report = check_dataset(data, full=True)
    assert not report.ok and len(report.problems) == 2
    assert "000.jpg cannot be read" in report.problems[0] and "holds the ids 9" in report.problems[1]
    assert report.splits["train"].num_checked == 4 and len(report.splits["train"].sizes) == 3
    assert "Problems: 2" in str(report)


def test_report_of_a_stream_and_of_a_split_without_sound_samples(folder, tmp_path):
    for mask in (folder / "val" / "masks").iterdir():
        mask.write_bytes(b"")
    data = load_segmentation_dataset(folder, read_first=False)
    report = check_dataset(data, full=True)
    assert "none of them sound" in str(report) and not report.ok
    rows = hub_like(4).to_iterable_dataset()
    stream = load_segmentation_dataset({"train": rows}, classes=NAMES[:2], read_first=False)  # masks hold 0…2
    (problem,) = check_dataset(stream).problems
    assert problem.startswith("train: sample 0: ") and "holds the ids 2" in problem


def test_quick_check_looks_at_the_same_few_samples(folder):
    data = load_segmentation_dataset(folder)
    first, second = (check_dataset(data, max_samples=2) for _ in range(2))
    assert first.splits["train"].num_checked == 2
    assert str(first) == str(second)


def test_a_sample_from_elsewhere_is_read_like_those_of_the_data_set(folder, tmp_path):
    data = load_segmentation_dataset(folder)
    write_pairs(tmp_path, 1)
    sample = read_sample(data, tmp_path / "images/000.jpg", tmp_path / "masks/000.png")
    assert np.array_equal(sample["mask"], make_mask(0))


def test_default_palette_has_a_colour_for_each_class():
    palette = data_layouts.default_palette(150)
    assert len(set(palette)) == 150 and palette == data_layouts.default_palette(150)


def test_script_prints_a_table_and_tells_by_its_exit_code(folder, monkeypatch, capsys):
    script = str(Path(__file__).parents[1] / "scripts" / "check_data.py")
    for expected, words in ((0, "No problems."), (1, "000.jpg cannot be read"), (1, "no data set that is recognised")):
        if expected:
            truncated(folder / "train/images/000.jpg")
        source = folder / "train" / "masks" if "recognised" in words else folder
        monkeypatch.setattr("sys.argv", [script, str(source), "--full"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(script, run_name="__main__")
        printed = capsys.readouterr()
        assert stop.value.code == expected and words in printed.out + printed.err


def test_pictures_inside_an_archive(folder, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "masks"), "zip", folder / "train" / "masks")
    mask = reader().read_mask({"path": f"zip://001.png::{archive}", "bytes": None})
    assert np.array_equal(mask, make_mask(1))
