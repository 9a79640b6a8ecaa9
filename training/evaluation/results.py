"""Results of an evaluation: a folder of files for other tools, and a summary to print.

- `results.json`: all metrics, also by class and by group, numbers of clips, settings and versions. A metric that is
  undefined or infinite (d-prime for an AUC of 1) is null;
- `per_class.csv`: metrics by class, in the order of the classifier's outputs;
- `by_group.csv`: metrics by group, if there are groups;
- `confusion.csv`: with one label per clip, true classes by predicted classes;
- `predictions.parquet`: `id`, `labels` (names), `scores` (probabilities, in the order of `per_class.csv`) and, if
  there are groups, `group`;
- `per_class.png`, `by_group.png`, `confusion.png`: plots of these tables.
"""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from modeling_sslam.common.files import publish, remove, temporary_path
from training.evaluation.metrics import ProblemType, compute_metrics, metrics_by_group
from training.evaluation.plots import plot_confusion, plot_groups, plot_per_class
from training.evaluation.prediction import Predictions

# Key and display name of the main metrics. The first one selects the best model.
MAIN_METRICS: dict[str, dict[str, str]] = {
    "multi_label_classification": {"map": "mAP", "mean_auc": "mean AUC", "d_prime": "d-prime"},
    "single_label_classification": {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"},
}
# Key and display name of the metric of a class, and key of its number of clips.
CLASS_METRIC = {
    "multi_label_classification": ("average_precision", "AP", "num_positives"),
    "single_label_classification": ("recall", "recall", "num_clips"),
}
# results.json comes last, so a new results.json implies that all other files are new.
FILES = (
    *("predictions.parquet", "per_class.csv", "per_class.png", "confusion.csv", "confusion.png"),
    *("by_group.csv", "by_group.png", "results.json"),
)
# The summary lists the best and the worst classes.
NUM_LISTED_CLASSES = 5


class Evaluation(NamedTuple):
    """Predictions and their metrics.

    Attributes:
        predictions: Predictions for N clips.
        problem_type: Problem type that selects the metrics.
        names: Class names.
        metrics: Metrics of [`training.evaluation.metrics.compute_metrics`].
        groups: Metrics by value of `group_column`; empty without groups.
        group_column: Name of the group column, or `None`.
    """

    predictions: Predictions
    problem_type: ProblemType
    names: list[str]
    metrics: dict[str, Any]
    groups: dict[Any, dict[str, Any]]
    group_column: str | None

    @classmethod
    def of(
        cls, predictions: Predictions, problem_type: ProblemType, names: list[str], group_column: str | None
    ) -> "Evaluation":
        """Compute the metrics of predictions, over all clips and by group.

        Raises:
            DataError: If the predictions cannot be measured; see [`training.evaluation.metrics.compute_metrics`].
        """
        metrics = compute_metrics(predictions, problem_type, names)
        groups = metrics_by_group(predictions, problem_type, names)
        return cls(predictions, problem_type, names, metrics, groups, group_column)

    @property
    def main_metrics(self) -> dict[str, str]:
        """Keys and display names of the main metrics."""
        return MAIN_METRICS[self.problem_type]


def write_results(folder: Path, evaluation: Evaluation, title: str, facts: dict[str, Any]) -> list[Path]:
    """Write all files of an evaluation. They replace those of an earlier one; other files in the folder stay.

    Args:
        folder: Folder of the results; it is created if it does not exist.
        evaluation: Predictions and metrics.
        title: Title of the plots.
        facts: Further content of results.json, before the metrics.

    Returns:
        Paths of the files.

    Raises:
        OSError: If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workplace = temporary_path(folder / "evaluation")
    remove(workplace)
    workplace.mkdir()
    try:
        _write_files(workplace, evaluation, title, facts)
        for name in FILES:
            if (workplace / name).exists():
                publish(workplace / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    finally:
        remove(workplace)
    return [folder / name for name in FILES if (folder / name).exists()]


def summary(evaluation: Evaluation, title: str, skipped: dict[str, int]) -> str:
    """Return the evaluation as text of about one screen.

    Args:
        evaluation: Predictions and metrics.
        title: First words of the text.
        skipped: Number of skipped clips by reason.
    """
    metrics, names = evaluation.metrics, evaluation.main_metrics
    key, name, count_key = CLASS_METRIC[evaluation.problem_type]
    unusable = f", {sum(skipped.values())} skipped ({_listed(skipped)})" if skipped else ""
    left_out = metrics["num_classes_left_out"]
    lines = [
        f"{title}: {len(evaluation.predictions.ids):,} clips{unusable}",
        *(f"  {names[metric]:<18}{_number(metrics[metric])}" for metric in names),
        *([f"  {'mAP by chance':<18}{_number(metrics['chance_map'])}"] if "chance_map" in metrics else []),
        f"  {'classes':<18}{len(evaluation.names)}" + (f", {left_out} left out: no clip has them" if left_out else ""),
    ]
    classes = sorted((row for row in metrics["per_class"] if row[key] is not None), key=lambda row: -row[key])
    if len(classes) > 2 * NUM_LISTED_CLASSES:
        classes = [*classes[:NUM_LISTED_CLASSES], None, *classes[-NUM_LISTED_CLASSES:]]
    lines += _table(
        ("class", name, "clips"),
        [("…", "", "") if row is None else (row["label"], _number(row[key]), str(row[count_key])) for row in classes],
    )
    if evaluation.groups:
        rows = [
            (
                str(group),
                *(_number(row[metric]) for metric in (*names, "chance_map") if metric in row),
                str(len(evaluation.names) - row["num_classes_left_out"]),
                str(row["num_clips"]),
            )
            for group, row in evaluation.groups.items()
        ]
        chance = ("chance mAP",) if "chance_map" in metrics else ()
        lines += _table((evaluation.group_column or "group", *names.values(), *chance, "classes", "clips"), rows)
    return "\n".join(lines)


def _write_files(folder: Path, evaluation: Evaluation, title: str, facts: dict[str, Any]) -> None:
    predictions, names, metrics = evaluation.predictions, evaluation.names, evaluation.metrics
    key, class_metric, count_key = CLASS_METRIC[evaluation.problem_type]
    metric, metric_name = next(iter(evaluation.main_metrics.items()))
    by_group = [
        {name: value for name, value in row.items() if name not in ("per_class", "confusion_matrix")}
        for row in evaluation.groups.values()
    ]
    content = {
        **facts,
        "problem_type": evaluation.problem_type,
        "metrics": {name: value for name, value in metrics.items() if name not in ("per_class", "confusion_matrix")},
        "group_column": evaluation.group_column if evaluation.groups else None,
        "by_group": [{"group": group} | row for group, row in zip(evaluation.groups, by_group, strict=True)],
        "per_class": metrics["per_class"],
    }
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False, default=str)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")

    columns = list(metrics["per_class"][0])
    rows = [[i, *row.values()] for i, row in enumerate(metrics["per_class"])]
    _write_csv(folder / "per_class.csv", ["index", *columns], rows)
    overall = f"{title}\n{metric_name} {_number(metrics[metric])}"
    plot_per_class(metrics["per_class"], key, class_metric, count_key, overall, folder / "per_class.png")
    if "confusion_matrix" in metrics:
        counts = metrics["confusion_matrix"]
        rows = [[name, *row] for name, row in zip(names, counts, strict=True)]
        _write_csv(folder / "confusion.csv", ["true", *names], rows)
        plot_confusion(counts, names, overall, folder / "confusion.png")
    if evaluation.groups:
        column = evaluation.group_column or "group"
        rows = [[group, *row.values()] for group, row in zip(evaluation.groups, by_group, strict=True)]
        _write_csv(folder / "by_group.csv", [column, *by_group[0]], rows)
        plot_groups(evaluation.groups, metric, metric_name, column, title, folder / "by_group.png")

    logits = torch.from_numpy(predictions.logits)
    scores = logits.softmax(1) if evaluation.problem_type == "single_label_classification" else logits.sigmoid()
    table = {
        "id": pa.array(predictions.ids, pa.string()),
        "labels": pa.array(
            [[names[k] for k in np.flatnonzero(row)] for row in predictions.targets], pa.list_(pa.string())
        ),
        "scores": pa.FixedSizeListArray.from_arrays(pa.array(scores.numpy().ravel(), pa.float32()), len(names)),
    }
    if evaluation.groups:
        table["group"] = pa.array(predictions.groups)
    pq.write_table(pa.table(table), folder / "predictions.parquet")


def _write_csv(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    path.write_text(text.getvalue(), encoding="utf-8")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table, after an empty line. The first column is aligned left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  " + "  ".join([first.strip().ljust(widths[0]), *rest])

    return ["", *map(line, [header, *rows])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
