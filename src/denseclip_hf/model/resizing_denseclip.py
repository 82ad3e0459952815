"""Resizing of images, label maps and logits the way the published results were measured.

Shapes: B images, C channels, K classes, H × W pixels.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, reduce
from typing import Any

import torch
import torch.nn.functional as F

from .layers_denseclip import resize_bilinear


# logits that are interpolated at a time (16 MiB of float32), and gray levels of an image
_STRIP_ELEMENTS = 2**22
_IMAGE_STRIP_ELEMENTS = 2**17


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
    """Resize an image, by default bilinearly and without antialiasing, as OpenCV does.

    By default uint8 images come out exactly as OpenCV's, with or without it; where it is installed, ten times as fast.
    Floats, bicubic and antialiased images are resized one channel at a time.

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
    if image.dtype == torch.uint8 and mode == "bilinear" and not antialias:
        cv2 = _opencv() if image.device.type == "cpu" and len(image) <= 4 else None
        if cv2 is None:
            return _resize_levels(image, size)
        resized = cv2.resize(image.permute(1, 2, 0).numpy(), size[::-1], interpolation=cv2.INTER_LINEAR)
        return torch.from_numpy(resized).view(*size, len(image)).permute(2, 0, 1)
    result = torch.empty(len(image), *size, dtype=image.dtype, device=image.device)
    for channel, resized in zip(image, result, strict=True):
        values = F.interpolate(
            channel[None, None].float(), size=size, mode=mode, align_corners=False, antialias=antialias
        )[0, 0]
        resized.copy_(values.round().clamp(0, 255) if image.dtype == torch.uint8 else values)
    return result


