import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from denseclip_hf import MeanBoundaryIoU, MeanIoU
from denseclip_hf.evaluation import measure as measurement
from denseclip_hf.evaluation.loop import evaluate_segmentation
from denseclip_hf.evaluation.measure import EvaluationArguments, measure
from denseclip_hf.evaluation.report import MatchedSamples, match_classes, report_table, scores_of_classes
from denseclip_hf.files import OutputError
from denseclip_hf.inference import multi_scale_probabilities, multi_scale_segmentation
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from denseclip_hf.sharing import write_card
from helpers.forked import run_ranks, run_script
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


def test_files_state_model_data_protocol_and_scores(arguments, tmp_path, model_dir):
    slide = {"inference_mode": "slide", "crop_size": [48, 64], "stride": [32, 40]}
    report = measure(arguments(**slide, worst=2, save_predictions=True, confusion_matrix=True))
    out = tmp_path / "out"
    saved = json.loads((out / "evaluation.json").read_text())
    assert saved == report
    assert (saved["model"], saved["split"], saved["num_images"]) == (model_dir, "validation", 5)
    assert saved["protocol"] == {
        **slide, "scales": [1.0], "flip": False, "size": {"shortest_edge": 64, "longest_edge": 128},
        "dtype": "float32",
    }  # fmt: skip
    rows = list(csv.DictReader((out / "evaluation.csv").open()))
    assert [row["class"] for row in rows] == NAMES
    assert float(rows[1]["iou"]) == pytest.approx(saved["per_category"]["class 1"]["iou"])
    for name, (width, height) in zip(sorted((out / "predictions").iterdir()), SIZES_OF_SAVED, strict=True):
        picture = Image.open(name)
        assert (picture.mode, picture.size) == ("P", (width, height)) and np.asarray(picture).max() < 3
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


def test_undefined_scores_are_null(arguments, tmp_path):
    report = measure(arguments(save_data(tmp_path / "one", ids=(1, 1, 1))))
    assert math.isnan(report["per_category"]["class 0"]["accuracy"])
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["per_category"]["class 0"]["accuracy"] is None and "–" in report_table(report)


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_half_precision_and_few_images(arguments, name):
    report = measure(arguments(dtype=name, max_images=2))
    assert report["num_images"] == 2 and report["protocol"]["dtype"] == "bfloat16"


# The model's card


@pytest.fixture
def with_card(tmp_path, model_dir):
    folder = shutil.copytree(model_dir, tmp_path / "streets")
    write_card(folder, base_model="openai/x")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMy own words.\n")
    return folder


def evaluate_into_card(arguments, folder, **options):
    measure(replace(arguments(), model=str(folder), **options))
    text = (folder / "README.md").read_text()
    assert "My own words." in text and "openai/x" in text
    return text, ModelCard(text).data.eval_results or []


def test_the_card_names_every_protocol_once(arguments, with_card, tmp_path):
    protocols = [
        {},
        {"inference_mode": "slide", "crop_size": [48], "stride": [32]},
        {"scales": [0.75, 1.25], "flip": True},
    ]
    for options in [*protocols, {}]:
        text, results = evaluate_into_card(arguments, with_card, **options)
    assert len(results) == 9 and str(tmp_path) not in text
    for words in (
        "whole images, longest edge 128",
        "windows of 48 x 48, step 32 x 32",
        "whole images, scales 0.75 1.25, flips",
    ):
        assert text.count(f"| data | validation | {words}") == 1, words
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    protocol = {key: value for key, value in report["protocol"].items() if value is not None}
    written = {result.metric_name: result.metric_value for result in results if result.metric_args == protocol}
    expected = {"mIoU": "mean_iou", "mAcc": "mean_accuracy", "aAcc": "overall_accuracy"}
    assert written == pytest.approx({name: report["metrics"][key] for name, key in expected.items()}, abs=1e-4)


@pytest.mark.parametrize("options", [{"update_card": False}, {"max_images": 2}], ids=["switched off", "a part"])
def test_the_card_stays_as_it_is(arguments, with_card, options):
    before = (with_card / "README.md").read_text()
    assert evaluate_into_card(arguments, with_card, **options) == (before, [])


def test_a_model_without_card_gets_none(arguments, model_dir):
    measure(arguments())
    assert not (Path(model_dir) / "README.md").exists()


