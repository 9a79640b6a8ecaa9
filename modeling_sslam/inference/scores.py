"""Class scores: from logits, over several windows, and as ranked labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..common.errors import InferenceError
from ..configuration_sslam import SSLAMConfig


def is_multi_label(config: SSLAMConfig) -> bool:
    """Return whether classes are scored independently, so that several can be present at a time."""
    return config.problem_type == "multi_label_classification"


def scores_from_logits(logits: torch.Tensor, config: SSLAMConfig) -> torch.Tensor:
    """Return scores in [0, 1] of logits `(..., num_labels)`: the sigmoid for multi-label models, else the softmax.

    Raises:
        InferenceError: If a logit is NaN or infinite.
    """
    check_finite(torch.isfinite(logits).all(), "scores")
    return unchecked_scores(logits, config)


def unchecked_scores(logits: torch.Tensor, config: SSLAMConfig) -> torch.Tensor:
    """Return the scores of logits without waiting for the device; NaN where a logit is NaN or infinite."""
    scores = logits.sigmoid() if is_multi_label(config) else logits.softmax(-1)
    return scores.masked_fill(~torch.isfinite(logits), torch.nan)


def check_finite(is_finite: torch.Tensor | np.bool_, values: str) -> None:
    """Refuse NaN and infinite results. Clips are checked beforehand, so the model is at fault.

    Args:
        is_finite: Whether all values of a batch are finite.
        values: The name of the values.

    Raises:
        InferenceError: If a value is NaN or infinite.
    """
    if not is_finite:
        raise InferenceError(
            f"The model's {values} are NaN or infinite: its weights are broken, or they overflow in this precision. "
            "Compute in float32 (--dtype float32); if that does not help, convert or download the model again."
        )


def pool_windows(scores: Sequence[np.ndarray], config: SSLAMConfig) -> np.ndarray:
    """Pool the scores of a recording's windows to `(num_labels,)`, by the maximum for multi-label models.

    Other models use the mean, which preserves that their scores sum to 1 over the classes.
    """
    return np.max(scores, axis=0) if is_multi_label(config) else np.mean(scores, axis=0)


def rank(scores: np.ndarray, labels: Sequence[str], top_k: int | None, threshold: float = 0.0) -> list[dict[str, Any]]:
    """Return the classes with the highest scores first, in the form of transformers' pipelines.

    Args:
        scores: Shape `(num_labels,)`.
        labels: Names of the classes.
        top_k: Largest number of classes to return; `None` returns all.
        threshold: Lowest score to return.
    """
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": labels[i], "score": float(scores[i])} for i in order if scores[i] >= threshold]
