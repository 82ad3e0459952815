"""What an evaluation takes from where, and what it refuses before or says after the work."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from denseclip_hf import DenseCLIPForSemanticSegmentation, DenseCLIPTrainingArguments
from denseclip_hf.evaluation.measure import EvaluationArguments, measure
from denseclip_hf.evaluation.report import seen_and_unseen
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from denseclip_hf.training.recipe import DataArguments, ModelArguments
from denseclip_hf.training.run_directory import recipe_of
from denseclip_hf.training.tokenizer import learn_tokenizer
from helpers.models import COST_AGGREGATION, tiny_config, tiny_model, varied
from helpers.training import write_folder


@pytest.fixture
def arguments(tmp_path):
    """Makes the arguments for a model of sky, road and car, and twelve such pictures without a validation split."""
    model = varied(tiny_model())
    model.config.id2label = {0: "sky", 1: "road", 2: "car"}
    for part in (model, DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})):
        part.save_pretrained(tmp_path / "model")
    data = write_folder(tmp_path / "data", 12)

    def make(**options):
        names = {name: str(tmp_path / name) for name in ("model", "output_dir")}
        return EvaluationArguments(dataset=str(data), **names, **options)

    return make


@pytest.mark.parametrize("from_recipe", ["", "the model's", "the run's", "of a model called checkpoint-4"])
def test_data_are_read_as_in_training(arguments, tmp_path, from_recipe):
    for mask in (tmp_path / "data" / "masks").iterdir():
        ids = np.array(Image.open(mask))
        Image.fromarray(np.where(ids == 255, 100, ids).astype(np.uint8)).save(mask)
    options = {"ignore_index": 100, "validation_fraction": 0.5}
    args = arguments(**{} if from_recipe else options)
    if from_recipe:
        recipe = {"dataset": str(tmp_path / "data"), **options, "train_split": None}
        (tmp_path / "model" / "recipe.json").write_text(json.dumps(recipe))
        if from_recipe != "the model's":
            checkpoint = shutil.copytree(tmp_path / "model", tmp_path / "model" / "checkpoint-4")
            (tmp_path / "model" / "recipe.json").write_text(json.dumps(recipe | {"ignore_index": 0}))
            file = checkpoint / "recipe.json"
            file.rename(tmp_path / "model" / "recipe.json") if from_recipe == "the run's" else None
            args = replace(args, model=str(checkpoint))
    assert 1 < measure(args)["num_images"] < 12
    assert measure(replace(args, validation_fraction=0.01, ignore_index=100))["num_images"] == 1


def test_the_launchers_precision_does_not_count(arguments, monkeypatch):
    """`accelerate launch` gives what its own config says in the environment; `dtype` is what is asked for."""
    seen = []
    forward = DenseCLIPForSemanticSegmentation.forward
    monkeypatch.setattr(
        DenseCLIPForSemanticSegmentation,
        "forward",
        lambda *args, **kwargs: seen.append(torch.is_autocast_enabled("cpu")) or forward(*args, **kwargs),
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert measure(arguments(device="cpu"))["protocol"]["dtype"] == "float32" and seen and not any(seen)


def test_labels_are_reduced_as_in_training(arguments, tmp_path):
    """Without a word they would be read as one class too high wherever the last class is missing."""
    for mask in (tmp_path / "data" / "masks").iterdir():
        ids = np.array(Image.open(mask))
        Image.fromarray(np.where(ids == 255, 0, ids + 1).astype(np.uint8)).save(mask)
    data, training = DataArguments(str(tmp_path / "data"), do_reduce_labels=True), DenseCLIPTrainingArguments("unused")
    (tmp_path / "model" / "recipe.json").write_text(json.dumps(recipe_of(ModelArguments(), data, training)))
    asked = replace(arguments(), do_reduce_labels=True)
    assert measure(arguments())["metrics"] == pytest.approx(measure(asked)["metrics"], nan_ok=True)


def test_the_same_data_elsewhere_are_pointed_out(arguments, tmp_path, caplog):
    (tmp_path / "model" / "recipe.json").write_text(json.dumps({"dataset": "/elsewhere/data", "ignore_index": 0}))
    measure(arguments())
    assert f"trained on /elsewhere/data, so flags alone say how {tmp_path / 'data'} is read" in caplog.text


def test_splits_are_those_of_training(arguments, tmp_path):
    for name, count in (("fold_1", 3), ("fold_2", 2)):
        write_folder(tmp_path / "folds" / name, count)
    shutil.copy(tmp_path / "data" / "classes.json", tmp_path / "folds")
    splits = {"train_split": "fold_1", "validation_split": "fold_2"}
    training = DenseCLIPTrainingArguments("unused")
    recipe = recipe_of(ModelArguments(), DataArguments(str(tmp_path / "folds"), **splits), training)
    (tmp_path / "model" / "recipe.json").write_text(json.dumps(recipe))
    report = measure(replace(arguments(), dataset=str(tmp_path / "folds")))
    assert (report["split"], report["num_images"]) == ("fold_2", 2)


@pytest.mark.parametrize("text", ["[]", "{", '{"dataset": "elsewhere", "ignore_index": 0}', '{"steps": 3}'])
def test_other_recipes_beside_a_model_change_nothing(arguments, tmp_path, text):
    (tmp_path / "model" / "recipe.json").write_text(text)
    assert measure(arguments())["num_images"] == 1


@pytest.mark.parametrize(
    "options", [{}, {"inference_mode": "slide"}, {"scales": [1.0, 1.5]}], ids=["whole", "slide", "multi-scale"]
)
def test_scores_that_are_not_finite_end_it(arguments, tmp_path, options):
    model = DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.decode_head.classifier.bias[1] = float("nan")
    model.save_pretrained(tmp_path / "model")
    words = r"\.jpg: the model's scores are NaN or infinite and tell no class: .* use bfloat16 or float32"
    with pytest.raises(ValueError, match=words):
        measure(arguments(**options))
    assert not (tmp_path / "output_dir" / "evaluation.json").exists()


def test_data_without_a_validation_split_are_refused(arguments):
    with pytest.raises(ValueError, match="data has no validation split: name one with `--split`"):
        measure(arguments(validation_fraction=0.0))


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
    report = measure(args)
    scores, classes = report["metrics"], report["per_category"]
    assert list(classes) == ["sky", "road", "car"]
    assert scores["mean_iou_unseen"] == pytest.approx(classes["car"]["iou"], nan_ok=True)
    seen = (classes["sky"]["iou"] + classes["road"]["iou"]) / 2
    assert scores["mean_iou_seen"] == pytest.approx(seen)
    assert "mIoU, unseen classes" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match="zebra"):
        measure(replace(args, unseen=["zebra"]))


def test_the_harmonic_mean_of_seen_and_unseen():
    scores = seen_and_unseen([0.5, 0.7, 0.2, float("nan")], ["a", "b", "c", "d"], ["c", "d"])
    assert scores["mean_iou_seen"] == pytest.approx(0.6) and scores["mean_iou_unseen"] == pytest.approx(0.2)
    assert scores["harmonic_mean_iou"] == pytest.approx(0.3)
