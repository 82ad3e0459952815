"""The image processor under the name and backend that transformers prefers where torchvision is installed."""

from transformers.image_processing_backends import TorchvisionBackend

from .image_processing_denseclip import DenseCLIPImageProcessorBase, DenseCLIPImageProcessorKwargs


class DenseCLIPImageProcessor(DenseCLIPImageProcessorBase, TorchvisionBackend):
    __doc__ = DenseCLIPImageProcessorBase.__doc__
    valid_kwargs = DenseCLIPImageProcessorKwargs
