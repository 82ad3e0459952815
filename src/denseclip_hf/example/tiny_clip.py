"""A tiny CLIP for the built-in example: a byte-level BPE tokenizer of its own, and contrastive pretraining."""

import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..model.configuration_clip_resnet import CLIPResNetConfig
from ..model.modeling_clip_resnet import CLIPResNetModel
from .captions import PHOTOS, caption, crops, subject
from .scenes import CLASSES, DRAWING_VERSION, Scene, draw_scene, finished_folder


logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
MAX_TOKENS = 77
IMAGE_SIZE = 96
PROJECTION_DIM = 64
VISION_CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "patch_size": 16,
        "image_size": IMAGE_SIZE,
    },
    "resnet": {
        "embedding_size": 16,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": 8,
        "image_size": IMAGE_SIZE,
        "projection_dim": PROJECTION_DIM,
    },
}
# Bumped when the same seed no longer gives the same model, so that one on disk is made anew.
CLIP_VERSION = 1
# Captions name crops of the same class only together with different adjectives, so that each is true of one crop.
CROPS_PER_CLASS = 3
SCENES_PER_BATCH = 32
SCENE_STEP_EVERY = 4


def example_corpus(num_scenes: int = 60, seed: int = 0) -> list[str]:
    """Sentences about the example's classes and scenes, and general words a user may type as a new class name."""
    more = (
        "building bridge truck bus bicycle dog cat horse sign lamp fence wall roof window door field forest river sand"
    )
    names = [*CLASSES, *more.split()]
    photos = [template.format(subject(name)) for template in PHOTOS for name in names]
    scenes = [draw_scene(index, seed=seed, size=(64, 48)) for index in range(num_scenes)]
    named = [subject(thing.name, thing.adjective) for scene in scenes for thing in scene.things]
    return [*names, *photos, *named, *(caption(scene) for scene in scenes)]


