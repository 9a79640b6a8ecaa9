"""An `evaluate` module: mean average precision, AUC and d-prime for clips with any number of labels.

    metric = evaluate.load("training/evaluation/audio_tagging", keep_in_memory=True)
    metric.compute(predictions=scores, references=targets)["map"]

`evaluate` imports a copy of this file from its cache, so the file imports nothing from this repository.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

DESCRIPTION = """
Audio tagging: average precision and area under the ROC curve per class, their means over classes, and d-prime.

The average precision of a class without a positive clip is undefined, and so is the AUC of a class without a positive
or without a negative clip. Undefined values are NaN, are left out of the means and are counted. Equal scores form one
threshold, so the order of the clips does not matter.
`chance_map` is the expected map of random scores. It falls with the number of clips and rises with the share of
positives, so compare maps of different sets of clips only beside their `chance_map`.
d-prime is sqrt(2) times the standard normal quantile of the mean AUC (Gemmeke et al., 2017). It is infinite for an AUC
of 1.
"""
INPUTS = """
Args:
    predictions: Scores (N, K), higher for more likely classes. Only their order counts. Prefer logits: large logits
        differ where their probabilities round to the same number.
    references: Targets (N, K), 1 where the clip has the class, else 0.

Returns:
    map, chance_map, mean_auc, d_prime: Floats; NaN if undefined for every class.
    num_classes_left_out: Number of classes without a positive clip.
    num_classes_left_out_of_auc: Number of classes without a positive or without a negative clip.
    average_precision, auc: Lists of K floats.
    num_positives: List of K integers.

Raises:
    ValueError: If scores and targets differ in shape or are empty, a score is not finite, or a target is not 0 or 1.
"""
CITATION = """
@inproceedings{gemmeke2017audioset,
  title = {{Audio Set}: An ontology and human-labeled dataset for audio events},
  author = {Gemmeke, Jort F. and Ellis, Daniel P. W. and Freedman, Dylan and Jansen, Aren and Lawrence, Wade and Moore,
            R. Channing and Plakal, Manoj and Ritter, Marvin},
  booktitle = {ICASSP},
  year = {2017},
}
"""


class AudioTagging(evaluate.Metric):
    """Mean average precision, AUC and d-prime; `DESCRIPTION` and `INPUTS` document the computation."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.List(datasets.Value("float32")),
            "references": datasets.List(datasets.Value("int8")),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
            reference_urls=[
                "https://scikit-learn.org/stable/modules/generated/sklearn.metrics.average_precision_score"
            ],
        )

    def _compute(self, predictions: list[list[float]], references: list[list[int]]) -> dict[str, Any]:
        scores, targets = _matrix(predictions, np.float32), _matrix(references, np.int8)
        if scores.shape != targets.shape or not scores.size:
            raise ValueError(
                f"scores {scores.shape} and targets {targets.shape} must have one shape and not be empty."
            )
        if not np.isfinite(scores).all():
            raise ValueError(f"{(~np.isfinite(scores)).any(axis=1).sum()} clips have scores that are not finite.")
        if not np.isin(targets, (0, 1)).all():
            raise ValueError("Targets must be 0 or 1.")

        num_clips, num_classes = targets.shape
        num_positives = targets.sum(axis=0, dtype=np.int64)
        precision, auc = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
        for k in np.flatnonzero(num_positives):
            precision[k] = average_precision_score(targets[:, k], scores[:, k])
            if num_positives[k] < num_clips:
                auc[k] = roc_auc_score(targets[:, k], scores[:, k])
        mean_auc = _mean(auc)
        return {
            "map": _mean(precision),
            "chance_map": _mean(_expected_precision(num_positives, num_clips)),
            "mean_auc": mean_auc,
            "d_prime": _d_prime(mean_auc),
            "num_classes_left_out": int(np.isnan(precision).sum()),
            "num_classes_left_out_of_auc": int(np.isnan(auc).sum()),
            "average_precision": precision.tolist(),
            "auc": auc.tolist(),
            "num_positives": num_positives.tolist(),
        }


def _matrix(rows: Sequence[Sequence[float]], dtype: type) -> np.ndarray:
    if len({len(row) for row in rows}) > 1:
        raise ValueError("Clips differ in the number of classes.")
    return np.array(rows, dtype)


def _mean(values: np.ndarray) -> float:
    """Return the mean over the classes with a defined value, or NaN if there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _expected_precision(num_positives: np.ndarray, num_clips: int) -> np.ndarray:
    """Return the expected average precision of random scores for each class; NaN without positives.

    Of P positives among N clips in random order, each rank i is equally likely to hold a positive. Given that it does,
    the ranks before it hold (i - 1)(P - 1) / (N - 1) positives on average.
    """
    harmonic = (1 / np.arange(1, num_clips + 1)).sum()
    others = (num_positives - 1) / max(1, num_clips - 1)
    expected = (harmonic + others * (num_clips - harmonic)) / num_clips
    return np.where(num_positives > 0, expected, np.nan)


def _d_prime(auc: float) -> float:
    if auc in (0.0, 1.0):
        return math.copysign(math.inf, auc - 0.5)
    return math.nan if math.isnan(auc) else math.sqrt(2) * NormalDist().inv_cdf(auc)
