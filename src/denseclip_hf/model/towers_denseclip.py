"""How each kind of image tower is read: four feature maps, and one embedding per place in the space of the texts.

Nothing else asks which kind a model has: what depends on it is here, in one class per kind and one row of `TOWERS`.

Shapes: B images, H x W pixels, h x w the grid of the dense embedding map, C tower width, D embedding size.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, PreTrainedConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

from .configuration_clip_resnet import CLIPResNetVisionConfig
from .configuration_denseclip import DenseCLIPConfig
from .layers_denseclip import StochasticDepth, resize_position_grid
from .modeling_clip_resnet import CLIPResNetModel


class ImageFeatures(NamedTuple):
    """What a tower tells about images."""

    feature_maps: list[
        torch.Tensor
    ]  # (B, C_i, H / s, W / s): a ResNet's strides 4, 8, 16, 32; a ViT's one, four times
    context: torch.Tensor | None  # [z_bar, z] as (B, 1 + h*w, D), not normalized, row-major; None without guidance
    grid: tuple[int, int]  # h, w


class ResizedPositionEmbeddings(CLIPVisionEmbeddings):
    """CLIP's patch embeddings with positions for images of any size: bilinear, as DenseCLIP trains it, or bicubic."""

    def __init__(self, config, mode: str):
        super().__init__(config)
        self.mode = mode

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        grid = (height // self.patch_size, width // self.patch_size)
        # The module is called, rather than its weight read, so that accelerate's offload hooks run.
        return resize_position_grid(self.position_embedding(self.position_ids)[0], grid, self.mode)


class ViTPyramid(nn.Module):
    """Four maps at a ViT's one stride -> strides 4, 8, 16, 32 (for patches of 16 pixels)."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.up4 = nn.Sequential(
            nn.GroupNorm(1, channels, eps=eps),
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
            nn.BatchNorm2d(channels, eps=eps),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
        )
        self.up2 = nn.Sequential(
            nn.GroupNorm(1, channels, eps=eps), nn.ConvTranspose2d(channels, channels, 2, stride=2)
        )
        self.same = nn.GroupNorm(1, channels, eps=eps)
        self.down2 = nn.Sequential(nn.GroupNorm(1, channels, eps=eps), nn.MaxPool2d(2))

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Four `(B, C, h, w)` -> c2 … c5 of heights 4h, 2h, h, h // 2."""
        if torch.is_grad_enabled() and self.same.weight.requires_grad and not maps[0].requires_grad:
            # Behind a frozen tower: on a CPU, torch's gradient of a group norm of channels-last maps crashes.
            maps = [x.contiguous() for x in maps]
        return [step(x) for step, x in zip((self.up4, self.up2, self.same, self.down2), maps, strict=True)]


class ViTTower:
    """CLIP's vision transformer: the outputs of four blocks; the last norm and the projection of all tokens."""

    model_class = CLIPModel
    default_image_size = 640
    position_key = "vision_model.embeddings.position_embedding.weight"

    @staticmethod
    def adapt(clip: CLIPModel, config: DenseCLIPConfig) -> None:
        """Give the tower positions for any size and stochastic depth; without guidance, drop what is unused then."""
        vision = clip.vision_model
        vision.embeddings = ResizedPositionEmbeddings(vision.config, config.position_interpolation)
        layers = vision.encoder.layers
        for index, layer in enumerate(layers):
            rate = config.drop_path_rate * index / max(len(layers) - 1, 1)
            layer.self_attn.register_forward_hook(StochasticDepth(rate))
            layer.mlp.register_forward_hook(StochasticDepth(rate))
        if not config.use_text_guidance:
            clip.visual_projection = vision.post_layernorm = None

    @staticmethod
    def pyramid(config: DenseCLIPConfig) -> nn.Module:
        """Makes maps of strides 4 to 32 of the tower's."""
        return ViTPyramid(config.feature_channels[0], config.batch_norm_eps)

    @staticmethod
    def encode(clip: CLIPModel, pixel_values: torch.Tensor, config: DenseCLIPConfig) -> ImageFeatures:
        """`pixel_values` `(B, 3, H, W)` -> [`ImageFeatures`]."""
        vision, patch = clip.vision_model, config.embedding_stride
        if config.tower_image_size is not None:
            # Images of that size too, which stay as they are: exported programs take any without a question.
            pixel_values = F.interpolate(pixel_values, size=[config.tower_image_size] * 2, mode="bilinear")
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))  # B, 1 + h*w, C
        taps = {}
        layers = vision.encoder.layers
        for index, layer in enumerate(layers):
            if config.last_block == "class_token" and index == len(layers) - 1:
                hidden = values_beside_class_token(layer, hidden)
            else:
                hidden = layer(hidden, None)
            if index in config.out_indices:
                taps[index] = hidden[:, 1:].transpose(1, 2).unflatten(2, grid)  # B, 1 + h*w, C -> B, C, h, w
        context = clip.visual_projection(vision.post_layernorm(hidden)) if config.use_text_guidance else None
        return ImageFeatures([taps[index] for index in config.out_indices], context, grid)


