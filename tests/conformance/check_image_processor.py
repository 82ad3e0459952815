"""Adapters: transformers' common image processing tests on our image processor."""

import unittest

from tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)
from transformers.utils import is_torchvision_available

from denseclip_hf import DenseCLIPImageProcessor
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil


class DenseCLIPImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **options):
        super().__init__(parent, size={"height": 18, "width": 24}, num_labels=5, do_reduce_labels=True, **options)

    def _get_image_processing_classes(self):
        classes = {"pil": DenseCLIPImageProcessorPil}
        return {**classes, "torchvision": DenseCLIPImageProcessor} if is_torchvision_available() else classes


class DenseCLIPImageProcessingTest(
    ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase
):
    image_processor_tester_class = DenseCLIPImageProcessingTester
    test_cast_dtype = True
