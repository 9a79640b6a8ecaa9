"""Metrics of predictions, over all clips and by group, as values for JSON.

The metrics are the `evaluate` modules beside this file: `audio_tagging` for several labels per clip, `clip_accuracy`
for one.
"""

import math
from pathlib import Path
from typing import Any, Literal

import evaluate
import numpy as np

from training.data.config import DataError
from training.evaluation.prediction import Predictions, examples

ProblemType = Literal["multi_label_classification", "single_label_classification"]

METRICS_FOLDER = Path(__file__).parent

# A column with more values names clips rather than groups, and its picture would be unreadable.
MAX_GROUPS = 100


def problem_type_of(problem_type: str | None, predictions: Predictions) -> ProblemType:
    """Return the problem type of a model, or infer it: single-label if every clip has exactly one label.

    Args:
        problem_type: `problem_type` of the model's configuration, which may be `None`.
        predictions: Predictions with targets.

    Raises:
        DataError: If there are no metrics for the problem type.
    """
    if problem_type == "single_label_classification":
        return "single_label_classification"
    if problem_type == "multi_label_classification":
        return "multi_label_classification"
    if problem_type is not None:
        raise DataError(
            f"problem_type={problem_type!r} has no metric; it must be single_label_classification or "
            "multi_label_classification."
        )
    is_single = bool((predictions.targets.sum(axis=1) == 1).all())
    return "single_label_classification" if is_single else "multi_label_classification"


def compute_metrics(predictions: Predictions, problem_type: ProblemType, names: list[str]) -> dict[str, Any]:
    """Compute the metrics of predictions.

    Args:
        predictions: Predictions for N clips and K classes.
        problem_type: Selects the metrics.
        names: The K class names.

    Returns:
        Plain values for JSON. A metric that is undefined or infinite (d-prime for an AUC of 1) is `None`.

        - Several labels: `map`, `chance_map` (of random scores), `mean_auc`, `d_prime`, `num_classes_left_out` (of
          `map`), `num_classes_left_out_of_auc`, and `per_class`: for each class `label`, `num_positives`,
          `average_precision` and `auc`.
        - One label: `accuracy`, `balanced_accuracy`, `num_classes_left_out` (of the latter), `per_class`: for each
          class `label`, `num_clips`, `recall` and `precision`, and `confusion_matrix`, true by predicted class.

    Raises:
        DataError: If no clip has a label, or the problem is single-label and a clip does not have exactly one.
    """
    if not predictions.targets.any():
        raise DataError(f"None of the {len(predictions.ids)} clips has a label, so there is nothing to measure.")
    return _metrics(predictions, problem_type, names)


def metrics_by_group(
    predictions: Predictions, problem_type: ProblemType, names: list[str]
) -> dict[Any, dict[str, Any]]:
    """Compute the metrics of [`compute_metrics`] and `num_clips` for each group of clips.

    A group's means are over the classes that occur in it.

    Returns:
        Metrics by group, numbers in ascending order before texts. Empty without groups.

    Raises:
        DataError: If the groups are lists, or there are more than `MAX_GROUPS`.
    """
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(predictions.groups or []):
        if isinstance(group, (list, dict)):
            raise DataError(f"data.group_column holds lists ({group!r}); it must hold a number or a text per clip.")
        # None and NaN both mean a missing value. NaN differs from itself, so it cannot be a key.
        members.setdefault(None if group != group else group, []).append(i)
    if len(members) > MAX_GROUPS:
        raise DataError(
            f"data.group_column has {len(members)} values; results by group are limited to {MAX_GROUPS} groups."
        )
    return {
        group: {"num_clips": len(members[group])} | _metrics(predictions.take(members[group]), problem_type, names)
        for group in sorted(members, key=_group_order)
    }


def load_metric(name: str) -> evaluate.Metric:
    """Load the `evaluate` module of a folder beside this file, without network access.

    `evaluate` copies the module into HF_MODULES_CACHE under a lock and a digest of its content, so processes do not
    disturb each other and an edited module is loaded anew. Values stay in memory. A module keeps the values of a
    computation that failed, so load a new one for each computation.
    """
    return evaluate.load(str(METRICS_FOLDER / name), keep_in_memory=True)


def _group_order(group: Any) -> tuple[bool, float, str]:
    """Sort numbers, also those written as text, before other texts."""
    try:
        return False, float(group), ""
    except (TypeError, ValueError):
        return True, 0.0, str(group)


def _metrics(predictions: Predictions, problem_type: ProblemType, names: list[str]) -> dict[str, Any]:
    if problem_type == "single_label_classification":
        odd = np.flatnonzero(predictions.targets.sum(axis=1) != 1)
        if len(odd):
            raise DataError(
                f"{len(odd)} clips do not have one label each, such as {examples([predictions.ids[i] for i in odd])}, "
                "but the model's problem_type is single_label_classification."
            )
        result = load_metric("clip_accuracy").compute(
            predictions=predictions.logits.argmax(axis=1),
            references=predictions.targets.argmax(axis=1),
            num_classes=len(names),
        )
        columns = ("num_clips", "recall", "precision")
    else:
        result = load_metric("audio_tagging").compute(
            predictions=predictions.logits, references=predictions.targets.astype(np.int8)
        )
        columns = ("num_positives", "average_precision", "auc")
    by_column = [result.pop(column) for column in columns]
    result["per_class"] = [
        {"label": name} | {column: _finite(value) for column, value in zip(columns, values, strict=True)}
        for name, *values in zip(names, *by_column, strict=True)
    ]
    return {name: _finite(value) for name, value in result.items()}


def _finite(value: Any) -> Any:
    """Replace an infinite or undefined number, which JSON cannot express, by `None`."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
