"""From what users have on disk or on the Hub to samples."""

from .loading import SegmentationData, load_segmentation_dataset


__all__ = ["SegmentationData", "load_segmentation_dataset"]
