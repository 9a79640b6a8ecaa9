"""Models from folders and from the Hub, and what is there instead of them."""

from pathlib import Path
from typing import TypeVar

import torch

from ..configuration_sslam import SSLAMConfig
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMPreTrainedModel
from .devices import resolve_device, resolve_dtype
from .errors import InferenceError

Model = TypeVar("Model", bound=SSLAMPreTrainedModel)


def load_pretrained(
    model_class: type[Model],
    model: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    revision: str | None,
    remedy: str = "",
) -> tuple[Model, SSLAMFeatureExtractor]:
    """A model on its device, with its feature extractor. No code from the folder or repository is run.

    Args:
        model: Folder, or OWNER/NAME on the Hub.
        device, dtype: See [`resolve_device`] and [`resolve_dtype`].
        remedy: What to do where weights of this class are missing.

    Raises:
        InferenceError: If there is no SSLAM model there, or not all of this class, or no such device.
    """
    device = resolve_device(device)
    try:
        # Transformers would take any model for this class, and make up weights that are not there.
        settings, _ = SSLAMConfig.get_config_dict(model, revision=revision)
        if not settings:
            raise InferenceError(f"{model} has no config.json: it is no folder of a model.")
        if settings.get("model_type") != SSLAMConfig.model_type:
            raise InferenceError(
                f"{model} holds a model of type {settings.get('model_type')!r}, not 'sslam'. Published checkpoints of "
                "SSLAM and EAT are converted first: python -m conversion."
            )
        extractor = SSLAMFeatureExtractor.from_pretrained(model, revision=revision)
        loaded, loading = model_class.from_pretrained(
            model, revision=revision, dtype=resolve_dtype(dtype), output_loading_info=True
        )
    except (OSError, ValueError) as error:
        where = "" if Path(model).is_dir() else " (no such folder here, so it was looked for on the Hub)"
        raise InferenceError(f"{model} cannot be loaded{where}: {error}") from error
    if loading["missing_keys"]:
        raise InferenceError(f"{model} has no weights for {', '.join(sorted(loading['missing_keys']))}.{remedy}")
    return loaded.to(device), extractor
