"""DenseCLIP (Rao et al. 2022) for transformers. Importing the package registers its classes with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it without torchvision
from transformers.utils import is_torchvision_available

from .configuration_clip_resnet import CLIPResNetConfig, CLIPResNetVisionConfig
from .configuration_denseclip import DenseCLIPConfig
from .image_processing_denseclip import DenseCLIPImageProcessorPil
from .metrics import MeanBoundaryIoU, MeanIoU
from .modeling_clip_resnet import CLIPResNetModel, CLIPResNetVisionModel
from .modeling_denseclip import DenseCLIPForSemanticSegmentation, DenseCLIPSemanticSegmenterOutput
from .trainer import DenseCLIPTrainer
from .training import DenseCLIPTrainingArguments


_image_processors: dict[str, type] = {"pil": DenseCLIPImageProcessorPil}
if is_torchvision_available():  # without it the class would be registered, chosen and fail
    from .image_processing_denseclip_torchvision import DenseCLIPImageProcessor

    _image_processors["torchvision"] = DenseCLIPImageProcessor
else:
    DenseCLIPImageProcessor = DenseCLIPImageProcessorPil  # type: ignore[misc, assignment]


__version__ = "0.1.0"

AutoConfig.register(CLIPResNetVisionConfig.model_type, CLIPResNetVisionConfig)
AutoConfig.register(CLIPResNetConfig.model_type, CLIPResNetConfig)
AutoConfig.register(DenseCLIPConfig.model_type, DenseCLIPConfig)
AutoModel.register(CLIPResNetVisionConfig, CLIPResNetVisionModel)
AutoModel.register(CLIPResNetConfig, CLIPResNetModel)
AutoImageProcessor.register(DenseCLIPConfig, image_processor_classes=_image_processors)
AutoModelForSemanticSegmentation.register(DenseCLIPConfig, DenseCLIPForSemanticSegmentation)

__all__ = [
    "CLIPResNetConfig",
    "CLIPResNetModel",
    "CLIPResNetVisionConfig",
    "CLIPResNetVisionModel",
    "DenseCLIPConfig",
    "DenseCLIPForSemanticSegmentation",
    "DenseCLIPImageProcessor",
    "DenseCLIPSemanticSegmenterOutput",
    "DenseCLIPTrainer",
    "DenseCLIPTrainingArguments",
    "MeanBoundaryIoU",
    "MeanIoU",
]
