"""Files of a model folder, checked before anything is built from them.

A folder comes from anywhere: its numbers may be of any size and its values of any type.
"""

import json
from pathlib import Path
from typing import Any

import torch

from ..configuration_sslam import SSLAMConfig
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMPreTrainedModel

# Far above any index or configuration: 100 000 labels need 4 MB.
MAX_JSON_BYTES = 8 << 20
# Frames (22 minutes) that a clip may be padded to, if the model does not take more.
MAX_FRAMES = 1 << 17
# Range in Hz. No model of this kind has a rate outside it.
SAMPLING_RATES = (1_000, 1_000_000)


class ModelFolderError(ValueError):
    """A file of a model folder is damaged, or contradicts another. The message names the file or the value."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds settings by name.

    Raises:
        ModelFolderError: If the file is too large, no JSON, or holds anything else.
        OSError: If it cannot be read.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ModelFolderError(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that settings may take.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ModelFolderError(f"{path} is nested too deeply.") from error
    except ValueError as error:
        raise ModelFolderError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds a {type(content).__name__}, not settings by name.")
    return content


def shard_names(index: Path) -> list[str]:
    """Return the names of the files that an index of sharded weights refers to. They lie in the index's folder.

    Raises:
        ModelFolderError: If the index has no `weight_map`, or it holds anything but names of files beside the index.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFolderError(f"{index} has no weight_map from the weights' names to their files.")
    names = list(weight_map.values())
    for name in names:
        is_name = isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
        if not is_name or name.endswith(".json"):
            raise ModelFolderError(
                f"{index} refers to {str(name)[:100]!r}, which is no file of weights in its folder."
            )
    return sorted(set(names))


def expected_shapes(model_class: type[SSLAMPreTrainedModel], config: SSLAMConfig) -> dict[str, torch.Size]:
    """Return the shapes of a model's weights without building it."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}


def check_front_end(extractor: SSLAMFeatureExtractor, config: SSLAMConfig) -> None:
    """Compare a feature extractor's sizes with its model's.

    Raises:
        ModelFolderError: If the model could not take the extractor's output, or a value is no sensible number.
    """
    for name in ("num_mel_bins", "patch_size"):
        ours, models = getattr(extractor, name), getattr(config, name)
        if type(ours) is not int or ours != models:
            raise _contradiction(name, ours, f"must be the model's, {models}")
    longest = max(config.max_position_embeddings * config.patch_size, MAX_FRAMES)
    if type(extractor.max_length) is not int or not 0 < extractor.max_length <= longest:
        raise _contradiction("max_length", extractor.max_length, f"must be an integer from 1 to {longest} frames")
    low, high = SAMPLING_RATES
    if type(extractor.sampling_rate) is not int or not low <= extractor.sampling_rate <= high:
        raise _contradiction("sampling_rate", extractor.sampling_rate, f"must be an integer from {low} to {high} Hz")
    for name in ("mean", "std", "padding_value"):
        value = getattr(extractor, name)
        if type(value) not in (int, float) or not abs(value) < 1e6:
            raise _contradiction(name, value, "must be a finite number")


def _contradiction(name: str, value: object, message: str) -> ModelFolderError:
    return ModelFolderError(f"The feature extractor's {name}={str(value)[:100]} {message}.")
