"""DenseCLIP: language-guided dense prediction with context-aware prompting (Rao et al. 2022, section 3).

Shapes: B images, K classes, D embedding size, H x W pixels, h x w the grid of the score map, M = 1 + h*w.
"""

from typing import Any

import torch
from torch import nn
from transformers import CLIPModel, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .class_embeddings_denseclip import ClassEmbeddingCache
from .configuration_denseclip import DenseCLIPConfig
from .context_decoder_denseclip import ContextDecoder, cosine_score_maps
from .fpn_denseclip import FPNNeck, SemanticFPNHead, SemanticFPNScaleHead, resize_bilinear
from .freezing_denseclip import freeze_classes, refuse_if_frozen, refuse_random_classes
from .image_encoder_denseclip import ViTPyramid, adapt_vision_tower, encode_image
from .loading_denseclip import class_names, clip_report, load_clip, load_clip_weights, replace_classes
from .losses_denseclip import checked_labels, pixel_cross_entropy
from .mixed_sizes_denseclip import forward_by_size
from .modeling_clip_resnet import CLIPResNetModel, choose_hidden_states
from .open_vocabulary_denseclip import ScoreSegmentation, encode_texts, predict_from_scores
from .outputs_denseclip import DenseCLIPSemanticSegmenterOutput, Segmentation
from .prompts_denseclip import ContextPrompts, tokenize_classes
from .sliding_window_denseclip import sliding_window_logits


logger = logging.get_logger(__name__)


class DenseCLIPPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the loading machinery."""

    config: DenseCLIPConfig
    config_class = DenseCLIPConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["clip"]  # a module among the arguments of `ContextPrompts`, not a tensor
    _no_split_modules = [
        "CLIPTextEmbeddings", "CLIPEncoderLayer", "BilinearPositionEmbeddings", "CLIPResNetBottleneck",
        "CLIPResNetAttentionPool", "ContextDecoderLayer", "ContextPrompts",
    ]  # fmt: skip

    @classmethod
    def is_custom_code(cls) -> bool:
        # Every initialisation below respects already loaded weights, which is what this switch guards against.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            std = self.config.initializer_range
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.reset_parameters()
        elif isinstance(module, ContextPrompts):
            module.initialize()
        elif isinstance(module, DenseCLIPForSemanticSegmentation):
            if module.gamma is not None:
                init.constant_(module.gamma, float(self.config.gamma_init))
            if module.config.frozen_classes:
                init.normal_(module.class_embeddings, std=self.config.clip_config.projection_dim**-0.5)
            elif module.config.use_text_guidance:
                init.constant_(module.clip.logit_scale, self.config.clip_config.logit_scale_init_value)
        else:
            super()._init_weights(module)
        if isinstance(module, SemanticFPNScaleHead):
            for layer in module:
                if isinstance(layer, nn.Conv2d):
                    init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class DenseCLIPForSemanticSegmentation(DenseCLIPPreTrainedModel):
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

    # The Trainer divides by the accumulation steps itself; our loss is a mean over pixels, not a token count's.
    accepts_loss_kwargs = False

    def __init__(self, config: DenseCLIPConfig):
        super().__init__(config)
        self.clip = (CLIPResNetModel if config.has_resnet else CLIPModel)(config.clip_config)
        adapt_vision_tower(self.clip, config)
        channels = list(config.feature_channels)
        self.pyramid = None if config.has_resnet else ViTPyramid(channels[0], config.batch_norm_eps)
        self.gamma: torch.Tensor | None = None
        if config.use_text_guidance:
            if config.frozen_classes:
                self.register_buffer(
                    "class_embeddings", torch.empty(config.num_labels, config.clip_config.projection_dim)
                )
            else:
                self.clip.logit_scale.requires_grad_(False)  # only CLIP's own contrastive loss trains it
                self.prompts = ContextPrompts(config)
            self.context_decoder = ContextDecoder(config)
            gamma = torch.empty(config.clip_config.projection_dim)
            if config.gamma_learnable:
                self.gamma = nn.Parameter(gamma)
            else:
                del self.gamma
                self.register_buffer("gamma", gamma)
            channels[config.score_map_level] += config.num_labels
        self.neck = FPNNeck(channels, config.neck_hidden_size)
        self.decode_head = SemanticFPNHead(
            config.neck_hidden_size,
            config.decode_head_hidden_size,
            config.num_labels,
            config.decode_head_dropout,
            config.batch_norm_eps,
        )
        self._class_embeddings = ClassEmbeddingCache()
        self.post_init()
        if config.frozen_classes:
            self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        refuse_random_classes(model.config, info)
        frozen = model if model.config.frozen_classes else model.clip.logit_scale
        if frozen is not None:
            frozen.requires_grad_(False)  # loading made the parameters anew
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.clip.vision_model.get_input_embeddings()

    def encode_classes(self) -> torch.Tensor:
        """
        Class embeddings t `(K, D)`, before an image touches them; a tensor of the caller's own.

        Computed once and kept while nothing they depend on changes (see [`ClassEmbeddingCache`] for how that is
        noticed); computed anew in training, where they have a gradient to carry. Gradients are right in eval mode too.

        Raises:
            ValueError: if the model has no text guidance or no class names.
        """
        if not self.config.use_text_guidance:
            raise ValueError("this model has no text guidance (`use_text_guidance=False`), so no class embeddings.")
        if self.config.frozen_classes:
            return self.class_embeddings.clone()
        return self._class_embeddings.get(self.prompts, self.clip, self.training)

    def share_class_embeddings(self, until_next: bool) -> None:
        """
        Let training forward passes of one optimizer step share one pass through the text tower.

        For gradient accumulation, as [`DenseCLIPTrainer`] does it: call it before every forward pass, with `True` if
        another one follows before the optimizer's step. The gradient of all of them goes through the text tower once,
        in the backward pass of the last.
        """
        self._class_embeddings.share_until_next = until_next

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor],
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> DenseCLIPSemanticSegmenterOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): images, normalised as CLIP's. Or a
                list of tensors `(3, height, width)` of any sizes, without labels: `logits`, `score_maps` and
                `text_embeds` are then lists too, each image's as it has them alone.
            labels (`torch.Tensor` of shape `(batch_size, label_height, label_width)`, *optional*): integer class ids
                0 … K-1, or `config.semantic_loss_ignore_index`.
            output_hidden_states (`bool`, `int` or `list[int]`, *optional*): also return the image encoder's feature
                maps, or those at some indices.
            output_attentions (`bool`, *optional*): accepted as by every model of transformers; none are returned.

        Returns:
            [`DenseCLIPSemanticSegmenterOutput`]

        Raises:
            ValueError: for labels that do not fit the images or lie outside 0 … K-1 (the latter checked on CPU).
        """
        if isinstance(pixel_values, (list, tuple)):
            if labels is not None:
                raise ValueError("`labels` need images of one size, but `pixel_values` is a list: stack or pad it.")
            return DenseCLIPSemanticSegmenterOutput(**forward_by_size(self, pixel_values))
        if labels is not None:
            labels = checked_labels(labels, len(pixel_values), self.config)
        if self.config.inference_mode == "slide" and not self.training:
            segmentation = Segmentation(self._slide(pixel_values))
        else:
            segmentation = self._segment(pixel_values)
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

    def window_logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits `(B, K, H / 4, W / 4)` of `pixel_values` taken whole, whatever `inference_mode` says."""
        return self._segment(pixel_values).logits

    def _slide(self, pixel_values: torch.Tensor) -> torch.Tensor:
        config = self.config
        return sliding_window_logits(
            self.window_logits, pixel_values, config.crop_size, config.stride, config.sliding_window_batch_size
        )

    def _segment(self, pixel_values: torch.Tensor) -> Segmentation:
        """The method: encode the image, prompt the text, contextualise, score, decode."""
        features, context, grid = encode_image(self.clip, self.pyramid, pixel_values, self.config)
        feature_maps = tuple(features)
        if not self.config.use_text_guidance:
            return Segmentation(self.decode_head(self.neck(features)), feature_maps=feature_maps)
        score_maps, text_embeds = self.match(self.encode_classes(), context, grid)
        level = self.config.score_map_level
        joining = resize_bilinear(score_maps, features[level].shape[-2:]).to(features[level].dtype)
        features[level] = torch.cat([features[level], joining], dim=1)
        return Segmentation(self.decode_head(self.neck(features)), score_maps, text_embeds, feature_maps)

    def match(
        self, classes: torch.Tensor, context: torch.Tensor, grid: tuple[int, int], use_context_decoder: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """t `(K, D)` and `[z_bar, z]` `(B, 1 + h*w, D)` -> score maps `(B, K, h, w)` and t' `(B, K, D)`."""
        text_embeds = classes.expand(context.shape[0], -1, -1)  # K, D -> B, K, D; len() is fixed by torch.export
        if use_context_decoder:
            text_embeds = text_embeds + self.gamma * self.context_decoder(text_embeds, context)
        return cosine_score_maps(context, text_embeds, grid), text_embeds

    def _losses(self, segmentation: Segmentation, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cross entropy of the logits and, weighted, of the score maps over the temperature (section 3.4)."""
        ignore_index = self.config.semantic_loss_ignore_index
        decode_loss = pixel_cross_entropy(segmentation.logits, labels, ignore_index)
        if segmentation.score_maps is None:
            return decode_loss, None
        auxiliary_loss = pixel_cross_entropy(segmentation.score_maps / self.config.temperature, labels, ignore_index)
        return decode_loss, self.config.auxiliary_loss_weight * auxiliary_loss

    @classmethod
    def from_clip(cls, clip, id2label, tokenizer=None, image_size: int | None = None, **config):
        """
        A segmenter around a pretrained CLIP, everything else freshly initialised.

        Args:
            clip (`str`, `os.PathLike` or `CLIPModel`): Hub name, directory or model.
            id2label (`dict[int, str]` or `list[str]`): the K class names.
            tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): CLIP's; loaded from `clip` if that is a name.
            image_size (`int`, *optional*): training resolution the position grid is resized to (bilinear); by default
                the published 640 for a ViT, 512 for a ResNet.
            config: further options of [`DenseCLIPConfig`].

        Raises:
            ValueError: if `clip` is no CLIP, or a class name does not fit the text tower.
        """
        clip, tokenizer = load_clip(clip, tokenizer)
        names = class_names(id2label)
        clip_config = clip.config.to_dict()
        is_resnet = isinstance(clip, CLIPResNetModel)
        clip_config["vision_config"]["image_size"] = image_size or (512 if is_resnet else 640)
        options = {"clip_config": clip_config, "id2label": dict(enumerate(names)), **config}
        configuration = cls.config_class(**options)
        if configuration.use_text_guidance and configuration.class_token_ids is None:
            if tokenizer is None:
                raise ValueError("class names need CLIP's tokenizer: pass `tokenizer=`.")
            options["class_token_ids"] = tokenize_classes(names, tokenizer, configuration)
            configuration = cls.config_class(**options)
        model = cls(configuration)
        load_clip_weights(model, clip)
        logger.warning(clip_report(model, clip))
        return model

    def set_classes(self, names: "dict[int, str] | list[str]", tokenizer) -> None:
        """
        Give the model new class names (or sentences), in place.

        Classes it already had, by name, keep what they had learnt in the decoder; the rows and columns of the others
        start anew and must be trained before `logits` mean anything. Score maps need no training.

        Args:
            names (`list[str]` or `dict[int, str]`): K new class names.
            tokenizer (`PreTrainedTokenizerBase` or `str`): CLIP's, or where it is.

        Raises:
            ValueError: for an empty list, a name given twice, an empty one or one that is too long.
        """
        refuse_if_frozen(self.config, "take new class names")
        replace_classes(self, names, tokenizer)

    def freeze_classes(self) -> None:
        """
        Make this a model for inference alone, in place: store the class embeddings, drop the text tower.

        Logits stay the same, bit for bit. `save_pretrained` and the Auto classes work as before; training, new class
        names and other texts are refused from then on.

        Raises:
            ValueError: without text guidance or class names.
        """
        freeze_classes(self)

    def encode_texts(self, texts, tokenizer, templates=None, use_contexts: bool | None = None) -> torch.Tensor:
        """
        Embeddings of any class names or sentences, for [`predict_from_scores`]; the model stays as it is.

        A class described by several sentences, or put into several `templates`, gets the direction of their unit
        vectors' mean, as in CLIP's zero-shot classifier (Radford et al. 2021, section 3.1.4), and their mean length.

        Args:
            texts (`list[str]` or `list[list[str]]`): K classes: a name, a sentence, or several of them.
            tokenizer (`PreTrainedTokenizerBase`): CLIP's.
            templates (`Sequence[str]`, *optional*): sentences with one `{}`, such as `ZERO_SHOT_TEMPLATES`; by default
                the model's own prompt, with the contexts it has learnt.
            use_contexts (`bool`, *optional*): whether learnt contexts come before each text; by default only without
                `templates`. Contexts nobody has trained yet are noise.

        Returns:
            `torch.Tensor` of shape `(K, D)`, without gradient.

        Raises:
            ValueError: without text guidance, for empty, repeated or too long texts, or a template without `{}`.
        """
        refuse_if_frozen(self.config, "encode texts")
        return encode_texts(self, texts, tokenizer, templates, use_contexts)

    def predict_from_scores(
        self, pixel_values: torch.Tensor, text_embeds=None, target_sizes=None, use_context_decoder: bool = True
    ) -> ScoreSegmentation:
        """
        Segmentation from the score maps alone, for any classes: each pixel goes to the class of the highest cosine.

        The decoder, which knows only the classes it was trained with, has no part in it. Windows slide if
        `inference_mode` says so.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`, or a list of `(3, H, W)`): images, normalised as
                CLIP's; in a list each may have a size of its own.
            text_embeds (`torch.Tensor` of shape `(K, D)`, *optional*): from [`encode_texts`]; the model's own classes
                by default.
            target_sizes (list of (height, width), *optional*): size of each result; (H, W) by default.
            use_context_decoder (`bool`): whether classes are refined by the image (t') as in training.

        Returns:
            [`ScoreSegmentation`]: `segmentation`, a list of B int64 maps, and `score_maps`.

        Raises:
            ValueError: without text guidance, for embeddings or sizes of another shape, or scores NaN or infinite.
        """
        return predict_from_scores(self, pixel_values, text_embeds, target_sizes, use_context_decoder)

    def train(self, mode: bool = True):
        if mode:
            refuse_if_frozen(self.config, "be trained")
        if mode != self.training:
            self._class_embeddings.clear()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._class_embeddings.clear()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args, **kwargs):
        self._class_embeddings.clear()
        return super().load_state_dict(*args, **kwargs)


# The pipeline asks this table of names, which `register` does not fill, and complains about every model not in it.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[DenseCLIPConfig.model_type] = DenseCLIPForSemanticSegmentation.__name__

__all__ = ["DenseCLIPForSemanticSegmentation", "DenseCLIPPreTrainedModel", "DenseCLIPSemanticSegmenterOutput"]
