"""A picture of a timeline: spectrogram, curves of the classes that matter most, and bars for their events."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...common.errors import InferenceError
from ...filter_bank_sslam import LOWEST_FREQUENCY
from .events import Event
from .formats import clock
from .timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More columns than a picture has pixels show nothing more.
MAX_COLUMNS = 2048
# More curves cannot be told apart.
MAX_CLASSES = 8
CLASSES_WITHOUT_EVENTS = 3
DYNAMIC_RANGE_DB = 80.0
# With more windows than this, thick curves run into each other.
FEW_WINDOWS = 400
DECIBELS_PER_NEPER = 10 / math.log(10)
# Up to here axes count seconds; beyond, hours and minutes are easier to read.
SECONDS_AXIS_LIMIT = 180.0


class BoundedColumns:
    """A sequence of vectors as at most `2 * limit` columns, however long it is: the mean or maximum of 1, then 2, then
    4, ... vectors each.

    Args:
        reduce: `np.mean` or `np.max`.
    """

    def __init__(self, limit: int, reduce: "np.ufunc") -> None:
        self.limit, self._reduce = limit, reduce
        self.vectors_per_column = 1
        self._columns: list[np.ndarray] = []
        self._incomplete: list[np.ndarray] = []

    def add(self, vectors: np.ndarray) -> None:
        """Appends vectors `(n, size)`."""
        for vector in vectors:
            self._incomplete.append(vector)
            if len(self._incomplete) == self.vectors_per_column:
                self._columns.append(self._reduce(self._incomplete, axis=0))
                self._incomplete = []
            if len(self._columns) == 2 * self.limit:
                self._columns = list(self._reduce(np.reshape(self._columns, (self.limit, 2, -1)), axis=1))
                self.vectors_per_column *= 2

    def columns(self) -> np.ndarray:
        """The columns `(num_columns, size)`; the last may stand for fewer vectors than the others."""
        rest = [self._reduce(self._incomplete, axis=0)] if self._incomplete else []
        return np.stack(self._columns + rest)


class TimelinePicture:
    """Gathers what [`SSLAMTagger.timeline`] computes, in memory that does not grow with the recording, and draws it.

    Args:
        sampling_rate: Of the waveform that the frames come from, in Hz.
        frame_seconds: From one frame to the next.
    """

    def __init__(self, sampling_rate: int, frame_seconds: float) -> None:
        self.sampling_rate, self.frame_seconds = sampling_rate, frame_seconds
        self._frames = BoundedColumns(MAX_COLUMNS, np.mean)
        self._scores = BoundedColumns(MAX_COLUMNS, np.max)

    def add_frames(self, log_mel: torch.Tensor) -> None:
        """Log-mel frames `(num_frames, num_mel_bins)`, for `on_frames`."""
        self._frames.add(log_mel.cpu().numpy())

    def add_scores(self, start: float, scores: np.ndarray) -> None:
        """A window's scores `(num_labels,)`, for `on_scores`."""
        self._scores.add(scores[None])

    def figure(self, timeline: Timeline) -> "Figure":
        """The picture as a matplotlib figure; save it with `figure.savefig`."""
        from matplotlib import rc_context

        # A $ in the name of a file or class is a $.
        with rc_context({"text.parse_math": False}):
            return self._figure(timeline)

    def _figure(self, timeline: Timeline) -> "Figure":
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        classes = self._classes(timeline)
        colors = dict(zip(classes, colormaps["tab10"].colors, strict=False))
        figure = Figure(figsize=(12, 4.6 + 0.28 * len(classes)), dpi=120, layout="constrained")
        spectrogram, curves, bars = figure.subplots(
            3, 1, sharex=True, height_ratios=(2.4, 1.6, 0.28 * len(classes) + 0.1)
        )
        self._draw_spectrogram(spectrogram)
        self._draw_curves(curves, timeline, colors)
        _draw_bars(bars, timeline.events, colors)
        title = Path(timeline.path).name if timeline.path else "recording"
        sounding = len({event.label for event in timeline.events})
        if sounding > len(classes):
            title += f": {len(classes)} of the {sounding} classes with events"
        spectrogram.set_title(title, loc="left")
        _label_time(bars, timeline.duration)
        return figure

    def draw(self, timeline: Timeline, path: Path) -> None:
        """Writes the picture, in the format of the path's suffix."""
        self.figure(timeline).savefig(path)

    def _classes(self, timeline: Timeline) -> list[str]:
        """The classes that sound longest, or where none does, those that come nearest."""
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

    def _draw_curves(self, axes: "Axes", timeline: Timeline, colors: dict[str, tuple]) -> None:
        scores = self._scores.columns()
        borders = timeline.borders[:: self._scores.vectors_per_column]
        borders = np.append(borders[: len(scores)], timeline.duration)
        linewidth = 1.4 if len(scores) < FEW_WINDOWS else 0.8
        for name, color in reversed(colors.items()):
            curve = scores[:, timeline.labels.index(name)]
            axes.stairs(curve, borders, baseline=None, color=color, linewidth=linewidth)
        axes.axhline(timeline.settings.threshold, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("score")


def check_picture_format(path: Path) -> None:
    """Raises InferenceError unless a picture can be written in the format of the path's suffix."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise InferenceError(f"{path} is no picture; end its name in one of .{', .'.join(formats)}.")


def _draw_bars(axes: "Axes", events: list[Event], colors: dict[str, tuple]) -> None:
    for row, (name, color) in enumerate(colors.items()):
        spans = [(event.onset, event.offset - event.onset) for event in events if event.label == name]
        # An edge, so that an event of a second shows within an hour.
        axes.broken_barh(spans, (row - 0.35, 0.7), facecolors=color, edgecolors=color, linewidth=0.8)
    axes.set_yticks(range(len(colors)), list(colors))
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
    """Where on the axis of mel bins a frequency in Hz lies; bin k's filter is centred at k."""

    def mel(f: float) -> float:
        return math.log1p(f / 700)

    lowest, highest = mel(LOWEST_FREQUENCY), mel(sampling_rate / 2)
    return (mel(frequency) - lowest) / (highest - lowest) * (num_mel_bins + 1) - 1
