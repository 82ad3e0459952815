"""Image processor for DenseCLIP: images and label maps in, segmentation maps out."""

from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

from .resizing_denseclip import fit_within, resize_argmax, resize_image, resize_labels, resize_max


logger = logging.get_logger(__name__)

Labels = TypeVar("Labels", np.ndarray, torch.Tensor)

# Of a resized image (1.5 GiB of float32): long and narrow ones would otherwise grow without bound.
MAX_PIXELS = 2**27
_MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}


def decode_image(
    image: ImageInput,
    do_convert_rgb: bool = True,
    input_data_format: str | ChannelDimension | None = None,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """
    An image of any kind as gray levels in 0 … 255: the one rule for training, evaluation, pipelines and prediction.

    - 8-bit PIL images as they are, whatever their mode; 16-bit ones scaled from 0 … 65535, and so those of mode `I`
    - PIL images of floats (mode `F`): from 0 … 1 if no pixel is above 1, else as they are
    - arrays and tensors by dtype: uint16 scaled from 0 … 65535, other integers in 0 … 255, floats as they are

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): Of any mode; or of shape (H, W), (H, W, C) or
            (C, H, W) with 1, 3 or 4 channels.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): Whether gray is repeated and alpha dropped.
        input_data_format (*optional*): Which axis holds the channels, where the shape leaves it open.
        device (*optional*): Where the result shall be; by default where the image is.

    Returns:
        `torch.Tensor` of shape `(C, H, W)`: uint8 (16 bit are scaled to 8), or float32 where the pixels were floats.

    Raises:
        ValueError: If the shape is not an image's, or pixels are out of range, NaN or infinite.
    """
    if isinstance(image, Image.Image):
        image = _pil_to_array(image, do_convert_rgb)
        input_data_format = ChannelDimension.LAST
    if isinstance(image, np.ndarray):
        # a copy, because torch takes neither read-only nor byte-swapped arrays
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("=")))
    pixels = _gray_levels(_channels_first(image.detach().to(device or image.device), input_data_format))
    if do_convert_rgb and len(pixels) != 3:
        pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
    return pixels


def label_map_to_tensor(segmentation_map: ImageInput) -> torch.Tensor:
    """A label map as class ids.

    Args:
        segmentation_map (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): With one channel (a palette's indices
            count), or integers of shape (H, W).

    Returns:
        `torch.Tensor` of shape `(H, W)`: int64, always a copy.

    Raises:
        ValueError: If there is more than one channel, or the values are not integers.
    """
    if isinstance(segmentation_map, Image.Image):
        read_pixels(segmentation_map)
        segmentation_map = np.asarray(segmentation_map)
    if not holds_integers(segmentation_map) or segmentation_map.ndim != 2:
        raise ValueError(
            f"A segmentation map holds integer class ids in the shape (height, width), but this one has the dtype "
            f"{segmentation_map.dtype} and the shape {tuple(segmentation_map.shape)}: turn its colors into class ids."
        )
    if isinstance(segmentation_map, torch.Tensor):
        return segmentation_map.to(torch.int64, copy=True)
    return torch.from_numpy(segmentation_map.astype(np.int64))


def holds_integers(values: np.ndarray | torch.Tensor) -> bool:
    """Whether an array or tensor has an integer dtype; booleans count."""
    if isinstance(values, torch.Tensor):
        return not (values.is_floating_point() or values.is_complex())
    return values.dtype.kind in "iub"


def reduce_labels(labels: Labels, ignore_index: int = 255) -> Labels:
    """Shift class ids by one, as ADE20K needs: 0 becomes `ignore_index`, n becomes n - 1, `ignore_index` stays.

    Args:
        labels (`np.ndarray` or `torch.Tensor` of integers, any shape): Raw class ids, which are not changed.
        ignore_index (`int`, *optional*, defaults to 255): Label of pixels without a class.

    Returns:
        A new array or tensor of the same kind and shape: int64.
    """
    if isinstance(labels, np.ndarray):
        labels = labels.astype(np.int64)
        return np.where((labels == 0) | (labels == ignore_index), ignore_index, labels - 1)
    labels = labels.long()
    return torch.where((labels == 0) | (labels == ignore_index), ignore_index, labels - 1)


