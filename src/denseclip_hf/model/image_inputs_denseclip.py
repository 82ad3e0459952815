"""Pictures and label maps of any kind as tensors.

Shapes: C channels, H × W pixels.
"""

from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format


Labels = TypeVar("Labels", np.ndarray, torch.Tensor)


def picture_to_tensor(
    image: Any,
    do_convert_rgb: bool = True,
    input_data_format: str | ChannelDimension | None = None,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """A picture as grey levels in 0 … 255.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): Of any mode; or of shape (H, W), (H, W, C) or
            (C, H, W) with 1, 3 or 4 channels.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): Whether grey is repeated and alpha dropped.
        input_data_format (*optional*): Which axis holds the channels, where the shape leaves it open.
        device (*optional*): Where the result shall be; by default where the picture is.

    Returns:
        `torch.Tensor` of shape `(C, H, W)`: uint8 (16 bit are scaled to 8), or float32 where the pixels were floats.

    Raises:
        ValueError: If the shape is not a picture's, or pixels are out of range, NaN or infinite.
    """
    if isinstance(image, Image.Image):
        image = _pil_to_array(image, do_convert_rgb)
        input_data_format = ChannelDimension.LAST
    if isinstance(image, np.ndarray):
        # a copy, because torch takes neither read-only nor byte-swapped arrays
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("=")))
    pixels = _grey_levels(_channels_first(image.detach().to(device or image.device), input_data_format))
    if do_convert_rgb and len(pixels) != 3:
        pixels = pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]
    return pixels


def label_map_to_tensor(segmentation_map: Any) -> torch.Tensor:
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
        if len(segmentation_map.getbands()) != 1:
            raise ValueError(
                f"A segmentation map has one channel, but this one has the mode {segmentation_map.mode}: turn its "
                "colours into class ids first."
            )
        decode(segmentation_map)
        segmentation_map = np.asarray(segmentation_map)
    if not holds_integers(segmentation_map) or segmentation_map.ndim != 2:
        raise ValueError(
            f"A segmentation map holds integer class ids in the shape (height, width), but this one has the dtype "
            f"{segmentation_map.dtype} and the shape {tuple(segmentation_map.shape)}: convert it."
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


def check_maps_fit(pictures: list[torch.Tensor], maps: list[torch.Tensor]) -> None:
    """Raise a `ValueError` unless there is one map of (H, W) for each picture of (C, H, W)."""
    if len(pictures) != len(maps):
        raise ValueError(f"There are {len(pictures)} images but {len(maps)} segmentation maps: pass one map for each.")
    for picture, label_map in zip(pictures, maps, strict=True):
        if picture.shape[-2:] != label_map.shape:
            raise ValueError(
                f"An image is {height_by_width(picture)} (height×width) but its segmentation map "
                f"{height_by_width(label_map)}: pass the map that was made for it, at its size."
            )


def height_by_width(tensor: torch.Tensor) -> str:
    """Size of a (..., H, W) tensor for a message."""
    return "×".join(str(side) for side in tensor.shape[-2:])


def decode(image: Image.Image) -> None:
    """Read the pixels of a PIL image, which may have been opened only."""
    # Without its name: Pillow 12 scrambles a TIFF that lies on its side where it maps the named file into memory.
    name, image.filename = getattr(image, "filename", ""), ""  # type: ignore[attr-defined]
    try:
        image.load()
    finally:
        image.filename = name  # type: ignore[attr-defined]


def _pil_to_array(image: Image.Image, do_convert_rgb: bool) -> np.ndarray:
    """PIL image → (H, W) or (H, W, C) array; 16-bit grey, which PIL would clip at 255, as uint16."""
    decode(image)
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        # some Pillow versions open 16-bit files with 32-bit integers
        is_16_bit = image.mode == "I" and values.min(initial=0) >= 0 and 255 < values.max(initial=0) <= 65535
        return values.astype(np.uint16) if is_16_bit else values
    return np.asarray(image.convert("RGB") if do_convert_rgb and image.mode != "RGB" else image)


def _channels_first(image: torch.Tensor, input_data_format: str | ChannelDimension | None) -> torch.Tensor:
    shape = tuple(image.shape)
    if image.ndim == 2:
        image, input_data_format = image[None], ChannelDimension.FIRST
    if image.ndim != 3 or not {image.shape[0], image.shape[-1]} & {1, 3, 4}:
        raise ValueError(f"A picture needs an axis of 1, 3 or 4 channels, but this one has the shape {shape}.")
    if image.numel() == 0:
        raise ValueError(f"A picture needs at least one pixel, but this one has the shape {shape}: leave it out.")
    if input_data_format is None:
        input_data_format = infer_channel_dimension_format(image, (1, 3, 4))  # type: ignore[arg-type]
    return image if input_data_format == ChannelDimension.FIRST else image.permute(2, 0, 1)


def _grey_levels(image: torch.Tensor) -> torch.Tensor:
    """Pixels of any dtype as uint8, or as float32 where they were floats."""
    if image.is_floating_point():
        if not image.isfinite().all():
            raise ValueError("The picture has pixels that are NaN or infinite: replace them, or leave it out.")
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
            f"Pixels must lie in 0 … 255, but go from {levels.min()} to {levels.max()}: pass 16-bit ones as uint16."
        )
    return levels.to(torch.uint8)
