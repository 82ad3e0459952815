"""Configuration of DenseCLIP on top of any image-text model or backbone, with the published models as presets."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoBackbone, AutoConfig, CLIPConfig, PreTrainedConfig

from .class_names_denseclip import class_names
from .configuration_clip_resnet import (
    CLIPResNetConfig,
    SubConfigSpec,
    between,
    clip_config_class,
    positive,
    refuse_unknown_options,
)


fraction = between(0, 1, exclude_most=True)
number = between(-float("inf"), exclude_least=True)

# The published models (spec sheets of CLIP and the paper, section 4.1), at the resolution they are trained at.
PRESETS: dict[str, dict[str, Any]] = {
    "denseclip-rn50": {
        "clip_config": {
            "model_type": "clip_resnet",
            "text_config": {"projection_dim": 1024},
            "vision_config": {"image_size": 512, "projection_dim": 1024},
        },
    },
    "denseclip-rn101": {
        "clip_config": {
            "model_type": "clip_resnet",
            "text_config": {"projection_dim": 512},
            "vision_config": {"image_size": 512, "depths": [3, 4, 23, 3], "projection_dim": 512},
        },
    },
    "denseclip-vit-b16": {
        "clip_config": {
            "model_type": "clip",
            "text_config": {"projection_dim": 512},
            "vision_config": {"image_size": 640, "patch_size": 16},
        },
    },
}
# What belongs to the classes that a model was saved with.
OF_CLASSES = ("id2label", "class_token_ids", "class_weights", "palette")
# How the last block attends: CAT-Seg's way, SFP's, and those of `LAST_BLOCKS` in dense_attention_denseclip.py.
LastBlockName = Literal[
    "plain", "class_token", "plain_bare", "maskclip", "maskclip_bare", "sclip", "sclip_bare", "qq_full", "clearclip",
    "kk", "kk_full", "naclip", "naclip_full", "sfp",
]  # fmt: skip
# What a model with cost aggregation starts from where nothing else is asked for: CAT-Seg's choices (Cho et al. 2024).
COST_AGGREGATION_OPTIONS: dict[str, Any] = {
    "decode_head": "cost_aggregation",
    "num_context_tokens": 0,
    "prompt_template": "A photo of a {} in the scene",
    "context_decoder_num_layers": 0,
    "drop_path_rate": 0.0,
    "last_block": "class_token",
    "position_interpolation": "bicubic",
}


@strict
class DenseCLIPConfig(PreTrainedConfig):
    r"""
    Configuration of [`DenseCLIPForSemanticSegmentation`]. The defaults are the published recipe (Rao et al. 2022).

    Args:
        clip_config (`dict`, `CLIPConfig` or [`CLIPResNetConfig`]): the CLIP underneath, by default ViT-B/16 at 640. A
            dict is a ResNet CLIP if its `model_type` is `"clip_resnet"` or its `vision_config` says so, else a ViT.
            `vision_config.image_size` is the training resolution, which the position grid belongs to.
        backbone_config (`dict` or `PreTrainedConfig`, *optional*): a backbone of transformers that encodes the images,
            in place of the CLIP's own image tower; its `out_features` name four maps. An attention pool on the last
            of them, learned from random weights, embeds places in the space of texts.
        backbone_image_size (`int`, *optional*): training resolution with a backbone, which the positions of its
            attention pool belong to; by default 512, for a plain ViT about 640.
        backbone_normalization (`list[list[float]]`, *optional*): mean and standard deviation per channel of the images
            that the backbone was pretrained on; ImageNet's by default.
        backbone_pool (`str`, defaults to `"attention"`): what embeds the backbone's places; `"linear"` is one linear
            layer.
        backbone_pool_num_attention_heads (`int`, *optional*): by default one for 64 channels, or the next smaller
            number that divides the width.
        class_token_ids (`list[list[int]]`, *optional*): for each of the K labels the token ids `[SOS, …, EOS]`.
        num_context_tokens (`int`, defaults to 8): learnable vectors N between SOS and the name; 0 is a fixed prompt.
        prompt_template (`str`, *optional*): sentence with one `{}` that class names are put into before they are
            tokenized; by default `"{}"` with learnable contexts, `"a photo of a {}."` without.
        context_init_std (`float`, defaults to 1.0): standard deviation of the contexts' truncated normal start.
        prompting (`str`, defaults to `"post_model"`): the image refines the class embeddings, or with `"pre_model"` it
            makes the contexts (section 3.3): the context decoder turns N learned queries into them, and the text tower
            runs for every image.
        use_text_guidance (`bool`, defaults to `True`): `False` is the plain CLIP + FPN baseline.
        context_decoder_hidden_size (`int`, defaults to 256): width of the context decoder.
        context_decoder_num_layers (`int`, defaults to 3): its layers; with 0 there is no context decoder, and t' = t.
        context_decoder_num_attention_heads (`int`, defaults to 4): its heads.
        context_decoder_mlp_ratio (`int`, defaults to 4): its MLP's expansion.
        context_decoder_dropout (`float`, defaults to 0.1): its dropout.
        gamma_init (`float`, defaults to 1e-4): start of the per-channel residual scale γ.
        gamma_learnable (`bool`, defaults to `True`): whether γ is trained.
        temperature (`float`, defaults to 0.07): τ that divides the score map in its loss.
        auxiliary_loss_weight (`float`, defaults to 0.4): weight of the score map's loss.
        class_weights (`list[float]`, *optional*): what a pixel of each of the K labels counts in the cross entropies,
            1 by default; for rare classes, like the next two.
        focal_gamma (`float`, defaults to 0): γ of the focal loss, by which pixels count less the surer they are.
        dice_loss_weight (`float`, defaults to 0): weight of a Dice loss that is added to the decoder's.
        score_map_level (`int`, *optional*): which of the four feature maps (0 = stride 4 … 3 = stride 32) the score
            map joins; by default the one with the score map's own stride (ViT: 2, ResNet: 3).
        out_indices (`list[int]`, *optional*): ViT blocks (0-based) whose outputs are the feature maps; by default
            those after a third, a half, two thirds and all of the blocks, for `"cost_aggregation"` after a third and
            two thirds. Must be `None` for a ResNet or a backbone.
        last_block (`str`, defaults to `"plain"`): `"class_token"` takes only the values of the ViT's last attention
            and adds the class token in place of each token's own residual, as CAT-Seg does. The others make the
            places of an untrained CLIP comparable with words: `"naclip"` (keys that match, and are near), `"kk"`,
            `"clearclip"` (queries that match), `"sclip"` (both), `"maskclip"` (each token's own value, also of a
            ResNet), `"sfp"` (outlier tokens repaired); `_bare` is without residual and MLP, `_full` with them.
        position_interpolation (`str`, defaults to `"bilinear"`): how a ViT's positions are resized, or `"bicubic"`, or
            `"bicubic_by_factor"`, slightly closer together, as results of words on an untrained CLIP are published.
        tower_image_size (`int`, *optional*): side in pixels of the square that images and windows are resized to
            before the image tower; with cost aggregation by default `image_size`, otherwise they are not.
        drop_path_rate (`float`, defaults to 0.1): stochastic depth of the ViT's last block, rising linearly from 0.
            A backbone has its own, in its config.
        decode_head (`str`, defaults to `"semantic_fpn"`): one output channel for each class of the training, or
            `"cost_aggregation"`: the same weights for every class, so that any words can be asked for.
        aggregator (`dict`, *optional*): options of the cost aggregation that differ from CAT-Seg's, see
            [`CostAggregationHead`].
        neck_hidden_size (`int`, defaults to 256): channels of the FPN.
        decode_head_hidden_size (`int`, defaults to 256): channels of the Semantic-FPN head.
        decode_head_dropout (`float`, defaults to 0.1): channel dropout before the classifier.
        layer_norm_eps, batch_norm_eps (`float`, default to 1e-5): epsilons of the new norms.
        initializer_range (`float`, defaults to 0.02): truncated-normal start of the context decoder's linear layers.
        semantic_loss_ignore_index (`int`, *optional*): label that counts as zero loss; by default 255, which 8-bit
            masks use, or -100 if that is a class.
        inference_mode (`str`, defaults to `"whole"`): `"slide"` makes eval mode average the logits of overlapping
            windows; `"slide_and_whole"`, for cost aggregation, the probabilities of windows and whole image, which
            `logits` then holds.
        crop_size (`int` or `list[int]`, *optional*): window (height, width); by default `tower_image_size`, or
            `image_size` of the CLIP.
        stride (`int` or `list[int]`, *optional*): window step, two thirds of `crop_size` by default.
        slide_size (`int` or `list[int]`, *optional*): (height, width) that images are resized to for
            `"slide_and_whole"`; by default they keep theirs.
        sliding_window_batch_size (`int`, *optional*): windows run through the model at a time; by default 4, on a CPU
            one, where more are slower.
        frozen_classes (`bool`, defaults to `False`): whether the class embeddings are stored and the text tower is
            gone; set by [`DenseCLIPForSemanticSegmentation.freeze_classes`].
        palette (`list[list[int]]`, *optional*): K colors (r, g, b) from 0 to 255, for drawings of the result.

    Raises:
        ValueError: for a combination that cannot work, with what to change.

    Example:

    ```python
    >>> from denseclip_hf import DenseCLIPConfig

    >>> classes = {"id2label": {0: "sky"}, "class_token_ids": [[49406, 2390, 49407]]}
    >>> config = DenseCLIPConfig.from_preset("denseclip-rn50", **classes)
    >>> config.feature_channels
    [256, 512, 1024, 2048]
    ```
    """

    model_type = "denseclip"
    sub_configs = {"clip_config": CLIPConfig, "backbone_config": AutoConfig}
    sub_configs_defaults = {
        "clip_config": SubConfigSpec(CLIPConfig),
        "backbone_config": SubConfigSpec(AutoConfig, model_type="resnet", optional=True),
    }
    keys_to_ignore_at_inference = ["decode_loss", "auxiliary_loss", "score_maps", "text_embeds", "hidden_states"]

    clip_config: dict | PreTrainedConfig | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    backbone_image_size: int | None = positive(default=None)
    backbone_normalization: list[list[float]] | None = None
    backbone_pool: Literal["attention", "linear"] = "attention"
    backbone_pool_num_attention_heads: int | None = positive(default=None)
    id2label: Any = None  # typed in `__post_init__`: before 5.20 transformers validated it first
    class_token_ids: list[list[int]] | None = None
    num_context_tokens: int = between(0)(default=8)
    prompt_template: str | None = None
    context_init_std: float | int = between(0)(default=1.0)
    prompting: Literal["post_model", "pre_model"] = "post_model"
    use_text_guidance: bool = True
    context_decoder_hidden_size: int = positive(default=256)
    context_decoder_num_layers: int = between(0)(default=3)
    context_decoder_num_attention_heads: int = positive(default=4)
    context_decoder_mlp_ratio: int = positive(default=4)
    context_decoder_dropout: float | int = fraction(default=0.1)
    gamma_init: float | int = number(default=1e-4)
    gamma_learnable: bool = True
    temperature: float | int = between(0, exclude_least=True)(default=0.07)
    auxiliary_loss_weight: float | int = number(default=0.4)
    class_weights: list[float] | None = None
    focal_gamma: float | int = between(0)(default=0.0)
    dice_loss_weight: float | int = between(0)(default=0.0)
    score_map_level: int | None = between(0, 3)(default=None)
    out_indices: list[int] | tuple[int, ...] | None = None
    drop_path_rate: float | int = fraction(default=0.1)
    last_block: LastBlockName = "plain"
    position_interpolation: Literal["bilinear", "bicubic", "bicubic_by_factor"] = "bilinear"
    tower_image_size: int | None = positive(default=None)
    decode_head: Literal["semantic_fpn", "cost_aggregation"] = "semantic_fpn"
    aggregator: dict | None = None
    neck_hidden_size: int = positive(default=256)
    decode_head_hidden_size: int = positive(default=256)
    decode_head_dropout: float | int = fraction(default=0.1)
    layer_norm_eps: float = 1e-5
    batch_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    semantic_loss_ignore_index: int | None = None
    inference_mode: Literal["whole", "slide", "slide_and_whole"] = "whole"
    crop_size: int | list[int] | tuple[int, ...] | None = None
    stride: int | list[int] | tuple[int, ...] | None = None
    slide_size: int | list[int] | tuple[int, ...] | None = None
    sliding_window_batch_size: int | None = positive(default=None)
    frozen_classes: bool = False
    palette: list[list[int]] | None = None

    # Of the classes that weights have, where a config was loaded with the names of others.
    _saved_classes = None

    def __post_init__(self, **kwargs):
        refuse_unknown_options(self, kwargs)
        if self.clip_config is None:
            self.clip_config = PRESETS["denseclip-vit-b16"]["clip_config"]
        if isinstance(self.clip_config, dict):
            self.clip_config = clip_config_class(self.clip_config)(**self.clip_config)
        else:
            self.clip_config = copy.deepcopy(self.clip_config)
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        else:
            self.backbone_config = copy.deepcopy(self.backbone_config)
        clip, backbone = self.clip_config, self.backbone_config
        for part in (clip, clip.text_config, clip.vision_config, *([] if backbone is None else [backbone])):
            part.dtype = None  # only the segmenter's dtype is used
        if self.id2label is not None:
            self.id2label = dict(enumerate(class_names(self.id2label)))
        elif self.class_token_ids is not None:
            kwargs.setdefault("num_labels", len(self.class_token_ids))
        if self.id2label is not None and kwargs.get("num_labels") not in (None, len(self.id2label)):
            raise ValueError(
                f"`num_labels` is {kwargs['num_labels']}, but `id2label` names {len(self.id2label)} classes."
            )
        super().__post_init__(**kwargs)
        if self.id2label is not None:
            self.label2id = {name: index for index, name in self.id2label.items()}
        if self.semantic_loss_ignore_index is None:
            self.semantic_loss_ignore_index = 255 if self.num_labels <= 255 else -100
        vision = self.clip_config.vision_config
        if self.prompt_template is None:
            self.prompt_template = "{}" if self.num_context_tokens else "a photo of a {}."
        if backbone is not None and self.backbone_image_size is None:
            patch = self.embedding_stride
            self.backbone_image_size = 512 if self.is_hierarchical else max(640 // patch, 1) * patch
        if self.score_map_level is None:
            self.score_map_level = 3 if self.is_hierarchical else 2
        if self.out_indices is None and backbone is None and not self.is_hierarchical:
            n = vision.num_hidden_layers
            third, half, two_thirds = (max(part, 1) - 1 for part in (n // 3, n // 2, 2 * n // 3))
            four = [third, half, two_thirds, n - 1]
            self.out_indices = [third, two_thirds] if self.decode_head == "cost_aggregation" else four
        if self.slide_size is not None:
            self.slide_size = _pair(self.slide_size, "slide_size")
        if self.decode_head == "cost_aggregation" and self.tower_image_size is None:
            self.tower_image_size = self.image_size
        window = self.tower_image_size or self.image_size
        self.crop_size = _pair(window if self.crop_size is None else self.crop_size, "crop_size")
        two_thirds = [max(side * 2 // 3, 1) for side in self.crop_size]
        self.stride = _pair(two_thirds if self.stride is None else self.stride, "stride")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        [`PreTrainedConfig.from_dict`]; with other classes than the saved ones, what belongs to those is dropped
        and kept aside for [`DenseCLIPModel.from_pretrained`], which loads their weights first.

        Raises:
            ValueError: for the config of a CLIP.
        """
        if config_dict.get("model_type") in (CLIPConfig.model_type, CLIPResNetConfig.model_type):
            raise ValueError(
                "this is a CLIP, not a segmenter yet: build one with "
                "`DenseCLIPForSemanticSegmentation.from_clip(directory, id2label=…)`."
            )
        given = {name: kwargs.pop(name) for name in (*OF_CLASSES, "num_labels") if kwargs.get(name) is not None}
        saved = {name: config_dict.get(name) for name in (*OF_CLASSES, "semantic_loss_ignore_index")}
        old = {int(index): name for index, name in (saved["id2label"] or {}).items()}
        new = dict(enumerate(class_names(given["id2label"]))) if "id2label" in given else old
        has_others = new != old or given.get("num_labels", len(old)) != len(old)
        if has_others:
            refuse_if_frozen(config_dict.get("frozen_classes", False), "be loaded for others")
            config_dict = {**config_dict, **dict.fromkeys((*OF_CLASSES, "label2id"))}
        loaded: Any = super().from_dict({**config_dict, **given}, **kwargs)
        if has_others and "id2label" in given and "class_token_ids" not in given and saved["class_token_ids"]:
            (loaded[0] if isinstance(loaded, tuple) else loaded)._saved_classes = saved
        return loaded

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "_saved_classes"}

    @classmethod
    def from_preset(cls, name: str, **options) -> "DenseCLIPConfig":
        """
        A published model (`denseclip-rn50`, `denseclip-rn101`, `denseclip-vit-b16`) with `options` on top.

        Raises:
            KeyError: for another name.
        """
        return cls(**{**PRESETS[name], **options})

    @property
    def image_size(self) -> int:
        """Training resolution in pixels."""
        clip_size = self.clip_config.vision_config.image_size
        return clip_size if self.backbone_config is None else self.backbone_image_size or clip_size

    @property
    def window(self) -> tuple[list[int], list[int]]:
        """`crop_size` and `stride`, each (height, width) in pixels."""
        return _pair(self.crop_size or self.image_size, "crop_size"), _pair(self.stride or self.image_size, "stride")

    @property
    def is_hierarchical(self) -> bool:
        """Whether the image tower makes maps at strides 4 to 32 by itself, as those that are built in stages do."""
        if self.backbone_config is None:
            return hasattr(self.clip_config.vision_config, "hidden_sizes")
        return hasattr(self.backbone_config, "depths") or not hasattr(self.backbone_config, "patch_size")

    @property
    def embedding_stride(self) -> int:
        """Pixels per position of the dense embedding map and of the score map."""
        tower = self.clip_config.vision_config if self.backbone_config is None else self.backbone_config
        patch = 32 if self.is_hierarchical else tower.patch_size
        return patch if isinstance(patch, int) else patch[0]

    @property
    def coarsest_stride(self) -> int:
        """Pixels per position of the last feature map; images are not smaller."""
        return self.embedding_stride if self.is_hierarchical else 2 * self.embedding_stride

    @property
    def feature_channels(self) -> list[int]:
        """Channels of the feature maps c2 … c5, before the score map joins one of them."""
        if self.backbone_config is not None:
            with torch.device("meta"):  # only the model knows, each kind in a way of its own
                return list(AutoBackbone.from_config(copy.deepcopy(self.backbone_config)).channels)
        vision = self.clip_config.vision_config
        return list(getattr(vision, "hidden_sizes", [vision.hidden_size] * 4))

    @property
    def embedding_size(self) -> int:
        """D, the size of the space that texts and images share."""
        return getattr(self.clip_config, "projection_dim", self.clip_config.vision_config.hidden_size)

    def validate_architecture(self):
        """Part of `@strict` validation: what fields say together."""
        backbone = self.backbone_config
        depth = 0 if backbone is not None else getattr(self.clip_config.vision_config, "num_hidden_layers", 0)
        aggregates = self.decode_head == "cost_aggregation"
        blocks, count = self.out_indices, 2 if aggregates else 4
        has_contexts = self.use_text_guidance and self.num_context_tokens and self.context_decoder_num_layers
        if blocks is not None and (len(blocks) != count or not all(0 <= index < depth for index in blocks)):
            raise ValueError(
                f"`out_indices` must be {count} ViT blocks in 0 … {depth - 1}, or `None` for a ResNet or a backbone, "
                f"got {blocks}."
            )
        if backbone is not None and len(backbone.out_indices or ()) != 4:
            raise ValueError(
                "a backbone must give four maps, but the `out_features` of `backbone_config` are "
                f"{backbone.out_features}: choose four of {backbone.stage_names}."
            )
        if self.prompting == "pre_model" and (not has_contexts or aggregates or self.frozen_classes):
            raise ValueError(
                '`prompting="pre_model"` makes contexts from images: it needs `use_text_guidance`, '
                '`num_context_tokens` and `context_decoder_num_layers` above 0, the decoder "semantic_fpn" and '
                "classes that are not frozen."
            )
        for_rare = self.class_weights or self.focal_gamma or self.dice_loss_weight
        if aggregates and (for_rare or not (self.use_text_guidance and depth)):
            raise ValueError(
                '`decode_head="cost_aggregation"` compares places of a ViT with class names, each by itself: it needs '
                "a CLIP with a ViT, `use_text_guidance=True` and no `class_weights`, `focal_gamma` or "
                "`dice_loss_weight`."
            )
        if self.inference_mode == "slide_and_whole" and not aggregates:
            raise ValueError('`inference_mode="slide_and_whole"` needs `decode_head="cost_aggregation"`.')
        check_stride(self.crop_size, self.stride)

    def validate_classes(self):
        """Part of `@strict` validation: what there is one of for each class, and the label that is none."""
        of_each = {name: getattr(self, name) for name in ("palette", "class_token_ids", "class_weights")}
        uneven = [
            f"`{name}` has {len(rows)}" for name, rows in of_each.items() if rows and len(rows) != self.num_labels
        ]
        if uneven:
            raise ValueError(f"{', '.join(uneven)} entries for {self.num_labels} classes: give one each.")
        check_ignore_index(self.semantic_loss_ignore_index, self.num_labels)


