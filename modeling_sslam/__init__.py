"""SSLAM for transformers: importing this package registers its classes with transformers' Auto classes.

The import itself loads neither torch nor transformers. The classes are imported when they are first used, and they are
registered when transformers imports its Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .after_import import after_import
from .auto_classes import extend_feature_extractor_lookup
from .layouts import PUBLISHED_MODEL_TYPE
from .lazy_class import LazyClass

if TYPE_CHECKING:
    from .configuration_sslam import SSLAMConfig
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
    "SSLAMConfig": "configuration_sslam",
    "SSLAMFeatureExtractor": "feature_extraction_sslam",
    "SSLAMForAudioClassification": "modeling_sslam",
    "SSLAMForPreTraining": "modeling_sslam_pretraining",
    "SSLAMForPreTrainingOutput": "modeling_sslam_pretraining",
    "SSLAMModel": "modeling_sslam",
    "SSLAMPreTrainedModel": "modeling_sslam",
}


def _load(name: str) -> Any:
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    config = _load("SSLAMConfig")
    AutoConfig.register(config.model_type, config)
    # `AutoConfig.register` refuses a second type for a class. A model of this type in transformers would stay.
    if PUBLISHED_MODEL_TYPE not in CONFIG_MAPPING:
        CONFIG_MAPPING.register(PUBLISHED_MODEL_TYPE, config)


def _register(mapping: Any, name: str) -> None:
    """Register a placeholder in the table of AutoFeatureExtractor, AutoModel and so on."""
    config = _load("SSLAMConfig")
    mapping.register(config, LazyClass(f"{__name__}.{_MODULES[name]}", name, mapping, config))


def _register_feature_extractor() -> None:
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

    extend_feature_extractor_lookup(FeatureExtractionMixin)
    _register(FEATURE_EXTRACTOR_MAPPING, "SSLAMFeatureExtractor")


def _register_models() -> None:
    from transformers.models.auto import modeling_auto

    _register(modeling_auto.MODEL_MAPPING, "SSLAMModel")
    _register(modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING, "SSLAMForAudioClassification")
    _register(modeling_auto.MODEL_FOR_PRETRAINING_MAPPING, "SSLAMForPreTraining")


after_import(f"{__name__}.configuration_sslam", lambda: import_module(".published", __name__))
# Importing the tables here would take seconds, also for `sslam --help`.
for _table, _callback in (
    ("configuration_auto", _register_config),
    ("feature_extraction_auto", _register_feature_extractor),
    ("modeling_auto", _register_models),
):
    after_import(f"transformers.models.auto.{_table}", _callback)


def __getattr__(name: str) -> Any:
    if name in _MODULES.values():
        return import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES.values()})