def test_a_card_that_can_not_be_written_is_no_failure(arguments, with_card, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("denseclip_hf.evaluation.measure.add_results", refuse)
    evaluate_into_card(arguments, with_card)
    assert "stays as it is: it can not be written (Permission denied)" in caplog.text


def test_a_card_that_somebody_broke_is_no_failure(arguments, with_card, caplog):
    (with_card / "README.md").write_text("---\ntags: [\n---\n\nMy own words.\n")
    assert measure(replace(arguments(), model=str(with_card)))["num_images"] == 5
    assert "card stays as it is: the front matter of" in caplog.text
    assert "tags: [" in (with_card / "README.md").read_text()


# Several processes


@pytest.mark.slow
def test_two_processes_count_every_picture_once(arguments, tmp_path, model_dir):
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
    assert code == 1 and "2 of the data's 3 classes are unknown to the model ('cat', 'dog')" in said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


# Bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scales": []}, "positive factors"),
        ({"scales": [1.0, 0.0]}, "positive factors"),
        ({"dtype": "int8"}, "must be one of auto, float32"),
        ({"device": "tpu"}, "auto or cpu"),
        ({"batch_size": 0}, "at least 1"),
        ({"inference_mode": "tiles"}, 'must be "whole" or "slide"'),
        ({"inference_mode": "slide", "crop_size": [32], "stride": [48]}, "smaller than `stride`"),
        ({"crop_size": [32]}, "takes whole pictures: add `--inference_mode slide`, or leave them out"),
        ({"stride": [32]}, "takes whole pictures"),
        ({"crop_size": [1, 2, 3]}, "one positive number of pixels or a pair"),
        ({"split": "test"}, "test"),
    ],
)
def test_bad_protocols_are_refused(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure(arguments(**options))


@pytest.mark.parametrize("missing", ["model", "dataset"])
def test_model_and_data_must_be_named(missing):
    names = {"model": "m", "dataset": "d", missing: ""}
    with pytest.raises(ValueError, match=f"`--{missing} FOLDER_OR_HUB_NAME`"):
        measure(EvaluationArguments(**names))


def test_ambiguous_names_are_refused():
    with pytest.raises(ValueError, match="given twice"):
        match_classes({0: "sky", 1: "sky"}, {0: "sky", 1: "road"})


def test_an_empty_split_is_refused(model_dir):
    with pytest.raises(ValueError, match="the split is empty"):
        evaluate_segmentation(tiny_model(), [], None)


def test_a_place_that_can_not_be_written_is_refused_before_the_work(arguments, tmp_path, small_disk, monkeypatch):
    def too_late(*_, **__):
        pytest.fail("it began to evaluate")

    monkeypatch.setattr("denseclip_hf.evaluation.measure.evaluate_segmentation", too_late)
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="out cannot be written .File exists.: name another"):
        measure(arguments())
    args = arguments(dataset=str(tmp_path / "data"))
    args.output_dir = str(small_disk("32k") / "out")
    with pytest.raises(OutputError, match="out cannot be written .No space left on device.: make room there, or name"):
        measure(args)


@pytest.mark.parametrize("options", [{}, {"save_predictions": True}])
def test_a_disk_that_fills_up_is_one_sentence(arguments, small_disk, monkeypatch, options):
    args = arguments(**options)
    args.output_dir = str(small_disk("80k") / "out")
    evaluate = measurement.evaluate_segmentation

    def fill_first(*args_, **kwargs):
        with pytest.raises(OSError), open(f"{args.output_dir}/filler", "wb") as file:
            file.write(bytes(100_000))
        return evaluate(*args_, **kwargs)

    monkeypatch.setattr(measurement, "evaluate_segmentation", fill_first)
    words = "results could not be written into .*out.* .No space left on device.: make room there, or name another"
    with pytest.raises(OutputError, match=words):
        measure(args)


# Parts


def test_matched_masks_are_copies_in_the_models_ids():
    mask = np.array([[255, 0], [1, 255]], dtype=np.uint8)
    samples = MatchedSamples([{"image": None, "mask": mask}], [7, 5], 255, -100)
    assert samples[0]["mask"].tolist() == [[-100, 7], [5, -100]]
    assert mask.tolist() == [[255, 0], [1, 255]]


def test_means_are_over_the_chosen_classes():
    matrix = torch.tensor([[2, 0, 2], [0, 0, 0], [1, 0, 3]])
    scores = scores_of_classes(matrix, [2, 0])
    assert scores["per_category_iou"] == pytest.approx([3 / 6, 2 / 5])
    assert scores["mean_iou"] == pytest.approx((3 / 6 + 2 / 5) / 2)


def test_multi_scale_stays_within_its_limit(monkeypatch):
    model, processor = varied(tiny_model()), DenseCLIPImageProcessorPil(size={"shortest_edge": 64})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 150, 3)).astype(np.uint8))
    options = {"scales": (1.0,), "flip": True, "image_processor": processor}
    (probabilities,) = multi_scale_probabilities(model, image, **options)
    assert torch.equal(multi_scale_segmentation(model, image, **options), probabilities.argmax(0))
    monkeypatch.setattr("denseclip_hf.inference.views.STRIP_PROBABILITIES", 3 * 150 * 7)
    assert torch.equal(multi_scale_segmentation(model, image, **options), probabilities.argmax(0))
    zeros, sizes = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *size, **kw: sizes.append(size) or zeros(*size, **kw))
    small = multi_scale_segmentation(model, image, **options, max_probabilities=20_000)
    assert small.shape == (120, 150) and max(math.prod(size) for size in sizes if len(size) == 3) <= 20_000
    assert (small == probabilities.argmax(0)).float().mean() > 0.8
