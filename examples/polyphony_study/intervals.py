"""Means, their confidence intervals over seeds, and differences between encoders paired by seed."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t

LEVEL = 0.95


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def student_interval(values: Sequence[float]) -> Interval | None:
    """Return Student's confidence interval of the mean of independent values; `None` for fewer than two values."""
    if len(values) < 2:
        return None
    mean = statistics.mean(values)
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean - half, mean + half)


def percentile_interval(values: np.ndarray) -> Interval:
    """Return the interval that contains the central share `LEVEL` of resampled values."""
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


class Difference(NamedTuple):
    """The difference in mAP between an encoder and the baseline, paired by seed.

    Attributes:
        protocol: The test of the encoders.
        encoder: The encoder.
        sources: Number of sources of the test clips.
        by_seed: The difference for each seed.
        within: The interval over resamples of the test clips, for each seed.
    """

    protocol: str
    encoder: str
    sources: str
    by_seed: dict[int, float]
    within: dict[int, Interval]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.mean(self.by_seed.values())

    @property
    def interval(self) -> Interval | None:
        """The interval of the mean over seeds; `None` for one seed."""
        return student_interval(list(self.by_seed.values()))
