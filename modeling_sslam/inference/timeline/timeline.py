"""What sounds when in a recording: the scores of its windows and the events read off them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..windows import stand_for
from .events import Event, EventSettings, Span, to_events


@dataclass
class Timeline:
    """
    Args:
        events: Ordered by onset.
        labels: Names of the classes, in the order of the scores.
        duration: Of the recording, in seconds.
        window, hop: Length of the windows and from one to the next, in seconds. (The last window ends with the
            recording, so its hop may be shorter.)
        settings: How events were read off scores.
        starts: Start of each window in seconds, of shape `(num_windows,)`.
        scores: float32 of shape `(num_windows, num_labels)`, or `None` where they were not kept.
        path: The recording's path, where it has one.
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
        """Seconds of shape `(num_windows + 1,)`: window i stands for what lies between border i and i + 1. See
        [`stand_for`]."""
        return stand_for(self.starts, self.window, self.duration)


def make_timeline(spans: Sequence[Span], starts: np.ndarray, settings: EventSettings, **fields: Any) -> Timeline:
    """The timeline of windows in which an [`EventDetector`] found `spans`; `fields` are the others of [`Timeline`]."""
    timeline = Timeline(events=[], starts=starts, settings=settings, **fields)
    timeline.events = to_events(spans, timeline.borders, timeline.labels, settings)
    return timeline
