"""Image processor for DenseCLIP: pictures and label maps in, segmentation maps out."""

from typing import Any

import torch
import torch.nn.functional as F
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
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

from .image_inputs_denseclip import (
    check_maps_fit,
    flatten_images,
    height_by_width,
    label_map_to_tensor,
    picture_to_tensor,
    reduce_labels,
)
from .mixed_sizes_denseclip import LonePicture
from .resizing_denseclip import check_finite, fit_within, resize_argmax, resize_image, resize_labels


logger = logging.get_logger(__name__)

LABEL_PADDING = 255
# Of a resized picture (1.5 GiB of float32): long and narrow ones would otherwise grow without bound.
MAX_PIXELS = 2**27
# Scores that post-processing returns at a time (2 GiB of float32).
MAX_SCORES = 2**29
_MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}


class DenseCLIPImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    do_reduce_labels (`bool`, *optional*, defaults to `self.do_reduce_labels`):
        Whether label 0 of the segmentation maps means "other" and becomes 255, and label n becomes n - 1, as in
        ADE20K.
    do_antialias (`bool`, *optional*, defaults to `self.do_antialias`):
        Whether to smooth pictures that shrink, as PIL does. The published results were measured without.
    """

    do_reduce_labels: bool
    do_antialias: bool


class DenseCLIPImageProcessorBase(BaseImageProcessor):
    r"""What both backends share, all of it in PyTorch: resize, rescale, normalise, and optionally pad.

    Pictures may be PIL images of any mode, arrays or tensors: of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4
    channels, uint8 in 0 … 255, uint16 in 0 … 65535 (scaled to 8 bit, as 16-bit PIL images are) or floats in
    0 … 255 (pass `do_rescale=False` for 0 … 1). Grey becomes RGB, an alpha channel is dropped. EXIF orientation is
    left as it is (but for TIFF, which Pillow turns upright itself): call `PIL.ImageOps.exif_transpose` first where it
    matters (paths and URLs are loaded by transformers, which does that).

    Resized pictures of one batch may differ in size. Without `return_tensors` they come as a list, each as it would
    come alone, and the model takes that list. One tensor cannot hold them, and padding is not neutral (attention and
    zero-padded convolutions see it), so `return_tensors` raises unless `do_pad=True` allows it. Padding is meant for
    training and for losses, where padded labels are ignored.

    Args:
        do_resize (`bool`, *optional*, defaults to `True`): Whether to resize.
        size (`dict`, *optional*, defaults to `{"shortest_edge": 512, "longest_edge": 2048}`): Bounds that the resized
            picture fills as far as its aspect ratio allows, or `{"height": …, "width": …}` for a fixed size.
        resample (`PILImageResampling`, *optional*, defaults to `BILINEAR`): Or `BICUBIC`. Label maps always take the
            nearest pixel.
        do_antialias (`bool`, *optional*, defaults to `False`): Whether to smooth pictures that shrink.
        do_rescale (`bool`, *optional*, defaults to `True`): Whether to multiply by `rescale_factor`.
        rescale_factor (`float`, *optional*, defaults to `1 / 255`): Factor of the rescaling.
        do_normalize (`bool`, *optional*, defaults to `True`): Whether to subtract `image_mean` and divide by
            `image_std`.
        image_mean, image_std (`list[float]`, *optional*): Per channel, default to CLIP's.
        do_pad (`bool`, *optional*, defaults to `False`): Whether to pad below and to the right, pictures with 0 after
            normalisation, label maps with 255.
        pad_size (`dict`, *optional*): `{"height": …, "width": …}` to pad to, by default the largest of the batch.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): Whether to turn every picture into RGB.
        do_reduce_labels (`bool`, *optional*, defaults to `False`): Whether label 0 becomes 255 and n becomes n - 1.
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

    def __init__(self, **kwargs: Unpack[DenseCLIPImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]

    def preprocess(  # type: ignore[override]
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[DenseCLIPImageProcessorKwargs],
    ) -> BatchFeature:
        """Turn pictures, and optionally their label maps, into model inputs.

        Args:
            images: A picture or a (nested) list of them, or an array or tensor with a batch axis.
            segmentation_maps (*optional*): As many maps of integer class ids, each of its picture's size (H, W):
                PIL images with one channel (a palette's indices count), arrays or tensors. They are not changed.
            **kwargs: Any argument of the class, for this call; and `return_tensors` (`"pt"` or `"np"`), `device`,
                `input_data_format` (`"channels_first"` or `"channels_last"`, where the shape leaves it open).

        Returns:
            `BatchFeature`: `pixel_values`, float32 of shape (B, 3, H', W'), and with `segmentation_maps` also
            `labels`, int64 of shape (B, H', W'); without `return_tensors`, lists of B tensors.

        Raises:
            ValueError: If a picture is empty, not finite or out of range, if pictures and maps do not match, if an
                option is not supported, or if resized pictures of different sizes are to form one tensor.
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
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        if do_center_crop:
            raise ValueError("do_center_crop is not supported: cropping would cut label maps and predictions too.")
        pictures = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device
        )
        if not pictures:
            raise ValueError("There are no images to process.")
        data = {"pixel_values": [self._to_pixel_values(picture, **kwargs) for picture in pictures]}
        if segmentation_maps is not None:
            maps = [
                label_map_to_tensor(m) for m in self._prepare_images_structure(segmentation_maps, expected_ndims=2)
            ]
            check_maps_fit(pictures, maps)
            data["labels"] = [
                self._to_labels(label_map, pixels, **kwargs)
                for label_map, pixels in zip(maps, data["pixel_values"], strict=True)
            ]
        if do_pad:
            data = _pad(data, pad_size)
        if return_tensors is None:
            return BatchFeature(data)
        _check_one_size(data["pixel_values"])
        stacked = {name: torch.stack(tensors) for name, tensors in data.items()}
        if len(pictures) == 1 and return_tensors == "pt":
            stacked["pixel_values"] = stacked["pixel_values"].as_subclass(LonePicture)
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
        """One picture of any kind as a tensor of shape (C, H, W), uint8 or float32, in 0 … 255."""
        return picture_to_tensor(image, bool(do_convert_rgb), input_data_format, device)

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
        """(C, H, W) grey levels → (C, H', W') model input."""
        if do_resize:
            resample = PILImageResampling.BILINEAR if resample is None else resample
            if resample not in _MODES:
                raise ValueError(f"resample must be BILINEAR or BICUBIC, got {PILImageResampling(resample).name}.")
            image = resize_image(image, _output_size(image, size), _MODES[PILImageResampling(resample)], do_antialias)
        if do_rescale:
            if image.is_floating_point() and 0 < image.max() <= 1:
                logger.warning_once("A picture seems to be scaled to 0 … 1 already: pass do_rescale=False for it.")
            image = image.float() * rescale_factor
        if do_normalize:
            mean, std = (torch.tensor(x, device=image.device).view(-1, 1, 1) for x in (image_mean, image_std))
            if {len(mean), len(std)} - {1, len(image)}:
                raise ValueError(
                    f"image_mean and image_std have {len(mean)} and {len(std)} values, but the picture has "
                    f"{len(image)} channels: pass do_convert_rgb=True or one value per channel."
                )
            image = (image.float() - mean) / std
        return image

    def _to_labels(
        self, labels: torch.Tensor, pixel_values: torch.Tensor, *, do_resize: bool, do_reduce_labels: bool, **kwargs
    ) -> torch.Tensor:
        """(H, W) class ids → (H', W') int64 labels of the resized picture."""
        if do_resize:
            labels = resize_labels(labels, (pixel_values.shape[-2], pixel_values.shape[-1]))
        if do_reduce_labels:
            labels = reduce_labels(labels, LABEL_PADDING)
        return labels

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """Turn the model's output into segmentation maps of the size of the original pictures.

        Without scores, memory stays bounded however large the pictures are, see [`resize_argmax`]. All K scores of a
        pixel, which is what transformers means by them, are for small results; [`resize_max`] of
        `denseclip_hf.model.resizing_denseclip` gives each pixel's highest score at any size.

        Args:
            outputs: Model output with `logits` of shape (B, K, h, w), or a list of B tensors (K, h, w).
            target_sizes (`list[tuple[int, int]]` or `torch.Tensor` of shape `(B, 2)`, *optional*): Height and width of
                each original picture; by default the maps have the size of the logits.
            return_segmentation_scores (`bool`, *optional*, defaults to `False`): Whether to return the resized logits
                too, K floats for each pixel.

        Returns:
            `list[torch.Tensor]` of length B: int64 class ids of shape (H, W); with scores, B outputs with
            `segmentation` (the same) and `segmentation_scores`, float32 of shape (K, H, W).

        Raises:
            ValueError: If there are not as many target sizes as pictures, a logit is NaN or infinite (which no class
                means), or more than 2**29 scores (2 GiB) are asked for.
        """
        logits = outputs.logits
        sizes = [picture.shape[-2:] for picture in logits] if target_sizes is None else target_sizes
        if len(sizes) != len(logits):
            raise ValueError(f"There are {len(logits)} pictures in the logits but {len(sizes)} target sizes.")
        # a tensor of sizes yields tensors
        sizes = [(int(height), int(width)) for height, width in sizes]
        if not return_segmentation_scores:
            return [resize_argmax(picture[None], size)[0] for picture, size in zip(logits, sizes, strict=True)]
        count = sum(len(picture) * height * width for picture, (height, width) in zip(logits, sizes, strict=True))
        if count > MAX_SCORES:
            raise ValueError(
                f"The scores would be {count} numbers, above {MAX_SCORES} (2 GiB): pass smaller target sizes or fewer "
                "pictures, or take each pixel's highest score from denseclip_hf.model.resizing_denseclip.resize_max."
            )
        results = []
        for picture, size in zip(logits, sizes, strict=True):
            check_finite(picture)
            scores = F.interpolate(picture[None].float(), size=size, mode="bilinear", align_corners=False)[0]
            data = {"segmentation": scores.argmax(dim=0), "segmentation_scores": scores}
            results.append(SemanticSegmentationPostProcessorOutput(data=data))
        return results


class DenseCLIPImageProcessorPil(DenseCLIPImageProcessorBase, PilBackend):  # type: ignore[misc]
    __doc__ = DenseCLIPImageProcessorBase.__doc__


def _output_size(image: torch.Tensor, size: SizeDict) -> tuple[int, int]:
    if size.height and size.width:
        height, width = size.height, size.width
    elif size.shortest_edge:
        height, width = fit_within(image.shape[-2], image.shape[-1], size.shortest_edge, size.longest_edge)
    else:
        raise ValueError(
            f"size must have the keys shortest_edge and optionally longest_edge, or height and width, got "
            f"{dict(size)}."
        )
    if height * width > MAX_PIXELS:
        raise ValueError(f"The resized picture would have {height}×{width} pixels, above {MAX_PIXELS}: lower size.")
    return height, width


def _check_one_size(pictures: list[torch.Tensor]) -> None:
    sizes = sorted({height_by_width(picture) for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(
            f"The resized pictures have different sizes ({', '.join(sizes)}) and do not fit one tensor: pass them one "
            "at a time or with size={'height': …, 'width': …}, or pass do_pad=True if the padding may change results."
        )


def _pad(data: dict[str, list[torch.Tensor]], pad_size: SizeDict | None) -> dict[str, list[torch.Tensor]]:
    """Every tensor padded below and to the right to `pad_size`, by default to the largest of the batch."""
    largest = [max(picture.shape[axis] for picture in data["pixel_values"]) for axis in (-2, -1)]
    height, width = largest if pad_size is None else (pad_size.height, pad_size.width)
    if not height or not width or largest[0] > height or largest[1] > width:
        raise ValueError(
            f"pad_size must have a height and a width of at least {largest[0]}×{largest[1]}, the largest resized "
            f"picture, got {dict(pad_size) if pad_size is not None else {}}."
        )
    if height * width > MAX_PIXELS:
        raise ValueError(f"The padded picture would have {height}×{width} pixels, above {MAX_PIXELS}: lower pad_size.")
    return {
        name: [
            F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=LABEL_PADDING * (name == "labels"))
            for x in tensors
        ]
        for name, tensors in data.items()
    }
