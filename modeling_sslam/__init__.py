"""SSLAM for transformers: importing this package registers its classes with transformers' Auto classes.

The import itself loads neither torch nor transformers. The classes are imported when they are first used. They are
registered when transformers imports its Auto classes; those that are not imported by then have placeholders.
"""

import sys
from functools import partial
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
    # `AutoConfig.register` refuses a second type for a class. A model of this type in transformers takes precedence.
    if PUBLISHED_MODEL_TYPE not in CONFIG_MAPPING:
        CONFIG_MAPPING.register(PUBLISHED_MODEL_TYPE, config)


def _register(name: str, auto_module: str, mapping_name: str) -> None:
    """Register a class in a table of transformers, if that is imported.

    Until the class is imported it has a placeholder there. A class of another name that somebody registered stays.
    """
    if auto_module not in sys.modules:
        return
    config, mapping = _load("SSLAMConfig"), getattr(sys.modules[auto_module], mapping_name)
    module = f"{__name__}.{_MODULES[name]}"
    # A module whose import has begun may lack the class.
    registered = getattr(sys.modules.get(module), name, None) or LazyClass(module, name, config)
    if isinstance(mapping.get(config, None), LazyClass | None):
        mapping.register(config, registered, exist_ok=True)


def _extend_feature_extractors() -> None:
    from transformers.feature_extraction_utils import FeatureExtractionMixin

    extend_feature_extractor_lookup(FeatureExtractionMixin)


after_import(f"{__name__}.configuration_sslam", lambda: import_module(".published", __name__))
# Importing the tables here would take seconds, also for `sslam --help`.
_AUTO = "transformers.models.auto"
after_import(f"{_AUTO}.configuration_auto", _register_config)
after_import(f"{_AUTO}.feature_extraction_auto", _extend_feature_extractors)
for _name, _auto_module, _mapping_name in (
    ("SSLAMFeatureExtractor", f"{_AUTO}.feature_extraction_auto", "FEATURE_EXTRACTOR_MAPPING"),
    ("SSLAMModel", f"{_AUTO}.modeling_auto", "MODEL_MAPPING"),
    ("SSLAMForAudioClassification", f"{_AUTO}.modeling_auto", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING"),
    ("SSLAMForPreTraining", f"{_AUTO}.modeling_auto", "MODEL_FOR_PRETRAINING_MAPPING"),
):
    _callback = partial(_register, _name, _auto_module, _mapping_name)
    after_import(_auto_module, _callback)
    after_import(f"{__name__}.{_MODULES[_name]}", _callback)


def __getattr__(name: str) -> Any:
    if name in _MODULES.values():
        return import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES.values()})
