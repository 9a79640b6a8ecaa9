"""Classification of recordings of any length: the Python interface behind `sslam tag` and `sslam timeline`."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch

from ..common.audio import CountedBlocks, waveform_blocks
from ..common.errors import ClipError, InferenceError
from ..common.glibc import MemoryTrimmer
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMForAudioClassification
from ..transfers_sslam import read_later, send
from .compilation import check_compilable, compile_function, fill_batch
from .devices import choose_batch_size, compute_in_parts
from .loading import load_pretrained, speed_up
from .scores import check_finite, is_multi_label, pool_windows, rank, unchecked_scores
from .streams import prefetch_beside
from .timeline.events import EventSettings
from .timeline.timeline import Timeline, TimelineBuilder
from .windows import cut_windows, model_inputs, stream_log_mel

Key = TypeVar("Key")
# A path, encoded bytes, {"array": ..., "sampling_rate": ...} as in `datasets`, or samples at the model's rate.
Audio = str | Path | bytes | dict[str, Any] | np.ndarray | torch.Tensor
# Several threads can then decode short files while the model computes a batch.
RECORDINGS_AHEAD = 32


class SSLAMTagger:
    """A classifier with its feature extractor, applied to windows of recordings of any length.

    Threads decode a recording, resample it and compute its filter bank once, in blocks, while the model computes.
    Windows are padded as in training and classified in batches. As in transformers' pipeline, scores are the sigmoid
    of a multi-label model's logits and the softmax of any other model's logits.

    Args:
        model: The classifier, on the device that is to compute.
        feature_extractor: The model's feature extractor.
        batch_size: Windows in a batch. "auto" chooses by the device's memory and halves the batch when the memory does
            not suffice.
        compile: Whether to compile the model, with CUDA graphs on a GPU. The last windows are then filled up to a
            batch of `batch_size`, and "auto" does not halve the batch. Always call such a tagger from the same thread.

    Raises:
        InferenceError: If the model is a regression model, or if it is to be compiled and has packed blocks.

    Example:
    ```python
    >>> from modeling_sslam.inference import SSLAMTagger

    >>> tagger = SSLAMTagger.from_pretrained("outputs/quickstart/classifier/model")
    >>> recording = "tests/fixtures/audio/guit_e_slide.flac"
    >>> tagger.tag(recording, top_k=2)
    [{'label': 'guitar', 'score': 0.99...}, {'label': 'tabla', 'score': 0.88...}]
    >>> timeline = tagger.timeline(recording, window=2.0, hop=0.5)
    >>> timeline.scores.shape
    (6, 8)
    ```
    """

    def __init__(
        self,
        model: SSLAMForAudioClassification,
        feature_extractor: SSLAMFeatureExtractor,
        batch_size: int | str = "auto",
        compile: bool = False,
    ) -> None:
        if model.config.problem_type == "regression":
            raise InferenceError(
                "This model predicts values, not scores of classes (problem_type='regression'); take a classifier."
            )
        self.model = model.eval()
        self.feature_extractor = feature_extractor
        self.batch_size = batch_size
        self.is_compiled = compile
        self._scores_of: Callable[..., torch.Tensor] = self._compute_scores
        if compile:
            check_compilable(model)
            self._scores_of = compile_function(self._compute_scores, model.device)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        batch_size: int | str = "auto",
        revision: str | None = None,
        compile: bool = False,
    ) -> "SSLAMTagger":
        """Load a model that `save_pretrained` or `python -m conversion` wrote. No code from its folder is run.

        Args:
            model: Folder, or OWNER/NAME on the Hub.
            device: "auto" takes an accelerator if there is one, or else the CPU.
            dtype: Precision of the computation. "auto" takes the precision of the saved weights; "int8"
                approximates float32 on CPUs.
            batch_size: See the class.
            revision: Branch, tag or commit on the Hub.
            compile: See the class. On a CPU compiled blocks replace the packed ones. "int8" cannot be compiled.

        Raises:
            InferenceError: If there is no SSLAM classifier, or if the device or precision is not available.
        """
        remedy = " It is an encoder without classifier: fine-tune it, or convert a fine-tuned checkpoint."
        classifier, extractor = load_pretrained(SSLAMForAudioClassification, model, device, dtype, revision, remedy)
        return cls(speed_up(classifier, dtype, compile), extractor, batch_size, compile)

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of the scores."""
        return [self.model.config.id2label[index] for index in range(self.model.config.num_labels)]

    @property
    def is_multi_label(self) -> bool:
        """Whether classes are scored independently, so that several can be present at a time."""
        return is_multi_label(self.model.config)

    @property
    def frame_seconds(self) -> float:
        """Seconds from one log-mel frame to the next."""
        return self.feature_extractor.frame_shift / self.feature_extractor.sampling_rate

    def num_window_frames(self, seconds: float) -> int:
        """Return the number of frames in a window.

        Raises:
            InferenceError: If the window is shorter than a frame or exceeds the model's position table.
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
        """Return the number of frames from one window to the next.

        Args:
            seconds: The hop.
            window: Length of a window in seconds.

        Raises:
            InferenceError: If the hop is shorter than a frame or longer than the window.
        """
        num_frames = round(seconds / self.frame_seconds)
        if num_frames < 1 or seconds > window:
            raise InferenceError(
                f"A hop of {seconds:g} s must be at least one frame of {self.frame_seconds:g} s and at most the "
                f"window of {window:g} s."
            )
        return num_frames

    def log_mel(self, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Compute the log-mel frames of a recording's blocks of samples on the model's device.

        See [`stream_log_mel`].
        """
        return stream_log_mel((send(block, self.model.device) for block in blocks), self.feature_extractor)

    def model_inputs(self, windows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Pad and normalise windows of log-mel frames as the feature extractor does for clips.

        Args:
            windows: Frames of shape `(num_frames, num_mel_bins)` each.

        Returns:
            `input_values` of shape `(len(windows), T, num_mel_bins)`, and `attention_mask` `(len(windows), T)` if the
            feature extractor returns it.
        """
        return model_inputs(windows, max(self._padded_length(frames) for frames in windows), self.feature_extractor)

    def _padded_length(self, frames: torch.Tensor) -> int:
        """Return the number of frames after padding: `max_length`, or whole patches if the window is longer."""
        patch_size = self.feature_extractor.patch_size
        return max(self.feature_extractor.max_length, math.ceil(len(frames) / patch_size) * patch_size)

    @overload
    def score(self, windows: Iterable[tuple[Key, torch.Tensor]]) -> Iterator[tuple[Key, np.ndarray]]: ...

    @overload
    def score(self, windows: Iterable[tuple[Key, torch.Tensor | None]]) -> Iterator[tuple[Key, np.ndarray | None]]: ...

    def score(self, windows: Iterable[tuple[Key, torch.Tensor | None]]) -> Iterator[tuple[Key, np.ndarray | None]]:
        """Compute the scores of windows of one or several recordings in batches.

        On a GPU the scores of a batch are read after the next batch has been started.

        Args:
            windows: Pairs of a key and log-mel frames `(num_frames, num_mel_bins)`. The key can be anything. A pair
                with `None` in place of the frames is passed on in its turn.

        Yields:
            In the same order, the key and its scores: float32 of shape `(num_labels,)`.

        Raises:
            InferenceError: If the device has too little memory for a batch of the size asked for, or for one window.
        """
        # The batch size is 0 until the first window, whose length decides the size "auto".
        size = self.batch_size if isinstance(self.batch_size, int) else 0
        waiting: list[tuple[Key, torch.Tensor | None]] = []
        started: deque[Iterator[tuple[Key, np.ndarray | None]]] = deque()
        batches_ahead = 1 if self.model.device.type == "cuda" else 0
        num_windows, trim = 0, MemoryTrimmer()
        for key, frames in windows:
            waiting.append((key, frames))
            if frames is not None:
                num_windows += 1
                size = size or self._choose_batch_size(frames)
            if num_windows in (0, size):
                results, size = self._start_batch(waiting, size)
                started.append(results)
                waiting, num_windows = [], 0
                if len(started) > batches_ahead:
                    yield from started.popleft()
                trim()
        started.append(self._start_batch(waiting, size)[0])
        for results in started:
            yield from results

    def _choose_batch_size(self, frames: torch.Tensor) -> int:
        model = self.model
        return choose_batch_size(model.config, self._padded_length(frames), model.device, model.dtype)

    def _start_batch(
        self, pairs: list[tuple[Key, torch.Tensor | None]], size: int
    ) -> tuple[Iterator[tuple[Key, np.ndarray | None]], int]:
        """Start to compute a batch. Return its keys and scores, and the batch size that fitted into the memory."""
        windows = [frames for _, frames in pairs if frames is not None]
        parts: list[Callable[[], torch.Tensor]] = []
        if windows and self.batch_size == "auto" and not self.is_compiled:
            parts, size = compute_in_parts(lambda some: read_later(self._classify(some)), windows, size)
        elif windows:
            try:
                parts = [read_later(self._classify(fill_batch(windows, size) if self.is_compiled else windows))]
            except torch.OutOfMemoryError as error:
                raise InferenceError(
                    f"The device has not enough memory for {len(windows)} windows at a time; take a smaller batch "
                    'size, or "auto".'
                ) from error
        return self._results(pairs, parts), size

    def _results(
        self, pairs: list[tuple[Key, torch.Tensor | None]], parts: list[Callable[[], torch.Tensor]]
    ) -> Iterator[tuple[Key, np.ndarray | None]]:
        """Wait for the scores of a batch, and yield its keys and scores.

        Raises:
            InferenceError: If a score is NaN.
        """
        scores: Iterator[np.ndarray] = iter(())
        if parts:
            array = torch.cat([wait() for wait in parts]).numpy()
            check_finite(np.isfinite(array).all(), "scores")
            scores = iter(array)
        for key, frames in pairs:
            yield key, None if frames is None else next(scores)

    @torch.inference_mode()
    def _classify(self, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the scores of one batch: float32 of shape `(len(windows), num_labels)`, on the model's device.

        They are NaN where the model's logits are NaN or infinite.
        """
        inputs = self.model_inputs(windows)
        return self._scores_of(inputs["input_values"], inputs.get("attention_mask"))

    def _compute_scores(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        logits = self.model(input_values, attention_mask).logits
        return unchecked_scores(logits.float(), self.model.config)

    def tag(self, audio: Audio, top_k: int | None = 10, threshold: float = 0.0) -> list[dict[str, Any]]:
        """Rank the classes of a whole recording.

        A recording that is longer than the feature extractor's `max_length` is cut into windows of that length; the
        last window ends with the recording. The score of a class is its highest score in any window, or with a
        single-label model its mean score.

        Args:
            audio: A path, encoded bytes, `{"array": samples, "sampling_rate": Hz}`, or samples at the model's rate.
            top_k: Largest number of classes to return; `None` returns all.
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
        """Rank the classes of many recordings, whose windows share batches. See [`tag`] for the arguments.

        Yields:
            For each recording, in order, the result of [`tag`], or the error if the recording cannot be used.
        """
        for result, _ in self.tag_each_with_duration(recordings, top_k, threshold):
            yield result

    def tag_each_with_duration(
        self, recordings: Iterable[Audio], top_k: int | None = 10, threshold: float = 0.0
    ) -> Iterator[tuple[list[dict[str, Any]] | ClipError, float]]:
        """Rank the classes of many recordings and measure them. See [`tag_each`].

        Yields:
            For each recording the result of [`tag_each`] and the seconds of it that were decoded.
        """
        length, sampling_rate = self.feature_extractor.max_length, self.feature_extractor.sampling_rate

        def windows(audio: Audio) -> Iterator[tuple[tuple[ClipError | None, float], torch.Tensor | None]]:
            """Yield the windows of a recording, then its error, if any, and its seconds, without frames."""
            blocks, error = CountedBlocks(waveform_blocks(audio, sampling_rate)), None
            try:
                for _, frames in cut_windows(self.log_mel(blocks), length, length):
                    yield (None, 0.0), frames
            except ClipError as raised:
                error = raised
            yield (error, blocks.num_samples / sampling_rate), None

        def frames_of(window: tuple[Any, torch.Tensor | None]) -> list[torch.Tensor]:
            return [] if window[1] is None else [window[1]]

        in_recording: list[np.ndarray] = []
        produced = prefetch_beside(recordings, windows, RECORDINGS_AHEAD, self.model.device, frames_of)
        with closing(produced) as all_windows:
            for (error, seconds), scores in self.score(all_windows):
                if scores is not None:
                    in_recording.append(scores)
                    continue
                if error is not None:
                    yield error, seconds
                else:
                    pooled = pool_windows(in_recording, self.model.config)
                    yield rank(pooled, self.labels, top_k, threshold), seconds
                in_recording = []

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
        """Find when each class sounds in a recording of any length.

        A score tells whether a class sounds anywhere in a window, so onsets and offsets are accurate to about half a
        window. But classes are recognised worse in windows that are much shorter than the training clips. (Scores of
        single patches would not help: the classifier was trained on whole clips, so they carry no information.)

        Args:
            audio: See [`tag`].
            window: Length of a window in seconds. Windows are padded to the length of the training clips.
            hop: Seconds from one window to the next, rounded to 10 ms.
            settings: Settings of the event detection; by default `EventSettings()`.
            keep_scores: Whether the timeline holds the scores of all windows. Without them, memory does not grow with
                the recording.
            on_frames: Called with each block of log-mel frames `(num_frames, num_mel_bins)`, not normalised, on the
                model's device.
            on_scores: Called with the start of each window in seconds and its scores `(num_labels,)`.

        Raises:
            ClipError: If the recording cannot be used.
            InferenceError: If the model cannot take such windows.
        """
        num_window, num_hop = self.num_window_frames(window), self.num_hop_frames(hop, window)
        builder = TimelineBuilder(
            self.labels, window, num_hop * self.frame_seconds, settings or EventSettings(), keep_scores
        )
        blocks = CountedBlocks(waveform_blocks(audio, self.feature_extractor.sampling_rate))

        def observed(all_frames: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
            for frames in all_frames:
                if on_frames is not None:
                    on_frames(frames)
                yield frames

        produced = prefetch_beside([blocks], self.log_mel, 1, self.model.device, tensors_of=lambda frames: [frames])
        with closing(produced) as all_frames:
            for first, scores in self.score(cut_windows(observed(all_frames), num_window, num_hop)):
                start = first * self.frame_seconds
                builder.add(start, scores)
                if on_scores is not None:
                    on_scores(start, scores)
        duration = blocks.num_samples / self.feature_extractor.sampling_rate
        return builder.finish(duration, str(audio) if isinstance(audio, (str, Path)) else None)
