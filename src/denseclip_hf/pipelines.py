"""transformers' image-segmentation pipeline, for batches of images of different sizes."""

from typing import Any

from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline

from .model.modeling_denseclip import DenseCLIPForSemanticSegmentation


class DenseCLIPImageSegmentationPipeline(ImageSegmentationPipeline):
    """
    `pipeline("image-segmentation")` with `batch_size > 1` for images of different sizes.

    transformers concatenates the images of a batch, which must then have one size; padding them would change the
    predictions. Our models take lists, and run the images of one size together. Other models are served as ever.
    """

    def preprocess(self, image: Any, *args, **kwargs):  # type: ignore[override]  # as the base class names it
        inputs = super().preprocess(image, *args, **kwargs)
        if isinstance(self.model, DenseCLIPForSemanticSegmentation):
            inputs["pixel_values"] = list(inputs["pixel_values"])
        return inputs

    def _forward(self, model_inputs: Any):  # type: ignore[override]
        images = model_inputs["pixel_values"]
        if isinstance(images, list) and isinstance(images[0], list):
            model_inputs["pixel_values"] = [image for one in images for image in one]
        return super()._forward(model_inputs)


def register_pipelines() -> None:
    """Make `transformers.pipeline` use the classes of this module."""
    PIPELINE_REGISTRY.supported_tasks["image-segmentation"]["impl"] = DenseCLIPImageSegmentationPipeline


__all__ = ["DenseCLIPImageSegmentationPipeline", "register_pipelines"]
