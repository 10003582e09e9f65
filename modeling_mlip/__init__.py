# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""MLIP (arXiv 2406.01460) for Transformers. Importing it registers `model_type` "mlip" with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    CLIPProcessor,
    CLIPTokenizer,
)

from .configuration_mlip import MLIPConfig, MLIPTextConfig, MLIPVisionConfig
from .modeling_mlip import (
    MLIPForImageClassification,
    MLIPModel,
    MLIPPreTrainedModel,
    MLIPTextModel,
    MLIPTextModelWithProjection,
    MLIPVisionModel,
    MLIPVisionModelWithProjection,
)

for _config, _model in ((MLIPConfig, MLIPModel), (MLIPTextConfig, MLIPTextModel), (MLIPVisionConfig, MLIPVisionModel)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
AutoModelForZeroShotImageClassification.register(MLIPConfig, MLIPModel)
AutoModelForImageClassification.register(MLIPConfig, MLIPForImageClassification)
AutoTokenizer.register(MLIPConfig, tokenizer_class=CLIPTokenizer)
AutoImageProcessor.register(
    MLIPConfig, image_processor_classes={"torchvision": CLIPImageProcessor, "pil": CLIPImageProcessorPil}
)
AutoProcessor.register(MLIPConfig, CLIPProcessor)

__all__ = [
    "MLIPConfig",
    "MLIPForImageClassification",
    "MLIPModel",
    "MLIPPreTrainedModel",
    "MLIPTextConfig",
    "MLIPTextModel",
    "MLIPTextModelWithProjection",
    "MLIPVisionConfig",
    "MLIPVisionModel",
    "MLIPVisionModelWithProjection",
]
