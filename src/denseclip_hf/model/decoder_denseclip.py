"""What comes after the two encoders: context decoder, score maps, FPN and Semantic FPN head.

Rao et al. 2022, sections 3.2 and 3.3; Lin et al. 2017; Kirillov et al. 2019, section 3.

Shapes: B images, K classes, D embedding size, h x w the grid of the score map, M = 1 + h*w; levels c2 … c5 have
strides 4, 8, 16, 32 and go into the neck, p2 … p5 come out.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_denseclip import DenseCLIPConfig
from .layers_denseclip import MultiHeadAttention, resize_bilinear


class ContextDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer decoder layer: classes attend to each other, then to the image."""

    def __init__(self, config: DenseCLIPConfig):
        super().__init__()
        size, heads = config.context_decoder_hidden_size, config.context_decoder_num_attention_heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(size, eps=config.layer_norm_eps) for _ in range(3))
        self.self_attention = MultiHeadAttention(config, size, heads, qkv_bias=False)
        self.cross_attention = MultiHeadAttention(config, size, heads, qkv_bias=False)
        self.dropout = nn.Dropout(config.context_decoder_dropout)
        self.mlp = nn.Sequential(
            nn.Linear(size, size * config.context_decoder_mlp_ratio),
            nn.GELU(),
            nn.Dropout(config.context_decoder_dropout),
            nn.Linear(size * config.context_decoder_mlp_ratio, size),
        )

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        x = x + self.dropout(self.self_attention(normed, normed))
        x = x + self.dropout(self.cross_attention(self.norm2(x), memory))
        return x + self.dropout(self.mlp(self.norm3(x)))


class ContextDecoder(nn.Module):
    """
    Lets texts look at the image (section 3.3): class embeddings, which it refines, or queries that become contexts.

    Args:
        config ([`DenseCLIPConfig`]): sizes of the decoder, and D of the image context.
        text_size (`int`): of what goes in and comes out: D, or the text tower's width.
    """

    def __init__(self, config: DenseCLIPConfig, text_size: int):
        super().__init__()
        size, eps = config.context_decoder_hidden_size, config.layer_norm_eps
        self.memory_projection = nn.Sequential(
            nn.LayerNorm(config.embedding_size, eps=eps),
            nn.Linear(config.embedding_size, size),
            nn.LayerNorm(size, eps=eps),
        )
        self.text_projection = nn.Sequential(nn.LayerNorm(text_size, eps=eps), nn.Linear(text_size, size))
        self.layers = nn.ModuleList(ContextDecoderLayer(config) for _ in range(config.context_decoder_num_layers))
        self.output_projection = nn.Sequential(nn.LayerNorm(size, eps=eps), nn.Linear(size, text_size))

    def forward(self, text_embeds: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """t `(B, K, D)` and `[z_bar, z]` `(B, M, D)` -> the update of t; or N queries `(B, N, C)` -> contexts."""
        memory = self.memory_projection(context)
        x = self.text_projection(text_embeds)
        for layer in self.layers:
            x = layer(x, memory)
        return self.output_projection(x)


def cosine_score_maps(context: torch.Tensor, text_embeds: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Cosines, in float32, of z in `context` `(B, M, D)` with `text_embeds` `(B, K, D)`: `(B, K, h, w)`."""
    with torch.autocast(context.device.type, enabled=False):
        z = F.normalize(context[:, 1:].float(), dim=-1)
        t = F.normalize(text_embeds.float(), dim=-1)
        return (t @ z.transpose(1, 2)).unflatten(2, grid)  # B, K, h*w -> B, K, h, w


class FPNNeck(nn.Module):
    """
    1x1 laterals, nearest top-down additions, 3x3 outputs; no norm and no activation.

    Args:
        in_channels (`list[int]`): channels of c2 … c5.
        channels (`int`): channels of every output.
    """

    def __init__(self, in_channels: list[int], channels: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output_convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """c2 … c5, each `(B, in_channels[i], h_i, w_i)` -> p2 … p5, each `(B, channels, h_i, w_i)`."""
        levels = [conv(c) for conv, c in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[-2:], mode="nearest")
        return [conv(p) for conv, p in zip(self.output_convs, levels, strict=True)]


class SemanticFPNScaleHead(nn.Sequential):
    """One level on its way to stride 4: 3x3 convolutions with batch norm and ReLU, x2 upsampling between them."""

    def __init__(self, in_channels: int, channels: int, num_convs: int, eps: float):
        layers: list[nn.Module] = []
        for i in range(num_convs):
            if i:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            layers.append(nn.Conv2d(channels if i else in_channels, channels, 3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(channels, eps=eps))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class SemanticFPNHead(nn.Module):
    """
    Sums the four levels at stride 4 and classifies every position.

    Args:
        in_channels (`int`): channels of p2 … p5.
        channels (`int`): channels of the head.
        num_labels (`int`): K.
        dropout (`float`): probability of dropping a whole channel before the classifier.
        eps (`float`): epsilon of the batch norms.
    """

    def __init__(self, in_channels: int, channels: int, num_labels: int, dropout: float, eps: float):
        super().__init__()
        self.scale_heads = nn.ModuleList(SemanticFPNScaleHead(in_channels, channels, max(i, 1), eps) for i in range(4))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_labels, 1)

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        """p2 … p5 -> logits `(B, K, H / 4, W / 4)`."""
        finest, total, *others = [head(p) for head, p in zip(self.scale_heads, levels, strict=True)]
        # Every coarser level ends in one more x2 upsampling. It is linear: levels of one size share a single one.
        for level in others:
            if level.shape == total.shape:
                total = total + level
            else:
                finest = finest + self._upsample(level, finest.shape[-2:])
        finest = finest + self._upsample(total, finest.shape[-2:])
        return self.classifier(self.dropout(finest))

    @staticmethod
    def _upsample(level: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """x2, then to `size`, which differs where a side of the image is no multiple of 32."""
        level = F.interpolate(level, scale_factor=2, mode="bilinear", align_corners=False)
        return resize_bilinear(level, size)


__all__ = ["ContextDecoder", "FPNNeck", "SemanticFPNHead", "SemanticFPNScaleHead", "cosine_score_maps"]
