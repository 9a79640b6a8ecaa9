"""The task of a classifier: labelled training data, their classes and problem type, and the splits to evaluate on."""

import logging
from dataclasses import asdict, replace
from typing import Literal, NamedTuple

from accelerate.utils import broadcast_object_list

from training.data.config import EvaluationDataConfig, LabelledDataConfig
from training.data.labels import LabelSet, Survey, find_label_set, survey
from training.data.sources import Source, is_one_split, open_source
from training.evaluation.metrics import ProblemType
from training.run.config import TrainingError
from training.run.processes import join_processes

logger = logging.getLogger(__name__)

LabelsPerClip = Literal["single", "multi"]
PROBLEM_TYPES: dict[LabelsPerClip, ProblemType] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
}


class Task(NamedTuple):
    """Labelled training data and their classes.

    Attributes:
        source: The open training data.
        labels: The classes.
        labels_per_clip: Whether clips have one label or any number.
        num_clips: Number of training clips; `None` if they were not counted.
    """

    source: Source
    labels: LabelSet
    labels_per_clip: LabelsPerClip
    num_clips: int | None

    @property
    def problem_type(self) -> ProblemType:
        """The problem type as model configurations have it."""
        return PROBLEM_TYPES[self.labels_per_clip]


def find_task(
    data: LabelledDataConfig,
    label_file: str | None,
    labels_per_clip: Literal["auto", "single", "multi"],
    seed: int,
    count_clips: bool,
) -> Task:
    """Open the training data and find their classes. Call it in every process.

    If a setting depends on the labels of all training clips, the main process reads them and logs their number.

    Args:
        data: The training data.
        label_file: Table of the classes; `None` to look for one beside the data.
        labels_per_clip: "auto" to decide by the data.
        seed: Determines a weighted draw of clips.
        count_clips: Whether to count the training clips even if nothing else needs their labels.

    Raises:
        TrainingError: If the data cannot be read, have no clips or no labels, or have a label that is not one of the
            classes.
    """
    where = f"data.source={data.source!r}"
    found: Survey | None = None
    try:
        source = open_source(data)
        labels = find_label_set(source, label_file)
        if labels is None or count_clips or labels_per_clip == "auto":
            state = join_processes()
            (found,) = broadcast_object_list([survey(source, seed) if state.is_main_process else None])
    except (ValueError, FileNotFoundError) as error:
        raise TrainingError(f"{where}: {error}") from error
    if found is not None:
        if not found.num_clips:
            raise TrainingError(f"{where} has no clip in split {data.split!r}.")
        labels = labels or LabelSet(sorted(found.counts))
        labels.encode([list(found.counts)])  # raises an error for an unknown label
        logger.info(
            "%s: %d clips, %d labels of %d classes.", where, found.num_clips, found.counts.total(), len(labels)
        )
        if labels_per_clip == "auto":
            labels_per_clip = "single" if found.is_single_label else "multi"
    if not labels or labels_per_clip == "auto":
        raise TrainingError(f"{where} has no labels in split {data.split!r}.")
    return Task(source, labels, labels_per_clip, None if found is None else found.num_clips)


def check_splits(
    data: LabelledDataConfig, validation_source: str | None, validation_split: str, test_split: str | None
) -> None:
    """Check that no clips are both trained on and evaluated on.

    Args:
        data: The training data.
        validation_source: Source of validation and test splits; `None` for that of the training data.
        validation_split: The validation split. With `data.hold_out` the clips held out replace it.
        test_split: The test split, if any.

    Raises:
        TrainingError: If a split would be both trained on and evaluated on, or a folder lacks it.
    """
    if validation_source not in (None, data.source):
        return
    for key, split in {"validation_split": validation_split, "test_split": test_split}.items():
        if split is None or (key == "validation_split" and data.hold_out):
            continue
        try:
            is_trained_on = split == data.split or is_one_split(replace(data, split=split))
        except ValueError as error:
            raise TrainingError(f"{key}={split!r}: {error}") from error
        if is_trained_on:
            raise TrainingError(
                f"{key}={split!r} of {data.source!r} would be the clips that it trains on. Hold some out by "
                "data.hold_out, name other data by validation_source, or set test_split to null."
            )


def evaluation_data(data: LabelledDataConfig, source: str | None, split: str) -> EvaluationDataConfig:
    """Return the settings to evaluate on a split: the training data's, but in order and from each clip's start.

    Args:
        data: The training data.
        source: Source of the split; `None` for that of the training data.
        split: The split. With `data.hold_out` only its held-out clips are read.
    """
    changes = {
        "source": source or data.source,
        "split": split,
        "crop": "head",
        "shuffle_buffer": 0,
        "sample_weights": None,
        "clips_per_epoch": None,
        "held_out": data.hold_out > 0,
    }
    return EvaluationDataConfig(**asdict(data) | changes)
