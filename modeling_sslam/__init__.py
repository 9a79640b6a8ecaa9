"""SSLAM for transformers: importing this package registers its classes with transformers' Auto classes.

Feature extractor and models are imported when they are first used. They need parts of transformers that import many
optional packages where those are installed, such as scipy and torchaudio.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    FEATURE_EXTRACTOR_MAPPING,
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
)

from .configuration_sslam import SSLAMConfig
from .lazy_class import LazyClass

if TYPE_CHECKING:
    from .feature_extraction_sslam import DATASET_PRESETS, SSLAMFeatureExtractor
    from .modeling_sslam import SSLAMForAudioClassification, SSLAMModel, SSLAMPreTrainedModel
    from .modeling_sslam_pretraining import SSLAMForPreTraining, SSLAMForPreTrainingOutput

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

_MODULES = {
    "DATASET_PRESETS": "feature_extraction_sslam",
    "SSLAMFeatureExtractor": "feature_extraction_sslam",
    "SSLAMForAudioClassification": "modeling_sslam",
    "SSLAMForPreTraining": "modeling_sslam_pretraining",
    "SSLAMForPreTrainingOutput": "modeling_sslam_pretraining",
    "SSLAMModel": "modeling_sslam",
    "SSLAMPreTrainedModel": "modeling_sslam",
}

AutoConfig.register(SSLAMConfig.model_type, SSLAMConfig)
# Register placeholders in the tables of AutoFeatureExtractor, AutoModel and so on.
for _mapping, _name in (
    (FEATURE_EXTRACTOR_MAPPING, "SSLAMFeatureExtractor"),
    (MODEL_MAPPING, "SSLAMModel"),
    (MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING, "SSLAMForAudioClassification"),
    (MODEL_FOR_PRETRAINING_MAPPING, "SSLAMForPreTraining"),
):
    # The tables are annotated as holding tuples of classes, but hold a class.
    _placeholder: Any = LazyClass(f"{__name__}.{_MODULES[_name]}", _name, _mapping, SSLAMConfig)
    _mapping.register(SSLAMConfig, _placeholder)


def __getattr__(name: str) -> Any:
    if name in _MODULES.values():
        return import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES.values()})
