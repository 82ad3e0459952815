"""DenseCLIP: language-guided dense prediction with context-aware prompting (Rao et al. 2022, section 3).

[`DenseCLIPModel`] matches places of images with words; [`DenseCLIPForSemanticSegmentation`] is that and a decoder.

Shapes: B images, K classes, D embedding size, H x W pixels, h x w the grid of the score map, M = 1 + h*w.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .class_names_denseclip import class_names, class_phrasings
from .configuration_denseclip import (
    COST_AGGREGATION_OPTIONS,
    DenseCLIPConfig,
    check_ignore_index,
    check_stride,
    refuse_if_frozen,
)
from .cost_aggregation_denseclip import ClassBlock, CostAggregationHead, Linear
from .decoder_denseclip import ContextDecoder, FPNNeck, SemanticFPNHead, SemanticFPNScaleHead, cosine_score_maps
from .layers_denseclip import choose_hidden_states, is_transformed, resize_bilinear
from .loading_denseclip import (
    load_backbone,
    load_clip,
    load_clip_weights,
    load_pretrained,
    loading_report,
    resized_convolution,
)
from .modeling_clip_resnet import CLIPResNetAttentionPool
from .resizing_denseclip import resize_argmax
from .text_encoder_denseclip import (
    ClassEmbeddingCache,
    ContextPrompts,
    PackedPrompts,
    encode_prompts,
    tokenize_classes,
)
from .towers_denseclip import PRETRAINING_KEYS, ImageFeatures, check_images, drop, image_tower_of, tower_of


logger = logging.get_logger(__name__)

# Resized logits that exist at a time (16 MiB of float32).
_CHUNK_ELEMENTS = 2**22
# Sentences that a class name is put into where a model has learned no prompt of its own.
ZERO_SHOT_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "there is a {} in the scene.",
    "part of a {} in a photo.",
)
# What a model starts from that matches words with images untrained.
WORDS_OPTIONS = {
    "num_context_tokens": 0, "context_decoder_num_layers": 0, "temperature": 1 / 40, "inference_mode": "slide",
    "crop_size": 224, "stride": 112,
}  # fmt: skip
# Prompts that go through the text tower at a time.
PROMPTS_PER_PASS = 1024


@dataclass
class DenseCLIPSemanticSegmenterOutput(ModelOutput):
    """
    Output of [`DenseCLIPForSemanticSegmentation`].

    Args:
        loss (`torch.Tensor` of shape `()`, returned with `labels`): `decode_loss + auxiliary_loss`.
        decode_loss (`torch.Tensor` of shape `()`, returned with `labels`): cross entropy of the logits, and Dice's
            loss if the config asks for it; with cost aggregation binary ones of every class by itself.
        auxiliary_loss (`torch.Tensor` of shape `()`, returned with `labels` and text guidance, not by a sliding
            window): cross entropy of the score maps over τ, already weighted.
        logits (`torch.Tensor` of shape `(batch_size, num_labels, height / 4, width / 4)`, or
            `(batch_size, num_labels, height, width)` from a sliding window): class scores before softmax. With cost
            aggregation one channel for each class that was asked for, before a sigmoid, four times as many rows and
            columns as the image tower's grid; `inference_mode="slide_and_whole"` gives probabilities instead.
        score_maps (`torch.Tensor` of shape `(batch_size, num_labels, h, w)`): cosines of every position's embedding
            with every class's, not divided by τ. Absent without text guidance and from a sliding window.
        text_embeds (`torch.Tensor` of shape `(batch_size, num_labels, projection_dim)`): t', the class embeddings
            in the image's context. Absent like `score_maps`.
        hidden_states (`tuple(torch.Tensor)`, returned with `output_hidden_states=True`): the image encoder's c2 … c5,
            each `(batch_size, channels, height / s, width / s)`, before the score map joins one of them. Absent from a
            sliding window and for a list of images.
    """

    loss: torch.Tensor | None = None
    decode_loss: torch.Tensor | None = None
    auxiliary_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    score_maps: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Segmentation(NamedTuple):
    """What one pass over whole images gives; see [`DenseCLIPSemanticSegmenterOutput`]."""

    logits: torch.Tensor
    score_maps: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None


@dataclass
class ScoreSegmentation(ModelOutput):
    """
    Output of [`DenseCLIPForSemanticSegmentation.predict_from_scores`].

    Args:
        segmentation (`list[torch.Tensor]`): one `(H, W)` int64 map of class ids 0 … K-1 per image.
        score_maps (`torch.Tensor` of shape `(B, K, h, w)`, or `(B, K, height, width)` from a sliding window): cosines;
            for images given as a list, a list of B tensors `(K, h, w)`.
    """

    segmentation: list[torch.Tensor] | None = None
    score_maps: torch.Tensor | list[torch.Tensor] | None = None


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side; the last window is moved back inside the image.

    >>> window_starts(1024, 512, 341)
    [0, 341, 512]
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def sliding_window_logits(
    predict: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    crop_size: Sequence[int],
    stride: Sequence[int],
    batch_size: int | None = None,
) -> torch.Tensor:
    """
    Average the logits of overlapping windows. An image smaller than the window is used as it is, never padded.

    Args:
        predict (`Callable`): maps windows `(n, 3, h, w)` to logits `(n, K, h', w')`, which are resized to `(h, w)`.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalized images.
        crop_size (`tuple[int, int]`): window height and width in pixels.
        stride (`tuple[int, int]`): step down and right in pixels, at most `crop_size`.
        batch_size (`int`, *optional*): windows given to `predict` at a time; by default 4, on a CPU one.

    Returns:
        `torch.Tensor` of shape `(batch_size, K, height, width)`: averaged logits in float32.

    Raises:
        ValueError: if `stride` is larger than `crop_size`, so that pixels would be left out.
    """
    if batch_size is None:
        batch_size = 1 if pixel_values.device.type == "cpu" else 4
    check_stride(crop_size, stride)
    height, width = pixel_values.shape[-2:]
    h, w = min(crop_size[0], height), min(crop_size[1], width)
    windows = [
        (image, top, left)
        for image in range(len(pixel_values))
        for top in window_starts(height, h, stride[0])
        for left in window_starts(width, w, stride[1])
    ]
    weights = _weights(height, width, h, w, stride).to(pixel_values.device)
    total = None
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        crops = torch.stack([pixel_values[i, :, top : top + h, left : left + w] for i, top, left in batch])
        logits = predict(crops)
        if total is None:
            total = torch.zeros(len(pixel_values), logits.shape[1], height, width, device=logits.device)
        for (image, top, left), window in zip(batch, logits, strict=True):
            rows, columns = slice(top, top + h), slice(left, left + w)
            # Resizing a few classes at a time keeps them in the cache.
            for start in range(0, len(window), max(1, _CHUNK_ELEMENTS // (h * w))):
                some = slice(start, start + max(1, _CHUNK_ELEMENTS // (h * w)))
                resized = resize_bilinear(window[None, some].float(), (h, w))[0]
                total[image, some, rows, columns] += resized * weights[rows, columns]
    assert total is not None, "no image"
    return total


def _weights(height: int, width: int, h: int, w: int, stride: Sequence[int]) -> torch.Tensor:
    """`(height, width)`: one over the number of windows of h x w that see a pixel."""
    counts = []
    for length, window, step in ((height, h, stride[0]), (width, w, stride[1])):
        count = torch.zeros(length)
        for start in window_starts(length, window, step):
            count[start : start + window] += 1
        counts.append(count)
    return 1 / (counts[0][:, None] * counts[1])


def checked_labels(
    labels: torch.Tensor, batch_size: int, config: DenseCLIPConfig, num_labels: int | None = None
) -> torch.Tensor:
    """
    `labels` as int64, once they fit the images and the classes.

    Args:
        labels (`torch.Tensor`): what should be integers of shape `(batch_size, H, W)`.
        batch_size (`int`): number of images.
        config ([`DenseCLIPConfig`]): K classes, and the label that is ignored.
        num_labels (`int`, *optional*): K, where others than the model's classes are asked for.

    Raises:
        ValueError: for another shape or type or, on a CPU, a label that is no class.
    """
    if labels.dim() != 3 or len(labels) != batch_size or labels.is_floating_point():
        raise ValueError(
            f"`labels` must hold one integer map per image, shape ({batch_size}, height, width), got {labels.dtype} "
            f"of shape {tuple(labels.shape)}."
        )
    labels = labels.long()
    # On an accelerator this would make the host wait; cross entropy refuses such labels there too.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed():
        known = labels[labels != config.semantic_loss_ignore_index]
        num_labels = config.num_labels if num_labels is None else num_labels
        if known.numel() and (known.min() < 0 or known.max() >= num_labels):
            raise ValueError(
                f"`labels` has values from {known.min()} to {known.max()}, but the model's classes are "
                f"0 … {num_labels - 1} and {config.semantic_loss_ignore_index} is ignored: check the masks, or "
                "whether they need `do_reduce_labels`."
            )
    return labels


def over_strips(
    summed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """
    The sum of `summed(resized, labels)` over strips of rows, `resized` being `logits` at the labels' size in float32.

    Strips are resized one after the other, and again in the backward pass, so that memory does not grow with K*H*W.
    For losses that are sums over pixels, or made of such sums; one that ranks all pixels needs them at once.

    Args:
        summed (`Callable`): maps `(B, K, r, W)` scores and `(B, r, W)` labels to a tensor that is summed over pixels.
        logits (`torch.Tensor` of shape `(B, K, h, w)`): class scores, resized bilinearly.
        labels (`torch.Tensor` of shape `(B, H, W)`): int64 class ids.
    """

    rows, (height, width) = logits.shape[-2], labels.shape[-2:]
    step = max(1, _CHUNK_ELEMENTS // max(logits.shape[0] * logits.shape[1] * width, 1))
    # A compiler fuses the steps by itself.
    if step >= height or torch.compiler.is_compiling() or is_transformed():
        with torch.autocast(logits.device.type, enabled=False):
            return summed(resize_bilinear(logits.float(), (height, width)), labels)

    def strip(wanted: torch.Tensor, upper: torch.Tensor, share: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        with torch.autocast(wanted.device.type, enabled=False):
            lines = torch.stack(parts, dim=2)  # (B, K, w) each -> B, K, n, w
            lower = (upper + 1).clamp(max=len(parts) - 1)
            lines = torch.lerp(lines.index_select(2, upper), lines.index_select(2, lower), share)  # B, K, r, w
            resized = F.interpolate(lines.flatten(0, 1), width, mode="linear").unflatten(0, logits.shape[:2])
            return summed(resized, wanted)

    # Centers of the labels' rows in the logits: the row above each, and how far below that in parts of 2 * height.
    centers = [divmod(max((2 * row + 1) * rows - height, 0), 2 * height) for row in range(height)]
    upper, below = torch.tensor(centers, device=logits.device).unbind(1)
    share = below[:, None] / (2 * height)
    total, lines = torch.zeros((), device=logits.device), logits.float().unbind(2)  # whose gradients are added up once
    for top in range(0, height, step):
        part = slice(top, min(top + step, height))
        first, last = centers[top][0], centers[part.stop - 1][0]
        inputs = labels[:, part], upper[part] - first, share[part], *lines[first : last + 2]
        total = total + checkpoint(strip, *inputs, use_reentrant=False, preserve_rng_state=False)
    return total


def pixel_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    binary: bool = False,
    class_weights: Sequence[float] | None = None,
    focal_gamma: float = 0.0,
) -> torch.Tensor:
    """
    Cross entropy of `logits` resized bilinearly to `labels`, in float32, averaged over all B*H*W pixels.

    Ignored pixels count as zero, as in the original: a padded image weighs less and one without labels gives 0.

    Args:
        logits (`torch.Tensor` of shape `(B, K, h, w)`): class scores.
        labels (`torch.Tensor` of shape `(B, H, W)`): int64 class ids or `ignore_index`.
        ignore_index (`int`): label of pixels that do not count.
        binary (`bool`): decide for every class by itself, averaged over all B*K*H*W decisions; a pixel with
            `ignore_index` is of no class then, as CAT-Seg trains it.
        class_weights (sequence of K `float`s, *optional*): what a pixel of each class counts.
        focal_gamma (`float`): γ of the focal loss (Lin et al. 2017), by which pixels count less the surer they are.

    Returns:
        `torch.Tensor` of shape `()`, float32.
    """
    weights = None if class_weights is None else torch.tensor(class_weights, device=logits.device).float()

    def decisions(resized: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        known = wanted != ignore_index
        chosen = resized.gather(1, torch.where(known, wanted, 0)[:, None])[:, 0]
        return F.softplus(resized).sum() - torch.where(known, chosen, 0).sum()

    def cross_entropy(resized: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if not focal_gamma:
            return F.cross_entropy(resized, wanted, weights, ignore_index=ignore_index, reduction="sum")
        loss = F.cross_entropy(resized, wanted, ignore_index=ignore_index, reduction="none")
        loss = loss * (-torch.expm1(-loss)).clamp(min=1e-12) ** focal_gamma  # its derivative at 0 stays finite
        return (loss if weights is None else loss * weights[torch.where(wanted == ignore_index, 0, wanted)]).sum()

    count = labels.numel() * (logits.shape[1] if binary else 1)
    return over_strips(decisions if binary else cross_entropy, logits, labels) / count


def dice_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """
    One minus the soft Dice coefficient (Milletari et al. 2016), averaged over the classes that the batch shows.

    Args:
        logits (`torch.Tensor` of shape `(B, K, h, w)`): class scores, resized bilinearly to the labels.
        labels (`torch.Tensor` of shape `(B, H, W)`): int64 class ids or `ignore_index`.
        ignore_index (`int`): label of pixels that do not count.

    Returns:
        `torch.Tensor` of shape `()`, float32; 0 if no pixel has a class.
    """

    def counts(resized: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        known = (wanted != ignore_index)[:, None]
        predicted = resized.softmax(1) * known
        true = F.one_hot(wanted.where(known[:, 0], 0), resized.shape[1]).movedim(-1, 1) * known
        return torch.stack([each.sum((0, 2, 3)).float() for each in (predicted * true, predicted, true)])

    both, predicted, true = over_strips(counts, logits, labels)
    shown = true > 0
    return ((1 - (2 * both + 1) / (predicted + true + 1)) * shown).sum() / shown.sum().clamp(min=1)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, and afterwards each of its parts in the mode it was in."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for part, training in modes:
            part.training = training


def forward_by_size(
    forward: Callable[[torch.Tensor], dict[str, torch.Tensor]], images: Sequence[torch.Tensor]
) -> dict[str, list[torch.Tensor]]:
    """
    Run `forward` on images of any sizes, those of one size together; each has the result it has alone.

    Args:
        forward (`Callable`): maps `pixel_values` `(n, 3, H, W)` to named tensors of n rows.
        images (sequence of tensors `(3, H, W)` or `(1, 3, H, W)`): B images.

    Returns:
        The same names with lists of B tensors, in the order of the images.
    """
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(tuple(image.shape[-2:]), []).append(index)
    results: dict[str, list] = {}
    for indices in by_size.values():
        outputs = forward(torch.stack([images[i].reshape(images[i].shape[-3:]) for i in indices]))
        for name, rows in outputs.items():
            places = results.setdefault(name, [None] * len(images))
            for row, index in zip(rows, indices, strict=True):
                places[index] = row
    return results


class DenseCLIPPreTrainedModel(PreTrainedModel):
    """Weight initialization and the loading machinery."""

    config: DenseCLIPConfig
    config_class = DenseCLIPConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = PRETRAINING_KEYS
    _no_split_modules = [
        "CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPVisionEmbeddings", "CLIPResNetBottleneck",
        "CLIPResNetAttentionPool", "ContextDecoderLayer", "ContextPrompts", "CostAggregationLayer",
    ]  # fmt: skip

    @classmethod
    def is_custom_code(cls) -> bool:
        # Every initialization below respects already loaded weights, which is what this switch guards against.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, Linear)):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            std = self.config.initializer_range
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ClassBlock):
            if module.max_classes:
                init.zeros_(module.padding_token)
                init.zeros_(module.padding_guidance)
        elif isinstance(module, (ContextPrompts, CLIPResNetAttentionPool)):
            module.initialize()
        elif isinstance(module, DenseCLIPModel):
            if module.gamma is not None:
                init.constant_(module.gamma, float(self.config.gamma_init))
            if module.config.frozen_classes:
                init.normal_(module.class_embeddings, std=self.config.embedding_size**-0.5)
        else:
            super()._init_weights(module)
        if isinstance(module, SemanticFPNScaleHead):
            for layer in module:
                if isinstance(layer, nn.Conv2d):
                    init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class DenseCLIPModel(DenseCLIPPreTrainedModel):
    """
    Matches every place of an image with words: the two towers, prompts and the context decoder.

    Args:
        config ([`DenseCLIPConfig`]): its architecture and class names.
    """

    _keys_to_ignore_on_load_unexpected = [*PRETRAINING_KEYS, r"^(pyramid|neck|decode_head)\."]

    def __init__(self, config: DenseCLIPConfig):
        super().__init__(config)
        self.tower, self.text_tower = image_tower_of(config), tower_of(config.clip_config)
        self.clip = self.text_tower.model_class()(config.clip_config)
        self.backbone = self.pool = None
        self.tower.adapt(self)
        self.prompts = self.context_decoder = self.gamma = None
        if not config.use_text_guidance or config.frozen_classes:
            drop(self.clip, self.text_tower.text_parts)
        if config.use_text_guidance:
            size = config.embedding_size
            if config.frozen_classes:
                self.register_buffer("class_embeddings", torch.empty(config.num_labels, size))
            else:
                self.prompts = ContextPrompts(config, self.text_tower)
            if config.prompting == "pre_model":
                self.context_decoder = ContextDecoder(config, config.clip_config.text_config.hidden_size)
            elif config.context_decoder_num_layers:
                self.context_decoder = ContextDecoder(config, size)
                del self.gamma
                if config.gamma_learnable:
                    self.gamma = nn.Parameter(torch.empty(size))
                else:
                    self.register_buffer("gamma", torch.empty(size))
        self._class_embeddings = ClassEmbeddingCache()
        self._add_decoder()
        self.post_init()
        if config.frozen_classes:
            self.eval().requires_grad_(False)

    def _add_decoder(self) -> None:
        """What a model has beside the matching."""

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the options that are passed on are not repeated
        cls, pretrained_model_name_or_path, *args, config=None, output_loading_info: bool = False, **kwargs
    ):
        """
        [`PreTrainedModel.from_pretrained`]. With other `id2label` than the saved one, as an argument or in `config`,
        the model is loaded as it was saved and given these classes by [`set_classes`], with the tokenizer beside it.

        Raises:
            OSError, ValueError: as there, and if the weights are not those of such a model.
        """
        name, wanted = pretrained_model_name_or_path, None
        if name is not None:
            if not isinstance(config, PreTrainedConfig):
                # A dtype is for the weights: "auto" means nothing to a config.
                dtype = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
                config, kwargs = cls.config_class.from_pretrained(
                    name if config is None else config, return_unused_kwargs=True, **kwargs
                )
                kwargs |= dtype
            if (saved := config._saved_classes) is not None and config.use_text_guidance:
                wanted = config.id2label
                options = {k: v for k, v in config.to_dict().items() if k != "label2id"}
                config = cls.config_class.from_dict({**options, **saved})
        loaded: Any = super().from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
        model, info = loaded
        refuse_random_classes(model.config, info)
        if model.config.frozen_classes:
            model.requires_grad_(False)  # loading replaced the parameters
        if wanted is not None:
            model.set_classes(wanted, load_pretrained(AutoTokenizer, name))
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return (self.backbone or self.clip.vision_model).get_input_embeddings()

    def encode_image(self, pixel_values: torch.Tensor, plain: bool = False) -> ImageFeatures:
        """
        Feature maps and image context of `pixel_values` `(B, 3, H, W)`; `plain` whatever `config.last_block` says.

        Raises:
            ValueError: if there is no batch of images, or one is smaller than a position of the coarsest map.
        """
        check_images(pixel_values, self.config)
        if self.config.tower_image_size is not None:
            # Images of that size too, which stay as they are: exported programs take any without a question.
            pixel_values = F.interpolate(pixel_values, size=[self.config.tower_image_size] * 2, mode="bilinear")
        return self.tower.encode(self, pixel_values, plain)

    def get_dense_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """One embedding in the space of texts per place of images `(B, 3, H, W)`, not normalized: `(B, D, h, w)`."""
        _, context, grid = self.encode_image(pixel_values)
        self._refuse_without_text("embed places")
        return context[:, 1:].transpose(1, 2).unflatten(2, grid)  # B, M, D -> B, D, h, w

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """CLIP's embedding of whole images `(B, 3, H, W)`, not normalized: `pooler_output` `(B, D)`."""
        self._refuse_without_text("embed images")
        context = self.encode_image(pixel_values, plain=True).context  # CLIP's own reading suits whole images
        return BaseModelOutputWithPooling(last_hidden_state=context, pooler_output=context[:, 0])

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """CLIP's embedding of texts, token ids `(B, L)`, not normalized: `pooler_output` `(B, D)`."""
        self._refuse_without_text("read texts")
        refuse_if_frozen(self.config.frozen_classes, "read texts")
        return self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask)

    def _refuse_without_text(self, action: str) -> None:
        if not self.config.use_text_guidance:
            raise ValueError(f"this model has no text guidance (`use_text_guidance=False`), so it cannot {action}.")

    def _refuse_pre_model(self, consequence: str) -> None:
        if self.config.prompting == "pre_model":
            raise ValueError(f'this model makes its contexts from images (`prompting="pre_model"`): {consequence}.')

    def encode_classes(self) -> torch.Tensor:
        """
        Class embeddings t `(K, D)`, before an image touches them; a tensor of the caller's own.

        Computed once in eval mode (see [`ClassEmbeddingCache`]), with their graph where a gradient is asked for.

        Raises:
            ValueError: if the model has no text guidance, no class names, or embeddings that depend on the image.
        """
        self._refuse_without_text("encode classes")
        self._refuse_pre_model("its classes have no embeddings without an image")
        if self.config.frozen_classes:
            return self.class_embeddings.clone()
        prompts: Any = self.prompts
        device = self.clip.text_model.final_layer_norm.weight.device
        return self._class_embeddings.get(
            lambda: encode_prompts(self.text_tower, self.clip, prompts.layout(device), prompts),
            [prompts, *(self.clip.get_submodule(name) for name in self.text_tower.text_parts)],
            self.training,
        )

    def share_class_embeddings(self, until_next: bool) -> None:
        """
        Let training forward passes of one optimizer step share one pass through the text tower.

        For gradient accumulation, as [`DenseCLIPTrainer`] does it: call it before every forward pass, with `True` if
        another one follows before the optimizer's step. The gradient of all of them goes through the text tower once,
        in the backward pass of the last.
        """
        self._class_embeddings.share_until_next = until_next

    def match(
        self,
        classes: torch.Tensor | None,
        context: torch.Tensor,
        grid: tuple[int, int],
        use_context_decoder: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        t `(K, D)`, the model's own for `None`, and `[z_bar, z]` `(B, 1 + h*w, D)` -> score maps `(B, K, h, w)` and t'
        `(B, K, D)`.
        """
        is_pre_model = self.config.prompting == "pre_model"
        if classes is None and is_pre_model:
            text_embeds = self._encode_classes_for(context)
        else:
            classes = self.encode_classes() if classes is None else classes
            text_embeds = classes.expand(context.shape[0], -1, -1)  # K, D -> B, K, D; len() is fixed by torch.export
            if use_context_decoder and self.context_decoder is not None and not is_pre_model:
                text_embeds = text_embeds + self.gamma * self.context_decoder(text_embeds, context)
        return cosine_score_maps(context, text_embeds, grid), text_embeds

    def _encode_classes_for(self, context: torch.Tensor) -> torch.Tensor:
        """Pre-model prompting: `[z_bar, z]` `(B, 1 + h*w, D)` -> class embeddings of each image `(B, K, D)`."""
        prompts: Any = self.prompts
        layout = prompts.layout(self.clip.text_model.final_layer_norm.weight.device)
        queries = prompts.context_vectors.expand(context.shape[0], -1, -1)  # N, C -> B, N, C
        contexts = self.context_decoder(queries, context)
        embeds = encode_prompts(self.text_tower, self.clip, layout, prompts, contexts)
        return embeds.unflatten(0, (context.shape[0], -1))  # B * K, D -> B, K, D

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None = None
    ) -> "DenseCLIPSemanticSegmenterOutput":
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): images, normalized as CLIP's.
            text_embeds (`torch.Tensor` of shape `(K, D)`, *optional*): from [`encode_texts`]; the model's own classes
                by default.

        Returns:
            [`DenseCLIPSemanticSegmenterOutput`] with `score_maps` and `text_embeds`; without classes, with
            `hidden_states`: the dense features `(B, D, h, w)`.
        """
        _, context, grid = self.encode_image(pixel_values)
        if text_embeds is None and self.config.class_token_ids is None and not self.config.frozen_classes:
            return DenseCLIPSemanticSegmenterOutput(hidden_states=(context[:, 1:].transpose(1, 2).unflatten(2, grid),))
        score_maps, text_embeds = self.match(text_embeds, context, grid)
        return DenseCLIPSemanticSegmenterOutput(score_maps=score_maps, text_embeds=text_embeds)

    @torch.no_grad()
    def encode_texts(
        self,
        texts: Sequence[str | Sequence[str]],
        tokenizer,
        templates: Sequence[str] | None = None,
        use_contexts: bool | None = None,
    ) -> torch.Tensor:
        """
        Embeddings of any class names or sentences, for [`predict_from_scores`]; the model stays as it is.

        A class described by several sentences, or put into several `templates`, gets the direction of their unit
        vectors' mean, as in CLIP's zero-shot classifier (Radford et al. 2021, section 3.1.4), and their mean length.

        Args:
            texts (`list[str]` or `list[list[str]]`): K classes: a name, a sentence, or several of them.
            tokenizer (`PreTrainedTokenizerBase`): CLIP's.
            templates (`Sequence[str]`, *optional*): sentences with one `{}`, such as `ZERO_SHOT_TEMPLATES`; by default
                the model's own prompt, with the contexts it has learned.
            use_contexts (`bool`, *optional*): whether learned contexts come before each text; by default only without
                `templates`, and not if they depend on the image. Contexts nobody has trained yet are noise.

        Returns:
            `torch.Tensor` of shape `(K, D)`, without gradient.

        Raises:
            ValueError: without text guidance, for empty, repeated or too long texts, or a template without `{}`.
        """
        self._refuse_without_text("encode texts")
        refuse_if_frozen(self.config.frozen_classes, "encode texts")
        if use_contexts is None:
            use_contexts = templates is None and self.config.prompting == "post_model"
        if use_contexts:
            self._refuse_pre_model("texts cannot have contexts without an image")
        templates = [str(self.config.prompt_template)] if templates is None else list(templates)
        classes = class_phrasings(texts)
        contexts = self.config.num_context_tokens if use_contexts else 0
        token_ids: list[list[int]] = []
        owners: list[int] = []
        for template in templates:
            for index, phrasings in enumerate(classes):
                token_ids += tokenize_classes(phrasings, tokenizer, self.text_tower, self.config, template, contexts)
                owners += [index] * len(phrasings)
        chunks = []
        for first in range(0, len(token_ids), PROMPTS_PER_PASS):
            layout = self.text_tower.lay_out(token_ids[first : first + PROMPTS_PER_PASS], contexts)
            layout = PackedPrompts(*(tensor.to(self.device) for tensor in layout))
            chunks.append(encode_prompts(self.text_tower, self.clip, layout, self.prompts if contexts else None))
        embeds = torch.cat(chunks)
        if len(owners) == len(classes):
            return embeds
        # The mean of unit vectors at the prompts' mean length: the context decoder's update then weighs as much as
        # beside a single prompt.
        groups = torch.tensor(owners, device=embeds.device)
        lengths = embeds.float().norm(dim=-1, keepdim=True)
        direction = embeds.new_zeros(len(classes), embeds.shape[1], dtype=torch.float32)
        direction.index_add_(0, groups, embeds.float() / lengths)
        length = embeds.new_zeros(len(classes), 1, dtype=torch.float32).index_add_(0, groups, lengths)
        return (F.normalize(direction, dim=-1) * length / groups.bincount()[:, None]).to(embeds.dtype)

    @torch.no_grad()
    def score(
        self, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None = None, use_context_decoder: bool = True
    ) -> torch.Tensor:
        """
        Cosines `(B, K, h, w)` of `pixel_values` `(B, 3, H, W)` with `text_embeds` `(K, D)`, by default its classes'.

        If the model slides, `(B, K, H, W)`: averaged where windows overlap.

        Raises:
            ValueError: if the model has no text guidance.
        """
        self._refuse_without_text("compare places with words")
        if text_embeds is None and self.config.prompting == "post_model":
            text_embeds = self.encode_classes()
        embeds = None if text_embeds is None else text_embeds.to(self.device, self.dtype)

        def whole(pixels: torch.Tensor) -> torch.Tensor:
            _, context, grid = self.encode_image(pixels)
            return self.match(embeds, context, grid, use_context_decoder)[0]

        pixel_values = pixel_values.to(self.device, self.dtype)
        return whole(pixel_values) if self.config.inference_mode == "whole" else self._slide(whole, pixel_values)

    def predict_from_scores(
        self,
        pixel_values: torch.Tensor | Sequence[torch.Tensor],
        text_embeds: torch.Tensor | None = None,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        use_context_decoder: bool = True,
    ) -> ScoreSegmentation:
        """
        Segmentation from the score maps alone, for any classes: each pixel goes to the class of the highest cosine.

        The decoder, which knows only the classes it was trained with, has no part in it. Windows slide if
        `inference_mode` says so.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`, or a list of `(3, H, W)`): images, normalized as
                CLIP's; in a list each may have a size of its own.
            text_embeds (`torch.Tensor` of shape `(K, D)`, *optional*): from [`encode_texts`]; the model's own classes
                by default.
            target_sizes (list of (height, width), *optional*): size of each result; (H, W) by default.
            use_context_decoder (`bool`): whether classes are refined by the image (t') as in training.

        Returns:
            [`ScoreSegmentation`]: `segmentation`, a list of B int64 maps, and `score_maps`.

        Raises:
            ValueError: without text guidance, or for scores that are NaN or infinite.
        """
        with eval_mode(self):
            if isinstance(pixel_values, torch.Tensor):
                maps: Any = self.score(pixel_values, text_embeds, use_context_decoder)
            else:
                maps = forward_by_size(
                    lambda pixels: {"score_maps": self.score(pixels, text_embeds, use_context_decoder)}, pixel_values
                )["score_maps"]
        sizes: list[Any] = [p.shape[-2:] for p in pixel_values] if target_sizes is None else list(target_sizes)
        segmentation = [resize_argmax(m[None], size)[0] for m, size in zip(maps, sizes, strict=True)]
        return ScoreSegmentation(segmentation=segmentation, score_maps=maps)

    def _slide(self, predict: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor) -> torch.Tensor:
        return sliding_window_logits(predict, pixel_values, *self.config.window, self.config.sliding_window_batch_size)

    @classmethod
    def from_clip(cls, clip, id2label=None, tokenizer=None, image_size: int | None = None, **config):
        """
        CLIP, ready for words: no learned contexts, no context decoder, nothing to be trained.

        It is read as NACLIP's results are published: the last block of a ViT attends to keys that match and are near
        ([`DenseCLIPConfig`], `last_block`), windows of 224 pixels slide in steps of 112, and cosines are multiplied by
        40 (`temperature`) before the softmax.

        Args:
            clip (`str`, `os.PathLike` or `CLIPModel`): Hub name, directory or model.
            id2label (`dict[int, str]` or `list[str]`, *optional*): K class names of its own.
            tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): CLIP's; loaded from `clip` if that is a name.
            image_size (`int`, *optional*): resolution in pixels that the position grid is resized to, CLIP's own by
                default.
            config: further options of [`DenseCLIPConfig`].

        Raises:
            ValueError: if `clip` is no CLIP, or a class name does not fit the text tower.
        """
        clip, tokenizer = load_clip(clip, tokenizer)
        options = {**WORDS_OPTIONS, **tower_of(clip.config).words_options}
        if "crop_size" in config:
            del options["stride"]
        options |= config
        size = image_size or clip.config.vision_config.image_size
        return cls._around(clip, None if id2label is None else class_names(id2label), tokenizer, size, options)

    @classmethod
    def _around(cls, clip, names: list[str] | None, tokenizer, image_size: int | None, options: dict[str, Any]):
        """The model around `clip`; its positions are resized to `image_size`, unless a backbone sees the images."""
        clip_config = shared_config(clip)
        patch = getattr(clip.config.vision_config, "patch_size", 32)
        image_size = clip.config.vision_config.image_size if image_size is None else image_size
        if image_size % patch:
            below = image_size // patch * patch
            raise ValueError(
                f"`image_size` ({image_size}) must be a multiple of the {patch} pixels of a patch: give {below} or "
                f"{below + patch}."
            )
        clip_config["vision_config"]["image_size"] = image_size
        options = {"clip_config": clip_config, **options}
        if names is not None:
            options["id2label"] = dict(enumerate(names))
        config = cls.config_class(**options)
        if names is not None and config.use_text_guidance and config.class_token_ids is None:
            config.class_token_ids = tokenize_classes(names, tokenizer, tower_of(config.clip_config), config)
        model = cls(config)
        load_clip_weights(model, clip)
        return model

    def set_classes(self, names: dict[int, str] | list[str], tokenizer) -> None:
        """
        Give the model new class names (or sentences), in place.

        Classes it already had, by name, keep what they had learned in the decoder; the rows and columns of the others
        start from random weights and must be trained before `logits` mean anything. Score maps need no training.

        Args:
            names (`list[str]` or `dict[int, str]`): K new class names.
            tokenizer (`PreTrainedTokenizerBase` or `str`): CLIP's, or where it is.

        Raises:
            ValueError: for an empty list, a name given twice, an empty one or one that is too long.
        """
        refuse_if_frozen(self.config.frozen_classes, "take new class names")
        names, config = class_names(names), self.config
        check_ignore_index(config.semantic_loss_ignore_index, len(names))
        token_ids = None
        if config.use_text_guidance:
            if isinstance(tokenizer, (str, os.PathLike)):
                tokenizer = load_pretrained(AutoTokenizer, tokenizer)
            token_ids = tokenize_classes(names, tokenizer, self.text_tower, config)
            self.prompts.set_token_ids(token_ids)
            self._class_embeddings.clear()
        rows = {label: index for index, label in config.id2label.items()}
        self._resize_decoder([(new, rows[name]) for new, name in enumerate(names) if name in rows], len(names))
        config.palette = config.class_token_ids = config.class_weights = None
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.class_token_ids = token_ids

    def _resize_decoder(self, kept: list[tuple[int, int]], num_labels: int) -> None:
        """Make room for other classes, of which `kept` (new index, old index) were there before."""

    def freeze_classes(self) -> None:
        """
        Make this a model for inference alone, in place: store the class embeddings, drop the text tower.

        Logits stay the same, bit for bit. `save_pretrained` and the Auto classes work as before; training, new class
        names and other texts are refused from then on.

        Raises:
            ValueError: without text guidance or class names.
        """
        if self.config.frozen_classes:
            return
        self.eval()
        with torch.no_grad():
            embeddings = self.encode_classes().detach().clone()
        self.prompts = None
        drop(self.clip, self.text_tower.text_parts)
        self.register_buffer("class_embeddings", embeddings)
        self.requires_grad_(False)
        self.config.frozen_classes = True

    def train(self, mode: bool = True):
        if mode:
            refuse_if_frozen(self.config.frozen_classes, "be trained")
        if mode != self.training:
            self._class_embeddings.clear()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._class_embeddings.clear()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args, **kwargs):
        self._class_embeddings.clear()
        return super().load_state_dict(*args, **kwargs)


