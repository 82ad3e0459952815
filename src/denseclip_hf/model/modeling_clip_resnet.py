"""CLIP's modified ResNet image tower and a `CLIPModel` built on it (Radford et al. 2021, section 2.4).

Shapes: B images, H x W pixels, C channels, D embedding size, h x w the stride-32 grid.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_clip_resnet import CLIPResNetConfig, CLIPResNetVisionConfig
from .layers_denseclip import MultiHeadAttention, choose_hidden_states, resize_position_grid


@dataclass
class CLIPResNetVisionModelOutput(ModelOutput):
    """
    Output of [`CLIPResNetVisionModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, 1 + height / 32 * width / 32, projection_dim)`):
            the attention pooling's outputs in the shared embedding space: global first, then all positions, row-major.
        pooler_output (`torch.Tensor` of shape `(batch_size, projection_dim)`): the global one, CLIP's image embedding.
        feature_maps (`tuple(torch.Tensor)`): c2 … c5 of shapes `(batch_size, hidden_sizes[i], height / s, width / s)`
            at strides s = 4, 8, 16, 32.
        hidden_states (`tuple(torch.Tensor)`, returned with `output_hidden_states=True`): the stem's output, then
            `feature_maps`.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class CLIPResNetConvLayer(nn.Module):
    """Convolution without bias, batch norm, and (unless `activation=False`) ReLU."""

    def __init__(self, in_channels, out_channels, kernel_size, eps, stride=1, activation=True):
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
        )
        self.normalization = nn.BatchNorm2d(out_channels, eps=eps)
        self.activation = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.normalization(self.convolution(x)))


