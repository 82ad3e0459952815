"""Files and videos in, masks and overlays out; multi-scale views."""

from .drawing import overlay_with_legend
from .views import (
    LOADING_DTYPES,
    colorize,
    comparison_picture,
    load_model,
    multi_scale_probabilities,
    multi_scale_segmentation,
    overlay,
    published_image_processor,
    sliding_window_logits,
)


__all__ = [
    "LOADING_DTYPES",
    "colorize",
    "comparison_picture",
    "load_model",
    "multi_scale_probabilities",
    "multi_scale_segmentation",
    "overlay",
    "overlay_with_legend",
    "published_image_processor",
    "sliding_window_logits",
]
