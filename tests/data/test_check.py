"""The check of a data set."""

import numpy as np
import pytest
from PIL import Image

from denseclip_hf.cli.check_data import main, samples_per_second
from denseclip_hf.data import check_dataset, load_segmentation_dataset
from helpers.sample_data import NAMES, SIZE, hub_like, truncated, write_folder, write_pairs


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


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
    assert "000.jpg" in report.problems[0] and "001.png" in report.problems[1]
    assert report.splits["train"].num_checked == 4 and len(report.splits["train"].sizes) == 3
    assert "Problems: 2" in str(report)


def test_an_image_too_narrow_to_be_segmented_is_a_problem(folder):
    """Training crops it, but the evaluation at its end would fail."""
    Image.new("RGB", (700, 9)).save(folder / "val/images/001.jpg")
    Image.new("L", (700, 9)).save(folder / "val/masks/001.png")
    (problem,) = check_dataset(load_segmentation_dataset(folder), full=True).problems
    assert "001.jpg is 700x9 pixels" in problem


def test_problems_of_a_kind_are_printed_together(tmp_path):
    folder = write_folder(tmp_path / "my set")
    write_pairs(folder / "train", 9)
    for mask in (folder / "train/masks").iterdir():
        Image.fromarray(np.full(SIZE[::-1], 100 + int(mask.stem), np.uint8)).save(mask)
    truncated(folder / "train/images/008.jpg")
    report = check_dataset(load_segmentation_dataset(folder, read_first=False), full=True)
    *alike, rest, other = str(report).partition("Problems: 9\n")[2].splitlines()
    assert alike == report.problems[:3] and other == report.problems[8]
    assert "5 more" in rest and "003.png" in rest and "007.png" in rest


def test_report_of_a_stream_and_of_a_split_without_sound_samples(folder, tmp_path):
    for mask in (folder / "val" / "masks").iterdir():
        mask.write_bytes(b"")
    data = load_segmentation_dataset(folder, read_first=False)
    report = check_dataset(data, full=True)
    assert "none of them sound" in str(report) and not report.ok
    rows = hub_like(4).to_iterable_dataset()
    stream = load_segmentation_dataset({"train": rows}, classes=NAMES[:2], read_first=False)  # masks hold 0…2
    (problem,) = check_dataset(stream).problems
    assert problem.startswith("train: sample 0: ")
    empty = load_segmentation_dataset({"train": hub_like(4).select([])}, classes=NAMES, read_first=False)
    assert "no samples" in check_dataset(empty).problems[0]


def test_quick_check_looks_at_the_same_few_samples(folder):
    data = load_segmentation_dataset(folder)
    first, second = (check_dataset(data, max_samples=2) for _ in range(2))
    assert first.splits["train"].num_checked == 2
    assert str(first) == str(second)


def test_speed_is_that_of_training_samples(folder):
    assert 0 < samples_per_second(load_segmentation_dataset(folder), workers=1, seconds=0.2) < 10_000


def test_script_prints_a_table_and_tells_by_its_exit_code(folder, capsys):
    for expected, words in ((0, "No problems."), (1, "000.jpg"), (1, "SPLIT/images")):
        if expected:
            truncated(folder / "train/images/000.jpg")
        source = folder / "train" / "masks" if "SPLIT" in words else folder
        try:
            code = main([str(source), "--full"])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert code == expected and words in printed.out + printed.err
