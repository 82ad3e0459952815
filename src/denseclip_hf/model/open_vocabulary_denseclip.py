"""Segmentation from the score maps alone: any class names or sentences, without training.

Shapes: B images, K classes, D embedding size, H x W pixels, h x w the grid of the score maps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .image_encoder_denseclip import encode_image
from .mixed_sizes_denseclip import forward_by_size
from .prompts_denseclip import ContextPrompts, tokenize_classes
from .resizing_denseclip import resize_argmax
from .sliding_window_denseclip import sliding_window_logits


# Sentences that a class name is put into where a model has learnt no prompt of its own.
ZERO_SHOT_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "there is a {} in the scene.",
    "part of a {} in a photo.",
)
# Prompts that go through the text tower at a time.
PROMPTS_PER_PASS = 1024


@dataclass
class ScoreSegmentation(ModelOutput):
    """
    Output of [`DenseCLIPForSemanticSegmentation.predict_from_scores`].

    Args:
        segmentation (`list[torch.Tensor]`): one `(H, W)` int64 map of class ids 0 … K-1 per image.
        score_maps (`torch.Tensor` of shape `(B, K, h, w)`, or `(B, K, height, width)` from a sliding window): cosines;
            for images given as a list, a list of B tensors `(K, h, w)`.
    """

    segmentation: list[torch.Tensor] | None = None
    score_maps: torch.Tensor | list[torch.Tensor] | None = None


def check_words(texts: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """K classes, each as a list of its phrasings, as they were given.

    Raises:
        ValueError: for no class at all, one that is no text or empty, or one given twice: capital letters, blanks and
            the order of phrasings make no difference.
    """
    if isinstance(texts, str):
        raise ValueError(f"class names must be a list of texts, got the single text {texts!r}.")
    classes: list[list[Any]] = [list(text) if isinstance(text, (list, tuple)) else [text] for text in texts]
    if not all(isinstance(text, str) for phrasings in classes for text in phrasings):
        raise ValueError(f"class names must be texts, got {texts!r}.")
    empty = [number for number, texts in enumerate(classes, 1) if not texts or not all(t.strip() for t in texts)]
    if not classes or empty:
        which = f" (the {empty[0]}. of {len(classes)} is)" if empty else ""
        raise ValueError(f"class names must be at least one, and none of them empty{which}.")
    seen = set()
    for phrasings in classes:
        read = frozenset(" ".join(text.split()).casefold() for text in phrasings)
        if read in seen:
            raise ValueError(f"the class {phrasings[0]!r} is given twice: class names must be all different.")
        seen.add(read)
    return classes


@torch.no_grad()
def encode_texts(
    model: Any,
    texts: Sequence[str | Sequence[str]],
    tokenizer,
    templates: Sequence[str] | None = None,
    use_contexts: bool | None = None,
) -> torch.Tensor:
    """Do what [`DenseCLIPForSemanticSegmentation.encode_texts`] says."""
    config = model.config
    if not config.use_text_guidance:
        raise ValueError(
            "this model has no text guidance (`use_text_guidance=False`), so it can not read class names."
        )
    if use_contexts is None:
        use_contexts = templates is None
    templates = [config.prompt_template] if templates is None else list(templates)
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"`templates` must be sentences with one {{}} each, got {templates}.")
    classes = check_words(texts)
    contexts = config.num_context_tokens if use_contexts else 0
    positions = config.clip_config.text_config.max_position_embeddings
    token_ids, owners = [], []
    for template in templates:
        room: Any = SimpleNamespace(
            prompt_template=template,
            max_class_tokens=positions - contexts,
            num_context_tokens=contexts,
            special_token_ids=config.special_token_ids,
        )
        for index, phrasings in enumerate(classes):
            token_ids += tokenize_classes(phrasings, tokenizer, room)
            owners += [index] * len(phrasings)
    embeds = _encode_prompts(model, token_ids, contexts)
    if len(owners) == len(classes):
        return embeds
    # The mean of unit vectors, as in CLIP's zero-shot classifier, at the prompts' mean length: the context decoder's
    # update then weighs as much as beside a single prompt.
    groups = torch.tensor(owners, device=embeds.device)
    lengths = embeds.float().norm(dim=-1, keepdim=True)
    direction = embeds.new_zeros(len(classes), embeds.shape[1], dtype=torch.float32)
    direction.index_add_(0, groups, embeds.float() / lengths)
    length = embeds.new_zeros(len(classes), 1, dtype=torch.float32).index_add_(0, groups, lengths)
    return (F.normalize(direction, dim=-1) * length / groups.bincount()[:, None]).to(embeds.dtype)


def _encode_prompts(model: Any, token_ids: list[list[int]], num_context_tokens: int) -> torch.Tensor:
    """Embeddings `(P, D)` of P prompts `[SOS, …, EOS]`, the model's contexts put in after SOS if there are any."""
    chunks = []
    for first in range(0, len(token_ids), PROMPTS_PER_PASS):
        layout: Any = SimpleNamespace(
            clip_config=model.config.clip_config,
            num_context_tokens=num_context_tokens,
            class_token_ids=token_ids[first : first + PROMPTS_PER_PASS],
        )
        prompts = ContextPrompts(layout)
        if num_context_tokens:
            prompts.context_vectors = model.prompts.context_vectors
        chunks.append(prompts.to(model.device)(model.clip))
    return torch.cat(chunks)


