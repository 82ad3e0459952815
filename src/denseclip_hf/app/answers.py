"""What the page asks for: an image and words in; masks, overlays and heat maps out.

Nothing here knows of Gradio. Shapes: K classes, H x W pixels.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer

from ..data import file_stem, read_image
from ..devices import device_of
from ..inference import (
    Segmenter,
    heat_map,
    indexed_image,
    load_model,
    overlay_with_legend,
)
from ..model.class_names_denseclip import class_phrasings
from ..model.loading_denseclip import load_pretrained
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from ..words import WordOptions


# What one visitor may ask for at a time.
MAX_WORDS = 200
MAX_HEAT_MAPS = 12
# Pixels of an upload (6000 x 4000), and seconds that the model may work on it: others are waiting.
MAX_PIXELS = 24_000_000
MAX_SECONDS = 60.0
# What a page asks a CLIP for until somebody asks for something else.
FIRST_WORDS = ("sky", "road", "building", "tree", "grass", "water", "car", "person")
# Longer side of the images on the page; what is downloaded has the size of the upload.
SHOWN_SIDE = 1024


class AppModels:
    """
    The models of a page, each loaded when it is first asked for and then kept.

    Args:
        addresses (`Sequence[str]`): directories, or names on the Hub, at least one.
        device (`str`): where they run, see [`device_of`].
        dtype (`str`): a key of `LOADING_DTYPES`; `auto` is what the weights were saved in.

    Raises:
        ValueError: if there is no such device.
    """

    def __init__(self, addresses: Sequence[str], device: str = "auto", dtype: str = "auto"):
        self.addresses = _short_names(addresses)
        self.device = device_of(device)
        self.dtype = dtype
        self._loaded: dict[str, tuple[Any, Any, Any]] = {}

    @property
    def names(self) -> list[str]:
        """What the models are called: a directory by its last part, where those differ."""
        return list(self.addresses)

    @property
    def directories(self) -> list[Path]:
        """The models that lie in directories."""
        return [Path(address).resolve() for address in self.addresses.values() if Path(address).is_dir()]

    def load(self, name: str) -> tuple[Any, Any, Any]:
        """Model, image processor, and tokenizer or `None`.

        Raises:
            KeyError: for a name that is none of `names`; the page's list refuses it before.
            ValueError, OSError: with one sentence, for a model that is not there.
        """
        if name not in self._loaded:
            model, image_processor = load_model(self.addresses[name], self.dtype)
            try:
                tokenizer = load_pretrained(AutoTokenizer, self.addresses[name])
            except (OSError, ValueError):  # its own classes can be segmented all the same
                tokenizer = None
            self._loaded[name] = model.to(self.device).eval(), image_processor, tokenizer
        return self._loaded[name]

    def has_classes(self, name: str) -> bool:
        """Whether a model segments into classes of its own; a CLIP only takes words."""
        return isinstance(self.load(name)[0], DenseCLIPForSemanticSegmentation)

    def classes(self, name: str) -> list[str]:
        """The K names of a model's own classes; some words to begin with for a CLIP."""
        config = self.load(name)[0].config
        return [config.id2label[i] for i in range(config.num_labels)] if self.has_classes(name) else list(FIRST_WORDS)

    def segmenter(
        self,
        name: str,
        words: Sequence[str] = (),
        score_maps: Sequence[str] = (),
        sentences: bool = False,
        threshold: float = 0.0,
    ) -> Segmenter:
        """For `words` (the model's own classes if empty); `sentences` puts words into CLIP's."""
        model, image_processor, tokenizer = self.load(name)
        options = WordOptions(threshold=threshold, templates=["short"] if sentences else None)
        return Segmenter(model, image_processor, tokenizer, words, score_maps, options)


@dataclass
class Answer:
    """A segmented image: RGB `image`, class ids `segmentation` `(H, W)`, K `names` and colors `palette`."""

    image: Image.Image
    segmentation: np.ndarray
    names: list[str]
    palette: list[Sequence[int]]


def read_words(text: str) -> list[str]:
    """
    The classes of a text with one class (a word or a sentence) per line.

    Raises:
        ValueError: for none, too many, an empty one or one given twice.
    """
    words = [line.strip() for line in text.rstrip().splitlines()]
    if len(words) > MAX_WORDS:
        raise ValueError(f"{len(words)} classes are too many: give at most {MAX_WORDS}.")
    class_phrasings(words)
    return words


def read_upload(file: str | Path | None) -> Image.Image:
    """
    The image in a file, upright and RGB; messages call the file by its name only.

    Raises:
        ValueError: with one sentence, for no file, what is no image, or one of more than `MAX_PIXELS` pixels.
    """
    if not file or not Path(file).is_file():  # an address is not fetched
        raise ValueError("choose an image first.")
    try:
        return read_image(str(file), MAX_PIXELS)
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace(str(file), Path(file).name)) from error