def check_ignore_index(ignore_index: int, num_labels: int) -> None:
    """
    Raises:
        ValueError: if the label of pixels without a class is one of the classes 0 … `num_labels` - 1.
    """
    if 0 <= ignore_index < num_labels:
        raise ValueError(
            f"the label to ignore, {ignore_index}, is one of the {num_labels} classes, which would never count: set "
            "`semantic_loss_ignore_index` or `ignore_index` to what is no class id, such as -100 or 65535."
        )


def check_stride(crop_size: Sequence[int], stride: Sequence[int]) -> None:
    """
    Raises:
        ValueError: if windows of `crop_size` (height, width) in steps of `stride` leave pixels out.
    """
    if any(step > side for step, side in zip(stride, crop_size, strict=True)):
        raise ValueError(f"`stride` {list(stride)} must be at most `crop_size` {list(crop_size)}: lower it.")


def refuse_if_frozen(is_frozen: bool, action: str) -> None:
    """
    Raises:
        ValueError: if a model has frozen classes, saying that it cannot do `action`.
    """
    if is_frozen:
        raise ValueError(
            f"this model's classes are frozen, so it cannot {action}: its text tower is gone. Go back to the model "
            "it was made from, and call `freeze_classes()` again afterwards."
        )


def _pair(value: int | list[int] | tuple[int, ...], name: str) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"`{name}` must be one positive number of pixels or a pair (height, width), got {value}.")
    return pair


__all__ = [
    "COST_AGGREGATION_OPTIONS",
    "PRESETS",
    "DenseCLIPConfig",
    "LastBlockName",
    "check_ignore_index",
    "check_stride",
    "refuse_if_frozen",
]
