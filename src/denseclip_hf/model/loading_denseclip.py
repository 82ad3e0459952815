"""Loading pretrained CLIPs and bringing their weights into a model."""

import os
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from .configuration_clip_resnet import clip_config_class
from .towers_denseclip import TOWERS


# Where a tokenizer has its words. Without any, transformers may make up a CLIP's without words.
TOKENIZER_FILES = {"tokenizer.json", "vocab.json"}


def load_pretrained(kind: Any, name: "str | os.PathLike", **options) -> Any:
    """
    `kind.from_pretrained(name, **options)`, whose failure says in one sentence what was asked for.

    Raises:
        OSError: if there is nothing of that name.
        ValueError: if files are missing or damaged, or it is nothing that this library takes.
    """
    if kind is AutoTokenizer and os.path.isdir(name) and not TOKENIZER_FILES & set(os.listdir(name)):
        raise ValueError(f"the folder {name} has no tokenizer: give one with a tokenizer.json (CLIP's own).")
    try:
        return kind.from_pretrained(name, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers fails in any of many ways on files that are no model
        reason = reason_of(error)
        if _is_refusal(error):
            raise ValueError(f"{name} cannot be loaded: {reason}.") from error
        if not os.path.isdir(name) and isinstance(error, (OSError, HFValidationError)):
            raise OSError(
                f"{name} is neither a folder here nor a name on the Hub that can be read ({reason}): give another, or "
                "a folder with what was downloaded elsewhere."
            ) from error
        part = {"AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}.get(kind.__name__, "model")
        remedy = "give another, or download or save it anew"
        if part == "model" and os.path.isdir(name) and (checkpoint := get_last_checkpoint(os.fspath(name))):
            remedy = f"give its last checkpoint, {checkpoint}, or finish the run"
        raise ValueError(f"the {part} in {name} cannot be loaded ({reason}): {remedy}.") from error


def _is_refusal(error: Exception) -> bool:
    """Whether a sentence of this library's own, which has its remedy in it."""
    where: Any = error.__traceback__
    while where.tb_next:
        where = where.tb_next
    return (
        isinstance(error, ValueError)
        and where.tb_frame.f_globals.get("__package__", "").partition(".")[0] == __package__.partition(".")[0]
    )


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none, to stand inside a sentence."""
    if isinstance(error, StrictDataclassError):  # whose lines are one sentence
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
        if config.get("model_type") not in TOWERS:
            raise ValueError(
                f"`{clip}` holds a model of type {config.get('model_type')!r}, not a CLIP: name a directory or Hub "
                f"repository of a whole image-text model of one of the types {', '.join(TOWERS)}."
            )
        clip = load_pretrained(TOWERS[clip_config_class(config).model_type].model_class(), clip, dtype=torch.float32)
    kind = getattr(getattr(clip, "config", None), "model_type", None)
    if kind not in TOWERS or not isinstance(clip, TOWERS[kind].model_class()):
        raise ValueError(
            f"`clip` is a {type(clip).__name__}: give a whole `CLIPModel` or another image-text model, or its name."
        )
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_pretrained(AutoTokenizer, tokenizer)
    return clip, tokenizer


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


def clip_report(model: nn.Module, clip: PreTrainedModel) -> str:
    """What came from `clip` and what is new, in one message."""
    counts = {"loaded": 0}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        part = "loaded" if part == "clip" else part
        counts[part] = counts.get(part, 0) + parameter.numel()
    loaded = counts.pop("loaded")
    before, after = clip.config.vision_config.image_size, model.config.image_size
    stride = model.config.embedding_stride
    grid = f"{before // stride}x{before // stride} positions" + (
        f" resized to {after // stride}x{after // stride}" if before != after else ""
    )
    grid += f" for images of {after} pixels"
    new = ", ".join(f"{part} ({count:,} parameters)" for part, count in counts.items())
    name = clip.config.name_or_path or type(clip).__name__
    return f"Loaded {loaded:,} parameters from {name} ({grid}). Newly initialized, to be trained: {new}."


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
    "clip_report",
    "load_clip",
    "load_clip_weights",
    "load_pretrained",
    "reason_of",
    "resized_convolution",
]
