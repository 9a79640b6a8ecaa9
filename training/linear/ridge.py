"""Ridge regression: a linear head in closed form, without learning rate, epochs or random numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from training.linear.neighbours import LEAST_DEVIATION
from training.run.config import TrainingError


class RidgeHead(NamedTuple):
    """A linear function of features: `features @ weight + bias`.

    Attributes:
        weight: Weights of shape `(width, K)`.
        bias: Biases of shape `(K,)`.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return scores `(N, K)` of features `(N, width)`: about 1 for a clip of the class and -1 for others."""
        return features @ self.weight + self.bias


def solve_ridge(features: torch.Tensor, targets: torch.Tensor, strengths: Sequence[float]) -> list[RidgeHead]:
    """Regress targets on features that are standardised over clips, once for each strength.

    The head minimises `mean(|scores - (2 * targets - 1)|^2) + strength * |weight|^2`. The mean is over clips, and
    `weight` applies to standardised features. The bias has no penalty. The linear system has as many unknowns as there
    are features or clips, whichever is the smaller number.

    Args:
        features: Features of shape `(N, width)`.
        targets: Targets of shape `(N, K)`, 0 or 1.
        strengths: Strengths of the penalty, each positive.

    Raises:
        TrainingError: If rounding errors exceed a strength, so that the equations have no solution.
    """
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    scale = torch.where(deviation < LEAST_DEVIATION, 0.0, 1 / deviation.clamp(min=LEAST_DEVIATION))
    standard = (features - mean) * scale
    signs = 2 * targets - 1
    centre = signs.mean(0)
    num_clips, width = features.shape
    is_wide = width > num_clips
    gram = standard @ standard.T if is_wide else standard.T @ standard
    right = signs - centre if is_wide else standard.T @ (signs - centre)
    heads = []
    for strength in strengths:
        system = gram.clone()
        system.diagonal().add_(strength * num_clips)
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            raise TrainingError(f"ridge.strengths: {strength:g} is too small for float32; leave it out.")
        solution = torch.cholesky_solve(right, factor)
        weight = (standard.T @ solution if is_wide else solution) * scale[:, None]
        heads.append(RidgeHead(weight, centre - mean @ weight))
    return heads
