"""From the scores of words to classes, and the refinement of their edges."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F


def class_probabilities(scores: torch.Tensor, class_of_query: torch.Tensor, scale: float = 40.0) -> torch.Tensor:
    """
    Softmax of `scale` times the cosines over all queries; a class has the largest probability of its queries.

    Args:
        scores (`torch.Tensor` of shape `(B, Q, H, W)`): cosines.
        class_of_query (`torch.Tensor` of shape `(Q,)`): class of each query, 0 to K - 1.

    Returns:
        `torch.Tensor` of shape `(B, K, H, W)`; a pixel's probabilities add up to at most 1.
    """
    probabilities = (scale * scores.float()).softmax(1)
    classes = int(class_of_query.max()) + 1
    return torch.stack([probabilities[:, class_of_query == k].amax(1) for k in range(classes)], 1)


def without_small_classes(probabilities: torch.Tensor, share: float) -> torch.Tensor:
    """
    `probabilities` `(B, K, H, W)`, 0 where a class has at most this share of its image's foreground: the pixels whose
    best class is not 0, the background.
    """
    # counts are whole numbers, so the comparison is exact whatever the precision of the probabilities
    best = probabilities.argmax(1).flatten(1)
    counts = F.one_hot(best, probabilities.shape[1]).sum(1)[:, 1:]  # B, K - 1
    kept = counts > share * counts.sum(1, keepdim=True)
    return probabilities * F.pad(kept, (1, 0), value=True)[:, :, None, None]


def refine_scores(
    scores: torch.Tensor, affinity: torch.Tensor, iterations: int = 10, dilations: Sequence[int] = (8, 16)
) -> torch.Tensor:
    """
    Pixel-adaptive refinement (PAMR): each pixel's scores become those of neighbors of its color, again and again.

    Args:
        scores (`torch.Tensor` of shape `(B, K, h, w)`): resized to the images first, corners aligned, if they differ.
        affinity (`torch.Tensor` of shape `(B, 8 * dilations, H, W)`): from [`color_affinity`].
        iterations (`int`): how often.
        dilations (`Sequence[int]`): distances of the neighbors in pixels, 8 at each.

    Returns:
        `torch.Tensor` of shape `(B, K, H, W)`, float32.
    """
    scores = scores.float()
    if scores.shape[-2:] != affinity.shape[-2:]:
        scores = F.interpolate(scores, size=affinity.shape[-2:], mode="bilinear", align_corners=True)
    for _ in range(iterations):
        refined = torch.zeros_like(scores)
        for weight, neighbor in zip(affinity.unbind(1), _neighbors(scores, dilations), strict=True):
            refined.addcmul_(weight[:, None], neighbor)
        scores = refined
    return scores


def color_std(images: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """Unbiased deviation `(B, 3, H, W)` over all neighbors and, once per dilation, the pixel itself."""
    count = 9 * len(dilations)
    mean = images * (len(dilations) / count)
    for neighbor in _neighbors(images, dilations):
        mean = mean + neighbor / count
    squares = len(dilations) * (images - mean) ** 2
    for neighbor in _neighbors(images, dilations):
        squares = squares + (neighbor - mean) ** 2
    return (squares / (count - 1)).sqrt()


def color_affinity(images: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """How alike each pixel and its neighbors are in images `(B, 3, H, W)`: weights that add up to 1."""
    width = 1e-8 + 0.1 * color_std(images, dilations)
    distances = [((images - neighbor).abs() / width).mean(1) for neighbor in _neighbors(images, dilations)]
    return torch.stack(distances, 1).neg_().softmax(1)


def _neighbors(maps: torch.Tensor, dilations: Sequence[int]) -> Iterator[torch.Tensor]:
    """For each dilation the 8 neighbors of every pixel, row by row, borders repeated."""
    height, width = maps.shape[-2:]
    for d in dilations:
        padded = F.pad(maps, (d, d, d, d), mode="replicate")
        for down in (-d, 0, d):
            for right in (-d, 0, d):
                if down or right:
                    yield padded[..., d + down : d + down + height, d + right : d + right + width]


__all__ = ["class_probabilities", "color_affinity", "color_std", "refine_scores", "without_small_classes"]
