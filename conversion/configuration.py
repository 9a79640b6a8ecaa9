"""Configuration and feature extractor of a checkpoint, derived from its weights and settings.

Shapes of weights take precedence, then the user's choices, then the settings, then the convention of the published
models. No shape shows the number of heads, the pooling of the classifier or the epsilon of its norm.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from modeling_sslam import DATASET_PRESETS, SSLAMConfig, SSLAMFeatureExtractor
from modeling_sslam.common.labels import AUDIOSET_NUM_LABELS, audioset_labels
from modeling_sslam.common.model_folder import check_front_end
from modeling_sslam.layouts import (
    CLASSIFIER_NORM_EPS,
    FAIRSEQ_ENCODER_CONSTANTS,
    FAIRSEQ_POOLINGS,
    FAIRSEQ_PRETRAINING_CONSTANTS,
    FAIRSEQ_SETTINGS,
    POSITIONS,
    Layout,
)
from modeling_sslam.published import clip_frames, contradiction, encoder_fields

from . import ConversionError
from .reader import Checkpoint

# Channels per attention head in the base and large models.
HEAD_SIZE = 64


class Settings:
    """Settings beside the weights, read alike whether fairseq, EATModel or this project wrote them.

    Attributes:
        all: The settings as they were read.
        is_sslam: Whether they are an `SSLAMConfig`.
        is_fairseq: Whether they are fairseq's.
        is_hub: Whether they are EATModel's config.json.
        is_fine_tuned: Whether fairseq fine-tuned the model.
        pretraining: The settings of fairseq's pre-training run, which a fine-tuned checkpoint holds beside its own.
            Otherwise `all`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.all = settings
        self.is_sslam = settings.get("model_type") == SSLAMConfig.model_type
        self.is_fairseq = isinstance(settings.get("model"), dict)
        self.is_hub = not self.is_sslam and "embed_dim" in settings
        fine_tuned_from = lookup(settings, "model.pretrained_model_args") if self.is_fairseq else None
        self.pretraining = fine_tuned_from if isinstance(fine_tuned_from, dict) else settings
        self.is_fine_tuned = self.is_fairseq and self.pretraining is not settings

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of `SSLAMConfig` that the settings state."""
        if self.is_sslam:
            return {name: value for name, value in self.all.items() if name in SSLAMConfig.__annotations__}
        if self.is_hub:
            return encoder_fields(self.all)
        pairs = FAIRSEQ_SETTINGS if self.is_fairseq else ()
        # In reverse order, so that the table's first path that states a field takes precedence.
        stated = ((ours, lookup(self.pretraining, path)) for ours, path in reversed(pairs))
        return {ours: value for ours, value in stated if value is not None}

    @property
    def max_length(self) -> int | None:
        """Frames of a training clip, if the settings state them."""
        if self.is_fairseq:
            paths = ("model.target_length", "model.modalities.image.target_length", "task.target_length")
            return next((value for path in paths if (value := lookup(self.all, path)) is not None), None)
        if self.is_hub:
            return clip_frames(self.all)
        return self.fields.get("max_length")

    @property
    def dataset(self) -> str:
        """The data set whose mean and standard deviation normalised the inputs."""
        if self.is_fine_tuned and lookup(self.all, "model.esc50_eval"):
            return "esc50"
        if self.is_fine_tuned and lookup(self.all, "model.spcv2_eval"):
            return "speech_commands"
        return "audioset"

    @property
    def problem_type(self) -> str | None:
        """The classifier's `problem_type`, if the settings state it."""
        if self.is_sslam:
            return self.all.get("problem_type")
        if self.is_fine_tuned:
            multi_label = lookup(self.all, "model.audio_mae") and self.dataset == "audioset"
            return "multi_label_classification" if multi_label else "single_label_classification"
        return None

    @property
    def pooling(self) -> str | None:
        """The classifier's pooling, if the settings state it.

        Raises:
            ConversionError: If fairseq pooled in a way that this model lacks.
        """
        if not self.is_fine_tuned:
            return self.fields.get("classifier_pooling")
        mode = lookup(self.all, "model.prediction_mode")
        if mode is not None and mode not in FAIRSEQ_POOLINGS:
            raise ConversionError(
                f"The checkpoint's prediction_mode {mode!r} is not supported; supported are "
                f"{', '.join(name for name in FAIRSEQ_POOLINGS if isinstance(name, str))}."
            )
        return FAIRSEQ_POOLINGS.get(mode)

    def check_constants(self, pretraining: bool) -> None:
        """Check the settings that have one value in all SSLAM and EAT models.

        Args:
            pretraining: Whether to check the settings of the pre-training objective too.

        Raises:
            ConversionError: If a setting has another value, so that the converted model would compute other numbers.
        """
        if self.is_hub and (problem := contradiction(self.all)):
            raise ConversionError(problem)
        constants = FAIRSEQ_ENCODER_CONSTANTS if self.is_fairseq else {}
        if self.is_fairseq and pretraining:
            constants = constants | FAIRSEQ_PRETRAINING_CONSTANTS
        for path, expected in constants.items():
            value = lookup(self.pretraining, path)
            if value is not None and value != expected:
                raise ConversionError(
                    f"The checkpoint's settings state {path}={value!r}. SSLAM and EAT have {expected!r}, so the "
                    "converted model would compute other numbers."
                )


