"""What the command adds to a measurement: data read as in training, and the result in the model's card."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from denseclip_hf import DenseCLIPForSemanticSegmentation, DenseCLIPTrainingArguments
from denseclip_hf.cli.evaluate import evaluate
from denseclip_hf.evaluation import EvaluationArguments
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from denseclip_hf.sharing import write_card
from denseclip_hf.training.recipe import DataArguments, ModelArguments
from denseclip_hf.training.run_directory import recipe_of
from denseclip_hf.training.tokenizer import learn_tokenizer
from helpers.evaluation import street_arguments
from helpers.models import COST_AGGREGATION, tiny_config
from helpers.training import write_folder


@pytest.fixture
def arguments(tmp_path):
    return street_arguments(tmp_path)


@pytest.mark.parametrize("whose", ["the model's", "the run's", "of a model called checkpoint-4"])
def test_data_are_read_as_in_training(arguments, tmp_path, whose):
    for mask in (tmp_path / "data" / "masks").iterdir():
        ids = np.array(Image.open(mask))
        Image.fromarray(np.where(ids == 255, 100, ids).astype(np.uint8)).save(mask)
    args, recipe_file = arguments(), tmp_path / "model" / "recipe.json"
    options = {"ignore_index": 100, "validation_fraction": 0.5, "train_split": None}
    recipe_file.write_text(json.dumps({"dataset": str(tmp_path / "data"), **options}))
    if whose != "the model's":
        checkpoint = shutil.copytree(tmp_path / "model", tmp_path / "model" / "checkpoint-4")
        if whose == "the run's":
            (checkpoint / "recipe.json").unlink()
        else:
            recipe_file.write_text(json.dumps({"dataset": str(tmp_path / "data"), **options, "ignore_index": 0}))
        args = replace(args, model=str(checkpoint))
    assert 1 < evaluate(args)["num_images"] < 12
    if whose == "the model's":  # but for what is asked
        assert evaluate(replace(args, validation_fraction=0.01, ignore_index=100))["num_images"] == 1


def test_labels_are_reduced_as_in_training(arguments, tmp_path):
    """Without a word they would be read as one class too high wherever the last class is missing."""
    for mask in (tmp_path / "data" / "masks").iterdir():
        ids = np.array(Image.open(mask))
        Image.fromarray(np.where(ids == 255, 0, ids + 1).astype(np.uint8)).save(mask)
    data, training = DataArguments(str(tmp_path / "data"), do_reduce_labels=True), DenseCLIPTrainingArguments("unused")
    (tmp_path / "model" / "recipe.json").write_text(json.dumps(recipe_of(ModelArguments(), data, training)))
    asked = replace(arguments(), do_reduce_labels=True)
    assert evaluate(arguments())["metrics"] == pytest.approx(evaluate(asked)["metrics"], nan_ok=True)


def test_the_same_data_elsewhere_are_pointed_out(arguments, tmp_path, caplog):
    (tmp_path / "model" / "recipe.json").write_text(json.dumps({"dataset": "/elsewhere/data", "ignore_index": 0}))
    evaluate(arguments())
    assert "/elsewhere/data" in caplog.text


def test_splits_are_those_of_training(arguments, tmp_path):
    for name, count in (("fold_1", 3), ("fold_2", 2)):
        write_folder(tmp_path / "folds" / name, count)
    shutil.copy(tmp_path / "data" / "classes.json", tmp_path / "folds")
    splits = {"train_split": "fold_1", "validation_split": "fold_2"}
    training = DenseCLIPTrainingArguments("unused")
    recipe = recipe_of(ModelArguments(), DataArguments(str(tmp_path / "folds"), **splits), training)
    (tmp_path / "model" / "recipe.json").write_text(json.dumps(recipe))
    report = evaluate(replace(arguments(), dataset=str(tmp_path / "folds")))
    assert (report["split"], report["num_images"]) == ("fold_2", 2)


@pytest.mark.parametrize("text", ["[]", "{", '{"dataset": "elsewhere", "ignore_index": 0}'])
def test_other_recipes_beside_a_model_change_nothing(arguments, tmp_path, text):
    (tmp_path / "model" / "recipe.json").write_text(text)
    assert evaluate(arguments())["num_images"] == 1


# The model's card


@pytest.fixture
def with_card(tmp_path, arguments):
    folder = shutil.copytree(tmp_path / "model", tmp_path / "streets")
    write_card(folder, base_model="openai/x")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMy own words.\n")
    return folder


def evaluate_into_card(arguments, folder, **options):
    evaluate(replace(arguments(), model=str(folder), **options))
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
        assert text.count(f"| data | held out of train | {words}") == 1, words
    report = json.loads((tmp_path / "output_dir" / "evaluation.json").read_text())
    protocol = {key: value for key, value in report["protocol"].items() if value is not None}
    written = {result.metric_name: result.metric_value for result in results if result.metric_args == protocol}
    expected = {"mIoU": "mean_iou", "mAcc": "mean_accuracy", "aAcc": "overall_accuracy"}
    assert written == pytest.approx({name: report["metrics"][key] for name, key in expected.items()}, abs=1e-4)


@pytest.mark.parametrize("options", [{"update_card": False}, {"max_images": 2}], ids=["switched off", "a part"])
def test_the_card_stays_as_it_is(arguments, with_card, options):
    before = (with_card / "README.md").read_text()
    assert evaluate_into_card(arguments, with_card, **options) == (before, [])


def test_a_model_without_card_gets_none(arguments, tmp_path):
    evaluate(arguments())
    assert not (tmp_path / "model" / "README.md").exists()


@pytest.mark.parametrize("fault", ["no permission", "broken"])
def test_a_card_that_takes_no_result_is_no_failure(arguments, with_card, monkeypatch, caplog, fault):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    if fault == "broken":
        (with_card / "README.md").write_text("---\ntags: [\n---\n\nMy own words.\n")
    else:
        monkeypatch.setattr("denseclip_hf.sharing.add_results", refuse)
    before = (with_card / "README.md").read_text()
    assert evaluate(replace(arguments(), model=str(with_card)))["num_images"] == 1
    assert str(with_card / "README.md") in caplog.text and (with_card / "README.md").read_text() == before


def test_classes_unknown_to_training_are_scored_apart(tmp_path):
    """A decoder that knows no classes is asked for the data's; what training did not know has a mean of its own."""
    tokenizer = learn_tokenizer(["sky", "road", "car"], vocab_size=540)
    clip_config = tiny_config().clip_config.to_dict()
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    clip_config["text_config"] |= sizes
    model = DenseCLIPForSemanticSegmentation.from_clip(
        CLIPModel(CLIPConfig(**clip_config)), ["sky", "road"], tokenizer, **COST_AGGREGATION, prompt_template="{}"
    )
    for part in (model, tokenizer, DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("# A model\n")
    data = write_folder(tmp_path / "data", 12)
    args = EvaluationArguments(
        dataset=str(data), model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), unseen=["car"]
    )
    report = evaluate(args)
    scores, classes = report["metrics"], report["per_category"]
    assert list(classes) == ["sky", "road", "car"]
    assert scores["mean_iou_unseen"] == pytest.approx(classes["car"]["iou"], nan_ok=True)
    seen = (classes["sky"]["iou"] + classes["road"]["iou"]) / 2
    assert scores["mean_iou_seen"] == pytest.approx(seen)
    assert "mIoU, unseen classes" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match="zebra"):
        evaluate(replace(args, unseen=["zebra"]))
    report = evaluate(replace(args, unseen=[], leave_out=["car"]))
    assert report["metrics"]["mean_iou"] == pytest.approx(seen) and report["protocol"]["leave_out"] == ["car"]
    assert report["classes_in_mean_iou"] == len(report["per_category"]) - 1
