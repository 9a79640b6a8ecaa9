"""Loading of models from folders and from the Hub, with errors that name the files or weights found instead."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from ..common.errors import InferenceError
from ..common.model_folder import check_front_end, expected_shapes, read_json, shard_names
from ..common.text import escape_controls
from ..configuration_sslam import SSLAMConfig
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMPreTrainedModel
from ..onednn_sslam import is_allowed
from ..published import published_key_renamed
from .devices import resolve_device, resolve_dtype
from .packed_blocks import PRECISIONS, Model, can_optimize, optimize_for_cpu

# Weights that an error lists by name.
MAX_NAMES = 8


def load_pretrained(
    model_class: type[Model],
    model: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    revision: str | None,
    remedy: str = "",
) -> tuple[Model, SSLAMFeatureExtractor]:
    """Load a model to a device, with its feature extractor. No code from the folder or repository is run.

    The sizes that the configurations state are compared with the stored weights before anything is built.

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
        for name in ("config.json", "preprocessor_config.json"):
            if path := _find(model, name, revision):
                read_json(path)
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
        config = SSLAMConfig.from_pretrained(model, revision=revision or "main")
        extractor = SSLAMFeatureExtractor.from_pretrained(model, revision=revision or "main")
        check_front_end(extractor, config)
        if missing := _missing_weights(model_class, config, _stored_shapes(model, revision)):
            others = f" and {len(missing) - MAX_NAMES} more" if len(missing) > MAX_NAMES else ""
            raise InferenceError(f"{model} has no weights for {', '.join(missing[:MAX_NAMES])}{others}.{remedy}")
        loaded: Any = model_class.from_pretrained(model, revision=revision or "main", dtype=resolve_dtype(dtype))
    except InferenceError:
        raise
    # The folder's files may hold any type where a number is expected.
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        where = "" if Path(model).is_dir() else " (no such folder here, so it was looked for on the Hub)"
        raise InferenceError(f"{model} cannot be loaded{where}: {escape_controls(str(error))}") from error
    return loaded.to(device), extractor


def _find(model: str | Path, name: str, revision: str | None) -> Path | None:
    """Return the path of a file of a model, downloaded if it lies on the Hub, or None if the model lacks it."""
    path = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(path) if path else None


def _stored_shapes(model: str | Path, revision: str | None) -> dict[str, torch.Size]:
    """Return the shapes of a model's stored weights by our names, without reading the weights."""
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        if path := _find(model, name, revision):
            break
    else:
        raise OSError("it holds no weights: neither model.safetensors nor pytorch_model.bin.")
    names = shard_names(path) if path.name.endswith(".index.json") else [path.name]
    shapes: dict[str, torch.Size] = {}
    for name in names:
        if (path := _find(model, name, revision)) is None:
            raise OSError(f"its index of weights refers to {name}, which is not there.")
        stored = load_state_dict(str(path), map_location="meta")
        shapes |= {published_key_renamed(key): tensor.shape for key, tensor in stored.items()}
    return shapes


def _missing_weights(
    model_class: type[SSLAMPreTrainedModel], config: SSLAMConfig, stored: dict[str, torch.Size]
) -> list[str]:
    """Return the names of weights that a model has and its files lack.

    Raises:
        ValueError: If weights have other shapes than the configuration states.
    """

    def core(name: str) -> str:
        # An encoder can be loaded from the files of a model with a head, and the reverse.
        return name.removeprefix(f"{model_class.base_model_prefix}.")

    shapes = {core(name): shape for name, shape in stored.items()}
    expected = expected_shapes(model_class, config)
    for name, shape in expected.items():
        if (found := shapes.get(core(name), shape)) != shape:
            raise ValueError(
                f"By the sizes in config.json {name} has shape {tuple(shape)}, but the weight has {tuple(found)}."
            )
    return sorted(name for name in expected if core(name) not in shapes)


def speed_up(model: Model, dtype: str | torch.dtype, compile: bool = False) -> Model:
    """Optimise a loaded model by [`optimize_for_cpu`], if it is on a CPU that has kernels for its precision.

    With `SSLAM_ONEDNN=0` in the environment only "int8", which is asked for by name, is optimised.

    Args:
        model: Encoder or classifier.
        dtype: The dtype given to [`load_pretrained`].
        compile: Whether the model will be compiled. It then stays as it is.

    Raises:
        InferenceError: If "int8" is asked for, and the device or the processor cannot do it, or `compile` is set.
    """
    if compile:
        if dtype == "int8":
            raise InferenceError("int8 cannot be compiled: take another dtype, or leave out compile.")
        return model
    precision = "int8" if dtype == "int8" else str(model.dtype).removeprefix("torch.")
    on_cpu = model.device.type == "cpu"
    if precision == "int8" and not on_cpu:
        raise InferenceError(f"int8 is for CPUs, and the model is on {model.device}: take cpu, or bfloat16.")
    return optimize_for_cpu(model, precision) if on_cpu and _has_kernels(precision) else model


def _has_kernels(precision: str) -> bool:
    # int8 was asked for by name. Try it even without kernels: the error says what is missing.
    return precision == "int8" or (precision in PRECISIONS and is_allowed() and can_optimize(precision))
