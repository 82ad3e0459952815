"""A released checkpoint of the authors (`.pth`) as a complete model directory."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import ClassTable, ade20k_classes, parse_classes
from ..inference import published_image_processor
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from ..options import DEFAULT_CLIP
from .directory import load_tokenizer, with_classes, write_directory
from .keys import convert_original_state_dict
from .options import config_from_original, merge_options, model_options
from .weights import (
    CheckpointError,
    StateDict,
    check_axes,
    count_layers,
    grid_side,
    looking_into,
    read_checkpoint,
    state_dict_of,
)


def convert_release(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase = DEFAULT_CLIP,
    options: dict[str, Any] | None = None,
    classes: str | os.PathLike | None = None,
) -> DenseCLIPForSemanticSegmentation:
    """
    Write `output_dir`: weights, config, image processor, tokenizer and card of a released checkpoint.

    Args:
        checkpoint (`str` or `os.PathLike`): the `.pth`, with `state_dict` and what mmcv adds in `meta`.
        output_dir (`str` or `os.PathLike`): a new directory, which appears complete or not at all.
        tokenizer (`str` or `PreTrainedTokenizerBase`): CLIP's.
        options (`dict[str, Any]`, *optional*): options of the original's `model = dict(...)`, nested, that win over
            those of the config in `meta`. What neither gives is read from the weights' names and shapes, or has the
            published value.
        classes (`str` or `os.PathLike`, *optional*): a JSON file of class names, see [`parse_classes`]; by default
            those in `meta`, or ADE20K's if there are 150.

    Returns:
        [`DenseCLIPForSemanticSegmentation`]: the model as it was saved.

    Raises:
        CheckpointError, ValueError: if the checkpoint, options or class names do not fit, naming what does not.
        OutputError: if the directory cannot be written.
    """
    content = read_checkpoint(checkpoint)
    weights = state_dict_of(content, checkpoint)
    meta = content.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    model_kwargs = model_kwargs_from_weights(weights)
    if isinstance(meta.get("config"), str):
        model_kwargs = merge_options(model_kwargs, model_options(meta["config"]))
    with looking_into("the given options"):
        model_kwargs = merge_options(model_kwargs, options or {})
    table = class_table(weights, meta, classes)
    config = config_from_original(model_kwargs, table.id2label, None)
    tokenizer = load_tokenizer(tokenizer, config.clip_config.text_config.vocab_size)
    config = with_classes(config, table, list(table.id2label.values()), tokenizer)
    return write_directory(
        output_dir,
        DenseCLIPForSemanticSegmentation,
        config,
        convert_original_state_dict(weights, config),  # compares shapes before anything of that size is made
        published_image_processor(config, do_reduce_labels=bool(table.do_reduce_labels)),
        tokenizer,
        source=f"the authors' released checkpoint `{Path(checkpoint).name}`",
    )


@looking_into("the checkpoint's `meta`")
def class_table(weights: StateDict, meta: dict[str, Any], classes: str | os.PathLike | None = None) -> ClassTable:
    """
    Names and colors of the classes: from the file `classes`, a checkpoint's `meta`, or ADE20K's.

    Raises:
        ValueError: if there are not as many names as the classifier has rows, nobody names them, or the colors in
            `meta` are not one for each.
    """
    count = len(weights["decode_head.conv_seg.weight"])
    ade20k = ade20k_classes()
    if classes is not None:
        table, source = parse_classes(classes), str(classes)
    elif meta.get("CLASSES"):
        source = "the checkpoint's `meta`"
        names = dict(enumerate(str(name).strip() for name in meta["CLASSES"]))
        table = parse_classes({"id2label": names, "palette": meta.get("PALETTE") or None}, source)
    else:
        table, source = ade20k, "ADE20K"
    if len(table.id2label) != count:
        raise ValueError(
            f"{source} names {len(table.id2label)} classes, but the checkpoint was trained on {count}: give a file of "
            "those names (`--classes`)."
        )
    if table.id2label == ade20k.id2label:
        table.do_reduce_labels, table.palette = True, table.palette or ade20k.palette
    return table


@looking_into("the checkpoint")
def model_kwargs_from_weights(weights: StateDict) -> dict[str, Any]:
    """
    The original's model options, as far as names and shapes of the weights show them.

    Heads are not among them: CLIP's have 64 channels each, the attention pooling has 32 and the context decoder 64
    channels a head, as in all released models; likewise temperature, dropout and windows are the published ones.

    Raises:
        CheckpointError: if they are not the weights of a DenseCLIP segmenter.
    """
    vit = "backbone.class_embedding" in weights
    guided = "gamma" in weights
    axes = {"decode_head.conv_seg.weight": 4, "neck.lateral_convs.0.conv.weight": 4, "backbone.conv1.weight": 4}
    if guided:
        axes |= {"contexts": 3, "text_encoder.positional_embedding": 2, "text_encoder.text_projection": 2}
        axes |= {"text_encoder.token_embedding.weight": 2, "context_decoder.memory_proj.1.weight": 2}
    check_axes(weights, axes, "a DenseCLIP segmentation checkpoint")
    backbone = _vit_kwargs(weights) if vit else _resnet_kwargs(weights, guided)
    size = backbone["input_resolution"]
    kwargs: dict[str, Any] = {
        "type": "DenseCLIP" if guided else "EncoderDecoder",
        "backbone": backbone,
        "neck": {"type": "FPN", "out_channels": len(weights["neck.lateral_convs.0.conv.weight"])},
        "decode_head": {"type": "FPNHead", "channels": weights["decode_head.conv_seg.weight"].shape[1]},
        "test_cfg": {"mode": "slide", "crop_size": (size, size), "stride": (size * 2 // 3, size * 2 // 3)},
    }
    if guided:
        positions, width = weights["text_encoder.positional_embedding"].shape
        decoder = len(weights["context_decoder.memory_proj.1.weight"])
        kwargs |= {
            "context_length": positions - weights["contexts"].shape[1],
            "score_concat_index": _score_map_level(weights),
            "tau": 0.07,
            "text_encoder": {
                "context_length": positions,
                "embed_dim": weights["text_encoder.text_projection"].shape[1],
                "transformer_width": width,
                "transformer_heads": max(width // 64, 1),
                "transformer_layers": count_layers(weights, r"text_encoder\.transformer\.resblocks\.(\d+)\."),
                "vocab_size": len(weights["text_encoder.token_embedding.weight"]),
            },
            "context_decoder": {
                "transformer_width": decoder,
                "transformer_heads": max(decoder // 64, 1),
                "transformer_layers": count_layers(weights, r"context_decoder\.decoder\.(\d+)\."),
                "dropout": 0.1,
            },
            "identity_head": {"loss_decode": {"loss_weight": 0.4}},
        }
    return kwargs


def _vit_kwargs(weights: StateDict) -> dict[str, Any]:
    width, _, patch, _ = weights["backbone.conv1.weight"].shape
    layers = count_layers(weights, r"backbone\.transformer\.resblocks\.(\d+)\.")
    return {
        "type": "CLIPVisionTransformer",
        "layers": layers,
        "patch_size": patch,
        "width": width,
        "heads": max(width // 64, 1),
        "output_dim": weights["backbone.proj"].shape[1] if "backbone.proj" in weights else 512,
        "input_resolution": grid_side(weights["backbone.positional_embedding"]) * patch,
        "drop_path_rate": 0.1,
        "out_indices": [layers // 3 - 1, layers // 2 - 1, layers * 2 // 3 - 1, layers - 1],
    }


def _resnet_kwargs(weights: StateDict, guided: bool) -> dict[str, Any]:
    pooling = weights.get("backbone.attnpool.positional_embedding")
    output = weights.get("backbone.attnpool.c_proj.bias")
    return {
        "type": "CLIPResNetWithAttention" if guided else "CLIPResNet",
        "layers": [count_layers(weights, rf"backbone\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        "width": 2 * len(weights["backbone.conv1.weight"]),
        "output_dim": 1024 if output is None else len(output),
        "input_resolution": 512 if pooling is None else grid_side(pooling) * 32,
    }


def _score_map_level(weights: StateDict) -> int:
    """The feature map whose lateral convolution takes as many more channels as there are classes."""
    classes = len(weights["decode_head.conv_seg.weight"])
    width = len(weights["backbone.conv1.weight"])
    vit = "backbone.class_embedding" in weights
    for level in range(4):
        channels = weights[f"neck.lateral_convs.{level}.conv.weight"].shape[1]
        if channels == (width if vit else 8 * width * 2**level) + classes:
            return level
    raise CheckpointError(f"no level of the neck takes the score maps of the {classes} classes the classifier has.")