@torch.no_grad()
def score_maps_of(
    model: Any, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None, use_context_decoder: bool = True
) -> torch.Tensor:
    """
    Cosines `(B, K, h, w)` of `pixel_values` `(B, 3, H, W)` with `text_embeds` `(K, D)`.

    If the model slides, `(B, K, H, W)`: averaged where windows overlap.

    Raises:
        ValueError: if the model has no text guidance, or `text_embeds` another shape.
    """
    config = model.config
    if not config.use_text_guidance:
        raise ValueError("this model has no text guidance (`use_text_guidance=False`), so no score maps.")
    dimension = config.clip_config.projection_dim
    embeds = model.encode_classes() if text_embeds is None else text_embeds.to(model.device, model.dtype)
    if embeds.dim() != 2 or embeds.shape[1] != dimension or not len(embeds):
        raise ValueError(f"`text_embeds` must have the shape (classes, {dimension}), got {tuple(embeds.shape)}.")

    def whole(pixels: torch.Tensor) -> torch.Tensor:
        _, context, grid = encode_image(model.clip, model.pyramid, pixels, config)
        return model.match(embeds, context, grid, use_context_decoder)[0]

    pixel_values = pixel_values.to(model.device, model.dtype)
    if config.inference_mode == "whole":
        return whole(pixel_values)
    return sliding_window_logits(
        whole, pixel_values, config.crop_size, config.stride, config.sliding_window_batch_size
    )


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """`model` in eval mode, and afterwards each of its parts in the mode it was in."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for part, training in modes:
            part.training = training


def predict_from_scores(
    model: Any,
    pixel_values: torch.Tensor | Sequence[torch.Tensor],
    text_embeds: torch.Tensor | None = None,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    use_context_decoder: bool = True,
) -> ScoreSegmentation:
    """Do what [`DenseCLIPForSemanticSegmentation.predict_from_scores`] says."""

    def score(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"score_maps": score_maps_of(model, pixels, text_embeds, use_context_decoder)}

    with eval_mode(model):
        if isinstance(pixel_values, torch.Tensor):
            maps: Any = score(pixel_values)["score_maps"]
        else:
            maps = forward_by_size(score, pixel_values)["score_maps"]
    sizes: list[Any] = [p.shape[-2:] for p in pixel_values] if target_sizes is None else list(target_sizes)
    if len(sizes) != len(maps):
        raise ValueError(f"There are {len(maps)} pictures but {len(sizes)} target sizes.")
    segmentation = [resize_argmax(m[None], size)[0] for m, size in zip(maps, sizes, strict=True)]
    return ScoreSegmentation(segmentation=segmentation, score_maps=maps)


__all__ = [
    "ZERO_SHOT_TEMPLATES",
    "ScoreSegmentation",
    "check_words",
    "encode_texts",
    "eval_mode",
    "predict_from_scores",
    "score_maps_of",
]
