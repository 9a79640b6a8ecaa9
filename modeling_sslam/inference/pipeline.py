"""`pipeline("long-audio-classification")`: timelines of recordings of any length in the form of transformers."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForAudioClassification
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from ..common.audio import CountedBlocks, waveform_blocks
from ..common.errors import InferenceError
from .scores import rank, scores_from_logits
from .tagger import Audio, SSLAMTagger
from .timeline.events import EventSettings
from .timeline.timeline import TimelineBuilder
from .windows import cut_windows, stream_log_mel

TASK = "long-audio-classification"
DEFAULT_CHUNK_SECONDS = 2.0
# Stride on each side, as a share of the chunk: windows advance by a quarter of their length.
DEFAULT_STRIDE_SHARE = 3 / 8


class LongAudioClassificationPipeline(ChunkPipeline):
    """Pipeline that finds when each class sounds, as [`SSLAMTagger.timeline`] and `sslam timeline` do.

    Importing `modeling_sslam.inference` registers it. The arguments below are accepted by the constructor and by
    calls.

    Args:
        chunk_length_s: Length of a window in seconds (default: 2).
        stride_length_s: Overlap with the neighbours on each side in seconds, as in transformers' speech recognition.
            Windows advance by `chunk_length_s - 2 * stride_length_s` (default: a quarter of a window).
        top_k: Largest number of classes to return for each window (default: 5); `None` returns all.
        threshold, release, median, max_gap, min_duration: See [`EventSettings`].
        batch_size: Windows in a batch (default: 1).

    Example:
    ```python
    >>> import modeling_sslam.inference
    >>> from transformers import pipeline

    >>> model = "outputs/quickstart/classifier/model"
    >>> listen = pipeline("long-audio-classification", model, chunk_length_s=2.0, batch_size=8)
    >>> result = listen("tests/fixtures/audio/guit_e_slide.flac", top_k=1)
    >>> [chunk["timestamp"] for chunk in result["chunks"]][:2]
    [(0.0, 2.0), (0.5, 2.5)]
    ```
    """

    # These flags are None in the base class, and every pipeline of transformers sets them to a bool.
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = True  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Use Any: with `trust_remote_code` the classes are copies of this package's, loaded from the model folder.
        model: Any = self.model
        feature_extractor: Any = self.feature_extractor
        self._tagger = SSLAMTagger(model, feature_extractor)

    def __call__(
        self, inputs: Audio | list[Audio], *args: Any, **kwargs: Any
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Return events and window scores of recordings.

        Args:
            inputs: A recording or a list of them: a path, encoded bytes, `{"array": samples, "sampling_rate": Hz}`, or
                samples at the model's rate.
            args: Ignored, as in other pipelines.
            kwargs: See the class.

        Returns:
            For each recording `{"events": [{"label", "timestamp": (onset, offset), "score"}, ...], "chunks":
            [{"timestamp": (start, end), "labels": [{"label", "score"}, ...]}, ...]}`, with times in seconds.

        Raises:
            ClipError: If a recording cannot be used.
            InferenceError: If the settings contradict each other or the model cannot take such windows.
        """
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(
        self, chunk_length_s: float | None = None, stride_length_s: Any = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        windows = {"chunk_length_s": chunk_length_s, "stride_length_s": stride_length_s}
        windows = {name: value for name, value in windows.items() if value is not None}
        return windows, {}, windows | kwargs

    # The base class has the type hints of pipelines without chunks, whose settings are all dictionaries. These three
    # steps cannot agree with them.

    def preprocess(  # type: ignore[override]
        self, inputs: Audio, chunk_length_s: float = DEFAULT_CHUNK_SECONDS, stride_length_s: Any = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the model inputs of one window after the other."""
        extractor = self._tagger.feature_extractor
        num_window = self._tagger.num_window_frames(chunk_length_s)
        num_hop = self._tagger.num_hop_frames(_hop(chunk_length_s, stride_length_s), chunk_length_s)
        blocks = CountedBlocks(waveform_blocks(inputs, extractor.sampling_rate))
        # Yields lag one window behind, because `is_last` is known only when the next window comes or does not.
        waiting: dict[str, Any] = {}
        for first, frames in cut_windows(stream_log_mel(blocks, extractor), num_window, num_hop):
            if waiting:
                yield {**waiting, "is_last": False, "num_samples": 0}
            waiting = {**self._tagger.model_inputs([frames]), "first": first}
        yield {**waiting, "is_last": True, "num_samples": blocks.num_samples}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        passed_on = {name: model_inputs.pop(name) for name in ("is_last", "first", "num_samples")}
        return {"logits": self.model(**model_inputs).logits} | passed_on

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: list[dict[str, Any]],
        chunk_length_s: float = DEFAULT_CHUNK_SECONDS,
        stride_length_s: Any = None,
        top_k: int | None = 5,
        **settings: Any,
    ) -> dict[str, Any]:
        """Turn the logits of a recording's windows into the result of a call."""
        tagger = self._tagger
        logits = torch.cat([output["logits"] for output in model_outputs]).float()
        scores = scores_from_logits(logits, tagger.model.config).numpy()
        builder = TimelineBuilder(
            tagger.labels,
            chunk_length_s,
            _hop(chunk_length_s, stride_length_s),
            EventSettings(**settings),
            keep_scores=False,
        )
        for output, row in zip(model_outputs, scores, strict=True):
            builder.add(output["first"] * tagger.frame_seconds, row)
        timeline = builder.finish(model_outputs[-1]["num_samples"] / tagger.feature_extractor.sampling_rate)
        events = [
            {"label": event.label, "timestamp": (event.onset, event.offset), "score": event.score}
            for event in timeline.events
        ]
        chunks = [
            {
                "timestamp": (float(start), min(float(start) + chunk_length_s, timeline.duration)),
                "labels": rank(row, timeline.labels, top_k),
            }
            for start, row in zip(timeline.starts, scores, strict=True)
        ]
        return {"events": events, "chunks": chunks}


def _hop(chunk_length_s: float, stride_length_s: float | tuple[float, float] | None) -> float:
    """Return the seconds from one window to the next."""
    if stride_length_s is None:
        stride_length_s = chunk_length_s * DEFAULT_STRIDE_SHARE
    if isinstance(stride_length_s, (tuple, list)):
        left, right = stride_length_s
    else:
        left = right = stride_length_s
    if left != right:
        raise InferenceError(
            f"stride_length_s=({left:g}, {right:g}) must be the same on both sides: a window stands for its middle."
        )
    if left < 0 or 2 * left >= chunk_length_s:
        raise InferenceError(
            f"stride_length_s={left:g} on each side leaves nothing of chunk_length_s={chunk_length_s:g}; take less "
            "than half of it, or 0 for windows without overlap."
        )
    return chunk_length_s - left - right


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=LongAudioClassificationPipeline, pt_model=AutoModelForAudioClassification, type="audio"
)
