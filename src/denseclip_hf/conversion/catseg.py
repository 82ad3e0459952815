"""Checkpoints of CAT-Seg (Cho et al. 2024), an open-vocabulary segmenter whose decoder is our cost aggregation."""

import inspect
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import ade20k_classes, parse_classes
from ..model.configuration_denseclip import COST_AGGREGATION_OPTIONS, DenseCLIPConfig
from ..model.cost_aggregation_denseclip import CostAggregationHead
from ..model.image_processing_denseclip import DenseCLIPImageProcessorPil
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from ..options import DEFAULT_CLIP
from .clip import clip_config_from_weights
from .directory import load_tokenizer, with_classes, write_directory
from .keys import KeyTable, clip_key_table, convert_keys, flattened, from_zero, left_out, split_qkv
from .weights import StateDict, check_axes, count_layers, looking_into, read_checkpoint, state_dict_of


_CLIP = "sem_seg_head.predictor.clip_model."
_AGGREGATOR = "sem_seg_head.predictor.transformer."


def aggregator_key_table(theirs: str, ours: str) -> KeyTable:
    """Rows for the aggregator's keys: `theirs` is a pattern of their prefix, `ours` that of our decoder."""
    layer, our_layer = rf"{theirs}layers\.(\d+)\.", f"{ours}layers.{{}}."
    spatial, our_spatial = rf"{layer}swin_block\.block_([12])\.", f"{our_layer}spatial_block{{}}."
    decoder, our_decoder = rf"{theirs}decoder([12])\.", f"{ours}upsampling_blocks.{{}}."
    kind = r"(weight|bias)"
    return [
        (rf"{spatial}attn_mask", left_out),
        (rf"{spatial}norm([12])\.{kind}", f"{our_spatial}norm{{}}.{{}}"),
        (rf"{spatial}attn\.([qkv])\.{kind}", f"{our_spatial}attention.{{}}_proj.{{}}"),
        (rf"{spatial}attn\.proj\.{kind}", f"{our_spatial}attention.out_proj.{{}}"),
        (rf"{spatial}mlp\.fc1\.{kind}", f"{our_spatial}mlp.0.{{}}"),
        (rf"{spatial}mlp\.fc2\.{kind}", f"{our_spatial}mlp.2.{{}}"),
        (rf"{layer}swin_block\.guidance_norm\.{kind}", f"{our_layer}guidance_norm.{{}}"),
        (rf"{layer}attention\.padding_tokens", flattened(f"{our_layer}class_block.padding_token")),
        (rf"{layer}attention\.padding_guidance", flattened(f"{our_layer}class_block.padding_guidance")),
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


def _attention_key_table(theirs: str, ours: str) -> KeyTable:
    """Rows for the projections of a tower of CLIP, whose weights are apart but not their biases."""
    layer, our_layer = rf"{theirs}transformer\.resblocks\.(\d+)\.attn\.", f"clip.{ours}.encoder.layers.{{}}.self_attn."
    return [
        (rf"{layer}([qkv])_proj_weight", f"{our_layer}{{}}_proj.weight"),
        (rf"{layer}in_proj_(bias)", split_qkv(f"{our_layer}{{}}_proj.{{}}")),
    ]


_PATTERN = _CLIP.replace(".", r"\.")
# All keys of the released checkpoints.
CATSEG_KEY_TABLE: KeyTable = [
    (rf"{_PATTERN}logit_scale", left_out),
    *_attention_key_table(rf"{_PATTERN}visual\.", "vision_model"),
    *_attention_key_table(_PATTERN, "text_model"),
    *clip_key_table(rf"{_PATTERN}visual\.", _PATTERN, "clip."),
    *aggregator_key_table(_AGGREGATOR.replace(".", r"\."), "decode_head."),
    (r"upsample([12])\.(weight|bias)", from_zero("decode_head.skip_upsamplers.{}.{}")),
]


@looking_into("the checkpoint")
def config_from_catseg(
    weights: StateDict, id2label: dict[int, str], class_token_ids: list[list[int]] | None = None, **options: Any
) -> DenseCLIPConfig:
    """
    The config of a checkpoint, as far as the shapes of its weights show it; the rest is as published.

    Args:
        weights (`dict[str, torch.Tensor]`): its state dict.
        id2label (`dict[int, str]`): K class names, any: the decoder knows none.
        class_token_ids (`list[list[int]]`, *optional*): of the class names in their sentence.
        options: fields of [`DenseCLIPConfig`] that win over all others.

    Raises:
        CheckpointError: if they are not the weights of CAT-Seg.
    """
    axes = {f"{_CLIP}visual.conv1.weight": 4, f"{_AGGREGATOR}conv1.weight": 4, "upsample1.weight": 4}
    check_axes(weights, axes, "a CAT-Seg checkpoint")
    clip = {key.removeprefix(_CLIP): value for key, value in weights.items() if key.startswith(_CLIP)}
    clip_config = clip_config_from_weights(clip)
    given: dict[str, Any] = {**COST_AGGREGATION_OPTIONS, "aggregator": _aggregator(weights)}
    given |= {"inference_mode": "slide_and_whole", "crop_size": 384, "slide_size": 640}
    mask = weights.get(f"{_AGGREGATOR}layers.0.swin_block.block_2.attn_mask")
    if mask is not None:
        windows, places, _ = mask.shape
        given["tower_image_size"] = round((windows * places) ** 0.5) * clip_config.vision_config.patch_size
    given |= {"clip_config": clip_config.to_dict(), "id2label": id2label, "class_token_ids": class_token_ids}
    return DenseCLIPConfig(**{**given, **options})


def _aggregator(weights: StateDict) -> dict[str, Any]:
    """Options of [`CostAggregationHead`] that are not its defaults; its heads cannot be seen."""
    shapes = {key.removeprefix(_AGGREGATOR): value.shape for key, value in weights.items()}
    mask = shapes.get("layers.0.swin_block.block_2.attn_mask")
    sizes: dict[str, Any] = {
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
    options = inspect.signature(CostAggregationHead).parameters
    defaults = {name: list(o.default) if isinstance(o.default, tuple) else o.default for name, o in options.items()}
    return {name: size for name, size in sizes.items() if size != defaults[name]}


def convert_catseg_state_dict(state_dict: StateDict, config: DenseCLIPConfig) -> StateDict:
    """
    CAT-Seg's `state_dict` with our keys; loads into the model of `config` with `strict=True`.

    Raises:
        ValueError: naming keys that are unknown, missing or of another shape than `config` says.
    """
    return convert_keys(state_dict, CATSEG_KEY_TABLE, DenseCLIPForSemanticSegmentation, config)


def convert_catseg(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase = DEFAULT_CLIP,
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
    config = with_classes(config, table, names, tokenizer)
    return write_directory(
        output_dir,
        DenseCLIPForSemanticSegmentation,
        config,
        convert_catseg_state_dict(weights, config),  # compares shapes before anything of that size is made
        DenseCLIPImageProcessorPil(
            size={"shortest_edge": 640, "longest_edge": 2560}, do_reduce_labels=bool(table.do_reduce_labels)
        ),
        tokenizer,
        source=f"CAT-Seg's released checkpoint `{Path(checkpoint).name}`",
    )
