"""SSLAMTagger, compared with the model on separate clips and with transformers' pipeline."""

import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.inference import ClipError, EventSettings, InferenceError, SSLAMTagger
from modeling_sslam.inference.devices import CPU_BATCH_SIZE, MAX_BATCH_SIZE, choose_batch_size, compute_in_parts

RECORDINGS = ["ambi_choir", "drum_cowbell", "guit_e_slide", "misc_crow", "vinyl_backspin"]


def clip_scores(tagger: SSLAMTagger, clips: list[torch.Tensor]) -> np.ndarray:
    """Return the model's scores for clips from the feature extractor."""
    inputs = tagger.feature_extractor(clips, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        return tagger.model(**inputs).logits.sigmoid().numpy()


def make_tagger(config, extractor=None, **kwargs) -> SSLAMTagger:
    return SSLAMTagger(
        SSLAMForAudioClassification(config), extractor or SSLAMFeatureExtractor(max_length=64), **kwargs
    )


def assert_same(tags: list[dict], expected: list[dict]) -> None:
    assert [entry["label"] for entry in tags] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in tags] == pytest.approx([entry["score"] for entry in expected], abs=1e-5)


@pytest.fixture
def config(make_config):
    """Configure three classes and clips of 64 frames, so that windows of one second are longer than a clip."""
    return make_config(
        num_mel_bins=128, num_labels=3, problem_type="multi_label_classification", max_position_embeddings=12
    )


@pytest.mark.parametrize("name", RECORDINGS)
def test_tags_equal_those_of_the_transformers_pipeline(tagger, model_folder, audio_dir, name):
    path = audio_dir / f"{name}.flac"
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    classify = pipeline("audio-classification", str(model_folder))
    expected = classify({"array": samples.mean(1), "sampling_rate": rate}, top_k=None, function_to_apply="sigmoid")
    tags = tagger.tag(path, top_k=None)
    assert_same(tags, expected)
    assert tagger.tag(path, top_k=3) == tags[:3]
    assert tagger.tag(path, threshold=tags[1]["score"]) == tags[:2]


def test_long_recording_gets_the_highest_score_of_its_windows(config):
    tagger, waveform = make_tagger(config), torch.randn(30_000) / 10
    length = 63 * 160 + 400
    starts = [0, 64 * 160, (tagger.feature_extractor.num_frames(30_000) - 64) * 160]
    expected = clip_scores(tagger, [waveform[start : start + length] for start in starts]).max(0)
    tags = {entry["label"]: entry["score"] for entry in tagger.tag(waveform, top_k=None)}
    assert [tags[label] for label in tagger.labels] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("problem_type", ["single_label_classification", None])
