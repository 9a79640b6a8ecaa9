"""Choice of heads by validation clips and by inner folds."""

from pathlib import Path

import numpy as np
import pytest

from training.linear import choice
from training.linear.choice import choose, chosen_summary, inner_scores
from training.linear.features import FeatureSet
from training.linear.fitting import Cost, HeadResult
from training.linear.heads import Head
from training.run.config import TrainingError

HEADS = [Head(0, "mean"), Head(1, "mean"), Head(1, "max")]


def result(head, validation, tests):
    return HeadResult(head, 1, 0.1, validation, tests, None, None, None, Cost(1, 2, 3, 0.5))


def rounds_of(validations, tests):
    return [
        [result(head, v, [t]) for head, v, t in zip(HEADS, row, of_row, strict=True)]
        for row, of_row in zip(validations, tests, strict=True)
    ]


def test_each_round_or_all_rounds_together_choose():
    rounds = rounds_of([[0.5, 0.6, 0.1], [0.9, 0.6, 0.1]], [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert choose(rounds, [0, 1, 2], by_round=True) == [1, 0]
    assert choose(rounds, [0, 1, 2], by_round=False) == [0, 0]
    assert choose(rounds, [2, 1], by_round=True) == [1, 1]
    summary = chosen_summary(rounds, [0, 1, 2], by_round=True)
    assert summary.heads == [HEADS[1], HEADS[0]]
    assert summary.tests == [0.2, 0.4]
    assert summary.test == pytest.approx(0.3)
    assert summary.test_spread == pytest.approx(np.std([0.2, 0.4], ddof=1))
    assert summary.validation == pytest.approx(0.75)
    assert summary.cost == Cost(1, 2, 3, 1.0)
    row = summary.as_full_row("accuracy")
    assert row["layer"] == [1, 0]
    assert row["pooling"] == "mean"


def test_the_first_of_equal_heads_is_chosen():
    rounds = rounds_of([[0.3, 0.7, 0.7]], [[0.0, 0.0, 0.0]])
    assert choose(rounds, [0, 1, 2], by_round=True) == [1]


def folds_of(count):
    return {
        f"fold{i}": FeatureSet(Path(), [f"{i}{k}" for k in range(3)], [["x"]] * 3, None, None, {}, np.zeros(0))
        for i in range(count)
    }


def test_a_test_fold_has_no_part_in_its_choice(monkeypatch):
    """Each inner fit leaves out both the fold that it validates on and the test fold."""
    calls = []

    def fit(heads, train, validation, tests, setup, description):
        training = {id_[0] for id_ in train.column("ids")}
        left_out = [{id_[0] for id_ in part.column("ids")} for part in tests]
        calls.append((training, left_out))
        assert not len(validation)
        # The metric on fold i is i.
        return [result(head, None, [float(*part) for part in left_out]) for head in heads]

    monkeypatch.setattr(choice, "fit_kinds", fit)
    scores = inner_scores(HEADS, folds_of(4), None)
    assert len(calls) == 6
    for training, (one, other) in calls:
        assert not training & (one | other)
        assert training | one | other == {"0", "1", "2", "3"}
    for i in range(4):
        assert scores[f"fold{i}"] == pytest.approx([np.mean([k for k in range(4) if k != i])] * 3)


def test_two_folds_cannot_choose():
    with pytest.raises(TrainingError, match=r"3 heads and 2 folds.*data.hold_out"):
        inner_scores(HEADS, folds_of(2), None)
