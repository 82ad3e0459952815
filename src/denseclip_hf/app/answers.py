"""What the page of `app.py` asks for: a picture and words in; masks, overlays and heat maps out.

Nothing here knows of Gradio. Shapes: K classes, H x W pixels.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import AutoTokenizer

from ..data import file_stem
from ..devices import device_of
from ..inference.drawing import heat_map, indexed_picture, overlay_with_legend
from ..inference.segmenter import Segmenter
from ..inference.sources import Source, read_picture
from ..inference.views import load_model
from ..model.class_names_denseclip import class_phrasings
from ..model.loading_denseclip import load_pretrained
from ..model.modeling_denseclip import ZERO_SHOT_TEMPLATES
from ..model.resizing_denseclip import check_finite


# What one visitor may ask for at a time.
MAX_WORDS = 200
MAX_HEAT_MAPS = 12
# Longer side of the pictures on the page; what is downloaded has the size of the upload.
SHOWN_SIDE = 1024


class AppModels:
    """
    The models of a page, each loaded when it is first asked for and then kept.

    Args:
        addresses (`Sequence[str]`): directories, or names on the Hub.
        device (`str`): where they run, see [`device_of`].
        dtype (`str`): a key of `LOADING_DTYPES`; `auto` is what the weights were saved in.

    Raises:
        ValueError: if there is none, or no such device.
    """

    def __init__(self, addresses: Sequence[str], device: str = "auto", dtype: str = "auto"):
        if not addresses:
            raise ValueError("name at least one model: a directory, or a name on the Hub.")
        self.addresses = _short_names(addresses)
        self.device = device_of(device)
        self.dtype = dtype
        self._loaded: dict[str, tuple[Any, Any, Any]] = {}

    @property
    def names(self) -> list[str]:
        """What the models are called: a directory by its last part, where that tells them apart."""
        return list(self.addresses)

    @property
    def directories(self) -> list[Path]:
        """The models that lie in directories."""
        return [Path(address).resolve() for address in self.addresses.values() if Path(address).is_dir()]

    def load(self, name: str) -> tuple[Any, Any, Any]:
        """Model, image processor, and tokenizer or `None`.

        Raises:
            ValueError, OSError: with one sentence, for a name that is none of `names`, or a model that is not there.
        """
        if name not in self.addresses:
            raise ValueError(f"there is no model {name!r} here.")
        if name not in self._loaded:
            model, image_processor = load_model(self.addresses[name], self.dtype)
            try:
                tokenizer = load_pretrained(AutoTokenizer, self.addresses[name])
            except (OSError, ValueError):  # its own classes can be segmented all the same
                tokenizer = None
            self._loaded[name] = model.to(self.device).eval(), image_processor, tokenizer
        return self._loaded[name]

    def classes(self, name: str) -> list[str]:
        """The K names of a model's own classes."""
        config = self.load(name)[0].config
        return [config.id2label[i] for i in range(config.num_labels)]

    def segmenter(self, name: str, words: Sequence[str] = (), score_maps: Sequence[str] = (), sentences: bool = False):
        """A [`Segmenter`] for `words` (the model's own classes if empty); `sentences` puts words into CLIP's."""
        model, image_processor, tokenizer = self.load(name)
        templates = ZERO_SHOT_TEMPLATES if sentences else None
        return Segmenter(model, image_processor, tokenizer, words, score_maps, templates)