def make_example_tokenizer(corpus: list[str], vocab_size: int = 1024) -> CLIPTokenizer:
    """Train a byte-level BPE by CLIP's conventions: lower case, `</w>` ends a word, start and end tokens come last.

    Every byte is in the vocabulary, inside and at the end of a word, so that no text is ever unknown.

    Args:
        corpus (`list[str]`): sentences to learn from.
        vocab_size (`int`): the most tokens there may be; the bytes and the two special tokens take 514.

    Raises:
        ValueError: for a vocabulary too small for the bytes.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [letter + "</w>" for letter in letters]
    room = vocab_size - len(letters) - len(endings) - len(SPECIAL_TOKENS)
    if room < 0:
        raise ValueError(f"vocab_size must be at least {vocab_size - room}, got {vocab_size}")
    # An empty CLIPTokenizer lends its rules for splitting text, so that merges are learnt on what it will be given.
    rules = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=letters,
        # Numbered here, for otherwise they are numbered as a hash map yields them, and with them ties among merges.
        special_tokens=endings,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    merges: list[Any] = [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*letters, *endings, *(first + second for first, second in merges), *SPECIAL_TOKENS])
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def example_clip_model(tokenizer: CLIPTokenizer, vision: str = "resnet", seed: int = 0) -> CLIPModel:
    """A small CLIP with random weights for 96 x 96 pixels and that tokenizer; `vision` is "resnet" or "vit".

    Raises:
        ValueError: for another `vision`.
    """
    if vision not in VISION_CONFIGS:
        raise ValueError(f"vision must be one of {sorted(VISION_CONFIGS)}, got {vision!r}")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": PROJECTION_DIM,
    }
    parts: dict[str, Any] = {
        "text_config": text,
        "vision_config": VISION_CONFIGS[vision],
        "projection_dim": PROJECTION_DIM,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPResNetModel(CLIPResNetConfig(**parts)) if vision == "resnet" else CLIPModel(CLIPConfig(**parts))
    return model.eval()


def make_example_clip(
    output_dir: str | os.PathLike, vision: str = "resnet", seed: int = 0, pretraining_steps: int = 0
) -> Path:
    """Write a small CLIP (model, tokenizer, image processor) as `from_pretrained` reads it, and return its path.

    With `pretraining_steps` it is first pretrained (`pretrain_example_clip`), whose report is kept beside it as
    `pretraining.json`. A folder made before with the same arguments is kept.

    Raises:
        FileExistsError: when `output_dir` holds something that this function did not write.
        ValueError: for an unknown `vision`.
    """
    output_dir = Path(output_dir)
    made_with = {
        "vision": vision,
        "seed": seed,
        "steps": pretraining_steps,
        "version": [CLIP_VERSION, DRAWING_VERSION],
    }
    with finished_folder(output_dir, made_with) as folder:
        if folder is not None:
            tokenizer = make_example_tokenizer(example_corpus(seed=seed))
            model = example_clip_model(tokenizer, vision, seed)
            if pretraining_steps:
                report = pretrain_example_clip(model, tokenizer, pretraining_steps, seed=seed)
                (folder / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n")
            size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            CLIPImageProcessorPil(size=size, do_center_crop=False).save_pretrained(folder)
    return output_dir


@dataclass(frozen=True)
class CaptionedScenes:
    """Pictures as uint8 tensors (N, 3, 96, 96): whole scenes, and crops found by class name and adjective."""

    scenes: list[Scene]
    scene_pixels: torch.Tensor
    crop_pixels: torch.Tensor
    crop_names: list[str]
    crop_index: dict[str, dict[str, list[int]]]

    @classmethod
    def draw(cls, count: int, split: str, seed: int) -> "CaptionedScenes":
        """Draw the first `count` scenes of a split and cut them up."""
        progress = tqdm(range(count), desc=f"Drawing {split} scenes", unit="scene", disable=count < 20)
        scenes = [draw_scene(index, seed=seed, split=split) for index in progress]
        cut = [crop for scene in scenes for crop in crops(scene)]
        index: dict[str, dict[str, list[int]]] = {name: {} for name in CLASSES}
        for number, crop in enumerate(cut):
            index[crop.name].setdefault(crop.adjective, []).append(number)
        pictures = stacked([crop.image for crop in cut])
        return cls(scenes, stacked([scene.image for scene in scenes]), pictures, [crop.name for crop in cut], index)

    def crop_batch(self, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
        """Pixels and captions of crops, no two captions true of one crop.

        A class gives either one crop by its bare name, or some with different adjectives.
        """
        numbers, captions = [], []
        for name, kinds in self.crop_index.items():
            if not kinds:
                continue
            chosen = rng.permutation(list(kinds))[:CROPS_PER_CLASS].tolist()
            bare = rng.random() < 0.5
            for adjective in chosen[:1] if bare else chosen:
                numbers.append(int(rng.choice(kinds[adjective])))
                captions.append(str(rng.choice(PHOTOS)).format(subject(name, "" if bare else adjective)))
        return self.crop_pixels[numbers], captions

    def scene_batch(self, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
        """Pixels and captions of whole scenes, all captions different."""
        chosen: dict[str, int] = {}
        for number in rng.permutation(len(self.scenes))[:SCENES_PER_BATCH].tolist():
            chosen.setdefault(caption(self.scenes[number], variant=int(rng.integers(1000))), number)
        return self.scene_pixels[list(chosen.values())], list(chosen)


def stacked(images: list[Image.Image]) -> torch.Tensor:
    """Pictures of any size as a uint8 tensor (N, 3, 96, 96)."""
    small = [np.array(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) as CLIP's image processor would give it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels / 255 - mean) / std


def pretrain_example_clip(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    steps: int = 600,
    num_scenes: int = 400,
    num_val_scenes: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the model in place with CLIP's contrastive loss on drawn scenes and crops of them.

    No batch holds a caption that is true of two of its pictures as far as the drawing knows: see
    `CaptionedScenes.crop_batch`. Whole scenes have batches of their own, since a crop's caption is true of scenes too.

    Returns:
        `dict`: "zero_shot_accuracy_before" and "zero_shot_accuracy_after" (0…1, mean over classes, on crops of scenes
        of the "val" split), "per_class_accuracy", "chance", "first_loss" and "last_loss" (means over 10 crop steps).
    """
    data = CaptionedScenes.draw(num_scenes, "train", seed)
    held_out = CaptionedScenes.draw(num_val_scenes, "val", seed)
    before = zero_shot_accuracy(model, tokenizer, held_out)
    losses = contrastive_training(model, tokenizer, data, steps, learning_rate, seed)
    after = zero_shot_accuracy(model, tokenizer, held_out)
    report = {
        "zero_shot_accuracy_before": float(np.mean(list(before.values()))),
        "zero_shot_accuracy_after": float(np.mean(list(after.values()))),
        "per_class_accuracy": after,
        "chance": 1 / len(CLASSES),
        "first_loss": float(np.mean(losses[:10])),
        "last_loss": float(np.mean(losses[-10:])),
    }
    logger.info("contrastive pretraining: %s", report)
    return report


def contrastive_training(
    model: CLIPModel, tokenizer: CLIPTokenizer, data: CaptionedScenes, steps: int, learning_rate: float, seed: int
) -> list[float]:
    """AdamW with warm-up and cosine decay; returns the losses of the crop steps."""
    rng = np.random.default_rng((seed, len(SPECIAL_TOKENS)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.02)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    losses = []
    model.train()
    progress = tqdm(range(steps), desc="Contrastive pretraining", unit="step", disable=steps < 20)
    for step in progress:
        of_scenes = step % SCENE_STEP_EVERY == SCENE_STEP_EVERY - 1
        pixels, captions = data.scene_batch(rng) if of_scenes else data.crop_batch(rng)
        mirrored = torch.from_numpy(rng.random(len(pixels)) < 0.5)
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        words = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        loss = model(**words, pixel_values=normalised(pixels), return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as CLIP does (section 2.5)
        if not of_scenes:
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.2f}")
    model.eval()
    return losses


@torch.no_grad()
def zero_shot_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, data: CaptionedScenes) -> dict[str, float]:
    """By class name, the share (0…1) of crops that lie nearest to "a photo of" their own class."""
    prompts = [PHOTOS[0].format(subject(name)) for name in CLASSES]
    words = tokenizer(prompts, padding=True, return_tensors="pt")
    guesses = []
    for pixels in data.crop_pixels.split(64):
        guesses += model(**words, pixel_values=normalised(pixels)).logits_per_image.argmax(-1).tolist()
    right: dict[str, list[bool]] = {}
    for name, guess in zip(data.crop_names, guesses, strict=True):
        right.setdefault(name, []).append(CLASSES[guess] == name)
    return {name: sum(right[name]) / len(right[name]) for name in CLASSES if name in right}
