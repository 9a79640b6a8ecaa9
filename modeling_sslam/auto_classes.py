"""Extension of transformers' lookup of feature extractors to the published layouts."""

from functools import wraps
from typing import Any


def extend_feature_extractor_lookup(mixin: Any) -> None:
    """Let `AutoFeatureExtractor` and `pipeline` load published checkpoints, which have no preprocessor_config.json.

    Both look for that file before they ask for the model's type, and give up without it. No table of transformers
    tells them otherwise, so the method that looks for it is wrapped. A file that this method finds takes precedence.

    Args:
        mixin: Transformers' `FeatureExtractionMixin`.
    """
    original = mixin.get_feature_extractor_dict.__func__

    @wraps(original)
    def get_feature_extractor_dict(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        try:
            return original(cls, pretrained_model_name_or_path, **kwargs)
        except OSError:
            # A concrete class, not AutoFeatureExtractor, was asked for its own file.
            if cls is not mixin:
                raise
            from .feature_extraction_sslam import published_front_end

            found = published_front_end(pretrained_model_name_or_path, kwargs)
            if found is None:
                raise
            return found

    mixin.get_feature_extractor_dict = classmethod(get_feature_extractor_dict)