@dataclass
class Answer:
    """A segmented picture: RGB `image`, class ids `segmentation` `(H, W)`, K `names` and colours `palette`."""

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
    The picture in a file, upright and RGB; messages call the file by its name only.

    Raises:
        ValueError: with one sentence, for no file, what is no picture, or one of too many pixels.
    """
    if not file or not Path(file).is_file():  # an address is not fetched
        raise ValueError("choose a picture first.")
    try:
        return read_picture(Source(str(file), Path(file).name))
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace(str(file), Path(file).name)) from error


def segment(models: AppModels, image: Image.Image, name: str, words=(), sentences: bool = False) -> Answer:
    """`image` segmented by the model `name` into its own classes, or from its score maps into `words`."""
    segmenter = models.segmenter(name, words, sentences=sentences)
    maps, _ = segmenter(segmenter.preprocess(image)[None], [(image.height, image.width)])
    return Answer(image, maps[0].cpu().numpy(), segmenter.names, [list(color) for color in segmenter.palette])


def heat_maps(
    models: AppModels, image: Image.Image, name: str, chosen: Sequence[str], words=(), sentences: bool = False
) -> list[tuple[Image.Image, str]]:
    """
    A heat map and its caption (word, lowest and highest cosine) for each of the `chosen` words.

    The colours have one scale for all; the longer side is at most 1024 pixels.

    Raises:
        ValueError: for no word or too many, and as [`Segmenter`] does.
    """
    if not 0 < len(chosen) <= MAX_HEAT_MAPS:
        raise ValueError(f"choose from 1 to {MAX_HEAT_MAPS} classes or words for heat maps.")
    segmenter = models.segmenter(name, words, [word.strip() for word in chosen], sentences)
    pixel_values = segmenter.preprocess(image)[None]
    scores = segmenter.model.score(pixel_values, segmenter.score_embeds)[0, segmenter.score_rows]
    check_finite(scores)
    lowest, highest, small = scores.min().item(), scores.max().item(), _shrunk(image)
    return [
        (heat_map(small, score, lowest, highest), f"{word} {score.min():.2f} to {score.max():.2f}")
        for word, score in zip(segmenter.score_names, scores, strict=True)
    ]


def shown(answer: Answer) -> dict[str, Any]:
    """What `overlay.js` draws: data addresses of picture and mask (ids in red + 256 green), names and colours."""
    picture = _shrunk(answer.image)
    ids = Image.fromarray(answer.segmentation.astype(np.int32)).resize(picture.size, Image.Resampling.NEAREST)
    low, high = np.divmod(np.asarray(ids), 256)[::-1]
    mask = Image.fromarray(np.stack([low, high, np.zeros_like(low)], -1).astype(np.uint8))
    return {
        "picture": _data_address(picture, "jpeg", quality=90),
        "mask": _data_address(mask, "png"),
        "names": answer.names,
        "palette": answer.palette,
    }


def save_mask(answer: Answer, folder: Path, name: str) -> Path:
    """Write `NAME_mask.png`, whose pixels are class ids; `name` is the picture's file's."""
    return _save(indexed_picture(answer.segmentation, answer.palette), folder, name, "mask")


def save_overlay(answer: Answer, folder: Path, name: str, opacity: float) -> Path:
    """Write `NAME_overlay.png`: the classes over the picture, and a legend below; `opacity` from 0 to 1."""
    names, opacity = dict(enumerate(answer.names)), min(max(opacity, 0.0), 1.0)
    painted = overlay_with_legend(answer.image, answer.segmentation, names, answer.palette, opacity)
    return _save(painted, folder, name, "overlay")


def _save(picture: Image.Image, folder: Path, name: str, kind: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{file_stem(name) or 'picture'}_{kind}.png"
    picture.save(file)
    return file


def _shrunk(image: Image.Image) -> Image.Image:
    return ImageOps.contain(image, (SHOWN_SIDE, SHOWN_SIDE)) if max(image.size) > SHOWN_SIDE else image


def _data_address(picture: Image.Image, kind: str, **options: Any) -> str:
    stream = BytesIO()
    picture.save(stream, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _short_names(addresses: Sequence[str]) -> dict[str, str]:
    """Addresses by what a page calls them."""
    unique = list(dict.fromkeys(addresses))
    short = [Path(address).resolve().name if Path(address).is_dir() else address for address in unique]
    return {name if short.count(name) == 1 else address: address for name, address in zip(short, unique, strict=True)}


__all__ = [
    "Answer",
    "AppModels",
    "heat_maps",
    "read_upload",
    "read_words",
    "save_mask",
    "save_overlay",
    "segment",
    "shown",
]
