"""Mean average precision, AUC and d-prime of clips with any number of labels, as a module of `evaluate`:

    metric = evaluate.load("training/evaluation/audio_tagging", keep_in_memory=True)
    metric.compute(predictions=scores, references=targets)["map"]

The module stands by itself: `evaluate` imports a copy of this file, kept under the digest of its content.
"""

import math
from statistics import NormalDist
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

DESCRIPTION = """
Audio tagging: average precision and area under the ROC curve per class, their means over classes, and d-prime.

A class without a positive clip has no average precision, one without a positive or without a negative no AUC. They are
NaN, left out of the means and counted. Equal scores are one threshold, so their order does not matter.
`chance_map` is the map that scores drawn at random have on average: it falls with the number of clips and rises with
the share of positives, so maps of different sets of clips are to be read beside it.
d-prime is sqrt(2) times the standard normal quantile of the mean AUC (Gemmeke et al., 2017): infinite where that is 1.
"""
INPUTS = """
Args:
    predictions: Scores (N, K), the higher the likelier. Only their order counts: logits will do, and unlike
        probabilities they do not round to ties.
    references: Targets (N, K), 1 where the clip has the class, else 0.

Returns:
    map, chance_map, mean_auc, d_prime: Floats; NaN if no class has them.
    num_classes_left_out: Classes without a positive.
    num_classes_left_out_of_auc: Classes without a positive or without a negative.
    average_precision, auc: Lists of K floats.
    num_positives: List of K integers.

Raises:
    ValueError: If the two differ in shape or are empty, a score is not finite, or a target is neither 0 nor 1.
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
            raise ValueError(f"scores {scores.shape} and targets {targets.shape} must be of one shape and not empty.")
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


def _matrix(rows: list[list[float]], dtype: type) -> np.ndarray:
    if len({len(row) for row in rows}) > 1:
        raise ValueError("Clips differ in the number of classes.")
    return np.array(rows, dtype)


def _mean(values: np.ndarray) -> float:
    """Over the classes that have a value."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def _expected_precision(num_positives: np.ndarray, num_clips: int) -> np.ndarray:
    """The average precision of a random order, by classes (P,); NaN without positives.

    The clip at rank i, if it is a positive, finds (i - 1)(P - 1) / (N - 1) others before it on average, and any rank
    is as likely for a positive.
    """
    harmonic = (1 / np.arange(1, num_clips + 1)).sum()
    others = (num_positives - 1) / max(1, num_clips - 1)
    expected = (harmonic + others * (num_clips - harmonic)) / num_clips
    return np.where(num_positives > 0, expected, np.nan)


def _d_prime(auc: float) -> float:
    if auc in (0.0, 1.0):
        return math.copysign(math.inf, auc - 0.5)
    return math.nan if math.isnan(auc) else math.sqrt(2) * NormalDist().inv_cdf(auc)
