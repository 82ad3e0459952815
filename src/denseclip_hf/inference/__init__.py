"""
A trained model at work: windows and views, files and videos, drawings of the result.

Images, paths or addresses go in; class ids, probabilities, masks and overlays come out.
"""

from .drawing import (
    colorize,
    comparison_image,
    confusion_image,
    heat_map,
    indexed_image,
    overlay,
    overlay_with_legend,
)
from .predict import Summary, predict_sources
from .segmenter import Segmenter
from .sources import Source, find_sources, read_image_of
from .views import (
    LOADING_DTYPES,
    batches_of_one_size,
    is_native,
    load_model,
    multi_scale_probabilities,
    multi_scale_segmentation,
    published_image_processor,
    segment_in_windows,
    sliding_window_logits,
)


__all__ = [
    "LOADING_DTYPES",
    "Segmenter",
    "Source",
    "Summary",
    "batches_of_one_size",
    "colorize",
    "comparison_image",
    "confusion_image",
    "find_sources",
    "heat_map",
    "indexed_image",
    "is_native",
    "load_model",
    "multi_scale_probabilities",
    "multi_scale_segmentation",
    "overlay",
    "overlay_with_legend",
    "predict_sources",
    "published_image_processor",
    "read_image_of",
    "segment_in_windows",
    "sliding_window_logits",
]
