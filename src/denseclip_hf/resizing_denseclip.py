"""Resizing of pictures, label maps and logits the way the published results were measured.

Shapes: B pictures, C channels, K classes, H × W pixels.
"""

import torch
import torch.nn.functional as F


# logits that `resize_argmax` interpolates at a time (16 MiB of float32)
_STRIP_ELEMENTS = 2**22


def fit_within(height: int, width: int, shortest_edge: int, longest_edge: int | None = None) -> tuple[int, int]:
    """Largest size of the same aspect ratio whose short side is at most `shortest_edge`, long side `longest_edge`.

    The rule of mmsegmentation, which the published results were measured with: one factor for both sides, rounded
    half up.

    Returns:
        `tuple[int, int]`: New height and width, at least one pixel each.
    """
    factor = shortest_edge / min(height, width)
    if longest_edge is not None:
        factor = min(factor, longest_edge / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_image(
    image: torch.Tensor, size: tuple[int, int], mode: str = "bilinear", antialias: bool = False
) -> torch.Tensor:
    """Resize a picture, by default bilinearly and without antialiasing, as OpenCV does.

    Args:
        image (`torch.Tensor` of shape `(C, H, W)`): uint8 in 0 … 255, or floats of any range.
        size (`tuple[int, int]`): New height and width.
        mode (`str`, *optional*, defaults to `"bilinear"`): Or `"bicubic"`.
        antialias (`bool`, *optional*, defaults to `False`): Whether to average over the pixels a shrunken one covers.

    Returns:
        `torch.Tensor` of shape `(C, *size)` and the same dtype; uint8 is rounded.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    resized = F.interpolate(image[None].float(), size=size, mode=mode, align_corners=False, antialias=antialias)[0]
    return resized.round().clamp(0, 255).to(torch.uint8) if image.dtype == torch.uint8 else resized


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a label map by picking, for each new pixel, the one above and to the left, as OpenCV's nearest does.

    Args:
        labels (`torch.Tensor` of shape `(..., H, W)`): Class ids of any dtype.
        size (`tuple[int, int]`): New height and width.

    Returns:
        `torch.Tensor` of shape `(..., *size)` and the same dtype.
    """
    rows, columns = (_nearest(old, new).to(labels.device) for old, new in zip(labels.shape[-2:], size, strict=True))
    return labels[..., rows[:, None], columns]


def _nearest(old: int, new: int) -> torch.Tensor:
    # dividing twice, in double precision, rounds as OpenCV does where a position is a whole number
    positions = torch.arange(new, dtype=torch.float64) * (1 / (new / old))
    return positions.long().clamp(max=old - 1)


@torch.no_grad()
def resize_argmax(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Class with the highest bilinearly resized logit for each pixel, in memory that does not grow with K.

    Equal to `F.interpolate(logits.float(), size, mode="bilinear", align_corners=False).argmax(1)`, but the logits
    are interpolated in strips of rows, so that never more than about 100 MiB of them exist.

    Args:
        logits (`torch.Tensor` of shape `(B, K, h, w)`): Of any floating dtype.
        size (`tuple[int, int]`): Height and width of the result.

    Returns:
        `torch.Tensor` of shape `(B, *size)`: int64 class ids, on the device of `logits`.

    Raises:
        ValueError: If `logits` has not four axes or `size` is not positive.
    """
    height, width = (int(side) for side in size)
    if logits.ndim != 4:
        raise ValueError(f"Logits must have the shape (batch, classes, height, width), got {tuple(logits.shape)}.")
    if height < 1 or width < 1:
        raise ValueError(f"The size must be positive, got {height}×{width}.")
    if tuple(logits.shape[-2:]) == (height, width):
        return logits.argmax(dim=1)
    classes = torch.empty(logits.shape[0], height, width, dtype=torch.long, device=logits.device)
    strip = max(1, _STRIP_ELEMENTS // (logits.shape[1] * max(width, logits.shape[3])))
    for picture, result in zip(logits, classes, strict=True):
        for top in range(0, height, strip):
            bottom = min(top + strip, height)
            result[top:bottom] = resized_rows(picture, top, bottom, height, width).argmax(dim=0)
    return classes


def resized_rows(logits: torch.Tensor, top: int, bottom: int, height: int, width: int) -> torch.Tensor:
    """Rows `top` … `bottom - 1` of (K, h, w) logits resized to (K, height, width): (K, bottom - top, width)."""
    old_height = logits.shape[1]
    # float32 throughout: the positions must round as they do inside F.interpolate
    scale = torch.tensor(old_height, dtype=torch.float32) / height
    positions = ((torch.arange(top, bottom, dtype=torch.float32) + 0.5) * scale - 0.5).clamp(min=0)
    upper = positions.long().clamp(max=old_height - 1)
    lower = (upper + 1).clamp(max=old_height - 1)
    weight = (positions - upper).to(logits.device)[:, None]
    needed, index = torch.stack([upper, lower]).unique(return_inverse=True)
    rows = logits[:, needed.to(logits.device)].float()
    # the height stays as it is here, so this interpolates along the rows only
    rows = F.interpolate(rows[None], size=(len(needed), width), mode="bilinear", align_corners=False)[0]
    upper, lower = index.to(logits.device)
    return rows[:, upper].mul_(1 - weight).add_(rows[:, lower].mul_(weight))
