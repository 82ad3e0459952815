"""Segmenting whatever somebody has: images in, masks, overlays and heat maps out.

Shapes: B images, K classes, D embedding size, H x W pixels.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data import default_palette, parse_classes
from ..files import make_directory, write_atomically, writing_into
from ..model.class_names_denseclip import class_phrasings
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation, DenseCLIPModel
from ..model.resizing_denseclip import check_finite, resize_argmax, resize_max
from ..model.towers_denseclip import check_normalization
from ..words import WordOptions, WordReader, set_options
from .drawing import MAX_INDEXED_CLASSES, heat_map, indexed_image, overlay_with_legend
from .sources import Source, read_frames, read_image_of
from .views import batches_of_one_size, is_native, segment_in_windows


logger = logging.getLogger(__name__)

# Of a file's name without its suffix, so that any file system takes it; the distinguishing part comes first.
MAX_STEM_BYTES = 240


@dataclass
class Summary:
    """What came of it: how many images were segmented, and a sentence for each that was not."""

    done: int = 0
    problems: list[str] = field(default_factory=list)


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
            if tokenizer is None:
                first = self.names[0] if words else new[0]
                raise ValueError(f"{first!r} is none of the model's classes, and other words need CLIP's tokenizer.")
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
            self.model, image, self.image_processor, score=lambda pixels: reader.score(pixels, queries)
        )
        return owners.cpu()[ids.long()], certainty


def predict_sources(
    segmenter: Segmenter,
    sources: Sequence[Source],
    output_dir: str | Path,
    *,
    batch_size: int = 1,
    opacity: float = 0.6,
    overwrite: bool = False,
    timeout: float = 20.0,
    every: int = 1,
    max_frames: int | None = None,
    progress: bool = True,
) -> Summary:
    """
    Segment every source, and write `NAME_mask.png`, `NAME_overlay.png` and, as `segmenter` was asked,
    `NAME_certainty.png` (gray, 255 for a probability of 1) and `NAME_score_WORD.png` into `output_dir`; with words of
    the user's own, or where an earlier call had such, also which id is which, `classes.json`.

    What cannot be read or segmented, or would overwrite a file, is left out with a sentence; the others go on.

    Args:
        segmenter ([`Segmenter`]): model, classes and words.
        sources (`Sequence[Source]`): from [`find_sources`].
        output_dir: made if it is missing.
        batch_size (`int`): most images that go through the model together; they have one size after preprocessing.
        opacity (`float`): of the colors in overlays and heat maps, 0 … 1.
        overwrite (`bool`): replace files that are there.
        timeout (`float`): seconds to wait for an address.
        every, max_frames (`int`): of videos, take every `every`-th frame, and at most `max_frames`.
        progress (`bool`): whether to show a progress bar.

    Returns:
        [`Summary`]

    Raises:
        ValueError: for masks of other words there.
        OutputError: if `output_dir` cannot be written, or the disk is full.
    """
    folder, summary = Path(output_dir), Summary()
    make_directory(folder)
    if segmenter.classes or (folder / "classes.json").exists():
        _name_classes(folder / "classes.json", segmenter.names, overwrite)
    outputs = _Outputs(folder, segmenter, opacity, overwrite)
    bar = tqdm(sources, desc="Segmenting", disable=not progress, leave=False)
    prepared = _prepared(segmenter, bar, summary, outputs, timeout, every, max_frames)
    for batch in batches_of_one_size(prepared, batch_size, lambda item: item[2] if item[2] is None else item[2].shape):
        for name, image, result in _segmented(segmenter, batch, summary):
            try:
                outputs.write(name, image, result)
                summary.done += 1
            except FileExistsError:  # since it was read
                summary.problems.append(outputs.problem(name) or f"{name}: its results are there already.")
    return summary


def _name_classes(file: Path, names: list[str], overwrite: bool) -> None:
    """
    Write which id is which word, in the format of a data set's `classes.json`, unless one there says the same. One
    that says more than that is a data set's own, and stays.
    """
    if file.exists():
        is_ours = False
        with suppress(ValueError, OSError):
            if parse_classes(file).id2label == dict(enumerate(names)):
                return
            is_ours = list(json.loads(file.read_text(encoding="utf-8"))) == ["id2label"]
        if not (overwrite and is_ours):
            way = ", or allow to overwrite it" if is_ours else ""
            raise ValueError(f"{file} is there already, of other words: choose another folder{way}.")
    text = json.dumps({"id2label": dict(enumerate(names))}, indent=2) + "\n"
    with writing_into(file.parent):
        write_atomically(file, text)


class _Outputs:
    """The files of each image, whose names are checked before any work is done for it."""

    def __init__(self, folder: Path, segmenter: Segmenter, opacity: float, overwrite: bool):
        self.folder, self.segmenter, self.opacity, self.overwrite = folder, segmenter, opacity, overwrite
        self.kinds = ["mask", "overlay", *["certainty"] * segmenter.certainty]
        for number, word in enumerate(segmenter.score_names):
            simple = "".join(c if c.isalnum() else "-" for c in word)[:40]
            self.kinds.append(f"score_{number}_{simple}")

    def files(self, name: str) -> list[Path]:
        stems = (f"{name}_{kind}".encode()[:MAX_STEM_BYTES].decode(errors="ignore") for kind in self.kinds)
        return [self.folder / f"{stem}.png" for stem in stems]

    def problem(self, name: str) -> str | None:
        """A sentence if something of this name is there that may not be overwritten."""
        there = [] if self.overwrite else [file for file in self.files(name) if file.exists() or file.is_symlink()]
        return f"{there[0]} is there already: choose another folder, or allow to overwrite it." if there else None

    def write(self, name: str, image: Image.Image, result: Segmented) -> None:
        with writing_into(self.folder):
            for file, drawing in zip(self.files(name), self._drawings(image, result), strict=True):
                if self.overwrite:
                    file.unlink(missing_ok=True)  # a link there would be followed
                _write_new(file, drawing)

    def _drawings(self, image: Image.Image, result: Segmented) -> Iterator[Image.Image]:
        """In the order of `kinds`, made one at a time."""
        ids, palette = result.ids.cpu().numpy(), self.segmenter.palette
        yield indexed_image(ids, palette)
        yield overlay_with_legend(image, ids, dict(enumerate(self.segmenter.names)), palette, self.opacity)
        if result.certainty is not None:
            yield Image.fromarray((255 * result.certainty.float()).round().cpu().numpy().astype(np.uint8))
        if (maps := result.score_maps) is not None:
            lowest, highest = maps.min().item(), maps.max().item()
            yield from (heat_map(image, score_map, lowest, highest, self.opacity) for score_map in maps)


Prepared = tuple[str, Image.Image, torch.Tensor | None]  # a name, and pixel values unless it goes in windows


def _prepared(
    segmenter: Segmenter,
    sources: Iterable[Source],
    summary: Summary,
    outputs: _Outputs,
    timeout: float,
    every: int,
    max_frames: int | None,
) -> Iterator[Prepared]:
    """Images and frames; what cannot be read, resized or written, or has the name of another, is noted."""
    taken: set[str] = set()
    windows = segmenter.native_resolution
    for source in sources:
        try:
            if source.is_video:
                named = read_frames(source, every, max_frames)
            else:
                named = iter([(source.name, read_image_of(source, timeout, large=windows))])
            for name, image in named:
                problem = outputs.problem(name)
                if name.casefold() in taken:
                    problem = f"{source.shown}: results called {name} are another's already: rename one of the two."
                pixel_values = None
                if not problem and not windows:
                    try:
                        pixel_values = segmenter.preprocess(image)
                    except ValueError as error:
                        problem = f"{name}: {error}"
                if problem:
                    summary.problems.append(problem)
                    continue
                taken.add(name.casefold())
                yield name, image, pixel_values
        except (OSError, ValueError, ImportError) as error:
            summary.problems.append(str(error))


def _segmented(
    segmenter: Segmenter, batch: Sequence[Prepared], summary: Summary
) -> Iterator[tuple[str, Image.Image, Segmented]]:
    """Images of one size with their results; those that cannot be segmented are noted."""
    names, images, pixel_values = zip(*batch, strict=True)
    try:
        results = segmenter(images, None if pixel_values[0] is None else torch.stack(pixel_values))
    except ValueError as error:
        if len(batch) == 1:
            summary.problems.append(f"{names[0]}: {error}")
        else:  # it may be the fault of one of them
            for one in batch:
                yield from _segmented(segmenter, [one], summary)
        return
    yield from zip(names, images, results, strict=True)


def _write_new(file: Path, image: Image.Image) -> None:
    """Write `image` to a file that is not there yet, whole or not at all."""
    stream = file.open("xb")
    try:
        with stream:
            image.save(stream, format="PNG")
    except BaseException:
        file.unlink(missing_ok=True)
        raise
