"""Analysis and comparison of sounds for the page, independent of Gradio."""

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ....common.audio import stream_blocks
from ....common.errors import ClipError, InferenceError
from ...embedding.embedder import Embedder, embed
from ...tagger import SSLAMTagger
from ...timeline.events import EventSettings
from ...timeline.picture import TimelinePicture
from ...timeline.timeline import Timeline

TOP_LABELS = 10
# Hop as a share of the window, as in the defaults of `sslam timeline`.
HOP_SHARE = 1 / 4
# Width at which the picture's text has the size of the page's text.
PICTURE_INCHES = 9.0
# The message to the visitor for each reason of a ClipError.
COMPLAINTS = {
    "missing": "no longer exists; upload it again",
    "empty": "is empty",
    "undecodable": "cannot be read as a sound file",
    "unsupported_rate": "has a sampling rate that is not supported",
    "unsupported_samples": "cannot be read as a sound",
    "too_short": "is too short",
    "not_finite": "is damaged",
    "out_of_range": "is damaged or has a wrong header",
}


class RenderedPicture(NamedTuple):
    """A timeline's picture as a PNG file, and the position of its axes.

    Args:
        png: The file.
        left, right: Edges of the axes, as shares of the picture's width from its left edge.
        top, bottom: Edges of the axes, as shares of the picture's height from its top edge.
    """

    png: bytes
    left: float
    right: float
    top: float
    bottom: float


class Analysis(NamedTuple):
    """Labels, as [`SSLAMTagger.tag`] returns them, timeline and picture of a sound."""

    labels: list[dict[str, Any]]
    timeline: Timeline
    picture: RenderedPicture


class Listener:
    """A model that analyses and compares sound files for visitors of the page, one call after the other.

    Args:
        tagger: The model; its encoder computes the embeddings.
        max_minutes: Length of the longest sound to accept.
    """

    def __init__(self, tagger: SSLAMTagger, max_minutes: float) -> None:
        self.tagger, self.max_minutes = tagger, max_minutes
        self._embedder = Embedder(tagger.model.sslam, tagger.feature_extractor, batch_size=tagger.batch_size)
        # Gradio's queue lets the next visitor in when one goes away, even if the model is still at work.
        self._lock = threading.Lock()

    @property
    def clip_seconds(self) -> float:
        """Length of the model's training clips."""
        return self.tagger.feature_extractor.max_length * self.tagger.frame_seconds

    def analyse(
        self,
        path: str,
        window: float,
        threshold: float,
        progress: Callable[[float, str], Any] = lambda share, step: None,
    ) -> Analysis:
        """Compute labels, timeline and picture of a sound file.

        Args:
            path: The file.
            window: Length of the timeline's windows in seconds.
            threshold: Score that an event must reach.
            progress: Called with the share of the work that is done and the name of the current step.

        Raises:
            InferenceError: If the file cannot be used. The message is meant for the visitor.
        """
        with self._lock:
            seconds = self._check_length(path)
            picture = TimelinePicture(self.tagger.feature_extractor.sampling_rate, self.tagger.frame_seconds)

            def on_scores(start: float, scores: np.ndarray) -> None:
                progress(min(1.0, start / seconds), "Listening")
                picture.add_scores(start, scores)

            try:
                timeline = self.tagger.timeline(
                    path,
                    window,
                    window * HOP_SHARE,
                    EventSettings(threshold),
                    keep_scores=False,
                    on_frames=picture.add_frames,
                    on_scores=on_scores,
                )
                progress(1.0, "Labels and picture")
                labels = self.tagger.tag(path, TOP_LABELS)
            except ClipError as error:
                raise _complaint(path, error) from error
            return Analysis(labels, timeline, render(picture, timeline))

    def similarity(self, path: str, other: str) -> float:
        """Return the cosine between the embeddings of two sound files, each the mean over its windows.

        Raises:
            InferenceError: If a file cannot be used. The message is meant for the visitor.
        """
        with self._lock:
            one, two = self._embedding(path), self._embedding(other)
        return float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))

    def _embedding(self, path: str) -> np.ndarray:
        self._check_length(path)
        try:
            windows = np.stack([clip.embedding for clip in embed([path], self._embedder)])
        except ClipError as error:
            raise _complaint(path, error) from error
        return windows.mean(axis=0, dtype=np.float64)

    def _check_length(self, path: str) -> float:
        """Return the length of a sound file in seconds; raise InferenceError if it is too long or unusable."""
        rate, longest = self.tagger.feature_extractor.sampling_rate, 60 * self.max_minutes
        # A header can state any length, so decoded samples are counted.
        seconds = 0.0
        try:
            for block in stream_blocks(path, rate):
                seconds += len(block) / rate
                if seconds > longest:
                    break
        except ClipError as error:
            raise _complaint(path, error) from error
        if seconds > longest:
            raise InferenceError(
                f"{Path(path).name} is too long: this page accepts up to {self.max_minutes:g} min. Upload a part of "
                "it, or use the command sslam timeline, which accepts recordings of any length."
            )
        return seconds


def render(picture: TimelinePicture, timeline: Timeline) -> RenderedPicture:
    """Render a timeline's picture at the width of the page."""
    figure = picture.figure(timeline)
    figure.set_size_inches(PICTURE_INCHES, figure.get_figheight())
    png = io.BytesIO()
    figure.savefig(png, format="png")
    # The layout sets the positions of the axes when the figure is saved, so they are read afterwards.
    upper, lower = figure.axes[0].get_position(), figure.axes[-1].get_position()
    return RenderedPicture(png.getvalue(), upper.x0, upper.x1, 1 - upper.y1, 1 - lower.y0)


def _complaint(path: str, error: ClipError) -> InferenceError:
    """Return the error for the visitor, without the folder that uploads are kept in."""
    detail = error.detail.replace(path, Path(path).name)
    return InferenceError(f"{Path(path).name} {COMPLAINTS[error.reason]} ({detail}).")