def values_beside_class_token(layer: CLIPEncoderLayer, hidden: torch.Tensor) -> torch.Tensor:
    """A block of `hidden` `(B, 1 + h*w, C)` whose tokens keep their own values, each added to the class token."""
    values = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(hidden)))
    hidden = hidden[:, :1] + values
    return hidden + layer.mlp(layer.layer_norm2(hidden))


class ResNetTower:
    """CLIP's modified ResNet: its four stages; the attention pooling of all positions."""

    model_class = CLIPResNetModel
    default_image_size = 512
    position_key = "vision_model.attention_pool.position_embedding"

    @staticmethod
    def adapt(clip: CLIPResNetModel, config: DenseCLIPConfig) -> None:
        """Without guidance, drop what nothing then uses."""
        if not config.use_text_guidance:
            clip.visual_projection = clip.vision_model.attention_pool = None

    @staticmethod
    def pyramid(config: DenseCLIPConfig) -> None:
        """The stages have strides 4 to 32 themselves."""

    @staticmethod
    def encode(clip: CLIPResNetModel, pixel_values: torch.Tensor, config: DenseCLIPConfig) -> ImageFeatures:
        """`pixel_values` `(B, 3, H, W)` -> [`ImageFeatures`]."""
        outputs = clip.vision_model(pixel_values)
        maps = list(outputs.feature_maps)
        return ImageFeatures(maps, outputs.last_hidden_state, tuple(maps[-1].shape[-2:]))


# Image tower's `model_type` -> how it is read.
TOWERS: dict[str, type] = {
    "clip_vision_model": ViTTower,
    CLIPResNetVisionConfig.model_type: ResNetTower,
}


def tower_of(clip_config: PreTrainedConfig) -> type:
    """The row of `TOWERS` for an image-text model's config."""
    return TOWERS[clip_config.vision_config.model_type]


def check_images(pixel_values: torch.Tensor, config: DenseCLIPConfig) -> None:
    """
    Raises:
        ValueError: if `pixel_values` is no batch of images, or they are smaller than a position of the coarsest map.
    """
    if pixel_values.dim() != 4:
        shape = tuple(pixel_values.shape)
        raise ValueError(f"`pixel_values` must have the shape (batch_size, channels, height, width), got {shape}.")
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # programs take batches and images of any size
        return
    if config.tower_image_size is not None and len(pixel_values):
        return
    height, width = pixel_values.shape[-2:]
    smallest = config.embedding_stride * (2 if config.out_indices else 1)  # the coarsest map of a ViT's pyramid
    if not len(pixel_values) or min(height, width) < smallest:
        raise ValueError(
            f"{len(pixel_values)} images of {height} x {width} pixels cannot be segmented: give at least one, "
            f"with sides of {smallest} pixels or more."
        )


__all__ = ["TOWERS", "ImageFeatures", "ResNetTower", "ViTPyramid", "ViTTower", "check_images", "tower_of"]
