"""Checkpoints of CAT-Seg (Cho et al. 2024), an open-vocabulary segmenter whose decoder is our cost aggregation."""

import torch

from .keys import KeyTable, Target, clip_key_table, from_zero
from .weights import StateDict


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


_CLIP = r"sem_seg_head\.predictor\.clip_model\."
# All keys of the released checkpoints.
CATSEG_KEY_TABLE: KeyTable = [
    (rf"{_CLIP}logit_scale", _computed),
    *_tower(rf"{_CLIP}visual\.", "vision_model"),
    *_tower(_CLIP, "text_model"),
    *clip_key_table(rf"{_CLIP}visual\.", _CLIP, "clip."),
    *aggregator_key_table(r"sem_seg_head\.predictor\.transformer\.", "decode_head."),
    (r"upsample([12])\.(weight|bias)", from_zero("decode_head.skip_upsamplers.{}.{}")),
]
