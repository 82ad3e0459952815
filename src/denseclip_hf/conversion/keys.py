"""The authors' checkpoints (mmseg) as ours: one table of key patterns, applied strictly."""

import re
from collections.abc import Callable
from typing import Any

import torch

from ..model.configuration_denseclip import DenseCLIPConfig
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from .mmseg_config import refuse_unsupported
from .weights import StateDict, looking_into, without_module_prefix


# Pattern of an original key -> our key. `{}` stand for the groups in order; what is not a plain renaming is below.
_TRANSFORMER_BLOCK = [
    (r"attn\.in_proj_(weight|bias)", "self_attn.{}_proj.{}"),
    (r"attn\.out_proj\.(weight|bias)", "self_attn.out_proj.{}"),
    (r"ln_([12])\.(weight|bias)", "layer_norm{}.{}"),
    (r"mlp\.c_fc\.(weight|bias)", "mlp.fc1.{}"),
    (r"mlp\.c_proj\.(weight|bias)", "mlp.fc2.{}"),
]


def _blocks(source: str, target: str) -> list[tuple[str, str]]:
    return [
        (rf"{source}transformer\.resblocks\.(\d+)\.{old}", f"{target}encoder.layers.{{}}.{new}")
        for old, new in _TRANSFORMER_BLOCK
    ]


def clip_key_table(image: str, text: str, ours: str = "") -> list[tuple[str, str]]:
    """
    Patterns for CLIP's own keys.

    Args:
        image (`str`): pattern of the image tower's prefix, such as `r"visual\\."`.
        text (`str`): pattern of the text tower's prefix.
        ours (`str`): prefix of our keys, such as `"clip."`.
    """
    vision, words = f"{ours}vision_model.", f"{ours}text_model."
    batch_norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    return [
        # ViT
        (rf"{image}class_embedding", f"{vision}embeddings.class_embedding"),
        (rf"{image}positional_embedding", f"{vision}embeddings.position_embedding.weight"),
        (rf"{image}proj", f"{ours}visual_projection.weight"),
        (rf"{image}ln_pre\.(weight|bias)", f"{vision}pre_layrnorm.{{}}"),
        (rf"{image}ln_post\.(weight|bias)", f"{vision}post_layernorm.{{}}"),
        *_blocks(image, vision),
        # ResNet; the ViT has a `conv1` too, told apart by its shape
        (rf"{image}conv(\d)\.weight", f"{vision}stem.{{}}.convolution.weight"),
        (rf"{image}bn(\d)\.{batch_norm}", f"{vision}stem.{{}}.normalization.{{}}"),
        (rf"{image}layer(\d)\.(\d+)\.conv(\d)\.weight", f"{vision}stages.{{}}.{{}}.conv{{}}.convolution.weight"),
        (rf"{image}layer(\d)\.(\d+)\.bn(\d)\.{batch_norm}", f"{vision}stages.{{}}.{{}}.conv{{}}.normalization.{{}}"),
        (rf"{image}layer(\d)\.(\d+)\.downsample\.0\.weight", f"{vision}stages.{{}}.{{}}.shortcut.convolution.weight"),
        (
            rf"{image}layer(\d)\.(\d+)\.downsample\.1\.{batch_norm}",
            f"{vision}stages.{{}}.{{}}.shortcut.normalization.{{}}",
        ),
        (rf"{image}attnpool\.positional_embedding", f"{vision}attention_pool.position_embedding"),
        (rf"{image}attnpool\.([qkv])_proj\.(weight|bias)", f"{vision}attention_pool.attention.{{}}_proj.{{}}"),
        (rf"{image}attnpool\.c_proj\.(weight|bias)", f"{vision}attention_pool.attention.out_proj.{{}}"),
        # Text tower
        (rf"{text}token_embedding\.weight", f"{words}embeddings.token_embedding.weight"),
        (rf"{text}positional_embedding", f"{words}embeddings.position_embedding.weight"),
        (rf"{text}ln_final\.(weight|bias)", f"{words}final_layer_norm.{{}}"),
        (rf"{text}text_projection", f"{ours}text_projection.weight"),
        *_blocks(text, words),
    ]


def check_saved(loaded: torch.nn.Module, model: torch.nn.Module) -> None:
    """
    See that a model came back from disk as it was, with finite weights.

    Raises:
        ValueError: naming a weight that is not finite or came back different.
    """
    expected = model.state_dict()
    for key, value in loaded.state_dict().items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{key} has values that are not finite: its run failed, or `dtype` is too small for them."
            )
        if not torch.equal(value, expected[key]):
            raise ValueError(f"{key} came back from disk with other values.")


