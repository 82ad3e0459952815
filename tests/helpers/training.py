"""Recipes, folders and trainers for runs of a few steps."""

import json
from pathlib import Path

from PIL import Image

from denseclip_hf import DenseCLIPImageProcessor
from denseclip_hf.training.arguments import DenseCLIPTrainingArguments
from denseclip_hf.training.recipe import DataArguments, ModelArguments
from denseclip_hf.training.trainer import DenseCLIPTrainer
from denseclip_hf.transforms import AugmentedDataset, TrainTransform
from helpers.images import pictures
from helpers.models import tiny_model


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


KINDS = [ModelArguments, DataArguments, DenseCLIPTrainingArguments]


TINY_CLIP = {
    "model_type": "clip_resnet",
    "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "vision_config": {"embedding_size": 4, "depths": [1, 1, 1, 1], "num_attention_heads": 4, "projection_dim": 12},
}


TINY = {"neck_hidden_size": 8, "decode_head_hidden_size": 8, "context_decoder_hidden_size": 8}
NO_DROPOUT = {"context_decoder_dropout": 0.0, "decode_head_dropout": 0.0, "drop_path_rate": 0.0}


def write_folder(root, count, suffix=".jpg"):
    """The same pictures as a user's folder: images, masks, classes.json."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for index, sample in enumerate(pictures(count)):
        sample["image"].save(root / "images" / f"{index}{suffix}")
        Image.fromarray(sample["mask"]).save(root / "masks" / f"{index}.png")
    (root / "classes.json").write_text(json.dumps({"id2label": {"0": "sky", "1": "road", "2": "car"}}))
    return root


def trainer_for(output_dir, model=None, samples=None, evaluate=True, **options):
    samples = pictures() if samples is None else samples
    transform = TrainTransform(crop_size=64, scale=(128, 64))
    defaults = {
        "max_steps": 4, "warmup_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "learning_rate": 1e-3,
    }  # fmt: skip
    return DenseCLIPTrainer(
        tiny_model() if model is None else model,
        DenseCLIPTrainingArguments(output_dir=str(output_dir), **{**defaults, **options}),
        train_dataset=AugmentedDataset(samples, transform),
        eval_dataset=samples if evaluate else None,
        image_processor=DenseCLIPImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}),
    )