class CLIPResNetBottleneck(GradientCheckpointingLayer):
    """1x1, 3x3, 1x1 convolutions around a shortcut; a stride is an average pool, so that nothing aliases."""

    def __init__(self, in_channels: int, channels: int, stride: int, eps: float):
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = CLIPResNetConvLayer(in_channels, channels, 1, eps)
        self.conv2 = CLIPResNetConvLayer(channels, channels, 3, eps)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = CLIPResNetConvLayer(channels, out_channels, 1, eps, activation=False)
        self.shortcut: nn.Module | None = None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = CLIPResNetConvLayer(in_channels, out_channels, 1, eps, activation=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x if self.shortcut is None else self.shortcut(self.pool(x))
        return F.relu(self.conv3(self.pool(self.conv2(self.conv1(x)))) + residual, inplace=True)


class CLIPResNetAttentionPool(nn.Module):
    """
    Attention pooling that keeps all positions: the mean token and every position are queries.

    Args:
        config (`PreTrainedConfig`): only its attention implementation is read.
        grid (`int`): rows and columns that there are learned positions for; other grids' are resized from these.
        hidden_size (`int`): channels of the map.
        num_heads (`int`): heads; must divide `hidden_size`.
        output_size (`int`): D.
    """

    def __init__(self, config: PreTrainedConfig, grid: int, hidden_size: int, num_heads: int, output_size: int):
        super().__init__()
        self.position_embedding = nn.Parameter(torch.empty(1 + grid**2, hidden_size))
        self.attention = MultiHeadAttention(config, hidden_size, num_heads, output_size=output_size)

    def initialize(self) -> None:
        """Start values, as CLIP's: all from a normal with one over the root of `hidden_size`, no biases."""
        std = self.position_embedding.shape[1] ** -0.5
        init.normal_(self.position_embedding, std=std)
        for layer in self.attention.children():
            init.normal_(layer.weight, std=std)
            init.zeros_(layer.bias)

    def forward(self, c5: torch.Tensor) -> torch.Tensor:
        """`c5` `(B, C, h, w)` -> tokens `(B, 1 + h*w, D)`, the global one first."""
        tokens = c5.flatten(2).transpose(1, 2)  # B, C, h, w -> B, h*w, C
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + resize_position_grid(self.position_embedding, c5.shape[-2:]).to(tokens.dtype)
        return self.attention(tokens, tokens)


class CLIPResNetPreTrainedModel(PreTrainedModel):
    """Weight initialization and the loading machinery of the ResNet image tower."""

    config: CLIPResNetVisionConfig
    config_class = CLIPResNetVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["CLIPResNetBottleneck", "CLIPResNetAttentionPool"]

    @classmethod
    def is_custom_code(cls) -> bool:
        # Every initialization below respects already loaded weights, which is what this switch guards against.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, CLIPResNetAttentionPool):
            module.initialize()
        else:
            super()._init_weights(module)
        if isinstance(module, CLIPResNetBottleneck):
            # A block that starts as its shortcut, as in CLIP.
            init.zeros_(module.conv3.normalization.weight)


class CLIPResNetVisionModel(CLIPResNetPreTrainedModel):
    """
    CLIP's modified ResNet with attention pooling, for images of any size.

    Args:
        config ([`CLIPResNetVisionConfig`]): its architecture.

    Example:

    ```python
    >>> import torch
    >>> from denseclip_hf import CLIPResNetVisionConfig, CLIPResNetVisionModel

    >>> model = CLIPResNetVisionModel(CLIPResNetVisionConfig()).eval()
    >>> model(torch.zeros(1, 3, 224, 224)).pooler_output.shape
    torch.Size([1, 1024])
    ```
    """

    def __init__(self, config: CLIPResNetVisionConfig):
        super().__init__(config)
        width, eps = config.embedding_size, config.batch_norm_eps
        self.stem = nn.Sequential(
            CLIPResNetConvLayer(config.num_channels, width // 2, 3, eps, stride=2),
            CLIPResNetConvLayer(width // 2, width // 2, 3, eps),
            CLIPResNetConvLayer(width // 2, width, 3, eps),
            nn.AvgPool2d(2),
        )
        stages, in_channels = [], width
        for index, (depth, out_channels) in enumerate(zip(config.depths, config.hidden_sizes, strict=True)):
            blocks = []
            for block in range(depth):
                stride = 2 if block == 0 and index > 0 else 1
                blocks.append(CLIPResNetBottleneck(in_channels, out_channels // 4, stride, eps))
                in_channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.attention_pool: CLIPResNetAttentionPool | None = CLIPResNetAttentionPool(
            config, config.image_size // 32, config.hidden_size, config.num_attention_heads, config.projection_dim
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.stem[0].convolution

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = True,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> CLIPResNetVisionModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): normalized images.
            interpolate_pos_encoding (`bool`): accepted for `CLIPModel`'s sake; positions always fit the input.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*): also return the stem's output and the
                feature maps as `hidden_states`; indices return only those, and `None` for the others.

        Returns:
            [`CLIPResNetVisionModelOutput`]
        """
        stem = x = self.stem(pixel_values.to(self.stem[0].convolution.weight.dtype))
        feature_maps = []
        for stage in self.stages:
            x = stage(x)
            feature_maps.append(x)
        tokens = self.attention_pool(x) if self.attention_pool is not None else None
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return CLIPResNetVisionModelOutput(
            last_hidden_state=tokens,
            pooler_output=tokens[:, 0] if tokens is not None else None,
            feature_maps=tuple(feature_maps),
            hidden_states=choose_hidden_states((stem, *feature_maps), output_hidden_states),
        )


class CLIPResNetModel(CLIPModel):
    """
    A `CLIPModel` whose image tower is [`CLIPResNetVisionModel`]: OpenAI's `RN50` and `RN101`.

    Everything else (text tower, contrastive loss, `get_image_features`, …) is `CLIPModel`'s own. The attention pooling
    projects into the shared space, so `visual_projection` is the identity.
    """

    config_class = CLIPResNetConfig
    _no_split_modules = [*CLIPPreTrainedModel._no_split_modules, *CLIPResNetPreTrainedModel._no_split_modules]

    def __init__(self, config: CLIPResNetConfig):
        CLIPPreTrainedModel.__init__(self, config)  # CLIPModel's own would build a ViT
        self.projection_dim = config.projection_dim
        self.text_embed_dim = config.text_config.hidden_size
        self.vision_embed_dim = config.vision_config.hidden_size
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.vision_model = CLIPResNetVisionModel._from_config(config.vision_config)
        self.visual_projection = nn.Identity()
        self.text_projection = nn.Linear(self.text_embed_dim, self.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # CLIP's own leaves it unset when a checkpoint lacks it; a segmenter may have taken it out.
        if isinstance(module, CLIPResNetModel) and module.logit_scale is not None:
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)


__all__ = [
    "CLIPResNetAttentionPool",
    "CLIPResNetModel",
    "CLIPResNetPreTrainedModel",
    "CLIPResNetVisionModel",
    "CLIPResNetVisionModelOutput",
]
