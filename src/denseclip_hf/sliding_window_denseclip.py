"""Sliding-window inference as the published numbers were measured with: overlapping logits are averaged."""

from collections.abc import Callable

import torch

from .fpn_denseclip import resize_bilinear


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side; the last window is moved back inside the image.

    >>> window_starts(1024, 512, 341)
    [0, 341, 512]
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def sliding_window_logits(
    predict: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    crop_size: tuple[int, int] | list[int],
    stride: tuple[int, int] | list[int],
    batch_size: int = 4,
) -> torch.Tensor:
    """
    Average the logits of overlapping windows. An image smaller than the window is used as it is, never padded.

    Args:
        predict (`Callable`): maps windows `(n, 3, h, w)` to logits `(n, K, h', w')`, which are resized to `(h, w)`.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
        crop_size (`tuple[int, int]`): window height and width in pixels.
        stride (`tuple[int, int]`): step down and right in pixels, at most `crop_size`.
        batch_size (`int`): windows given to `predict` at a time.

    Returns:
        `torch.Tensor` of shape `(batch_size, K, height, width)`: averaged logits in float32.

    Raises:
        ValueError: if `stride` is not between 1 and `crop_size`, or `batch_size` is below 1.
    """
    if batch_size < 1 or any(not 1 <= s <= c for s, c in zip(stride, crop_size, strict=True)):
        raise ValueError(
            f"`stride` {tuple(stride)} must be between 1 and `crop_size` {tuple(crop_size)}, and `batch_size` "
            f"({batch_size}) at least 1."
        )
    height, width = pixel_values.shape[-2:]
    h, w = min(crop_size[0], height), min(crop_size[1], width)
    windows = [
        (image, top, left)
        for image in range(len(pixel_values))
        for top in window_starts(height, h, stride[0])
        for left in window_starts(width, w, stride[1])
    ]
    total, count = None, torch.zeros(height, width, device=pixel_values.device)
    for first in range(0, len(windows), batch_size):
        chunk = windows[first : first + batch_size]
        crops = torch.stack([pixel_values[i, :, top : top + h, left : left + w] for i, top, left in chunk])
        logits = resize_bilinear(predict(crops).float(), (h, w))
        if total is None:
            total = logits.new_zeros(len(pixel_values), logits.shape[1], height, width)
        for (image, top, left), window in zip(chunk, logits, strict=True):
            total[image, :, top : top + h, left : left + w] += window
            if image == 0:
                count[top : top + h, left : left + w] += 1
    if total is None:
        raise ValueError("`pixel_values` holds no image.")
    return total.div_(count)


__all__ = ["sliding_window_logits", "window_starts"]
