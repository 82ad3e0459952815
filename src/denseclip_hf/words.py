"""Any words in, one map out: how words are read, and what asks a model of any kind for them.

A query is one phrasing, a class one or several. Shapes: Q queries, K classes, D embedding size, h x w places, H x W
pixels.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_utils import ImageInput

from .model.class_names_denseclip import class_phrasings
from .model.image_processing_denseclip import DenseCLIPImageProcessorBase, DenseCLIPImageProcessorPil
from .model.layers_denseclip import resize_bilinear
from .model.modeling_denseclip import (
    ZERO_SHOT_TEMPLATES,
    DenseCLIPForSemanticSegmentation,
    DenseCLIPModel,
    forward_by_size,
)
from .model.resizing_denseclip import check_finite, highest
from .model.towers_denseclip import check_last_block, check_normalization
from .model.words_denseclip import class_probabilities, color_affinity, refine_scores, without_small_classes
from .options import WindowOptions, WordOptions


SHORT_SIDE, LONG_SIDE = 336, 2048  # pixels of an image, as NACLIP's results are published
# Scores that are resized at a time (64 MiB of float32), and most of one image (2 GiB).
CHUNK_ELEMENTS, MAX_SCORES = 2**24, 2**29
# From so many on, embeddings take minutes: a bar is shown, and the files of the last sets are kept (20 MB for 10 000).
MANY_WORDS, WORDS_PER_STEP, KEPT_FILES = 1000, 200, 8
# Pixels at which edges are refined (16 weights each, 256 MiB); larger images are refined at a smaller size.
MAX_REFINED_PIXELS = 2**22


def fingerprint(tensors: Iterable[torch.Tensor], *facts: Any) -> str:
    """
    A hash that is the same where the values of `tensors` and the `facts` (what JSON can say) are, in any process.

    Offloaded tensors, which are not here to be read, make it another each time.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        here = None if tensor.is_meta else tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(os.urandom(32) if here is None else here.numpy().data)
    return digest.hexdigest()[:16]


def set_options(model: DenseCLIPModel, settings: dict[str, Any]) -> None:
    """
    Give the config of `model` the `settings` of [`WindowOptions`] and [`WordOptions`].

    Raises:
        ValueError: for values that a config refuses, or a `last_block` that the tower does not have.
    """
    if not settings:
        return
    try:
        checked = type(model.config)(**{**model.config.to_dict(), **settings})
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    if checked.inference_mode == "whole" and not {"crop_size", "stride"}.isdisjoint(settings):
        raise ValueError(
            "`crop_size` and `stride` are a sliding window's, but this model takes whole images: add "
            '`inference_mode` "slide", or leave them out.'
        )
    check_last_block(model.tower, checked)
    for name in settings:
        setattr(model.config, name, getattr(checked, name))


@contextmanager
def options_set(model: DenseCLIPModel, settings: dict[str, Any]) -> Iterator[None]:
    """[`set_options`], until the block ends."""
    before = {name: getattr(model.config, name) for name in settings}
    set_options(model, settings)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


def as_word_model(model: PreTrainedModel) -> DenseCLIPModel:
    """
    `model`, or a [`DenseCLIPModel`] around it if it is an image-text model such as `CLIPModel`.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(model, DenseCLIPModel):
        return model
    return DenseCLIPModel.from_clip(model).to(device=model.device, dtype=model.dtype).eval()


def word_image_processor(model: DenseCLIPModel) -> DenseCLIPImageProcessorPil:
    """How images are prepared for a model that comes without: a CLIP's own processor would crop them."""
    size = {
        "shortest_edge": min(model.config.window[0]) if is_trained(model) else SHORT_SIDE,
        "longest_edge": LONG_SIDE,
    }
    return DenseCLIPImageProcessorPil(size=size, image_mean=model.tower.image_mean, image_std=model.tower.image_std)


def is_trained(model: DenseCLIPModel) -> bool:
    """Whether a model has learned prompts or segmentation, and so is not a CLIP as it is."""
    config = model.config
    has_learned = config.num_context_tokens > 0 or config.context_decoder_num_layers > 0
    return isinstance(model, DenseCLIPForSemanticSegmentation) or has_learned


