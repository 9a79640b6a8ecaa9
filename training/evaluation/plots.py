"""Plots of an evaluation: metric by class, confusion matrix, metric by group."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Readable bars in one column. More classes go into further columns.
BARS_PER_COLUMN = 90
BAR_INCHES, COLUMN_INCHES = 0.17, 4.2
# In larger confusion matrices class names, or numbers in the cells, would be unreadable.
MAX_NAMED_CLASSES, MAX_NUMBERED_CLASSES = 130, 20
MAX_NAME = 32
COLOUR = "#31688e"
# Class names may contain a dollar sign, which would start a formula.
plain_text = rc_context({"text.parse_math": False})


@plain_text
def plot_per_class(rows: list[dict[str, Any]], key: str, name: str, count_key: str, title: str, path: Path) -> None:
    """Draw a metric of each class as a bar, the best class first, with class names and numbers of clips.

    Args:
        rows: `per_class` of [`training.evaluation.metrics.compute_metrics`].
        key: Metric in a row. Classes where it is `None` are left out.
        name: Display name of the metric.
        count_key: Number of clips in a row.
        title: Title of the figure.
        path: PNG file to write.
    """
    rows = sorted((row for row in rows if row[key] is not None), key=lambda row: -row[key])
    num_columns = math.ceil(len(rows) / BARS_PER_COLUMN)
    height = math.ceil(len(rows) / num_columns)
    figure = Figure(figsize=(max(6.5, COLUMN_INCHES * num_columns), 1.3 + BAR_INCHES * height), layout="constrained")
    for column, axes in enumerate(figure.subplots(1, num_columns, squeeze=False)[0]):
        part = rows[column * height : (column + 1) * height]
        axes.barh(range(len(part)), [row[key] for row in part], color=COLOUR, height=0.75)
        for i, row in enumerate(part):
            # The number stands inside a long bar and after a short one.
            inside = row[key] > 0.5
            axes.text(
                row[key] + (-0.01 if inside else 0.01), i, f"{row[key]:.3f}", va="center_baseline",
                ha="right" if inside else "left", fontsize=7, color="white" if inside else "black",
            )  # fmt: skip
        axes.set_yticks(
            range(len(part)), [f"{_short(row['label'])}  ({row[count_key]})" for row in part], fontsize=7.5
        )
        axes.set_ylim(height - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.tick_params(axis="y", length=0)
        _hide_frame(axes)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{name}  (in brackets: clips with the class)", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


@plain_text
def plot_confusion(counts: list[list[int]], names: list[str], title: str, path: Path) -> None:
    """Draw a confusion matrix. Colours are shares of the clips of a row (true class).

    Args:
        counts: Number of clips, true class by predicted class.
        names: Class names.
        title: Title of the figure.
        path: PNG file to write.
    """
    matrix = np.array(counts)
    num_classes, totals = len(matrix), matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(totals, 1)
    side = float(np.clip(0.2 * num_classes, 3.5, 16))
    figure = Figure(figsize=(side + 2.6, side + 1.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if num_classes <= MAX_NAMED_CLASSES:
        labels = [_short(name) for name in names]
        size = min(9.0, 60 * side / num_classes)
        axes.set_xticks(range(num_classes), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(num_classes), labels, fontsize=size)
    if num_classes <= MAX_NUMBERED_CLASSES:
        for i, j in zip(*np.nonzero(matrix), strict=True):
            axes.text(j, i, matrix[i, j], ha="center", va="center", fontsize=7,
                      color="white" if shares[i, j] > 0.55 else "black")  # fmt: skip
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.colorbar(image, shrink=0.6, label="share of the true class's clips")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


@plain_text
def plot_groups(groups: dict[Any, dict[str, Any]], key: str, label: str, column: str, title: str, path: Path) -> None:
    """Draw a metric of each group as a bar. The mAP of random scores is drawn beside mAP.

    Args:
        groups: Metrics by group, of [`training.evaluation.metrics.metrics_by_group`].
        key: Metric in a group's metrics. Groups where it is `None` are left out.
        label: Display name of the metric.
        column: Name of the group column.
        title: Title of the figure.
        path: PNG file to write.
    """
    defined = [(group, row) for group, row in groups.items() if row[key] is not None]
    figure = Figure(figsize=(max(4.5, 0.9 * len(defined) + 1.5), 3.6), layout="constrained")
    axes = figure.subplots()
    values = [row[key] for _, row in defined]
    axes.bar(range(len(defined)), values, color=COLOUR, width=0.65)
    tops = values
    if "chance_map" in defined[0][1]:
        chance = [row["chance_map"] for _, row in defined]
        tops = [max(pair) for pair in zip(values, chance, strict=True)]
        starts = np.arange(len(defined)) - 0.4
        axes.hlines(chance, starts, starts + 0.8, color="black", linestyle=":", label="random scores")
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    for i, (value, top) in enumerate(zip(values, tops, strict=True)):
        axes.text(i, top, f"{value:.3f}", ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(defined)), [f"{group}\n{row['num_clips']} clips" for group, row in defined], fontsize=9)
    axes.set_ylim(0, min(1.15, max(tops) * 1.25) or 1)
    axes.set_xlabel(column)
    axes.set_ylabel(label)
    _hide_frame(axes)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def _hide_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
