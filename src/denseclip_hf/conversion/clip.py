"""OpenAI's and open_clip's CLIP checkpoints as transformers directories."""

import os
from typing import Any

from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..devices import dtype_of
from ..model.configuration_clip_resnet import CLIPResNetConfig
from ..model.modeling_clip_resnet import CLIPResNetModel
from ..options import ACTIVATIONS, DEFAULT_CLIP
from .directory import load_tokenizer, write_directory
from .keys import clip_key_table, convert_keys, left_out
from .weights import (
    StateDict,
    check_axes,
    count_layers,
    grid_side,
    looking_into,
    read_checkpoint,
    state_dict_of,
)


# Settings that OpenAI's archives, and nobody else's files, hold as tensors beside the weights.
OPENAI_SETTINGS = ("input_resolution", "context_length", "vocab_size")
CLIP_KEY_TABLE = [
    *clip_key_table(r"visual\.", ""),
    (r"logit_scale", "logit_scale"),
    (rf"{'|'.join(OPENAI_SETTINGS)}|(.*\.)?attn_mask", left_out),
]
# A head has 64 channels in every CLIP up to this width; wider are open_clip's ViT-H, g, bigG and e, with their heads.
HEAD_SIZE, MOST_WIDTH = 64, 1024
HEADS_OF_WIDTH = {1280: 16, 1408: 16, 1664: 16, 1792: 16}


def convert_clip(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase = DEFAULT_CLIP,
    hidden_act: str | None = None,
    dtype: str = "float32",
    num_attention_heads: int | None = None,
) -> CLIPModel:
    """
    Write `output_dir`: weights, config, image processor and tokenizer of a CLIP.

    Args:
        checkpoint (`str` or `os.PathLike`): OpenAI's `RN50.pt`, `ViT-B-16.pt` … (TorchScript archives), or a state
            dict of such a model (`.pt`, `.safetensors`).
        output_dir (`str` or `os.PathLike`): a new directory, which appears complete or not at all.
        tokenizer (`str` or `PreTrainedTokenizerBase`): CLIP's.
        hidden_act (`str`, *optional*): activation, which no weight shows: "quick_gelu", the default for OpenAI's
            archives, or "gelu", that of open_clip's models whose name lacks "-quickgelu". Other files need it.
        dtype (`str`): of the saved weights, a key of `DTYPES`.
        num_attention_heads (`int`, *optional*): of the image tower, see [`clip_config_from_weights`].

    Returns:
        `CLIPModel` or [`CLIPResNetModel`]: the model as it was saved.

    Raises:
        CheckpointError, ValueError: if the file is no CLIP checkpoint, a key does not fit or a weight is not finite in
            `dtype`, naming it, or its activation or heads are not known.
        OutputError: if the directory cannot be written.
    """
    weights = state_dict_of(read_checkpoint(checkpoint), checkpoint)
    if hidden_act is None and all(name in weights for name in OPENAI_SETTINGS):
        hidden_act = "quick_gelu"
    config = clip_config_from_weights(weights, hidden_act or ACTIVATIONS[0], num_attention_heads)
    if hidden_act is None:  # after the config: a file that is no CLIP is refused as such
        raise ValueError(
            f"{checkpoint} does not say what its activation is: give `--hidden_act quick_gelu` for OpenAI's weights "
            "and open_clip's models with -quickgelu in their name, `--hidden_act gelu` for open_clip's others."
        )
    model_class = CLIPResNetModel if isinstance(config, CLIPResNetConfig) else CLIPModel
    converted = convert_keys(weights, CLIP_KEY_TABLE, model_class, config)
    tokenizer = load_tokenizer(tokenizer, config.text_config.vocab_size)
    side = config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return write_directory(output_dir, model_class, config, converted, processor, tokenizer, dtype=dtype_of(dtype))


@looking_into("the checkpoint")
def clip_config_from_weights(
    weights: StateDict, hidden_act: str = "quick_gelu", num_attention_heads: int | None = None
) -> CLIPConfig:
    """
    A CLIP's config, as its weights' names and shapes show it.

    Attention heads are not in the weights. OpenAI's have 64 channels each, in both transformers and in the attention
    pooling of a ResNet with its 32 w channels (Radford et al. 2021, tables 19 and 20), and so have open_clip's up to
    a width of 1024. open_clip's wider image towers (ViT-H, g, bigG and e) are known by their widths.

    Args:
        weights (`dict[str, torch.Tensor]`): with OpenAI's keys.
        hidden_act (`str`): activation of both transformers.
        num_attention_heads (`int`, *optional*): heads of the image tower; needed for a ViT of another width.

    Raises:
        CheckpointError: if they are not the weights of a CLIP.
        ValueError: if the number of heads cannot be known.
    """
    axes = {"visual.conv1.weight": 4, "token_embedding.weight": 2, "positional_embedding": 2, "text_projection": 2}
    check_axes(weights, axes, "a CLIP of OpenAI's architecture")
    positions, width = weights["positional_embedding"].shape
    vocabulary, projection = len(weights["token_embedding.weight"]), weights["text_projection"].shape[1]
    text_config = {
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
        "hidden_size": width,
        "intermediate_size": len(weights["transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": count_layers(weights, r"transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": positions,
        "projection_dim": projection,
        "hidden_act": hidden_act,
    }
    if "visual.attnpool.positional_embedding" in weights:
        vision_config = _resnet(weights, num_attention_heads)
        return CLIPResNetConfig(text_config=text_config, vision_config=vision_config, projection_dim=projection)
    vision_config = {**_vit(weights, num_attention_heads), "hidden_act": hidden_act, "projection_dim": projection}
    return CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=projection)


def _heads(width: int) -> int:
    """Attention heads of a transformer, see [`clip_config_from_weights`]; a tiny one has a single head."""
    if width in HEADS_OF_WIDTH:
        return HEADS_OF_WIDTH[width]
    if width > HEAD_SIZE and (width % HEAD_SIZE or width > MOST_WIDTH):
        raise ValueError(
            f"the weights do not show how many attention heads a transformer of width {width} has: give those of an "
            "image tower as `--num_attention_heads` (its width divided by `head_width` of its config in open_clip)."
        )
    return max(width // HEAD_SIZE, 1)


def _resnet(weights: StateDict, num_attention_heads: int | None) -> dict[str, Any]:
    width = 2 * len(weights["visual.conv1.weight"])
    return {
        "embedding_size": width,
        "depths": [count_layers(weights, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "num_attention_heads": num_attention_heads or max(32 * width // HEAD_SIZE, 1),
        "projection_dim": len(weights["visual.attnpool.c_proj.weight"]),
        "image_size": 32 * grid_side(weights["visual.attnpool.positional_embedding"]),
    }


def _vit(weights: StateDict, num_attention_heads: int | None) -> dict[str, Any]:
    width, _, _, patch = weights["visual.conv1.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        "num_hidden_layers": count_layers(weights, r"visual\.transformer\.resblocks\.(\d+)\."),
        "num_attention_heads": num_attention_heads or _heads(width),
        "patch_size": patch,
        "image_size": patch * grid_side(weights["visual.positional_embedding"]),
    }
