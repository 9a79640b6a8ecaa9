"""`pipeline("long-audio-classification")`: what sounds when in recordings of any length, as transformers has it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForAudioClassification
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from ..common.audio import CountedBlocks, waveform_blocks
from ..common.errors import InferenceError
from .tagger import Audio, SSLAMTagger, activate, rank
from .timeline.events import EventDetector, EventSettings
from .timeline.timeline import make_timeline
from .windows import cut_windows, stream_log_mel

TASK = "long-audio-classification"
DEFAULT_CHUNK_SECONDS = 2.0
# On each side, of the chunk: windows then advance by a quarter of their length.
DEFAULT_STRIDE_SHARE = 3 / 8


class LongAudioClassificationPipeline(ChunkPipeline):
    """Classifies windows of recordings of any length and reads events off their scores, as [`SSLAMTagger.timeline`]
    and `sslam timeline` do. Importing `modeling_sslam.inference` registers it.

    Args, when it is made or called:
        chunk_length_s: Length of the windows in seconds (default: 2).
        stride_length_s: Seconds on each side of a window that its neighbours speak for, as in transformers' speech
            recognition: windows advance by `chunk_length_s - 2 * stride_length_s` (default: a quarter of a window).
        top_k: Classes to return for each window (default: 5); `None` returns all.
        threshold, release, median, max_gap, min_duration: See [`EventSettings`].
        batch_size: Windows at a time.

    Example:

    ```python
    >>> import modeling_sslam.inference
    >>> from transformers import pipeline

    >>> listen = pipeline("long-audio-classification", "outputs/quickstart", chunk_length_s=2.0, batch_size=8)
    >>> listen("tests/fixtures/audio/guit_e_slide.flac", top_k=1)
    {'events': [{'label': 'LABEL_3', 'timestamp': (0.0, 4.33), 'score': 0.99}, ...],
     'chunks': [{'timestamp': (0.0, 2.0), 'labels': [{'label': 'LABEL_11', 'score': 0.99}]}, ...]}
    ```
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = True
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tagger = SSLAMTagger(self.model, self.feature_extractor)

    def __call__(self, inputs: Audio | list[Audio], **kwargs: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """
        Args:
            inputs: A recording or a list of them: a path, encoded bytes, `{"array": samples, "sampling_rate": Hz}`, or
                samples at the model's rate.

        Returns:
            For each recording `{"events": [{"label", "timestamp": (onset, offset), "score"}, ...], "chunks":
            [{"timestamp": (start, end), "labels": [{"label", "score"}, ...]}, ...]}`, times in seconds.

        Raises:
            ClipError: If a recording cannot be used.
            InferenceError: If the settings contradict each other or the model takes no such windows.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        chunk_length_s: float | None = None,
        stride_length_s: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        windows = {}
        if chunk_length_s is not None:
            windows["chunk_length_s"] = chunk_length_s
        if stride_length_s is not None:
            windows["stride_length_s"] = stride_length_s
        return windows, {}, windows | kwargs

    def preprocess(
        self, inputs: Audio, chunk_length_s: float = DEFAULT_CHUNK_SECONDS, stride_length_s: Any = None
    ) -> Iterator[dict[str, Any]]:
        hop = _hop(chunk_length_s, stride_length_s)
        num_window = self._tagger.num_window_frames(chunk_length_s)
        num_hop = self._tagger.num_hop_frames(hop, chunk_length_s)
        blocks = CountedBlocks(waveform_blocks(inputs, self.feature_extractor.sampling_rate))
        # One window behind: the last one has to say so.
        waiting = None
        for first, frames in cut_windows(stream_log_mel(blocks, self.feature_extractor), num_window, num_hop):
            if waiting is not None:
                yield {**waiting, "is_last": False, "num_samples": 0}
            waiting = self._tagger.model_inputs([frames]) | {"first": first}
        yield {**waiting, "is_last": True, "num_samples": blocks.num_samples}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        passed_on = {name: model_inputs.pop(name) for name in ("is_last", "first", "num_samples")}
        return {"logits": self.model(**model_inputs).logits} | passed_on

    def postprocess(
        self,
        model_outputs: list[dict[str, Any]],
        chunk_length_s: float = DEFAULT_CHUNK_SECONDS,
        stride_length_s: Any = None,
        top_k: int | None = 5,
        **settings: Any,
    ) -> dict[str, Any]:
        tagger = self._tagger
        logits = torch.cat([output["logits"] for output in model_outputs]).float()
        scores = activate(logits, self.model.config).numpy()
        detector = EventDetector(settings := EventSettings(**settings))
        detector.push(scores)
        timeline = make_timeline(
            detector.finish(),
            starts=np.array([output["first"] for output in model_outputs]) * tagger.frame_seconds,
            scores=scores,
            labels=tagger.labels,
            duration=model_outputs[-1]["num_samples"] / self.feature_extractor.sampling_rate,
            window=chunk_length_s,
            hop=_hop(chunk_length_s, stride_length_s),
            settings=settings,
        )
        events = [
            {"label": event.label, "timestamp": (event.onset, event.offset), "score": event.score}
            for event in timeline.events
        ]
        chunks = [
            {
                "timestamp": (float(start), min(float(start) + chunk_length_s, timeline.duration)),
                "labels": rank(row, timeline.labels, top_k, threshold=0.0),
            }
            for start, row in zip(timeline.starts, scores, strict=True)
        ]
        return {"events": events, "chunks": chunks}


def _hop(chunk_length_s: float, stride_length_s: float | tuple[float, float] | None) -> float:
    """Seconds from one window to the next."""
    if stride_length_s is None:
        stride_length_s = chunk_length_s * DEFAULT_STRIDE_SHARE
    left, right = stride_length_s if isinstance(stride_length_s, (tuple, list)) else (stride_length_s,) * 2
    if left != right:
        raise InferenceError(
            f"stride_length_s={tuple(stride_length_s)} must be the same on both sides: a window stands for its middle."
        )
    if left < 0 or 2 * left >= chunk_length_s:
        raise InferenceError(
            f"stride_length_s={left:g} on each side leaves nothing of chunk_length_s={chunk_length_s:g}; take less "
            "than half of it, or 0 for windows side by side."
        )
    return chunk_length_s - left - right


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=LongAudioClassificationPipeline, pt_model=AutoModelForAudioClassification, type="audio"
)
