"""Inference beyond one forward pass: sliding windows, multi-scale with flips, pictures of the result.

Shapes: B images, K classes, H x W pixels.
"""

import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from ..data import name_of
from ..devices import DTYPES
from ..model.image_processing_denseclip import DenseCLIPImageProcessorPil, decode_image, flatten_images
from ..model.layers_denseclip import resize_bilinear
from ..model.loading_denseclip import load_pretrained
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation, eval_mode
from ..model.modeling_denseclip import sliding_window_logits as average_windows
from ..model.resizing_denseclip import resize_argmax


# Ratios of the published multi-scale results (section 4.1's protocol, mmsegmentation's `MultiScaleFlipAug`).
PUBLISHED_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
VOID_COLOR = (0, 0, 0)
# What `load_model` takes: a precision, or that of the file.
LOADING_DTYPES = {"auto": "auto", **DTYPES}
# Probabilities kept for one picture (2 GiB of float32), and those computed at a time (16 MiB).
MAX_PROBABILITIES = 2**29

logger = logging.getLogger(__name__)


def load_model(name: str, dtype: str = "auto"):
    """
    A model of any size and its image processor, by directory or Hub name.

    Args:
        name (`str`): directory or Hub name.
        dtype (`str`): a key of `LOADING_DTYPES`; `auto` is what the weights were saved in.

    Raises:
        OSError, ValueError: with one sentence, if there is none, or its files are broken.
    """
    model = load_pretrained(DenseCLIPForSemanticSegmentation, name, dtype=LOADING_DTYPES[dtype])
    return model, load_pretrained(AutoImageProcessor, name)


def sliding_window_logits(
    model,
    pixel_values: torch.Tensor,
    crop_size: int | Sequence[int],
    stride: int | Sequence[int],
    batch_size: int | None = None,
) -> torch.Tensor:
    """
    Logits of `model` in eval mode, averaged over overlapping windows.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): in any mode, which it keeps; whatever its `inference_mode`.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised images.
        crop_size, stride (`int` or (height, width)): window and step in pixels.
        batch_size (`int`, *optional*): windows that go through the model at a time; by default 4, on a CPU one.

    Returns:
        `torch.Tensor` of shape `(B, K, H, W)`, float32.
    """
    window, step = ([int(side) for side in (v if isinstance(v, Sequence) else [v, v])] for v in (crop_size, stride))
    with eval_mode(model), torch.no_grad():
        return average_windows(model.window_logits, pixel_values, window, step, batch_size)


def multi_scale_probabilities(
    model,
    images,
    scales: Sequence[float] = PUBLISHED_SCALES,
    flip: bool = True,
    *,
    image_processor=None,
) -> list[torch.Tensor]:
    """
    Class probabilities averaged over scaled (and flipped) views, at each image's own size.

    Each view goes through `model` as its `inference_mode` says; its logits are resized to the image, softmaxed and
    flipped back, as the published multi-scale results were made.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): put into eval mode for it, and back.
        images: a picture or a list of them, of any kind and size the image processor takes; a batch counts as a list.
        scales (`Sequence[float]`): factors on the processor's `size`.
        flip (`bool`): also use each view mirrored left to right.
        image_processor ([`DenseCLIPImageProcessor`], *optional*): with a `shortest_edge` or a fixed `size`; by default
            the published preprocessing, see [`published_image_processor`].

    Returns:
        `list[torch.Tensor]`: one `(K, H, W)` float32 tensor per image, on the model's device; sums to 1 over K.

    Raises:
        ValueError: if `scales` is empty, or the image processor has no size that can be scaled.
    """
    pictures = [decode_image(image) for image in flatten_images(images, 3)]
    return [
        _averaged_probabilities(model, picture, picture.shape[-2:], scales, flip, image_processor)
        for picture in pictures
    ]


def multi_scale_segmentation(
    model,
    image,
    scales: Sequence[float] = PUBLISHED_SCALES,
    flip: bool = True,
    *,
    image_processor=None,
    max_probabilities: int = MAX_PROBABILITIES,
) -> torch.Tensor:
    """
    Class ids `(H, W)` of highest averaged probability, see [`multi_scale_probabilities`], in bounded memory.

    Args:
        model, image, scales, flip, image_processor: as there, with one picture.
        max_probabilities (`int`): most numbers K * height * width that are kept. A picture that needs more (with 150
            classes and the default, one above 3.5 megapixels) is averaged at a smaller size and resized from there.

    Returns:
        `torch.Tensor` of shape `(H, W)`: int64, on the model's device.

    Raises:
        ValueError: if a probability is no number.
    """
    picture = decode_image(image)
    height, width = picture.shape[-2:]
    shrink = math.sqrt(min(1.0, max_probabilities / (model.config.num_labels * height * width)))
    if shrink < 1:
        logger.info("A picture of %d x %d pixels is averaged at %.2f of its size.", width, height, shrink)
    size = (max(1, int(height * shrink)), max(1, int(width * shrink)))
    probabilities = _averaged_probabilities(model, picture, size, scales, flip, image_processor)
    return resize_argmax(probabilities[None], (height, width), name_of(image))[0]


