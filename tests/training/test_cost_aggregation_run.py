"""A decoder that knows no classes, from the training command to the page of its card."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import pipeline

from denseclip_hf.cli import evaluate, predict, push, train
from denseclip_hf.example import example_clip_model, example_tokenizer
from helpers.models import COST_AGGREGATION
from helpers.training import write_folder


@pytest.mark.slow
def test_train_evaluate_predict_ask_and_share(tmp_path, capsys):
    tokenizer = example_tokenizer()
    for part in (example_clip_model(tokenizer, "vit"), tokenizer):
        part.save_pretrained(tmp_path / "clip")
    data, model = write_folder(tmp_path / "data", 9), tmp_path / "model"
    recipe = {
        "clip": str(tmp_path / "clip"), "dataset": str(data), "output_dir": str(model), "max_steps": 2,
        "config": COST_AGGREGATION | {"inference_mode": "slide_and_whole", "slide_size": 96},
        "per_device_train_batch_size": 2, "crop_size": 64, "scale_long": 128, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "unseen": ["car"],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train.main([str(tmp_path / "recipe.yaml")])
    report = tmp_path / "report"
    evaluate.main(["--model", str(model), "--dataset", str(data), "--unseen", "car", "--output_dir", str(report)])
    metrics = json.loads(next(report.glob("*.json")).read_text())["metrics"]
    assert {"mean_iou_seen", "mean_iou_unseen", "harmonic_mean_iou"} <= metrics.keys()

    image = next((data / "images").iterdir())
    for mode, words in (("slide_and_whole", []), ("whole", ["--words", "car,old bridge"])):
        out = tmp_path / mode
        options = ["--model", str(model), "--output_dir", str(out), "--inference_mode", mode, "--device", "cpu"]
        assert predict.main([str(image), *options, *words]) == 0
        assert Image.open(next(out.glob("*_mask.png"))).size == Image.open(image).size
    segment = pipeline("zero-shot-image-segmentation", model=str(model), device="cpu")
    assert {found["label"] for found in segment(str(image), candidate_labels=["car", "old bridge"])} <= {
        "car",
        "old bridge",
    }

    capsys.readouterr()
    push.main([str(model), "someone/words", "--license", "mit"])
    assert "Nothing was uploaded" in capsys.readouterr().out
    card = ModelCard.load(model / "README.md")
    assert "mIoU, unseen classes" in card.text and "any words" in card.text