# All keys of the authors' checkpoints; see `clip_key_table` for the towers'.
ORIGINAL_KEY_TABLE = [
    (r"contexts", "prompts.context_vectors"),
    (r"gamma", "gamma"),
    (r"backbone\.fpn1\.(\d)\.(\w+)", "pyramid.up4.{}.{}"),
    (r"backbone\.fpn2\.(\d)\.(\w+)", "pyramid.up2.{}.{}"),
    (r"backbone\.fpn3\.(\w+)", "pyramid.same.{}"),
    (r"backbone\.fpn4\.0\.(\w+)", "pyramid.down2.0.{}"),
    (r"context_decoder\.memory_proj\.(\d)\.(\w+)", "context_decoder.memory_projection.{}.{}"),
    (r"context_decoder\.text_proj\.(\d)\.(\w+)", "context_decoder.text_projection.{}.{}"),
    (r"context_decoder\.out_proj\.(\d)\.(\w+)", "context_decoder.output_projection.{}.{}"),
    (r"context_decoder\.decoder\.(\d+)\.(self|cross)_attn\.([qkv])_proj\.weight",
     "context_decoder.layers.{}.{}_attention.{}_proj.weight"),
    (r"context_decoder\.decoder\.(\d+)\.(self|cross)_attn\.proj\.(\w+)",
     "context_decoder.layers.{}.{}_attention.out_proj.{}"),
    (r"context_decoder\.decoder\.(\d+)\.(norm\d)\.(\w+)", "context_decoder.layers.{}.{}.{}"),
    (r"context_decoder\.decoder\.(\d+)\.mlp\.(\d)\.(\w+)", "context_decoder.layers.{}.mlp.{}.{}"),
    (r"neck\.lateral_convs\.(\d)\.conv\.(\w+)", "neck.lateral_convs.{}.{}"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(\w+)", "neck.output_convs.{}.{}"),
    (r"decode_head\.conv_seg\.(\w+)", "decode_head.classifier.{}"),
    (r"decode_head\.scale_heads\.(\d)\.(\d)\.(conv|bn)\.(\w+)", "decode_head.scale_heads.{}.{}.{}"),
]  # fmt: skip
ORIGINAL_KEY_TABLE += clip_key_table(r"backbone\.", r"text_encoder\.", "clip.")


def _renumber_stem(groups: list[str]) -> list[str]:
    return [str(int(groups[0]) - 1), *groups[1:]]


def _renumber_scale_head(groups: list[str]) -> list[str]:
    # Original modules: (convolution block, upsampling) pairs; ours: convolution, norm, ReLU, upsampling.
    level, index, part, name = groups
    return [level, str(2 * int(index) + (part == "bn")), name]


_RENUMBER: list[tuple[str, Callable[[list[str]], list[str]]]] = [
    (r".*vision_model\.(stem|stages)\.", _renumber_stem),
    (r"decode_head\.scale_heads\.", _renumber_scale_head),
]


def rename(state_dict: StateDict, table: list[tuple[str, str]]) -> StateDict:
    """
    Apply a key table; every key must match exactly one row.

    Fused query-key-value projections are split, the matrices CLIP multiplies from the right are transposed.

    Raises:
        ValueError: naming the keys that no row matches.
    """
    converted: StateDict = {}
    unused = []
    for key, value in state_dict.items():
        row = next(((m, new) for old, new in table if (m := re.fullmatch(old, key))), None)
        if row is None:
            unused.append(key)
            continue
        match, template = row
        groups = list(match.groups())
        if "in_proj" in key:
            *layer, kind = groups
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                converted[template.format(*layer, letter, kind)] = part.clone()
            continue
        renumber = next((function for old, function in _RENUMBER if re.match(old, template)), None)
        new_key = template.format(*(renumber(groups) if renumber else groups))
        if new_key.endswith("stem.0.convolution.weight") and value.shape[-1] > 3:
            new_key = new_key.replace("stem.0.convolution", "embeddings.patch_embedding")
        if new_key.endswith(("visual_projection.weight", "text_projection.weight")):
            value = value.T.contiguous()
        converted[new_key] = value
    if unused:
        raise ValueError(f"the checkpoint has keys this conversion does not know: {_list(unused)}.")
    return converted


@looking_into("the checkpoint")
def convert_original_state_dict(state_dict: StateDict, config: DenseCLIPConfig) -> StateDict:
    """
    The authors' `state_dict` with our keys; loads into the model of `config` with `strict=True`.

    The original ViT adds its class embedding to the class token and once more to position 0; the second is folded
    into the position here, where CLIP's own code adds it only once.

    Args:
        state_dict (`dict[str, torch.Tensor]`): of a released checkpoint.
        config ([`DenseCLIPConfig`]): see [`config_from_original`].

    Raises:
        ValueError: naming keys that are unknown, missing or of another shape than `config` says.
    """
    converted = rename(without_module_prefix(state_dict), ORIGINAL_KEY_TABLE)
    positions = "clip.vision_model.embeddings.position_embedding.weight"
    if positions in converted:
        converted[positions] = converted[positions].clone()
        converted[positions][0] += converted["clip.vision_model.embeddings.class_embedding"]
    if config.use_text_guidance:
        contexts = converted.get("prompts.context_vectors")
        if contexts is not None:
            converted["prompts.context_vectors"] = contexts.squeeze(0)
        # Not part of the original; CLIP's own value keeps the contrastive model inside usable.
        converted["clip.logit_scale"] = torch.tensor(float(config.clip_config.logit_scale_init_value))
    with torch.device("meta"):
        expected = DenseCLIPForSemanticSegmentation(config).state_dict()
    check_keys(converted, expected)
    return converted


def check_keys(converted: StateDict, expected: StateDict) -> None:
    """Raise `ValueError` naming what is missing, too much or misshapen in `converted`."""
    if missing := sorted(expected.keys() - converted.keys()):
        raise ValueError(f"the checkpoint lacks the weights of {_list(missing)}.")
    if surplus := sorted(converted.keys() - expected.keys()):
        raise ValueError(f"the checkpoint has weights this model has no place for: {_list(surplus)}.")
    for key, value in converted.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(value.shape)} in the checkpoint, but its config asks for "
                f"{tuple(expected[key].shape)}: is this the config it was trained with?"
            )


