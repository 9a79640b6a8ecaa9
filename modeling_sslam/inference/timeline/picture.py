"""Pictures of timelines: spectrogram, score curves of the most important classes, and bars for their events."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...common.errors import InferenceError
from ...common.text import escape_controls
from ...filter_bank_sslam import LOWEST_FREQUENCY
from .events import Event
from .formats import clock
from .timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType

# More columns would not be visible, because a picture has fewer pixels in its width.
MAX_COLUMNS = 2048
# More curves could not be told apart.
MAX_CLASSES = 8
# Number of curves in a picture without events.
CLASSES_WITHOUT_EVENTS = 3
DYNAMIC_RANGE_DB = 80.0
# From this number of windows on, curves are thin, because thick ones would overlap.
MANY_WINDOWS = 400
DECIBELS_PER_NEPER = 10 / math.log(10)
# The time axis of longer recordings has minutes and hours.
SECONDS_AXIS_LIMIT = 180.0


class BoundedColumns:
    """Summary of a sequence of vectors in at most `2 * limit` columns.

    A column is the mean or maximum of `vectors_per_column` vectors in a row. That number is 1 at first and doubles
    whenever there are `2 * limit` columns.

    Args:
        limit: Half of the largest number of columns.
        reduce: `np.mean` or `np.max`.
    """

    def __init__(self, limit: int, reduce: Callable[..., np.ndarray]) -> None:
        self.limit, self._reduce = limit, reduce
        self.vectors_per_column = 1
        self._columns: list[np.ndarray] = []
        self._incomplete: list[np.ndarray] = []

    def add(self, vectors: np.ndarray) -> None:
        """Append vectors `(n, size)`."""
        for vector in vectors:
            self._incomplete.append(vector)
            if len(self._incomplete) == self.vectors_per_column:
                self._columns.append(self._reduce(self._incomplete, axis=0))
                self._incomplete = []
            if len(self._columns) == 2 * self.limit:
                self._columns = list(self._reduce(np.reshape(self._columns, (self.limit, 2, -1)), axis=1))
                self.vectors_per_column *= 2

    def columns(self) -> np.ndarray:
        """Return the columns `(num_columns, size)`; the last may cover fewer vectors than the others."""
        rest = [self._reduce(self._incomplete, axis=0)] if self._incomplete else []
        return np.stack(self._columns + rest)


class TimelinePicture:
    """Collects frames and scores from [`SSLAMTagger.timeline`] in bounded memory and draws them.

    Args:
        sampling_rate: Sampling rate of the waveform in Hz.
        frame_seconds: Seconds from one frame to the next.
    """

    def __init__(self, sampling_rate: int, frame_seconds: float) -> None:
        self.sampling_rate, self.frame_seconds = sampling_rate, frame_seconds
        self._frames = BoundedColumns(MAX_COLUMNS, np.mean)
        self._scores = BoundedColumns(MAX_COLUMNS, np.max)

    def add_frames(self, log_mel: torch.Tensor) -> None:
        """Add log-mel frames `(num_frames, num_mel_bins)`; pass this method as `on_frames`."""
        self._frames.add(log_mel.cpu().numpy())

    def add_scores(self, start: float, scores: np.ndarray) -> None:
        """Add the scores `(num_labels,)` of a window that starts at `start` seconds; call it in `on_scores`."""
        self._scores.add(scores[None])

    def figure(self, timeline: Timeline) -> "Figure":
        """Draw the timeline of the frames and scores that were added."""
        from matplotlib import rc_context

        # Names of files and classes may contain $, which matplotlib would read as a formula.
        with rc_context({"text.parse_math": False}):
            return self._figure(timeline)

    def _figure(self, timeline: Timeline) -> "Figure":
        from matplotlib.colors import TABLEAU_COLORS
        from matplotlib.figure import Figure

        classes = self._classes(timeline)
        colors = dict(zip(classes, TABLEAU_COLORS.values(), strict=False))
        figure = Figure(figsize=(12, 4.6 + 0.28 * len(classes)), dpi=120, layout="constrained")
        spectrogram, curves, bars = figure.subplots(
            3, 1, sharex=True, height_ratios=(2.4, 1.6, 0.28 * len(classes) + 0.1)
        )
        self._draw_spectrogram(spectrogram)
        self._draw_curves(curves, timeline, colors)
        _draw_bars(bars, timeline.events, colors)
        title = escape_controls(Path(timeline.path).name) if timeline.path else "recording"
        num_with_events = len({event.label for event in timeline.events})
        if num_with_events > len(classes):
            title += f": {len(classes)} of the {num_with_events} classes with events"
        spectrogram.set_title(title, loc="left")
        _label_time(bars, timeline.duration)
        return figure

    def save(self, timeline: Timeline, path: Path) -> None:
        """Write the picture in the format of the path's suffix."""
        self.figure(timeline).savefig(path)

    def _classes(self, timeline: Timeline) -> list[str]:
        """Return the classes with the longest events, or without events those with the highest scores."""
        lengths: dict[str, float] = {}
        for event in timeline.events:
            lengths[event.label] = lengths.get(event.label, 0.0) + event.offset - event.onset
        if lengths:
            return sorted(lengths, key=lengths.__getitem__, reverse=True)[:MAX_CLASSES]
        nearest = np.argsort(-self._scores.columns().max(0), kind="stable")[:CLASSES_WITHOUT_EVENTS]
        return [timeline.labels[index] for index in nearest]

    def _draw_spectrogram(self, axes: "Axes") -> None:
        decibels = self._frames.columns() * DECIBELS_PER_NEPER
        end = len(decibels) * self._frames.vectors_per_column * self.frame_seconds
        axes.imshow(
            decibels.T,
            origin="lower",
            aspect="auto",
            extent=(0, end, -0.5, decibels.shape[1] - 0.5),
            cmap="magma",
            vmin=max(decibels.min(), decibels.max() - DYNAMIC_RANGE_DB),
            interpolation="nearest" if len(decibels) < MAX_COLUMNS // 2 else "antialiased",
        )
        hertz = [f for f in (100, 500, 1000, 2000, 4000, 8000, 16_000) if f <= self.sampling_rate / 2]
        axes.set_yticks(
            [mel_bin(f, decibels.shape[1], self.sampling_rate) for f in hertz],
            [f"{f // 1000} k" if f >= 1000 else str(f) for f in hertz],
        )
        axes.set_ylabel("Hz")

    def _draw_curves(self, axes: "Axes", timeline: Timeline, colors: "dict[str, ColorType]") -> None:
        scores = self._scores.columns()
        borders = timeline.borders[:: self._scores.vectors_per_column]
        borders = np.append(borders[: len(scores)], timeline.duration)
        linewidth = 1.4 if len(scores) < MANY_WINDOWS else 0.8
        for name, color in reversed(colors.items()):
            curve = scores[:, timeline.labels.index(name)]
            axes.stairs(curve, borders, baseline=None, color=color, linewidth=linewidth)
        axes.axhline(timeline.settings.threshold, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("score")


def check_picture_format(path: Path) -> None:
    """Check that pictures can be written in the format of the path's suffix.

    Raises:
        InferenceError: If the suffix is missing or unknown.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise InferenceError(f"{path} selects no picture format; end the name in one of .{', .'.join(formats)}.")


def _draw_bars(axes: "Axes", events: list[Event], colors: "dict[str, ColorType]") -> None:
    for row, (name, color) in enumerate(colors.items()):
        spans = [(event.onset, event.offset - event.onset) for event in events if event.label == name]
        # Without an edge, an event of a second would be invisible in an hour.
        axes.broken_barh(spans, (row - 0.35, 0.7), facecolors=color, edgecolors=color, linewidth=0.8)
    axes.set_yticks(range(len(colors)), [escape_controls(name) for name in colors])
    for tick, color in zip(axes.get_yticklabels(), colors.values(), strict=True):
        tick.set_color(color)
    axes.set_ylim(len(colors) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def _label_time(axes: "Axes", duration: float) -> None:
    axes.set_xlim(0, duration)
    axes.set_xlabel("time in seconds")
    if duration > SECONDS_AXIS_LIMIT:
        from matplotlib.ticker import FuncFormatter, MultipleLocator

        steps = (30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400)
        step = next((step for step in steps if duration / step <= 12), steps[-1])
        axes.xaxis.set_major_locator(MultipleLocator(step))
        hours = duration >= 3600
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(seconds, hours).removesuffix(".0")))
        axes.set_xlabel("time (h:min:s)" if hours else "time (min:s)")


def mel_bin(frequency: float, num_mel_bins: int, sampling_rate: int) -> float:
    """Return the position of a frequency in Hz on the axis of mel bins. The filter of bin k is centred at k."""

    def mel(f: float) -> float:
        return math.log1p(f / 700)

    lowest, highest = mel(LOWEST_FREQUENCY), mel(sampling_rate / 2)
    return (mel(frequency) - lowest) / (highest - lowest) * (num_mel_bins + 1) - 1
