"""The built-in example, made without a download: drawn street scenes with masks, and a tiny CLIP for their words.

A seed comes in; a data set folder ([`make_example_dataset`]) and a CLIP directory ([`make_example_clip`]) come out.
"""

from .scenes import draw_scene, make_example_dataset
from .tiny_clip import example_clip_model, example_tokenizer, make_example_clip


__all__ = ["draw_scene", "example_clip_model", "example_tokenizer", "make_example_clip", "make_example_dataset"]