def test_single_label_models_use_softmax_and_the_mean(config, problem_type):
    config.problem_type = problem_type
    tagger, waveform = make_tagger(config), torch.randn(20_560) / 10
    clips = [waveform[:10_480], waveform[10_080:]]
    inputs = tagger.feature_extractor([clip[:10_480] for clip in clips], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = tagger.model(**inputs).logits.softmax(-1).mean(0)
    tags = {entry["label"]: entry["score"] for entry in tagger.tag(waveform, top_k=None)}
    assert sum(tags.values()) == pytest.approx(1)
    assert [tags[label] for label in tagger.labels] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_recordings_share_batches(config, write_sound, batch_size, monkeypatch):
    tagger = make_tagger(config, batch_size=batch_size)
    sounds = [torch.randn(n) / 10 for n in (500, 30_000, 12_000)]
    broken = write_sound("broken.wav", samples=np.full(60_000, np.nan, np.float32))
    seen, classify = [], tagger._classify
    monkeypatch.setattr(tagger, "_classify", lambda windows: seen.append(len(windows)) or classify(windows))
    first, missing, second, damaged, third = tagger.tag_each([sounds[0], "nowhere.wav", sounds[1], broken, sounds[2]])
    assert [missing.reason, damaged.reason] == ["missing", "not_finite"]
    # The recordings have 1 + 3 + 2 windows, whose distribution over batches changes no result.
    assert seen == {1: [1] * 6, 2: [2] * 3, "auto": [6]}[batch_size]
    monkeypatch.undo()
    for tags, sound in zip((first, second, third), sounds, strict=True):
        assert_same(tags, tagger.tag(sound))
    with pytest.raises(ClipError, match="not_finite"):
        tagger.tag(broken)


def test_damaged_recording_changes_no_other_result(config, write_sound):
    """The damage comes when the recording's first windows are already in a batch."""
    samples = np.zeros(600_000, np.float32)
    samples[-1] = np.inf
    path, sound = write_sound("sound.wav", samples=samples), torch.randn(8_000) / 10
    tagger = make_tagger(config)
    broken, tags = tagger.tag_each([path, sound])
    assert broken.reason == "not_finite"
    assert_same(tags, tagger.tag(sound))


def test_timeline_scores_equal_the_scores_of_separate_clips(tagger, recording):
    timeline = tagger.timeline(recording, window=2.0, hop=0.5)
    assert timeline.scores.dtype == np.float32
    assert timeline.starts[:-1].tolist() == pytest.approx([0.5 * k for k in range(len(timeline.starts) - 1)])
    assert timeline.starts[-1] + 1.995 == pytest.approx(timeline.duration, abs=0.01)
    clips = [recording[round(start * 16_000) :][:32_000] for start in timeline.starts]
    np.testing.assert_allclose(timeline.scores, clip_scores(tagger, clips), rtol=0, atol=1e-4)
    assert timeline.duration == len(recording) / 16_000


def test_windows_longer_than_training_clips(config):
    """Windows of 98 frames (1 s) are padded to whole patches, although training clips have 64 frames."""
    tagger, waveform = make_tagger(config), torch.randn(40_000) / 10
    timeline = tagger.timeline(waveform, window=1.0, hop=1.0)
    extractor = tagger.feature_extractor
    clips = [waveform[round(start * 16_000) :][:16_000] for start in timeline.starts]
    inputs = extractor(clips, sampling_rate=16_000, max_length=112, return_tensors="pt")
    with torch.no_grad():
        expected = tagger.model(**inputs).logits.sigmoid().numpy()
    np.testing.assert_allclose(timeline.scores, expected, rtol=0, atol=1e-4)


def test_feature_extractor_with_attention_mask(config):
    extractor = SSLAMFeatureExtractor(max_length=64, return_attention_mask=True)
    tagger, waveform = make_tagger(config, extractor), torch.randn(16_000) / 10
    timeline = tagger.timeline(waveform, window=0.3, hop=0.3)
    clips = [waveform[round(start * 16_000) :][:4_800] for start in timeline.starts]
    np.testing.assert_allclose(timeline.scores, clip_scores(tagger, clips), rtol=0, atol=1e-4)
    without = make_tagger(config).timeline(waveform, window=0.3, hop=0.3)
    assert np.abs(timeline.scores - without.scores).max() > 1e-3


def test_timeline_calls_the_callbacks(config):
    tagger, waveform = make_tagger(config), torch.randn(40_000) / 10
    frames, rows = [], []
    timeline = tagger.timeline(
        waveform,
        0.5,
        0.25,
        keep_scores=False,
        on_frames=frames.append,
        on_scores=lambda start, scores: rows.append((start, scores)),
    )
    assert timeline.scores is None
    assert sum(map(len, frames)) == tagger.feature_extractor.num_frames(40_000)
    assert [start for start, _ in rows] == timeline.starts.tolist()
    np.testing.assert_array_equal(
        np.stack([scores for _, scores in rows]), tagger.timeline(waveform, 0.5, 0.25).scores
    )


def test_events_lie_at_the_windows_with_high_scores(config, monkeypatch):
    tagger = make_tagger(config)
    scores = torch.zeros(11, 3)
    scores[4:7, 1] = 0.8
    monkeypatch.setattr(tagger, "_classify", lambda windows: scores[: len(windows)])
    tagger.batch_size = 11
    timeline = tagger.timeline(torch.zeros(6 * 16_000), window=1.0, hop=0.5, settings=EventSettings(median=1))
    assert len(timeline.starts) == 11
    # Windows 4 to 6 start at 2, 2.5 and 3 s and stand for 2.25 to 3.75 s.
    assert timeline.events == [(2.25, 3.75, "LABEL_1", pytest.approx(0.8))]


@pytest.mark.parametrize(
    ("window", "hop", "message"),
    [
        (2.0, 0.5, r"2 s has 198 frames, but the model's position table ends at 192; take at most 1.94 s"),
        (0.01, 0.01, r"shorter than one frame; take at least 0.025 s"),
        (1.0, 1.5, "hop of 1.5 s"),
        (1.0, 0.001, "hop of 0.001 s must be at least one frame of 0.01 s"),
    ],
)
def test_invalid_windows_are_rejected(config, window, hop, message):
    with pytest.raises(InferenceError, match=message):
        make_tagger(config).timeline(torch.zeros(60_000), window, hop)


def test_the_longest_window_fits(config):
    timeline = make_tagger(config).timeline(torch.zeros(60_000), 1.94, 0.5)
    assert len(timeline.starts) == 5


def test_regression_models_are_rejected(config):
    config.problem_type = "regression"
    with pytest.raises(InferenceError, match="regression"):
        make_tagger(config)


def test_loading_errors_name_the_cause(tmp_path, config):
    SSLAMModel(config).save_pretrained(tmp_path / "encoder")
    SSLAMFeatureExtractor().save_pretrained(tmp_path / "encoder")
    with pytest.raises(InferenceError, match=r"no weights for classifier\.dense\.bias.* fine-tune it"):
        SSLAMTagger.from_pretrained(tmp_path / "encoder")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(InferenceError, match=r"type 'wav2vec2', not 'sslam'.*sslam convert"):
        SSLAMTagger.from_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InferenceError, match=r"empty has no config\.json"):
        SSLAMTagger.from_pretrained(tmp_path / "empty")


