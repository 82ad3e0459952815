"""From words to one map, without training: queries, scores, classes and the refinement of their edges."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import CLIPModel

from .dense_attention_denseclip import dense_features
from .modeling_denseclip import sliding_window_logits


def encode_words(
    clip: CLIPModel,
    tokenizer: Any,
    classes: Sequence[str | Sequence[str]],
    templates: Sequence[str] = ("a photo of a {}.",),
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One query per phrasing.

    Args:
        clip (`CLIPModel`): with its text tower.
        tokenizer: the tokenizer of `clip`.
        classes: for each class its name, or a list of phrasings that are matched each by itself.
        templates: sentences with `{}` for the phrasing; their embeddings are averaged.

    Returns:
        queries (`torch.Tensor` of shape `(Q, D)`, unit vectors) and the class of each (`(Q,)`).

    Raises:
        ValueError: if there are no words, one is empty, one is given twice, or one is too long for the text tower.
    """
    phrasings = [[names] if isinstance(names, str) else list(names) for names in classes]
    words = [word for names in phrasings for word in names]
    if not words or not all(phrasings) or not all(word.strip() for word in words):
        raise ValueError(f"The words {phrasings} are empty or hold an empty entry; give at least one word per class.")
    # a word may stand in two classes, as "bed" does in COCO's background and objects, but not be a class twice
    groups = [frozenset(names) for names in phrasings]
    if len(set(groups)) < len(groups) or any(len(set(names)) < len(names) for names in phrasings):
        raise ValueError(f"The words {phrasings} hold one twice; give each once.")
    limit = clip.config.text_config.max_position_embeddings
    queries = []
    for word in words:
        encoded = tokenizer([template.format(word) for template in templates], padding=True, return_tensors="pt")
        if encoded["input_ids"].shape[1] > limit:
            raise ValueError(
                f"{word!r} makes a sentence of {encoded['input_ids'].shape[1]} tokens, but the text tower reads "
                f"{limit}; give a shorter phrasing."
            )
        queries.append(encode_queries(clip, encoded["input_ids"][None].to(clip.device)))
    class_of_query = [i for i, names in enumerate(phrasings) for _ in names]
    return torch.cat(queries), torch.tensor(class_of_query, device=clip.device)


@torch.no_grad()
def encode_queries(clip: CLIPModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Unit queries `(Q, D)` from the token ids `(Q, templates, positions)` of their sentences, padded at the right."""
    embeds = clip.get_text_features(input_ids=input_ids.flatten(0, 1).long()).pooler_output
    embeds = F.normalize(embeds, dim=-1).unflatten(0, input_ids.shape[:2])
    return F.normalize(embeds.mean(1), dim=-1)


def word_scores(
    clip: CLIPModel, pixel_values: torch.Tensor, queries: torch.Tensor, method: str = "naclip"
) -> torch.Tensor:
    """Cosines of patches and queries, `(B, Q, h, w)`, of the images `(B, 3, height, width)` taken whole."""
    features = F.normalize(dense_features(clip, pixel_values, method), dim=1)
    return torch.einsum("bdhw,qd->bqhw", features, queries.to(features.dtype))


@torch.no_grad()
def window_scores(
    clip: CLIPModel,
    pixel_values: torch.Tensor,
    queries: torch.Tensor,
    window: int = 224,
    stride: int = 112,
    method: str = "naclip",
) -> torch.Tensor:
    """Cosines `(B, Q, height, width)` averaged over windows of `window` pixels that lie `stride` apart."""
    return sliding_window_logits(
        lambda crops: word_scores(clip, crops, queries, method), pixel_values, [window] * 2, [stride] * 2
    )


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


def choose_classes(probabilities: torch.Tensor, threshold: float = 0.0, area_threshold: float = 0.0) -> torch.Tensor:
    """
    The class of each pixel, `(B, H, W)` int64; class 0 is the background.

    Args:
        probabilities (`torch.Tensor` of shape `(B, K, H, W)`): of [`class_probabilities`].
        threshold (`float`): pixels whose best class is less probable become background.
        area_threshold (`float`): a class that covers at most this share of its image's foreground is left out; 0 keeps
            every class.
    """
    if area_threshold > 0:
        # counts are whole numbers, so the comparison is exact whatever the precision of the probabilities
        best = probabilities.argmax(1).flatten(1)
        counts = F.one_hot(best, probabilities.shape[1]).sum(1)[:, 1:]  # B, K - 1
        kept = counts > area_threshold * counts.sum(1, keepdim=True)
        probabilities = probabilities * F.pad(kept, (1, 0), value=True)[:, :, None, None]
    highest, classes = probabilities.max(1)
    return classes.masked_fill(highest < threshold, 0)


def refine_scores(
    images: torch.Tensor, scores: torch.Tensor, iterations: int = 10, dilations: Sequence[int] = (8, 16)
) -> torch.Tensor:
    """
    Pixel-adaptive refinement (PAMR): each pixel's scores become those of neighbors of its color, again and again.

    Memory is that of `scores` a few times over and 8 floats per dilation and pixel, whatever the number of iterations.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): colors, normalized or not.
        scores (`torch.Tensor` of shape `(B, K, h, w)`): resized to the images first, corners aligned, if they differ.
        iterations (`int`): how often.
        dilations (`Sequence[int]`): distances of the neighbors in pixels, 8 at each.

    Returns:
        `torch.Tensor` of shape `(B, K, H, W)`, float32.
    """
    images, scores = images.float(), scores.float()
    if scores.shape[-2:] != images.shape[-2:]:
        scores = F.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=True)
    affinity = color_affinity(images, color_std(images, dilations), dilations)
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


def color_affinity(images: torch.Tensor, std: torch.Tensor, dilations: Sequence[int]) -> torch.Tensor:
    """Weights of the neighbors, `(B, 8 * dilations, H, W)`; a pixel's add up to 1."""
    width = 1e-8 + 0.1 * std
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


__all__ = ["choose_classes", "class_probabilities", "encode_words", "refine_scores", "window_scores", "word_scores"]
