"""The authors' config files (mmcv: Python assignments) as data, without running them, and what they may ask for."""

import ast
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


# Far above what a config needs, and far below what exhausts memory.
MAX_VALUES = 10_000
MAX_CHARACTERS = 100_000  # of a file, whose tree takes hundreds of bytes for each
MAX_NUMBER = 1e15
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


# Options of the original's parts that are converted, or change nothing here.
_KNOWN_OPTIONS = {
    "": "pretrained context_length score_concat_index tau token_embed_dim text_dim class_names backbone text_encoder "
    "context_decoder neck decode_head identity_head train_cfg test_cfg",
    "backbone": "layers style output_dim input_resolution width heads patch_size out_indices drop_path_rate "
    "get_embeddings pretrained "
    # Of mmsegmentation's ResNet, which the baselines inherit and CLIP's towers take without a use.
    "depth num_stages dilations strides norm_cfg norm_eval contract_dilation",
    "text_encoder": "context_length vocab_size transformer_width transformer_heads transformer_layers embed_dim style "
    "pretrained",
    "context_decoder": "context_length transformer_width transformer_heads transformer_layers visual_dim outdim style "
    "dropout",
    "neck": "in_channels out_channels",
    "decode_head": "in_channels channels dropout_ratio num_classes norm_cfg loss_decode",
    "decode_head.norm_cfg": "requires_grad",
    "decode_head.loss_decode": "",
    "identity_head": "in_channels channels num_classes dropout_ratio loss_decode",
    "identity_head.loss_decode": "loss_weight",
    "test_cfg": "mode crop_size stride",
}
_LOSS: dict[str, list[Any]] = {
    "type": ["CrossEntropyLoss"], "use_sigmoid": [False], "use_mask": [False], "reduction": ["mean"],
    "class_weight": [None],
}  # fmt: skip
# Options that have a counterpart here for these values only; the first is the original's default.
_SUPPORTED_VALUES: dict[str, dict[str, list[Any]]] = {
    "": {
        "type": ["DenseCLIP", "EncoderDecoder"], "context_feature": ["attention"], "text_head": [False],
        "auxiliary_head": [None], "init_cfg": [None],
    },
    "backbone": {"type": ["CLIPResNetWithAttention", "CLIPResNet", "CLIPVisionTransformer"]},
    "text_encoder": {"type": ["CLIPTextContextEncoder"]},
    "context_decoder": {"type": ["ContextDecoder"]},
    "neck": {
        "type": ["FPN"], "num_outs": [4], "start_level": [0], "end_level": [-1, 3], "add_extra_convs": [False],
        "relu_before_extra_convs": [False], "no_norm_on_lateral": [False], "conv_cfg": [None], "norm_cfg": [None],
        "act_cfg": [None], "upsample_cfg": [{"mode": "nearest"}], "init_cfg": [None],
    },
    "decode_head": {
        "type": ["FPNHead"], "align_corners": [False], "in_index": [[0, 1, 2, 3]], "ignore_index": [255],
        "feature_strides": [[4, 8, 16, 32]], "conv_cfg": [None], "act_cfg": [{"type": "ReLU"}], "sampler": [None],
        "input_transform": ["multiple_select"], "init_cfg": [None],
    },
    "decode_head.norm_cfg": {"type": ["SyncBN", "BN"], "eps": [1e-5]},
    "decode_head.loss_decode": {**_LOSS, "loss_weight": [1.0]},
    "identity_head": {"type": ["IdentityHead"], "align_corners": [False], "ignore_index": [255]},
    "identity_head.loss_decode": _LOSS,
}  # fmt: skip


class _NotPlain(ValueError):
    """An expression that is not plain data."""


def read_original_config(path: str | os.PathLike) -> dict[str, Any]:
    """
    The assignments of a config file, its `_base_` files first, merged as mmcv does (`_delete_` replaces).

    Only plain data is understood: literals, `dict(...)`, names assigned before, sums and products of numbers. Other
    assignments are left out; the parts that need them are missing from the result.

    Args:
        path (`str` or `os.PathLike`): a `.py` config file.

    Raises:
        ValueError: if a file is missing, is no Python, or its `model` can't be read.
    """
    return _read(Path(path), ())


