"""Accuracy, recall and precision per class and the confusion matrix of clips with one label each, as a module of
`evaluate`:

    metric = evaluate.load("training/evaluation/clip_accuracy", keep_in_memory=True)
    metric.compute(predictions=classes, references=true_classes, num_classes=50)["accuracy"]

The module stands by itself: `evaluate` imports a copy of this file, kept under the digest of its content.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix

DESCRIPTION = """
Accuracy over clips; recall (the accuracy among the clips of a class) and precision per class; the confusion matrix.

A class without clips has no recall, one that is never predicted no precision. They are NaN; classes without clips are
left out of the mean recall (the balanced accuracy) and counted.
"""
INPUTS = """
Args:
    predictions: Class index of each clip, (N,).
    references: Its true class, (N,).
    num_classes: K, also of classes that do not occur.

Returns:
    accuracy, balanced_accuracy: Floats.
    num_classes_left_out: Classes without clips.
    recall, precision: Lists of K floats.
    num_clips: List of K integers, clips that truly are of each class.
    confusion_matrix: K lists of K counts: true class by predicted class.

Raises:
    ValueError: If there are no clips, or an index is not in [0, num_classes).
"""


class ClipAccuracy(evaluate.Metric):
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
                raise ValueError(f"{name} classes {classes.min()} to {classes.max()}: must be 0 to {num_classes - 1}.")
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