class WordReader:
    """
    A model, asked for words.

    Args:
        model ([`DenseCLIPModel`]): a CLIP as it is, or a trained segmenter; both are read by their score maps or, with
            cost aggregation, by the decoder.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        image_processor ([`DenseCLIPImageProcessor`], *optional*): its preprocessing, [`word_image_processor`] if it is
            another family's or none.
    """

    def __init__(
        self,
        model: DenseCLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        if not isinstance(image_processor, DenseCLIPImageProcessorBase):
            image_processor = word_image_processor(model)
        self.image_processor = image_processor
        check_normalization(self.image_processor, model.config)
        self._kept: tuple[Any, torch.Tensor] | None = None  # words and their embeddings, for the next image

    @property
    def uses_decoder(self) -> bool:
        """Whether the model has a decoder that takes any words."""
        is_segmenter = isinstance(self.model, DenseCLIPForSemanticSegmentation)
        return is_segmenter and self.model.config.decode_head == "cost_aggregation"

    def preprocess(self, image: ImageInput, short_side: int | None = None) -> torch.Tensor:
        """`pixel_values` `(3, h, w)` of an image, its short side resized to `short_side` pixels."""
        options = {}
        if short_side is not None:
            options["size"] = {"shortest_edge": short_side, "longest_edge": max(LONG_SIDE, short_side)}
        return self.image_processor(image, return_tensors="pt", **options)["pixel_values"][0]

    def encode(self, words: tuple[str, ...], templates: Sequence[str] | None = None) -> torch.Tensor:
        """An embedding for each word, `(Q, D)`, kept for the next image."""
        sentences = None if templates is None else tuple(templates)
        if sentences is None and not is_trained(self.model):
            sentences = ZERO_SHOT_TEMPLATES
        if self._kept is None or self._kept[0] != (words, sentences):
            # A word may belong to two classes, or to a class and the background.
            unique = list(dict.fromkeys(words))
            embeds = (self._encode if len(unique) < MANY_WORDS else self._encode_once)(unique, sentences)
            rows = {word: row for row, word in enumerate(unique)}
            self._kept = (words, sentences), embeds[[rows[word] for word in words]]
        return self._kept[1]

    def _encode(self, words: list[str], templates: tuple[str, ...] | None) -> torch.Tensor:
        """Embeddings `(Q, D)`, worked out for words of like length together."""
        by_length = sorted(words, key=len)
        steps = tqdm(
            range(0, len(words), WORDS_PER_STEP), "Encoding words", leave=False, disable=len(words) < MANY_WORDS
        )
        embeds = [
            self.model.encode_texts(by_length[first : first + WORDS_PER_STEP], self.tokenizer, templates)
            for first in steps
        ]
        rows = {word: row for row, word in enumerate(by_length)}
        return torch.cat(embeds)[[rows[word] for word in words]]

    def _encode_once(self, words: list[str], templates: tuple[str, ...] | None) -> torch.Tensor:
        """The same, from a file in the Hub's cache where an earlier process kept them for equal words and weights."""
        config, state = self.model.config, self.model.state_dict()
        name = fingerprint(
            (tensor for key, tensor in state.items() if "vision_model" not in key),
            [words, templates, config.prompt_template, config.prompting, config.num_context_tokens],
            sorted(self.tokenizer.get_vocab().items()),
        )
        with suppress(OSError, SafetensorError, KeyError):
            file = cached_assets_path("denseclip_hf", "words") / f"{name}.safetensors"
            embeds = load_file(file)["text_embeds"].to(self.model.device)
            file.touch()
            return embeds
        embeds = self._encode(words, templates)
        with suppress(OSError, SafetensorError):  # they are kept where there is room
            file = cached_assets_path("denseclip_hf", "words") / f"{name}.safetensors"
            part = file.with_suffix(f".{os.getpid()}")
            save_file({"text_embeds": embeds.cpu()}, part)
            os.replace(part, file)
            files = sorted(file.parent.glob("*.safetensors"), key=lambda kept: kept.stat().st_mtime)
            for old in files[:-KEPT_FILES]:
                old.unlink()
        return embeds

    def queries(self, classes: Sequence[Sequence[str]], options: WordOptions) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(Q, D)` of all phrasings, the background's first, and the class `(Q,)` of each, or -1."""
        asked = class_phrasings(options.background) if options.background else []
        others = [word for phrasings in asked for word in phrasings]
        groups = [others, *classes]
        embeds = self.encode(tuple(word for group in groups for word in group), options.templates)
        owners = [k - 1 for k, group in enumerate(groups) for _ in group]
        return embeds, torch.tensor(owners, device=embeds.device)

    def score(self, pixel_values: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """
        Scores `(B, Q, h, w)` of places of images `(B, 3, H, W)` for each query, before the softmax or sigmoid.

        Raises:
            ValueError: for more queries than memory allows.
        """
        fit = MAX_SCORES // math.prod(pixel_values.shape[-2:])
        if len(queries) > fit:
            raise ValueError(
                f"{len(queries)} words are too many for an image of {' x '.join(map(str, pixel_values.shape[-2:]))} "
                f"pixels: {fit} fit, or more in a smaller one (`short_side`)."
            )
        if self.uses_decoder:
            pixel_values = pixel_values.to(self.model.device, self.model.dtype)
            return self.model(pixel_values, text_embeds=queries).logits.float()
        return self.model.score(pixel_values, queries).float() / self.model.config.temperature

    @torch.no_grad()
    def read(
        self,
        images: Sequence[torch.Tensor],
        sizes: Sequence[tuple[int, int]],
        classes: Sequence[Sequence[str]],
        options: WordOptions,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Maps of the classes, and of their probability.

        Args:
            images (sequence of tensors `(3, h, w)`): preprocessed, of any sizes.
            sizes (sequence of (height, width)): of the maps.
            classes (sequence of sequences of `str`): K classes' phrasings, as [`class_phrasings`] gives them.
            options ([`WordOptions`]): whose `settings` the model's config has already.

        Returns:
            For each image its classes `(H, W)`, int64, 0 … K-1 or -1 for none, and their probabilities `(H, W)`.
        """
        queries, owners = self.queries(classes, options)
        found = forward_by_size(lambda pixels: {"scores": self.score(pixels, queries)}, images)["scores"]
        return [
            self.choose(scores, owners, size, pixels, options)
            for scores, size, pixels in zip(found, sizes, images, strict=True)
        ]

    def choose(
        self,
        scores: torch.Tensor,
        owners: torch.Tensor,
        size: tuple[int, int],
        pixel_values: torch.Tensor,
        options: WordOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The class of the query of highest score `(Q, h, w)` at each pixel of an image, and its probability.

        It is the softmax of all queries' scores; with a decoder, which decides for every class by itself, the sigmoid.
        A few queries are resized at a time, so that memory does not grow with their number.

        Raises:
            ValueError: for scores that are NaN or infinite, or an area threshold without a background.
        """
        check_finite(scores)
        parts = self._resized(scores, size, pixel_values, options)
        if options.area_threshold:
            if owners[0] >= 0 or self.uses_decoder:
                raise ValueError("`area_threshold` needs `background` words, and a model without a decoder for words.")
            probabilities = class_probabilities(torch.cat(list(parts), 1), owners + 1, 1.0)
            confidence, found = without_small_classes(probabilities, options.area_threshold)[0].max(0)
            found = found - 1
        else:
            best, query, total = (found[0] for found in highest(parts))
            found = owners[query]
            if not self.uses_decoder:
                confidence = (best - total).exp()
            else:
                confidence = best if self.model.config.inference_mode == "slide_and_whole" else best.sigmoid()
        return found.masked_fill(confidence < options.threshold, -1), confidence

    def _resized(
        self, scores: torch.Tensor, size: tuple[int, int], pixel_values: torch.Tensor, options: WordOptions
    ) -> Iterator[torch.Tensor]:
        """`scores` `(Q, h, w)` at `size`, refined as `options` say, a few queries at a time: `(1, q, H, W)`."""
        step = max(1, CHUNK_ELEMENTS // math.prod(size))
        affinity = None
        if options.refine:
            shrink = math.sqrt(min(1.0, MAX_REFINED_PIXELS / math.prod(size)))
            colors = (max(1, int(size[0] * shrink)), max(1, int(size[1] * shrink)))
            images = resize_bilinear(pixel_values[None].to(scores.device).float(), colors)
            affinity = color_affinity(images, options.dilations)
        for part in scores[None].split(step, 1):
            if affinity is not None:
                part = resize_bilinear(part, tuple(affinity.shape[-2:]))
                part = refine_scores(part, affinity, options.refine, options.dilations)
            yield resize_bilinear(part, size)


__all__ = [
    "WindowOptions",
    "WordOptions",
    "WordReader",
    "as_word_model",
    "fingerprint",
    "is_trained",
    "options_set",
    "set_options",
    "word_image_processor",
]
