"""Timelines: the events in a recording, and the window scores that the events come from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..windows import stand_for
from .events import Event, EventDetector, EventSettings, to_events


@dataclass
class Timeline:
    """Events in a recording, with the windows that they come from.

    Args:
        events: Sorted by onset.
        labels: Names of the classes, in the order of the scores.
        duration: Length of the recording in seconds.
        window, hop: Length of a window, and distance from one window to the next, in seconds. The last window ends
            with the recording, so its distance may be shorter.
        settings: Settings of the event detection.
        starts: Start of each window in seconds, of shape `(num_windows,)`.
        scores: float32 of shape `(num_windows, num_labels)`, or `None` if they were not kept.
        path: Path of the recording, or `None` if it came as samples or bytes.
    """

    events: list[Event]
    labels: list[str]
    duration: float
    window: float
    hop: float
    settings: EventSettings
    starts: np.ndarray = field(repr=False)
    scores: np.ndarray | None = field(default=None, repr=False)
    path: str | None = None

    @property
    def borders(self) -> np.ndarray:
        """Seconds of shape `(num_windows + 1,)`: window i stands for the time from border i to border i + 1.

        See [`stand_for`].
        """
        return stand_for(self.starts, self.window, self.duration)


class TimelineBuilder:
    """Collects the scores of a recording's windows and makes a [`Timeline`] of them.

    Args:
        labels: Names of the classes, in the order of the scores.
        window, hop: See [`Timeline`].
        settings: Settings of the event detection.
        keep_scores: Whether the timeline holds the scores.
    """

    def __init__(
        self, labels: Sequence[str], window: float, hop: float, settings: EventSettings, keep_scores: bool
    ) -> None:
        self.labels, self.window, self.hop, self.settings = list(labels), window, hop, settings
        self._detector = EventDetector(settings)
        self._starts: list[float] = []
        self._scores: list[np.ndarray] | None = [] if keep_scores else None

    def add(self, start: float, scores: np.ndarray) -> None:
        """Add the next window: its start in seconds and its scores, float32 of shape `(num_labels,)`."""
        self._starts.append(start)
        self._detector.push(scores[None])
        if self._scores is not None:
            self._scores.append(scores)

    def finish(self, duration: float, path: str | None = None) -> Timeline:
        """Return the timeline of a recording of `duration` seconds; call this once, after the last window."""
        timeline = Timeline(
            events=[],
            labels=self.labels,
            duration=duration,
            window=self.window,
            hop=self.hop,
            settings=self.settings,
            starts=np.array(self._starts),
            scores=None if self._scores is None else np.stack(self._scores),
            path=path,
        )
        timeline.events = to_events(self._detector.finish(), timeline.borders, self.labels, self.settings)
        return timeline
