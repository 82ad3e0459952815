"""
Inference beyond one forward pass: sliding windows, images at their own resolution, multi-scale views with flips.

Shapes: B images, K classes, H x W pixels.
"""

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import cached_file

from ..data import name_of
from ..devices import DTYPES, LOADING_DTYPES, dtype_of
from ..model.image_processing_denseclip import DenseCLIPImageProcessorPil, decode_image, flatten_images
from ..model.layers_denseclip import resize_bilinear
from ..model.loading_denseclip import ConfigDict, load_clip, load_pretrained
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation, DenseCLIPModel, eval_mode, window_starts
from ..model.modeling_denseclip import sliding_window_logits as average_windows
from ..model.resizing_denseclip import check_finite, resize_argmax
from ..model.towers_denseclip import TOWERS, check_normalization
from ..words import as_word_model, word_image_processor


# Ratios of the published multi-scale results (section 4.1's protocol, mmsegmentation's `MultiScaleFlipAug`).
PUBLISHED_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# What `load_model` takes: a precision, or that of the file.
# Probabilities kept for one image (2 GiB of float32).
MAX_PROBABILITIES = 2**29
# Scores that [`segment_in_windows`] keeps (512 MiB of float32).
MAX_SCORES = 2**27
# Items of sizes that fill no batch wait, but never more than this many batches' worth.
WAITING_BATCHES = 4

Item = TypeVar("Item")
logger = logging.getLogger(__name__)


def load_model(name: str, dtype: str = "auto") -> tuple[Any, Any]:  # a model's `to` is not typed
    """
    A model of any kind and its image processor, by directory or Hub name: a segmenter, or for words alone a
    [`DenseCLIPModel`] or an image-text model such as CLIP.

    Args:
        name (`str`): directory or Hub name.
        dtype (`str`): a key of `LOADING_DTYPES`; `auto` is what the weights were saved in, of a CLIP float32.

    Raises:
        OSError, ValueError: with one sentence, if there is none, its files are broken, or its image processor is
            another family's.
    """
    config = load_pretrained(ConfigDict, name)
    if config.get("model_type") in TOWERS:
        clip, _ = load_clip(name, tokenizer=False)
        model: Any = as_word_model(clip)
        return model.to(dtype_of(dtype)) if dtype in DTYPES else model, word_image_processor(model)
    is_for_words = config.get("architectures") == [DenseCLIPModel.__name__]
    kind = DenseCLIPModel if is_for_words else DenseCLIPForSemanticSegmentation
    model = load_pretrained(kind, name, dtype=LOADING_DTYPES[dtype])
    if is_for_words and not cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False):
        return model, word_image_processor(model)
    image_processor = load_pretrained(AutoImageProcessor, name)
    check_normalization(image_processor, model.config)
    return model, image_processor


def batches_of_one_size(
    items: Iterable[Item], batch_size: int, size_of: Callable[[Item], Hashable]
) -> Iterator[list[Item]]:
    """Lists of at most `batch_size` items of one size, as soon as one is full or too many items wait."""
    waiting: dict[Hashable, list[Item]] = {}
    for item in items:
        size = size_of(item)
        waiting.setdefault(size, []).append(item)
        if len(waiting[size]) < batch_size and sum(map(len, waiting.values())) >= WAITING_BATCHES * batch_size:
            size = max(waiting, key=lambda key: len(waiting[key]))
        elif len(waiting[size]) < batch_size:
            continue
        yield waiting.pop(size)
    yield from waiting.values()


def sliding_window_logits(
    model: DenseCLIPForSemanticSegmentation,
    pixel_values: torch.Tensor,
    crop_size: int | Sequence[int],
    stride: int | Sequence[int],
    batch_size: int | None = None,
) -> torch.Tensor:
    """
    Logits of `model` in eval mode, averaged over overlapping windows.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): in any mode, which it keeps; whatever its `inference_mode`.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalized images.
        crop_size, stride (`int` or (height, width)): window and step in pixels.
        batch_size (`int`, *optional*): windows that go through the model at a time; by default 4, on a CPU one.

    Returns:
        `torch.Tensor` of shape `(B, K, H, W)`, float32.
    """
    window, step = ([int(side) for side in (v if isinstance(v, Sequence) else [v, v])] for v in (crop_size, stride))
    with eval_mode(model), torch.no_grad():
        return average_windows(model.window_logits, pixel_values, window, step, batch_size)


