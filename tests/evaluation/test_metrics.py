import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from denseclip_hf.metrics import (
    MeanBoundaryIoU,
    MeanIoU,
    boundary_counts,
    confusion_matrix,
    scores_from_confusion_matrix,
)


FIXTURES = Path(__file__).parents[1] / "fixtures"
NAN = math.nan
ORIGINAL_NAMES = {
    "IoU": "iou",
    "Acc": "accuracy",
    "Dice": "dice",
    "Fscore": "fscore",
    "Precision": "precision",
    "Recall": "accuracy",
}


@pytest.fixture(scope="module")
def golden():
    description = json.loads((FIXTURES / "metrics.json").read_text())
    return description, load_file(FIXTURES / "metrics.safetensors")


def golden_maps(tensors, case, number=4):
    return tuple([tensors[f"in/{case}/{kind}{i}"] for i in range(number)] for kind in ("pred", "label"))


@pytest.mark.parametrize("as_numpy", [False, True], ids=["torch", "numpy"])
@pytest.mark.parametrize("case", ["basic", "reduce_zero"])
def test_scores_match_the_original(golden, case, as_numpy):
    description, tensors = golden
    predictions, references = golden_maps(tensors, case)
    if as_numpy:
        predictions, references = ([m.numpy() for m in maps] for maps in (predictions, references))
    metric = MeanIoU(
        description["num_classes"],
        description["ignore_index"],
        do_reduce_labels=description["cases"][case]["reduce_zero_label"],
    )
    metric.add_batch(predictions=predictions[:3], references=references[:3])
    metric.add(prediction=predictions[3], reference=references[3])

    matrix = metric.confusion_matrix.double()
    assert torch.equal(matrix.diagonal(), tensors[f"out/{case}/area_intersect"])
    assert torch.equal(matrix.sum(0), tensors[f"out/{case}/area_pred_label"])
    assert torch.equal(matrix.sum(1), tensors[f"out/{case}/area_label"])

    scores = metric.compute()
    assert scores["overall_accuracy"] == tensors[f"out/{case}/aAcc"].item()
    for original, name in ORIGINAL_NAMES.items():
        np.testing.assert_allclose(
            scores[f"per_category_{name}"], tensors[f"out/{case}/{original}"], rtol=1e-15, atol=0, err_msg=original
        )
        assert scores[f"mean_{name}"] == pytest.approx(tensors[f"out/{case}/nanmean_{original}"].item(), rel=1e-14)


def test_scores_computed_by_hand():
    # class 0: 3 right of 4 labeled, 4 predicted; class 1: 1 of 2, 3 predicted; class 2: never predicted; 3: absent
    matrix = torch.tensor([[3, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    scores = scores_from_confusion_matrix(matrix)
    expected = {
        "overall_accuracy": 4 / 7,
        "per_category_iou": [3 / 5, 1 / 4, 0, NAN],
        "per_category_accuracy": [3 / 4, 1 / 2, 0, NAN],
        "per_category_dice": [6 / 8, 2 / 5, 0, NAN],
        "per_category_fscore": [3 / 4, 2 / 5, NAN, NAN],
        "per_category_precision": [3 / 4, 1 / 3, NAN, NAN],
        "mean_iou": 0.85 / 3,
        "mean_accuracy": 1.25 / 3,
        "mean_dice": 1.15 / 3,
        "mean_fscore": 1.15 / 2,
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, nan_ok=True), name
    assert scores_from_confusion_matrix(matrix.numpy())["mean_iou"] == scores["mean_iou"]


@pytest.mark.parametrize(
    ("prediction", "reference", "ignore_index", "expected"),
    [
        ([[0, 1], [1, 1]], [[0, 1], [0, 255]], 255, [[1, 1], [0, 1]]),
        ([[0, 1]], [[-100, 1]], -100, [[0, 0], [0, 1]]),
        ([[0, 1]], [[0, 1]], 0, [[0, 0], [0, 1]]),
        ([[0, 1]], [[255, 255]], 255, [[0, 0], [0, 0]]),
    ],
    ids=["mixed", "negative", "a class", "all ignored"],
)
def test_confusion_matrix_rows_are_references(prediction, reference, ignore_index, expected):
    matrix = confusion_matrix(np.array(prediction), np.array(reference), 2, ignore_index)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == expected


def test_label_255_is_ignored_by_default():
    assert confusion_matrix([[0, 1]], [[0, 255]], 2).tolist() == [[1, 0], [0, 0]]
    counts = boundary_counts(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, 255]]), 1)
    assert counts.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, ">i4"])
