"""The classifier to train: an encoder from a model folder with a head for the data's classes."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from training.data.labels import LabelSet
from training.evaluation.metrics import ProblemType
from training.run.config import TrainingError

logger = logging.getLogger(__name__)


@dataclass
class FeatureOverrides:
    """Changes to the feature extractor in the encoder's folder."""

    max_length: int | None = field(
        default=None, metadata={"help": "Frames of 10 ms that clips are cropped or padded to.", "default": "as it was"}
    )
    mean: float | None = field(default=None, metadata={"help": "Mean of the log-mel frames.", "default": "as it was"})
    std: float | None = field(default=None, metadata={"help": "Their standard deviation.", "default": "as it was"})


def make_classifier(
    name: str,
    labels: LabelSet,
    problem_type: ProblemType,
    features: FeatureOverrides,
    pooling: str | None,
    drop_path_rate: float,
) -> tuple[SSLAMForAudioClassification, SSLAMFeatureExtractor]:
    """Make a classifier in float32, and its feature extractor.

    A head in the folder is kept if it has the same classes in the same order. Otherwise the head is new.

    Args:
        name: Folder or Hub id of the encoder.
        labels: The classes.
        problem_type: The kind of task.
        features: Changes to the feature extractor.
        pooling: The head's pooling; `None` for that of the model's configuration.
        drop_path_rate: Stochastic depth of the last block.

    Raises:
        TrainingError: If there is no such model, or settings contradict each other.
    """
    try:
        changed = {key: value for key, value in asdict(features).items() if value is not None}
        feature_extractor = SSLAMFeatureExtractor.from_pretrained(name, **changed)
        config = SSLAMConfig.from_pretrained(
            name, max_length=feature_extractor.max_length, drop_path_rate=drop_path_rate
        )
        config.classifier_pooling = pooling or config.classifier_pooling
        is_classifier = "SSLAMForAudioClassification" in (config.architectures or ())
        has_head = is_classifier and LabelSet.of_model(config).names == labels.names
        config.id2label = dict(enumerate(labels.names))
        config.label2id = {label: i for i, label in enumerate(labels.names)}
        config.problem_type = problem_type
        if has_head:
            model = SSLAMForAudioClassification.from_pretrained(name, config=config, dtype=torch.float32)
        else:
            # A new head has a norm, even if the head that it replaces has none.
            config.classifier_norm_eps = config.classifier_norm_eps or SSLAMConfig.classifier_norm_eps
            model = SSLAMForAudioClassification(config)
            model.sslam = SSLAMModel.from_pretrained(name, config=config, dtype=torch.float32)
        logger.info("%s: %s", name, "encoder and head" if has_head else "encoder, with a new head")
    except (ValueError, OSError) as error:
        raise TrainingError(f"model={name!r}: {error}") from error
    return model, feature_extractor


def resume_classifier(checkpoint: Path) -> tuple[SSLAMForAudioClassification, SSLAMFeatureExtractor]:
    """Load the classifier of a checkpoint in float32, and its feature extractor.

    Raises:
        TrainingError: If they cannot be read.
    """
    try:
        model = SSLAMForAudioClassification.from_pretrained(checkpoint, dtype=torch.float32)
        return model, SSLAMFeatureExtractor.from_pretrained(checkpoint)
    except (ValueError, OSError) as error:
        raise TrainingError(f"{checkpoint}: {error}") from error


def compile_blocks(model: SSLAMForAudioClassification) -> None:
    """Compile the encoder's blocks. They are alike, so compilation happens once."""
    for layer in model.sslam.encoder.layers:
        layer.compile()
