"""The training script leaves a complete directory: card, recipe, results and a picture."""

import json

import datasets
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from denseclip_hf import DenseCLIPTrainingArguments
from denseclip_hf.cli.train import main
from denseclip_hf.training.card import training_summary
from denseclip_hf.training.recipe import DataArguments, ModelArguments
from denseclip_hf.training.run_directory import recipe_of
from helpers.images import pictures
from helpers.training import TINY, TINY_CLIP, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", 6)


def train(tmp_path, **options):
    """`denseclip train` for two steps into `tmp_path / "streets"`."""
    options |= {"clip_config": json.dumps(TINY_CLIP), "config": json.dumps(TINY), "crop_size": 64}
    options |= {"scale_long": 128, "max_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 2}
    options |= {"output_dir": tmp_path / "streets", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    main([part for name, value in options.items() for part in (f"--{name}", str(value))])


def test_training_writes_the_card(folder, tmp_path):
    train(tmp_path, dataset=folder)
    metrics = json.loads((tmp_path / "streets" / "eval_results.json").read_text())
    card = ModelCard((tmp_path / "streets" / "README.md").read_text())
    (entry,) = card.data.to_dict()["model-index"]
    values = {m["name"]: m["value"] for m in entry["results"][0]["metrics"]}
    assert values["mIoU"] == round(metrics["eval_mean_iou"], 4) and entry["name"] == "streets"
    assert "| Steps | 2 |" in card.text and "| Batch size | 2 |" in card.text and "torch 2" in card.text
    assert "base_model" not in card.data.to_dict() and "datasets" not in card.data.to_dict()
    assert "| Weights | trained from random ones, nothing pretrained |" in card.text and str(tmp_path) not in card.text
    assert "![Prediction](example.png)" in card.text
    assert Image.open(tmp_path / "streets" / "example.png").width == 80


@pytest.mark.parametrize(
    "launcher, flags, expected",
    [
        ("bf16", {}, "bfloat16"),
        ("no", {}, "float32"),
        ("no", {"bf16": True}, "bfloat16"),
    ],
)
def test_a_card_tells_the_precision_that_counts_and_the_warm_up(tmp_path, monkeypatch, launcher, flags, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    args = DenseCLIPTrainingArguments(str(tmp_path), use_cpu=True, warmup_steps=0.05, **flags)
    told = training_summary(DataArguments(dataset="x"), args)
    assert told["Precision"] == expected and told["Schedule"] == "polynomial, 5 % of them warm-up"
    assert recipe_of(ModelArguments(), DataArguments(dataset="x"), args)["mixed_precision"] == args.mixed_precision


@pytest.mark.slow
def test_a_streamed_data_set_gets_its_card_too(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)  # 5 s a pass
    pictures_and_masks = {"image": datasets.Image(), "label": datasets.Image()}
    for split, count in (("train", 4), ("validation", 3)):
        rows = [{"image": each["image"], "label": Image.fromarray(each["mask"])} for each in pictures(count)]
        data = datasets.Dataset.from_list(rows, features=datasets.Features(pictures_and_masks))
        data.to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    train(tmp_path, dataset=tmp_path / "data", streaming=True, classes="sky,road,car")
    assert ", 3 images" in (tmp_path / "streets" / "README.md").read_text()
    assert Image.open(tmp_path / "streets" / "example.png").width == 80