class DenseCLIPForSemanticSegmentation(DenseCLIPModel):
    """
    CLIP turned into a semantic segmenter: pixels are matched with class names and the match guides an FPN decoder.

    Args:
        config ([`DenseCLIPConfig`]): its architecture and class names.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from denseclip_hf import DenseCLIPForSemanticSegmentation

    >>> model = DenseCLIPForSemanticSegmentation.from_clip(
    ...     "openai/clip-vit-base-patch16", id2label={0: "sky", 1: "road", 2: "car"}
    ... )
    ```
    """

    _keys_to_ignore_on_load_unexpected = PRETRAINING_KEYS
    # The Trainer divides by the accumulation steps itself; our loss is a mean over pixels, not a token count's.
    accepts_loss_kwargs = False

    def _add_decoder(self) -> None:
        config = self.config
        if config.decode_head == "cost_aggregation":
            self.pyramid = self.neck = None
            width = config.clip_config.vision_config.hidden_size
            self.decode_head = CostAggregationHead(config.embedding_size, width, **(config.aggregator or {}))
            return
        channels = list(config.feature_channels)
        if config.use_text_guidance:
            channels[config.score_map_level] += config.num_labels
        self.pyramid = self.tower.pyramid(config)
        self.neck = FPNNeck(channels, config.neck_hidden_size)
        self.decode_head = SemanticFPNHead(
            config.neck_hidden_size,
            config.decode_head_hidden_size,
            config.num_labels,
            config.decode_head_dropout,
            config.batch_norm_eps,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor],
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        text_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> DenseCLIPSemanticSegmenterOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): images, normalized as CLIP's. Or a
                list of tensors `(3, height, width)` of any sizes, without labels: `logits`, `score_maps` and
                `text_embeds` are then lists too, each image's as it has them alone.
            labels (`torch.Tensor` of shape `(batch_size, label_height, label_width)`, *optional*): integer class ids
                0 … K-1, or `config.semantic_loss_ignore_index`.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*): also return the image encoder's feature
                maps, or those at some indices.
            text_embeds (`torch.Tensor` of shape `(K, D)`, *optional*): classes from [`encode_texts`] in place of the
                model's own, for `config.decode_head="cost_aggregation"`.
            output_attentions (`bool`, *optional*): accepted as by every model of transformers; none are returned.

        Returns:
            [`DenseCLIPSemanticSegmenterOutput`]

        Raises:
            ValueError: for labels that do not fit the images or lie outside 0 … K-1 (the latter checked on CPU), or
                classes of the caller's own for a decoder that knows only those of its training.
        """
        if isinstance(pixel_values, (list, tuple)):
            if labels is not None:
                raise ValueError("`labels` need images of one size, but `pixel_values` is a list: stack or pad it.")
            return DenseCLIPSemanticSegmenterOutput(
                **forward_by_size(lambda images: self._named_results(images, text_embeds), pixel_values)
            )
        if text_embeds is not None and self.config.decode_head != "cost_aggregation":
            raise ValueError(
                f'the decoder "{self.config.decode_head}" knows only the classes of its training, so it cannot take '
                '`text_embeds`: call `predict_from_scores`, or train with `decode_head="cost_aggregation"`.'
            )
        if labels is not None:
            count = None if text_embeds is None else len(text_embeds)
            labels = checked_labels(labels, len(pixel_values), self.config, count)
        mode = "whole" if self.training else self.config.inference_mode
        if mode == "slide":
            segmentation = Segmentation(self._slide(lambda x: self.window_logits(x, text_embeds), pixel_values))
        elif mode == "slide_and_whole":
            segmentation = Segmentation(self._slide_and_whole(pixel_values, text_embeds))
        else:
            segmentation = self._segment(pixel_values, text_embeds)
        loss = decode_loss = auxiliary_loss = None
        if labels is not None:
            decode_loss, auxiliary_loss = self._losses(segmentation, labels)
            loss = decode_loss if auxiliary_loss is None else decode_loss + auxiliary_loss
        choice = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return DenseCLIPSemanticSegmenterOutput(
            loss=loss,
            decode_loss=decode_loss,
            auxiliary_loss=auxiliary_loss,
            logits=segmentation.logits,
            score_maps=segmentation.score_maps,
            text_embeds=segmentation.text_embeds,
            hidden_states=choose_hidden_states(segmentation.feature_maps, choice),
        )

    def _named_results(self, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None) -> dict[str, torch.Tensor]:
        outputs = self(pixel_values, text_embeds=text_embeds)
        return {name: outputs[name] for name in ("logits", "score_maps", "text_embeds") if name in outputs}

    def window_logits(self, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `(B, K, H / 4, W / 4)` of `pixel_values` taken whole, whatever `inference_mode` says."""
        return self._segment(pixel_values, text_embeds).logits

    def _slide_and_whole(self, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None) -> torch.Tensor:
        """Probabilities `(B, K, H', W')` at `slide_size`: the mean of the windows' mean and the whole image's."""

        def probabilities(windows: torch.Tensor) -> torch.Tensor:
            logits = self.window_logits(windows, text_embeds).float()
            return resize_bilinear(logits, windows.shape[-2:]).sigmoid()

        size = pixel_values.shape[-2:] if self.config.slide_size is None else tuple(self.config.slide_size)
        windows = self._slide(probabilities, resize_bilinear(pixel_values, size))
        whole = probabilities(resize_bilinear(pixel_values, tuple(self.config.crop_size)))
        return (windows + resize_bilinear(whole, size)) / 2

    def _segment(self, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None = None) -> Segmentation:
        """The method: encode the image, prompt the text, contextualize, score, decode."""
        features, context, grid = self.encode_image(pixel_values)
        if isinstance(self.decode_head, CostAggregationHead):
            score_maps, text_embeds = self.match(text_embeds, context, grid)
            places = context[:, 1:].transpose(1, 2).unflatten(2, grid)  # B, M, D -> B, D, h, w
            logits = self.decode_head(places, text_embeds[:, :, None], features)
            return Segmentation(logits, score_maps, text_embeds, tuple(features))
        if self.pyramid is not None:
            features = self.pyramid(features)
        feature_maps = tuple(features)
        if not self.config.use_text_guidance:
            return Segmentation(self.decode_head(self.neck(features)), feature_maps=feature_maps)
        score_maps, text_embeds = self.match(None, context, grid)
        level = self.config.score_map_level
        joining = resize_bilinear(score_maps, features[level].shape[-2:]).to(features[level].dtype)
        features[level] = torch.cat([features[level], joining], dim=1)
        return Segmentation(self.decode_head(self.neck(features)), score_maps, text_embeds, feature_maps)

    def _losses(self, segmentation: Segmentation, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cross entropy of the logits and, weighted, of the score maps over the temperature (section 3.4)."""
        logits, ignore_index = segmentation.logits, self.config.semantic_loss_ignore_index
        if self.config.decode_head == "cost_aggregation":
            if not self.training and self.config.inference_mode == "slide_and_whole":
                logits = logits.logit(eps=1e-6)  # which are probabilities then
            if 0 < self.decode_head.max_classes < logits.shape[1]:
                logger.warning_once(
                    f"Of {logits.shape[1]} classes the {self.decode_head.max_classes} with the highest cosines in an "
                    'image are decoded and trained: `aggregator={"max_classes": 0}` takes all, at the cost of memory.'
                )
            return pixel_cross_entropy(logits, labels, ignore_index, binary=True), None
        rare = {"class_weights": self.config.class_weights, "focal_gamma": self.config.focal_gamma}
        decode_loss = pixel_cross_entropy(logits, labels, ignore_index, **rare)
        if self.config.dice_loss_weight:
            decode_loss = decode_loss + self.config.dice_loss_weight * dice_loss(logits, labels, ignore_index)
        if segmentation.score_maps is None:
            return decode_loss, None
        score_maps = segmentation.score_maps / self.config.temperature
        auxiliary_loss = pixel_cross_entropy(score_maps, labels, ignore_index, **rare)
        return decode_loss, self.config.auxiliary_loss_weight * auxiliary_loss

    @classmethod
    def from_clip(  # type: ignore[override]  # a segmenter needs classes
        cls, clip, id2label, tokenizer=None, image_size: int | None = None, **config
    ):
        """
        A segmenter around a pretrained CLIP, everything else freshly initialized.

        Args:
            clip (`str`, `os.PathLike` or `CLIPModel`): Hub name, directory or model.
            id2label (`dict[int, str]` or `list[str]`): the K class names.
            tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): CLIP's; loaded from `clip` if that is a name.
            image_size (`int`, *optional*): training resolution in pixels that the position grid is resized to
                (bilinear); by default the published 640 for a ViT, 512 for a ResNet. With cost aggregation the grid
                stays CLIP's, and images are resized to this size, by default to 24 x 24 patches as CAT-Seg's.
            config: further options of [`DenseCLIPConfig`]; with `decode_head="cost_aggregation"` on top of
                `COST_AGGREGATION_OPTIONS`.

        Raises:
            ValueError: if `clip` is no CLIP, or a class name does not fit the text tower.
        """
        clip, tokenizer = load_clip(clip, tokenizer)
        patch = getattr(clip.config.vision_config, "patch_size", 32)
        default = tower_of(clip.config).default_image_size
        size = image_size or default // patch * patch
        if size != (image_size or default):
            logger.info(f"`image_size` is {size}, {default} rounded to whole patches of {patch} pixels.")
        if config.get("decode_head") == "cost_aggregation":
            config = {**COST_AGGREGATION_OPTIONS, "tower_image_size": image_size or 24 * patch, **config}
            size = clip.config.vision_config.image_size
        model = cls._around(clip, class_names(id2label), tokenizer, size, config)
        logger.info(loading_report(model, clip))
        return model

    @classmethod
    def from_backbone(
        cls, backbone, clip, id2label, tokenizer=None, image_size: int | None = None, **config
    ) -> "DenseCLIPForSemanticSegmentation":
        """
        A segmenter whose images go through a backbone without language, its texts through a CLIP's tower.

        An attention pool on the backbone's last map, freshly initialized like the decoder, learns from the auxiliary
        loss to embed places in the space of the texts (Rao et al. 2022, section 3.5).

        Args:
            backbone (`str`, `os.PathLike`, `PreTrainedModel` or `PreTrainedConfig`): Hub name or directory of a model
                that transformers has a backbone of, an `AutoBackbone` with four `out_features`, or the config of one
                with random weights.
            clip (`str`, `os.PathLike` or `PreTrainedModel`): the image-text model whose text tower it takes.
            id2label (`dict[int, str]` or `list[str]`): the K class names.
            tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): CLIP's; loaded from `clip` if that is a name.
            image_size (`int`, *optional*): training resolution in pixels, which the pool's positions belong to; by
                default 512, for a plain ViT about 640.
            config: further options of [`DenseCLIPConfig`].

        Raises:
            ImportError: if the backbone is of a library that is not installed.
            ValueError: if the backbone does not give four maps, or a class name does not fit the text tower.
        """
        clip, tokenizer = load_clip(clip, tokenizer)
        backbone, normalization = load_backbone(backbone)
        options = {"backbone_config": shared_config(backbone), "backbone_image_size": image_size, **normalization}
        model = cls._around(clip, class_names(id2label), tokenizer, None, {**options, **config})
        model.backbone.load_state_dict(backbone.state_dict())
        logger.info(loading_report(model, backbone, clip))
        return model

    def _resize_decoder(self, kept: list[tuple[int, int]], num_labels: int) -> None:
        if self.config.decode_head == "cost_aggregation":
            return  # its weights are the same for every class
        head, laterals, level = self.decode_head, self.neck.lateral_convs, self.config.score_map_level
        head.classifier = resized_convolution(head.classifier, kept, out_channels=num_labels)
        if self.config.use_text_guidance:
            first = self.config.feature_channels[level]  # the score map's channels come after the features'
            columns = [(i, i) for i in range(first)] + [(first + new, first + old) for new, old in kept]
            laterals[level] = resized_convolution(laterals[level], columns, in_channels=first + num_labels)


def shared_config(model: PreTrainedModel) -> dict[str, Any]:
    """The config of `model` for that of another, without where a folder lies here, which is not to be shared."""
    config = model.config.to_dict()
    if os.path.exists(model.config.name_or_path):
        config.pop("_name_or_path", None)
    return config


def refuse_random_classes(config: DenseCLIPConfig, loading_info: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if a model of `config` was loaded whose class embeddings, or text tower, are noise.
    """
    missing = {key if isinstance(key, str) else key[0] for key in loading_info["mismatched_keys"]}
    missing |= set(loading_info["missing_keys"])
    unlike = missing if config.frozen_classes else loading_info["unexpected_keys"]
    if "class_embeddings" in unlike:
        raise ValueError(
            f"config and weights say different things about frozen classes (`frozen_classes` is "
            f"{config.frozen_classes}), so their embeddings would be noise: load the model as it was saved; "
            "`freeze_classes()` freezes the classes of one that has its text tower."
        )


# The pipeline asks this table of names, which `register` does not fill, and complains about every model not in it.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[DenseCLIPConfig.model_type] = DenseCLIPForSemanticSegmentation.__name__

__all__ = [
    "ZERO_SHOT_TEMPLATES",
    "DenseCLIPForSemanticSegmentation",
    "DenseCLIPModel",
    "DenseCLIPPreTrainedModel",
    "DenseCLIPSemanticSegmenterOutput",
    "ScoreSegmentation",
    "eval_mode",
    "forward_by_size",
    "sliding_window_logits",
    "window_starts",
]
