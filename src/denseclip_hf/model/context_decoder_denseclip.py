"""The context decoder and the score map (Rao et al. 2022, sections 3.2 and 3.3).

Shapes: B images, K classes, D embedding size, h x w the grid of the score map, M = 1 + h*w.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_denseclip import DenseCLIPConfig
from .modeling_clip_resnet import MultiHeadAttention


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
    """Refines class embeddings by what the image shows (post-model prompting, section 3.3)."""

    def __init__(self, config: DenseCLIPConfig):
        super().__init__()
        size, embedding, eps = (
            config.context_decoder_hidden_size,
            config.clip_config.projection_dim,
            config.layer_norm_eps,
        )
        self.memory_projection = nn.Sequential(
            nn.LayerNorm(embedding, eps=eps), nn.Linear(embedding, size), nn.LayerNorm(size, eps=eps)
        )
        self.text_projection = nn.Sequential(nn.LayerNorm(embedding, eps=eps), nn.Linear(embedding, size))
        self.layers = nn.ModuleList(ContextDecoderLayer(config) for _ in range(config.context_decoder_num_layers))
        self.output_projection = nn.Sequential(nn.LayerNorm(size, eps=eps), nn.Linear(size, embedding))

    def forward(self, text_embeds: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """t `(B, K, D)` and `[z_bar, z]` `(B, M, D)` -> the update of t `(B, K, D)`."""
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


__all__ = ["ContextDecoder", "cosine_score_maps"]
