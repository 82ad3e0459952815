"""Loading pretrained CLIPs and backbones, and bringing their weights into a model."""

import copy
import os
from collections import Counter
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoTokenizer,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .configuration_clip_resnet import clip_config_class
from .towers_denseclip import tower_of


logger = logging.get_logger(__name__)

# Files with a tokenizer's vocabulary. Without any of them transformers may make up a CLIP's with an empty one.
TOKENIZER_FILES = {"tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"}


def load_pretrained(kind: Any, name: "str | os.PathLike", **options) -> Any:
    """
    `kind.from_pretrained(name, **options)`, whose failure says in one sentence what was asked for.

    Raises:
        OSError: if there is nothing of that name.
        ValueError: if files are missing or damaged, or it is nothing that this library takes.
    """
    if kind is AutoTokenizer and os.path.isdir(name) and not TOKENIZER_FILES & set(os.listdir(name)):
        raise ValueError(f"the folder {name} has no tokenizer: give one with the image-text model's tokenizer.json.")
    try:
        return kind.from_pretrained(name, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers fails in any of many ways on files that are no model
        reason, is_folder = reason_of(error), os.path.isdir(name)
        part = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}.get(kind.__name__, "model")
        remedy = "give another, or download or save it again"
        if part == "model" and is_folder and (checkpoint := get_last_checkpoint(os.fspath(name))):
            remedy = f"give its last checkpoint, {checkpoint}, or finish the run"
        failure: Exception = ValueError(f"the {part} in {name} cannot be loaded ({reason}): {remedy}.")
        if _is_refusal(error):
            failure = ValueError(f"{name} cannot be loaded: {reason}.")
        elif not is_folder and isinstance(error, (OSError, HFValidationError)):
            failure = OSError(
                f"{name} is neither a folder here nor a name on the Hub that can be read ({reason}): give another, or "
                "a folder with what was downloaded elsewhere."
            )
        raise failure from error


def _is_refusal(error: Exception) -> bool:
    """Whether the message is this library's own, which already names a remedy."""
    where: Any = error.__traceback__
    while where.tb_next:
        where = where.tb_next
    return (
        isinstance(error, ValueError)
        and where.tb_frame.f_globals.get("__package__", "").partition(".")[0] == __package__.partition(".")[0]
    )


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none, to stand inside a sentence."""
    if isinstance(error, StrictDataclassError):  # its lines are one sentence
        return " ".join(str(error).split()).rstrip(".")
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def load_clip(clip: "str | os.PathLike | PreTrainedModel", tokenizer=None):
    """
    An image-text model in float32 and its tokenizer, each loaded if it is given by name.

    Raises:
        OSError, ValueError: if it is none of those in `TOWERS`, and as [`load_pretrained`] does.
    """
    if isinstance(clip, (str, os.PathLike)):
        tokenizer = clip if tokenizer is None else tokenizer
        config = load_pretrained(ConfigDict, clip)
        clip = load_pretrained(tower_of(clip_config_class(config)).model_class(), clip, dtype=torch.float32)
    tower_of(clip.config)  # refuses other kinds
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_pretrained(AutoTokenizer, tokenizer)
    return clip, tokenizer


def load_backbone(
    backbone: "str | os.PathLike | PreTrainedConfig | PreTrainedModel",
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    A backbone in float32 that gives four maps, and the options of [`DenseCLIPConfig`] that belong to it.

    A name is loaded with what its image processor normalizes with; a config makes random weights. Where it names no
    four `out_features` these are the last four stages, of a plain ViT a third, a half, two thirds and all blocks.

    Raises:
        ImportError, OSError, ValueError: if it cannot be loaded or built, or is no backbone of transformers.
    """
    if isinstance(backbone, PreTrainedModel):
        return backbone, {}
    if isinstance(backbone, PreTrainedConfig):
        return AutoBackbone.from_config(with_four_maps(backbone)), {}
    config = load_pretrained(AutoConfig, backbone)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING or not hasattr(config, "stage_names"):
        config = getattr(config, "vision_config", config)  # an image-text model's image tower
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise ValueError(
            f"`{backbone}` holds a model of type {config.model_type!r}, which has no backbone in transformers: name a "
            "Swin, ConvNeXt, DINOv3, ResNet or another that has, or a whole CLIP for `from_clip`."
        )
    # Not `AutoBackbone.from_pretrained`, which takes a folder for a name of timm's.
    model, info = load_pretrained(
        MODEL_FOR_BACKBONE_MAPPING[type(config)],
        backbone,
        config=with_four_maps(config),
        dtype=torch.float32,
        output_loading_info=True,
    )
    new = sorted(info["missing_keys"])
    logger.info("Of the backbone %s, these are not pretrained: %s.", backbone, ", ".join(new) or "none")
    try:
        normalization = ImageProcessingMixin.get_image_processor_dict(backbone)[0]
    except OSError:
        return model, {}
    values = [normalization.get(name) for name in ("image_mean", "image_std")]
    return model, {} if None in values else {"backbone_normalization": [[float(x) for x in row] for row in values]}


