"""How each family of image-text models is read.

Of images: four feature maps, and one embedding per place in the space of the texts; of texts: one embedding per
prompt. Nothing else asks which family a model is of: what depends on it is here, in one class per family and one row
of `TOWERS`; [`BackboneTower`] reads images in place of a family's own tower.

Shapes: B images, H x W pixels, h x w the grid of the dense embedding map, C tower width, D embedding size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import nn
from transformers import AutoBackbone, CLIPModel, PreTrainedConfig, PreTrainedModel
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from .configuration_denseclip import DenseCLIPConfig, LastBlockName
from .dense_attention_denseclip import LAST_BLOCKS, last_block, repaired_features, word_positions
from .layers_denseclip import ImageNorm, StochasticDepth, resize_position_grid
from .modeling_clip_resnet import CLIPResNetAttentionPool, CLIPResNetModel
from .text_encoder_denseclip import BidirectionalTextTower, PackedPrompts, TextTower


class ImageFeatures(NamedTuple):
    """What a tower says about an image."""

    feature_maps: list[
        torch.Tensor
    ]  # (B, C_i, H / s, W / s): a ResNet's strides 4, 8, 16, 32; a ViT's one, four times
    context: torch.Tensor | None  # [z_bar, z] as (B, 1 + h*w, D), not normalized, row-major; None without guidance
    grid: tuple[int, int]  # h, w


class ViTPyramid(nn.Module):
    """Four maps at a ViT's one stride -> strides 4, 8, 16, 32 (for patches of 16 pixels)."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.up4 = nn.Sequential(
            ImageNorm(channels, eps),
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
            nn.BatchNorm2d(channels, eps=eps),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
        )
        self.up2 = nn.Sequential(ImageNorm(channels, eps), nn.ConvTranspose2d(channels, channels, 2, stride=2))
        self.same = ImageNorm(channels, eps)
        self.down2 = nn.Sequential(ImageNorm(channels, eps), nn.MaxPool2d(2))

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Four `(B, C, h, w)` -> c2 … c5 of heights 4h, 2h, h, h // 2."""
        if torch.is_grad_enabled() and self.same.weight.requires_grad and not maps[0].requires_grad:
            # Behind a frozen tower: on a CPU, torch's gradient of a group norm of channels-last maps crashes.
            maps = [x.contiguous() for x in maps]
        return [step(x) for step, x in zip((self.up4, self.up2, self.same, self.down2), maps, strict=True)]


def drop(model: nn.Module, names: Sequence[str]) -> None:
    """
    Take out the modules and parameters `names`, such as `"vision_model.head"`.

    Where a family's own initialization fills a parameter, as CLIP's does not, an unsaved buffer stays in its place.
    """
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        old = getattr(owner, child)
        setattr(owner, child, None)
        if isinstance(old, nn.Parameter) and not isinstance(model, CLIPModel):
            delattr(owner, child)
            owner.register_buffer(child, old.detach().clone(), persistent=False)


def check_last_block(tower: Any, config: DenseCLIPConfig) -> None:
    """
    Raises:
        ValueError: for a `last_block` that this kind of tower does not have.
    """
    if config.last_block not in tower.last_blocks:
        kind = (config.backbone_config or config.clip_config).model_type
        raise ValueError(
            f"`last_block={config.last_block!r}` needs a tower like CLIP's ViT; of {kind!r} it can be "
            f"{' or '.join(tower.last_blocks)}."
        )


