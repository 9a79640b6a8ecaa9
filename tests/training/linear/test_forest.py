"""The baseline of cepstral coefficients and a random forest."""

import numpy as np
import pytest
import torch
from scipy.fft import dct

from training.linear.forest import cepstral_extractor, cepstral_statistics, fit_forest, forest_scores, forest_size


def test_cepstral_statistics_equal_scipys():
    frames = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))
    values = cepstral_statistics(frames, 13)
    assert values.shape == (3, *cepstral_extractor(13).shape)
    cepstra = dct(frames.double().numpy(), norm="ortho")[..., :13]
    np.testing.assert_allclose(values[:, 0, 0, :13], cepstra.mean(1), atol=1e-5)
    np.testing.assert_allclose(values[:, 0, 0, 13:26], cepstra.std(1), atol=1e-5)


def test_derivatives_of_a_ramp_are_its_slope():
    """The mean derivative is a little less, because the ends are continued as constants."""
    frames = torch.arange(200.0)[None, :, None] * torch.ones(32)
    values = cepstral_statistics(frames, 4)[0, 0, 0]
    assert values[8].item() == pytest.approx(np.sqrt(32), rel=0.03)
    assert values[9:12].abs().max() < 1e-3


def test_mixed_precision_does_not_change_the_statistics():
    frames = torch.randn(2, 30, 32)
    expected = cepstral_statistics(frames, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cepstral_statistics(frames, 5), expected, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["single", "multi", "one class", "class without clips"])
def test_forest_separates_classes(kind):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((120, 6)).astype(np.float32)
    if kind in ("single", "class without clips"):
        targets = np.eye(4 if kind == "single" else 5)[features[:, :4].argmax(1)]
    else:
        targets = (features[:, : 1 if kind == "one class" else 3] > 0.3).astype(float)
    forest = fit_forest(features, targets, trees=30, seed=0)
    scores = forest_scores(forest, features, targets.shape[1])
    assert scores.shape == targets.shape
    assert ((scores > 0.5) == (targets > 0)).mean() > 0.9
    nodes, comparisons = forest_size(forest)
    assert nodes > comparisons > 30
    again = fit_forest(features, targets, trees=30, seed=0)
    np.testing.assert_array_equal(forest_scores(again, features, targets.shape[1]), scores)
    assert forest_scores(forest, features[:0], targets.shape[1]).shape == (0, targets.shape[1])
