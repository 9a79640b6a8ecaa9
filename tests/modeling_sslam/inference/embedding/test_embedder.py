"""Embeddings equal those of model and feature extractor for each window by itself."""

import math

import numpy as np
import pytest
import soundfile
import torch

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.inference import ClipError, Embedder, InferenceError, embed
from modeling_sslam.inference.embedding.dataset import AudioDataset

WINDOW = 64  # frames, 0.64 s


@pytest.fixture
def model(make_config):
    return SSLAMModel(make_config()).eval()


@pytest.fixture
def extractor():
    return SSLAMFeatureExtractor(num_mel_bins=32, max_length=WINDOW)


@pytest.fixture
def recordings(tmp_path):
    """Write noise shorter than a window, as long as one, and longer; return the samples by path."""
    folder, samples = tmp_path / "recordings", {}
    folder.mkdir()
    for number, seconds in enumerate((0.3, 0.655, 2.0, 25.1)):
        path = str(folder / f"{number}.flac")
        noise = np.random.default_rng(number).normal(scale=0.1, size=round(seconds * 16_000))
        soundfile.write(path, noise, 16_000)
        samples[path] = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    return samples


def model_alone(model, extractor, samples, start, window=WINDOW):
    """Return the hidden states `(layers + 1, 1 + N, D)` of one window and the number of its time patches."""
    first = round(start * 100)
    clip = samples[first * extractor.frame_shift :][: extractor.num_samples(window)]
    length = max(WINDOW, math.ceil(window / 16) * 16)
    inputs = extractor(clip, sampling_rate=16_000, max_length=length, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    return torch.cat(states), math.ceil(extractor.num_frames(len(clip)) / 16)


def pool(states, time_patches, pooling):
    grid = states[..., 1:, :].unflatten(-2, (-1, 2))[..., :time_patches, :, :]
    return {"cls": states[..., 0, :], "mean": grid.mean((-3, -2)), "frame": grid.mean(-2), "patch": grid}[pooling]


@pytest.mark.parametrize("pooling", ["cls", "mean", "frame", "patch"])
def test_embeddings_equal_the_models_states(model, extractor, recordings, pooling):
    clips = list(embed(recordings, Embedder(model, extractor, pooling, batch_size=4)))
    assert [clip.name for clip in clips if clip.is_last] == list(recordings)
    assert [clip.window for clip in clips if clip.name.endswith("3.flac")] == list(range(40))
    for clip in clips:
        states, time_patches = model_alone(model, extractor, recordings[clip.name], clip.start)
        expected = pool(states[-1], time_patches, pooling).numpy()
        assert clip.embedding.dtype == np.float32
        assert clip.embedding.shape == expected.shape
        np.testing.assert_allclose(clip.embedding, expected, atol=1e-4)


def test_windows_cover_the_recording_in_seconds(model, extractor, recordings):
    clips = list(embed(recordings, Embedder(model, extractor)))
    spans = {name: [(c.start, c.end) for c in clips if c.name == name] for name in recordings}
    short, exact, longer, _ = spans.values()
    assert short == [(0.0, 0.28)]  # whole frames only
    assert exact == [(0.0, 0.64)]
    # 198 frames: the last window ends with the recording.
    assert longer == [(0.0, 0.64), (0.64, 1.28), (1.28, 1.92), (1.34, 1.98)]


@pytest.mark.parametrize("layer", [0, 2, "last", "mean", "all"])
@pytest.mark.parametrize("pooling", ["cls", "frame"])
def test_layers(model, extractor, recordings, layer, pooling):
    path, samples = list(recordings.items())[2]
    clips = embed(path, Embedder(model, extractor, pooling, layer))
    for clip in clips:
        states, time_patches = model_alone(model, extractor, samples, clip.start)
        chosen = {"last": states[-1], "mean": states[1:].mean(0), "all": states}.get(layer)
        chosen = states[layer] if chosen is None else chosen
        np.testing.assert_allclose(clip.embedding, pool(chosen, time_patches, pooling), atol=1e-4)


@pytest.mark.parametrize(("window", "hop"), [(0.32, 0.16), (1.0, 0.5)])
def test_window_and_hop(model, extractor, recordings, window, hop):
    path, samples = list(recordings.items())[2]
    clips = list(embed(path, Embedder(model, extractor, "mean", window=window, hop=hop)))
    assert clips[1].start == hop
    assert clips[-1].end == 1.98
    for clip in clips:
        assert clip.end - clip.start == pytest.approx(window)
        states, time_patches = model_alone(model, extractor, samples, clip.start, round(window * 100))
        np.testing.assert_allclose(clip.embedding, pool(states[-1], time_patches, "mean"), atol=1e-4)


def test_attention_mask_of_the_extractor_is_used(model, extractor, recordings):
    path, samples = next(iter(recordings.items()))
    extractor.return_attention_mask = True
    (clip,) = embed(path, Embedder(model, extractor))
    inputs = extractor(samples, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        masked = model(**inputs).pooler_output[0]
        unmasked = model(inputs["input_values"]).pooler_output[0]
    np.testing.assert_allclose(clip.embedding, masked, atol=1e-4)
    assert not np.allclose(clip.embedding, unmasked, atol=1e-4)


def test_from_pretrained_takes_the_encoder_of_a_classifier(make_config, extractor, recordings, tmp_path):
    classifier = SSLAMForAudioClassification(make_config(num_labels=3)).eval()
    classifier.save_pretrained(tmp_path / "model")
    extractor.save_pretrained(tmp_path / "model")
    ours = list(embed(recordings, tmp_path / "model", pooling="mean", device="cpu", batch_size=3))
    expected = list(embed(recordings, Embedder(classifier.sslam, extractor, "mean", batch_size=5)))
    for clip, other in zip(ours, expected, strict=True):
        assert (clip.name, clip.start) == (other.name, other.start)
        np.testing.assert_allclose(clip.embedding, other.embedding, atol=1e-5)


def test_bfloat16(model, extractor, recordings):
    full = list(embed(recordings, Embedder(model, extractor)))
    half = list(embed(recordings, Embedder(model.to(torch.bfloat16), extractor)))
    for clip, other in zip(full, half, strict=True):
        assert other.embedding.dtype == np.float32
        assert np.corrcoef(clip.embedding, other.embedding)[0, 1] > 0.99


def test_unusable_sounds(model, extractor, recordings, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(tmp_path / "nan.wav", np.r_[np.zeros(400_000), np.nan], 16_000, subtype="FLOAT")
    good = next(iter(recordings))
    paths = [str(tmp_path / "broken.wav"), str(tmp_path / "nan.wav"), str(tmp_path / "missing.wav"), good]
    failures = []
    clips = list(embed(paths, Embedder(model, extractor), on_failure=lambda *failure: failures.append(failure)))
    assert [(sound.name, error.reason) for sound, error in failures] == [
        (paths[0], "undecodable"),
        (paths[1], "not_finite"),
        (paths[2], "missing"),
    ]
    assert clips[-1].name == good
    # Windows before the fault are embedded, and none of them is the last.
    assert {clip.name for clip in clips[:-1]} == {paths[1]}
    assert not any(clip.is_last for clip in clips[:-1])
    with pytest.raises(ClipError, match="undecodable"):
        list(embed(paths, Embedder(model, extractor)))


def test_a_data_set_gives_the_embeddings_of_its_files(model, extractor, recordings, write_audio_parquet):
    folder = write_audio_parquet(recordings, shards=2)
    embedder = Embedder(model, extractor)
    clips = list(embed(AudioDataset(str(folder)), embedder))
    expected = list(embed(recordings, embedder))
    assert [clip.name for clip in clips] == [clip.name.rsplit("/", 1)[1] for clip in expected]
    for clip, other in zip(clips, expected, strict=True):
        np.testing.assert_allclose(clip.embedding, other.embedding, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling='max'"),
        ({"layer": 4}, "0 to 3"),
        ({"layer": -1}, "0 to 3"),
        ({"window": 0.1}, "window of 0.1 s"),
        ({"window": 3.0}, "position table, 1.28 s"),
        ({"hop": 0.7}, "hop of 0.7 s"),
        ({"hop": 0.001}, "hop of 0.001 s"),
    ],
)
def test_impossible_settings(model, extractor, settings, message):
    with pytest.raises(InferenceError, match=message):
        Embedder(model, extractor, **settings)
