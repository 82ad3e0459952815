"""Data sets: every layout that is read, and what is refused."""

import shutil
from functools import partial

import datasets
import numpy as np
import pytest
from PIL import Image

from denseclip_hf.data import check_dataset, default_palette, load_segmentation_dataset
from denseclip_hf.transforms import AugmentedStream, TrainTransform
from helpers.sample_data import (
    NAMES,
    PALETTE,
    SIZE,
    hub_like,
    make_mask,
    make_pixels,
    write_classes,
    write_folder,
    write_pairs,
)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


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


def test_held_out_samples_of_few_and_of_more_later(tmp_path):
    for count in (1, 2, 3):
        write_pairs(tmp_path, count)
        data = load_segmentation_dataset(tmp_path, classes=NAMES)
        assert len(data.train) == max(1, count - 1)
        assert (data.validation is None) == (count == 1)
    held_out = []
    for count in (40, 80):  # files that were there keep their place
        write_pairs(tmp_path, count)
        data = load_segmentation_dataset(tmp_path, classes=NAMES, validation_fraction=0.2, read_first=False)
        held_out.append({row["mask"]["path"] for row in data.validation.with_format(None)})
    assert held_out[0] < held_out[1] and 8 < len(held_out[1]) < 26


@pytest.mark.parametrize("classes", [NAMES, {"2": "car", "0": "sky", "1": "road"}, {"id2label": NAMES}])
def test_classes_given_by_the_caller(tmp_path, classes):
    write_pairs(tmp_path / "training", 2)
    data = load_segmentation_dataset(tmp_path, classes=classes, ignore_index=255)
    assert list(data.id2label.items()) == list(enumerate(NAMES))
    assert len(set(data.palette)) == 3
    write_classes(tmp_path, id2label=["a", "b", "c"])  # what is given counts, with the folder's colors
    data = load_segmentation_dataset(tmp_path, classes=classes)
    assert data.id2label[2] == "car" and data.palette[0] == (0, 0, 255)


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
    with pytest.raises(ValueError, match="19"):
        load_segmentation_dataset(tmp_path, classes="road,sidewalk")


# `datasets`


@pytest.mark.parametrize(
    ("image", "label"), [("image", "label"), ("pixel_values", "annotation"), ("image", "whatever"), ("photo", "mask")]
)
def test_columns_are_detected(image, label):
    data = load_segmentation_dataset(hub_like(image=image, label=label, scene=1), classes=NAMES)
    assert data.train.column_names == ["image", "mask"]
    assert data.train[0]["image"].size == SIZE and data.train[0]["mask"].shape == SIZE[::-1]


def test_columns_given_by_the_caller_or_beside_a_class_number():
    rows = hub_like(image="label", label="image")  # named the wrong way round
    columns = {"image_column": "label", "label_column": "image"}
    data = load_segmentation_dataset({"train": rows, "validation": rows}, classes=NAMES, **columns)
    assert np.array_equal(data.train[1]["mask"], make_mask(1))
    assert np.array_equal(data.train[1]["image"], make_pixels(1))
    rows = hub_like(label="annotation").add_column("label", [0, 1, 2, 0])
    assert load_segmentation_dataset(rows, classes=NAMES).train[0]["mask"].shape == SIZE[::-1]


def test_splits_in_a_mapping_and_on_disk(tmp_path):
    splits = datasets.DatasetDict({"train": hub_like(3), "validation": hub_like(2), "test": hub_like(1)})
    splits.save_to_disk(tmp_path / "saved")
    splits["train"].to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    for source, sizes in ((splits, (3, 2)), (tmp_path / "saved", (3, 2)), (tmp_path / "hub", (2, 1))):
        data = load_segmentation_dataset(source, classes=NAMES)
        assert (len(data.train), len(data.validation)) == sizes


def rows_of_labels(names, count=3):
    feature = datasets.Sequence(datasets.Sequence(datasets.ClassLabel(names=names)))
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    masks = [make_mask(i).clip(max=len(names) - 1).tolist() for i in range(count)]
    images = [Image.fromarray(make_pixels(i)) for i in range(count)]
    return datasets.Dataset.from_dict({"image": images, "label": masks}, features), masks


