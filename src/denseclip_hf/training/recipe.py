"""From flags or a recipe file to data, model and trainer."""

import json
import logging
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, set_seed

from ..data import SegmentationData, check_dataset
from ..model.configuration_clip_resnet import clip_config_class, refuse_unknown_options
from ..model.configuration_denseclip import DenseCLIPConfig, refuse_if_frozen
from ..model.image_processing_denseclip import DenseCLIPImageProcessorPil
from ..model.loading_denseclip import load_clip, load_pretrained
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from ..model.towers_denseclip import tower_of
from ..options import DataArguments, ModelArguments
from ..transforms import AugmentedDataset, AugmentedStream, TrainTransform
from .arguments import DenseCLIPTrainingArguments
from .tokenizer import learn_tokenizer
from .trainer import DenseCLIPTrainer


logger = logging.getLogger(__name__)

# Of each split, looked at before training.
CHECKED_SAMPLES = 20
SIZES = ("scale_long", "scale_short", "eval_scale_short")


def load_data(args: DataArguments) -> SegmentationData:
    """
    The data set of `args`, checked on a sample of its files unless that is switched off.

    Raises:
        ValueError: with the first problem that the check found, and as [`load_segmentation_dataset`] does.
    """
    data = args.load(
        validation_split=args.validation_split,
        streaming=args.streaming,
        shuffle_buffer=args.shuffle_buffer,
        read_first=not args.check_data,  # the check does
    )
    if args.check_data:
        report = check_dataset(data, max_samples=CHECKED_SAMPLES)
        if not report.ok:
            looked_at = sum(split.num_checked for split in report.splits.values())
            raise ValueError(
                f"{report.problems[0]} Problems in a first look at {looked_at} samples: {len(report.problems)}; "
                f"`denseclip check-data {args.dataset} --full` names all."
            )
        if PartialState().is_main_process:
            logger.info("%s", report)
            if report.unseen_classes:
                all_seen = isinstance(data.train, Dataset) and len(data.train) <= CHECKED_SAMPLES
                logger.log(
                    logging.WARNING if all_seen else logging.INFO,
                    "%d of %d classes are in none of the masks looked at: %s. `denseclip check-data --full` looks at "
                    "all masks.",
                    len(report.unseen_classes),
                    len(data.id2label),
                    ", ".join(report.unseen_classes),
                )
    return data


def model_to_train(args: ModelArguments, data: SegmentationData, crop_size: int):
    """Model and tokenizer of `args` for the classes of `data`."""
    if args.model is not None:
        return _trained_model(args.model, args, data)
    palette = [list(color) for color in data.palette]
    own = _options(args.config, "config")
    options = {"semantic_loss_ignore_index": data.ignore_index, "palette": palette, **own}
    if args.balance_classes:
        options["class_weights"] = balanced_weights(data)
    clip: PreTrainedModel
    if clip_config := _options(args.clip_config, "clip_config"):
        if args.tokenizer is None:
            tokenizer = learn_tokenizer(data.id2label.values())  # a small one
        else:
            tokenizer = load_pretrained(AutoTokenizer, args.tokenizer)
        clip = _random_clip(clip_config, tokenizer)
    else:
        clip, tokenizer = load_clip(args.clip, args.tokenizer)
    options = {"id2label": data.id2label, "tokenizer": tokenizer, "image_size": crop_size, **options}
    backbone_config = _options(args.backbone_config, "backbone_config")
    backbone = AutoConfig.for_model(**{"model_type": "", **backbone_config}) if backbone_config else args.backbone
    if backbone is None:
        return DenseCLIPForSemanticSegmentation.from_clip(clip, **options), tokenizer
    return DenseCLIPForSemanticSegmentation.from_backbone(backbone, clip, **options), tokenizer


def balanced_weights(data: SegmentationData) -> list[float]:
    """
    For each class, the median of the classes' frequencies over its own (Eigen and Fergus 2015), counted among the
    pixels of the training images that show it; 1 for a class that none shows.
    """
    count = len(data.id2label)
    own, all_pixels = np.zeros(count), np.zeros(count)
    for sample in data.train or ():
        pixels = np.bincount(sample["mask"][sample["mask"] != data.ignore_index], minlength=count)
        own += pixels
        all_pixels += (pixels > 0) * pixels.sum()
    frequencies = own[own > 0] / all_pixels[own > 0]
    weights = np.ones(count)
    weights[own > 0] = np.median(frequencies) / frequencies
    return weights.round(4).tolist()


