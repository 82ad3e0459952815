"""Checkpoints of CAT-Seg (Cho et al. 2024), an open-vocabulary segmenter whose decoder is our cost aggregation."""

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from ..data import ade20k_classes, parse_classes
from ..files import new_directory
from ..model.configuration_denseclip import COST_AGGREGATION_OPTIONS, DenseCLIPConfig
from ..model.cost_aggregation_denseclip import CostAggregationHead
from ..model.image_processing_denseclip import DenseCLIPImageProcessorPil
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from ..model.text_encoder_denseclip import tokenize_classes
from ..model.towers_denseclip import tower_of
from ..sharing import write_card
from .keys import KeyTable, Target, check_keys, clip_key_table, from_zero, rename
from .weights import (
    DEFAULT_TOKENIZER,
    StateDict,
    check_axes,
    check_finite,
    count_layers,
    grid_side,
    load_tokenizer,
    looking_into,
    read_checkpoint,
    state_dict_of,
    without_module_prefix,
)


_CLIP = "sem_seg_head.predictor.clip_model."
_AGGREGATOR = "sem_seg_head.predictor.transformer."


def _computed(groups: tuple[str, ...], value: torch.Tensor) -> StateDict:
    """What our model computes, or never uses."""
    return {}


def _row(target: str) -> Target:
    """A row `(1, 1, C)` as `(C,)`."""
    return lambda groups, value: {target.format(*groups): value.flatten()}


def _projection(target: str) -> Target:
    """The joined bias `(3 * C,)` of an attention whose three weights are apart."""
    return lambda groups, value: {
        target.format(*groups, letter): part.clone() for letter, part in zip("qkv", value.chunk(3), strict=True)
    }


def aggregator_key_table(theirs: str, ours: str) -> KeyTable:
    """Rows for the aggregator's keys: `theirs` is a pattern of their prefix, `ours` that of our decoder."""
    layer, our_layer = rf"{theirs}layers\.(\d+)\.", f"{ours}layers.{{}}."
    spatial, our_spatial = rf"{layer}swin_block\.block_([12])\.", f"{our_layer}spatial_block{{}}."
    decoder, our_decoder = rf"{theirs}decoder([12])\.", f"{ours}upsampling_blocks.{{}}."
    kind = r"(weight|bias)"
    return [
        (rf"{spatial}attn_mask", _computed),
        (rf"{spatial}norm([12])\.{kind}", f"{our_spatial}norm{{}}.{{}}"),
        (rf"{spatial}attn\.([qkv])\.{kind}", f"{our_spatial}attention.{{}}_proj.{{}}"),
        (rf"{spatial}attn\.proj\.{kind}", f"{our_spatial}attention.out_proj.{{}}"),
        (rf"{spatial}mlp\.fc1\.{kind}", f"{our_spatial}mlp.0.{{}}"),
        (rf"{spatial}mlp\.fc2\.{kind}", f"{our_spatial}mlp.2.{{}}"),
        (rf"{layer}swin_block\.guidance_norm\.{kind}", f"{our_layer}guidance_norm.{{}}"),
        (rf"{layer}attention\.padding_tokens", _row(f"{our_layer}class_block.padding_token")),
        (rf"{layer}attention\.padding_guidance", _row(f"{our_layer}class_block.padding_guidance")),
        (rf"{layer}attention\.attention\.([qkv])\.{kind}", f"{our_layer}class_block.attention.{{}}_proj.{{}}"),
        (rf"{layer}attention\.norm([12])\.{kind}", f"{our_layer}class_block.norm{{}}.{{}}"),
        (rf"{layer}attention\.MLP\.([02])\.{kind}", f"{our_layer}class_block.mlp.{{}}.{{}}"),
        (rf"{theirs}conv1\.{kind}", f"{ours}cost_embedding.{{}}"),
        (rf"{theirs}guidance_projection\.0\.{kind}", f"{ours}image_projection.{{}}"),
        (rf"{theirs}text_guidance_projection\.0\.{kind}", f"{ours}text_projection.{{}}"),
        (rf"{theirs}decoder_guidance_projection\.([01])\.0\.{kind}", f"{ours}skip_projections.{{}}.{{}}"),
        (rf"{decoder}up\.{kind}", from_zero(f"{our_decoder}upsample.{{}}")),
        (rf"{decoder}conv\.double_conv\.0\.weight", from_zero(f"{our_decoder}conv1.weight")),
        (rf"{decoder}conv\.double_conv\.1\.{kind}", from_zero(f"{our_decoder}norm1.{{}}")),
        (rf"{decoder}conv\.double_conv\.3\.weight", from_zero(f"{our_decoder}conv2.weight")),
        (rf"{decoder}conv\.double_conv\.4\.{kind}", from_zero(f"{our_decoder}norm2.{{}}")),
        (rf"{theirs}head\.{kind}", f"{ours}classifier.{{}}"),
    ]