@cache
def _opencv() -> Any:
    """OpenCV where it is installed: the same pixels ten times as fast."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(0)  # a forked worker of a DataLoader would wait for threads that are not there
    return cv2


def _resize_levels(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(C, H, W) gray levels resized bilinearly in OpenCV's whole-number arithmetic, some rows at a time."""
    channels, old_height, old_width = image.shape
    height, width = size
    upper, lower, upper_weight, lower_weight = (x.to(image.device) for x in _neighbors(old_height, height))
    left, right, left_weight, right_weight = (x.to(image.device) for x in _neighbors(old_width, width))
    result = torch.empty(channels, height, width, dtype=torch.uint8, device=image.device)
    strip = max(1, _IMAGE_STRIP_ELEMENTS // (max(width, old_width) * channels))
    for top in range(0, height, strip):
        part = slice(top, top + strip)
        needed, index = torch.stack([upper[part], lower[part]]).unique(return_inverse=True)
        # Columns lie one after the other meanwhile: whole ones are copied, which is faster than picking pixels.
        columns = image.permute(1, 2, 0).index_select(0, needed).permute(1, 2, 0).flatten(1)  # (W, C · rows)
        wide = columns.index_select(0, left).int().mul_(left_weight[:, None])
        wide.add_(columns.index_select(0, right).int().mul_(right_weight[:, None])).bitwise_right_shift_(4)
        wide = wide.short().t().contiguous().view(channels, -1, width)
        above = wide.index_select(1, index[0]).int().mul_(upper_weight[part, None]).bitwise_right_shift_(16)
        below = wide.index_select(1, index[1]).int().mul_(lower_weight[part, None]).bitwise_right_shift_(16)
        result[:, part] = above.add_(below).add_(2).bitwise_right_shift_(2)
    return result


def _neighbors(old: int, new: int) -> tuple[torch.Tensor, ...]:
    """For each new pixel along one axis the two old ones around it, and their weights in 2048ths (int32)."""
    # dividing twice, as for labels
    positions = ((torch.arange(new, dtype=torch.float64) + 0.5) * (1 / (new / old)) - 0.5).float()
    before = positions.floor()
    weight = positions - before
    # beyond a border both are the pixel there
    around = before.long().clamp(0, old - 1), (before.long() + 1).clamp(0, old - 1)
    return *around, ((1 - weight) * 2048).round().int(), (weight * 2048).round().int()


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a label map by picking, for each new pixel, the one above and to the left, as OpenCV's nearest does.

    Args:
        labels (`torch.Tensor` of shape `(..., H, W)`): Class ids of any dtype.
        size (`tuple[int, int]`): New height and width.

    Returns:
        `torch.Tensor` of shape `(..., *size)` and the same dtype.
    """
    rows, columns = (lines.to(labels.device) for lines in nearest_lines(labels.shape[-2:], size))
    return labels[..., rows[:, None], columns]


def nearest_lines(old_size: Sequence[int], new_size: Sequence[int]) -> list[torch.Tensor]:
    """The rows and columns that [`resize_labels`] picks."""
    lines = []
    for old, new in zip(old_size, new_size, strict=True):
        # dividing twice, in double precision, rounds as OpenCV does where a position is a whole number
        positions = torch.arange(new, dtype=torch.float64) * (1 / (new / old))
        lines.append(positions.long().clamp(max=old - 1))
    return lines


def check_finite(scores: torch.Tensor, name: str | None = None) -> None:
    """Refuse logits, score maps or probabilities that are NaN or infinite: their argmax means nothing.

    It waits for the device, so belongs where something does anyway. Nothing is looked at while a graph is traced.

    Args:
        scores (`torch.Tensor` of any shape): Of one image or several.
        name (`str`, *optional*): Of the image.

    Raises:
        ValueError: With one sentence that says how to mend it.
    """
    if torch.compiler.is_compiling() or scores.is_meta or not scores.numel():
        return
    if not torch.stack(scores.aminmax()).isfinite().all():
        raise ValueError(
            f"{f'{name}: ' if name else ''}the model's scores are NaN or infinite and give no class: if its `dtype` "
            "is float16, which overflows, use bfloat16 or float32; if not, its weights or words are damaged."
        )


@torch.no_grad()
def resize_max(
    logits: torch.Tensor, size: tuple[int, int], name: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    For each pixel the class with the highest bilinearly resized logit, that logit, and the class's probability.

    Equal to what `F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)` gives by `max(1)` and
    `softmax(1)`, but a few classes are interpolated at a time, so that memory does not grow with K.

    Args:
        logits (`torch.Tensor` of shape `(B, K, h, w)`): Of any floating dtype.
        size (`tuple[int, int]`): Height and width of the result.
        name (`str`, *optional*): Of the image, for the error.

    Returns:
        Three tensors of shape `(B, *size)`: float32 scores, int64 class ids, float32 probabilities.

    Raises:
        ValueError: If `logits` is not finite everywhere.
    """
    check_finite(logits, name)
    scores, classes, total = highest(_resized(logits, size, torch.arange(logits.shape[1], device=logits.device)))
    return scores, classes, (scores - total).exp()


@torch.no_grad()
def resize_argmax(logits: torch.Tensor, size: tuple[int, int], name: str | None = None) -> torch.Tensor:
    """The classes of [`resize_max`] alone: `(B, *size)` int64 ids. Those that win nowhere are not interpolated."""
    check_finite(logits, name)
    winners = _possible_winners(logits)
    return winners[highest(_resized(logits, size, winners), with_total=False)[1]]


def _possible_winners(logits: torch.Tensor) -> torch.Tensor:
    """Ids, in order, of the classes that can be the highest somewhere once `(B, K, h, w)` are resized bilinearly.

    Between four neighbors a class stays between its lowest and its highest value there. One whose highest is below
    the lowest of another, between all neighbors, wins nowhere.
    """
    parts = logits.split(_classes_at_once(len(logits), *logits.shape[-2:]), dim=1)
    to_beat = reduce(torch.maximum, (_of_neighbors(part, torch.minimum).amax(1) for part in parts)).float()
    to_beat = (to_beat - 1e-5 * to_beat.abs())[:, None]  # interpolation rounds
    leads = [(_of_neighbors(part, torch.maximum) - to_beat).amax((0, 2, 3)) for part in parts]
    return (torch.cat(leads) >= 0).nonzero()[:, 0]


def _of_neighbors(values: torch.Tensor, of_two: Callable[..., torch.Tensor]) -> torch.Tensor:
    """`of_two`, a maximum or minimum, over each four neighbors of the last two axes."""
    for axis in (-2, -1):
        if count := values.shape[axis] - 1:
            values = of_two(values.narrow(axis, 0, count), values.narrow(axis, 1, count))
    return values


def _resized(logits: torch.Tensor, size: tuple[int, int], classes: torch.Tensor) -> Iterator[torch.Tensor]:
    for some in classes.split(_classes_at_once(len(logits), *size)):
        yield resize_bilinear(logits[:, some].float(), size)


def _classes_at_once(*sizes: int) -> int:
    return max(1, _STRIP_ELEMENTS // max(math.prod(sizes), 1))


def highest(parts: Iterable[torch.Tensor], with_total: bool = True) -> Any:
    """
    Of scores that come a few classes at a time, as `(B, k, H, W)`: the highest of each pixel, the number of its class,
    the first of equal ones, and, `with_total`, the logsumexp of all; three tensors `(B, H, W)`.
    """
    scores: Any = None
    classes: Any = None
    total: Any = None
    first = 0
    for part in parts:
        best, index = part.max(dim=1)
        part_total = part.logsumexp(1) if with_total else None
        if scores is None:
            scores, classes, total = best, index, part_total
        else:
            classes = torch.where(best > scores, index + first, classes)
            scores = torch.maximum(scores, best)
            total = torch.logaddexp(total, part_total) if with_total else None
        first += part.shape[1]
    return scores, classes, total


__all__ = ["check_finite", "fit_within", "highest", "resize_argmax", "resize_image", "resize_labels", "resize_max"]
