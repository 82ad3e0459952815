"""Names of weights in other people's checkpoints as ours: tables of patterns, applied strictly."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.configuration_denseclip import DenseCLIPConfig
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from .weights import StateDict, looking_into, without_module_prefix


# What becomes of a weight: a new name with `{}` for the pattern's groups in order, or a function of groups and weight.
Target = str | Callable[[tuple[str, ...], torch.Tensor], StateDict]
KeyTable = Sequence[tuple[str, Target]]


def rename(state_dict: Mapping[str, torch.Tensor], table: KeyTable) -> StateDict:
    """
    Apply a key table: each key by the first row whose pattern matches all of it.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): weights by name.
        table (`KeyTable`): rows of a pattern and a [`Target`].

    Raises:
        ValueError: naming the keys that no row matches, or one that two keys become.
    """
    converted: StateDict = {}
    unknown = []
    for key, value in state_dict.items():
        row = next(((match, target) for old, target in table if (match := re.fullmatch(old, key))), None)
        if row is None:
            unknown.append(key)
            continue
        match, target = row
        new = {target.format(*match.groups()): value} if isinstance(target, str) else target(match.groups(), value)
        if twice := new.keys() & converted.keys():
            raise ValueError(f"two weights of the checkpoint become {min(twice)}, {key} is one of them.")
        converted |= new
    if unknown:
        raise ValueError(f"the checkpoint has keys this conversion does not know: {_first(unknown)}.")
    return converted


@looking_into("the checkpoint")
def convert_keys(
    state_dict: StateDict, table: KeyTable, model_class: type[PreTrainedModel], config: PreTrainedConfig
) -> StateDict:
    """
    A checkpoint's `state_dict` with our keys; loads into the model of `config` with `strict=True`.

    Raises:
        ValueError: naming keys that are unknown, missing or of another shape than `config` says.
    """
    converted = rename(without_module_prefix(state_dict), table)
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    for key in expected:  # the number of batches matters only to averages that no model here takes; old files lack it
        if key.endswith("num_batches_tracked"):
            converted.setdefault(key, torch.tensor(0))
    wanted, found = ({k: tuple(v.shape) for k, v in weights.items()} for weights in (expected, converted))
    if unlike := sorted(key for key in wanted | found if wanted.get(key) != found.get(key)):
        shapes = f"{unlike[0]} has the shape {found.get(unlike[0])}, the config says {wanted.get(unlike[0])}"
        raise ValueError(
            f"these weights are missing, too many, or of another shape than the config says: {_first(unlike)} "
            f"({shapes}). Is this the config it was trained with?"
        )
    return converted


def _first(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def split_qkv(target: str) -> Target:
    """Three projections of a fused one `(3 * C, ...)`; the last two `{}` of `target` are q, k or v, and the kind."""

    def split(groups: tuple[str, ...], value: torch.Tensor) -> StateDict:
        *place, kind = groups
        parts = zip("qkv", value.chunk(3), strict=True)
        return {target.format(*place, letter, kind): part.clone() for letter, part in parts}

    return split


def transposed(target: str) -> Target:
    """A matrix that CLIP multiplies from the right, as a linear layer has it."""
    return lambda groups, value: {target.format(*groups): value.T.contiguous()}


def flattened(target: str) -> Target:
    """A row `(1, 1, C)` as `(C,)`."""
    return lambda groups, value: {target.format(*groups): value.flatten()}


def left_out(groups: tuple[str, ...], value: torch.Tensor) -> StateDict:
    """What our model computes, or never uses."""
    return {}


def from_zero(target: str) -> Target:
    """The first group counts from 1 there, from 0 here."""
    return lambda groups, value: {target.format(int(groups[0]) - 1, *groups[1:]): value}


def _first_convolution(patches: str, stem: str) -> Target:
    """`conv1` of an image tower is a ViT's patch embedding or, with a kernel of 3, the first of a ResNet's stem."""
    return lambda groups, value: {patches if value.shape[-1] > 3 else stem: value}


def _scale_head(groups: tuple[str, ...], value: torch.Tensor) -> StateDict:
    """The original's levels are pairs of a block and an upsampling; ours convolution, norm, ReLU and upsampling."""
    level, index, part, name = groups
    return {f"decode_head.scale_heads.{level}.{2 * int(index) + (part == 'bn')}.{name}": value}


