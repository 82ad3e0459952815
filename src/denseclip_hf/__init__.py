"""DenseCLIP (Rao et al. 2022) for transformers. Importing the package registers its classes with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from .configuration_denseclip import CLIPResNetConfig, CLIPResNetVisionConfig, DenseCLIPConfig
from .modeling_clip_resnet import CLIPResNetModel, CLIPResNetVisionModel
from .modeling_denseclip import DenseCLIPForSemanticSegmentation, DenseCLIPSemanticSegmenterOutput


__version__ = "0.1.0"

AutoConfig.register(CLIPResNetVisionConfig.model_type, CLIPResNetVisionConfig)
AutoConfig.register(CLIPResNetConfig.model_type, CLIPResNetConfig)
AutoConfig.register(DenseCLIPConfig.model_type, DenseCLIPConfig)
AutoModel.register(CLIPResNetVisionConfig, CLIPResNetVisionModel)
AutoModel.register(CLIPResNetConfig, CLIPResNetModel)
AutoModelForSemanticSegmentation.register(DenseCLIPConfig, DenseCLIPForSemanticSegmentation)
# The pipeline asks this table of names, which `register` does not fill, and warns about every model not in it.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[DenseCLIPConfig.model_type] = DenseCLIPForSemanticSegmentation.__name__

__all__ = [
    "CLIPResNetConfig",
    "CLIPResNetModel",
    "CLIPResNetVisionConfig",
    "CLIPResNetVisionModel",
    "DenseCLIPConfig",
    "DenseCLIPForSemanticSegmentation",
    "DenseCLIPSemanticSegmenterOutput",
]
