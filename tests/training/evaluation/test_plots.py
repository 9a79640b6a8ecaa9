"""Plots of an evaluation."""

import numpy as np
import pytest
from matplotlib.image import imread

from training.evaluation.plots import plot_confusion, plot_groups, plot_per_class

# Matplotlib would parse this as a formula, and fail.
NAME = r"$\frac{$"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plot.png"


def is_drawn(path):
    return np.std(imread(path)[..., :3]) > 0.05


def test_class_names_are_not_formulas(path):
    rows = [{"label": NAME, "recall": 0.7, "num_clips": 3}, {"label": "b", "recall": None, "num_clips": 0}]
    plot_per_class(rows, "recall", "recall", "num_clips", NAME, path)
    assert is_drawn(path)
    plot_confusion([[2, 1], [0, 3]], [NAME, "b"], NAME, path)
    assert is_drawn(path)
    plot_groups({NAME: {"num_clips": 3, "map": 0.5, "chance_map": 0.1}}, "map", "mAP", NAME, NAME, path)
    assert is_drawn(path)
