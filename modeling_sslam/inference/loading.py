"""Models from folders and from the Hub, and what is there instead of them."""

from pathlib import Path
from typing import TypeVar

import torch

from ..common.errors import InferenceError
from ..configuration_sslam import SSLAMConfig
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMPreTrainedModel
from .devices import resolve_device, resolve_dtype
from .packed_blocks import PRECISIONS, can_optimize, optimize_for_cpu

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


def speed_up(model: Model, dtype: str | torch.dtype) -> Model:
    """The loaded model with faster blocks where its device and the processor have them: see [`optimize_for_cpu`].

    Args:
        dtype: As it was given to [`load_pretrained`].

    Raises:
        InferenceError: If "int8" is asked for and cannot be had.
    """
    precision = "int8" if dtype == "int8" else str(model.dtype).removeprefix("torch.")
    on_cpu = model.device.type == "cpu"
    if precision == "int8" and not on_cpu:
        raise InferenceError(f"int8 is for CPUs, and the model is on {model.device}: take cpu, or bfloat16.")
    return optimize_for_cpu(model, precision) if on_cpu and _has_kernels(precision) else model


def _has_kernels(precision: str) -> bool:
    # What was asked for by name is tried, so that the error says what is missing.
    return precision == "int8" or (precision in PRECISIONS and can_optimize(precision))