def parse_original_config(text: str, source: str = "the config") -> dict[str, Any]:
    """
    As [`read_original_config`], for a file's text (a checkpoint's `meta` has it); `_base_` stays a name.

    Raises:
        ValueError: if it is no Python, longer than `MAX_CHARACTERS`, or its `model` can't be read.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{source} has more than {MAX_CHARACTERS} characters, which no config needs: shorten it.")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{source} is no Python config file ({error or 'too deeply nested'}).") from error
    values: dict[str, Any] = {}
    for statement in tree.body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        name = statement.targets[0].id
        try:
            values[name] = _value(statement.value, values)
            if _size(values[name]) > MAX_VALUES:
                raise _NotPlain(f"more than {MAX_VALUES} values")
        except (_NotPlain, RecursionError, TypeError, ArithmeticError) as error:
            values.pop(name, None)
            if name in ("model", "_base_"):
                raise ValueError(
                    f"{source} computes `{name}` with {error} in line {statement.lineno}; only plain data is read "
                    "(nothing is executed): write the values out."
                ) from error
    return values


def _size(value: Any, limit: int = MAX_VALUES) -> int:
    """How many values there are in nested containers, counted to just above `limit`: names may repeat large ones."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    count = 1
    for part in parts:
        count += _size(part, limit - count)
        if count > limit:
            break
    return count


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        below = f", which {seen[-1]} is based on" if seen else ""
        raise ValueError(f"there is no config file {path}{below}.")
    if path.resolve() in seen:
        raise ValueError(f"the config file {path} is based on itself.")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no Python config file: it is not text.") from error
    own = parse_original_config(text, str(path))
    bases = own.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, (list, tuple)) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"`_base_` of {path} must name config files, got {bases!r}.")
    merged: dict[str, Any] = {}
    for base in bases:
        merged |= _read(path.parent / base, (*seen, path.resolve()))
    return merge_options(merged, own)


def merge_options(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, dictionaries merged all the way down unless one says `_delete_=True`."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, dict):
            replaces = value.get("_delete_", False) or not isinstance(merged.get(key), dict)
            value = {k: v for k, v in value.items() if k != "_delete_"}
            merged[key] = merge_options({} if replaces else merged[key], value)
        else:
            merged[key] = value
    return merged


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """The plain data an expression stands for."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item, names) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        return {_value(k, names): _value(v, names) for k, v in zip(node.keys, node.values, strict=True) if k}
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _number(node.operand, names) * -1
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _number(node.left, names), _number(node.right, names)
        if right == 0 and isinstance(node.op, (ast.Div, ast.FloorDiv)):
            raise _NotPlain(f"`{ast.unparse(node)}`")
        result = _OPERATORS[type(node.op)](left, right)
        if abs(result) > MAX_NUMBER:
            raise _NotPlain(f"`{ast.unparse(node)[:60]}`")
        return result
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        options = {str(keyword.arg): _value(keyword.value, names) for keyword in node.keywords if keyword.arg}
        if len(options) == len(node.keywords):
            return options
    raise _NotPlain(f"`{ast.unparse(node)[:60]}`")


def refuse_unsupported(model_kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for options of an original `model = dict(...)` whose meaning would be lost."""
    for part, known in _KNOWN_OPTIONS.items():
        options: Any = model_kwargs
        for name in filter(None, part.split(".")):
            options = (options or {}).get(name)
        if options is not None and not isinstance(options, dict):
            raise ValueError(f"`{part}` of the original must be a dict of options, got {options!r}.")
        for option, value in (options or {}).items():
            place = f"{part}.{option}".lstrip(".")
            supported = _SUPPORTED_VALUES.get(part, {}).get(option)
            if supported is None and option not in known.split():
                raise ValueError(
                    f"`{place}={value!r}` of the original is not known here, so its meaning would be lost."
                )
            if supported is not None and (list(value) if isinstance(value, tuple) else value) not in supported:
                choices = " or ".join(map(repr, supported))
                raise ValueError(f"`{place}={value!r}` of the original is not supported here, only {choices}.")


def _number(node: ast.expr, names: dict[str, Any]) -> int | float:
    value = _value(node, names)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _NotPlain(f"`{ast.unparse(node)[:60]}`")
    return value


__all__ = ["merge_options", "parse_original_config", "read_original_config", "refuse_unsupported"]