def _list(keys: list[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


@looking_into("the original config")
def config_from_original(
    model_kwargs: dict[str, Any], id2label: dict[int, str], class_token_ids: list[list[int]] | None
) -> DenseCLIPConfig:
    """
    Our config for the `model = dict(...)` of an original config file.

    Args:
        model_kwargs (`dict`): the original's model options; those left out have the original's defaults.
        id2label (`dict[int, str]`): the class names.
        class_token_ids (`list[list[int]]`): their token ids `[SOS, …, EOS]`, unpadded.

    Raises:
        ValueError: for an option of the original that this package does not know or has no counterpart of, or another
            number of classes.
    """
    refuse_unsupported(model_kwargs)
    count = model_kwargs["decode_head"].get("num_classes", len(id2label))
    if count != len(id2label):
        raise ValueError(f"`decode_head.num_classes` of the original config is {count}, for {len(id2label)} classes.")
    guided = model_kwargs.get("type", "DenseCLIP") == "DenseCLIP"
    head, neck = model_kwargs["decode_head"], model_kwargs["neck"]
    test = model_kwargs.get("test_cfg") or {}
    options: dict[str, Any] = {
        "clip_config": _clip_config(model_kwargs),
        "id2label": id2label,
        "use_text_guidance": guided,
        "neck_hidden_size": neck["out_channels"],
        "decode_head_hidden_size": head["channels"],
        "decode_head_dropout": head.get("dropout_ratio", 0.1),
        "inference_mode": test.get("mode", "whole"),
        "drop_path_rate": model_kwargs["backbone"].get("drop_path_rate", 0.0),
    }
    if test.get("mode") == "slide":
        options |= {"crop_size": list(test["crop_size"]), "stride": list(test["stride"])}
    if "Transformer" in model_kwargs["backbone"]["type"]:
        options["out_indices"] = list(model_kwargs["backbone"].get("out_indices", [3, 5, 7, 11]))
    if guided:
        decoder, text = model_kwargs["context_decoder"], model_kwargs["text_encoder"]
        auxiliary = model_kwargs.get("identity_head")
        auxiliary_weight = auxiliary.get("loss_decode", {}).get("loss_weight", 1.0) if auxiliary else 0.0
        options |= {
            "class_token_ids": class_token_ids,
            "num_context_tokens": text.get("context_length", 22) - model_kwargs.get("context_length", 5),
            "score_map_level": model_kwargs.get("score_concat_index", 3),
            "temperature": model_kwargs.get("tau", 0.07),
            "auxiliary_loss_weight": auxiliary_weight,
            "context_decoder_hidden_size": decoder.get("transformer_width", 256),
            "context_decoder_num_attention_heads": decoder.get("transformer_heads", 4),
            "context_decoder_num_layers": decoder.get("transformer_layers", 6),
            "context_decoder_dropout": decoder.get("dropout", 0.1),
        }
    return DenseCLIPConfig(**options)


def _clip_config(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    backbone, text = model_kwargs["backbone"], model_kwargs.get("text_encoder", {})
    usual = 1024 if backbone.get("type") == "CLIPResNetWithAttention" else text.get("embed_dim", 512)
    size = backbone.get("output_dim", usual)
    width = text.get("transformer_width", 512)
    vocabulary = text.get("vocab_size", 49408)
    text_config = {
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": text.get("transformer_layers", 12),
        "num_attention_heads": text.get("transformer_heads", 8),
        "max_position_embeddings": text.get("context_length", 22),
        "projection_dim": size,
    }
    resolution = backbone.get("input_resolution", 224)
    if "Transformer" not in backbone["type"]:
        vision_config = {
            "depths": list(backbone.get("layers", (3, 4, 6, 3))),
            "embedding_size": backbone.get("width", 64),
            "image_size": resolution,
            "projection_dim": size,
        }
        return {"model_type": "clip_resnet", "text_config": text_config, "vision_config": vision_config}
    width = backbone.get("width", 768)
    vision_config = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": backbone.get("layers", 12),
        "num_attention_heads": backbone.get("heads", 12),
        "patch_size": backbone.get("patch_size", 16),
        "image_size": resolution,
        "projection_dim": size,
    }
    return {"model_type": "clip", "text_config": text_config, "vision_config": vision_config, "projection_dim": size}


__all__ = ["config_from_original", "convert_original_state_dict"]