def test_class_names_from_features():
    rows, masks = rows_of_labels(NAMES)
    data = load_segmentation_dataset(rows, validation_fraction=0)
    assert data.id2label == dict(enumerate(NAMES))
    assert data.train[1]["mask"].tolist() == masks[1]
    rows, _ = rows_of_labels(["Sky", "sky "])
    with pytest.raises(ValueError, match="twice"):
        load_segmentation_dataset(rows)
    assert list(load_segmentation_dataset(rows, classes=["sky", "cloud"]).id2label.values()) == ["sky", "cloud"]


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
    ("rows", "options", "named"),
    [
        (partial(hub_like, image="a", label="b"), {}, "a, b"),
        (hub_like, {"image_column": "photo"}, "image_column"),
        (hub_like, {"classes": None}, "class"),
        (hub_like, {"train_split": "trian"}, "train"),
        (hub_like, {"validation_fraction": 1.5}, "validation_fraction"),
        (lambda: {"test": hub_like()}, {}, "test"),
        (lambda: {"train": hub_like().select([])}, {}, "samples"),
    ],
)
def test_refusals_about_datasets_name_the_cause(rows, options, named):
    with pytest.raises(ValueError, match=named):
        load_segmentation_dataset(rows(), **{"classes": NAMES, **options})


# Refusals of folders


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda f: (f / "train/masks/002.png").unlink(), "002.jpg"),
        (lambda f: (f / "train/images/002.jpg").unlink(), "002.png"),
        (lambda f: [p.unlink() for p in (f / "train/images").iterdir()], "images"),
        (lambda f: (f / "train/masks").rename(f / "train/annotation"), "train.masks"),
        (lambda f: (f / "train/images/000.png").write_bytes(b""), "000.png"),
        (lambda f: (f / "classes.json").unlink(), "classes.json"),
        (lambda f: (f / "classes.json").write_text("{"), "JSON"),
        (lambda f: write_classes(f, id2label={"0": "sky", "2": "car"}), "id_map"),
        (lambda f: write_classes(f, id2label=["a", "B", "b "]), "twice"),
        (lambda f: write_classes(f, id2label=str(f / "classes.json")), "classes"),  # no path is followed
        (lambda f: [(f / "val").rename(f / "held"), (f / "train").rename(f / "first")], "first, held"),
        (lambda f: write_classes(f, id2label=["a", "", "b"]), "empty"),
        (lambda f: write_classes(f, id2label=["a", "\ud800", "b"]), "surrogate"),
        (lambda f: write_classes(f, id2label={"x": "a"}), "x"),
        (lambda f: write_classes(f, palette=PALETTE[:2]), "palette"),
        (lambda f: write_classes(f, palette=[[0, 0, 256]] * 3), "255"),
        (lambda f: write_classes(f, ignore_index="255"), "ignore_index"),
        (lambda f: write_classes(f, id2label=["a", "b"], palette=None), "2"),
    ],
)
def test_folders_that_are_refused(folder, break_it, named):
    break_it(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        load_segmentation_dataset(folder)


def test_no_data_set_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(FileNotFoundError) as refused:
            load_segmentation_dataset(source)
        assert str(source) in str(refused.value)


def test_a_split_that_nobody_asks_for_may_be_without_masks(folder):
    shutil.copytree(folder / "val" / "images", folder / "test" / "images")
    data = load_segmentation_dataset(folder)
    assert (len(data.train), len(data.validation)) == (4, 2)
    with pytest.raises(FileNotFoundError, match="test/masks"):
        load_segmentation_dataset(folder, validation_split="test")


def test_missing_cityscapes_masks(tmp_path):
    (tmp_path / "leftImg8bit/train/ulm").mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(tmp_path / "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png")
    with pytest.raises(FileNotFoundError, match="gtFine"):
        load_segmentation_dataset(tmp_path)
    (tmp_path / "gtFine/train").mkdir(parents=True)
    Image.new("L", (3, 2)).save(tmp_path / "gtFine/train/other_gtFine_labelIds.png")
    with pytest.raises(FileNotFoundError, match="ulm_0_leftImg8bit.png"):
        load_segmentation_dataset(tmp_path)


def test_default_palette_has_a_color_for_each_class():
    palette = default_palette(150)
    assert len(set(palette)) == 150 and palette == default_palette(150)


def test_classes_that_training_must_not_know(tmp_path):
    write_pairs(tmp_path / "train", 2)
    write_pairs(tmp_path / "val", 1)
    write_classes(tmp_path)
    data = load_segmentation_dataset(tmp_path)
    names = list(data.id2label.values())
    without = data.without(names[1:2])
    assert list(without.id2label.values()) == [names[0], *names[2:]]
    assert len(without.palette) == len(without.id2label)
    for before, after in zip([*data.train, *data.validation], [*without.train, *without.validation], strict=True):
        old, new = np.asarray(before["mask"]), np.asarray(after["mask"])
        assert (new[old == 1] == data.ignore_index).all() and (old == 1).any()
        assert (new[old == 0] == 0).all() and (new[old == 2] == 1).all()
        assert (new[old == data.ignore_index] == data.ignore_index).all()
        assert before["image"].tobytes() == after["image"].tobytes()
    assert list(data.id2label.values()) == names and (np.asarray(data.train[0]["mask"]) == 1).any()
    with pytest.raises(ValueError, match="zebra"):
        data.without(["zebra"])