def flatten_images(images: Any, ndim: int) -> list[Any]:
    """Nested lists and batches as one flat list of PIL images and of arrays with at most `ndim` axes."""
    if not isinstance(images, (list, tuple)) and (isinstance(images, Image.Image) or images.ndim <= ndim):
        return [images]
    return [image for item in images for image in flatten_images(item, ndim)]


def check_maps_fit(images: list[torch.Tensor], maps: list[torch.Tensor]) -> None:
    """Raise a `ValueError` unless there is one map of (H, W) for each image of (C, H, W)."""
    for image, label_map in zip(images, maps, strict=True):
        if image.shape[-2:] != label_map.shape:
            raise ValueError(
                f"An image is {height_by_width(image)} (height×width) but its segmentation map "
                f"{height_by_width(label_map)}: pass the map that was made for it, at its size."
            )


def height_by_width(tensor: torch.Tensor) -> str:
    """Size of a (..., H, W) tensor for a message."""
    return "×".join(str(side) for side in tensor.shape[-2:])


def read_pixels(image: Image.Image) -> None:
    """Read the pixels of a PIL image, which may have been opened only."""
    # Without its name: Pillow 12 scrambles a TIFF that lies on its side where it maps the named file into memory.
    name, image.filename = getattr(image, "filename", ""), ""  # type: ignore[attr-defined]
    try:
        image.load()
    finally:
        image.filename = name  # type: ignore[attr-defined]


def _pil_to_array(image: Image.Image, do_convert_rgb: bool) -> np.ndarray:
    """PIL image -> (H, W) or (H, W, C) array of gray levels; 16-bit ones, which PIL would clip at 255, as uint16."""
    read_pixels(image)
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":  # what some Pillow versions make of 16-bit files
        values = np.asarray(image)
        is_deep = values.min(initial=0) >= 0 and values.max(initial=0) <= 65535
        return values.astype(np.uint16) if is_deep else values
    if image.mode == "F":
        values = np.asarray(image)
        return values * np.float32(255) if values.max(initial=0) <= 1 else values
    return np.asarray(image.convert("RGB") if do_convert_rgb and image.mode != "RGB" else image)


def _channels_first(image: torch.Tensor, input_data_format: str | ChannelDimension | None) -> torch.Tensor:
    shape = tuple(image.shape)
    if image.ndim == 2:
        image, input_data_format = image[None], ChannelDimension.FIRST
    if image.ndim != 3 or not {image.shape[0], image.shape[-1]} & {1, 3, 4} or not image.numel():
        raise ValueError(
            f"An image needs pixels and an axis of 1, 3 or 4 channels, but this one has the shape {shape}."
        )
    if input_data_format is None:
        input_data_format = infer_channel_dimension_format(image, (1, 3, 4))  # type: ignore[arg-type]
    return image if input_data_format == ChannelDimension.FIRST else image.permute(2, 0, 1)


def _gray_levels(image: torch.Tensor) -> torch.Tensor:
    """Pixels of any dtype as uint8, or as float32 where they were floats."""
    if image.is_floating_point():
        if not image.isfinite().all():
            raise ValueError("The image has pixels that are NaN or infinite: replace them, or leave it out.")
        return image.float()
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    if image.dtype == torch.uint8:
        return image
    levels = image.long()
    if image.dtype == torch.uint16:
        levels = (levels + 128) // 257
    elif levels.min() < 0 or levels.max() > 255:
        raise ValueError(
            f"Pixels must lie in 0 … 255, or as uint16 in 0 … 65535, but go from {levels.min()} to {levels.max()}: "
            "scale them."
        )
    return levels.to(torch.uint8)


class DenseCLIPImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether label 0 of the segmentation maps means "other" and becomes 255, and label n becomes n - 1, as in
        ADE20K.
    do_antialias (`bool`, *optional*, defaults to `self.do_antialias`):
        Whether to smooth images that shrink, as PIL does. The published results were measured without.
    ignore_index (`int`, *optional*, defaults to `self.ignore_index`):
        Label of pixels without a class, which padding adds. It should be what the model ignores.
    """

    do_reduce_labels: bool
    do_antialias: bool
    ignore_index: int


class DenseCLIPImageProcessorBase(BaseImageProcessor):
    r"""What both backends share, all of it in PyTorch: resize, rescale, normalize, and optionally pad.

    Images may be PIL images of any mode, arrays or tensors: of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4
    channels, uint8 in 0 … 255, uint16 in 0 … 65535 (scaled to 8 bit, as 16-bit PIL images are) or floats in
    0 … 255 (pass `do_rescale=False` for 0 … 1). Gray becomes RGB, an alpha channel is dropped. EXIF orientation is
    left as it is (but for TIFF, which Pillow turns upright itself): call `PIL.ImageOps.exif_transpose` first where it
    matters (paths and URLs are loaded by transformers, which does that).

    Resized images of one batch may differ in size. Without `return_tensors` they come as a list, each as it would
    come alone, and the model takes that list. One tensor cannot hold them, and padding is not neutral (attention and
    zero-padded convolutions see it), so `return_tensors` raises unless `do_pad=True` allows it. Padding is meant for
    training and for losses, where padded labels are ignored.

    Args:
        do_resize (`bool`, *optional*, defaults to `True`): Whether to resize.
        size (`dict`, *optional*, defaults to `{"shortest_edge": 512, "longest_edge": 2048}`): Bounds that the resized
            image fills as far as its aspect ratio allows, or `{"height": …, "width": …}` for a fixed size.
        resample (`PILImageResampling`, *optional*, defaults to `BILINEAR`): Or `BICUBIC`. Label maps always take the
            nearest pixel.
        do_antialias (`bool`, *optional*, defaults to `False`): Whether to smooth images that shrink.
        do_rescale (`bool`, *optional*, defaults to `True`): Whether to multiply by `rescale_factor`.
        rescale_factor (`float`, *optional*, defaults to `1 / 255`): Factor of the rescaling.
        do_normalize (`bool`, *optional*, defaults to `True`): Whether to subtract `image_mean` and divide by
            `image_std`.
        image_mean, image_std (`list[float]`, *optional*): Per channel, default to CLIP's.
        do_pad (`bool`, *optional*, defaults to `False`): Whether to pad below and to the right, images with 0 after
            normalization, label maps with `ignore_index`.
        pad_size (`dict`, *optional*): `{"height": …, "width": …}` to pad to, by default the largest of the batch.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): Whether to turn every image into RGB.
        do_reduce_labels (`bool`, *optional*, defaults to `False`): Whether label 0 becomes `ignore_index` and n
            becomes n - 1.
        ignore_index (`int`, *optional*, defaults to 255): Label of pixels without a class.
    """

    valid_kwargs = DenseCLIPImageProcessorKwargs
    model_input_names = ["pixel_values"]
    do_resize = True
    size = {"shortest_edge": 512, "longest_edge": 2048}
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_antialias = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_pad = False
    do_convert_rgb = True
    do_reduce_labels = False
    ignore_index = 255

    def __init__(self, **kwargs: Unpack[DenseCLIPImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]

    def preprocess(  # type: ignore[override]
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[DenseCLIPImageProcessorKwargs],
    ) -> BatchFeature:
        """Turn images, and optionally their label maps, into model inputs.

        Args:
            images: An image or a (nested) list of them, or an array or tensor with a batch axis.
            segmentation_maps (*optional*): As many maps of integer class ids, each of its image's size (H, W):
                PIL images with one channel (a palette's indices count), arrays or tensors. They are not changed.
            **kwargs: Any argument of the class, for this call; and `return_tensors` (`"pt"` or `"np"`), `device`,
                `input_data_format` (`"channels_first"` or `"channels_last"`, where the shape leaves it open).

        Returns:
            `BatchFeature`: `pixel_values`, float32 of shape (B, 3, H', W'), and with `segmentation_maps` also
            `labels`, int64 of shape (B, H', W'); without `return_tensors`, lists of B tensors.

        Raises:
            ValueError: If an image is empty, not finite or out of range, if images and maps do not match, if an
                option is not supported, or if resized images of different sizes are to form one tensor.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        *,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        do_center_crop: bool | None = None,
        do_pad: bool | None = None,
        pad_size: SizeDict | None = None,
        ignore_index: int,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        if do_center_crop:
            raise ValueError("do_center_crop is not supported: cropping would cut label maps and predictions too.")
        decoded = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device
        )
        data = {"pixel_values": [self._to_pixel_values(image, **kwargs) for image in decoded]}
        if segmentation_maps is not None:
            maps = [
                label_map_to_tensor(m) for m in self._prepare_images_structure(segmentation_maps, expected_ndims=2)
            ]
            check_maps_fit(decoded, maps)
            data["labels"] = [
                self._to_labels(label_map, pixels, ignore_index=ignore_index, **kwargs)
                for label_map, pixels in zip(maps, data["pixel_values"], strict=True)
            ]
        if do_pad:
            data = _pad(data, pad_size, ignore_index)
        if return_tensors is None:
            return BatchFeature(data)
        _check_one_size(data["pixel_values"])
        stacked = {name: torch.stack(tensors) for name, tensors in data.items()}
        return BatchFeature(
            stacked if return_tensors == "pt" else {name: tensor.cpu().numpy() for name, tensor in stacked.items()},
            tensor_type=return_tensors,
        )

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        return flatten_images(self.fetch_images(images), expected_ndims)

    def process_image(  # type: ignore[override]
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """One image of any kind as a tensor of shape (C, H, W), uint8 or float32, in 0 … 255."""
        return decode_image(image, bool(do_convert_rgb), input_data_format, device)

    def _to_pixel_values(
        self,
        image: torch.Tensor,
        *,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_antialias: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        **kwargs,
    ) -> torch.Tensor:
        """(C, H, W) gray levels → (C, H', W') model input."""
        if do_resize:
            resample = PILImageResampling.BILINEAR if resample is None else resample
            image = resize_image(image, _output_size(image, size), _MODES[PILImageResampling(resample)], do_antialias)
        if do_rescale:
            if image.is_floating_point() and 0 < image.max() <= 1:
                logger.warning_once("An image seems to be scaled to 0 … 1 already: pass do_rescale=False for it.")
            image = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format).mul_(rescale_factor)
        if do_normalize:
            mean, std = (torch.tensor(x, device=image.device).view(-1, 1, 1) for x in (image_mean, image_std))
            # what rescaling made is ours to change
            image = (image.sub_(mean) if do_rescale else image.float() - mean).div_(std)
        return image

    def _to_labels(
        self,
        labels: torch.Tensor,
        pixel_values: torch.Tensor,
        *,
        do_resize: bool,
        do_reduce_labels: bool,
        ignore_index: int,
        **kwargs,
    ) -> torch.Tensor:
        """(H, W) class ids → (H', W') int64 labels of the resized image."""
        if do_resize:
            labels = resize_labels(labels, (pixel_values.shape[-2], pixel_values.shape[-1]))
        if do_reduce_labels:
            labels = reduce_labels(labels, ignore_index)
        return labels

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
        threshold: float = 0.0,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Turn the model's output into segmentation maps of the size of the original images.

        Without scores, memory stays bounded however large the images are, see [`resize_argmax`]. All K scores of a
        pixel, which is what transformers means by them, are for small results; [`resize_max`] of
        `denseclip_hf.model.resizing_denseclip` gives each pixel's highest score and its probability at any size.

        Args:
            outputs: Model output with `logits` of shape (B, K, h, w), or a list of B tensors (K, h, w).
            target_sizes (`list[tuple[int, int]]` or `torch.Tensor` of shape `(B, 2)`, *optional*): Height and width of
                each original image; by default the maps have the size of the logits.
            return_segmentation_scores (`bool`, *optional*, defaults to `False`): Whether to return the resized logits
                too, K floats for each pixel.
            threshold (`float`, *optional*, defaults to 0): Pixels whose class has a lower probability (of the softmax)
                get -1, no class.

        Returns:
            `list[torch.Tensor]` of length B: int64 class ids of shape (H, W); with scores, B outputs with
            `segmentation` (the same) and `segmentation_scores`, float32 of shape (K, H, W).

        Raises:
            ValueError: If a logit is NaN or infinite, which no class means.
        """
        logits = outputs.logits
        sizes = [image.shape[-2:] for image in logits] if target_sizes is None else target_sizes
        # a tensor of sizes yields tensors
        sizes = [(int(height), int(width)) for height, width in sizes]
        maps = []
        for image, size in zip(logits, sizes, strict=True):
            if threshold:
                _, ids, certainty = resize_max(image[None], size)
                maps.append(ids.masked_fill(certainty < threshold, -1)[0])
            else:
                maps.append(resize_argmax(image[None], size)[0])
        if not return_segmentation_scores:
            return maps
        results = []
        for image, ids in zip(logits, maps, strict=True):
            scores = F.interpolate(image[None].float(), size=ids.shape, mode="bilinear", align_corners=False)[0]
            data = {"segmentation": ids, "segmentation_scores": scores}
            results.append(SemanticSegmentationPostProcessorOutput(data=data))
        return results


class DenseCLIPImageProcessorPil(DenseCLIPImageProcessorBase, PilBackend):  # type: ignore[misc]
    __doc__ = DenseCLIPImageProcessorBase.__doc__


def _output_size(image: torch.Tensor, size: SizeDict) -> tuple[int, int]:
    if size.height and size.width:
        height, width = size.height, size.width
    else:
        height, width = fit_within(image.shape[-2], image.shape[-1], size.shortest_edge, size.longest_edge)
    if height * width > MAX_PIXELS:
        raise ValueError(f"The resized image would have {height}×{width} pixels, above {MAX_PIXELS}: lower size.")
    return height, width


def _check_one_size(images: list[torch.Tensor]) -> None:
    sizes = sorted({height_by_width(image) for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"The resized images have different sizes ({', '.join(sizes)}) and do not fit one tensor: pass them one "
            "at a time or with size={'height': …, 'width': …}, or pass do_pad=True if the padding may change results."
        )


def _pad(
    data: dict[str, list[torch.Tensor]], pad_size: SizeDict | None, ignore_index: int
) -> dict[str, list[torch.Tensor]]:
    """Every tensor padded below and to the right to `pad_size`, by default to the largest of the batch."""
    largest = [max(image.shape[axis] for image in data["pixel_values"]) for axis in (-2, -1)]
    height, width = largest if pad_size is None else (pad_size.height, pad_size.width)
    if not height or not width or largest[0] > height or largest[1] > width:
        raise ValueError(
            f"pad_size must have a height and a width of at least {largest[0]}×{largest[1]}, the largest resized "
            f"image, got {dict(pad_size) if pad_size is not None else {}}."
        )
    return {
        name: [
            F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=ignore_index if name == "labels" else 0)
            for x in tensors
        ]
        for name, tensors in data.items()
    }
