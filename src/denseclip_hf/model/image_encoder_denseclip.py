"""Dense features from CLIP's image towers: the ViT's feature pyramid, bilinear positions, stochastic depth.

Shapes: B images, H x W pixels, h x w the grid of the dense embedding map, C tower width, D embedding size.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import CLIPModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from .configuration_denseclip import DenseCLIPConfig
from .freezing_denseclip import drop_text_tower
from .modeling_clip_resnet import resize_position_grid


class ImageFeatures(NamedTuple):
    """What the decoder and the prompts see of an image."""

    feature_maps: list[torch.Tensor]  # c2 … c5, (B, C_i, H / s, W / s) at strides 4, 8, 16, 32
    context: torch.Tensor | None  # [z_bar, z] as (B, 1 + h*w, D), un-normalised, row-major; None without guidance
    grid: tuple[int, int]  # h, w


class BilinearPositionEmbeddings(CLIPVisionEmbeddings):
    """CLIP's patch embeddings with bilinear instead of bicubic position interpolation, as DenseCLIP trains it."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        grid = (height // self.patch_size, width // self.patch_size)
        return resize_position_grid(self.position_embedding(self.position_ids)[0], grid)  # called: offload hooks


class StochasticDepth:
    """Forward hook that drops a residual branch's output for whole samples in training (Huang et al. 2016)."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, module: nn.Module, args, output):
        if not module.training or self.rate == 0.0:
            return output
        branch = output[0] if isinstance(output, tuple) else output
        keep = branch.new_empty(len(branch), *[1] * (branch.dim() - 1)).bernoulli_(1 - self.rate)
        branch = branch * (keep / (1 - self.rate))
        return (branch, *output[1:]) if isinstance(output, tuple) else branch


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


def adapt_vision_tower(clip: CLIPModel, config: DenseCLIPConfig) -> None:
    """Give `clip`'s ViT bilinear positions and stochastic depth; without guidance, drop what nothing then uses."""
    vision = clip.vision_model
    if not config.has_resnet:
        vision.embeddings = BilinearPositionEmbeddings(vision.config)
        layers = vision.encoder.layers
        for index, layer in enumerate(layers):
            rate = config.drop_path_rate * index / max(len(layers) - 1, 1)
            layer.self_attn.register_forward_hook(StochasticDepth(rate))
            layer.mlp.register_forward_hook(StochasticDepth(rate))
    if config.frozen_classes or not config.use_text_guidance:
        drop_text_tower(clip)
    if not config.use_text_guidance:
        clip.visual_projection = vision.attention_pool = vision.post_layernorm = None


def encode_image(
    clip: CLIPModel, pyramid: ViTPyramid | None, pixel_values: torch.Tensor, config: DenseCLIPConfig
) -> ImageFeatures:
    """
    Feature maps and image context of `pixel_values` `(B, 3, H, W)` from either kind of image tower.

    Raises:
        ValueError: if the image is smaller than one position of the coarsest map, or there is no batch of images
            or none in it.
    """
    if pixel_values.dim() != 4:
        shape = tuple(pixel_values.shape)
        raise ValueError(f"`pixel_values` must have the shape (batch_size, channels, height, width), got {shape}.")
    if not torch.compiler.is_compiling() and len(pixel_values) == 0:  # exported, batches have any size
        raise ValueError("`pixel_values` holds no image: give at least one.")
    height, width = pixel_values.shape[-2:]
    coarsest = 32 if config.has_resnet else 2 * config.embedding_stride
    if min(height, width) < coarsest:
        raise ValueError(
            f"images of {height} x {width} pixels are too small: both sides must be at least {coarsest} pixels; "
            "resize them, as the image processor does, or cut up what is too long for that."
        )
    vision = clip.vision_model
    if config.has_resnet:
        outputs = vision(pixel_values)
        maps = list(outputs.feature_maps)
        return ImageFeatures(maps, outputs.last_hidden_state, tuple(maps[-1].shape[-2:]))
    grid = (height // config.embedding_stride, width // config.embedding_stride)
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))  # B, 1 + h*w, C
    taps = {}
    for index, layer in enumerate(vision.encoder.layers):
        hidden = layer(hidden, None)
        if index in config.out_indices:
            taps[index] = hidden[:, 1:].transpose(1, 2).unflatten(2, grid)  # B, 1 + h*w, C -> B, C, h, w
    context = clip.visual_projection(vision.post_layernorm(hidden)) if config.use_text_guidance else None
    return ImageFeatures(pyramid([taps[index] for index in config.out_indices]), context, grid)


__all__ = ["ImageFeatures", "ViTPyramid", "adapt_vision_tower", "encode_image"]
