"""Losses of fine-tuning, as a sum over a batch and a separate divisor.

An update divides the sum over all its batches by the sum of their divisors. The mean is therefore exact even if
processes and forward passes have different numbers of targets.
"""

from typing import Literal

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

Loss = Literal["bce_per_target", "bce_per_clip", "cross_entropy"]


def loss_sum(logits: torch.Tensor, targets: torch.Tensor, loss: Loss, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the loss summed over a batch, in float32.

    Args:
        logits: `(B, K)`.
        targets: `(B, K)` in [0, 1]; mixup makes fractions.
        loss: Binary cross-entropy ("bce_per_target" or "bce_per_clip") or "cross_entropy".
        label_smoothing: Share of a target that is spread evenly over all K classes.
    """
    logits, targets = logits.float(), targets.float()
    if loss == "cross_entropy":
        return cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    smoothed = targets * (1 - label_smoothing) + label_smoothing / targets.shape[1]
    return binary_cross_entropy_with_logits(logits, smoothed, reduction="sum")


def loss_weight(targets: torch.Tensor, loss: Loss) -> torch.Tensor:
    """Return a batch's share of the divisor of an update's loss.

    It is the sum of the targets for "bce_per_target" (clips with several labels), and the number of clips for
    "cross_entropy" and "bce_per_clip" (Speech Commands).

    Args:
        targets: `(B, K)`.
        loss: The loss.
    """
    return targets.sum() if loss == "bce_per_target" else torch.tensor(float(len(targets)), device=targets.device)