def _options(text: str, name: str) -> dict[str, Any]:
    """The options in a flag that is JSON."""
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'`{name}` is no JSON mapping of options such as {{"gamma_init": 1.0}} ({error}).') from error


def _trained_model(name: str, args: ModelArguments, data: SegmentationData):
    model = load_pretrained(DenseCLIPForSemanticSegmentation, name, dtype="float32")
    refuse_if_frozen(model.config.frozen_classes, "be trained")
    tokenizer = load_pretrained(AutoTokenizer, args.tokenizer or name)
    if _options(args.config, "config"):
        raise ValueError("`config` describes a fresh model; one that goes on (`model`) keeps its own.")
    model.config.semantic_loss_ignore_index = data.ignore_index
    names = list(data.id2label.values())
    if names != list(dict(model.config.id2label or {}).values()):
        if not args.replace_classes:
            shown = ", ".join([*names[:3], "…"][: len(names)])
            raise ValueError(
                f"the data has {len(names)} classes ({shown}) and {name} was trained on {model.config.num_labels}: "
                "pass --replace_classes to give the model the data's, starting the new ones from random weights."
            )
        model.set_classes(names, tokenizer)
        model.config.palette = [list(color) for color in data.palette]
    if args.balance_classes:
        model.config.class_weights = balanced_weights(data)
        model.config.validate_architecture()
    return model, tokenizer


def _random_clip(config: dict[str, Any], tokenizer) -> PreTrainedModel:
    """An image-text model with random weights, whose vocabulary is `tokenizer`'s."""
    text = {
        **config.get("text_config", {}),
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    clip_config = clip_config_class(config)(**{**config, "text_config": text})
    return tower_of(clip_config).model_class()(clip_config)


def make_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: DenseCLIPTrainingArguments, **kwargs
) -> tuple[DenseCLIPTrainer, SegmentationData]:
    """
    Data, model, augmentation and image processor of a recipe, put together.

    Raises:
        OSError, ValueError: with one sentence, for a model, data or options that cannot be used.
    """
    set_seed(args.seed)
    known, given = DenseCLIPConfig(), _options(model_args.config, "config")  # before the data, which may take long
    refuse_unknown_options(known, {name: value for name, value in given.items() if name not in known.to_dict()})
    native = data_args.native_resolution
    if native and any(getattr(data_args, name) != getattr(DataArguments, name) for name in SIZES):
        raise ValueError(f"`native_resolution` resizes nothing first: leave out {', '.join(SIZES)}.")
    data = load_data(data_args)
    if data_args.unseen:
        data = data.without(data_args.unseen)
    if data.train is None:
        raise ValueError(f"{data_args.dataset} has no training split: name it with `--train_split`.")
    model, tokenizer = model_to_train(model_args, data, data_args.crop_size)
    if native:
        model.config.inference_mode = "slide"
    short = data_args.scale_short or data_args.crop_size
    transform = TrainTransform(
        crop_size=data_args.crop_size,
        scale=None if native else (data_args.scale_long, short),
        ratio_range=(data_args.ratio_min, data_args.ratio_max),
        cat_max_ratio=data_args.cat_max_ratio,
        photometric=data_args.photometric,
        ignore_index=data.ignore_index,
        image_mean=model.tower.image_mean,
        image_std=model.tower.image_std,
    )
    # Files in a folder here are no stream, whatever `streaming` says.
    augmented = AugmentedStream if isinstance(data.train, IterableDataset) else AugmentedDataset
    eval_short = data_args.eval_scale_short or short
    # A larger evaluation keeps the same room for the long side.
    size = {"shortest_edge": eval_short, "longest_edge": max(data_args.scale_long * eval_short // short, eval_short)}
    image_processor = DenseCLIPImageProcessorPil(
        size=size,
        do_resize=not native,
        do_reduce_labels=data.do_reduce_labels,
        image_mean=model.tower.image_mean,
        image_std=model.tower.image_std,
    )
    trainer = DenseCLIPTrainer(
        model,
        args,
        train_dataset=augmented(data.train, transform, args.seed),
        eval_dataset=data.validation,
        image_processor=image_processor,
        tokenizer=tokenizer,
        **kwargs,
    )
    return trainer, data


__all__ = ["load_data", "make_trainer", "model_to_train"]
