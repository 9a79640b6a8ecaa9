"""Division of recordings into splits."""

from collections import Counter

import pytest

from training.data.mixing.splits import divide

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}


def test_no_group_is_in_two_splits_and_each_class_has_its_shares():
    groups = [f"{label}{i // 3}" for label in "abc" for i in range(120)]
    labels = [label for label in "abc" for _ in range(120)]
    splits = divide(groups, labels, SHARES)
    assert all(len({s for s, g in zip(splits, groups, strict=True) if g == group}) == 1 for group in groups)
    for label in "abc":
        counts = Counter(split for split, own in zip(splits, labels, strict=True) if own == label)
        assert counts["train"] == pytest.approx(84, abs=3)
        assert counts["validation"] == pytest.approx(18, abs=3)
        assert counts["test"] == pytest.approx(18, abs=3)


def test_the_order_of_the_recordings_has_no_influence():
    groups = [str(i) for i in range(30)]
    forward = dict(zip(groups, divide(groups, ["x"] * 30, SHARES), strict=True))
    backward = dict(zip(groups[::-1], divide(groups[::-1], ["x"] * 30, SHARES), strict=True))
    assert forward == backward


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_few_groups_are_spread_over_the_splits(count, expected):
    splits = divide([str(i) for i in range(count)], ["x"] * count, SHARES)
    assert len(set(splits)) == expected


def test_a_group_with_several_labels_stays_together():
    splits = divide(["one", "one", "one", "two", "three"], ["a", "b", "b", "a", "b"], {"train": 0.5, "test": 0.5})
    assert len(set(splits[:3])) == 1
