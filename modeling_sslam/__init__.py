"""SSLAM for transformers: importing this package registers its classes with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
)

from .configuration_sslam import SSLAMConfig
from .feature_extraction_sslam import DATASET_PRESETS, SSLAMFeatureExtractor
from .modeling_sslam import SSLAMForAudioClassification, SSLAMModel, SSLAMPreTrainedModel

AutoConfig.register(SSLAMConfig.model_type, SSLAMConfig)
AutoFeatureExtractor.register(SSLAMConfig, SSLAMFeatureExtractor)
AutoModel.register(SSLAMConfig, SSLAMModel)
AutoModelForAudioClassification.register(SSLAMConfig, SSLAMForAudioClassification)

__all__ = [
    "DATASET_PRESETS",
    "SSLAMConfig",
    "SSLAMFeatureExtractor",
    "SSLAMForAudioClassification",
    "SSLAMModel",
    "SSLAMPreTrainedModel",
]
