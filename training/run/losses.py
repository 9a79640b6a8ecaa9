"""The losses of fine-tuning: the sum over a batch, and apart from it what an update's sum is divided by, so that its
mean is exact however unevenly processes and forward passes share the targets out."""

from typing import Literal

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

Loss = Literal["bce_per_target", "bce_per_clip", "cross_entropy"]


def loss_sum(logits: torch.Tensor, targets: torch.Tensor, loss: Loss, label_smoothing: float = 0.0) -> torch.Tensor:
    """The loss summed over a batch, in float32.

    Args:
        logits: `(B, K)`.
        targets: `(B, K)` in [0, 1], mixed or not.
        loss: "bce_per_target" or "bce_per_clip", binary cross-entropy; "cross_entropy".
        label_smoothing: Share of a target that is spread evenly over all K classes.
    """
    logits, targets = logits.float(), targets.float()
    if loss == "cross_entropy":
        return cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    smoothed = targets * (1 - label_smoothing) + label_smoothing / targets.shape[1]
    return binary_cross_entropy_with_logits(logits, smoothed, reduction="sum")


def loss_weight(targets: torch.Tensor, loss: Loss) -> torch.Tensor:
    """What a batch adds to the divisor of an update's loss: the sum of its targets for "bce_per_target" (clips with
    several labels), the number of its clips for "cross_entropy" and "bce_per_clip" (Speech Commands)."""
    return targets.sum() if loss == "bce_per_target" else torch.tensor(float(len(targets)), device=targets.device)