def clip_key_table(image: str, text: str, ours: str = "") -> list[tuple[str, Target]]:
    """
    Rows for CLIP's own keys.

    Args:
        image (`str`): pattern of the image tower's prefix, such as `r"visual\\."`.
        text (`str`): pattern of the text tower's prefix.
        ours (`str`): prefix of our keys, such as `"clip."`.
    """
    vision, words = f"{ours}vision_model.", f"{ours}text_model."
    block, stage = rf"{image}layer(\d)\.(\d+)\.", f"{vision}stages.{{}}.{{}}."
    pooling = f"{vision}attention_pool."
    norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    return [
        # ViT
        (rf"{image}class_embedding", f"{vision}embeddings.class_embedding"),
        (rf"{image}positional_embedding", f"{vision}embeddings.position_embedding.weight"),
        (rf"{image}proj", transposed(f"{ours}visual_projection.weight")),
        (rf"{image}ln_pre\.(weight|bias)", f"{vision}pre_layrnorm.{{}}"),
        (rf"{image}ln_post\.(weight|bias)", f"{vision}post_layernorm.{{}}"),
        *_blocks(image, vision),
        # ResNet
        (
            rf"{image}conv1\.weight",
            _first_convolution(f"{vision}embeddings.patch_embedding.weight", f"{vision}stem.0.convolution.weight"),
        ),
        (rf"{image}conv(\d)\.weight", from_zero(f"{vision}stem.{{}}.convolution.weight")),
        (rf"{image}bn(\d)\.{norm}", from_zero(f"{vision}stem.{{}}.normalization.{{}}")),
        (rf"{block}conv(\d)\.weight", from_zero(f"{stage}conv{{}}.convolution.weight")),
        (rf"{block}bn(\d)\.{norm}", from_zero(f"{stage}conv{{}}.normalization.{{}}")),
        (rf"{block}downsample\.0\.weight", from_zero(f"{stage}shortcut.convolution.weight")),
        (rf"{block}downsample\.1\.{norm}", from_zero(f"{stage}shortcut.normalization.{{}}")),
        (rf"{image}attnpool\.positional_embedding", f"{pooling}position_embedding"),
        (rf"{image}attnpool\.([qkv])_proj\.(weight|bias)", f"{pooling}attention.{{}}_proj.{{}}"),
        (rf"{image}attnpool\.c_proj\.(weight|bias)", f"{pooling}attention.out_proj.{{}}"),
        # Text tower
        (rf"{text}token_embedding\.weight", f"{words}embeddings.token_embedding.weight"),
        (rf"{text}positional_embedding", f"{words}embeddings.position_embedding.weight"),
        (rf"{text}ln_final\.(weight|bias)", f"{words}final_layer_norm.{{}}"),
        (rf"{text}text_projection", transposed(f"{ours}text_projection.weight")),
        *_blocks(text, words),
    ]  # fmt: skip


def _blocks(source: str, target: str) -> list[tuple[str, Target]]:
    block, layer = rf"{source}transformer\.resblocks\.(\d+)\.", f"{target}encoder.layers.{{}}."
    return [
        (rf"{block}attn\.in_proj_(weight|bias)", split_qkv(f"{layer}self_attn.{{}}_proj.{{}}")),
        (rf"{block}attn\.out_proj\.(weight|bias)", f"{layer}self_attn.out_proj.{{}}"),
        (rf"{block}ln_([12])\.(weight|bias)", f"{layer}layer_norm{{}}.{{}}"),
        (rf"{block}mlp\.c_fc\.(weight|bias)", f"{layer}mlp.fc1.{{}}"),
        (rf"{block}mlp\.c_proj\.(weight|bias)", f"{layer}mlp.fc2.{{}}"),
    ]


# All keys of the authors' checkpoints.
ORIGINAL_KEY_TABLE: list[tuple[str, Target]] = [
    (r"contexts", lambda _, value: {"prompts.context_vectors": value.squeeze(0)}),
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
    (r"decode_head\.scale_heads\.(\d)\.(\d)\.(conv|bn)\.(\w+)", _scale_head),
    *clip_key_table(r"backbone\.", r"text_encoder\.", "clip."),
]  # fmt: skip


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
    converted = convert_keys(state_dict, ORIGINAL_KEY_TABLE, DenseCLIPForSemanticSegmentation, config)
    embeddings = "clip.vision_model.embeddings."
    positions = converted.get(f"{embeddings}position_embedding.weight")
    if positions is not None:
        first = positions[:1] + converted[f"{embeddings}class_embedding"]
        converted[f"{embeddings}position_embedding.weight"] = torch.cat([first, positions[1:]])
    return converted
