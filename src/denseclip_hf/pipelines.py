"""Pipelines of transformers: image segmentation for batches of different sizes, and segmentation by any words."""

import os
from dataclasses import fields
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

from .model.class_names_denseclip import class_phrasings
from .model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from .options import DEFAULT_CLIP
from .words import WindowOptions, WordOptions, WordReader, as_word_model, options_set


def load_levels(image: Any, timeout: float | None = None) -> Any:
    """
    transformers' `load_image`, but for deep and float images, which that would clip to 0 … 255: those are read by the
    rule of [`decode_image`], as in training.
    """
    if isinstance(image, str) and os.path.isfile(image):
        with Image.open(image) as opened:
            mode = opened.mode
    else:
        mode = image.mode if isinstance(image, Image.Image) else "RGB"
    if mode[0] in "IF":
        from .data import read_image  # with `datasets`, which nothing else here needs

        image = read_image(image)
    return load_image(image, timeout)


class DenseCLIPImageSegmentationPipeline(ImageSegmentationPipeline):
    """
    `pipeline("image-segmentation")` with `batch_size > 1` for images of different sizes.

    16-bit and float images are read as in training.

    transformers concatenates the images of a batch, which must then have one size; padding them would change the
    predictions. Our models take lists, and run the images of one size together. Other models are served as ever.
    """

    def preprocess(self, image: Any, subtask=None, timeout=None):  # type: ignore[override]
        inputs = super().preprocess(load_levels(image, timeout), subtask)
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

    def __init__(self, model: Any, *args, **kwargs):
        super().__init__(as_word_model(model), *args, **kwargs)
        # Without a tokenizer, asking for words says so.
        self.reader = WordReader(self.model, self.tokenizer, self.image_processor)  # type: ignore[arg-type]

    def __call__(self, image: Any, candidate_labels: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """
        Args:
            image (`str`, `PIL.Image.Image`, a list, data set or generator of them): paths, addresses or images of any
                sizes; or `{"image": ..., "candidate_labels": [...]}` for images with words of their own.
            candidate_labels (`list[str | list[str]]`): for each class a word or sentence, or several of which each
                pixel takes the one that fits it best; a text with commas is a list of words.
            background, threshold, area_threshold, templates, scale, short_side, last_block, refine, dilations
                (*optional*): how words are read, see [`WordOptions`]; background words are not returned.
            inference_mode, crop_size, stride (*optional*): windows, see [`WindowOptions`].
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
        own = {name: kwargs.pop(name) for name in ("candidate_labels", "timeout", "return_map") if name in kwargs}
        sides = {option.name: kwargs.pop(option.name, None) for option in fields(WindowOptions)}
        windows: dict[str, Any] = {k: [v] if isinstance(v, int) else v for k, v in sides.items() if v is not None}
        options = {name: value for name, value in kwargs.items() if value is not None}
        forward: dict[str, Any] = {}
        if kwargs:  # a `TypeError` for a name that is none
            forward["options"] = WordOptions(**options)
        if windows:
            forward["windows"] = WindowOptions(**windows)
        before: dict[str, Any] = {name: own[name] for name in ("candidate_labels", "timeout") if name in own}
        if "short_side" in options:
            before["short_side"] = options["short_side"]
        return before, forward, {name: own[name] for name in ("return_map",) if name in own}

    def preprocess(  # type: ignore[override]
        self, inputs: Any, candidate_labels: Any = None, timeout: float | None = None, short_side: int | None = None
    ):
        if isinstance(inputs, dict):
            inputs, candidate_labels = inputs["image"], inputs.get("candidate_labels", candidate_labels)
        if isinstance(candidate_labels, str):
            candidate_labels = [word.strip() for word in candidate_labels.split(",")]
        classes = tuple(map(tuple, class_phrasings(candidate_labels)))
        image = load_levels(inputs, timeout)
        pixel_values = self.reader.preprocess(image, short_side).to(self.dtype)
        # Lists of one, which batches of different sizes can hold.
        return {"pixel_values": [pixel_values], "size": [(image.height, image.width)], "classes": [classes]}

    def _forward(  # type: ignore[override]
        self, model_inputs: Any, options: WordOptions | None = None, windows: WindowOptions | None = None
    ):
        options, windows = options or WordOptions(), windows or WindowOptions()
        images, sizes, asked = (model_inputs[name] for name in ("pixel_values", "size", "classes"))
        if isinstance(images[0], list):  # a batch
            images, sizes, asked = ([one for (one,) in entries] for entries in (images, sizes, asked))
        found: list[Any] = [None] * len(images)
        with options_set(self.model, windows.settings() | options.settings()):
            for classes in dict.fromkeys(asked):
                places = [place for place, wanted in enumerate(asked) if wanted == classes]
                some, their_sizes = ([entries[i] for i in places] for entries in (images, sizes))
                results = self.reader.read(some, their_sizes, classes, options)
                for place, result in zip(places, results, strict=True):
                    found[place] = result
        segmentation, confidence = map(list, zip(*found, strict=True))
        return {"segmentation": segmentation, "confidence": confidence, "classes": list(asked)}

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
                image = Image.fromarray(mask.to(torch.uint8).mul(255).numpy())
                results.append({"label": label, "mask": image, "score": confidence[mask].mean().item()})
        return sorted(results, key=lambda result: -result["score"])


def register_pipelines() -> None:
    """Make `transformers.pipeline` use the classes of this module."""
    tasks: dict[str, dict] = PIPELINE_REGISTRY.supported_tasks
    tasks["image-segmentation"]["impl"] = DenseCLIPImageSegmentationPipeline
    tasks["zero-shot-image-segmentation"] = {
        "impl": ZeroShotImageSegmentationPipeline,
        "pt": (WordModelLoader,),
        "default": {"model": (DEFAULT_CLIP, "main")},
        "type": "multimodal",
    }


__all__ = ["DenseCLIPImageSegmentationPipeline", "ZeroShotImageSegmentationPipeline", "register_pipelines"]
