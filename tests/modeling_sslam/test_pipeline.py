"""transformers' audio-classification pipeline with a classifier and its feature extractor."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
import transformers
from transformers import pipeline

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification

RECORDINGS = ["ambi_choir", "drum_cowbell", "guit_e_slide", "misc_crow", "vinyl_backspin"]
LABELS = {0: "choir", 1: "cowbell", 2: "guitar", 3: "crow", 4: "record player", 5: "silence"}
KNOWS_MULTI_LABEL = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture
def make_folder(tmp_path, make_config):
    """Save a classifier of a problem type with its feature extractor."""

    def make(problem_type: str | None) -> Path:
        config = make_config(num_mel_bins=128, max_position_embeddings=32, id2label=LABELS, problem_type=problem_type)
        SSLAMForAudioClassification(config).save_pretrained(tmp_path)
        SSLAMFeatureExtractor(max_length=512).save_pretrained(tmp_path)
        return tmp_path

    return make


def read(audio_dir: Path, name: str) -> dict:
    """Read a recording as `datasets` does."""
    samples, sampling_rate = soundfile.read(audio_dir / f"{name}.flac", dtype="float32", always_2d=True)
    return {"array": samples.mean(1), "sampling_rate": sampling_rate}


def expected_logits(folder: Path, audio: dict) -> torch.Tensor:
    waveform = torchaudio.functional.resample(torch.from_numpy(audio["array"]), audio["sampling_rate"], 16_000)
    inputs = SSLAMFeatureExtractor.from_pretrained(folder)(waveform, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        return SSLAMForAudioClassification.from_pretrained(folder)(**inputs).logits[0]


def assert_scores(scores: list[dict], expected: torch.Tensor, atol: float = 1e-5) -> None:
    assert [entry["score"] for entry in scores] == sorted((entry["score"] for entry in scores), reverse=True)
    by_label = {entry["label"]: entry["score"] for entry in scores}
    assert by_label == pytest.approx(dict(zip(LABELS.values(), expected.tolist(), strict=True)), abs=atol)


@pytest.mark.parametrize("name", RECORDINGS)
def test_single_label_gives_softmax(make_folder, audio_dir, name):
    folder = make_folder("single_label_classification")
    audio = read(audio_dir, name)
    assert audio["sampling_rate"] == 44_100
    scores = pipeline("audio-classification", folder)(audio, top_k=None)
    assert_scores(scores, expected_logits(folder, audio).softmax(-1))
    assert sum(entry["score"] for entry in scores) == pytest.approx(1.0, abs=1e-5)


def test_multi_label_gives_sigmoid(make_folder, audio_dir):
    folder = make_folder("multi_label_classification")
    audio = read(audio_dir, "misc_crow")
    logits = expected_logits(folder, audio)
    classify = pipeline("audio-classification", folder)
    assert_scores(classify(audio, top_k=None, function_to_apply="sigmoid"), logits.sigmoid())
    # Transformers 4 applies softmax unless told otherwise.
    assert_scores(classify(audio, top_k=None), logits.sigmoid() if KNOWS_MULTI_LABEL else logits.softmax(-1))


def test_several_recordings(make_folder, audio_dir):
    classify = pipeline("audio-classification", make_folder(None))
    recordings = [read(audio_dir, name) for name in RECORDINGS]
    together = classify(recordings, top_k=2)
    assert [len(scores) for scores in together] == [2] * 5
    assert together == [classify(recording, top_k=2) for recording in recordings]


def test_bfloat16(make_folder, audio_dir):
    folder = make_folder("single_label_classification")
    audio = read(audio_dir, "guit_e_slide")
    classify = pipeline("audio-classification", folder, dtype=torch.bfloat16)
    assert classify.model.dtype == torch.bfloat16
    assert_scores(classify(audio, top_k=None), expected_logits(folder, audio).softmax(-1), atol=0.05)


def test_logs_nothing(make_folder, audio_dir, transformers_log):
    folder = make_folder("single_label_classification")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch|torchaudio|transformers")
        pipeline("audio-classification", folder)(read(audio_dir, "misc_crow"))
    assert [record.message for record in transformers_log.records if record.levelname != "INFO"] in (
        [],
        ["Device set to use cpu"],  # transformers 4, on every pipeline
    )


def test_refuses_audio_without_features(make_folder):
    classify = pipeline("audio-classification", make_folder(None))
    with pytest.raises(ValueError, match="Clip 0 has 100 samples, less than one frame"):
        classify(np.zeros(100, np.float32))
    with pytest.raises(ValueError, match="Clip 0 has NaN"):
        classify(np.full(16_000, np.nan, np.float32))
