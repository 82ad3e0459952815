"""A model with what is asked of it: images in, class ids, certainty and score maps out.

Shapes: B images, K classes, D embedding size, H x W pixels.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image

from ..data import default_palette
from ..model.class_names_denseclip import class_phrasings
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation, DenseCLIPModel
from ..model.resizing_denseclip import check_finite, resize_argmax, resize_max
from ..model.towers_denseclip import check_normalization
from ..words import WordOptions, WordReader, set_options
from .drawing import MAX_INDEXED_CLASSES
from .views import is_native, segment_in_windows


logger = logging.getLogger(__name__)


class Segmented(NamedTuple):
    """
    One image's result.

    Args:
        ids (`torch.Tensor` of shape `(H, W)`): class ids, or [`Segmenter.void`] where no class is certain enough.
        certainty (`torch.Tensor` of shape `(H, W)`, *optional*): probability of each pixel's best class, if wanted.
        score_maps (`torch.Tensor` of shape `(S, h, w)`, *optional*): cosines of the S wanted names and words.
    """

    ids: torch.Tensor
    certainty: torch.Tensor | None = None
    score_maps: torch.Tensor | None = None


class Segmenter:
    """
    A model with what is asked of it.

    Args:
        model ([`DenseCLIPModel`]): put into eval mode; only a segmenter has classes of its own.
        image_processor ([`DenseCLIPImageProcessor`]): its preprocessing.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): CLIP's, needed for words that are not the model's classes.
        words (list of `str` or of lists of `str`): segment these, as [`WordReader`] does, instead of the model's
            classes; a class of several phrasings is called by its first.
        score_maps (`Sequence[str]`): names or words whose score maps are wanted.
        options ([`WordOptions`]): how words are read. Its `threshold` is for the model's own classes too (softmax of
            the logits): less probable pixels become `void`, 255, or 65535 if there are more than 255 classes.
        certainty (`bool`): whether each pixel's probability is wanted.
        native_resolution (`bool`): segment in windows of the config's `crop_size` without resizing the image, as a
            model that was trained so does unasked.

    Raises:
        ValueError: for an image processor of another family; for words without a tokenizer, given twice, empty or too
            long; for a model that reads none, or one without classes of its own and without words.
    """

    def __init__(
        self,
        model: DenseCLIPModel,
        image_processor,
        tokenizer=None,
        words: Sequence[str | Sequence[str]] = (),
        score_maps: Sequence[str] = (),
        options: WordOptions | None = None,
        *,
        certainty: bool = False,
        native_resolution: bool = False,
    ):
        check_normalization(image_processor, model.config)
        self.model, self.image_processor, self.options = model.eval(), image_processor, options or WordOptions()
        set_options(model, self.options.settings())
        self.certainty = certainty
        self.native_resolution = native_resolution or (not words and is_native(model, image_processor))
        self.classes = class_phrasings(words) if words else []
        own_names = [model.config.id2label[i] for i in range(len(model.config.id2label))]
        if not words and not isinstance(model, DenseCLIPForSemanticSegmentation):
            raise ValueError("this model has no decoder and so no classes of its own: say which words to look for.")
        if native_resolution and self.options.refine:
            raise ValueError("`refine` needs the whole image: leave out `native_resolution`, or `refine`.")
        self.names = [phrasings[0] for phrasings in self.classes] if words else own_names
        own_palette = None if words else model.config.palette
        self.palette = own_palette or default_palette(len(self.names))
        self.void = 255 if len(self.names) <= 255 else 65535
        if score_maps:
            class_phrasings(score_maps)
        new = [name for name in score_maps if words or name not in own_names]
        self.reader = None
        if words or new:
            self.reader = WordReader(model, tokenizer, image_processor)
        self.queries = self.reader.queries(self.classes, self.options) if words and self.reader else None
        self.score_names, self.score_embeds = list(score_maps), None
        self.score_rows: list[int] = []
        if score_maps:
            known, embeds = ([], []) if words else (own_names, [model.encode_classes()])
            if new and self.reader is not None:
                embeds.append(self.reader.encode(tuple(new), self.options.templates))
            self.score_embeds = torch.cat(embeds)
            self.score_rows = [[*known, *new].index(name) for name in score_maps]
        if len(self.names) > MAX_INDEXED_CLASSES:
            logger.warning("%d classes do not fit a palette: masks are 16-bit gray PNG.", len(self.names))

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """`pixel_values` `(3, h, w)` of an image."""
        if self.reader is not None:
            return self.reader.preprocess(image, self.options.short_side)
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], pixel_values: torch.Tensor | None = None) -> list[Segmented]:
        """
        The results of B images.

        Args:
            images: as they are read; results have their sizes.
            pixel_values (`torch.Tensor` of shape `(B, 3, h, w)`, *optional*): from [`preprocess`], if it was done.

        Raises:
            ValueError: for scores that are NaN or infinite, in any of the images.
        """

        def preprocessed() -> torch.Tensor:
            return torch.stack([self.preprocess(i) for i in images]) if pixel_values is None else pixel_values

        segmented: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
        if self.native_resolution:
            segmented = [self._in_windows(image) for image in images]
        else:
            segmented = self._whole(preprocessed(), [(image.height, image.width) for image in images])
        maps_of = self.scores(preprocessed()) if self.score_names else [None] * len(images)
        results = []
        for (ids, certainty), maps in zip(segmented, maps_of, strict=True):
            ids = ids.masked_fill(ids < 0, self.void)
            if self.options.threshold and certainty is not None:
                ids = ids.masked_fill(certainty < self.options.threshold, self.void)
            results.append(Segmented(ids, certainty if self.certainty else None, maps))
        return results

    @torch.no_grad()
    def scores(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The wanted score maps `(B, S, h, w)` of preprocessed images."""
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        maps = self.model.score(pixel_values, self.score_embeds)[:, self.score_rows]
        check_finite(maps)
        return maps

    def _whole(
        self, pixel_values: torch.Tensor, sizes: Sequence[tuple[int, int]]
    ) -> Sequence[tuple[torch.Tensor, torch.Tensor | None]]:
        if self.classes and self.reader is not None:
            return self.reader.read(list(pixel_values), sizes, self.classes, self.options)
        logits = self.model(pixel_values.to(self.model.device, self.model.dtype)).logits
        if not self.options.threshold and not self.certainty:
            return [(resize_argmax(one[None], size)[0], None) for one, size in zip(logits, sizes, strict=True)]
        found = (resize_max(one[None], size) for one, size in zip(logits, sizes, strict=True))
        return [(ids[0], certainty[0]) for _, ids, certainty in found]

    def _in_windows(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        if self.queries is None or self.reader is None:
            return segment_in_windows(self.model, image, self.image_processor)
        reader, (queries, owners) = self.reader, self.queries
        ids, certainty = segment_in_windows(
            self.model,
            image,
            self.image_processor,
            score=lambda pixels: reader.score(pixels, queries),
            num_scores=len(queries),
        )
        return owners.cpu()[ids.long()], certainty