@contextmanager
def time_limit(model: torch.nn.Module, seconds: float) -> Iterator[None]:
    """
    Ends what `model` computes meanwhile once it has taken so long, between two of its modules.

    Raises:
        ValueError: with one sentence, when the time is over.
    """
    end = time.monotonic() + seconds

    def check(module: torch.nn.Module, args: object) -> None:
        if time.monotonic() > end:
            raise ValueError(f"this takes more than {seconds:g} seconds: try a smaller image, or fewer words.")

    handles = [module.register_forward_pre_hook(check) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def segment(
    models: AppModels,
    image: Image.Image,
    name: str,
    words: Sequence[str] = (),
    sentences: bool = False,
    threshold: float = 0.0,
) -> Answer:
    """
    `image` segmented by the model `name` into its own classes, or from its score maps into `words`.

    Pixels whose best class has a probability below `threshold` have no class, see [`Segmenter`].
    """
    with time_limit(models.load(name)[0], MAX_SECONDS):
        segmenter = models.segmenter(name, words, sentences=sentences, threshold=threshold)
        (result,) = segmenter([image])
    return Answer(image, result.ids.cpu().numpy(), segmenter.names, [list(color) for color in segmenter.palette])


def heat_maps(
    models: AppModels,
    image: Image.Image,
    name: str,
    chosen: Sequence[str],
    words: Sequence[str] = (),
    sentences: bool = False,
) -> list[tuple[Image.Image, str]]:
    """
    A heat map and its caption (word, lowest and highest cosine) for each of the `chosen` words.

    The colors have one scale for all; the longer side is at most 1024 pixels.

    Raises:
        ValueError: for no word or too many, and as [`Segmenter`] does.
    """
    if not 0 < len(chosen) <= MAX_HEAT_MAPS:
        raise ValueError(f"choose from 1 to {MAX_HEAT_MAPS} classes or words for heat maps.")
    with time_limit(models.load(name)[0], MAX_SECONDS):
        segmenter = models.segmenter(name, words, [word.strip() for word in chosen], sentences)
        scores = segmenter.scores(segmenter.preprocess(image)[None])[0]
    lowest, highest, small = scores.min().item(), scores.max().item(), _shrunk(image)
    return [
        (heat_map(small, score, lowest, highest), f"{word} {score.min():.2f} to {score.max():.2f}")
        for word, score in zip(segmenter.score_names, scores, strict=True)
    ]


def annotated(answer: Answer) -> tuple[Any, dict[str, str]]:
    """
    What Gradio's annotated image shows, and the color of each label: the image shrunk to the page, with a mask
    `(h, w)` and a label (name and share) for each class that it shows, the largest first.
    """
    image = _shrunk(answer.image)
    full = Image.fromarray(answer.segmentation.astype(np.int32))
    ids = np.asarray(full.resize(image.size, Image.Resampling.NEAREST))
    shown = [(np.count_nonzero(ids == index), index) for index in np.unique(ids) if index < len(answer.names)]
    masks, colors = [], {}
    for count, index in sorted(shown, reverse=True):
        label = f"{answer.names[index]} {100 * count / ids.size:.0f} %"
        masks.append(((ids == index).astype(np.float32), label))
        colors[label] = "#{:02x}{:02x}{:02x}".format(*answer.palette[index])
    return (image, masks), colors


def save_mask(answer: Answer, folder: Path, name: str) -> Path:
    """Write `NAME_mask.png`, whose pixels are class ids; `name` is the image's file's."""
    return _save(indexed_image(answer.segmentation, answer.palette), folder, name, "mask")


def save_overlay(answer: Answer, folder: Path, name: str) -> Path:
    """Write `NAME_overlay.png`: the classes over the image, and a legend below."""
    painted = overlay_with_legend(answer.image, answer.segmentation, dict(enumerate(answer.names)), answer.palette)
    return _save(painted, folder, name, "overlay")


def _save(image: Image.Image, folder: Path, name: str, kind: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{file_stem(name) or 'image'}_{kind}.png"
    image.save(file)
    return file


def _shrunk(image: Image.Image) -> Image.Image:
    return ImageOps.contain(image, (SHOWN_SIDE, SHOWN_SIDE)) if max(image.size) > SHOWN_SIDE else image


def _short_names(addresses: Sequence[str]) -> dict[str, str]:
    """Addresses by the names that a page shows."""
    unique = list(dict.fromkeys(addresses))
    short = [Path(address).resolve().name if Path(address).is_dir() else address for address in unique]
    return {name if short.count(name) == 1 else address: address for name, address in zip(short, unique, strict=True)}