def _tower(theirs: str, ours: str) -> KeyTable:
    """Rows for the attention projections of a tower of CLIP, whose weights are apart but not their biases."""
    layer, our_layer = rf"{theirs}transformer\.resblocks\.(\d+)\.attn\.", f"clip.{ours}.encoder.layers.{{}}.self_attn."
    return [
        (rf"{layer}([qkv])_proj_weight", f"{our_layer}{{}}_proj.weight"),
        (rf"{layer}in_proj_bias", _projection(f"{our_layer}{{}}_proj.bias")),
    ]


_PATTERN = _CLIP.replace(".", r"\.")
# All keys of the released checkpoints.
CATSEG_KEY_TABLE: KeyTable = [
    (rf"{_PATTERN}logit_scale", _computed),
    *_tower(rf"{_PATTERN}visual\.", "vision_model"),
    *_tower(_PATTERN, "text_model"),
    *clip_key_table(rf"{_PATTERN}visual\.", _PATTERN, "clip."),
    *aggregator_key_table(_AGGREGATOR.replace(".", r"\."), "decode_head."),
    (r"upsample([12])\.(weight|bias)", from_zero("decode_head.skip_upsamplers.{}.{}")),
]


@looking_into("the checkpoint")
def config_from_catseg(
    weights: StateDict, id2label: dict[int, str], class_token_ids: list[list[int]] | None = None, **options: Any
) -> DenseCLIPConfig:
    """
    The config of a checkpoint, as far as the shapes of its weights tell; the rest is as published.

    Args:
        weights (`dict[str, torch.Tensor]`): its state dict.
        id2label (`dict[int, str]`): K class names, any: the decoder knows none.
        class_token_ids (`list[list[int]]`, *optional*): of the class names in their sentence.
        options: fields of [`DenseCLIPConfig`] that win over all others.

    Raises:
        CheckpointError: if they are not the weights of CAT-Seg.
    """
    axes = {f"{_CLIP}visual.conv1.weight": 4, f"{_AGGREGATOR}conv1.weight": 4, "upsample1.weight": 4}
    check_axes(weights, axes | {f"{_CLIP}text_projection": 2}, "a CAT-Seg checkpoint")
    width, _, patch, _ = weights[f"{_CLIP}visual.conv1.weight"].shape
    text_width, projection = weights[f"{_CLIP}text_projection"].shape
    positions = weights[f"{_CLIP}visual.positional_embedding"]
    vocabulary = len(weights[f"{_CLIP}token_embedding.weight"])
    clip_config = {
        "model_type": "clip",
        "projection_dim": projection,
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": max(width // 64, 1),
            "num_hidden_layers": count_layers(weights, rf"{_CLIP}visual\.transformer\.resblocks\.(\d+)\."),
            "patch_size": patch,
            "image_size": grid_side(positions) * patch,
            "projection_dim": projection,
        },
        "text_config": {
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_attention_heads": max(text_width // 64, 1),
            "num_hidden_layers": count_layers(weights, rf"{_CLIP}transformer\.resblocks\.(\d+)\."),
            "max_position_embeddings": len(weights[f"{_CLIP}positional_embedding"]),
            "vocab_size": vocabulary,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "projection_dim": projection,
        },
    }
    given: dict[str, Any] = {**COST_AGGREGATION_OPTIONS, "aggregator": _aggregator(weights)}
    given |= {"inference_mode": "slide_and_whole", "crop_size": 384, "slide_size": 640}
    mask = weights.get(f"{_AGGREGATOR}layers.0.swin_block.block_2.attn_mask")
    if mask is not None:
        windows, places, _ = mask.shape
        given["tower_image_size"] = round((windows * places) ** 0.5) * patch
    return DenseCLIPConfig(
        **{**given, "clip_config": clip_config, "id2label": id2label, "class_token_ids": class_token_ids, **options}
    )


