"""A tiny CLIP for the built-in example, with random weights or pretrained on crops of drawn scenes."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..model.configuration_clip_resnet import CLIPResNetConfig
from ..model.modeling_clip_resnet import CLIPResNetModel
from ..training import MAX_TOKENS, learn_tokenizer
from .captions import PHOTOS, Crop, crops, subject
from .scenes import COLORS, DRAWING_VERSION, MATERIALS, NAMES, draw_scene, unless_made


logger = logging.getLogger(__name__)

IMAGE_SIZE = 96
PROJECTION_DIM = 64
VISION_CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {
        "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "patch_size": 16, "image_size": IMAGE_SIZE,
    },
    "resnet": {
        "embedding_size": 16, "depths": [1, 1, 1, 1], "num_attention_heads": 8, "image_size": IMAGE_SIZE,
        "projection_dim": PROJECTION_DIM,
    },
}  # fmt: skip
CLIP_VERSION = 2  # raise it when a seed makes something else
KINDS_PER_CLASS = 3  # crops of a class in a batch


def example_tokenizer() -> CLIPTokenizer:
    """A tokenizer that knows the example's class names, adjectives and captions as whole words."""
    adjectives = [*COLORS, *(name for table in MATERIALS.values() for name in table)]
    return learn_tokenizer([*(photo.format(subject(name)) for photo in PHOTOS for name in NAMES), *adjectives])


def example_clip_model(tokenizer: CLIPTokenizer, vision: str = "resnet", seed: int = 0) -> CLIPModel:
    """A small CLIP with random weights for 96 x 96 pixels and that tokenizer; `vision` is "resnet" or "vit"."""
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": MAX_TOKENS, "projection_dim": PROJECTION_DIM,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    parts: Any = {"text_config": text, "vision_config": VISION_CONFIGS[vision], "projection_dim": PROJECTION_DIM}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPResNetModel(CLIPResNetConfig(**parts)) if vision == "resnet" else CLIPModel(CLIPConfig(**parts))
    return model.eval()


def make_example_clip(
    output_dir: str | os.PathLike, vision: str = "resnet", seed: int = 0, pretraining_steps: int = 0
) -> Path:
    """
    Write a small CLIP (model, tokenizer, image processor) as `from_pretrained` reads it, and return its path.

    A folder made before with the same arguments is kept.

    Args:
        output_dir (`str` or `os.PathLike`): a new directory.
        vision (`str`): image tower, "resnet" or "vit".
        seed (`int`): of the weights.
        pretraining_steps (`int`): of [`pretrain_example_clip`], whose report is kept as `pretraining.json`.

    Raises:
        FileExistsError: if `output_dir` holds something else.
    """
    versions = [CLIP_VERSION, DRAWING_VERSION]
    made_with = {"vision": vision, "seed": seed, "steps": pretraining_steps, "versions": versions}
    with unless_made(Path(output_dir), made_with) as new:
        if new is not None:
            tokenizer = example_tokenizer()
            model = example_clip_model(tokenizer, vision, seed)
            if pretraining_steps:
                report = pretrain_example_clip(model, tokenizer, pretraining_steps, seed=seed)
                (new / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n")
            size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
            for part in (model, tokenizer, CLIPImageProcessorPil(size=size, do_center_crop=False)):
                part.save_pretrained(new)
    return Path(output_dir)


def pretrain_example_clip(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    steps: int = 600,
    num_scenes: int = 400,
    num_val_scenes: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Train the model in place with CLIP's contrastive loss on crops of drawn scenes and their captions.

    Returns:
        `dict`: "zero_shot_accuracy_before" and "zero_shot_accuracy_after" (0 to 1, mean over classes, on crops of
        scenes of the "val" split), "per_class_accuracy", and "losses" of all steps.
    """
    rng = np.random.default_rng(seed)
    found = cut_out(num_scenes, "train", seed)
    pixels, held_out = stacked(found), cut_out(num_val_scenes, "val", seed)
    kinds: dict[str, dict[str, list[int]]] = {name: {} for name in NAMES}
    for number, crop in enumerate(found):
        kinds[crop.name].setdefault(crop.adjective, []).append(number)
    before = zero_shot_accuracy(model, tokenizer, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.02)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    losses = []
    model.train()
    for _ in tqdm(range(steps), desc="Contrastive pretraining", unit="step", disable=steps < 20):
        numbers, captions = crop_batch(kinds, rng)
        mirrored = torch.from_numpy(rng.random(len(numbers)) < 0.5)[:, None, None, None]
        batch = torch.where(mirrored, pixels[numbers].flip(-1), pixels[numbers])
        words = tokenizer(captions, padding=True, return_tensors="pt")
        loss = model(**words, pixel_values=normalized(batch), return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP does (section 2.5)
        losses.append(loss.item())
    after = zero_shot_accuracy(model.eval(), tokenizer, held_out)
    means = (float(np.mean(list(accuracy.values()))) for accuracy in (before, after))
    report = dict(zip(("zero_shot_accuracy_before", "zero_shot_accuracy_after"), means, strict=True))
    logger.info("contrastive pretraining: %s", report)
    return {**report, "per_class_accuracy": after, "losses": losses}


def cut_out(num_scenes: int, split: str, seed: int) -> list[Crop]:
    """Crops of the first scenes of a split."""
    rng = np.random.default_rng((seed, num_scenes))
    scenes = tqdm(range(num_scenes), desc=f"Drawing {split} scenes", unit="scene", disable=num_scenes < 20)
    return [crop for index in scenes for crop in crops(draw_scene(index, seed=seed, split=split), rng)]


def crop_batch(kinds: dict[str, dict[str, list[int]]], rng: np.random.Generator) -> tuple[list[int], list[str]]:
    """
    Numbers of crops (by class name and adjective in `kinds`) and their captions, none of them true of two crops.

    A class gives either one crop by its bare name, or some with different adjectives.
    """
    numbers, captions = [], []
    for name, by_adjective in kinds.items():
        bare = rng.random() < 0.5
        for adjective in rng.permutation(list(by_adjective))[: 1 if bare else KINDS_PER_CLASS].tolist():
            numbers.append(int(rng.choice(by_adjective[adjective])))
            captions.append(str(rng.choice(PHOTOS)).format(subject(name, "" if bare else adjective)))
    return numbers, captions


def stacked(found: list[Crop]) -> torch.Tensor:
    """Crops of any size as a uint8 tensor (N, 3, 96, 96)."""
    small = [np.array(crop.image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)) for crop in found]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) as CLIP's image processor would give it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels / 255 - mean) / std


@torch.no_grad()
def zero_shot_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, found: list[Crop]) -> dict[str, float]:
    """By class name, the share (0 to 1) of crops that lie nearest to "a photo of" their own class."""
    words = tokenizer([PHOTOS[0].format(subject(name)) for name in NAMES], padding=True, return_tensors="pt")
    right: dict[str, list[bool]] = {name: [] for name in NAMES}
    for start in range(0, len(found), 64):
        batch = found[start : start + 64]
        guesses = model(**words, pixel_values=normalized(stacked(batch))).logits_per_image.argmax(-1).tolist()
        for crop, guess in zip(batch, guesses, strict=True):
            right[crop.name].append(NAMES[guess] == crop.name)
    return {name: sum(hits) / len(hits) for name, hits in right.items() if hits}
