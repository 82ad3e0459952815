import csv
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from denseclip_hf import MeanBoundaryIoU, MeanIoU
from denseclip_hf.evaluation import EvaluationArguments, evaluate_segmentation, measure
from denseclip_hf.evaluation.report import MatchedSamples, match_classes, report_table, scores_of_classes
from denseclip_hf.files import OutputError
from denseclip_hf.inference import load_model, multi_scale_probabilities, sliding_window_logits
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from helpers.forked import run_ranks, run_script
from helpers.images import pictures
from helpers.models import tiny_model, varied
from helpers.sample_data import SIZES_OF_SAVED, save_data


SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"
NAMES = ["class 0", "class 1", "class 2"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    varied(tiny_model()).save_pretrained(folder)
    DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def arguments(tmp_path, model_dir):
    def make(dataset=None, **options):
        dataset = save_data(tmp_path / "data") if dataset is None else dataset
        return EvaluationArguments(model=model_dir, dataset=dataset, output_dir=str(tmp_path / "out"), **options)

    return make


# What is measured


@pytest.mark.parametrize(
    ("options", "views"),
    [
        ({"batch_size": 2}, ([1.0], False)),
        ({"inference_mode": "slide", "crop_size": [48], "stride": [32]}, ([1.0], False)),
        ({"scales": [0.75, 1.25], "flip": True}, ([0.75, 1.25], True)),
    ],
    ids=["whole", "slide", "multi-scale"],
)
def test_scores_are_those_of_the_metric(arguments, tmp_path, options, views):
    report = measure(arguments(**options, boundary_iou=True))
    config = {k: v for k, v in options.items() if k in ("inference_mode", "crop_size", "stride")}
    model = varied(tiny_model())
    for name, value in config.items():
        setattr(model.config, name, value * 2 if isinstance(value, list) else value)
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    metric, boundary = MeanIoU(3), MeanBoundaryIoU(3)
    for index in range(len(SIZES_OF_SAVED)):
        image = Image.open(tmp_path / "data" / "val" / "images" / f"p{index}.png")
        mask = np.asarray(Image.open(tmp_path / "data" / "val" / "masks" / f"p{index}.png"))
        (probabilities,) = multi_scale_probabilities(model, image, *views, image_processor=processor)
        metric.add(prediction=probabilities.argmax(0), reference=mask)
        boundary.add(prediction=probabilities.argmax(0), reference=mask)
    expected = metric.compute() | boundary.compute()
    for name in ("overall_accuracy", "mean_iou", "mean_accuracy", "mean_dice", "mean_boundary_iou"):
        assert report["metrics"][name] == pytest.approx(expected[name], abs=2e-3), name
    assert len({round(v["iou"], 3) for v in report["per_category"].values()}) > 1


def test_images_are_read_while_the_model_runs():
    """The first image's result is there only when the second has been read; a stream's likewise."""
    read = threading.Event()

    def samples():
        for number, sample in enumerate(pictures(3)):
            if number == 1:
                read.set()
            yield sample

    def predict(image):
        assert read.wait(60)
        return torch.zeros(image.height, image.width, dtype=torch.long)

    assert evaluate_segmentation(tiny_model(), samples(), None, predict=predict, progress=False)["num_images"] == 3


def test_files_state_model_data_protocol_and_scores(arguments, tmp_path, model_dir):
    slide = {"inference_mode": "slide", "crop_size": [48, 64], "stride": [32, 40]}
    report = measure(arguments(**slide, worst=2, save_predictions=True, confusion_matrix=True))
    out = tmp_path / "out"
    saved = json.loads((out / "evaluation.json").read_text())
    assert saved == report
    assert (saved["model"], saved["split"], saved["num_images"]) == (model_dir, "val", 5)
    assert saved["protocol"] == {
        **slide, "scales": [1.0], "flip": False, "size": {"shortest_edge": 64, "longest_edge": 128},
        "dtype": "float32",
    }  # fmt: skip
    rows = list(csv.DictReader((out / "evaluation.csv").open()))
    assert [row["class"] for row in rows] == NAMES
    assert float(rows[1]["iou"]) == pytest.approx(saved["per_category"]["class 1"]["iou"])
    for name, (width, height) in zip(sorted((out / "predictions").iterdir()), SIZES_OF_SAVED, strict=True):
        image = Image.open(name)
        assert (image.mode, image.size) == ("P", (width, height)) and np.asarray(image).max() < 3
    assert [file.name for file in sorted((out / "predictions").iterdir())][:2] == ["000000_p0.png", "000001_p1.png"]
    first, second = saved["worst"]
    assert first["mean_iou"] <= second["mean_iou"] and first["index"] != second["index"]
    assert all(Image.open(out / f"{name}.png").width > 100 for name in ("worst", "confusion_matrix"))


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["class 2", "class 0", "class 1"], (1, 2, 0)),
        (["class 1", " class 2 "], (255, 0, 1)),
    ],
    ids=["another order", "fewer classes"],
)
def test_classes_are_matched_by_name(arguments, tmp_path, names, ids, caplog):
    """The same pixels under other ids; `ids` are those of the model's classes 0, 1 and 2 in this data."""
    report = measure(arguments(save_data(tmp_path / "other", names, ids)))
    assert "matched by name" in caplog.text
    same = measure(
        arguments(save_data(tmp_path / "same", NAMES, tuple(i if j < 255 else 255 for i, j in enumerate(ids))))
    )
    for name in names:
        assert report["per_category"][name] == pytest.approx(same["per_category"][name.strip()])
    values = [report["per_category"][name]["iou"] for name in names]
    assert report["metrics"]["mean_iou"] == pytest.approx(np.mean(values))
    assert report["absent_from_data"] == [name for name in NAMES if name not in [n.strip() for n in names]]


