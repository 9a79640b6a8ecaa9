"""The pipeline for long recordings returns the results of [`SSLAMTagger`]."""

import numpy as np
import pytest
import soundfile
from transformers import pipeline

from modeling_sslam.inference import ClipError, EventSettings, InferenceError


@pytest.fixture(scope="module")
def listen(model_folder):
    return pipeline("long-audio-classification", str(model_folder), device="cpu")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_the_tagger(listen, tagger, recording, batch_size):
    # With random weights, scores hardly vary. Thresholds among the scores of one class yield events.
    release, threshold = np.quantile(tagger.timeline(recording, 1.0, 0.4).scores[:, 8], (0.45, 0.55)).tolist()
    settings = {"threshold": threshold, "release": release, "median": 1, "max_gap": 0.1}
    result = listen(
        recording.numpy(), chunk_length_s=1.0, stride_length_s=0.3, top_k=None, batch_size=batch_size, **settings
    )
    expected = tagger.timeline(recording, 1.0, 0.4, EventSettings(**settings))
    assert len(expected.events) > 2
    assert [event["label"] for event in result["events"]] == [event.label for event in expected.events]
    for event, reference in zip(result["events"], expected.events, strict=True):
        assert event["timestamp"] == pytest.approx(reference[:2])
        assert event["score"] == pytest.approx(reference.score, abs=1e-5)
    assert [chunk["timestamp"][0] for chunk in result["chunks"]] == pytest.approx(expected.starts.tolist())
    for chunk, scores in zip(result["chunks"], expected.scores, strict=True):
        by_label = {entry["label"]: entry["score"] for entry in chunk["labels"]}
        assert [by_label[label] for label in tagger.labels] == pytest.approx(scores.tolist(), abs=1e-5)


def test_defaults_equal_those_of_the_tagger(listen, tagger, recording):
    result, expected = listen(recording.numpy()), tagger.timeline(recording)
    assert len(result["chunks"]) == len(expected.starts)
    assert [event["timestamp"] for event in result["events"]] == [event[:2] for event in expected.events]
    assert {len(chunk["labels"]) for chunk in result["chunks"]} == {5}
    assert result["chunks"][-1]["timestamp"][1] == pytest.approx(expected.duration, abs=0.01)


def test_settings_at_construction(model_folder, recording):
    listen = pipeline(
        "long-audio-classification", str(model_folder), chunk_length_s=3.0, stride_length_s=(0.5, 0.5), top_k=1
    )
    chunks = listen(recording.numpy())["chunks"]
    assert [chunk["timestamp"] for chunk in chunks[:2]] == [(0.0, 3.0), (2.0, 5.0)]
    assert {len(chunk["labels"]) for chunk in chunks} == {1}
    assert listen(recording.numpy(), chunk_length_s=4.0)["chunks"][1]["timestamp"][0] == 3.0


def test_recordings_as_path_bytes_and_samples(listen, audio_dir):
    path = audio_dir / "guit_e_slide.flac"
    samples, rate = soundfile.read(path, dtype="float32")
    forms = [str(path), path.read_bytes(), {"array": samples, "sampling_rate": rate}]
    first, *others = listen(forms, batch_size=5)
    assert len(first["chunks"]) == 6
    for other in others:
        assert [event["timestamp"] for event in other["events"]] == [event["timestamp"] for event in first["events"]]
        assert [chunk["timestamp"] for chunk in other["chunks"]] == [chunk["timestamp"] for chunk in first["chunks"]]
    (alone,) = listen(forms[:1])
    assert len(alone["chunks"]) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride_length_s": 1.0}, "leaves nothing of chunk_length_s=2"),
        ({"stride_length_s": -0.1}, "stride_length_s=-0.1"),
        ({"stride_length_s": (0.1, 0.2)}, "the same on both sides"),
        ({"chunk_length_s": 900.0}, "position table ends at"),
        ({"threshold": 0.2, "release": 0.3}, "release=0.3"),
    ],
)
def test_invalid_settings_are_rejected(listen, recording, options, message):
    with pytest.raises(InferenceError, match=message):
        listen(recording.numpy(), **options)


def test_unusable_recording_raises(listen):
    with pytest.raises(ClipError, match="missing"):
        listen("nowhere.wav")
