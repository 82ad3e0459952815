"""The card of a model that was just trained: its recipe, its results and an image."""

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data import SegmentationData
from ..evaluation import protocol_of
from ..inference import Segmenter, overlay_with_legend
from ..model.image_processing_denseclip import DenseCLIPImageProcessorPil
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from ..options import DataArguments, ModelArguments
from ..sharing import shown_name, write_card
from .arguments import DenseCLIPTrainingArguments


IMAGE = "example.png"
PACKAGES = ("denseclip_hf", "torch", "transformers", "accelerate", "datasets")


def write_training_card(
    folder: Path,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: DenseCLIPTrainingArguments,
    data: SegmentationData,
    metrics: Mapping[str, Any],
) -> Path:
    """
    Complete the model of a finished run with its card and, where there is validation data, an image of what the model
    sees in the first of it.

    Args:
        folder (`Path`): where the model is written; the card's title is the name of `args.output_dir`.
        model_args, data_args, args: the run.
        data ([`SegmentationData`]): what it was trained on.
        metrics (`Mapping[str, Any]`): of `DenseCLIPTrainer.evaluate`; empty if nothing was measured.

    Returns:
        `Path` of the card.
    """
    parts = ((model_args.backbone, model_args.backbone_config), (model_args.clip, model_args.clip_config))
    bases = [model_args.model] if model_args.model else [name for name, config in parts if name and config == "{}"]
    results = None
    if metrics and data.validation is not None:
        model = DenseCLIPForSemanticSegmentation.from_pretrained(folder).eval()
        processor = DenseCLIPImageProcessorPil.from_pretrained(folder)
        results = {
            "dataset": data_args.dataset,
            "split": data.split_names.get("validation", f"held out of {data.split_names.get('train', 'the data')}"),
            "num_images": metrics["eval_num_images"],
            "protocol": protocol_of(model.config, processor.size if processor.do_resize else None)
            | {"dtype": precision(args)},
            "metrics": {key.removeprefix("eval_"): value for key, value in metrics.items()},
            "per_category": _per_category(metrics, model.config.id2label),
        }
        draw_example(model, processor, next(iter(data.validation))["image"]).save(folder / IMAGE)
    return write_card(
        folder,
        name=shown_name(str(args.output_dir)),
        base_model=bases,
        source=None if bases else "trained from random ones, nothing pretrained",
        dataset=data_args.dataset,
        training=training_summary(data_args, args),
        results=results,
        image=IMAGE if results else None,
    )


def _per_category(metrics: Mapping[str, Any], id2label: Mapping[int, str]) -> dict[str, dict[str, float]]:
    columns = {kind: metrics.get(f"eval_per_category_{kind}", []) for kind in ("iou", "accuracy")}
    return {
        name: {kind: values[index] for kind, values in columns.items() if index < len(values)}
        for index, name in id2label.items()
    }


def training_summary(data_args: DataArguments, args: DenseCLIPTrainingArguments) -> dict[str, Any]:
    """What decides the result of a training run, in words and numbers, with versions and hardware."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.warmup_steps
    warm_up = f"{100 * steps:g} % of them warm-up" if 0 < steps < 1 else f"{steps:g} warm-up steps"
    return {
        "Steps": args.max_steps if args.max_steps and args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        "Batch size": batch,
        "Optimizer": f"{getattr(args.optim, 'value', args.optim)}, weight decay {args.weight_decay:g}",
        "Learning rate": f"{args.learning_rate:g}, image encoder x {args.image_encoder_lr_multiplier:g}, "
        f"text encoder x {args.text_encoder_lr_multiplier:g}",
        "Schedule": f"{getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}, {warm_up}",
        "Crops": f"{data_args.crop_size} x {data_args.crop_size} pixels",
        "Precision": precision(args),
        "Seed": args.seed,
        **environment(),
    }


def environment() -> dict[str, str]:
    """Versions and hardware of this process."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    hardware = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    return {
        "Versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "Hardware": hardware or f"CPU ({platform.machine()})",
    }


def precision(args: DenseCLIPTrainingArguments) -> str:
    """What a run's matrices are multiplied in."""
    return {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(args.mixed_precision, args.mixed_precision)


def draw_example(
    model: DenseCLIPForSemanticSegmentation, processor: DenseCLIPImageProcessorPil, image: Any
) -> Image.Image:
    """`image` with `model`'s prediction painted over it, and a legend."""
    photo = image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    segmenter = Segmenter(model, processor)
    ids = segmenter([photo])[0].ids.numpy()
    return overlay_with_legend(photo, ids, model.config.id2label, segmenter.palette)


__all__ = ["draw_example", "training_summary", "write_training_card"]
