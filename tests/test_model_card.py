"""The model card: complete, only measured numbers, and never over what a person wrote."""

import json
import math
import re

import pytest
import yaml
from conftest import tiny_config, tiny_model
from huggingface_hub import ModelCard

from denseclip_hf.model_card import read_results, results_of_training, update_results, write_model_card
from denseclip_hf.model_card_sections import environment, protocol_words, shown_name


RESULTS = {
    "model": "tiny",
    "dataset": "example",
    "split": "val",
    "protocol": {"inference_mode": "slide", "crop_size": [64, 64], "scales": [1.0], "flip": False},
    "num_images": 7,
    "metrics": {"mean_iou": 0.43512, "mean_accuracy": math.nan, "overall_accuracy": 0.8, "mean_dice": 0.5},
    "per_category": {"class 0": {"iou": 0.5, "accuracy": 0.6}, "class 1": {"iou": math.nan}, "class 2": {"iou": 0.25}},
}


@pytest.fixture
def directory(tmp_path, kind):
    model = tiny_model(kind, palette=[[0, 1, 2], [255, 0, 0], [9, 9, 9]])
    model.save_pretrained(tmp_path / "my-model")
    return tmp_path / "my-model"


def test_a_new_card_is_complete_and_has_no_numbers(directory):
    path = write_model_card(directory, base_model="openai/clip-vit-base-patch16", dataset="someone/streets")
    card = ModelCard(path.read_text())
    front = card.data.to_dict()
    assert front == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "base_model": "openai/clip-vit-base-patch16",
        "datasets": ["someone/streets"],
        "tags": ["denseclip", "clip", "semantic-segmentation", "image-segmentation", "vision"],
    }
    for heading in ("# my-model", "## How to use", "## Classes", "## Limits and biases", "## Citation"):
        assert re.search(f"^{heading}$", card.text, re.MULTILINE)
    assert "| 1 | class 1 | `#ff0000` (255, 0, 0) |" in card.text
    assert "mIoU" not in path.read_text() and "Rao" in card.text


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
    results = re.search(r"\n<!-- generated: results -->.*?<!-- end of generated: results -->\n", after, re.DOTALL)
    assert after.replace(results[0], "").split("---", 2)[2].rstrip() == before.split("---", 2)[2].rstrip()


def test_writing_again_keeps_what_a_person_edited(directory):
    path = write_model_card(directory, training={"Steps": 3})
    text = path.read_text().replace("license: unknown", "license: cc-by-4.0\nlanguage: en")
    text = text.replace("## Limits and biases", "## Limits, as found").replace("# my-model", "# Streets")
    limits = re.search(r"<!-- generated: limits -->.*?<!-- end of generated: limits -->\n", text, re.DOTALL)
    text = text.replace(limits[0], "## My own limits\n\nIt fails at night.\n") + "\nA last word.\n"
    path.write_text(text)
    write_model_card(directory, training={"Steps": 80_000}, results=RESULTS)
    again = path.read_text()
    card = ModelCard(again)
    assert card.data.license == "cc-by-4.0" and card.data.language == "en"
    assert "# Streets" in again and "It fails at night." in again and "A last word." in again
    assert "Limits, as found" not in again and "generated: limits" not in again
    assert "| Steps | 80000 |" in again and "| Steps | 3 |" not in again and "## Results" in again
    before = again
    assert write_model_card(directory).read_text() == before  # nothing new is known: nothing changes


def test_what_it_started_from_stays_known(directory):
    write_model_card(directory, base_model="openai/x", source="a friend")
    text = write_model_card(directory, license="mit").read_text()
    assert "| Started from | `openai/x` |" in text and "| Weights | a friend |" in text and "license: mit" in text


def test_a_readme_without_front_matter_is_kept(directory):
    (directory / "README.md").write_text("# Mine\n\nAll mine.\n")
    card = ModelCard(update_results(directory, RESULTS).read_text())
    assert card.text.lstrip().startswith("# Mine\n\nAll mine.\n") and "| 43.51 |" in card.text
    assert card.data.pipeline_tag == "image-segmentation" and "## How to use" not in card.text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("someone/streets", "someone/streets"),
        ("/data/of/mine/streets", "streets"),
        ("/data/of/streets/data", "streets data"),
        ("scene_parse_150", "scene_parse_150"),
    ],
)
def test_names_that_others_are_told(name, shown):
    assert shown_name(name) == shown


@pytest.mark.parametrize("key", ["dataset", "split", "metrics"])
def test_results_without_their_origin_are_refused(directory, key):
    with pytest.raises(ValueError, match=f"lack `{key}`"):
        update_results(directory, {k: v for k, v in RESULTS.items() if k != key})
    assert not (directory / "README.md").exists()


def test_local_paths_stay_out_of_the_front_matter(directory, tmp_path):
    path = write_model_card(directory, base_model=str(tmp_path), dataset="data/streets/val", training={"a|b": "c|d"})
    front = yaml.safe_load(path.read_text().split("---")[1])
    assert "base_model" not in front and "datasets" not in front
    assert "c\\|d" in path.read_text()


def test_of_local_paths_only_the_last_part_is_told(directory, tmp_path):
    for name in ("clip", "streets"):
        (tmp_path / name).mkdir()
    results = {**RESULTS, "dataset": str(tmp_path / "streets")}
    path = write_model_card(
        directory, base_model=str(tmp_path / "clip"), dataset=str(tmp_path / "streets"), results=results
    )
    text = path.read_text()
    assert str(tmp_path) not in text and "| streets | val |" in text
    assert "| Started from | `clip` (a local folder) |" in text and "| Data | `streets` (a local folder) |" in text
    dataset = ModelCard(text).data.to_dict()["model-index"][0]["results"][0]["dataset"]
    assert (dataset["name"], dataset["type"]) == ("streets", "streets")


def test_results_of_training(kind):
    config = tiny_config(kind, inference_mode="slide", crop_size=64, stride=43)
    metrics = {"eval_mean_iou": 0.5, "eval_loss": 1.0, "eval_per_category_iou": [0.1, 0.2, 0.3]}
    results = results_of_training(metrics, config, "someone/streets", "val", {"shortest_edge": 64, "height": None})
    assert results["metrics"] == {"mean_iou": 0.5}
    assert results["protocol"]["crop_size"] == [64, 64] and results["protocol"]["size"] == {"shortest_edge": 64}
    assert results["per_category"]["class 2"] == {"iou": 0.3}


def test_environment_names_versions_and_hardware():
    found = environment()
    assert "torch" in found["Versions"] and found["Hardware"]


def test_results_file(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    assert read_results(tmp_path / "r.json")["num_images"] == 7
    with pytest.raises(ValueError, match="can't be read"):
        read_results(tmp_path / "none.json")


def test_snippets_are_valid_python(directory):
    text = write_model_card(directory).read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        compile(snippet, "card", "exec")