@torch.no_grad()
def _averaged_probabilities(
    model, picture: torch.Tensor, size: Sequence[int], scales: Sequence[float], flip: bool, image_processor
) -> torch.Tensor:
    """`(K, *size)` probabilities, averaged over the views of one picture `(3, H, W)`."""
    if not scales:
        raise ValueError("`scales` is empty: give at least one factor.")
    height, width = size
    total = torch.zeros(model.config.num_labels, height, width, device=model.device)
    count = 0
    image_processor = image_processor or published_image_processor(model.config)
    for pixel_values, flipped in scaled_views(picture, image_processor, scales, flip):
        with eval_mode(model):
            logits = model(pixel_values.to(model.device, model.dtype)).logits.float()
        # By way of the view's own size, as the original goes; a sliding window is there already.
        logits = resize_bilinear(logits, (pixel_values.shape[-2], pixel_values.shape[-1]))[0]
        probabilities = resize_bilinear(logits[None], size)[0].softmax(0)
        total += probabilities.flip(-1) if flipped else probabilities
        count += 1
    return total.div_(count)


def published_image_processor(config, **options) -> DenseCLIPImageProcessorPil:
    """Preprocessing of the published results: short side as the window's (512 or 640), long side at most 2048."""
    size = {"shortest_edge": min(config.crop_size), "longest_edge": 2048}
    return DenseCLIPImageProcessorPil(size=size, **options)


def scaled_views(image, image_processor, scales: Sequence[float], flip: bool) -> Iterator[tuple[torch.Tensor, bool]]:
    """`(pixel_values (1, 3, h, w), whether mirrored)` for every scale, plain first."""
    size = {key: value for key, value in dict(image_processor.size).items() if value is not None}
    for scale in scales:
        scaled = {key: int(value * scale) for key, value in size.items()}
        pixel_values = image_processor(image, size=scaled, return_tensors="pt")["pixel_values"]
        yield pixel_values, False
        if flip:
            yield pixel_values.flip(-1), True


def colorize(segmentation, palette: Sequence[Sequence[int]]) -> Image.Image:
    """A picture of class ids `(H, W)` in their `palette` colours; ids without a colour are black."""
    table = np.array([*palette, VOID_COLOR], dtype=np.uint8)
    ids = np.asarray(segmentation)
    return Image.fromarray(table[np.where((ids < 0) | (ids >= len(palette)), len(palette), ids)])


def overlay(image: Image.Image, segmentation, palette: Sequence[Sequence[int]], opacity: float = 0.6) -> Image.Image:
    """`image` with the classes of `segmentation` (`(H, W)` ids of the same size) painted over it."""
    return Image.blend(image.convert("RGB"), colorize(segmentation, palette), opacity)


def comparison_picture(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    id2label: dict[int, str],
    palette: Sequence[Sequence[int]],
    width: int = 320,
) -> Image.Image:
    """
    Pictures in a table with column titles, and a legend of class colours below.

    Args:
        rows (sequence of rows of pictures): each row as long as `titles`.
        titles (`Sequence[str]`): one per column.
        id2label (`dict[int, str]`): class names.
        palette: K colours `(r, g, b)`.
        width (`int`): of each picture, in pixels; heights follow.
    """
    font, margin, line = ImageFont.load_default(size=max(width // 20, 11)), 8, max(width // 14, 16)
    nearest = Image.Resampling.NEAREST
    scaled = [[p.resize((width, round(p.height * width / p.width)), nearest) for p in row] for row in rows]
    legend_column = width // 2
    per_line = max(width * len(titles) // legend_column, 1)
    legend_height = line * -(-len(id2label) // per_line)
    heights = [max(picture.height for picture in row) for row in scaled]
    total_height = 2 * margin + line + legend_height + sum(height + margin for height in heights)
    sheet = Image.new("RGB", (margin + len(titles) * (width + margin), total_height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((margin + column * (width + margin), margin // 2), title, "black", font)
    top = margin + line
    for row, height in zip(scaled, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (margin + column * (width + margin), top))
        top += height + margin
    for index, label in id2label.items():
        x, y = margin + index % per_line * legend_column, top + index // per_line * line
        draw.rectangle((x, y + 2, x + line - 6, y + line - 4), tuple(palette[index]), "black")
        draw.text((x + line, y), label, "black", font)
    return sheet


__all__ = [
    "LOADING_DTYPES",
    "colorize",
    "comparison_picture",
    "load_model",
    "multi_scale_probabilities",
    "multi_scale_segmentation",
    "overlay",
    "sliding_window_logits",
]
