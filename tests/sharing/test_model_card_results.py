"""Measurements in a model card: only what was measured, each with its origin, in model-index and table alike."""

import re

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from denseclip_hf.sharing.card import update_results, write_model_card
from denseclip_hf.sharing.card_results import results_of_training
from denseclip_hf.sharing.card_sections import protocol_words
from helpers.models import tiny_config, tiny_model
from helpers.results import RESULTS


@pytest.fixture
def directory(tmp_path):
    tiny_model().save_pretrained(tmp_path / "my-model")
    return tmp_path / "my-model"


def test_only_measured_numbers_are_in_the_model_index(directory):
    card = ModelCard(update_results(directory, RESULTS).read_text())
    (entry,) = card.data.to_dict()["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "my-model"
    assert result["task"]["type"] == "image-segmentation"
    assert result["dataset"]["split"] == "val"
    assert all(metric["args"] == RESULTS["protocol"] for metric in result["metrics"])
    assert {m["name"]: m["value"] for m in result["metrics"]} == {"mIoU": 0.4351, "aAcc": 0.8}
    assert "| data | split | protocol | mIoU (%) | aAcc (%) |" in card.text
    assert "| example | val | windows of 64 x 64, step ? x ? | 43.51 | 80.00 |" in card.text
    assert "<summary>Per class: example, val, 7 images, windows of 64 x 64, step ? x ?</summary>" in card.text
    assert "| class 0 | 50.00 | 60.00 |" in card.text and "| class 2 | 25.00 | – |" in card.text
    assert "class 1 | –" not in card.text and "nan" not in card.text.lower()


def test_measuring_again_replaces_and_measuring_elsewhere_adds(directory):
    update_results(directory, RESULTS)
    update_results(directory, {**RESULTS, "metrics": {"mean_iou": 0.5, "overall_accuracy": 0.9}})
    path = update_results(directory, {**RESULTS, "split": "test"})
    (entry,) = ModelCard(path.read_text()).data.to_dict()["model-index"]
    found = {r["dataset"]["split"]: {m["name"]: m["value"] for m in r["metrics"]} for r in entry["results"]}
    assert found == {"val": {"mIoU": 0.5, "aAcc": 0.9}, "test": {"mIoU": 0.4351, "aAcc": 0.8}}
    text = path.read_text()
    assert text.count("## Results") == 1 and text.count("Per class") == 1
    assert "| 50.00 | 90.00 |" in text and "| example | test |" in text


def test_every_protocol_has_a_line(directory):
    update_results(directory, RESULTS)
    protocol = {"inference_mode": "whole", "crop_size": None, "scales": [0.5, 1.0], "flip": True, "dtype": "float32"}
    results = {**RESULTS, "protocol": protocol, "metrics": {"mean_iou": 0.6, "mean_accuracy": 0.7}}
    update_results(directory, results)
    path = update_results(directory, {**results, "protocol": {**protocol, "crop_size": None}})
    card = ModelCard(path.read_text())
    assert "| windows of 64 x 64, step ? x ? | 43.51 | – | 80.00 |" in card.text
    assert card.text.count("| whole pictures, scales 0.5 1, flips, float32 | 60.00 | 70.00 | – |") == 1
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    modes = [(metric["name"], metric["args"]["inference_mode"]) for metric in result["metrics"]]
    assert sorted(modes) == [("aAcc", "slide"), ("mAcc", "whole"), ("mIoU", "slide"), ("mIoU", "whole")]


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ({"inference_mode": "whole", "scales": [1.0], "flip": False}, "whole pictures"),
        ({"inference_mode": "slide", "crop_size": [3, 4], "stride": [1, 2]}, "windows of 3 x 4, step 1 x 2"),
        ({"size": {"shortest_edge": 5, "longest_edge": 9}}, "short side 5, long side at most 9"),
        ({"size": {"height": 5, "width": 9}, "own": True}, 'size {"height": 5, "width": 9}, own true'),
        ({}, ""),
    ],
)
def test_protocols_in_words(protocol, words):
    assert protocol_words(protocol) == words


def test_a_measurement_changes_the_results_alone(directory):
    path = write_model_card(directory, base_model="openai/x", source="a friend", training={"Steps": 3})
    before = path.read_text()
    assert "| Started from | `openai/x` |" in before and "| Weights | a friend |" in before
    after = update_results(directory, RESULTS).read_text()
    results = re.compile(r"<!-- generated: results \w+ -->.*?<!-- end of generated: results -->\n", re.DOTALL)
    assert results.sub("", after).split("---", 2)[2] == results.sub("", before).split("---", 2)[2]


def test_other_models_of_the_model_index_stay(directory):
    path = update_results(directory, RESULTS)
    front, body = path.read_text().split("---", 2)[1:]
    front = yaml.safe_load(front)
    other = {"name": "their-model", "results": [{**front["model-index"][0]["results"][0]}]}
    front["model-index"].insert(0, other)
    path.write_text(f"---\n{yaml.safe_dump(front)}---{body}")
    update_results(directory, {**RESULTS, "metrics": {"mean_iou": 0.5, "overall_accuracy": 0.9}})
    again = yaml.safe_load(path.read_text().split("---", 2)[1])["model-index"]
    assert again[0] == other and again[1]["name"] == "my-model"
    assert [metric["value"] for metric in again[1]["results"][0]["metrics"]] == [0.5, 0.9]


@pytest.mark.parametrize("key", ["dataset", "split", "metrics"])
def test_results_without_their_origin_are_refused(directory, key):
    with pytest.raises(ValueError, match=f"lack `{key}`"):
        update_results(directory, {k: v for k, v in RESULTS.items() if k != key})
    assert not (directory / "README.md").exists()


def test_numbers_of_numpy_are_numbers(directory):
    metrics = {"mean_iou": np.float32(0.25), "overall_accuracy": np.float64(0.5), "mean_accuracy": None}
    results = {**RESULTS, "metrics": metrics, "per_category": {"class 0": {"iou": np.float32(0.75)}}}
    card = ModelCard(update_results(directory, results).read_text())
    assert [result.metric_value for result in card.data.eval_results] == [0.25, 0.5]
    assert "| class 0 | 75.00 |" in card.text


@pytest.mark.parametrize("value", [43.5, -0.1, "0.4", True])
@pytest.mark.parametrize("place", ["mean_iou", "iou of class 0"])
def test_numbers_out_of_range_are_refused(directory, place, value):
    results = {**RESULTS, "metrics": {"mean_iou": value}}
    if place != "mean_iou":
        results = {**RESULTS, "per_category": {"class 0": {"iou": value}}}
    with pytest.raises(ValueError, match=f"{place} must be a number from 0 to 1 .not per cent., got {value!r}"):
        update_results(directory, results)
    assert not (directory / "README.md").exists()


def test_results_of_training(kind):
    config = tiny_config(kind, inference_mode="slide", crop_size=64, stride=43)
    metrics = {"eval_mean_iou": 0.5, "eval_loss": 1.0, "eval_per_category_iou": [0.1, 0.2, 0.3]}
    results = results_of_training(metrics, config, "someone/streets", "val", {"shortest_edge": 64, "height": None})
    assert results["metrics"] == {"mean_iou": 0.5}
    assert results["protocol"]["crop_size"] == [64, 64] and results["protocol"]["size"] == {"shortest_edge": 64}
    assert results["per_category"]["class 2"] == {"iou": 0.3}
