"""An `evaluate` module: accuracy, recall, precision and confusion matrix for clips with one label each.

    metric = evaluate.load("training/evaluation/clip_accuracy", keep_in_memory=True)
    metric.compute(predictions=classes, references=true_classes, num_classes=50)["accuracy"]

`evaluate` imports a copy of this file from its cache, so the file imports nothing from this repository.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix

DESCRIPTION = """
Accuracy over clips, recall (accuracy over the clips of a class) and precision per class, and the confusion matrix.

The recall of a class without clips is undefined, and so is the precision of a class that is never predicted. Undefined
values are NaN. Classes without clips are left out of the mean recall (the balanced accuracy) and are counted.
"""
INPUTS = """
Args:
    predictions: Predicted class index of each clip, (N,).
    references: True class index of each clip, (N,).
    num_classes: Number of classes K, including those that do not occur.

Returns:
    accuracy, balanced_accuracy: Floats.
    num_classes_left_out: Number of classes without clips.
    recall, precision: Lists of K floats.
    num_clips: List of K integers, clips whose true class it is.
    confusion_matrix: K lists of K counts, true class by predicted class.

Raises:
    ValueError: If there are no clips, or an index is not in [0, num_classes).
"""


class ClipAccuracy(evaluate.Metric):
    """Accuracy, recall, precision and confusion matrix; `DESCRIPTION` and `INPUTS` document the computation."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.confusion_matrix.html"],
        )

    def _compute(self, predictions: list[int], references: list[int], num_classes: int) -> dict[str, Any]:
        found, true = np.array(predictions), np.array(references)
        if not len(true):
            raise ValueError("There are no clips.")
        for name, classes in (("Predicted", found), ("True", true)):
            if classes.min() < 0 or classes.max() >= num_classes:
                raise ValueError(f"{name} classes {classes.min()} to {classes.max()} must be 0 to {num_classes - 1}.")
        counts = confusion_matrix(true, found, labels=np.arange(num_classes))
        num_clips = counts.sum(axis=1)
        with np.errstate(invalid="ignore"):
            recall, precision = counts.diagonal() / num_clips, counts.diagonal() / counts.sum(axis=0)
        return {
            "accuracy": float(accuracy_score(true, found)),
            "balanced_accuracy": float(np.nanmean(recall)),
            "num_classes_left_out": int((num_clips == 0).sum()),
            "recall": recall.tolist(),
            "precision": precision.tolist(),
            "num_clips": num_clips.tolist(),
            "confusion_matrix": counts.tolist(),
        }
