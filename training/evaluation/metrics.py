"""TODO."""

import math
from pathlib import Path
from typing import Any, Literal

import evaluate
import numpy as np

from training.data.config import DataError
from training.evaluation.prediction import Predictions, _some

ProblemType = Literal["multi_label_classification", "single_label_classification"]


METRICS_FOLDER = Path(__file__).parent


# More would be names of clips, and a picture that cannot be drawn.
MAX_GROUPS = 100


def problem_type_of(problem_type: str | None, predictions: Predictions) -> ProblemType:
    """The kind of task: what the model's configuration says, or if it says nothing, single-label if every clip has
    just one label."""
    if problem_type is not None:
        return problem_type
    is_single = bool((predictions.targets.sum(axis=1) == 1).all())
    return "single_label_classification" if is_single else "multi_label_classification"


def compute_metrics(predictions: Predictions, problem_type: ProblemType, names: list[str]) -> dict[str, Any]:
    """How good predictions are, by the modules in `training/evaluation`.

    Returns:
        Plain values that JSON takes: where a metric is not defined or infinite (d-prime for an AUC of 1), `None`.

        - several labels: `map`, `chance_map` (of random scores), `mean_auc`, `d_prime`, `num_classes_left_out` (of
          `map`), `num_classes_left_out_of_auc`, and `per_class`, for each class `label`, `num_positives`,
          `average_precision`, `auc`;
        - one label: `accuracy`, `balanced_accuracy`, `num_classes_left_out` (of the latter), `per_class` with `label`,
          `num_clips`, `recall`, `precision`, and `confusion_matrix`, true by predicted class.

    Raises:
        DataError: If no clip has a label, or with one label a clip has another number of them.
    """
    if not predictions.targets.any():
        raise DataError(f"None of the {len(predictions.ids)} clips has a label: there is nothing to measure.")
    return _metrics(predictions, problem_type, names)


def metrics_by_group(
    predictions: Predictions, problem_type: ProblemType, names: list[str]
) -> dict[Any, dict[str, Any]]:
    """The metrics of [`compute_metrics`] over the clips of each group, in the groups' order, with `num_clips`; empty
    without groups. A group's means are over the classes that occur in it.

    Raises:
        DataError: If the values are no groups: lists, or almost as many as clips.
    """
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(predictions.groups or []):
        if isinstance(group, (list, dict)):
            raise DataError(
                f"data.group_column holds lists ({group!r}); it must hold a number or a word for each clip."
            )
        # What is missing is one group, also as a NaN, which no other NaN equals.
        members.setdefault(None if group != group else group, []).append(i)
    if len(members) > MAX_GROUPS:
        raise DataError(f"data.group_column has {len(members)} values; a report by group takes {MAX_GROUPS} at most.")
    return {
        group: {"num_clips": len(members[group])} | _metrics(_take(predictions, members[group]), problem_type, names)
        for group in sorted(members, key=_group_order)
    }


def load_metric(name: str) -> evaluate.Metric:
    """The module `training/evaluation/<name>`, without a look at the network.

    `evaluate` copies it into HF_MODULES_CACHE under a lock and the digest of its content, so that processes do not
    disturb one another and an edited module is not taken for its former self. Values go through memory alone. Loaded
    anew for each use, it has nothing left of a use that failed.
    """
    return evaluate.load(str(METRICS_FOLDER / name), keep_in_memory=True)


def _group_order(group: Any) -> tuple[bool, float, str]:
    """Numbers in their order, also as texts out of a table, then other texts in theirs."""
    try:
        return False, float(group), ""
    except (TypeError, ValueError):
        return True, 0.0, str(group)


def _take(predictions: Predictions, rows: list[int]) -> Predictions:
    return Predictions([predictions.ids[i] for i in rows], predictions.logits[rows], predictions.targets[rows], None)


def _metrics(predictions: Predictions, problem_type: ProblemType, names: list[str]) -> dict[str, Any]:
    if problem_type == "single_label_classification":
        odd = np.flatnonzero(predictions.targets.sum(axis=1) != 1)
        if len(odd):
            raise DataError(
                f"{len(odd)} clips do not have one label each, such as {_some([predictions.ids[i] for i in odd])}, "
                "but the model's problem_type is single_label_classification."
            )
        result = load_metric("clip_accuracy").compute(
            predictions=predictions.logits.argmax(axis=1),
            references=predictions.targets.argmax(axis=1),
            num_classes=len(names),
        )
        columns = ("num_clips", "recall", "precision")
    elif problem_type == "multi_label_classification":
        result = load_metric("audio_tagging").compute(
            predictions=predictions.logits, references=predictions.targets.astype(np.int8)
        )
        columns = ("num_positives", "average_precision", "auc")
    else:
        raise DataError(f"problem_type={problem_type!r} has no metric here; it must be multi- or single-label.")
    by_column = [result.pop(column) for column in columns]
    result["per_class"] = [
        {"label": name} | {column: _finite(value) for column, value in zip(columns, values, strict=True)}
        for name, *values in zip(names, *by_column, strict=True)
    ]
    return {name: _finite(value) for name, value in result.items()}


def _finite(value: Any) -> Any:
    """JSON has no word for infinite or undefined numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