@torch.no_grad()
def segment_in_windows(
    model: DenseCLIPModel,
    image,
    image_processor,
    *,
    score: Callable[[torch.Tensor], torch.Tensor] | None = None,
    num_scores: int | None = None,
    scale: float = 1.0,
    max_scores: int = MAX_SCORES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    An image segmented at its own resolution, in memory that grows with its pixels but not with their classes.

    Windows of the config's `crop_size` and `stride` are averaged as [`sliding_window_logits`] does. The image is
    neither shrunk nor preprocessed whole: each window is, when its turn comes.

    Args:
        model ([`DenseCLIPForSemanticSegmentation`]): put into eval mode for it, and back; with `score` also a
            [`DenseCLIPModel`].
        image: of any kind the image processor takes.
        image_processor ([`DenseCLIPImageProcessor`]): whose normalization is used.
        score (`Callable`, *optional*): maps windows `(B, 3, h, w)` to scores `(B, K, h', w')`; logits by default.
        num_scores (`int`, *optional*): K of `score`.
        scale (`float`): what scores are multiplied by for the softmax that gives probabilities.
        max_scores (`int`): most numbers that are averaged at a time; a wider image is done in bands of columns.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: class ids `(H, W)`, int32, and the probability of each pixel's class
        `(H, W)`, float16; both on the CPU.

    Raises:
        ValueError: for scores that are NaN or infinite.
    """
    predict = score or cast(DenseCLIPForSemanticSegmentation, model).window_logits
    pixels = decode_image(image)
    height, width = pixels.shape[-2:]
    crop_size, stride = model.config.window
    h, w = (min(side, window) for side, window in zip((height, width), crop_size, strict=True))
    tops, lefts = (window_starts(*sides) for sides in zip((height, width), (h, w), stride, strict=True))
    ids, certainty = torch.empty(height, width, dtype=torch.int32), torch.empty(height, width, dtype=torch.float16)

    together = model.config.sliding_window_batch_size or (1 if model.device.type == "cpu" else 4)

    def scores_of(top: int, columns: Sequence[int]) -> Iterator[torch.Tensor]:
        for first in range(0, len(columns), together):
            windows = [pixels[:, top : top + h, left : left + w] for left in columns[first : first + together]]
            pixel_values = image_processor(
                windows, do_resize=False, input_data_format="channels_first", return_tensors="pt"
            )["pixel_values"]
            scores = predict(pixel_values.to(model.device, model.dtype))
            check_finite(scores, name_of(image))
            yield from resize_bilinear(scores.float(), (h, w))

    with eval_mode(model):
        channels = num_scores or len(model.config.id2label)
        band = max(w, max_scores // (channels * h))
        for start in range(0, width, band):
            end = min(start + band, width)
            columns = [left for left in lefts if left < end and left + w > start]
            total = torch.zeros(channels, h, columns[-1] + w - columns[0], device=model.device)
            count = torch.zeros(h, total.shape[-1], device=model.device)
            shown = slice(start - columns[0], end - columns[0])
            for top, following in zip(tops, [*tops[1:], height], strict=True):
                for left, scores in zip(columns, scores_of(top, columns), strict=True):
                    covered = slice(left - columns[0], left - columns[0] + w)
                    total[:, :, covered] += scores
                    count[:, covered] += 1
                done = following - top  # rows that no window further down covers
                part = total[:, :done, shown] / count[:done, shown]
                ids[top:following, start:end] = part.argmax(0)
                certainty[top:following, start:end] = (part * scale).softmax(0).amax(0)
                total, count = (
                    torch.cat([x[..., done:, :], torch.zeros_like(x[..., :done, :])], -2) for x in (total, count)
                )
    return ids, certainty


def is_native(model: DenseCLIPModel, image_processor) -> bool:
    """Whether a model and its image processor take images in windows and at their own resolution."""
    return model.config.inference_mode == "slide" and not image_processor.do_resize


def multi_scale_probabilities(
    model: DenseCLIPForSemanticSegmentation,
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
        images: an image or a list of them, of any kind and size the image processor takes; a batch counts as a list.
        scales (`Sequence[float]`): factors on the processor's `size`, or on the image's where it does not resize.
        flip (`bool`): also use each view mirrored left to right.
        image_processor ([`DenseCLIPImageProcessor`], *optional*): with a `shortest_edge` or a fixed `size`; by default
            the published preprocessing, see [`published_image_processor`].

    Returns:
        `list[torch.Tensor]`: one `(K, H, W)` float32 tensor per image, on the model's device; sums to 1 over K.

    Raises:
        ValueError: if `scales` is empty, or one of them not above 0.
    """
    decoded = [decode_image(image) for image in flatten_images(images, 3)]
    return [
        _averaged_probabilities(model, pixels, pixels.shape[-2:], scales, flip, image_processor) for pixels in decoded
    ]


def multi_scale_segmentation(
    model: DenseCLIPForSemanticSegmentation,
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
        model, image, scales, flip, image_processor: as there, with one image.
        max_probabilities (`int`): most numbers K * height * width that are kept. An image that needs more (with 150
            classes and the default, one above 3.5 megapixels) is averaged at a smaller size and resized from there.

    Returns:
        `torch.Tensor` of shape `(H, W)`: int64, on the model's device.

    Raises:
        ValueError: as there, and if a probability is no number.
    """
    pixels = decode_image(image)
    height, width = pixels.shape[-2:]
    shrink = math.sqrt(min(1.0, max_probabilities / (len(model.config.id2label) * height * width)))
    if shrink < 1:
        logger.info("An image of %d x %d pixels is averaged at %.2f of its size.", width, height, shrink)
    size = (max(1, int(height * shrink)), max(1, int(width * shrink)))
    probabilities = _averaged_probabilities(model, pixels, size, scales, flip, image_processor)
    return resize_argmax(probabilities[None], (height, width), name_of(image))[0]


@torch.no_grad()
def _averaged_probabilities(
    model, pixels: torch.Tensor, size: Sequence[int], scales: Sequence[float], flip: bool, image_processor
) -> torch.Tensor:
    """`(K, *size)` probabilities, averaged over the views of one image `(3, H, W)`."""
    if not scales or min(scales) <= 0:
        raise ValueError(f"`scales` must be factors above 0, at least one, got {list(scales)}.")
    total = torch.zeros(model.config.num_labels, *size, device=model.device)
    count = 0
    image_processor = image_processor or published_image_processor(model.config)
    for pixel_values, flipped in scaled_views(pixels, image_processor, scales, flip):
        with eval_mode(model):
            logits = model(pixel_values.to(model.device, model.dtype)).logits.float()
        # First to the view's own size, as the original does; a sliding window's logits have it already.
        logits = resize_bilinear(logits, (pixel_values.shape[-2], pixel_values.shape[-1]))[0]
        probabilities = resize_bilinear(logits[None], (size[0], size[1]))[0].softmax(0)
        total += probabilities.flip(-1) if flipped else probabilities
        count += 1
    return total.div_(count)


def published_image_processor(config, **options) -> DenseCLIPImageProcessorPil:
    """Preprocessing of the published results: short side as the window's (512 or 640), long side at most 2048."""
    size = {"shortest_edge": min(config.crop_size), "longest_edge": 2048}
    return DenseCLIPImageProcessorPil(size=size, **options)


def scaled_views(
    image: torch.Tensor, image_processor, scales: Sequence[float], flip: bool
) -> Iterator[tuple[torch.Tensor, bool]]:
    """
    `(pixel_values (1, 3, h, w), whether mirrored)` for every scale of an image `(3, H, W)`, plain first.

    Scales are factors on the processor's `size`, or where it does not resize, on the image's own.
    """
    size = {key: value for key, value in dict(image_processor.size).items() if value is not None}
    if not image_processor.do_resize:
        size = dict(zip(("height", "width"), image.shape[-2:], strict=True))
    for scale in scales:
        scaled = {key: max(1, int(value * scale)) for key, value in size.items()}
        pixel_values = image_processor(image, size=scaled, do_resize=True, return_tensors="pt")["pixel_values"]
        yield pixel_values, False
        if flip:
            yield pixel_values.flip(-1), True
