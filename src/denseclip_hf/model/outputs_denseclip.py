"""What a segmenter returns.

Shapes: B images, K classes, D embedding size, H x W pixels, h x w the grid of the score map.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput


@dataclass
class DenseCLIPSemanticSegmenterOutput(ModelOutput):
    """
    Output of [`DenseCLIPForSemanticSegmentation`].

    Args:
        loss (`torch.Tensor` of shape `()`, returned with `labels`): `decode_loss + auxiliary_loss`.
        decode_loss (`torch.Tensor` of shape `()`, returned with `labels`): cross entropy of the logits.
        auxiliary_loss (`torch.Tensor` of shape `()`, returned with `labels` and text guidance, not by a sliding
            window): cross entropy of the score maps over τ, already weighted.
        logits (`torch.Tensor` of shape `(batch_size, num_labels, height / 4, width / 4)`, or
            `(batch_size, num_labels, height, width)` from a sliding window): class scores before softmax.
        score_maps (`torch.Tensor` of shape `(batch_size, num_labels, h, w)`): cosines of every position's embedding
            with every class's, not divided by τ. Absent without text guidance and from a sliding window.
        text_embeds (`torch.Tensor` of shape `(batch_size, num_labels, projection_dim)`): t', the class embeddings
            in the image's context. Absent like `score_maps`.
        hidden_states (`tuple(torch.Tensor)`, returned with `output_hidden_states=True`): the image encoder's c2 … c5,
            each `(batch_size, channels, height / s, width / s)`, before the score map joins one of them. Absent from a
            sliding window and for a list of pictures.
    """

    loss: torch.Tensor | None = None
    decode_loss: torch.Tensor | None = None
    auxiliary_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    score_maps: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Segmentation(NamedTuple):
    """What one pass over whole images gives; see [`DenseCLIPSemanticSegmenterOutput`]."""

    logits: torch.Tensor
    score_maps: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    feature_maps: tuple[torch.Tensor, ...] | None = None


__all__ = ["DenseCLIPSemanticSegmenterOutput", "Segmentation"]
