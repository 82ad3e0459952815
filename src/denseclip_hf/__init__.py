"""DenseCLIP (Rao et al. 2022) for transformers: segmentation guided by words.

Importing the package registers its models with the Auto classes. What only training and evaluation need is loaded when
it is first used.
"""

import importlib
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it without torchvision
from transformers.utils import is_torchvision_available

from .model.configuration_clip_resnet import CLIPResNetConfig, CLIPResNetVisionConfig
from .model.configuration_denseclip import DenseCLIPConfig
from .model.image_processing_denseclip import DenseCLIPImageProcessorPil
from .model.modeling_clip_resnet import CLIPResNetModel, CLIPResNetVisionModel
from .model.modeling_denseclip import (
    DenseCLIPForSemanticSegmentation,
    DenseCLIPModel,
    DenseCLIPSemanticSegmenterOutput,
)
from .model.processing_denseclip import DenseCLIPProcessor
from .pipelines import register_pipelines


if TYPE_CHECKING:
    from .metrics import MeanBoundaryIoU, MeanIoU
    from .training import DenseCLIPTrainer, DenseCLIPTrainingArguments

_image_processors: dict[str, type] = {"pil": DenseCLIPImageProcessorPil}
if is_torchvision_available():  # without it the class would be registered, chosen and fail
    from .model.image_processing_denseclip_torchvision import DenseCLIPImageProcessor

    _image_processors["torchvision"] = DenseCLIPImageProcessor
else:
    DenseCLIPImageProcessor = DenseCLIPImageProcessorPil  # type: ignore[misc, assignment]


__version__ = "0.1.0"

AutoConfig.register(CLIPResNetVisionConfig.model_type, CLIPResNetVisionConfig)
AutoConfig.register(CLIPResNetConfig.model_type, CLIPResNetConfig)
AutoConfig.register(DenseCLIPConfig.model_type, DenseCLIPConfig)
AutoModel.register(CLIPResNetVisionConfig, CLIPResNetVisionModel)
AutoModel.register(CLIPResNetConfig, CLIPResNetModel)
AutoModel.register(DenseCLIPConfig, DenseCLIPModel)
AutoImageProcessor.register(DenseCLIPConfig, image_processor_classes=_image_processors)
AutoProcessor.register(DenseCLIPConfig, DenseCLIPProcessor)
AutoModelForSemanticSegmentation.register(DenseCLIPConfig, DenseCLIPForSemanticSegmentation)
register_pipelines()

# Loaded when first used (PEP 562): the module of each name.
_LATER = {
    "DenseCLIPTrainer": ".training",
    "DenseCLIPTrainingArguments": ".training",
    "MeanBoundaryIoU": ".metrics",
    "MeanIoU": ".metrics",
}


def __getattr__(name: str):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LATER[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "CLIPResNetConfig",
    "CLIPResNetModel",
    "CLIPResNetVisionConfig",
    "CLIPResNetVisionModel",
    "DenseCLIPConfig",
    "DenseCLIPForSemanticSegmentation",
    "DenseCLIPImageProcessor",
    "DenseCLIPModel",
    "DenseCLIPProcessor",
    "DenseCLIPSemanticSegmenterOutput",
    "DenseCLIPTrainer",
    "DenseCLIPTrainingArguments",
    "MeanBoundaryIoU",
    "MeanIoU",
]
