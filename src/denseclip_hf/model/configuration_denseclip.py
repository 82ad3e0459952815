"""Configuration of DenseCLIP on top of either kind of CLIP, with the published models as presets."""

import copy
import math
from collections import Counter
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, PreTrainedConfig

from .configuration_clip_resnet import (
    CLIPResNetConfig,
    CLIPResNetVisionConfig,
    SubConfigSpec,
    clip_config_class,
    refuse_below_one,
    refuse_misspelt_options,
    refuse_unknown_options,
)


MAX_LAYERS, MAX_SIZE = 1000, 2**24


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


@strict
class DenseCLIPConfig(PreTrainedConfig):
    r"""
    Configuration of [`DenseCLIPForSemanticSegmentation`]. The defaults are the published recipe (Rao et al. 2022).

    Args:
        clip_config (`dict`, `CLIPConfig` or [`CLIPResNetConfig`]): the CLIP underneath, by default ViT-B/16 at 640. A
            dict is a ResNet CLIP if its `model_type` is `"clip_resnet"` or its `vision_config` says so, else a ViT.
            `vision_config.image_size` is the training resolution, which the position grid belongs to.
        class_token_ids (`list[list[int]]`, *optional*): for each of the K labels the token ids `[SOS, …, EOS]`.
        num_context_tokens (`int`, defaults to 8): learnable vectors N between SOS and the name; 0 is a fixed prompt.
        prompt_template (`str`, *optional*): sentence with one `{}` that class names are put into before they are
            tokenised; by default `"{}"` with learnable contexts, `"a photo of a {}."` without.
        context_init_std (`float`, defaults to 1.0): standard deviation of the contexts' truncated normal start.
        use_text_guidance (`bool`, defaults to `True`): `False` is the plain CLIP + FPN baseline.
        context_decoder_hidden_size (`int`, defaults to 256): width of the context decoder.
        context_decoder_num_layers (`int`, defaults to 3): its layers.
        context_decoder_num_attention_heads (`int`, defaults to 4): its heads.
        context_decoder_mlp_ratio (`int`, defaults to 4): its MLP's expansion.
        context_decoder_dropout (`float`, defaults to 0.1): its dropout.
        gamma_init (`float`, defaults to 1e-4): start of the per-channel residual scale γ.
        gamma_learnable (`bool`, defaults to `True`): whether γ is trained.
        temperature (`float`, defaults to 0.07): τ that divides the score map in its loss.
        auxiliary_loss_weight (`float`, defaults to 0.4): weight of the score map's loss.
        score_map_level (`int`, *optional*): which of the four feature maps (0 = stride 4 … 3 = stride 32) the score
            map joins; by default the one with the score map's own stride (ViT: 2, ResNet: 3).
        out_indices (`list[int]`, *optional*): ViT blocks (0-based) whose outputs are the feature maps; by default
            those after a third, a half, two thirds and all of the blocks. Must be `None` for a ResNet.
        drop_path_rate (`float`, defaults to 0.1): stochastic depth of the ViT's last block, rising linearly from 0.
        neck_hidden_size (`int`, defaults to 256): channels of the FPN.
        decode_head_hidden_size (`int`, defaults to 256): channels of the Semantic-FPN head.
        decode_head_dropout (`float`, defaults to 0.1): channel dropout before the classifier.
        layer_norm_eps, batch_norm_eps (`float`, default to 1e-5): epsilons of the new norms.
        initializer_range (`float`, defaults to 0.02): truncated-normal start of the context decoder's linear layers.
        semantic_loss_ignore_index (`int`, defaults to 255): label that counts as zero loss.
        inference_mode (`str`, defaults to `"whole"`): `"slide"` makes eval mode average overlapping windows.
        crop_size (`int` or `list[int]`, *optional*): window (height, width); `image_size` of the CLIP by default.
        stride (`int` or `list[int]`, *optional*): window step, two thirds of `crop_size` by default.
        sliding_window_batch_size (`int`, *optional*): windows run through the model at a time; by default 4, on a CPU
            one, where more are slower.
        frozen_classes (`bool`, defaults to `False`): whether the class embeddings are stored and the text tower is
            gone; set by [`DenseCLIPForSemanticSegmentation.freeze_classes`].
        palette (`list[list[int]]`, *optional*): K colours (r, g, b) from 0 to 255, for pictures of the result.

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
    sub_configs = {"clip_config": CLIPConfig}
    sub_configs_defaults = {"clip_config": SubConfigSpec(CLIPConfig)}
    keys_to_ignore_at_inference = ["decode_loss", "auxiliary_loss", "score_maps", "text_embeds", "hidden_states"]

    clip_config: dict | CLIPConfig | None = None
    id2label: Any = None  # whose type `check_ids` tells; before transformers 5.20 a check of its own came first
    class_token_ids: list[list[int]] | None = None
    num_context_tokens: int = 8
    prompt_template: str | None = None
    context_init_std: float | int = 1.0
    use_text_guidance: bool = True
    context_decoder_hidden_size: int = 256
    context_decoder_num_layers: int = 3
    context_decoder_num_attention_heads: int = 4
    context_decoder_mlp_ratio: int = 4
    context_decoder_dropout: float | int = 0.1
    gamma_init: float | int = 1e-4
    gamma_learnable: bool = True
    temperature: float | int = 0.07
    auxiliary_loss_weight: float | int = 0.4
    score_map_level: int | None = None
    out_indices: list[int] | tuple[int, ...] | None = None
    drop_path_rate: float | int = 0.1
    neck_hidden_size: int = 256
    decode_head_hidden_size: int = 256
    decode_head_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    batch_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    semantic_loss_ignore_index: int = 255
    inference_mode: str = "whole"
    crop_size: int | list[int] | tuple[int, ...] | None = None
    stride: int | list[int] | tuple[int, ...] | None = None
    sliding_window_batch_size: int | None = None
    frozen_classes: bool = False
    palette: list[list[int]] | None = None

    def __post_init__(self, **kwargs):
        refuse_unknown_options(self, kwargs)
        _refuse_absurd("num_labels", kwargs.get("num_labels"))
        if self.clip_config is None:
            self.clip_config = PRESETS["denseclip-vit-b16"]["clip_config"]
        if isinstance(self.clip_config, dict):
            self.clip_config = clip_config_class(self.clip_config)(**self.clip_config)
        else:
            self.clip_config = copy.deepcopy(self.clip_config)
        for part in (self.clip_config, self.clip_config.text_config, self.clip_config.vision_config):
            part.dtype = None  # the segmenter's own counts, for all of it
        if self.class_token_ids is not None and self.id2label is None and "num_labels" not in kwargs:
            kwargs["num_labels"] = len(self.class_token_ids)
        check_ids(self.id2label, kwargs.get("num_labels"))
        super().__post_init__(**kwargs)
        if self.id2label is not None:
            self.id2label = dict(sorted(self.id2label.items()))
            if "num_labels" not in kwargs:
                self.label2id = {label: index for index, label in self.id2label.items()}
        vision = self.clip_config.vision_config
        if self.prompt_template is None:
            self.prompt_template = "{}" if self.num_context_tokens else "a photo of a {}."
        if self.score_map_level is None:
            self.score_map_level = 3 if self.has_resnet else 2
        if self.out_indices is None and not self.has_resnet:
            n = vision.num_hidden_layers
            self.out_indices = [max(n // 3, 1) - 1, max(n // 2, 1) - 1, max(2 * n // 3, 1) - 1, n - 1]
        self.crop_size = _pair(vision.image_size if self.crop_size is None else self.crop_size, "crop_size")
        self.stride = _pair(
            [max(s * 2 // 3, 1) for s in self.crop_size] if self.stride is None else self.stride, "stride"
        )
        self._check_architecture()
        self._check_inference()
        self._check_prompts()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """[`PreTrainedConfig.from_dict`]; raises `ValueError` for a CLIP's, and as the class does for odd options."""
        if config_dict.get("model_type") in (CLIPConfig.model_type, CLIPResNetConfig.model_type):
            raise ValueError(
                "this is a CLIP, not a segmenter yet: build one with "
                "`DenseCLIPForSemanticSegmentation.from_clip(directory, id2label=…)`."
            )
        given = {name: kwargs.pop(name) for name in ("id2label", "class_token_ids", "palette") if name in kwargs}
        return super().from_dict(_with_classes(config_dict, given, kwargs.get("num_labels")), **kwargs)

    @classmethod
    def from_preset(cls, name: str, **options) -> "DenseCLIPConfig":
        """
        A published model (`denseclip-rn50`, `denseclip-rn101`, `denseclip-vit-b16`) with `options` on top.

        Raises:
            ValueError: for another name.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}: choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **options})

    @property
    def has_resnet(self) -> bool:
        """Whether the image tower is CLIP's ResNet rather than its ViT."""
        return self.clip_config.vision_config.model_type == CLIPResNetVisionConfig.model_type

    @property
    def image_size(self) -> int:
        """Training resolution in pixels."""
        return self.clip_config.vision_config.image_size

    @property
    def embedding_stride(self) -> int:
        """Pixels per position of the dense embedding map and of the score map."""
        return 32 if self.has_resnet else self.clip_config.vision_config.patch_size

    @property
    def feature_channels(self) -> list[int]:
        """Channels of the feature maps c2 … c5, before the score map joins one of them."""
        vision = self.clip_config.vision_config
        return vision.hidden_sizes if self.has_resnet else [vision.hidden_size] * 4

    @property
    def special_token_ids(self) -> tuple[int, int]:
        """Ids of SOS and EOS.

        Configs of OpenAI's checkpoints on the Hub carry 0 and 2 from before transformers learnt the real ones; CLIP's
        vocabulary always ends with SOS, EOS.
        """
        text = self.clip_config.text_config
        if text.eos_token_id == 2 or not isinstance(text.eos_token_id, int) or text.bos_token_id is None:
            return text.vocab_size - 2, text.vocab_size - 1
        return text.bos_token_id, text.eos_token_id

    @property
    def max_class_tokens(self) -> int:
        """How many tokens `[SOS] name [EOS]` may have beside the contexts."""
        return self.clip_config.text_config.max_position_embeddings - self.num_context_tokens

    def _check_architecture(self) -> None:
        vision = self.clip_config.vision_config
        for part in (self, self.clip_config, self.clip_config.text_config, vision):
            for name, value in vars(part).items():
                _refuse_absurd(name, value)
            refuse_misspelt_options(part)
        _refuse_absurd("depth", sum(vision.depths) if self.has_resnet else 0)
        _refuse_absurd("image_size", (self.image_size // max(self.embedding_stride, 1)) ** 2)
        refuse_below_one(
            self,
            (
                "context_decoder_hidden_size", "context_decoder_num_layers", "context_decoder_num_attention_heads",
                "context_decoder_mlp_ratio", "neck_hidden_size", "decode_head_hidden_size",
            ),
        )  # fmt: skip
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value}.")
        if not 0 <= self.score_map_level <= 3:
            raise ValueError(
                f"`score_map_level` must be 0 (stride 4), 1, 2 or 3 (stride 32), got {self.score_map_level}."
            )
        if self.has_resnet and self.out_indices is not None:
            raise ValueError("`out_indices` names ViT blocks; leave it out for a ResNet, whose four stages are used.")
        if not self.has_resnet:
            depth = vision.num_hidden_layers
            if len(self.out_indices) != 4 or not all(0 <= i < depth for i in self.out_indices):
                raise ValueError(f"`out_indices` must be four blocks in 0…{depth - 1}, got {list(self.out_indices)}.")
        if self.context_decoder_hidden_size % self.context_decoder_num_attention_heads:
            raise ValueError(
                f"`context_decoder_num_attention_heads` ({self.context_decoder_num_attention_heads}) must divide "
                f"`context_decoder_hidden_size` ({self.context_decoder_hidden_size})."
            )
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        for name in ("context_decoder_dropout", "decode_head_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")

    def _check_inference(self) -> None:
        ignored = self.semantic_loss_ignore_index
        # The default may meet more classes than 8-bit masks can hold; then labels are refused where they come in.
        if 0 <= ignored < self.num_labels and ignored != type(self).semantic_loss_ignore_index:
            raise ValueError(
                f"`semantic_loss_ignore_index` ({ignored}) is one of the {self.num_labels} classes, which would never "
                "be learnt: choose a value that is no class id, such as -100."
            )
        if self.palette is not None and len(self.palette) != self.num_labels:
            raise ValueError(
                f"`palette` has {len(self.palette)} colours for {self.num_labels} classes: give one each."
            )
        for color in self.palette or []:
            if len(color) != 3 or not all(0 <= value <= 255 for value in color):
                raise ValueError(f"a colour of `palette` must be three numbers from 0 to 255, got {color}.")
        if self.inference_mode not in ("whole", "slide"):
            raise ValueError(f'`inference_mode` must be "whole" or "slide", got {self.inference_mode!r}.')
        if any(s > c for s, c in zip(self.stride, self.crop_size, strict=True)):
            raise ValueError(
                f"`crop_size` {self.crop_size} is smaller than `stride` {self.stride}, so windows would leave pixels "
                "out: make `stride` at most `crop_size`."
            )
        if self.sliding_window_batch_size is not None and self.sliding_window_batch_size < 1:
            raise ValueError(f"`sliding_window_batch_size` must be at least 1, got {self.sliding_window_batch_size}.")

    def _check_prompts(self) -> None:
        if self.num_context_tokens < 0:
            raise ValueError(f"`num_context_tokens` must be 0 (fixed prompt) or more, got {self.num_context_tokens}.")
        if self.frozen_classes and not self.use_text_guidance:
            raise ValueError("`frozen_classes` needs classes to freeze: leave it out with `use_text_guidance=False`.")
        if self.prompt_template.count("{}") != 1:
            raise ValueError(f"`prompt_template` must contain {{}} once, got {self.prompt_template!r}.")
        if self.use_text_guidance and self.max_class_tokens < 3:
            raise ValueError(
                f"`num_context_tokens` ({self.num_context_tokens}) leaves no room for a class name between SOS and EOS"
                f" in CLIP's {self.clip_config.text_config.max_position_embeddings} positions: use fewer contexts."
            )
        if self.class_token_ids is None:
            return
        if len(self.class_token_ids) != self.num_labels:
            raise ValueError(
                f"`class_token_ids` has {len(self.class_token_ids)} entries but `id2label` has {self.num_labels} "
                "classes: give one list of token ids per class."
            )
        sos, eos = self.special_token_ids
        for index, ids in enumerate(self.class_token_ids):
            name = f"`class_token_ids[{index}]` ({self.id2label[index]!r})"
            if len(ids) < 2 or ids[0] != sos or ids[-1] != eos or eos in ids[:-1]:
                raise ValueError(f"{name} must start with SOS ({sos}) and end with its only EOS ({eos}), got {ids}.")
            if min(ids) < 0 or max(ids) >= self.clip_config.text_config.vocab_size:
                raise ValueError(
                    f"{name} has ids outside the vocabulary of {self.clip_config.text_config.vocab_size}."
                )
            if len(ids) > self.max_class_tokens:
                raise ValueError(
                    f"{name} has {len(ids)} tokens, but {self.max_class_tokens} fit beside {self.num_context_tokens} "
                    f"contexts in CLIP's {self.clip_config.text_config.max_position_embeddings} positions: shorten "
                    "the name or use fewer contexts."
                )


def check_ids(id2label: Any, num_labels: int | None = None) -> None:
    """Raise `ValueError` unless `id2label` is `None` or names the classes 0 … K-1."""
    if id2label is None:
        return
    if not isinstance(id2label, dict):
        raise ValueError("`id2label` must be a mapping from class ids to names, such as {0: 'sky', 1: 'road'}.")
    ids = sorted(int(index) for index in id2label)
    if ids != list(range(len(ids))):
        raise ValueError(f"the ids of `id2label` must be 0 … {len(ids) - 1} without gaps, got {ids}.")
    for name, times in Counter(id2label.values()).items():
        if times > 1:
            raise ValueError(f"`id2label` names {name!r} twice: class names must be all different.")
    if num_labels not in (None, len(ids)):
        raise ValueError(
            f"`num_labels` is {num_labels}, but `id2label` names {len(ids)} classes: give one of the two."
        )


def _with_classes(config: dict[str, Any], given: dict[str, Any], num_labels: int | None) -> dict[str, Any]:
    """A saved config with what is `given` of its classes; if they become others, what it knew of the old ones goes."""
    old = config.get("id2label") or {index: f"LABEL_{index}" for index in range(2)}  # two such are not saved
    old = {int(index): name for index, name in old.items()}
    new = given.get("id2label")
    check_ids(new, num_labels)
    if (new is None and num_labels in (None, len(old))) or (new and {int(i): name for i, name in new.items()} == old):
        return {**config, **given}
    if config.get("frozen_classes"):
        raise ValueError(
            "this model's classes are frozen, so it can not be loaded for others: its text tower is gone. Load the "
            "model it was made from."
        )
    return {**config, "id2label": None, "label2id": None, "class_token_ids": None, "palette": None, **given}


def _refuse_absurd(name: str, value: Any) -> None:
    """Raise `ValueError` for a size that would exhaust memory: configs come from strangers too."""
    most = MAX_LAYERS if name.endswith("layers") or name == "depth" else MAX_SIZE
    if isinstance(value, int) and value > most:
        raise ValueError(f"`{name}` makes {value}, more than any model has (at most {most}).")


def _pair(value: int | list[int] | tuple[int, ...], name: str) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"`{name}` must be one positive number of pixels or a pair (height, width), got {value}.")
    return pair


__all__ = ["DenseCLIPConfig", "check_ids"]
