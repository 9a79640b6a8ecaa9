"""Choice of heads by validation clips or by inner folds.

Each fold is the test fold once. If no clips are held out, cross-validation over the other folds chooses the head: for
the test fold a, every other fold b validates heads that were fitted without a and b. For the test fold b, the same
heads are validated on a, so F folds need F (F - 1) / 2 inner fits. The test fold has no part in the choice.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from training.linear.clips import Clips, no_clips
from training.linear.features import FeatureSet
from training.linear.fitting import HeadResult, Setup
from training.linear.heads import Head
from training.linear.kinds import fit_kinds
from training.linear.results import HeadSummary
from training.run.config import TrainingError


def inner_scores(heads: Sequence[Head], folds: dict[str, FeatureSet], setup: Setup) -> dict[str, list[float]]:
    """Return the mean validation metric of each head over the inner folds, by test fold.

    Args:
        heads: The heads.
        folds: The features of each fold.
        setup: Settings and task.

    Raises:
        TrainingError: If there are fewer than three folds.
    """
    if len(folds) < 3:
        raise TrainingError(
            f"There are {len(heads)} heads and {len(folds)} folds. The choice of a head by inner folds needs three "
            "folds or more. Set data.hold_out, or name one layer, one pooling, one of head.kinds and one value of its "
            "settings, such as ridge.strengths."
        )
    scores: dict[str, list[list[float]]] = {name: [] for name in folds}
    for one, other in combinations(folds, 2):
        rest = [features for name, features in folds.items() if name not in (one, other)]
        tests = [Clips([folds[one]]), Clips([folds[other]])]
        description = f"Inner folds without {one}, {other}"
        results = fit_kinds(heads, Clips(rest), no_clips(rest), tests, setup, description)
        scores[other].append([result.tests[0] for result in results])
        scores[one].append([result.tests[1] for result in results])
    return {name: np.mean(values, axis=0).tolist() for name, values in scores.items()}


def choose(rounds: Sequence[Sequence[HeadResult]], candidates: Sequence[int], by_round: bool) -> list[int]:
    """Choose the head with the best validation metric; of several best heads, the first.

    Args:
        rounds: Results of all heads, for each test split.
        candidates: Indices of the heads to choose from.
        by_round: Whether to choose a head for each round. Otherwise the mean over rounds chooses one head for all.

    Returns:
        Index of the chosen head for each round.
    """
    values = np.array([[results[i].validation or 0.0 for i in candidates] for results in rounds])
    if not by_round:
        values = np.repeat(values.mean(0, keepdims=True), len(rounds), axis=0)
    return [candidates[i] for i in values.argmax(1)]


def chosen_summary(rounds: Sequence[Sequence[HeadResult]], candidates: Sequence[int], by_round: bool) -> HeadSummary:
    """Summarise the heads that [`choose`] chooses."""
    chosen = choose(rounds, candidates, by_round)
    return HeadSummary.of([results[i] for results, i in zip(rounds, chosen, strict=True)])