class ViTTower(TextTower):
    """A vision transformer built like CLIP's: a class token; the last norm and the projection of all tokens."""

    image_mean, image_std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD  # for pixels in 0 … 1
    default_image_size = 640
    # The first are always dropped, the others, which embed places, only if `use_text_guidance` is false.
    pretraining_parts: tuple[str, ...] = ("logit_scale",)
    image_parts: tuple[str, ...] = ("visual_projection", "vision_model.post_layernorm")
    blocks = "vision_model.encoder.layers"
    branches = ("self_attn", "mlp")  # names in a block
    last_blocks: tuple[str, ...] = get_args(LastBlockName)
    position_key = "vision_model.embeddings.position_embedding.weight"
    position_options: dict[str, Any] = {}  # arguments of `resize_position_grid`
    words_options: dict[str, Any] = {}  # options of the config, for words without training

    @classmethod
    def adapt(cls, model: Any) -> None:
        """
        Give the image tower of `model.clip` positions for any size and stochastic depth; drop what nothing uses.

        Raises:
            ValueError: for a `last_block` that only towers like CLIP's have.
        """
        clip, config = model.clip, model.config
        check_last_block(cls, config)
        embeddings = clip.vision_model.embeddings
        # The family's own method has a shortcut for images of the pretrained size, which exported programs would keep.
        embeddings.interpolate_pos_encoding = partial(cls.positions_for, embeddings, config)
        blocks = clip.get_submodule(cls.blocks)
        for index, block in enumerate(blocks):
            rate = config.drop_path_rate * index / max(len(blocks) - 1, 1)
            for name in cls.branches:
                block.get_submodule(name).register_forward_hook(StochasticDepth(rate))
        drop(clip, cls.pretraining_parts)
        if not config.use_text_guidance:
            drop(clip, cls.image_parts)

    @classmethod
    def resize_positions(cls, positions: torch.Tensor, wanted: torch.Size) -> torch.Tensor:
        """Learned positions `(first + n * n, C)`, resized to the square grid of the shape `wanted`."""
        first = cls.position_options.get("first", 1)
        side = round((wanted[-2] - first) ** 0.5)
        grid = positions.float().reshape(-1, wanted[-1])
        return resize_position_grid(grid, (side, side), **cls.position_options).reshape(wanted)

    @classmethod
    def positions_for(
        cls, embeddings: nn.Module, config: DenseCLIPConfig, _: torch.Tensor, height: int, width: int
    ) -> torch.Tensor:
        """Learned positions of the tokens of images of `height` x `width` pixels, `(first + h*w, C)`."""
        grid = (height // config.embedding_stride, width // config.embedding_stride)
        return cls.resize_to_grid(cls.learned_positions(embeddings), grid, config)

    @staticmethod
    def learned_positions(embeddings: Any) -> torch.Tensor:
        """`(first + n * n, C)`."""
        # The module is called, rather than its weight read, so that accelerate's offload hooks run.
        return embeddings.position_embedding(embeddings.position_ids)[0]

    @classmethod
    def resize_to_grid(cls, positions: torch.Tensor, grid: tuple[int, int], config: DenseCLIPConfig) -> torch.Tensor:
        """`positions` `(first + n * n, C)` for a grid (h, w)."""
        return resize_position_grid(positions, grid, **cls.position_options)

    @staticmethod
    def pyramid(config: DenseCLIPConfig) -> nn.Module | None:
        """Makes maps of strides 4 to 32 of the tower's."""
        return ViTPyramid(config.feature_channels[0], config.batch_norm_eps)

    @classmethod
    def encode(cls, model: Any, pixel_values: torch.Tensor, plain: bool = False) -> ImageFeatures:
        """`pixel_values` `(B, 3, H, W)` -> [`ImageFeatures`]; `plain` whatever `config.last_block` says."""
        clip, config = model.clip, model.config
        patch = config.embedding_stride
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        hidden = cls.embed_patches(clip.vision_model, pixel_values)  # B, tokens, C: the last h*w are the grid's
        first = cls.num_global_tokens(clip.vision_model)
        taps = {}
        blocks = clip.get_submodule(cls.blocks)
        states = []
        for index, block in enumerate(blocks):
            states.append(hidden)
            if index < len(blocks) - 1 or config.last_block == "plain" or plain:
                hidden = block(hidden, None)
            elif config.last_block == "sfp":
                hidden = torch.cat([block(hidden, None)[:, :1], repaired_features(blocks, states, grid)], dim=1)
            elif config.last_block == "class_token":
                hidden = values_beside_class_token(block, hidden)
            else:
                hidden = last_block(block, hidden, grid, LAST_BLOCKS[config.last_block])
            if index in config.out_indices:
                taps[index] = hidden[:, first:].transpose(1, 2).unflatten(2, grid)  # B, h*w, C -> B, C, h, w
        context = cls.embed_places(clip, hidden) if config.use_text_guidance else None
        return ImageFeatures([taps[index] for index in config.out_indices], context, grid)

    @staticmethod
    def num_global_tokens(vision: nn.Module) -> int:
        """Tokens before those of the grid."""
        return 1

    @staticmethod
    def embed_patches(vision: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` -> what goes into the first block, `(B, tokens, C)`."""
        return vision.pre_layrnorm(vision.embeddings(pixel_values, interpolate_pos_encoding=True))

    @staticmethod
    def embed_places(clip: Any, hidden: torch.Tensor) -> torch.Tensor:
        """What comes out of the last block, `(B, tokens, C)` -> `[z_bar, z]` `(B, 1 + h*w, D)`."""
        return clip.visual_projection(clip.vision_model.post_layernorm(hidden))


def values_beside_class_token(layer: CLIPEncoderLayer, hidden: torch.Tensor) -> torch.Tensor:
    """A block of `hidden` `(B, 1 + h*w, C)` whose tokens keep their own values, each added to the class token."""
    values = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(hidden)))
    hidden = hidden[:, :1] + values
    return hidden + layer.mlp(layer.layer_norm2(hidden))


class CLIPTower(ViTTower):
    """CLIP, with positions for any size as DenseCLIP or the config has them."""

    description = "CLIP's vision transformer"
    words_options = {"last_block": "naclip", "position_interpolation": "bicubic_by_factor"}

    @staticmethod
    def model_class():
        return CLIPModel

    @classmethod
    def resize_to_grid(cls, positions, grid, config):
        if config.position_interpolation == "bicubic_by_factor":
            return word_positions(positions, grid)
        return resize_position_grid(positions, grid, config.position_interpolation)


class ResNetTower(TextTower):
    """CLIP's modified ResNet: its four stages; the attention pooling of all positions."""

    image_mean, image_std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    description = "CLIP's modified ResNet"
    default_image_size = 512
    pretraining_parts: tuple[str, ...] = ("logit_scale",)
    last_blocks = ("plain", "maskclip")
    position_key = "vision_model.attention_pool.position_embedding"
    resize_positions = ViTTower.resize_positions
    position_options: dict[str, Any] = {}
    words_options: dict[str, Any] = {"last_block": "maskclip"}

    @staticmethod
    def model_class() -> type[PreTrainedModel]:
        """The class of the image-text model."""
        return CLIPResNetModel

    @staticmethod
    def adapt(model: Any) -> None:
        """
        Drop what nothing uses.

        Raises:
            ValueError: for a `last_block` that only vision transformers have.
        """
        check_last_block(ResNetTower, model.config)
        drop(model.clip, ResNetTower.pretraining_parts)
        if not model.config.use_text_guidance:
            drop(model.clip, ["visual_projection", "vision_model.attention_pool"])

    @staticmethod
    def pyramid(config: DenseCLIPConfig) -> None:
        """The stages have strides 4 to 32 themselves."""

    @staticmethod
    def encode(model: Any, pixel_values: torch.Tensor, plain: bool = False) -> ImageFeatures:
        """`pixel_values` `(B, 3, H, W)` -> [`ImageFeatures`]."""
        vision = model.clip.vision_model
        outputs = vision(pixel_values)
        maps, context = list(outputs.feature_maps), outputs.last_hidden_state
        if model.config.last_block == "maskclip" and context is not None and not plain:  # places keep their values
            attention = vision.attention_pool.attention
            values = attention.out_proj(attention.v_proj(maps[-1].flatten(2).transpose(1, 2)))  # B, h*w, D
            context = torch.cat([context[:, :1], values], dim=1)
        return ImageFeatures(maps, context, tuple(maps[-1].shape[-2:]))


class MetaClip2Tower(ViTTower):
    """MetaCLIP 2: CLIP with a multilingual vocabulary."""

    description = "MetaCLIP 2's vision transformer"
    position_options = {"mode": "bicubic"}
    words_options = {"last_block": "naclip"}

    @staticmethod
    def model_class():
        from transformers import MetaClip2Model

        return MetaClip2Model

    @staticmethod
    def special_token_ids(text_config):
        return None, text_config.eos_token_id  # the config's SOS is CLIP's, which the vocabulary does not have


class SiglipTower(BidirectionalTextTower, ViTTower):
    """
    SigLIP, and SigLIP 2 of a fixed size: attention pools an image's tokens; texts are padded to the last position.

    A place's embedding is what the pooling makes of this place alone.
    """

    description = "SigLIP's vision transformer"
    image_mean, image_std = (0.5,) * 3, (0.5,) * 3
    last_blocks = ("plain",)
    pretraining_parts = ("logit_scale", "logit_bias")
    image_parts = ("vision_model.head", "vision_model.post_layernorm")
    position_options = {"mode": "bicubic", "first": 0}
    has_eos = True

    @staticmethod
    def model_class():
        from transformers import SiglipModel

        return SiglipModel

    @staticmethod
    def num_global_tokens(vision):
        return 0

    @staticmethod
    def embed_patches(vision, pixel_values):
        return vision.embeddings(pixel_values, interpolate_pos_encoding=True)

    @staticmethod
    def embed_places(clip, hidden):
        head, hidden = clip.vision_model.head, clip.vision_model.post_layernorm(hidden)
        places = head(hidden.flatten(0, 1)[:, None])  # B * h * w pools of one place each, C
        return torch.cat([head(hidden)[:, None], places.unflatten(0, hidden.shape[:2])], dim=1)

    @classmethod
    def check_token_ids(cls, ids, config) -> None:
        room = config.clip_config.text_config.max_position_embeddings - config.num_context_tokens
        if len(ids) != room:
            raise ValueError(
                f"`class_token_ids` of a SigLIP must fill the {room} positions that the contexts leave, padding "
                f'included, got {len(ids)}: tokenize with `padding="max_length", max_length={room}`.'
            )

    @staticmethod
    def pad(text, tokenizer, room):
        return list(tokenizer(text, padding="max_length", max_length=room, truncation=False)["input_ids"])

    @staticmethod
    def read(clip, hidden, layout: PackedPrompts):
        last = hidden.flatten(0, 1)[layout.last_index]  # G, L, C -> K, C
        return clip.text_model.head(clip.text_model.final_layer_norm(last))


class Tipsv2Tower(BidirectionalTextTower, ViTTower):
    """TIPSv2: a class token and registers, patch tokens in the space of the texts; a text is its tokens' mean."""

    description = "TIPSv2's vision transformer"
    image_mean, image_std = (0.0,) * 3, (1.0,) * 3
    last_blocks = ("plain",)
    pretraining_parts = ("temperature", "vision_model.embeddings.mask_token")
    image_parts = ("vision_model.layernorm",)
    blocks = "vision_model.encoder.layer"
    branches = ("attention", "mlp")
    position_key = "vision_model.embeddings.position_embeddings"
    position_options = {"antialias": True}

    @staticmethod
    def learned_positions(embeddings):
        return embeddings.position_embeddings[0]

    @staticmethod
    def model_class():
        from transformers import Tipsv2Model

        return Tipsv2Model

    @staticmethod
    def num_global_tokens(vision):
        return 1 + vision.config.num_register_tokens

    @staticmethod
    def embed_patches(vision, pixel_values):
        return vision.embeddings(pixel_values)

    @classmethod
    def embed_places(cls, clip, hidden):
        hidden = clip.vision_model.layernorm(hidden)
        return torch.cat([hidden[:, :1], hidden[:, cls.num_global_tokens(clip.vision_model) :]], dim=1)

    @staticmethod
    def embed_tokens(clip, token_ids):
        # Scaled here, before contexts come in, so that these start at the size that the tower's inputs have.
        embeddings = clip.text_model.embeddings
        return embeddings.token_embedding(token_ids) * embeddings.embed_scale

    @staticmethod
    def read(clip, hidden, layout: PackedPrompts):
        is_text = (layout.owners >= 0)[..., None].to(hidden.dtype)  # G, L, 1
        hidden = clip.text_model.final_layer_norm(hidden) * is_text
        return hidden.sum(dim=1) / (is_text.sum(dim=1) + clip.text_model.config.pooling_epsilon)


class LinearPool(nn.Module):
    """One linear layer that embeds the mean and every position, in place of [`CLIPResNetAttentionPool`]."""

    def __init__(self, hidden_size: int, output_size: int):
        super().__init__()
        self.projection = nn.Linear(hidden_size, output_size)

    def forward(self, c5: torch.Tensor) -> torch.Tensor:
        """`c5` `(B, C, h, w)` -> tokens `(B, 1 + h*w, D)`, the global one first."""
        places = self.projection(c5.flatten(2).transpose(1, 2))  # B, C, h, w -> B, h*w, D
        return torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)


IMAGENET_NORMALIZATION = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class BackboneTower:
    """
    Any backbone of transformers in place of a family's image tower; the texts stay the family's.

    It knows nothing of language: an attention pool like CLIP's ResNet's on its last map, trained from random weights,
    brings its places into the space of the texts (Rao et al. 2022, section 3.5).
    """

    last_blocks = ("plain",)
    words_options: dict[str, Any] = {}
    position_key = ""  # the backbone resizes its own positions, and so does the pool

    def __init__(self, config: DenseCLIPConfig):
        self.image_mean, self.image_std = config.backbone_normalization or IMAGENET_NORMALIZATION

    @staticmethod
    def adapt(model: Any) -> None:
        """
        Give `model` its backbone and pool; drop what CLIP has for images.

        Raises:
            ImportError: if the backbone is of a library that is not installed.
            ValueError: for a `last_block`, or heads that do not divide the width.
        """
        config, clip = model.config, model.clip
        check_last_block(BackboneTower, config)
        parts = [name for name, _ in (*clip.named_children(), *clip.named_parameters(recurse=False))]
        drop(clip, [name for name in parts if name not in model.text_tower.text_parts])
        model.backbone = AutoBackbone.from_config(config.backbone_config)
        if not config.use_text_guidance:
            return
        width, heads = model.backbone.channels[-1], config.backbone_pool_num_attention_heads
        if config.backbone_pool == "linear":
            model.pool = LinearPool(width, config.embedding_size)
            return
        if heads is None:
            heads = next(count for count in range(max(width // 64, 1), 0, -1) if width % count == 0)
        grid = max(config.image_size // config.embedding_stride, 1)
        model.pool = CLIPResNetAttentionPool(config, grid, width, heads, config.embedding_size)

    @staticmethod
    def pyramid(config: DenseCLIPConfig) -> nn.Module | None:
        """Makes maps of strides 4 to 32 of a plain ViT's; the others' have them already."""
        return None if config.is_hierarchical else ViTPyramid(config.feature_channels[0], config.batch_norm_eps)

    @staticmethod
    def encode(model: Any, pixel_values: torch.Tensor, plain: bool = False) -> ImageFeatures:
        """`pixel_values` `(B, 3, H, W)` -> [`ImageFeatures`]."""
        maps = list(model.backbone(pixel_values).feature_maps)
        context = None if model.pool is None else model.pool(maps[-1])
        return ImageFeatures(maps, context, tuple(maps[-1].shape[-2:]))


# Image-text model's `model_type` -> how it is read.
TOWERS: dict[str, type] = {
    "clip": CLIPTower,
    "clip_resnet": ResNetTower,
    "metaclip_2": MetaClip2Tower,
    "siglip": SiglipTower,
    "tipsv2": Tipsv2Tower,
}


# Keys of `pretraining_parts` in a segmenter that was saved with them.
PRETRAINING_KEYS = [
    r"^clip\." + part.replace(".", r"\.") + "$"
    for part in sorted({part for tower in TOWERS.values() for part in tower.pretraining_parts})
]


def tower_of(clip_config: PreTrainedConfig | type[PreTrainedConfig]) -> Any:
    """
    The row of `TOWERS` for an image-text model's config, or its class.

    Raises:
        ValueError: if there is none.
    """
    if clip_config.model_type not in TOWERS:
        raise ValueError(
            f"a model of type {clip_config.model_type!r} is no image-text model that can be read here: give one of "
            f"the types {', '.join(TOWERS)}."
        )
    return TOWERS[clip_config.model_type]


def image_tower_of(config: DenseCLIPConfig) -> Any:
    """How a model of `config` reads images: with its backbone, or as the family of its `clip_config` does."""
    return tower_of(config.clip_config) if config.backbone_config is None else BackboneTower(config)


def check_normalization(image_processor: Any, config: DenseCLIPConfig) -> None:
    """
    Raises:
        ValueError: if `image_processor` normalizes images in another way than the image-text model was trained with.
    """
    tower = image_tower_of(config)
    for name in ("image_mean", "image_std"):
        wanted, given = list(getattr(tower, name)), getattr(image_processor, name, None)
        if given is None:
            continue
        try:
            is_close = np.allclose(given, wanted, rtol=0, atol=1e-3)
        except (TypeError, ValueError):
            is_close = False
        if not is_close:
            raise ValueError(
                f"the image processor's `{name}` is {given}, but this model's image tower was trained with {wanted}: "
                "give a processor of its family, or these numbers to `DenseCLIPImageProcessor`."
            )


def check_images(pixel_values: torch.Tensor, config: DenseCLIPConfig) -> None:
    """
    Raises:
        ValueError: if `pixel_values` is no batch of images, or they are smaller than a position of the coarsest map.
    """
    is_batch = pixel_values.dim() == 4
    if is_batch and (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # programs take any number and size
        return
    least = config.coarsest_stride if config.tower_image_size is None else 1
    if not is_batch or not len(pixel_values) or min(pixel_values.shape[-2:]) < least:
        raise ValueError(
            f"`pixel_values` must have the shape (images, channels, height, width), with at least one image and sides "
            f"of {least} pixels or more, got {tuple(pixel_values.shape)}."
        )


__all__ = [
    "PRETRAINING_KEYS",
    "TOWERS",
    "BackboneTower",
    "ImageFeatures",
    "ResNetTower",
    "ViTPyramid",
    "ViTTower",
    "check_images",
    "check_normalization",
    "check_last_block",
    "drop",
    "image_tower_of",
    "tower_of",
]
