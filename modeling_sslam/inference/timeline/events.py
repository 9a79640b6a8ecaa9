"""Scores of windows to events with onset and offset: a median filter against single outliers, then hysteresis.

Hysteresis keeps one event where a score wavers: it begins and ends where the score crosses `release`, but only what
rises to `threshold` in between counts. Both work on a stream of scores; what is held does not grow with the recording
but for the events themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...common.errors import InferenceError


@dataclass(frozen=True)
class EventSettings:
    """How events are read off scores.

    Args:
        threshold: Score that an event reaches at least once.
        release: Score at which it begins and ends; half the threshold if `None`.
        median: Windows of the median filter over each class's scores, an odd number; 1 filters nothing.
        max_gap: Events of a class that lie no further apart, in seconds, become one.
        min_duration: Shorter events, in seconds, are dropped, after that.

    Raises:
        InferenceError: If they contradict each other.
    """

    threshold: float = 0.5
    release: float | None = None
    median: int = 3
    max_gap: float = 0.0
    min_duration: float = 0.0

    def __post_init__(self) -> None:
        if self.release is None:
            object.__setattr__(self, "release", self.threshold / 2)
        if not 0 < self.release <= self.threshold <= 1:
            raise InferenceError(
                f"threshold={self.threshold:g} and release={self.release:g} must lie in (0, 1], the release not above "
                "the threshold."
            )
        if self.median < 1 or self.median % 2 == 0:
            raise InferenceError(
                f"median={self.median} must be an odd number of windows, such as 3; 1 filters nothing."
            )


class Event(NamedTuple):
    """A sound of a class from `onset` to `offset` (seconds) and the highest filtered score in it."""

    onset: float
    offset: float
    label: str
    score: float


class Span(NamedTuple):
    """An event in windows: from window `first` to `last`, that one included."""

    label: int
    first: int
    last: int
    score: float


class MedianFilter:
    """The median over `width` windows around each, for scores that come in blocks. The first and the last window are
    repeated beyond the ends."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._pending: np.ndarray | None = None

    def push(self, scores: np.ndarray) -> np.ndarray:
        """Scores `(n, num_labels)` to those filtered ones that they complete."""
        if self._pending is None:
            self._pending = np.repeat(scores[:1], self.width // 2, axis=0)
        self._pending = np.concatenate((self._pending, scores))
        if len(self._pending) < self.width:
            return scores[:0]
        around = np.lib.stride_tricks.sliding_window_view(self._pending, self.width, axis=0)
        filtered = np.median(around, axis=-1)
        self._pending = self._pending[len(filtered) :]
        return filtered

    def finish(self) -> np.ndarray:
        """The last ones."""
        if self._pending is None:
            return np.empty((0, 0), np.float32)
        return self.push(np.repeat(self._pending[-1:], self.width // 2, axis=0))


class Hysteresis:
    """Spans where a class's score stays at `release` or above and reaches `threshold`, for scores in blocks."""

    def __init__(self, threshold: float, release: float) -> None:
        self.threshold, self.release = threshold, release
        self._count = 0
        self._first: np.ndarray | None = None  # window where a class rose to the release, -1 while it is below
        self._peak = np.empty(0)

    def push(self, scores: np.ndarray) -> list[Span]:
        """Scores `(n, num_labels)` to the spans that end in them."""
        if self._first is None:
            self._first, self._peak = np.full(scores.shape[1], -1), np.zeros(scores.shape[1])
        spans: list[Span] = []
        for row in scores:
            above = row >= self.release
            spans += self._close(~above)
            self._first[above & (self._first < 0)] = self._count
            self._peak = np.where(above, np.maximum(self._peak, row), 0.0)
            self._count += 1
        return spans

    def finish(self) -> list[Span]:
        """The spans that last to the end."""
        return [] if self._first is None else self._close(np.ones(len(self._first), bool))

    def _close(self, ended: np.ndarray) -> list[Span]:
        ended = ended & (self._first >= 0)
        spans = [
            Span(int(label), int(self._first[label]), self._count - 1, float(self._peak[label]))
            for label in np.flatnonzero(ended & (self._peak >= self.threshold))
        ]
        self._first[ended] = -1
        return spans


class EventDetector:
    """Both in a row: scores `(n, num_labels)` in blocks to spans, ordered by their beginning at the end."""

    def __init__(self, settings: EventSettings) -> None:
        self._filter = MedianFilter(settings.median)
        self._hysteresis = Hysteresis(settings.threshold, settings.release)
        self._spans: list[Span] = []

    def push(self, scores: np.ndarray) -> None:
        self._spans += self._hysteresis.push(self._filter.push(scores))

    def finish(self) -> list[Span]:
        self._spans += self._hysteresis.push(self._filter.finish()) + self._hysteresis.finish()
        return sorted(self._spans, key=lambda span: (span.first, span.label))


def to_events(
    spans: Sequence[Span], borders: np.ndarray, labels: Sequence[str], settings: EventSettings
) -> list[Event]:
    """Spans as events in seconds, joined and sifted.

    Args:
        spans: Ordered by their beginning.
        borders: Seconds of shape `(num_windows + 1,)`: window i stands for what lies between border i and i + 1.
        labels: Names of the classes.

    Returns:
        Events by onset.
    """
    events: list[Event] = []
    latest: dict[int, int] = {}
    for label, first, last, score in spans:
        event = Event(float(borders[first]), float(borders[last + 1]), labels[label], score)
        before = latest.get(label)
        if before is not None and event.onset - events[before].offset <= settings.max_gap:
            joined = events[before]
            events[before] = joined._replace(offset=event.offset, score=max(joined.score, score))
        else:
            latest[label] = len(events)
            events.append(event)
    return [event for event in events if event.offset - event.onset >= settings.min_duration]