def _aggregator(weights: StateDict) -> dict[str, Any]:
    """Options of [`CostAggregationHead`] that are not its defaults; its heads cannot be seen."""
    shapes = {key.removeprefix(_AGGREGATOR): value.shape for key, value in weights.items()}
    mask = shapes.get("layers.0.swin_block.block_2.attn_mask")
    sizes = {
        "hidden_size": shapes["conv1.weight"][0],
        "num_templates": shapes["conv1.weight"][1],
        "num_layers": count_layers(weights, rf"{_AGGREGATOR}layers\.(\d+)\."),
        "image_guidance_size": shapes["guidance_projection.0.weight"][0],
        "text_guidance_size": shapes["text_guidance_projection.0.weight"][0],
        "skip_sizes": [shapes[f"upsample{n}.weight"][1] for n in (1, 2)],
        "skip_projection_sizes": [shapes[f"decoder_guidance_projection.{n}.0.weight"][0] for n in (0, 1)],
        "upsampling_sizes": [shapes[f"decoder{n}.conv.double_conv.0.weight"][0] for n in (1, 2)],
    }
    if mask is not None:
        sizes["window_size"] = round(mask[1] ** 0.5)
    if "layers.0.attention.padding_tokens" not in shapes:
        sizes["max_classes"] = 0
    defaults = inspect.signature(CostAggregationHead).parameters
    return {name: size for name, size in sizes.items() if _plain(size) != _plain(defaults[name].default)}


def _plain(size: Any) -> Any:
    return list(size) if isinstance(size, tuple) else size


@looking_into("the checkpoint")
def convert_catseg_state_dict(state_dict: StateDict, config: DenseCLIPConfig) -> StateDict:
    """
    CAT-Seg's `state_dict` with our keys; loads into the model of `config` with `strict=True`.

    Raises:
        ValueError: naming keys that are unknown, missing or of another shape than `config` says.
    """
    converted = rename(without_module_prefix(state_dict), CATSEG_KEY_TABLE)
    with torch.device("meta"):
        expected = DenseCLIPForSemanticSegmentation(config).state_dict()
    check_keys(converted, expected)
    return converted


def convert_catseg(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase = DEFAULT_TOKENIZER,
    classes: str | os.PathLike | None = None,
) -> DenseCLIPForSemanticSegmentation:
    """
    Write `output_dir`: weights, config, image processor, tokenizer and card of a released checkpoint of CAT-Seg.

    Args:
        checkpoint (`str` or `os.PathLike`): `model_base.pth` or `model_large.pth`, with `model` in it.
        output_dir (`str` or `os.PathLike`): a new directory, which appears complete or not at all.
        tokenizer (`str` or `PreTrainedTokenizerBase`): CLIP's.
        classes (`str` or `os.PathLike`, *optional*): a JSON file of class names, see [`parse_classes`]; ADE20K's by
            default. Of names with synonyms, such as `"wall, brick wall"`, the first is what the model is asked for,
            as in the published results.

    Returns:
        [`DenseCLIPForSemanticSegmentation`]: the model as it was saved.

    Raises:
        CheckpointError, ValueError: if the checkpoint or the class names do not fit, naming what does not.
        OutputError: if the directory cannot be written.
    """
    weights = state_dict_of(read_checkpoint(checkpoint), checkpoint)
    table = ade20k_classes() if classes is None else parse_classes(classes)
    config = config_from_catseg(weights, table.id2label)
    tokenizer = load_tokenizer(tokenizer, config.clip_config.text_config.vocab_size)
    names = [name.split(", ")[0] for name in table.id2label.values()]
    token_ids = tokenize_classes(names, tokenizer, tower_of(config.clip_config), config)
    palette = [list(color) for color in table.palette] if table.palette else None
    config = config_from_catseg(weights, table.id2label, token_ids, palette=palette)
    converted = convert_catseg_state_dict(weights, config)  # compares shapes before anything of that size is made
    with no_init_weights():
        model = DenseCLIPForSemanticSegmentation(config)
    model.load_state_dict(converted, strict=True)
    check_finite(model)
    size = {"shortest_edge": 640, "longest_edge": 2560}
    processor = DenseCLIPImageProcessorPil(size=size, do_reduce_labels=bool(table.do_reduce_labels))
    with new_directory(output_dir) as directory:
        for part in (model.eval(), processor, tokenizer):
            part.save_pretrained(directory)
        source = f"CAT-Seg's released checkpoint `{Path(checkpoint).name}`"
        write_card(directory, name=Path(output_dir).name, source=source)
    return model


__all__ = [
    "CATSEG_KEY_TABLE",
    "aggregator_key_table",
    "config_from_catseg",
    "convert_catseg",
    "convert_catseg_state_dict",
]
