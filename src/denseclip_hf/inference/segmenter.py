"""Segmenting whatever somebody has: pictures in, masks, overlays and heat maps out.

Shapes: B images, K classes, D embedding size, H x W pixels.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data import default_palette, parse_classes
from ..files import make_directory, write_atomically, writing_into
from ..model.class_names_denseclip import class_phrasings
from ..model.resizing_denseclip import check_finite, resize_argmax
from .drawing import MAX_INDEXED_CLASSES, heat_map, indexed_picture, overlay_with_legend
from .sources import Source, read_frames, read_picture


logger = logging.getLogger(__name__)

Named = tuple[str, Image.Image]
Prepared = tuple[str, Image.Image, torch.Tensor]  # with its pixel values
# Pictures of sizes that fill no batch wait, but never more than this many batches' worth.
WAITING_BATCHES = 4
# Of a file's name without its suffix, so that any file system takes it; what tells files apart stands before.
MAX_STEM_BYTES = 240


@dataclass
class Summary:
    """What came of it: how many pictures were segmented, and a sentence for each that was not."""

    done: int = 0
    problems: list[str] = field(default_factory=list)


class Segmenter:
    """
    A model with what is asked of it.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): put into eval mode.
        image_processor ([`DenseCLIPImageProcessor`]): its preprocessing.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): CLIP's, needed for words that are not the model's classes.
        words (list of `str` or of lists of `str`): segment these, as [`encode_texts`] takes them, from score maps
            instead of the model's classes; a class of several phrasings is called by its first.
        score_maps (`Sequence[str]`): names or words whose score maps are wanted.
        templates (`Sequence[str]`, *optional*): sentences for words, see [`encode_texts`].

    Raises:
        ValueError: for words without a tokenizer, given twice, empty or too long, or a model that reads none.
    """

    def __init__(self, model, image_processor, tokenizer=None, words=(), score_maps=(), templates=None):
        self.model, self.image_processor = model.eval(), image_processor
        own_names = [model.config.id2label[i] for i in range(model.config.num_labels)]
        self.names = [phrasings[0] for phrasings in class_phrasings(words)] if words else own_names
        own_palette = None if words else model.config.palette
        self.palette = own_palette or default_palette(len(self.names))
        self.score_names = list(score_maps)
        self.words, self.embeds, self.score_embeds = bool(words), None, None
        if words:
            self.embeds = self._encode(list(words), tokenizer, templates)
        if score_maps:
            class_phrasings(score_maps)
            more = [name for name in score_maps if name not in self.names]
            own = model.encode_classes() if self.embeds is None else self.embeds
            self.score_embeds = torch.cat([own, self._encode(more, tokenizer, templates)]) if more else own
            known = [*self.names, *more]
            self.score_rows = [known.index(name) for name in score_maps]
        if len(self.names) > MAX_INDEXED_CLASSES:
            logger.warning("%d classes do not fit a palette: masks are 16-bit grey PNG.", len(self.names))

    def _encode(self, texts: list[str], tokenizer, templates) -> torch.Tensor:
        if tokenizer is None:
            raise ValueError(f"{texts[0]!r} is none of the model's classes, and other words need CLIP's tokenizer.")
        return self.model.encode_texts(texts, tokenizer, templates)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """`pixel_values` `(3, h, w)` of a picture."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, sizes: Sequence[tuple[int, int]]):
        """Class ids, B maps `(H, W)` of `sizes`, and the wanted score maps `(B, S, h, w)` of S names, or `None`.

        Raises `ValueError` for scores that are NaN or infinite, in any of the pictures.
        """
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        scores = None
        if self.words:
            maps = self.model.predict_from_scores(pixel_values, self.embeds, sizes).segmentation
        else:
            logits = self.model(pixel_values).logits
            maps = [resize_argmax(logits[i : i + 1], size)[0] for i, size in enumerate(sizes)]
        if self.score_embeds is not None:
            scores = self.model.score(pixel_values, self.score_embeds)[:, self.score_rows]
            check_finite(scores)
        return maps, scores


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
    Segment every source, and write `NAME_mask.png`, `NAME_overlay.png` and `NAME_score_WORD.png` into `output_dir`;
    with words of the user's own, or where an earlier call had such, also which id is which, `classes.json`.

    What can not be read or segmented, or would overwrite a file, is left out with a sentence; the others go on.

    Args:
        segmenter ([`Segmenter`]): model, classes and words.
        sources (`Sequence[Source]`): from [`find_sources`].
        output_dir: made if it is missing.
        batch_size (`int`): most pictures that go through the model together; they have one size after preprocessing.
        opacity (`float`): of the colours in overlays and heat maps, 0 … 1.
        overwrite (`bool`): replace files that are there.
        timeout (`float`): seconds to wait for an address.
        every, max_frames (`int`): of videos, take every Nth frame, and at most so many.
        progress (`bool`): whether to show a progress bar.

    Returns:
        [`Summary`]

    Raises:
        ValueError: for a `batch_size` or `every` below 1, an `opacity` outside 0 … 1, or masks of other words there.
        OutputError: if `output_dir` can't be written, or the disk is full.
    """
    if batch_size < 1 or every < 1:
        raise ValueError(f"`batch_size` and `every` must be at least 1, got {batch_size} and {every}.")
    if not 0 <= opacity <= 1:
        raise ValueError(f"`opacity` must be from 0 to 1, got {opacity}.")
    folder, summary = Path(output_dir), Summary()
    make_directory(folder)
    if segmenter.words or (folder / "classes.json").exists():
        _name_classes(folder / "classes.json", segmenter.names, overwrite)
    bar = tqdm(sources, desc="Segmenting", disable=not progress, leave=False)
    named = _pictures(bar, summary, timeout, every, max_frames)
    for batch in _same_size_batches(segmenter, named, batch_size, summary):
        for name, image, ids, scores in _segmented(segmenter, batch, summary):
            problem = _save(folder, name, _results(segmenter, image, ids, scores, opacity), overwrite)
            summary.done += problem is None
            summary.problems += [problem] if problem else []
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


def _pictures(
    sources: Iterable[Source], summary: Summary, timeout: float, every: int, max_frames: int | None
) -> Iterator[Named]:
    """Pictures and frames, by name; what can not be read, or has the name of another, is noted."""
    taken: set[str] = set()
    for source in sources:
        try:
            if source.is_video:
                named = read_frames(source, every, max_frames)
            else:
                named = iter([(source.name, read_picture(source, timeout))])
            for name, image in named:
                if name.casefold() in taken:
                    summary.problems.append(
                        f"{source.shown}: results called {name} are another's already: rename one of both."
                    )
                    continue
                taken.add(name.casefold())
                yield name, image
        except (OSError, ValueError, ImportError) as error:
            summary.problems.append(str(error))


def _same_size_batches(
    segmenter: Segmenter, named: Iterable[Named], batch_size: int, summary: Summary
) -> Iterator[list[Prepared]]:
    """Pictures of one size each, as soon as they are full or too many wait."""
    waiting: dict[tuple[int, ...], list[Prepared]] = {}
    for name, image in named:
        try:
            pixel_values = segmenter.preprocess(image)
        except ValueError as error:
            summary.problems.append(f"{name}: {error}")
            continue
        size = tuple(pixel_values.shape)
        waiting.setdefault(size, []).append((name, image, pixel_values))
        if sum(map(len, waiting.values())) >= WAITING_BATCHES * batch_size:
            size = max(waiting, key=lambda key: len(waiting[key]))
        if len(waiting[size]) >= batch_size or sum(map(len, waiting.values())) >= WAITING_BATCHES * batch_size:
            yield waiting.pop(size)
    yield from waiting.values()


def _segmented(segmenter: Segmenter, batch: list[Prepared], summary: Summary) -> Iterator[tuple]:
    """(name, picture, class ids, score maps) of pictures of one size; those that can not be segmented are noted."""
    sizes = [(image.height, image.width) for _, image, _ in batch]
    try:
        maps, scores = segmenter(torch.stack([pixels for _, _, pixels in batch]), sizes)
    except ValueError as error:
        if len(batch) == 1:
            summary.problems.append(f"{batch[0][0]}: {error}")
        else:  # of one of them, perhaps
            for one in batch:
                yield from _segmented(segmenter, [one], summary)
        return
    for index, (name, image, _) in enumerate(batch):
        yield name, image, maps[index], None if scores is None else scores[index]


def _results(segmenter: Segmenter, image: Image.Image, segmentation, scores, opacity: float) -> Iterator[Named]:
    """What is written of one picture, by the end of its name, made one at a time."""
    ids = segmentation.cpu().numpy()
    yield "mask", indexed_picture(ids, segmenter.palette)
    names = dict(enumerate(segmenter.names))
    yield "overlay", overlay_with_legend(image, ids, names, segmenter.palette, opacity)
    if scores is not None:
        lowest, highest = scores.min().item(), scores.max().item()
        for number, (word, score_map) in enumerate(zip(segmenter.score_names, scores, strict=True)):
            simple = "".join(c if c.isalnum() else "-" for c in word)[:40]
            yield f"score_{number}_{simple}", heat_map(image, score_map, lowest, highest, opacity)


def _save(folder: Path, name: str, results: Iterable[Named], overwrite: bool) -> str | None:
    """Write pictures; instead of overwriting any, return a sentence."""
    for kind, picture in results:
        stem = f"{name}_{kind}".encode()[:MAX_STEM_BYTES].decode(errors="ignore")
        file = folder / f"{stem}.png"
        try:
            with writing_into(folder):
                if overwrite:
                    file.unlink(missing_ok=True)  # a link there would be followed
                _write_new(file, picture)
        except FileExistsError:
            return f"{file} is there already: choose another folder, or allow to overwrite it."
    return None


def _write_new(file: Path, picture: Image.Image) -> None:
    """Write `picture` to a file that is not there yet, whole or not at all."""
    stream = file.open("xb")
    try:
        with stream:
            picture.save(stream, format="PNG")
    except BaseException:
        file.unlink(missing_ok=True)
        raise


__all__ = ["Segmenter", "Summary", "predict_sources"]
