"""Recordings of any length to scores of the classes: the Python interface behind `sslam tag` and `sslam timeline`."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..common.audio import CountedBlocks, waveform_blocks
from ..common.errors import ClipError, InferenceError
from ..common.glibc import MemoryTrimmer
from ..configuration_sslam import SSLAMConfig
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMForAudioClassification
from .devices import choose_batch_size, compute_in_parts
from .loading import load_pretrained, speed_up
from .prefetch import prefetch
from .timeline.events import EventDetector, EventSettings
from .timeline.timeline import Timeline, make_timeline
from .windows import cut_windows, model_inputs, stream_log_mel

Key = TypeVar("Key")
# A path, encoded bytes, {"array": ..., "sampling_rate": ...} as `datasets` gives it, or samples at the model's rate.
Audio = str | Path | bytes | dict[str, Any] | np.ndarray | torch.Tensor
# Enough for several threads to decode short files while the model is busy with a batch.
RECORDINGS_AHEAD = 32


class SSLAMTagger:
    """A classifier with its feature extractor, applied to windows of recordings of any length.

    A recording is decoded, resampled and goes through the filter bank once, in blocks and in threads beside the model;
    windows of it are padded as in training and classified in batches. Scores are the sigmoid of the logits of a
    multi-label model and the softmax of any other, as in transformers' pipeline.

    Args:
        model: The classifier, on the device to compute on.
        feature_extractor: That of the model.
        batch_size: Windows at a time. "auto" goes by the device's memory, and halves when it is not enough after all.

    Example:

    ```python
    >>> from modeling_sslam.inference import SSLAMTagger

    >>> tagger = SSLAMTagger.from_pretrained("outputs/quickstart")
    >>> tagger.tag("tests/fixtures/audio/misc_crow.flac", top_k=2)
    [{'label': 'LABEL_11', 'score': 0.99...}, {'label': 'LABEL_3', 'score': 0.99...}]
    >>> timeline = tagger.timeline("tests/fixtures/audio/guit_e_slide.flac", window=2.0, hop=0.5)
    >>> timeline.scores.shape
    (6, 12)
    ```
    """

    def __init__(
        self,
        model: SSLAMForAudioClassification,
        feature_extractor: SSLAMFeatureExtractor,
        batch_size: int | str = "auto",
    ) -> None:
        if model.config.problem_type == "regression":
            raise InferenceError("This model gives values, not scores of classes (problem_type='regression').")
        self.model = model.eval()
        self.feature_extractor = feature_extractor
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int | str = "auto",
        revision: str | None = None,
    ) -> "SSLAMTagger":
        """Loads a folder or Hub repository that `save_pretrained` or `python -m conversion` wrote. No code from it is
        run.

        Args:
            model: Folder, or OWNER/NAME.
            device: "auto" takes the accelerator of this machine, or else the CPU.
            dtype: "auto" is what the weights were saved in; "int8", on a CPU, an approximation of float32.
            batch_size: See the class.
            revision: Branch, tag or commit on the Hub.

        Raises:
            InferenceError: If there is no SSLAM classifier there, or no such device.
        """
        remedy = " It is an encoder without classifier: fine-tune it, or convert a fine-tuned checkpoint."
        classifier, extractor = load_pretrained(SSLAMForAudioClassification, model, device, dtype, revision, remedy)
        return cls(speed_up(classifier, dtype), extractor, batch_size)

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of the scores."""
        return [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]

    @property
    def is_multi_label(self) -> bool:
        """Whether classes are scored independently, so that several can be present at a time."""
        return self.model.config.problem_type == "multi_label_classification"

    def num_window_frames(self, seconds: float) -> int:
        """Frames of a window of so many seconds.

        Raises:
            InferenceError: If that is shorter than a frame or longer than the model's position table.
        """
        extractor, config = self.feature_extractor, self.model.config
        num_samples = round(seconds * extractor.sampling_rate)
        if num_samples < extractor.frame_length:
            raise InferenceError(
                f"A window of {seconds:g} s is shorter than one frame; take at least "
                f"{extractor.frame_length / extractor.sampling_rate:g} s."
            )
        num_frames = extractor.num_frames(num_samples)
        longest = config.max_position_embeddings * config.patch_size
        if num_frames > longest:
            raise InferenceError(
                f"A window of {seconds:g} s has {num_frames} frames, but the model's position table ends at "
                f"{longest}; take at most {extractor.num_samples(longest) / extractor.sampling_rate:.2f} s."
            )
        return num_frames

    def num_hop_frames(self, seconds: float, window: float) -> int:
        """Frames from one window to the next.

        Raises:
            InferenceError: If windows would not advance, or would leave gaps.
        """
        num_frames = round(seconds / self.frame_seconds)
        if num_frames < 1 or seconds > window:
            raise InferenceError(
                f"A hop of {seconds:g} s must be at least one frame of {self.frame_seconds:g} s and at most the "
                f"window of {window:g} s."
            )
        return num_frames

    @property
    def frame_seconds(self) -> float:
        """Seconds from one log-mel frame to the next."""
        return self.feature_extractor.frame_shift / self.feature_extractor.sampling_rate

    def log_mel(self, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Log-mel frames of a recording's blocks of samples, on the model's device; see [`stream_log_mel`]."""
        return stream_log_mel((block.to(self.model.device) for block in blocks), self.feature_extractor)

    def score(self, windows: Iterable[tuple[Key, torch.Tensor | None]]) -> Iterator[tuple[Key, np.ndarray | None]]:
        """Scores of windows, of one recording or of several, batched as they come.

        Args:
            windows: Pairs of anything that tells windows apart, and log-mel frames `(num_frames, num_mel_bins)` or
                `None`: such a pair is passed on in its place.

        Yields:
            In the same order, the key and its scores: float32 of shape `(num_labels,)`.
        """
        waiting: list[tuple[Key, torch.Tensor | None]] = []
        size, count, trim = None if self.batch_size == "auto" else self.batch_size, 0, MemoryTrimmer()
        for key, frames in windows:
            waiting.append((key, frames))
            count += frames is not None
            if size is None and count:
                size = choose_batch_size(self.model.config, self._padded(frames), self.model.device, self.model.dtype)
            if count == size or not count:
                size = yield from self._score_batch(waiting, size)
                waiting, count = [], 0
                trim()
        yield from self._score_batch(waiting, size)

    def _score_batch(
        self, pairs: list[tuple[Key, torch.Tensor | None]], size: int | None
    ) -> Generator[tuple[Key, np.ndarray | None], None, int | None]:
        windows = [frames for _, frames in pairs if frames is not None]
        scores = iter(())
        if windows and self.batch_size == "auto":
            parts, size = compute_in_parts(self._classify, windows, size)
            scores = iter(torch.cat(parts).numpy())
        elif windows:
            try:
                scores = iter(self._classify(windows).numpy())
            except torch.OutOfMemoryError as error:
                raise InferenceError(
                    f"The device has not enough memory for {len(windows)} windows at a time; take a smaller batch "
                    'size, or "auto".'
                ) from error
        for key, frames in pairs:
            yield key, None if frames is None else next(scores)
        return size

    @torch.inference_mode()
    def _classify(self, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores on the CPU, float32 of shape `(len(windows), num_labels)`."""
        logits = self.model(**self.model_inputs(windows)).logits
        return activate(logits.float(), self.model.config).cpu()

    def model_inputs(self, windows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Windows of log-mel frames as the feature extractor would give clips to the model: `input_values` of shape
        `(len(windows), T, num_mel_bins)`, and `attention_mask` where the extractor is set to return it."""
        return model_inputs(windows, max(map(self._padded, windows)), self.feature_extractor)

    def _padded(self, frames: torch.Tensor) -> int:
        """Frames of a window after padding: the extractor's `max_length`, or whole patches if it is longer."""
        patch_size = self.feature_extractor.patch_size
        return max(self.feature_extractor.max_length, -(-len(frames) // patch_size) * patch_size)

    def tag(self, audio: Audio, top_k: int | None = 10, threshold: float = 0.0) -> list[dict[str, Any]]:
        """The classes of a whole recording.

        What is longer than the `max_length` of the feature extractor is cut into windows of that length, the last
        ending with the recording. A class gets its highest score of any window, or with a single-label model the mean
        of its scores.

        Args:
            audio: A path, encoded bytes, `{"array": samples, "sampling_rate": Hz}`, or samples at the model's rate.
            top_k: Number of classes to return at most; `None` returns all.
            threshold: Lowest score to return.

        Returns:
            `[{"label": name, "score": score}, ...]`, the highest score first.

        Raises:
            ClipError: If the recording cannot be used.
        """
        (result,) = self.tag_each([audio], top_k, threshold)
        if isinstance(result, ClipError):
            raise result
        return result

    def tag_each(
        self, recordings: Iterable[Audio], top_k: int | None = 10, threshold: float = 0.0
    ) -> Iterator[list[dict[str, Any]] | ClipError]:
        """[`tag`] for many recordings, whose windows share batches.

        Yields:
            In the same order what `tag` returns; for a recording that cannot be used, the error.
        """
        length, sampling_rate = self.feature_extractor.max_length, self.feature_extractor.sampling_rate

        def windows(audio: Audio) -> Iterator[tuple[ClipError | None, torch.Tensor | None]]:
            try:
                for _, frames in cut_windows(self.log_mel(waveform_blocks(audio, sampling_rate)), length, length):
                    yield None, frames
            except ClipError as error:
                yield error, None
            else:
                yield None, None

        of_recording: list[np.ndarray] = []
        with closing(prefetch(recordings, windows, RECORDINGS_AHEAD)) as all_windows:
            for error, scores in self.score(all_windows):
                if scores is not None:
                    of_recording.append(scores)
                    continue
                if error is None:
                    pooled = np.max(of_recording, 0) if self.is_multi_label else np.mean(of_recording, 0)
                yield rank(pooled, self.labels, top_k, threshold) if error is None else error
                of_recording = []

    def timeline(
        self,
        audio: Audio,
        window: float = 2.0,
        hop: float = 0.5,
        settings: EventSettings | None = None,
        keep_scores: bool = True,
        on_frames: Callable[[torch.Tensor], None] | None = None,
        on_scores: Callable[[float, np.ndarray], None] | None = None,
    ) -> Timeline:
        """What sounds when in a recording of any length.

        A window says whether a class sounds anywhere in it, so onsets and offsets are uncertain by half its length;
        but the shorter it is beside the clips of the training, the less the model knows of it. (Scores of single
        patches would not help: the classifier was trained on whole clips, and on patches it says nothing.)

        Args:
            audio: See [`tag`].
            window: Length of the windows in seconds. They are padded to the clips of the training.
            hop: Seconds from one window to the next, rounded to 10 ms.
            settings: How events are read off the scores; by default as [`EventSettings`] stands.
            keep_scores: Whether to return the scores of all windows; without, memory does not grow with the
                recording.
            on_frames: Called with each block of log-mel frames `(num_frames, num_mel_bins)`, not normalised, on the
                model's device.
            on_scores: Called with the start of each window in seconds and its scores `(num_labels,)`.

        Raises:
            ClipError: If the recording cannot be used.
            InferenceError: If the model takes no such windows.
        """
        settings = settings or EventSettings()
        num_window, num_hop = self.num_window_frames(window), self.num_hop_frames(hop, window)
        blocks = CountedBlocks(waveform_blocks(audio, self.feature_extractor.sampling_rate))

        def tapped(all_frames: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
            for frames in all_frames:
                if on_frames is not None:
                    on_frames(frames)
                yield frames

        starts, scores, detector = [], [], EventDetector(settings)
        with closing(prefetch([blocks], self.log_mel, items_ahead=1)) as all_frames:
            for first, row in self.score(cut_windows(tapped(all_frames), num_window, num_hop)):
                starts.append(first * self.frame_seconds)
                detector.push(row[None])
                if keep_scores:
                    scores.append(row)
                if on_scores is not None:
                    on_scores(starts[-1], row)
        return make_timeline(
            detector.finish(),
            starts=np.array(starts),
            scores=np.stack(scores) if keep_scores else None,
            labels=self.labels,
            duration=blocks.num_samples / self.feature_extractor.sampling_rate,
            window=window,
            hop=num_hop * self.frame_seconds,
            settings=settings,
            path=str(audio) if isinstance(audio, (str, Path)) else None,
        )


def activate(logits: torch.Tensor, config: SSLAMConfig) -> torch.Tensor:
    """Scores in [0, 1] of logits `(..., num_labels)`: their sigmoid where several classes can be present at a time,
    otherwise their softmax."""
    return logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(-1)


def rank(scores: np.ndarray, labels: Sequence[str], top_k: int | None, threshold: float) -> list[dict[str, Any]]:
    """The classes of scores `(num_labels,)`, highest first, as transformers' pipelines return them."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": labels[i], "score": float(scores[i])} for i in order if scores[i] >= threshold]