def test_reducing_labels_changes_no_input(dtype):
    reference = np.array([[0, 1, 2, 255]], dtype=dtype)
    before = reference.copy()
    reference.flags.writeable = False
    prediction = torch.tensor([[1, 0, 0, 1]])
    metric = MeanIoU(num_labels=2, do_reduce_labels=True)
    metric.add(prediction=prediction, reference=reference)
    assert metric.confusion_matrix.tolist() == [[1, 0], [1, 0]]
    np.testing.assert_array_equal(reference, before)
    assert prediction.tolist() == [[1, 0, 0, 1]]

    int64 = torch.tensor([[0, 1, 2, 255]])
    metric.add(prediction=prediction, reference=int64)
    assert int64.tolist() == [[0, 1, 2, 255]]


def test_everything_ignored_gives_nan_without_warnings(recwarn):
    metric = MeanIoU(num_labels=2)
    metric.add(prediction=torch.zeros(2, 2, dtype=torch.long), reference=torch.full((2, 2), 255))
    scores = metric.compute()
    assert math.isnan(scores["mean_iou"]) and math.isnan(scores["overall_accuracy"])
    assert not recwarn


def test_is_an_evaluate_metric_that_starts_anew_after_compute(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    metric = MeanIoU(num_labels=2)
    assert isinstance(metric, evaluate.Metric)
    maps = torch.tensor([[[0, 1]]])
    assert metric.compute(predictions=maps, references=maps)["mean_iou"] == 1.0
    with pytest.raises(ValueError):
        metric.compute()
    metric.add_batch(predictions=maps, references=1 - maps)
    assert len(metric) == 1
    assert metric.compute()["mean_iou"] == 0.0
    assert not (tmp_path / "cache").exists()


ZEROS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize("metric_class", [MeanIoU, MeanBoundaryIoU])
@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        (ZEROS, torch.zeros(3, 2, dtype=torch.long)),
        (ZEROS, ZEROS + 4),
        (ZEROS, ZEROS - 1),
        (ZEROS + 255, ZEROS),
        (ZEROS.float(), ZEROS),
        (ZEROS, np.zeros((2, 3))),
        (ZEROS[0, 0], ZEROS),
    ],
)
def test_bad_maps_are_refused(metric_class, prediction, reference):
    metric = metric_class(num_labels=4)
    with pytest.raises(ValueError):
        metric.add(prediction=prediction, reference=reference)
    assert len(metric) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: MeanIoU(300, do_reduce_labels=True),
        lambda: MeanIoU(2, ignore_index=0, do_reduce_labels=True),
        lambda: MeanIoU(2).add_batch(predictions=[ZEROS], references=[]),
        lambda: MeanIoU(2).compute(predictions=[ZEROS]),
        lambda: MeanIoU(2).merge(MeanIoU(3)),
        lambda: MeanIoU(2).merge(MeanBoundaryIoU(2)),
        lambda: MeanBoundaryIoU(2, boundary_width=0.5).merge(MeanBoundaryIoU(2)),
        lambda: MeanIoU(2, 0).merge(MeanIoU(2)),
    ],
)
def test_bad_calls_are_refused(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize(("num_labels", "ignore_index"), [(1, 255), (255, 255), (2, -1)])
def test_reducing_needs_an_ignored_label_that_is_no_class(num_labels, ignore_index):
    metric = MeanIoU(num_labels, ignore_index, do_reduce_labels=True)
    metric.add(prediction=ZEROS, reference=ZEROS + 1)
    assert metric.confusion_matrix[0, 0] == ZEROS.numel()


def square(size, low, high):
    label_map = torch.zeros(size, size, dtype=torch.long)
    label_map[low:high, low:high] = 1
    return label_map


def test_boundary_iou_computed_by_hand():
    # d = round(0.02 · 28.3) = 1. A 10×10 square has a ring of 36 pixels; a 8×8 one inside it a ring of 28, disjoint.
    # Background: 76 pixels at the image's edge, the same in both; next to the squares a ring of 44 or of 36.
    metric = MeanBoundaryIoU(num_labels=3)
    metric.add(prediction=square(20, 6, 14), reference=square(20, 5, 15))
    scores = metric.compute()
    assert scores["per_category_boundary_iou"] == pytest.approx([76 / (76 + 44 + 36), 0.0, NAN], 1e-14, nan_ok=True)
    assert scores["mean_boundary_iou"] == pytest.approx(76 / 156 / 2, 1e-14)


def test_boundary_width_is_a_share_of_the_diagonal():
    # d = round(0.1 · 28.3) = 3: the bands of the squares are 10² - 4² = 84 and 8² - 2² = 60, 64 - 16 = 48 in common
    metric = MeanBoundaryIoU(num_labels=2, boundary_width=0.1)
    metric.add(prediction=square(20, 6, 14), reference=square(20, 5, 15))
    assert metric.compute()["per_category_boundary_iou"][1] == 48 / (84 + 60 - 48)


@pytest.mark.parametrize(
    ("height", "width", "pixels"),
    [(60, 80, 60 * 80 - 56 * 76), (3, 3, 8)],
    ids=["two hundredths of 100", "at least one pixel"],
)
def test_band_inside_the_edge(height, width, pixels):
    maps = torch.zeros(height, width, dtype=torch.long)
    assert boundary_counts(maps, maps, 1).tolist() == [[pixels]] * 3


@pytest.mark.parametrize("ignore_index", [255, -100])
def test_ignored_pixels_make_no_contour(ignore_index):
    reference = square(20, 0, 20)
    reference[8:12, 8:12] = ignore_index
    prediction = torch.ones_like(reference)
    prediction[9:11, 9:11] = 0
    metric = MeanBoundaryIoU(num_labels=2, ignore_index=ignore_index)
    metric.add(prediction=prediction, reference=reference)
    assert metric.compute()["per_category_boundary_iou"] == pytest.approx([NAN, 1.0], nan_ok=True)


def test_nothing_counted_is_a_matrix_of_zeros():
    matrix = MeanIoU(num_labels=2).confusion_matrix
    assert matrix.dtype == torch.int64 and matrix.tolist() == [[0, 0], [0, 0]]


# What the Hub's metric documents

HUB_PREDICTIONS = [[[1, 2], [3, 4], [5, 255]], [[2, 7], [9, 2], [3, 6]], [[2, 2, 3], [8, 2, 4], [3, 255, 2]]]
HUB_REFERENCES = [[[0, 3], [5, 4], [6, 255]], [[1, 7], [9, 2], [3, 6]], [[1, 2, 2], [8, 2, 1], [3, 255, 1]]]


def test_the_documented_example_of_the_hub_metric():
    metric = MeanIoU(num_labels=3)
    scores = metric.compute(
        predictions=HUB_PREDICTIONS, references=HUB_REFERENCES, num_labels=10, ignore_index=255, reduce_labels=False
    )
    assert scores["mean_iou"] == pytest.approx(0.4775) and scores["mean_accuracy"] == pytest.approx(0.59166666)
    assert scores["overall_accuracy"] == pytest.approx(0.526315789)
    assert scores["per_category_iou"] == pytest.approx([0, 0, 0.375, 0.4, 0.5, 0, 0.5, 1, 1, 1])
    assert metric.num_labels == 3 and len(metric) == 0


def test_keywords_hold_for_one_call_and_not_for_images_counted_otherwise():
    metric = MeanIoU(num_labels=2)
    shifted = {"predictions": [[[0, 1]]], "references": [[[1, 0]]]}
    assert metric.compute(**shifted, reduce_labels=True)["overall_accuracy"] == 1.0
    assert metric.compute(**shifted)["overall_accuracy"] == 0.0
    metric.add(prediction=[[0]], reference=[[0]])
    with pytest.raises(ValueError):
        metric.compute(ignore_index=0)


def test_means_may_leave_classes_out_and_say_how_many_they_are_over():
    metric = MeanIoU(num_labels=4, leave_out=[0])
    metric.add(prediction=[[0, 1, 1, 2]], reference=[[0, 0, 1, 2]])
    scores = metric.compute()
    assert scores["per_category_iou"] == pytest.approx([0.5, 0.5, 1.0, NAN], nan_ok=True)
    assert scores["mean_iou"] == 0.75 and scores["classes_in_mean_iou"] == 2
