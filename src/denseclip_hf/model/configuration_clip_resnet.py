"""Configurations of CLIP's modified ResNet and of a CLIP with such an image tower; refusal of unknown options."""

import difflib
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import as_validated_field, strict
from transformers import CONFIG_MAPPING, CLIPConfig, CLIPTextConfig, PreTrainedConfig, configuration_utils


# Before transformers 5.20, which reads `sub_configs` alone, the class itself will do.
SubConfigSpec = getattr(configuration_utils, "SubConfigSpec", lambda config_class, **options: config_class)

# What PreTrainedConfig itself understands beside the declared fields; everything else is a misspelled option.
_BASE_OPTIONS = {
    "model_type", "num_labels", "name_or_path", "_name_or_path", "_commit_hash", "torch_dtype", "auto_map",
    "output_attentions", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "per_layer_config",
    "quantization_config", "is_composition", "use_cache", "custom_pipelines", "tie_word_embeddings",
}  # fmt: skip


def refuse_unknown_options(config: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Raise `ValueError` for the first of `options` that is neither a field of `config` nor known to transformers."""
    for name in options:
        if name not in _BASE_OPTIONS:
            close = difflib.get_close_matches(name, type(config).__dataclass_fields__, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "see its docstring for the options it has."
            raise ValueError(f"`{type(config).__name__}` has no option `{name}`: {hint}")


def between(
    least: float, most: float = float("inf"), exclude_least: bool = False, exclude_most: bool = False
) -> Callable:
    """A field whose value, unless it is `None`, lies between `least` and `most`."""

    @as_validated_field
    def check(value: float | None = None) -> None:
        if value is None:
            return
        low = least < value if exclude_least else least <= value
        high = value < most if exclude_most or most == float("inf") else value <= most
        if not (low and high):
            bounds = f"{'above' if exclude_least else 'at least'} {least}" + (
                "" if most == float("inf") else f" and {'below' if exclude_most else 'at most'} {most}"
            )
            raise ValueError(f"must be {bounds} and finite, got {value}.")

    return check


positive = between(1)


@strict
class CLIPResNetVisionConfig(PreTrainedConfig):
    r"""
    Configuration of CLIP's modified ResNet, `RN50` by default (Radford et al. 2021, section 2.4).

    Args:
        num_channels (`int`, defaults to 3): channels of the input image.
        embedding_size (`int`, defaults to 64): width w of the stem; stage i (0-based) has w * 4 * 2^i channels.
        depths (`list[int]`, defaults to `[3, 4, 6, 3]`): bottleneck blocks of the four stages.
        num_attention_heads (`int`, defaults to 32): heads of the attention pooling; must divide 32 * w.
        projection_dim (`int`, defaults to 1024): size D of the image embedding.
        image_size (`int`, defaults to 224): side in pixels that the learned positions belong to.
        batch_norm_eps (`float`, defaults to 1e-5): epsilon of every batch norm.

    Raises:
        ValueError: for a combination that cannot work, or an unknown option.
    """

    model_type = "clip_resnet_vision_model"
    base_config_key = "vision_config"

    num_channels: int = positive(default=3)
    embedding_size: int = positive(default=64)
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    num_attention_heads: int = positive(default=32)
    projection_dim: int = positive(default=1024)
    image_size: int = between(32)(default=224)
    batch_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        refuse_unknown_options(self, kwargs)
        super().__post_init__(**kwargs)

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of the four stages."""
        return [self.embedding_size * 4 * 2**stage for stage in range(4)]

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage, which are those of the attention pooling."""
        return self.hidden_sizes[-1]


@strict
class CLIPResNetConfig(CLIPConfig):
    r"""Configuration of a CLIP whose image tower is CLIP's modified ResNet (`RN50`, `RN101`).

    Args:
        text_config (`dict` or `CLIPTextConfig`): the text tower.
        vision_config (`dict` or [`CLIPResNetVisionConfig`]): the image tower.
        projection_dim (`int`): size D of the shared embedding, always `vision_config.projection_dim`.

    Raises:
        ValueError: for a combination that cannot work, or an unknown option.
    """

    model_type = "clip_resnet"
    sub_configs = {"vision_config": CLIPResNetVisionConfig, "text_config": CLIPTextConfig}
    sub_configs_defaults = {name: SubConfigSpec(part) for name, part in sub_configs.items()}

    vision_config: dict | PreTrainedConfig | None = None
    projection_dim: int | None = None

    def __post_init__(self, **kwargs):
        refuse_unknown_options(self, kwargs)
        for name, config_class in self.sub_configs.items():
            part = getattr(self, name)
            if not isinstance(part, PreTrainedConfig):
                setattr(self, name, config_class(**(part or {})))
        # Not CLIPConfig's, which before transformers 5.20 makes the image tower a ViT.
        super(CLIPConfig, self).__post_init__(**kwargs)
        self.projection_dim = self.vision_config.projection_dim


def clip_config_class(clip_config: dict[str, Any]) -> type[PreTrainedConfig]:
    """The config class of the image-text model that the dict `clip_config` describes, by default `CLIPConfig`."""
    vision = clip_config.get("vision_config")
    vision_type = vision.get("model_type") if isinstance(vision, dict) else getattr(vision, "model_type", None)
    is_resnet = "clip_resnet" in (clip_config.get("model_type"), (vision_type or "").removesuffix("_vision_model"))
    if is_resnet:
        return CLIPResNetConfig
    kind = clip_config.get("model_type", CLIPConfig.model_type)
    return CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PreTrainedConfig  # noqa: SIM401, as get() loads none


__all__ = [
    "CLIPResNetConfig",
    "CLIPResNetVisionConfig",
    "between",
    "clip_config_class",
    "positive",
    "refuse_unknown_options",
]
