"""
From what users have (folders, the output of annotation tools, data sets of the Hub) to samples.

[`load_segmentation_dataset`] gives splits of `{"image": RGB image, "mask": (h, w) class ids}`; ids and colors as
they are stored become class ids 0…K − 1 here and nowhere else. [`check_dataset`] reads all of it and reports.
"""

from .check import check_dataset
from .classes import ClassTable, ade20k_classes, default_palette, parse_classes
from .folders import IMAGE_SUFFIXES
from .loading import SegmentationData, load_segmentation_dataset
from .reading import NAMELESS, SampleReader, file_stem, name_of, read_image, shown_address


__all__ = [
    "IMAGE_SUFFIXES",
    "NAMELESS",
    "ClassTable",
    "SampleReader",
    "SegmentationData",
    "ade20k_classes",
    "check_dataset",
    "default_palette",
    "file_stem",
    "load_segmentation_dataset",
    "name_of",
    "parse_classes",
    "read_image",
    "shown_address",
]