def lookup(settings: dict[str, Any], path: str) -> Any:
    """Return the setting at a dotted path, or None if there is none. omegaconf's `${other.path}` is followed.

    Raises:
        ConversionError: If references form a circle.
    """
    seen: list[str] = []
    while path not in seen:
        seen.append(path)
        value: Any = settings
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if reference is None:
            return value
        path = reference[1]
    raise ConversionError(f"The checkpoint's settings refer in a circle: {' to '.join([*seen, path])}.")


@dataclass(frozen=True)
class Choices:
    """The user's settings for the model. None leaves a setting to the checkpoint.

    Attributes:
        num_attention_heads: Attention heads of a block.
        pooling: "cls", "mean" or "lin_softmax".
        problem_type: "single_label_classification" or "multi_label_classification".
        dataset: The data set whose statistics and clip length the model was trained with, a key of
            `DATASET_PRESETS`.
        labels: Class names in the order of the classifier's outputs.
    """

    num_attention_heads: int | None = None
    pooling: str | None = None
    problem_type: str | None = None
    dataset: str | None = None
    labels: list[str] | None = None


def describe(
    tensors: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    layout: Layout,
    choices: Choices,
    pretraining: bool,
) -> tuple[SSLAMConfig, SSLAMFeatureExtractor, list[str]]:
    """Derive configuration and feature extractor of a model from its weights and settings.

    Sources, in this order: the shapes of `tensors`, `choices`, the settings of `checkpoint`, the convention of the
    published models.

    Args:
        tensors: The weights that the model will have, under our names.
        checkpoint: The source, for its settings.
        layout: The source's layout, which implies the epsilon of the classifier's norm.
        choices: The user's settings.
        pretraining: Whether the model will be an `SSLAMForPreTraining`.

    Returns:
        The configuration, the feature extractor, and notes: the assumptions, and the settings that contradict the
        weights.

    Raises:
        ConversionError: If weights and settings describe no valid SSLAM model, or do not determine one.
    """
    try:
        return _describe(tensors, checkpoint, layout, choices, pretraining)
    except ConversionError:
        raise
    # The settings come from a file, so that any type can stand where a number is expected.
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ConversionError(f"The checkpoint's settings describe no valid model. {error}") from error


def _describe(
    tensors: dict[str, torch.Tensor], checkpoint: Checkpoint, layout: Layout, choices: Choices, pretraining: bool
) -> tuple[SSLAMConfig, SSLAMFeatureExtractor, list[str]]:
    settings = Settings(checkpoint.settings)
    settings.check_constants(pretraining)
    notes: list[str] = []
    from_shapes = _fields_from_shapes(tensors, settings.fields.get("num_mel_bins", SSLAMConfig.num_mel_bins))
    for name, value in from_shapes.items():
        if name in settings.fields and settings.fields[name] != value:
            notes.append(
                f"The settings state {name}={settings.fields[name]}, but the weights have {value}, which is used."
            )
    fields = settings.fields | from_shapes

    if choices.num_attention_heads is not None:
        fields["num_attention_heads"] = choices.num_attention_heads
    elif "num_attention_heads" not in fields:
        if fields["hidden_size"] % HEAD_SIZE:
            raise ConversionError(
                "The checkpoint does not state the number of attention heads, and hidden_size="
                f"{fields['hidden_size']} is no multiple of the usual {HEAD_SIZE} channels per head; pass "
                "--num-attention-heads."
            )
        fields["num_attention_heads"] = fields["hidden_size"] // HEAD_SIZE
        notes.append(
            f"The checkpoint does not state the number of attention heads; {fields['num_attention_heads']} of "
            f"{HEAD_SIZE} channels are assumed, as in the base and large models (--num-attention-heads)."
        )
    # None means all layers, also if their number is changed later.
    for name in ("num_target_layers", "num_global_target_layers"):
        if fields.get(name) == fields["num_hidden_layers"]:
            fields[name] = None

    front_end = _front_end(checkpoint.preprocessor, settings, choices.dataset, notes)
    fields["max_length"] = front_end["max_length"]

    if "num_labels" in from_shapes:
        num_labels = fields.pop("num_labels")
        fields |= _classification_fields(num_labels, settings, layout, choices, notes)
    elif choices.labels is not None:
        raise ConversionError("--labels names classes, but the checkpoint has no classifier.")
    config = SSLAMConfig(**fields)
    front_end |= {"num_mel_bins": config.num_mel_bins, "patch_size": config.patch_size}
    extractor = SSLAMFeatureExtractor(**front_end)
    check_front_end(extractor, config)
    return config, extractor, notes


