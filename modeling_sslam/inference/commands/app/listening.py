"""What the page asks of the model. Nothing here knows of Gradio."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ....common.audio import stream_blocks
from ....common.decoding import duration_seconds
from ....common.errors import ClipError, InferenceError
from ...embedding.embedder import Embedder, embed
from ...tagger import SSLAMTagger
from ...timeline.events import EventSettings
from ...timeline.picture import TimelinePicture
from ...timeline.timeline import Timeline

TOP_LABELS = 10
# From one window to the next, of a window: what `sslam timeline` has by default.
HOP_SHARE = 1 / 4
# At this width the lettering has the size of the page's own.
PICTURE_INCHES = 9.0
# What each reason of a ClipError means to a person who wanted to hear something.
COMPLAINTS = {
    "missing": "is no longer there; upload it again",
    "empty": "is empty",
    "undecodable": "is no sound file that can be read here",
    "too_short": "is too short",
    "not_finite": "is damaged",
    "out_of_range": "is damaged or mislabelled",
}


class Picture(NamedTuple):
    """A timeline's picture as PNG, and where in it its axes lie: shares of its width from the left and of its height
    from the top."""

    png: bytes
    left: float
    right: float
    top: float
    bottom: float


class Analysis(NamedTuple):
    """What there is to say of a sound; `labels` as [`SSLAMTagger.tag`] gives them."""

    labels: list[dict[str, Any]]
    timeline: Timeline
    picture: Picture


class Listener:
    """One model for all that the page does.

    Args:
        tagger: The model; its encoder gives the embeddings.
        max_minutes: Longest sound to take.
    """

    def __init__(self, tagger: SSLAMTagger, max_minutes: float) -> None:
        self.tagger, self.max_minutes = tagger, max_minutes
        self._embedder = Embedder(tagger.model.sslam, tagger.feature_extractor, batch_size=tagger.batch_size)

    @property
    def clip_seconds(self) -> float:
        """Length of the clips that the model was trained on."""
        return self.tagger.feature_extractor.max_length * self.tagger.frame_seconds

    def analyse(
        self,
        path: str,
        window: float,
        threshold: float,
        progress: Callable[[float, str], Any] = lambda share, doing: None,
    ) -> Analysis:
        """Labels, events and picture of a sound file.

        Args:
            window: Length of the timeline's windows in seconds.
            threshold: Score that an event reaches.
            progress: Called with the share that is done and what is being done.

        Raises:
            InferenceError: If the file cannot be used; the message is for the visitor.
        """
        seconds = self._check(path)
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
        return Analysis(labels, timeline, draw(picture, timeline))

    def similarity(self, path: str, other: str) -> float:
        """Cosine between the embeddings of two sound files, each the mean over its windows.

        Raises:
            InferenceError: If a file cannot be used; the message is for the visitor.
        """
        one, two = self._embedding(path), self._embedding(other)
        return float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))

    def _embedding(self, path: str) -> np.ndarray:
        self._check(path)
        try:
            return np.mean([clip.embedding for clip in embed([path], self._embedder)], axis=0, dtype=np.float64)
        except ClipError as error:
            raise _complaint(path, error) from error

    def _check(self, path: str) -> float:
        """The length of a sound file in seconds; raises InferenceError if it is too long or cannot be used."""
        rate, longest = self.tagger.feature_extractor.sampling_rate, 60 * self.max_minutes
        seconds = duration_seconds(path)
        if seconds is None:
            # What libsndfile does not read says its length only by being decoded.
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
                f"{Path(path).name} is too long: this page takes up to {self.max_minutes:g} min. Cut it, or use the "
                "command sslam timeline, which takes recordings of any length."
            )
        return seconds


def draw(picture: TimelinePicture, timeline: Timeline) -> Picture:
    """A timeline's picture for the page."""
    figure = picture.figure(timeline)
    figure.set_size_inches(PICTURE_INCHES, figure.get_figheight())
    png = io.BytesIO()
    figure.savefig(png, format="png")
    # Drawing has given the axes their places.
    upper, lower = figure.axes[0].get_position(), figure.axes[-1].get_position()
    return Picture(png.getvalue(), upper.x0, upper.x1, 1 - upper.y1, 1 - lower.y0)


def _complaint(path: str, error: ClipError) -> InferenceError:
    # Where uploads lie is nobody's business.
    detail = str(error).removeprefix(f"{error.reason}: ").replace(path, Path(path).name)
    return InferenceError(f"{Path(path).name} {COMPLAINTS[error.reason]} ({detail}).")
