"""Loading of published checkpoints by `from_pretrained`, without a conversion and without the code beside them.

The published repositories (`ta012/SSLAM_*`, `worstchan/EAT-*`) hold weights and settings under the names of a class
`EATModel` with `model_type` "eat", and no preprocessor_config.json. Importing this module lets our classes read them:
the classes translate the settings, and rename each weight while it is read.

This module does not travel beside saved weights, so it may use AudioSet's class names, which do not travel either.
"""

import re
from collections.abc import Mapping
from typing import Any

from .common.labels import AUDIOSET_NUM_LABELS, audioset_labels
from .configuration_sslam import PUBLISHED_LAYOUTS, PublishedLayout, SSLAMConfig
from .layouts import CLASSIFIER_NORM_EPS, HUB_CONSTANTS, HUB_EAT, HUB_SETTINGS, PUBLISHED_MODEL_TYPE, Layout

# Values that EATModel's configuration class has for settings that a config.json leaves out.
HUB_DEFAULTS: dict[str, Any] = {
    "mlp_ratio": 4.0,
    "num_classes": 527,
    "img_size": [1024, 128],
    "model_variant": "pretrain",
}
# Keys of a config.json that are the same in every layout.
COMMON_KEYS = ("_commit_hash", "_name_or_path", "dtype", "name_or_path", "torch_dtype", "transformers_version")


def contradiction(settings: Mapping[str, Any]) -> str | None:
    """Find a setting of EATModel with which it computes other numbers than SSLAM and EAT.

    Returns:
        A sentence about the first such setting, or None.
    """
    for name, expected in HUB_CONSTANTS.items():
        if (value := settings.get(name)) is not None and value != expected:
            return (
                f"The checkpoint's settings state {name}={value!r}. SSLAM and EAT have {expected!r}, so the "
                "converted model would compute other numbers."
            )
    if settings.get("stride", settings.get("patch_size")) != settings.get("patch_size"):
        return f"The checkpoint's patches overlap (stride={settings['stride']}), but SSLAM's do not."
    return None


def encoder_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `SSLAMConfig` that EATModel's settings state directly."""
    return {ours: settings[theirs] for ours, theirs in HUB_SETTINGS if settings.get(theirs) is not None}


def clip_frames(settings: Mapping[str, Any]) -> int | None:
    """Return the frames of a training clip, if EATModel's settings state them."""
    return (settings.get("img_size") or [None])[0]


def classifier_fields(num_labels: int) -> dict[str, Any]:
    """Return the names of the classes and the problem type that a number of classes implies.

    Only AudioSet's 527 classes imply either.
    """
    if num_labels != AUDIOSET_NUM_LABELS:
        return {}
    return {
        "id2label": dict(enumerate(audioset_labels())),
        "label2id": {label: index for index, label in enumerate(audioset_labels())},
        "problem_type": "multi_label_classification",
    }


def eat_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn EATModel's config.json into one of `SSLAMConfig`.

    Raises:
        ValueError: If EATModel with these settings computes other numbers than SSLAM and EAT.
    """
    if problem := contradiction(settings):
        raise ValueError(problem)
    settings = HUB_DEFAULTS | settings
    fields = {name: settings[name] for name in COMMON_KEYS if name in settings}
    fields |= {"model_type": SSLAMConfig.model_type, "architectures": ["SSLAMModel"]} | encoder_fields(settings)
    try:
        width = fields.get("hidden_size", SSLAMConfig.hidden_size)
        fields["intermediate_size"] = int(width * settings["mlp_ratio"])
        fields["max_length"] = clip_frames(settings)
        if settings["model_variant"] == "finetune":
            num_labels = int(settings["num_classes"])
            fields |= {
                "architectures": ["SSLAMForAudioClassification"],
                "num_labels": num_labels,
                "classifier_norm_eps": CLASSIFIER_NORM_EPS["hub-eat"],
            } | classifier_fields(num_labels)
            if len(names := settings.get("id2label") or {}) == num_labels:
                fields |= {"id2label": names, "label2id": settings.get("label2id")}
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"The checkpoint's settings describe no valid model. {error}") from error
    return fields


def eat_front_end(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn EATModel's config.json into the arguments of `SSLAMFeatureExtractor`.

    The settings state the length of a clip, but not how inputs were normalised. All published checkpoints of this
    layout were trained on AudioSet, and the published code normalises by its mean and standard deviation.
    """
    from transformers.utils import logging

    from .feature_extraction_sslam import DATASET_PRESETS

    config = SSLAMConfig.from_dict(settings)
    preset = DATASET_PRESETS["audioset"]
    if "SSLAMForAudioClassification" in config.architectures and config.num_labels != AUDIOSET_NUM_LABELS:
        logging.get_logger(__name__).warning_once(
            f"The checkpoint has {config.num_labels} classes, so it may have been fine-tuned on another data set than "
            "AudioSet. It does not state how its inputs were normalised; AudioSet's mean and standard deviation are "
            "used. SSLAMFeatureExtractor.for_dataset has others."
        )
    return {
        "feature_extractor_type": "SSLAMFeatureExtractor",
        "mean": preset["mean"],
        "std": preset["std"],
        "max_length": config.max_length,
        "num_mel_bins": config.num_mel_bins,
        "patch_size": config.patch_size,
    }


def key_mapping(layout: Layout) -> dict[str, str]:
    r"""Return a table of names as regular expressions, in the form that transformers takes.

    A name begins with the layout's prefix, and none of ours does, so weights in our own layout keep their names. Each
    expression has at most one group, for transformers 5 replaces only `\1`.
    """
    mapping = {}
    for our_prefix, prefix, names in layout.parts:
        for ours, theirs in names:
            pattern = re.escape(prefix + theirs).replace(r"\*", r"(\d+)")
            mapping[rf"^{pattern}(?![^.])"] = (our_prefix + ours).replace("*", r"\1")
    return mapping


_KEY_MAPPING = key_mapping(HUB_EAT)


def published_key_renamed(key: str) -> str:
    """Return our name of a weight under its published name, and any other name as it is."""
    for pattern, ours in _KEY_MAPPING.items():
        key, matches = re.subn(pattern, ours, key)
        if matches:
            break
    return key


PUBLISHED_LAYOUTS[PUBLISHED_MODEL_TYPE] = PublishedLayout(eat_settings, eat_front_end, _KEY_MAPPING)
