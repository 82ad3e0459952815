"""Pipelines of transformers: image segmentation for batches of different sizes, and segmentation by any words."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

from .model.class_names_denseclip import class_phrasings
from .model.image_processing_denseclip import DenseCLIPImageProcessorBase, DenseCLIPImageProcessorPil
from .model.layers_denseclip import resize_bilinear
from .model.modeling_denseclip import (
    ZERO_SHOT_TEMPLATES,
    DenseCLIPForSemanticSegmentation,
    DenseCLIPModel,
    forward_by_size,
    sliding_window_logits,
)
from .model.resizing_denseclip import check_finite
from .model.towers_denseclip import tower_of


# How an untrained CLIP is read, as NACLIP's results are published: pixels of the image's short side, of a window and
# between windows, and what cosines are multiplied by before the softmax.
SHORT_SIDE, WINDOW, WINDOW_STRIDE, LOGIT_SCALE = 336, 224, 112, 40.0
# Scores of words that are resized at a time (64 MiB of float32).
CHUNK_ELEMENTS = 2**24


class DenseCLIPImageSegmentationPipeline(ImageSegmentationPipeline):
    """
    `pipeline("image-segmentation")` with `batch_size > 1` for images of different sizes.

    transformers concatenates the images of a batch, which must then have one size; padding them would change the
    predictions. Our models take lists, and run the images of one size together. Other models are served as ever.
    """

    def preprocess(self, image: Any, *args, **kwargs):  # type: ignore[override]  # as the base class names it
        inputs = super().preprocess(image, *args, **kwargs)
        if isinstance(self.model, DenseCLIPForSemanticSegmentation):
            inputs["pixel_values"] = list(inputs["pixel_values"])
        return inputs

    def _forward(self, model_inputs: Any):  # type: ignore[override]
        images = model_inputs["pixel_values"]
        if isinstance(images, list) and isinstance(images[0], list):
            model_inputs["pixel_values"] = [image for one in images for image in one]
        return super()._forward(model_inputs)


class WordModelLoader:
    """Loads what `pipeline("zero-shot-image-segmentation", model=name)` names: a CLIP, or a model of this library."""

    @staticmethod
    def from_pretrained(name: str, **options) -> Any:
        """A segmenter comes with its decoder; an image-text model becomes a [`DenseCLIPModel`]."""
        where = ("revision", "token", "trust_remote_code", "cache_dir", "local_files_only", "force_download")
        config = AutoConfig.from_pretrained(name, **{key: options[key] for key in where if key in options})
        is_segmenter = DenseCLIPForSemanticSegmentation.__name__ in (config.architectures or [])
        auto: Any = AutoModelForSemanticSegmentation if is_segmenter else AutoModel
        return as_word_model(auto.from_pretrained(name, **options))


def as_word_model(model: Any) -> DenseCLIPModel:
    """
    `model`, or a [`DenseCLIPModel`] around it if it is an image-text model such as `CLIPModel`.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(model, DenseCLIPModel):
        return model
    return DenseCLIPModel.from_clip(model).to(device=model.device, dtype=model.dtype).eval()


