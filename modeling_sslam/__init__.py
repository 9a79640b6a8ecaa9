"""SSLAM for transformers: importing this package registers its classes with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForPreTraining,
)

from .configuration_sslam import SSLAMConfig
from .feature_extraction_sslam import DATASET_PRESETS, SSLAMFeatureExtractor
from .modeling_sslam import SSLAMForAudioClassification, SSLAMModel, SSLAMPreTrainedModel
from .modeling_sslam_pretraining import SSLAMForPreTraining, SSLAMForPreTrainingOutput

AutoConfig.register(SSLAMConfig.model_type, SSLAMConfig)
AutoFeatureExtractor.register(SSLAMConfig, SSLAMFeatureExtractor)
AutoModel.register(SSLAMConfig, SSLAMModel)
AutoModelForAudioClassification.register(SSLAMConfig, SSLAMForAudioClassification)
AutoModelForPreTraining.register(SSLAMConfig, SSLAMForPreTraining)

__all__ = [
    "DATASET_PRESETS",
    "SSLAMConfig",
    "SSLAMFeatureExtractor",
    "SSLAMForAudioClassification",
    "SSLAMForPreTraining",
    "SSLAMForPreTrainingOutput",
    "SSLAMModel",
    "SSLAMPreTrainedModel",
]
