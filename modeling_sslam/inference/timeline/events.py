"""Events with onset and offset, detected in the scores of windows.

A median filter removes single outliers. Hysteresis then finds events: a class's event lasts while its score stays at
`release` or above, and counts only if the score reaches `threshold` meanwhile. So a score that wavers between the two
does not split an event. Both steps take scores in blocks; apart from the events found, their memory is bounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...common.errors import InferenceError


@dataclass(frozen=True)
class EventSettings:
    """Settings of the event detection.

    Args:
        threshold: Score that an event must reach.
        release: Score at which an event begins and ends; `None` stands for half of the threshold.
        median: Length of the median filter over a class's scores in windows, an odd number; 1 filters nothing.
        max_gap: Events of a class that are at most this many seconds apart are joined.
        min_duration: Events shorter than this many seconds are dropped, after joining.

    Raises:
        InferenceError: If `threshold` and `release` are not in (0, 1] or contradict each other, or if `median` is not
            a positive odd number.
    """

    threshold: float = 0.5
    release: float | None = None
    median: int = 3
    max_gap: float = 0.0
    min_duration: float = 0.0

    def __post_init__(self) -> None:
        release = self.threshold / 2 if self.release is None else self.release
        object.__setattr__(self, "release", release)
        if not 0 < release <= self.threshold <= 1:
            raise InferenceError(
                f"threshold={self.threshold:g} and release={release:g} must lie in (0, 1], with release at most equal "
                "to threshold."
            )
        if self.median < 1 or self.median % 2 == 0:
            raise InferenceError(
                f"median={self.median} must be an odd number of windows, such as 3; 1 filters nothing."
            )


class Event(NamedTuple):
    """An event of a class from `onset` to `offset` (seconds), with its highest filtered score."""

    onset: float
    offset: float
    label: str
    score: float


class Span(NamedTuple):
    """An event in numbers of windows: class index, first and last window (inclusive), highest filtered score."""

    label: int
    first: int
    last: int
    score: float


class MedianFilter:
    """Running median over `width` windows, for scores in blocks.

    Beyond both ends, the filter repeats the first and the last window.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._pending: np.ndarray | None = None

    def push(self, scores: np.ndarray) -> np.ndarray:
        """Add scores `(n, num_labels)`; return the filtered scores that are complete now."""
        if self._pending is None:
            self._pending = np.repeat(scores[:1], self.width // 2, axis=0)
        self._pending = np.concatenate((self._pending, scores))
        if len(self._pending) < self.width:
            return scores[:0]
        neighbourhoods = np.lib.stride_tricks.sliding_window_view(self._pending, self.width, axis=0)
        filtered = np.median(neighbourhoods, axis=-1)
        self._pending = self._pending[len(filtered) :]
        return filtered

    def finish(self) -> np.ndarray:
        """Return the remaining filtered scores."""
        if self._pending is None:
            return np.empty((0, 0), np.float32)
        return self.push(np.repeat(self._pending[-1:], self.width // 2, axis=0))


class Hysteresis:
    """Detector of spans with scores of at least `release` that reach `threshold`, for scores in blocks."""

    def __init__(self, threshold: float, release: float) -> None:
        self.threshold, self.release = threshold, release
        self._num_windows = 0
        # For each class: the first window of the current span (-1: there is none) and the highest score in it.
        self._first = np.empty(0, np.int64)
        self._peak = np.empty(0)

    def push(self, scores: np.ndarray) -> list[Span]:
        """Add scores `(n, num_labels)`; return the spans that end in them."""
        if not self._num_windows:
            self._first, self._peak = np.full(scores.shape[1], -1), np.zeros(scores.shape[1])
        spans: list[Span] = []
        for row in scores:
            above = row >= self.release
            spans += self._close(~above)
            self._first[above & (self._first < 0)] = self._num_windows
            self._peak = np.where(above, np.maximum(self._peak, row), 0.0)
            self._num_windows += 1
        return spans

    def finish(self) -> list[Span]:
        """Return the spans that last to the end."""
        return self._close(np.ones(len(self._first), bool))

    def _close(self, ended: np.ndarray) -> list[Span]:
        """End the spans of the classes in the mask `ended`; return those that reached the threshold."""
        ended = ended & (self._first >= 0)
        spans = [
            Span(int(label), int(self._first[label]), self._num_windows - 1, float(self._peak[label]))
            for label in np.flatnonzero(ended & (self._peak >= self.threshold))
        ]
        self._first[ended] = -1
        return spans


class EventDetector:
    """Median filter, then hysteresis, for scores in blocks."""

    def __init__(self, settings: EventSettings) -> None:
        assert settings.release is not None, "EventSettings replaces None by half of the threshold."
        self._filter = MedianFilter(settings.median)
        self._hysteresis = Hysteresis(settings.threshold, settings.release)
        self._spans: list[Span] = []

    def push(self, scores: np.ndarray) -> None:
        """Add scores `(n, num_labels)`."""
        self._spans += self._hysteresis.push(self._filter.push(scores))

    def finish(self) -> list[Span]:
        """Return all spans, sorted by their first window and then by class."""
        self._spans += self._hysteresis.push(self._filter.finish()) + self._hysteresis.finish()
        return sorted(self._spans, key=lambda span: (span.first, span.label))


def to_events(
    spans: Sequence[Span], borders: np.ndarray, labels: Sequence[str], settings: EventSettings
) -> list[Event]:
    """Convert spans to seconds, join events across short gaps and drop short events.

    Args:
        spans: Sorted by their first window.
        borders: Seconds of shape `(num_windows + 1,)`. Window i stands for the time from border i to border i + 1.
        labels: Names of the classes.
        settings: Of these, `max_gap` and `min_duration` are used.

    Returns:
        Events sorted by onset.
    """
    events: list[Event] = []
    latest: dict[int, int] = {}  # position of each class's latest event in `events`
    for label, first, last, score in spans:
        event = Event(float(borders[first]), float(borders[last + 1]), labels[label], score)
        position = latest.get(label)
        if position is not None and event.onset - events[position].offset <= settings.max_gap:
            joined = events[position]
            events[position] = joined._replace(offset=event.offset, score=max(joined.score, score))
        else:
            latest[label] = len(events)
            events.append(event)
    return [event for event in events if event.offset - event.onset >= settings.min_duration]
