"""OpenAI's and open_clip's CLIP checkpoints as transformers directories."""

import logging
import os
import re
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel
from transformers.initialization import no_init_weights
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .checkpoints import CheckpointError, StateDict, looking_into, new_directory, read_checkpoint, state_dict_of
from .configuration_denseclip import CLIPResNetConfig
from .conversion import check_keys, clip_key_table, rename
from .modeling_clip_resnet import CLIPResNetModel
from .original_release import DEFAULT_TOKENIZER, load_tokenizer


logger = logging.getLogger(__name__)

CLIP_KEY_TABLE = [*clip_key_table(r"visual\.", ""), (r"logit_scale", "logit_scale")]
# What TorchScript archives hold beside the weights: settings as tensors, and the causal mask.
NOT_WEIGHTS = r"input_resolution|context_length|vocab_size|(.*\.)?attn_mask"
HEAD_SIZE = 64
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert_clip(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: Any = DEFAULT_TOKENIZER,
    hidden_act: str = "quick_gelu",
    dtype: str = "float32",
) -> CLIPModel:
    """
    Write `output_dir`: weights, config, image processor and tokenizer of a CLIP.

    Args:
        checkpoint (`str` or `os.PathLike`): `RN50.pt`, `ViT-B-16.pt` … (TorchScript archives), or a state dict of
            such a model (`.pt`, `.safetensors`).
        output_dir (`str` or `os.PathLike`): a new directory, which appears complete or not at all.
        tokenizer (`str` or `PreTrainedTokenizerBase`): CLIP's.
        hidden_act (`str`): activation, which no weight tells: "quick_gelu" for OpenAI's, "gelu" for open_clip's
            models whose name lacks "-quickgelu".
        dtype (`str`): of the saved weights, "float32", "float16" or "bfloat16".

    Returns:
        `CLIPModel` or [`CLIPResNetModel`]: the model as it was saved.

    Raises:
        CheckpointError, ValueError: if the file is no CLIP checkpoint or a key does not fit, naming it.
        OutputError: if the directory can't be written.
    """
    if hidden_act not in ("quick_gelu", "gelu"):
        raise ValueError(f'`hidden_act` must be "quick_gelu" or "gelu", got {hidden_act!r}.')
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    weights = state_dict_of(read_checkpoint(checkpoint), checkpoint)
    weights = {key: value for key, value in weights.items() if not re.fullmatch(NOT_WEIGHTS, key)}
    config: Any = clip_config_from_weights(weights, hidden_act)
    converted = convert_clip_state_dict(weights, config)
    model_class: type[CLIPModel] = CLIPResNetModel if isinstance(config, CLIPResNetConfig) else CLIPModel
    with no_init_weights():
        model: Any = model_class(config)
    model.load_state_dict(converted, strict=True)
    model.to(DTYPES[dtype])
    tokenizer = load_tokenizer(tokenizer)
    if len(tokenizer) != config.text_config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the checkpoint {config.text_config.vocab_size}: it is "
            "another model's."
        )
    side = config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    with new_directory(output_dir) as directory:
        for part in (model.eval(), processor, tokenizer):
            part.save_pretrained(directory)
    logger.info("Wrote %s: %s with %s.", output_dir, model_class.__name__, hidden_act)
    return model


@looking_into("the checkpoint")
def clip_config_from_weights(weights: StateDict, hidden_act: str = "quick_gelu") -> CLIPConfig:
    """
    A CLIP's config, as its weights' names and shapes tell it.

    Attention heads are not in the weights: they have 64 channels each in both transformers, and the attention pooling
    of a ResNet has one per 64 of its 32 w channels (Radford et al. 2021, tables 19 and 20).

    Args:
        weights (`dict[str, torch.Tensor]`): with OpenAI's keys.
        hidden_act (`str`): activation of both transformers.

    Raises:
        CheckpointError: if they are not the weights of a CLIP.
    """
    axes = {"visual.conv1.weight": 4, "token_embedding.weight": 2, "positional_embedding": 2, "text_projection": 2}
    for key, count in axes.items():
        if key not in weights or weights[key].dim() != count:
            raise CheckpointError(f"this is not a CLIP of OpenAI's architecture: it has no {key} of {count} axes.")
    positions, width = weights["positional_embedding"].shape
    vocabulary, projection = len(weights["token_embedding.weight"]), weights["text_projection"].shape[1]
    text_config = {
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        "hidden_size": width,
        "intermediate_size": len(weights["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _count(weights, r"transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": max(width // HEAD_SIZE, 1),
        "max_position_embeddings": positions,
        "projection_dim": projection,
        "hidden_act": hidden_act,
    }
    if "visual.attnpool.positional_embedding" in weights:
        return CLIPResNetConfig(text_config=text_config, vision_config=_resnet(weights), projection_dim=projection)
    if "visual.class_embedding" not in weights:
        raise CheckpointError("its image tower is neither CLIP's ResNet nor its ViT.")
    vision_config = {**_vit(weights), "hidden_act": hidden_act, "projection_dim": projection}
    return CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=projection)


@looking_into("the checkpoint")
def convert_clip_state_dict(weights: StateDict, config: Any) -> StateDict:
    """
    OpenAI's `weights` with transformers' keys, in float32; loads into the model of `config` with `strict=True`.

    Raises:
        ValueError: naming keys that are unknown, missing or of another shape than `config` says.
    """
    converted = rename(weights, CLIP_KEY_TABLE)
    converted = {key: value.float() if value.is_floating_point() else value for key, value in converted.items()}
    with torch.device("meta"):
        model = (CLIPResNetModel if isinstance(config, CLIPResNetConfig) else CLIPModel)(config)
    expected = model.state_dict()
    for key in expected:  # counts batches, only for averages that CLIP does not take; old archives lack it
        if key.endswith("num_batches_tracked"):
            converted.setdefault(key, torch.tensor(0))
    check_keys(converted, expected)
    return converted


def _resnet(weights: StateDict) -> dict[str, Any]:
    width = 2 * len(weights["visual.conv1.weight"])
    return {
        "embedding_size": width,
        "depths": [_count(weights, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "num_attention_heads": max(32 * width // HEAD_SIZE, 1),
        "projection_dim": len(weights["visual.attnpool.c_proj.weight"]),
        "image_size": 32 * _side(weights["visual.attnpool.positional_embedding"]),
    }


def _vit(weights: StateDict) -> dict[str, Any]:
    width, _, _, patch = weights["visual.conv1.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": _count(weights, r"visual\.transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": max(width // HEAD_SIZE, 1),
        "patch_size": patch,
        "image_size": patch * _side(weights["visual.positional_embedding"]),
    }


def _count(weights: StateDict, pattern: str) -> int:
    return len({match[1] for key in weights if (match := re.match(pattern, key))})


def _side(positions: torch.Tensor) -> int:
    return round((len(positions) - 1) ** 0.5)


__all__ = ["clip_config_from_weights", "convert_clip", "convert_clip_state_dict"]