class ZeroShotImageSegmentationPipeline(Pipeline):
    """
    Segmentation by any words: `pipeline("zero-shot-image-segmentation", model="openai/clip-vit-base-patch16")`.

    Takes an image-text model such as CLIP as it is (windows of 224 pixels, last block as NACLIP's), a saved
    [`DenseCLIPModel`], or a trained segmenter: its score maps or, with cost aggregation, its decoder.

    Example:

    ```python
    >>> segment = pipeline("zero-shot-image-segmentation", model="openai/clip-vit-base-patch16")
    >>> segment("street.jpg", candidate_labels=["sky", "a red car", ["person", "pedestrian"]])
    [{'label': 'sky', 'mask': <PIL.Image.Image mode=L>, 'score': 0.91}, ...]
    ```
    """

    _load_processor: Any = False
    _load_image_processor = None
    _load_feature_extractor: Any = False
    _load_tokenizer = None
    model: Any
    image_processor: Any

    def __init__(self, model: Any, *args, **kwargs):
        super().__init__(as_word_model(model), *args, **kwargs)
        config = self.model.config
        is_segmenter = isinstance(self.model, DenseCLIPForSemanticSegmentation)
        self.is_trained = is_segmenter or config.num_context_tokens > 0 or config.context_decoder_num_layers > 0
        if not isinstance(self.image_processor, DenseCLIPImageProcessorBase):  # CLIP's own crops the image
            tower = tower_of(config.clip_config)
            size = {"shortest_edge": min(config.crop_size) if self.is_trained else SHORT_SIDE, "longest_edge": 2048}
            mean, std = tower.image_mean, tower.image_std
            self.image_processor = DenseCLIPImageProcessorPil(size=size, image_mean=mean, image_std=std)
        if self.tokenizer is None:
            raise ValueError("words need the model's tokenizer, and none lies beside the model: pass `tokenizer=`.")
        self._kept: tuple[Any, torch.Tensor] | None = None  # words and their embeddings, for the next image

    def __call__(self, image: Any, candidate_labels: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """
        Args:
            image (`str`, `PIL.Image.Image`, a list, data set or generator of them): paths, addresses or images of any
                sizes; or `{"image": ..., "candidate_labels": [...]}` for images with words of their own.
            candidate_labels (`list[str | list[str]]`): for each class a word or sentence, or several of which each
                pixel takes the one that fits it best; a text with commas is a list of words.
            threshold (`float`, *optional*): pixels whose best word is less probable belong to no label.
            background (`str` or `list[str]`, *optional*): words for all that is not asked for; they are not returned.
            templates (`list[str]`, *optional*): sentences with one `{}` for the word, whose embeddings are averaged;
                by default `ZERO_SHOT_TEMPLATES`, for a trained model its own prompt.
            return_map (`bool`): return the whole map instead of one mask for each label.
            timeout (`float`, *optional*): seconds to wait for an image from the web.

        Returns:
            For each image a list, the most probable first, of `{"label", "mask", "score"}` for each label that some
            pixel has: its first phrasing, a PIL image of mode "L" of the image's size with 255 where it is, and its
            pixels' mean probability from 0 to 1. With `return_map` a dict of `"segmentation"`, `(height, width)` int64
            positions in `candidate_labels` or -1, `"confidence"`, `(height, width)` float32, and `"labels"`.

        Raises:
            ValueError: for no words, an empty, repeated or too long one, or a model that reads no texts.
        """
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        return super().__call__(image, **kwargs)

    def _sanitize_parameters(self, **kwargs: Any):
        threshold = kwargs.get("threshold")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` is a probability from 0 to 1, got {threshold}.")
        groups = [("candidate_labels", "timeout"), ("background", "templates", "threshold"), ("return_map",)]
        unknown = set(kwargs) - {name for group in groups for name in group}
        if unknown:
            raise TypeError(f"this pipeline has no options {', '.join(sorted(unknown))}.")
        return [{name: kwargs[name] for name in group if name in kwargs} for group in groups]

    def preprocess(  # type: ignore[override]
        self, inputs: Any, candidate_labels: Any = None, timeout: float | None = None
    ):
        if isinstance(inputs, dict):
            inputs, candidate_labels = inputs["image"], inputs.get("candidate_labels", candidate_labels)
        if candidate_labels is None:
            raise ValueError('no words are asked for: pass `candidate_labels=["sky", "a red car"]`.')
        if isinstance(candidate_labels, str):
            candidate_labels = [word.strip() for word in candidate_labels.split(",")]
        classes = tuple(map(tuple, class_phrasings(candidate_labels)))
        image = load_image(inputs, timeout=timeout)
        pixel_values = self.image_processor(image, return_tensors="pt")["pixel_values"][0].to(self.dtype)
        # Lists of one, which batches of different sizes can hold.
        return {"pixel_values": [pixel_values], "size": [(image.height, image.width)], "classes": [classes]}

    def _forward(  # type: ignore[override]
        self,
        model_inputs: Any,
        background: str | Sequence[str | Sequence[str]] | None = None,
        templates: Sequence[str] | None = None,
        threshold: float | None = None,
    ):
        images, sizes, asked = (model_inputs[name] for name in ("pixel_values", "size", "classes"))
        if isinstance(images[0], list):  # a batch
            images, sizes, asked = ([one for (one,) in entries] for entries in (images, sizes, asked))
        background = [background] if isinstance(background, str) else background
        others = [word for phrasings in class_phrasings(background) for word in phrasings] if background else []
        templates = None if templates is None else tuple(templates)
        found: dict[str, list] = {"segmentation": [None] * len(images), "confidence": [None] * len(images)}
        for classes in dict.fromkeys(asked):
            places = [place for place, wanted in enumerate(asked) if wanted == classes]
            groups = [*classes, others] if others else list(classes)
            queries = self.encode_words(tuple(word for group in groups for word in group), templates)
            owners = torch.tensor([k for k, group in enumerate(groups) for _ in group], device=queries.device)
            for place, of_image in zip(places, self.scores([images[i] for i in places], queries), strict=True):
                query, confidence = self.best_word(of_image, sizes[place])
                segmentation = owners[query]
                is_void = segmentation == len(classes)  # the background's
                if threshold is not None:
                    is_void |= confidence < threshold
                found["segmentation"][place] = segmentation.masked_fill(is_void, -1)
                found["confidence"][place] = confidence
        return {**found, "classes": list(asked)}

    def encode_words(self, words: tuple[str, ...], templates: tuple[str, ...] | None = None) -> torch.Tensor:
        """An embedding for each word, `(Q, D)`, kept for the next image."""
        if self._kept is None or self._kept[0] != (words, templates):
            own = None if self.is_trained else ZERO_SHOT_TEMPLATES
            # A word may stand in two classes, or be a class and background.
            unique = {word: number for number, word in enumerate(dict.fromkeys(words))}
            embeds = self.model.encode_texts(list(unique), self.tokenizer, templates or own)
            self._kept = (words, templates), embeds[[unique[word] for word in words]]
        return self._kept[1]

    def scores(self, images: list[torch.Tensor], queries: torch.Tensor) -> list[torch.Tensor]:
        """[`score`] of each of images of any sizes."""
        return forward_by_size(lambda pixel_values: {"scores": self.score(pixel_values, queries)}, images)["scores"]

    def score(self, pixel_values: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Scores of places of images of one size for each query, `(B, Q, h, w)`: what `best_word` takes."""
        config = self.model.config
        if self.uses_decoder:
            return self.model(pixel_values, text_embeds=queries).logits.float()
        if self.is_trained or config.inference_mode != "whole":
            scale = 1 / config.temperature if self.is_trained else LOGIT_SCALE
            return scale * self.model.score(pixel_values, queries).float()
        return LOGIT_SCALE * sliding_window_logits(
            lambda window: self.model.score(window, queries), pixel_values, [WINDOW] * 2, [WINDOW_STRIDE] * 2
        )

    @property
    def uses_decoder(self) -> bool:
        """Whether the model has a decoder that takes any words."""
        is_segmenter = isinstance(self.model, DenseCLIPForSemanticSegmentation)
        return is_segmenter and self.model.config.decode_head == "cost_aggregation"

    def best_word(self, scores: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The query of highest score `(Q, h, w)` at each pixel of an image, and its probability: two maps of `size`.

        It is the softmax of all queries' scores; with a decoder, which decides for every class by itself, the sigmoid.
        A few queries are resized at a time, so that memory does not grow with their number.
        """
        check_finite(scores)
        step = max(1, CHUNK_ELEMENTS // (size[0] * size[1]))
        best, query, total = (scores.new_full(size, value) for value in (-torch.inf, 0, -torch.inf))
        for first in range(0, len(scores), step):
            part = resize_bilinear(scores[None, first : first + step], size)[0]
            highest, index = part.max(0)
            query = torch.where(highest > best, index + first, query.long())
            best, total = torch.maximum(best, highest), torch.logaddexp(total, part.logsumexp(0))
        if not self.uses_decoder:
            return query, (best - total).exp()
        return query, best if self.model.config.inference_mode == "slide_and_whole" else best.sigmoid()

    def postprocess(self, model_outputs: Any, return_map: bool = False):  # type: ignore[override]
        segmentation, confidence, classes = (
            model_outputs[name][0] for name in ("segmentation", "confidence", "classes")
        )
        labels = [phrasings[0] for phrasings in classes]
        if return_map:
            return {"segmentation": segmentation, "confidence": confidence, "labels": labels}
        results = []
        for k, label in enumerate(labels):
            mask = segmentation == k
            if mask.any():
                picture = Image.fromarray(mask.to(torch.uint8).mul(255).numpy())
                results.append({"label": label, "mask": picture, "score": confidence[mask].mean().item()})
        return sorted(results, key=lambda result: -result["score"])


def register_pipelines() -> None:
    """Make `transformers.pipeline` use the classes of this module."""
    tasks: dict[str, dict] = PIPELINE_REGISTRY.supported_tasks
    tasks["image-segmentation"]["impl"] = DenseCLIPImageSegmentationPipeline
    tasks["zero-shot-image-segmentation"] = {
        "impl": ZeroShotImageSegmentationPipeline,
        "pt": (WordModelLoader,),
        "default": {"model": ("openai/clip-vit-base-patch16", "main")},
        "type": "multimodal",
    }


__all__ = ["DenseCLIPImageSegmentationPipeline", "ZeroShotImageSegmentationPipeline", "register_pipelines"]