def test_devices_and_precisions(model_folder, recording):
    with pytest.raises(InferenceError, match=r"device 'cuda:99' cannot be used: .*auto"):
        SSLAMTagger.from_pretrained(model_folder, device="cuda:99")
    tagger = SSLAMTagger.from_pretrained(model_folder, device="cpu", dtype="bfloat16")
    assert tagger.model.dtype == torch.bfloat16
    exact = SSLAMTagger.from_pretrained(model_folder, device="cpu", dtype=torch.float32)
    scores = [t.timeline(recording[:48_000], 1.0, 1.0).scores for t in (tagger, exact)]
    assert scores[0].dtype == np.float32
    np.testing.assert_allclose(*scores, rtol=0, atol=0.03)


def test_batches_are_halved_until_they_fit():
    sizes = []

    def compute(part):
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError
        return sum(part)

    results, size = compute_in_parts(compute, list(range(10)), 10)
    assert sizes == [10, 5, 3, 3, 3, 1]
    assert results == [3, 12, 21, 9]
    assert size == 3
    with pytest.raises(InferenceError, match="not enough memory for a single window"):
        compute_in_parts(lambda part: compute([0] * 4), [0], 1)


def test_batches_shrink_when_memory_runs_out(config, monkeypatch):
    tagger, waveform = make_tagger(config), torch.randn(200_000) / 10
    expected, classify, sizes = tagger.timeline(waveform, 0.5, 0.5).scores, tagger._classify, []

    def scarce(windows):
        sizes.append(len(windows))
        if len(windows) > 2:
            raise torch.OutOfMemoryError
        return classify(windows)

    monkeypatch.setattr(tagger, "_classify", scarce)
    np.testing.assert_allclose(tagger.timeline(waveform, 0.5, 0.5).scores, expected, rtol=0, atol=1e-5)
    assert sizes[:4] == [8, 4, 2, 2]
    assert max(sizes[2:]) == 2
    tagger.batch_size = 4
    with pytest.raises(InferenceError, match="not enough memory for 4 windows at a time"):
        tagger.timeline(waveform, 0.5, 0.5)


def test_batch_size_depends_on_the_free_memory(config, monkeypatch):
    assert choose_batch_size(config, 64, torch.device("cpu"), torch.float32) == CPU_BATCH_SIZE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**24, 2**30))
    device = torch.device("cuda")
    sizes = [choose_batch_size(config, frames, device, torch.float32) for frames in (64, 128, 12_288)]
    # 33 tokens with 6 * 32 + 2 * 64 values of 4 bytes each, in half of 16 MiB.
    assert sizes[0] == 2**23 // (33 * 320 * 4)
    assert sizes[0] > sizes[1] > sizes[2] == 1
    assert choose_batch_size(config, 128, device, torch.bfloat16) == 2**23 // (65 * 320 * 2)
    assert choose_batch_size(config, 16, device, torch.bfloat16) == MAX_BATCH_SIZE