def _front_end(
    preprocessor: dict[str, Any], settings: Settings, dataset: str | None, notes: list[str]
) -> dict[str, Any]:
    """Return the feature extractor's arguments, and append the assumptions to `notes`."""
    if dataset is not None:
        return dict(DATASET_PRESETS[dataset])
    if settings.is_sslam and "max_length" in preprocessor:
        return dict(preprocessor)
    front_end = dict(DATASET_PRESETS[settings.dataset])
    if settings.max_length is not None:
        front_end["max_length"] = settings.max_length
    if not settings.is_fine_tuned:
        clips = "" if settings.max_length is not None else f" and clips of {front_end['max_length']} frames"
        notes.append(
            "The checkpoint does not state how its inputs were normalised; AudioSet's mean and standard deviation"
            f"{clips} are assumed (--dataset-preset)."
        )
    return front_end


def _classification_fields(
    num_labels: int, settings: Settings, layout: Layout, choices: Choices, notes: list[str]
) -> dict[str, Any]:
    """Return the classifier's fields of the configuration, and append the assumptions to `notes`."""
    problem_type = choices.problem_type or settings.problem_type
    if problem_type is None and num_labels == AUDIOSET_NUM_LABELS:
        problem_type = "multi_label_classification"
    if problem_type is None:
        notes.append(
            "The checkpoint does not state whether a clip has one label or several; problem_type is left unset, which "
            "pipelines treat as one label (--problem-type)."
        )
    if choices.labels is not None:
        labels = choices.labels
        if len(labels) != num_labels:
            raise ConversionError(f"--labels names {len(labels)} classes, but the classifier has {num_labels}.")
    elif settings.is_sslam and "id2label" in settings.all:
        if len(settings.all["id2label"]) != num_labels:
            raise ConversionError(
                f"The settings name {len(settings.all['id2label'])} classes, but the classifier has {num_labels} "
                "(--labels)."
            )
        labels = [settings.all["id2label"][str(index)] for index in range(num_labels)]
        if other := [label for label in labels if not isinstance(label, str)]:
            raise ConversionError(
                f"The settings name a class by a {type(other[0]).__name__}; names are text (--labels)."
            )
    elif num_labels == AUDIOSET_NUM_LABELS:
        labels = audioset_labels()
    else:
        labels = [f"LABEL_{index}" for index in range(num_labels)]
        notes.append(f"The checkpoint does not name its {num_labels} classes (--labels).")
    fields: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": problem_type,
        "classifier_pooling": choices.pooling or settings.pooling or "cls",
    }
    if "classifier_norm_eps" not in settings.fields:
        fields["classifier_norm_eps"] = CLASSIFIER_NORM_EPS.get(layout.family, 1e-6)
    return fields


def _fields_from_shapes(tensors: dict[str, torch.Tensor], num_mel_bins: int) -> dict[str, Any]:
    """Return the fields of the configuration that shapes determine, and `num_labels`."""
    if "sslam.patch_embeddings.projection.weight" not in tensors:
        raise ConversionError("The weights to convert have no patch projection, so they hold no complete encoder.")
    projection = tensors["sslam.patch_embeddings.projection.weight"].shape
    if len(projection) != 4 or projection[1] != 1 or projection[2] != projection[3]:
        raise ConversionError(
            f"The patch projection has shape {tuple(projection)}; SSLAM's is (hidden_size, 1, patch_size, patch_size)."
        )
    blocks = [int(match[1]) for name in tensors if (match := re.match(r"sslam\.encoder\.layers\.(\d+)\.", name))]
    fields: dict[str, Any] = {
        "hidden_size": projection[0],
        "patch_size": projection[2],
        "num_hidden_layers": 1 + max(blocks, default=0),
        "qkv_bias": "sslam.encoder.layers.0.attention.qkv.bias" in tensors,
    }
    if (fc1 := tensors.get("sslam.encoder.layers.0.mlp.fc1.weight")) is not None:
        fields["intermediate_size"] = fc1.shape[0]
    if (positions := tensors.get(f"sslam.{POSITIONS}")) is not None:
        fields["max_position_embeddings"] = positions.shape[-2] * projection[2] // num_mel_bins
    if (dense := tensors.get("classifier.dense.weight")) is not None:
        fields["num_labels"] = dense.shape[0]
    convolutions = [name for name in tensors if re.fullmatch(r"decoder\.layers\.\d+\.weight", name)]
    if convolutions:
        shape = tensors[convolutions[0]].shape
        fields["decoder_num_layers"] = len(convolutions)
        if len(shape) == 4:
            fields["decoder_kernel_size"] = shape[2]
            fields["decoder_groups"] = shape[0] // max(shape[1], 1)
    return fields
