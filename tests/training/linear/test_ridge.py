"""Ridge regression against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from training.linear.ridge import solve_ridge
from training.run.config import TrainingError

STRENGTHS = [0.01, 1.0]


@pytest.mark.parametrize("width", [8, 90], ids=["more clips than features", "more features than clips"])
def test_scores_equal_those_of_scikit_learn(width):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, width, generator=generator) * torch.arange(1.0, width + 1) + 5
    targets = (torch.rand(60, 3, generator=generator) < 0.3).float()
    others = 5 + torch.randn(20, width, generator=generator)
    mean, deviation = features.double().mean(0), features.double().std(0, correction=0)
    for strength, head in zip(STRENGTHS, solve_ridge(features, targets, STRENGTHS), strict=True):
        reference = Ridge(60 * strength).fit((features.double() - mean) / deviation, 2 * targets.double() - 1)
        expected = reference.predict((others.double() - mean) / deviation)
        np.testing.assert_allclose(head.logits(others), expected, atol=2e-4)


def test_constant_features_give_the_classes_frequencies():
    """Neither rounding errors of a constant nor a class without clips have an influence."""
    targets = torch.zeros(40, 2)
    targets[:10, 0] = 1
    (head,) = solve_ridge(torch.full((40, 5), 0.1), targets, [0.01])
    scores = head.logits(torch.randn(3, 5))
    torch.testing.assert_close(scores, torch.tensor([[-0.5, -1.0]]).expand(3, 2))


def test_a_stronger_penalty_gives_smaller_weights():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    weak, strong = solve_ridge(features, (features[:, :2] > 0).float(), STRENGTHS)
    assert strong.weight.norm() < 0.7 * weak.weight.norm()


def test_a_strength_below_the_rounding_errors_is_named():
    """The features have rank 8, so that only the penalty makes the equations solvable."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 8, generator=generator) @ torch.randn(8, 300, generator=generator)
    with pytest.raises(TrainingError, match=r"ridge.strengths: 1e-09 is too small"):
        solve_ridge(features, (features[:, :2] > 0).float(), [0.01, 1e-9])