def with_four_maps(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a backbone's `config` whose `out_features`, unless they are four, are four for a decoder."""
    config = copy.deepcopy(config)
    names = getattr(config, "stage_names", None)
    if len(config.out_indices or ()) != 4 and names is not None and len(names) >= 4:
        count = len(names) - 1  # without the stem
        parts = range(count - 3, count + 1)
        if not hasattr(config, "depths") and count >= 6:  # a plain ViT's blocks
            parts = (count // 3, count // 2, 2 * count // 3, count)
        config.out_features = [names[part] for part in parts]
    return config


class ConfigDict:
    """The raw contents of a model's config, read as models are."""

    @staticmethod
    def from_pretrained(name: "str | os.PathLike") -> dict[str, Any]:
        return PreTrainedConfig.get_config_dict(name)[0]


def load_clip_weights(model: nn.Module, clip: PreTrainedModel) -> None:
    """Copy `clip`'s weights into `model.clip`, its position grid resized to the model's training resolution."""
    wanted = model.clip.state_dict()
    weights = {key: value for key, value in clip.state_dict().items() if key in wanted}
    if (key := model.tower.position_key) in weights and weights[key].shape != wanted[key].shape:
        weights[key] = model.tower.resize_positions(weights[key], wanted[key].shape)
    model.clip.load_state_dict(weights)


def loading_report(model: nn.Module, *sources: PreTrainedModel) -> str:
    """What of `model` came from `sources`, and what is new, in one message."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    loaded = counts.pop("clip", 0) + counts.pop("backbone", 0)
    names = " and ".join(source.config.name_or_path or type(source).__name__ for source in sources)
    new = ", ".join(f"{part} ({count:,} parameters)" for part, count in counts.items())
    return (
        f"Loaded {loaded:,} parameters from {names}, for images of {model.config.image_size} pixels. Newly "
        f"initialized, to be trained: {new}."
    )


@torch.no_grad()
def resized_convolution(old: nn.Conv2d, kept: list[tuple[int, int]], in_channels=None, out_channels=None) -> nn.Conv2d:
    """A 1x1 convolution with other channels, that has `old`'s weights where `kept` (new, old) says."""
    new = nn.Conv2d(in_channels or old.in_channels, out_channels or old.out_channels, 1).to(old.weight)
    index = torch.tensor(kept, dtype=torch.long, device=old.weight.device).reshape(-1, 2)
    if in_channels is None:
        new.weight[index[:, 0]] = old.weight[index[:, 1]]
        new.bias[index[:, 0]] = old.bias[index[:, 1]]
    else:
        new.weight[:, index[:, 0]] = old.weight[:, index[:, 1]]
        new.bias.copy_(old.bias)
    return new.requires_grad_(old.weight.requires_grad)


__all__ = [
    "ConfigDict",
    "load_backbone",
    "load_clip",
    "load_clip_weights",
    "load_pretrained",
    "loading_report",
    "reason_of",
    "resized_convolution",
]
