"""Loading of models from folders and from the Hub, with errors that say what was found instead."""

from pathlib import Path
from typing import Any

import torch

from ..common.errors import InferenceError
from ..configuration_sslam import SSLAMConfig
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..onednn_sslam import is_allowed
from .devices import resolve_device, resolve_dtype
from .packed_blocks import PRECISIONS, Model, can_optimize, optimize_for_cpu


def load_pretrained(
    model_class: type[Model],
    model: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    revision: str | None,
    remedy: str = "",
) -> tuple[Model, SSLAMFeatureExtractor]:
    """Load a model to a device, with its feature extractor. No code from the folder or repository is run.

    Args:
        model_class: Class of the model.
        model: Folder, or OWNER/NAME on the Hub.
        device: See [`resolve_device`].
        dtype: See [`resolve_dtype`].
        revision: Branch, tag or commit on the Hub.
        remedy: Sentence that the error ends with if weights of this class are missing.

    Raises:
        InferenceError: If there is no SSLAM model, if it lacks weights of this class, or if there is no such device.
    """
    device = resolve_device(device)
    try:
        # Transformers loads any model into this class, and initialises missing weights at random.
        settings, _ = SSLAMConfig.get_config_dict(model, revision=revision)
        if not settings:
            raise InferenceError(
                f"{model} has no config.json: it is no folder of a model. `sslam convert {model} OUT` makes one of a "
                "checkpoint of fairseq or of the Earth Species Project."
            )
        if settings.get("model_type") != SSLAMConfig.model_type:
            raise InferenceError(
                f"{model} holds a model of type {settings.get('model_type')!r}, not 'sslam'. Checkpoints of "
                "fairseq are converted first: `sslam convert`."
            )
        extractor = SSLAMFeatureExtractor.from_pretrained(model, revision=revision or "main")
        model_and_info: Any = model_class.from_pretrained(
            model, revision=revision or "main", dtype=resolve_dtype(dtype), output_loading_info=True
        )
        loaded, loading = model_and_info
    except (OSError, ValueError) as error:
        where = "" if Path(model).is_dir() else " (no such folder here, so it was looked for on the Hub)"
        raise InferenceError(f"{model} cannot be loaded{where}: {error}") from error
    if loading["missing_keys"]:
        raise InferenceError(f"{model} has no weights for {', '.join(sorted(loading['missing_keys']))}.{remedy}")
    return loaded.to(device), extractor


def speed_up(model: Model, dtype: str | torch.dtype) -> Model:
    """Optimise a loaded model by [`optimize_for_cpu`], if it is on a CPU that has kernels for its precision.

    With `SSLAM_ONEDNN=0` in the environment only "int8", which is asked for by name, is optimised.

    Args:
        model: Encoder or classifier.
        dtype: The dtype given to [`load_pretrained`].

    Raises:
        InferenceError: If "int8" is asked for, and the device or the processor cannot do it.
    """
    precision = "int8" if dtype == "int8" else str(model.dtype).removeprefix("torch.")
    on_cpu = model.device.type == "cpu"
    if precision == "int8" and not on_cpu:
        raise InferenceError(f"int8 is for CPUs, and the model is on {model.device}: take cpu, or bfloat16.")
    return optimize_for_cpu(model, precision) if on_cpu and _has_kernels(precision) else model


def _has_kernels(precision: str) -> bool:
    # int8 was asked for by name. Try it even without kernels: the error says what is missing.
    return precision == "int8" or (precision in PRECISIONS and is_allowed() and can_optimize(precision))
