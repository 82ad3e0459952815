"""The options of the authors' config files (mmcv's `model = dict(...)`) as ours."""

import ast
from typing import Any

from ..model.configuration_denseclip import DenseCLIPConfig
from .weights import looking_into


MAX_CHARACTERS = 100_000  # a config's syntax tree takes hundreds of bytes for each


# Options of the original's parts that are converted, or change nothing here.
_CONVERTED = {
    "": "pretrained context_length score_concat_index tau token_embed_dim text_dim class_names train_cfg",
    "backbone": "layers style output_dim input_resolution width heads patch_size out_indices drop_path_rate "
    "get_embeddings pretrained "
    # Of mmsegmentation's ResNet, which the baselines inherit and CLIP's towers take without a use.
    "depth num_stages dilations strides norm_cfg norm_eval contract_dilation",
    "text_encoder": "context_length vocab_size transformer_width transformer_heads transformer_layers embed_dim style "
    "pretrained",
    "context_decoder": "context_length transformer_width transformer_heads transformer_layers visual_dim outdim style "
    "dropout",
    "neck": "in_channels out_channels",
    "decode_head": "in_channels channels dropout_ratio num_classes",
    "decode_head.norm_cfg": "requires_grad",
    "decode_head.loss_decode": "",
    "identity_head": "in_channels channels num_classes dropout_ratio",
    "identity_head.loss_decode": "loss_weight",
    "test_cfg": "mode crop_size stride",
}
# Options that have a counterpart here for these values only.
_SUPPORTED: dict[str, list[Any]] = {
    "type": ["DenseCLIP", "EncoderDecoder"],
    "context_feature": ["attention"],
    "backbone.type": ["CLIPResNetWithAttention", "CLIPResNet", "CLIPVisionTransformer"],
    "text_encoder.type": ["CLIPTextContextEncoder"],
    "context_decoder.type": ["ContextDecoder"],
    "neck.type": ["FPN"],
    "neck.num_outs": [4],
    "neck.end_level": [-1, 3],
    "neck.upsample_cfg": [{"mode": "nearest"}],
    "decode_head.type": ["FPNHead"],
    "decode_head.in_index": [[0, 1, 2, 3]],
    "decode_head.input_transform": ["multiple_select"],
    "decode_head.feature_strides": [[4, 8, 16, 32]],
    "decode_head.act_cfg": [{"type": "ReLU"}],
    "decode_head.ignore_index": [255],
    "decode_head.norm_cfg.type": ["SyncBN", "BN"],
    "decode_head.norm_cfg.eps": [1e-5],
    "decode_head.loss_decode.type": ["CrossEntropyLoss"],
    "decode_head.loss_decode.reduction": ["mean"],
    "decode_head.loss_decode.loss_weight": [1.0],
    "identity_head.type": ["IdentityHead"],
    "identity_head.ignore_index": [255],
    "identity_head.loss_decode.type": ["CrossEntropyLoss"],
    "identity_head.loss_decode.reduction": ["mean"],
}


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
        ValueError: for an option of the original that this package does not know or has no counterpart of.
    """
    _refuse_unsupported(model_kwargs)
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


def model_options(config: str) -> dict[str, Any]:
    """
    The `model = dict(...)` in the text of a config as mmcv stores it in checkpoints, read without running it.

    Args:
        config (`str`): Python assignments of literals and `dict(...)`; all but that of `model` are ignored.

    Raises:
        ValueError: if it assigns no `model`, or one that is not made of literals.
    """
    try:
        assigned = [node for node in ast.parse(config[:MAX_CHARACTERS]).body if isinstance(node, ast.Assign)]
        (model,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "model"]
        return dict(ast.literal_eval(_DictCalls().visit(model)))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"the config inside the checkpoint has no `model = dict(...)` of plain values ({error}): give its options "
            "as JSON (`--options`)."
        ) from error


class _DictCalls(ast.NodeTransformer):
    """Turns `dict(a=1)` into `{"a": 1}`, which `ast.literal_eval` takes."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        names = [keyword.arg for keyword in node.keywords]
        if ast.unparse(node.func) != "dict" or node.args or None in names:
            return node
        return ast.Dict([ast.Constant(name) for name in names], [keyword.value for keyword in node.keywords])


def merge_options(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, dictionaries merged all the way down."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_options(merged[key], value) if both else value
    return merged


def _refuse_unsupported(options: dict[str, Any], part: str = "") -> None:
    """
    Raise `ValueError` for options in `part` of an original `model = dict(...)` whose meaning would be lost.

    An unknown option that is off (`None`, `False`, 0) has no meaning to lose.
    """
    for option, value in options.items():
        place, plain = f"{part}.{option}".lstrip("."), list(value) if isinstance(value, tuple) else value
        if place in _CONVERTED and isinstance(value, dict):
            _refuse_unsupported(value, place)
            continue
        known = [plain] if option in _CONVERTED[part].split() else []
        choices = _SUPPORTED.get(place, [None, False, *known])
        if plain not in choices:
            raise ValueError(
                f"`{place}={value!r}` of the original has no counterpart here: it can be "
                f"{' or '.join(map(repr, choices))}."
            )