@pytest.mark.parametrize("workers", [0, 1])
def test_reduced_labels(arguments, tmp_path, workers):
    plain = measure(arguments())
    shifted = measure(
        arguments(save_data(tmp_path / "shifted", ids=(1, 2, 3), do_reduce_labels=True), num_workers=workers)
    )
    assert shifted["metrics"] == pytest.approx(plain["metrics"]) and not shifted["absent_from_data"]


def test_images_are_measured_at_their_own_resolution(arguments, tmp_path):
    report = measure(arguments(native_resolution=True))
    assert (report["protocol"]["size"], report["protocol"]["inference_mode"]) == (None, "slide")
    model, processor = load_model(arguments(dataset=str(tmp_path / "data")).model)
    metric = MeanIoU(3)
    for index in range(len(SIZES_OF_SAVED)):
        image = Image.open(tmp_path / "data" / "val" / "images" / f"p{index}.png")
        pixels = processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
        logits = sliding_window_logits(model, pixels, model.config.crop_size, model.config.stride)[0]
        mask = np.asarray(Image.open(tmp_path / "data" / "val" / "masks" / f"p{index}.png"))
        metric.add(prediction=logits.argmax(0), reference=mask)
    assert report["metrics"]["mean_iou"] == pytest.approx(metric.compute()["mean_iou"], abs=2e-3)


def test_undefined_scores_are_null(arguments, tmp_path):
    report = measure(arguments(save_data(tmp_path / "one", ids=(1, 1, 1))))
    assert math.isnan(report["per_category"]["class 0"]["accuracy"])
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["per_category"]["class 0"]["accuracy"] is None and "–" in report_table(report)
    defined = sum(scores["iou"] is not None for scores in saved["per_category"].values())
    assert saved["classes_in_mean_iou"] == defined and f"over {defined} of 3 classes" in report_table(report)


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_half_precision_and_few_images(arguments, name):
    report = measure(arguments(dtype=name, max_images=2))
    assert report["num_images"] == 2 and report["protocol"]["dtype"] == "bfloat16"


# Several processes


@pytest.mark.slow
def test_two_processes_count_every_image_once(arguments, tmp_path, model_dir):
    alone = measure(arguments(boundary_iou=True, worst=3))
    flags = ["--model", model_dir, "--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "two")]
    flags += ["--boundary_iou", "--worst", "3", "--save_predictions", "--device", "cpu"]
    codes, (first, second) = run_ranks(2, SCRIPT, *flags)
    assert codes == [0, 0], first + second
    together = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert together["num_images"] == 5 and len(list((tmp_path / "two" / "predictions").iterdir())) == 5
    assert together["metrics"] == pytest.approx(alone["metrics"])
    assert [w["index"] for w in together["worst"]] == [w["index"] for w in alone["worst"]]
    assert "class 1" in first and "5 images" in first and "class 1" not in second


@pytest.mark.slow
def test_script_says_in_one_sentence_what_is_wrong(tmp_path, model_dir):
    data = save_data(tmp_path / "data", ["cat", "dog", "class 1"])
    code, said = run_script(SCRIPT, "--model", model_dir, "--dataset", data, "--output_dir", tmp_path / "out")
    assert code == 1 and "cat, dog" in said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


# Bad input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scales": []}, "scales"),
        ({"scales": [1.0, 0.0]}, "scales"),
        ({"device": "tpu"}, "device"),
        ({"inference_mode": "tiles"}, "inference_mode"),
        ({"inference_mode": "slide", "crop_size": [32], "stride": [48]}, "stride"),
        ({"crop_size": [32]}, "slide"),
        ({"stride": [32]}, "slide"),
        ({"crop_size": [1, 2, 3]}, "crop_size"),
        ({"split": "test"}, "test"),
    ],
)
def test_options_that_are_refused_are_named(arguments, options, named):
    with pytest.raises(ValueError, match=named):
        measure(arguments(**options))


def test_names_are_matched_as_class_names_are_compared():
    assert match_classes({0: " Traffic  light", 1: "sky"}, {0: "Sky", 1: "tree", 2: "traffic light"}) == [2, 0]


def test_a_full_disk_is_refused_before_the_work(arguments, small_disk, monkeypatch):
    def too_late(*_, **__):
        pytest.fail("it began to evaluate")

    monkeypatch.setattr("denseclip_hf.evaluation.measurement.evaluate_segmentation", too_late)
    args = arguments()
    args.output_dir = str(small_disk("32k") / "out")
    with pytest.raises(OutputError, match="out"):
        measure(args)


# Parts


def test_matched_masks_are_copies_in_the_models_ids():
    mask = np.array([[255, 0], [1, 255]], dtype=np.uint8)
    samples = MatchedSamples([{"image": None, "mask": mask}], [7, 5], 255, -100)
    assert samples[0]["mask"].tolist() == [[-100, 7], [5, -100]]
    assert mask.tolist() == [[255, 0], [1, 255]]


def test_means_are_over_the_chosen_classes():
    matrix = torch.tensor([[2, 0, 2], [0, 0, 0], [1, 0, 3]])
    assert scores_of_classes(matrix, [2, 0], leave_out=[0])["mean_iou"] == pytest.approx(3 / 6)
    scores = scores_of_classes(matrix, [2, 0])
    assert scores["per_category_iou"] == pytest.approx([3 / 6, 2 / 5])
    assert scores["mean_iou"] == pytest.approx((3 / 6 + 2 / 5) / 2) and scores["classes_in_mean_iou"] == 2
