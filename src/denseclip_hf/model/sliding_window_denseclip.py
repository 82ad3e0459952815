"""Sliding-window inference as the published numbers were measured with: overlapping logits are averaged."""

from collections.abc import Callable, Sequence

import torch

from .fpn_denseclip import resize_bilinear


# Resized logits of a window that exist at a time (16 MiB of float32).
_CHUNK_ELEMENTS = 2**22


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
    crop_size: Sequence[int],
    stride: Sequence[int],
    batch_size: int | None = None,
) -> torch.Tensor:
    """
    Average the logits of overlapping windows. An image smaller than the window is used as it is, never padded.

    Args:
        predict (`Callable`): maps windows `(n, 3, h, w)` to logits `(n, K, h', w')`, which are resized to `(h, w)`.
        pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): normalised images.
        crop_size (`tuple[int, int]`): window height and width in pixels.
        stride (`tuple[int, int]`): step down and right in pixels, at most `crop_size`.
        batch_size (`int`, *optional*): windows given to `predict` at a time; by default 4, on a CPU one.

    Returns:
        `torch.Tensor` of shape `(batch_size, K, height, width)`: averaged logits in float32.

    Raises:
        ValueError: if `stride` is not between 1 and `crop_size`, or `batch_size` is below 1.
    """
    if batch_size is None:
        batch_size = 1 if pixel_values.device.type == "cpu" else 4
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
    weights = _weights(height, width, h, w, stride).to(pixel_values.device)
    total = None
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        crops = torch.stack([pixel_values[i, :, top : top + h, left : left + w] for i, top, left in batch])
        logits = predict(crops)
        if total is None:
            total = torch.zeros(len(pixel_values), logits.shape[1], height, width, device=logits.device)
        for (image, top, left), window in zip(batch, logits, strict=True):
            rows, columns = slice(top, top + h), slice(left, left + w)
            # A few classes at a time: what is resized stays in the cache, and is never there whole.
            for start in range(0, len(window), max(1, _CHUNK_ELEMENTS // (h * w))):
                some = slice(start, start + max(1, _CHUNK_ELEMENTS // (h * w)))
                resized = resize_bilinear(window[None, some].float(), (h, w))[0]
                total[image, some, rows, columns] += resized * weights[rows, columns]
    if total is None:
        raise ValueError("`pixel_values` holds no image: give at least one.")
    return total


def _weights(height: int, width: int, h: int, w: int, stride: Sequence[int]) -> torch.Tensor:
    """`(height, width)`: one over the number of windows of h x w that see a pixel."""
    counts = []
    for length, window, step in ((height, h, stride[0]), (width, w, stride[1])):
        count = torch.zeros(length)
        for start in window_starts(length, window, step):
            count[start : start + window] += 1
        counts.append(count)
    return 1 / (counts[0][:, None] * counts[1])


__all__ = ["sliding_window_logits", "window_starts"]
