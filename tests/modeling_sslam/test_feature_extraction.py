import copy
import json
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from modeling_sslam import DATASET_PRESETS, SSLAMFeatureExtractor, feature_extraction_sslam
from modeling_sslam.feature_extraction_sslam import log_mel_spectrogram, mel_filters
from modeling_sslam.filter_bank_sslam import reference_log_mel

RATE = 16_000
# Value of padding frames after normalisation with the statistics of AudioSet.
PADDING = np.float32(4.268 / (2 * 4.569))


def torchaudio_fbank(waveform: torch.Tensor) -> torch.Tensor:
    """Compute the published filter bank of a waveform `(num_samples,)`."""
    return torchaudio.compliance.kaldi.fbank(
        (waveform - waveform.mean())[None],
        htk_compat=True,
        sample_frequency=RATE,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )


def log_mel(extractor: SSLAMFeatureExtractor, waveform: torch.Tensor) -> torch.Tensor:
    features = extractor(waveform, sampling_rate=RATE, padding="longest", truncation=False, return_tensors="pt")
    return features["input_values"][0, : extractor.num_frames(len(waveform))]


def noise(num_samples: int, seed: int = 0, scale: float = 0.1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(num_samples) * scale).astype(np.float32)


@pytest.fixture
def plain() -> SSLAMFeatureExtractor:
    return SSLAMFeatureExtractor(do_normalize=False)


@pytest.fixture
def extractor() -> SSLAMFeatureExtractor:
    return SSLAMFeatureExtractor()


def log_mel_tolerance(waveform: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the tolerance by torchaudio's own error here: bins without energy magnify the rounding of the FFT."""
    return (torchaudio_fbank(waveform) - expected).abs().max().item() + 1e-5


class TestParity:
    @pytest.fixture(scope="class")
    @staticmethod
    def golden(golden_dir) -> dict[str, torch.Tensor]:
        return load_file(golden_dir / "frontend.safetensors")

    @pytest.mark.parametrize("name", ["2_44100", "3_32000", "4_48000", "5_8000"])
    def test_resampling(self, golden, parity, name):
        waveform = golden[f"wave_{name}"].float() / 32768
        resampled = torchaudio.functional.resample(waveform, int(name.split("_")[1]), RATE)
        parity(f"front end {name}: resampled", (resampled - golden[f"resampled_{name}"]).abs().max(), 1e-5)

    @pytest.mark.parametrize("name", ["1_16000", "2_44100", "3_32000", "4_48000", "5_8000", "6_16000"])
    def test_log_mel(self, golden, parity, plain, name):
        waveform = golden.get(f"resampled_{name}", golden[f"wave_{name}"].float() / 32768)
        expected = golden[f"fbank_{name}"]
        error = (log_mel(plain, waveform) - expected).abs().max()
        parity(f"front end {name}: log-mel", error, log_mel_tolerance(waveform, expected))

    @pytest.mark.parametrize(
        ("name", "max_length"),
        [
            ("0_16000", 1024),
            ("1_16000", 128),
            ("2_44100", 128),
            ("3_32000", 128),
            ("4_48000", 128),
            ("5_8000", 128),
            ("6_16000", 128),
        ],
    )
    def test_input_values(self, golden, parity, extractor, name, max_length):
        waveform = golden.get(f"resampled_{name}", golden[f"wave_{name}"].float() / 32768)
        features = extractor(waveform, sampling_rate=RATE, max_length=max_length, return_tensors="pt")
        error = (features["input_values"][0] - golden[f"input_values_{name}_{max_length}"]).abs().max()
        log_mel_values = golden.get(f"fbank_{name}", torchaudio_fbank(waveform))
        tolerance = log_mel_tolerance(waveform, log_mel_values) / (2 * extractor.std)
        parity(f"front end {name}: input_values", error, tolerance)

    def test_int16_equals_its_float_samples(self, golden, extractor):
        as_int, as_float = (
            extractor(wave, sampling_rate=RATE, return_tensors="pt")["input_values"]
            for wave in (golden["wave_0_16000"], golden["wave_0_16000"].float() / 32768)
        )
        assert torch.equal(as_int, as_float)


def hard_clips() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(num_samples: int) -> torch.Tensor:
        return torch.randn(num_samples, generator=generator)

    seconds = torch.arange(2 * RATE, dtype=torch.float64) / RATE
    return {
        "one frame": random(400) * 0.1,
        "30 ms": random(480) * 0.1,
        "10 s": random(10 * RATE) * 0.1,
        "2 min": random(120 * RATE) * 0.1,
        "silence": torch.zeros(RATE),
        "clipped": (random(RATE) * 5).clamp(-1, 1),
        "denormal": random(RATE) * 1e-40,
        "tone": torch.sin(2 * math.pi * 440 * seconds).float(),
        "full-scale chirp": torch.sin(2 * math.pi * (50 + 1900 * seconds) * seconds).float(),
        "DC": torch.full((RATE,), 0.5),
        "DC and whisper": 0.9 + random(RATE) * 1e-5,
        "click": torch.nn.functional.one_hot(torch.tensor(RATE // 2), RATE).float(),
    }


@pytest.mark.parametrize("name", hard_clips())
def test_agrees_with_torchaudio(parity, plain, name):
    waveform = hard_clips()[name]
    error = (log_mel(plain, waveform) - torchaudio_fbank(waveform)).abs().max()
    parity(f"torchaudio's fbank: {name}", error, 1e-4)


def test_agrees_with_torchaudio_in_batches_of_unequal_lengths(plain):
    clips = [torch.from_numpy(noise(n, seed=n)) for n in (400, 16_000, 70_003, 512, 160_000)]
    features = plain(clips, sampling_rate=RATE, padding="longest", return_tensors="pt")
    for values, mask, clip in zip(features["input_values"], features["attention_mask"], clips, strict=True):
        expected = torchaudio_fbank(clip)
        torch.testing.assert_close(values[: len(expected)], expected, atol=1e-4, rtol=0)
        assert values[len(expected) :].eq(0).all()
        assert mask.tolist() == [1] * len(expected) + [0] * (len(values) - len(expected))


@pytest.mark.parametrize(("num_mel_bins", "sampling_rate"), [(64, 16_000), (80, 8_000), (33, 32_000), (400, 16_000)])
def test_agrees_with_torchaudio_at_other_settings(num_mel_bins, sampling_rate):
    waveform = torch.from_numpy(noise(sampling_rate))
    expected = torchaudio.compliance.kaldi.fbank(
        waveform[None],
        htk_compat=True,
        sample_frequency=sampling_rate,
        window_type="hanning",
        num_mel_bins=num_mel_bins,
    )
    actual = log_mel_spectrogram(waveform[None], num_mel_bins, sampling_rate)[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_mel_filters_agree_with_torchaudio():
    expected, _ = torchaudio.compliance.kaldi.get_mel_banks(128, 512, RATE, 20.0, 0.0, 100.0, -500.0, 1.0)
    torch.testing.assert_close(mel_filters(128, RATE, 512), expected.T, atol=1e-6, rtol=0)


class TestPaddingAndNormalisation:
    def test_pads_before_normalising(self, extractor, plain):
        wave = noise(RATE)
        normalised, log_mel = (
            e(wave, sampling_rate=RATE, return_tensors="np")["input_values"][0] for e in (extractor, plain)
        )
        assert normalised.shape == (1024, 128)
        np.testing.assert_allclose(normalised[:98], (log_mel[:98] + 4.268) / (2 * 4.569), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(normalised[98:], PADDING, rtol=1e-6)
        assert (log_mel[98:] == 0).all()

    def test_max_length_cuts(self, extractor):
        wave = noise(2 * RATE)
        whole = extractor(wave, sampling_rate=RATE, return_tensors="np")["input_values"]
        cut = extractor(wave, sampling_rate=RATE, max_length=64, return_tensors="np")["input_values"]
        assert cut.shape == (1, 64, 128)
        np.testing.assert_array_equal(cut, whole[:, :64])  # the mean of the whole clip is subtracted

    def test_longest(self, extractor):
        clips = [noise(RATE), noise(RATE // 2)]
        features = extractor(clips, sampling_rate=RATE, padding="longest", return_tensors="pt")
        assert features["input_values"].shape == (2, 112, 128)  # 98 frames, rounded up to whole patches
        assert features["attention_mask"].sum(1).tolist() == [98, 48]
        assert torch.equal(
            features["input_values"],
            extractor(clips, sampling_rate=RATE, padding=True, return_tensors="pt")["input_values"],
        )

    def test_longest_without_truncation_takes_any_length(self, extractor):
        features = extractor(noise(12 * RATE), sampling_rate=RATE, padding="longest", truncation=False)
        assert features["input_values"][0].shape == (1200, 128)
        features = extractor(noise(12 * RATE), sampling_rate=RATE, padding="longest")
        assert features["input_values"][0].shape == (1024, 128)

    def test_max_length_without_truncation_refuses_longer_clips(self, extractor):
        with pytest.raises(
            ValueError, match=r"Clip 1 has 1198 frames, more than max_length=1024. Use truncation=True"
        ):
            extractor([noise(RATE), noise(12 * RATE)], sampling_rate=RATE, truncation=False)

    def test_returns_a_mask_with_padding_to_the_longest_only(self, extractor):
        assert "attention_mask" not in extractor(noise(RATE), sampling_rate=RATE)
        assert "attention_mask" in extractor(noise(RATE), sampling_rate=RATE, padding="longest")
        features = extractor(noise(RATE), sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
        assert features["attention_mask"].dtype == torch.int64
        assert features["attention_mask"].sum() == 98
        masking = SSLAMFeatureExtractor(return_attention_mask=True)
        assert "attention_mask" in masking(noise(RATE), sampling_rate=RATE)
        assert "attention_mask" not in masking(noise(RATE), sampling_rate=RATE, return_attention_mask=False)

    @pytest.mark.parametrize("name", DATASET_PRESETS)
    def test_presets(self, name):
        extractor = SSLAMFeatureExtractor.for_dataset(name)
        assert (extractor.mean, extractor.std) == (DATASET_PRESETS[name]["mean"], DATASET_PRESETS[name]["std"])
        values = extractor(noise(RATE), sampling_rate=RATE, return_tensors="np")["input_values"]
        assert values.shape == (1, DATASET_PRESETS[name]["max_length"], 128)
        assert values[0, -1, 0] == pytest.approx(-extractor.mean / (2 * extractor.std))

    def test_presets_can_be_overridden_and_are_named_in_the_error(self):
        assert SSLAMFeatureExtractor.for_dataset("esc50", max_length=128).max_length == 128
        with pytest.raises(ValueError, match="audioset, esc50, speech_commands"):
            SSLAMFeatureExtractor.for_dataset("esc-50")


class TestForms:
    """All forms of the same audio have the features of its float32 waveform."""

    @settings(deadline=None, max_examples=40)
    @given(
        lengths=st.lists(st.integers(400, 8000), min_size=1, max_size=4),
        dtype=st.sampled_from(["float16", "float32", "float64", "int16", "int32", "uint8"]),
        container=st.sampled_from(["numpy", "torch", "list"]),
        channels=st.integers(0, 3),
        padding=st.sampled_from(["longest", "max_length"]),
    )
    def test_dtypes_and_containers(self, lengths, dtype, container, channels, padding):
        extractor = SSLAMFeatureExtractor(max_length=64)
        full_scale = {"int16": 2**15, "int32": 2**31, "uint8": 2**7}.get(dtype)
        clips, floats = [], []
        for i, length in enumerate(lengths):
            clip = np.random.default_rng(i).uniform(-0.9, 0.9, (channels, length) if channels else length)
            if full_scale:
                clip = np.floor(clip * full_scale)
                values = clip / full_scale
                clip = (clip + (128 if dtype == "uint8" else 0)).astype(dtype)
            else:
                clip = clip.astype(dtype)
                values = clip.astype(np.float64)
            clips.append(clip)
            floats.append((values.mean(0) if channels else values).astype(np.float32))
        if container == "torch":
            clips = [torch.from_numpy(clip) for clip in clips]
        elif container == "list" and not full_scale:  # Python integers have no PCM format
            clips = [clip.tolist() for clip in clips]
        actual, expected = (
            extractor(batch, sampling_rate=RATE, padding=padding, return_tensors="np") for batch in (clips, floats)
        )
        assert actual["input_values"].dtype == np.float32
        # Means of channels and scaled integers are rounded to float32; quiet bins magnify the error.
        np.testing.assert_allclose(actual["input_values"], expected["input_values"], atol=2e-3)
        assert actual.keys() == expected.keys()
        if not channels and dtype != "int32":
            np.testing.assert_array_equal(actual["input_values"], expected["input_values"])

    @settings(deadline=None, max_examples=40)
    @given(
        lengths=st.lists(st.integers(400, 12_000), min_size=1, max_size=6),
        max_length=st.sampled_from([16, 32, 64, 128]),
        padding=st.sampled_from(["longest", "max_length"]),
    )
    def test_batch_equals_single(self, lengths, max_length, padding):
        extractor = SSLAMFeatureExtractor(max_length=max_length)
        clips = [noise(length, seed) for seed, length in enumerate(lengths)]
        options = {"sampling_rate": RATE, "padding": padding, "return_tensors": "np", "return_attention_mask": True}
        batch = extractor(clips, **options)
        frames = batch["input_values"].shape[1]
        assert frames == max_length if padding == "max_length" else frames % 16 == 0
        for i, clip in enumerate(clips):
            single = extractor(clip, **options)
            alone = single["input_values"].shape[1]
            # A mean, or a product in a block of another size, can be rounded differently.
            np.testing.assert_allclose(batch["input_values"][i, :alone], single["input_values"][0], atol=1e-5)
            np.testing.assert_array_equal(batch["attention_mask"][i, :alone], single["attention_mask"][0])
            np.testing.assert_allclose(batch["input_values"][i, alone:], PADDING, rtol=1e-6)
            assert not batch["attention_mask"][i, alone:].any()
            assert batch["attention_mask"][i].sum() == min(1 + (len(clip) - 400) // 160, max_length)

    def test_one_clip_or_many(self, extractor):
        wave = noise(RATE)
        expected = extractor(wave, sampling_rate=RATE, return_tensors="pt")["input_values"]
        assert expected.shape == (1, 1024, 128)
        for form in (
            wave.tolist(),
            tuple(wave.tolist()),
            torch.from_numpy(wave),
            [wave],
            (wave,),
            wave[None],
            [wave.tolist()],
        ):
            assert torch.equal(extractor(form, sampling_rate=RATE, return_tensors="pt")["input_values"], expected)
        two = extractor(np.stack([wave, wave]), sampling_rate=RATE, return_tensors="pt")["input_values"]
        assert torch.equal(two, expected.repeat(2, 1, 1))
        stereo = extractor(np.stack([wave, wave])[None], sampling_rate=RATE, return_tensors="pt")["input_values"]
        assert torch.equal(stereo, expected)

    def test_arrays_that_torch_cannot_share_memory_with(self, extractor):
        wave = noise(RATE)
        read_only = wave.copy()
        read_only.flags.writeable = False
        expected = extractor(wave, sampling_rate=RATE, return_tensors="np")["input_values"]
        for form in (
            read_only,
            wave[::-1].copy()[::-1],
            np.repeat(wave, 2)[::2],
            torch.from_numpy(wave).requires_grad_(),
        ):
            np.testing.assert_array_equal(
                extractor(form, sampling_rate=RATE, return_tensors="np")["input_values"], expected
            )

    def test_does_not_change_its_input(self, extractor):
        wave = noise(RATE)
        before = wave.copy()
        extractor(wave, sampling_rate=RATE)
        extractor(torch.from_numpy(wave), sampling_rate=RATE, device="cpu")
        np.testing.assert_array_equal(wave, before)

    def test_return_types(self, extractor):
        clips = [noise(RATE), noise(2 * RATE)]
        listed = extractor(clips, sampling_rate=RATE)["input_values"]
        assert isinstance(listed, list)
        assert [type(values) for values in listed] == [np.ndarray] * 2
        arrays = extractor(clips, sampling_rate=RATE, return_tensors="np")["input_values"]
        tensors = extractor(clips, sampling_rate=RATE, return_tensors="pt")["input_values"]
        np.testing.assert_array_equal(np.stack(listed), arrays)
        np.testing.assert_array_equal(tensors.numpy(), arrays)
        with pytest.raises(ValueError, match="tensorflow"):
            extractor(clips, sampling_rate=RATE, return_tensors="tensorflow")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_computes_in_float32_under_any_default_dtype(self, extractor, dtype):
        wave = torch.from_numpy(noise(RATE))
        expected = extractor(wave, sampling_rate=RATE, return_tensors="pt")["input_values"]
        torch.set_default_dtype(dtype)
        try:
            actual = extractor(wave, sampling_rate=RATE, return_tensors="pt")["input_values"]
            fresh = mel_filters.__wrapped__(128, RATE, 512)
        finally:
            torch.set_default_dtype(torch.float32)
        assert actual.dtype == fresh.dtype == torch.float32
        assert torch.equal(actual, expected)
        assert torch.equal(fresh, mel_filters(128, RATE, 512))

    def test_computes_in_float32_under_autocast_and_inference_mode(self, extractor):
        wave = torch.from_numpy(noise(RATE))
        expected = extractor(wave, sampling_rate=RATE, return_tensors="pt")["input_values"]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(extractor(wave, sampling_rate=RATE, return_tensors="pt")["input_values"], expected)
        with torch.inference_mode():
            assert torch.equal(extractor(wave, sampling_rate=RATE, return_tensors="pt")["input_values"], expected)

    def test_results_work_under_autograd(self, extractor):
        mel_filters.cache_clear()
        features = extractor(noise(RATE), sampling_rate=RATE, return_tensors="pt")["input_values"]
        for values in (features, mel_filters(128, RATE, 512)):
            weight = torch.ones(128, requires_grad=True)
            (values * weight).sum().backward()
            assert torch.isfinite(weight.grad).all()

    def test_device(self, extractor):
        for device in ("cpu", torch.device("cpu")):
            features = extractor(noise(RATE), sampling_rate=RATE, return_tensors="pt", device=device)
            assert features["input_values"].device.type == "cpu"


class TestErrors:
    @pytest.mark.parametrize(
        ("audio", "sentence"),
        [
            ([], "Clip 0 has 0 samples"),
            (np.zeros((0, RATE), np.float32), "batch of audio is empty"),
            (np.zeros(0, np.float32), "Clip 0 has 0 samples"),
            ([noise(RATE), np.zeros(0, np.float32)], "Clip 1 has 0 samples"),
            (noise(399), "Clip 0 has 399 samples, less than one frame of 400"),
            ([noise(RATE), [float("nan")] * RATE], "Clip 1 has NaN or infinite samples"),
            (np.full(RATE, -np.inf, np.float32), "Clip 0 has NaN or infinite samples"),
            (np.append(noise(12 * RATE), np.float32("nan")), "Clip 0 has NaN or infinite samples"),
            (np.zeros(RATE, np.int64), "int64 samples, whose full scale is unknown"),
            ([0] * RATE, "int64 samples, whose full scale is unknown"),
            (np.zeros(RATE, np.uint16), "uint16 samples, whose full scale is unknown"),
            (np.zeros(RATE, bool), "bool samples, whose full scale is unknown"),
            (noise(RATE) * 32768, "these look like integer samples kept as floats. Divide them"),
            (noise(2 * RATE).reshape(-1, 2), "transpose it"),
            ([noise(2 * RATE).reshape(-1, 2)], "Transpose audio that has its channels last"),
            (noise(RATE).reshape(1, 1, 1, -1), "pass .num_samples"),
            ("crow.flac", "Audio must be an array, a tensor or a list, not str"),
            ([["crow.flac"]], "Clip 0 is not an array of samples"),
            (None, "not NoneType"),
            ([[[0.0] * 500, [0.0] * 400]], "Clip 0 is not an array of samples"),
        ],
    )
    def test_audio(self, extractor, audio, sentence):
        with pytest.raises(ValueError, match=sentence):
            extractor(audio, sampling_rate=RATE)

    def test_sampling_rate(self, extractor):
        with pytest.raises(ValueError, match=r"at 44100 Hz, .* takes 16000 Hz. Resample it first: .*44100, 16000"):
            extractor(noise(RATE), sampling_rate=44_100)

    def test_warns_when_the_sampling_rate_is_not_given(self, extractor, transformers_log):
        extractor(noise(RATE))
        assert "Pass `sampling_rate`" in transformers_log.text

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"padding": False}, 'padding=False is not supported; use "max_length" or "longest"'),
            ({"padding": "do_not_pad"}, "padding='do_not_pad' is not supported"),
            ({"max_length": 100}, "max_length=100 must be a positive multiple of patch_size=16"),
            ({"max_length": 0}, "max_length=0 must be a positive multiple"),
        ],
    )
    def test_options(self, extractor, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            extractor(noise(RATE), sampling_rate=RATE, **options)

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"max_length": 1000}, "max_length=1000 must be a positive multiple of patch_size=16"),
            ({"std": 0.0}, "std=0.0 must be positive; use do_normalize=False"),
            ({"feature_size": 2}, "feature_size=2 and padding_side='right' must be 1 and 'right'"),
            ({"padding_side": "left"}, "padding_side='left' must be 1 and 'right'"),
        ],
    )
    def test_construction(self, fields, sentence):
        with pytest.raises(ValueError, match=sentence):
            SSLAMFeatureExtractor(**fields)


class TestSaving:
    def test_round_trip(self, tmp_path):
        extractor = SSLAMFeatureExtractor.for_dataset("esc50", return_attention_mask=True)
        extractor.save_pretrained(tmp_path)
        loaded = SSLAMFeatureExtractor.from_pretrained(tmp_path)
        assert loaded.to_dict() == extractor.to_dict()
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert saved["feature_extractor_type"] == "SSLAMFeatureExtractor"
        assert (saved["mean"], saved["std"], saved["max_length"]) == (-6.627, 5.359, 512)
        wave = noise(RATE)
        first, second = (e(wave, sampling_rate=RATE, return_tensors="pt") for e in (extractor, loaded))
        assert torch.equal(first["input_values"], second["input_values"])
        assert torch.equal(first["attention_mask"], second["attention_mask"])

    @pytest.mark.slow
    def test_loads_without_this_package(self, extractor, tmp_path):
        wave = noise(RATE)
        np.save(tmp_path / "wave.npy", wave)
        extractor.save_pretrained(tmp_path / "saved")
        assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {
            "configuration_sslam.py",
            "feature_extraction_sslam.py",
            "filter_bank_sslam.py",
            "transfers_sslam.py",
        }
        script = """
import sys
sys.modules["modeling_sslam"] = None  # importing it raises ImportError
import numpy as np
from transformers import AutoFeatureExtractor
extractor = AutoFeatureExtractor.from_pretrained("saved", trust_remote_code=True)
assert type(extractor).__module__.startswith("transformers_modules."), type(extractor)
features = extractor(np.load("wave.npy"), sampling_rate=16_000, return_tensors="np")
np.save("features.npy", features["input_values"])
extractor.save_pretrained("saved again")
AutoFeatureExtractor.from_pretrained("saved again", trust_remote_code=True)
"""
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
        expected = extractor(wave, sampling_rate=RATE, return_tensors="np")["input_values"]
        np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), expected)

    def test_copies(self, extractor):
        for twin in (copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
            assert twin.to_dict() == extractor.to_dict()


@pytest.mark.slow
def test_needs_little_memory_besides_input_and_output():
    script = """
import resource, sys
import numpy as np
from modeling_sslam import SSLAMFeatureExtractor
extractor = SSLAMFeatureExtractor()
clips = np.random.default_rng(0).standard_normal((128, 160_000), dtype=np.float32) * np.float32(0.1)
extractor(clips[:2], sampling_rate=16_000, return_tensors="pt")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
features = extractor(clips, sampling_rate=16_000, return_tensors="pt")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / clips.nbytes)
"""
    ratio = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert ratio < 2  # the output alone is 0.8 of the input


@pytest.mark.slow
def test_needs_no_audio_library():
    script = """
import sys
for name in ("torchaudio", "torchcodec", "soundfile", "librosa", "scipy", "sklearn", "datasets", "accelerate"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
from modeling_sslam import SSLAMFeatureExtractor
extractor = SSLAMFeatureExtractor()
print(extractor(np.zeros(16_000, np.float32), sampling_rate=16_000, return_tensors="pt")["input_values"].shape)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "torch.Size([1, 1024, 128])"


class TestDevices:
    """The computation for devices other than CPUs, run on the CPU."""

    @pytest.fixture
    @staticmethod
    def on_device(monkeypatch):
        """Let the CPU count as another device."""

        def compute(extractor: SSLAMFeatureExtractor, *args, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr(feature_extraction_sslam, "is_host", lambda device: False)
                patch.setattr(extractor, "_extract", None)
                return extractor(*args, sampling_rate=RATE, return_tensors="pt", **kwargs)

        return compute

    @pytest.mark.parametrize("padding", ["longest", "max_length"])
    @pytest.mark.parametrize("lengths", [(RATE,), (RATE, RATE), (400, 16_000, 70_003, 512), (200_000, 16_000)])
    def test_batches_equal_those_of_the_cpu(self, on_device, extractor, lengths, padding):
        clips = [torch.from_numpy(noise(n, seed=n) + 0.05) for n in lengths]
        before = [clip.clone() for clip in clips]
        actual = on_device(extractor, clips, padding=padding, return_attention_mask=True)
        expected = extractor(
            clips, sampling_rate=RATE, padding=padding, return_attention_mask=True, return_tensors="pt"
        )
        # The logarithm magnifies rounding where a bin is nearly empty; the next tests have the exact limits.
        torch.testing.assert_close(actual["input_values"], expected["input_values"], atol=1e-3, rtol=0)
        assert torch.equal(actual["attention_mask"], expected["attention_mask"])
        assert all(map(torch.equal, clips, before))
        padding_frames = expected["attention_mask"] == 0
        assert torch.equal(actual["input_values"][padding_frames], expected["input_values"][padding_frames])

    def test_a_model_in_training_can_keep_the_features(self, on_device, extractor):
        features = on_device(extractor, torch.from_numpy(noise(RATE)))["input_values"]
        layer = torch.nn.Linear(128, 1)
        layer(features).sum().backward()
        torch.testing.assert_close(layer.weight.grad, features.sum((0, 1))[None], atol=0, rtol=1e-4)

    @pytest.mark.parametrize("name", ["0_16000", "1_16000", "2_44100", "3_32000", "4_48000", "5_8000", "6_16000"])
    def test_parity(self, on_device, extractor, golden_dir, parity, name):
        golden = load_file(golden_dir / "frontend.safetensors")
        waveform = golden.get(f"resampled_{name}", golden[f"wave_{name}"].float() / 32768)
        max_length = 1024 if name == "0_16000" else 128
        actual = on_device(extractor, waveform, max_length=max_length)["input_values"][0]
        error = (actual - golden[f"input_values_{name}_{max_length}"]).abs().max()
        parity(f"front end of devices {name}: input_values", error, 2e-4)

    @pytest.mark.parametrize("name", hard_clips())
    def test_is_as_exact_as_the_published_code(self, on_device, extractor, parity, name):
        """Tones leave bins so empty that float32 determines their logarithm no better in the published code."""
        waveform = hard_clips()[name]
        actual = on_device(extractor, waveform, padding="longest", truncation=False)["input_values"][0]
        exact = reference_log_mel((waveform - waveform.mean())[None].double())[0]
        published_error = (torchaudio_fbank(waveform) - exact).abs().max().item() / (2 * extractor.std)
        error = (actual[: len(exact)].double() * 2 * extractor.std + extractor.mean - exact).abs().max()
        parity(f"front end of devices: {name}", error / (2 * extractor.std), max(2e-4, 2 * published_error))

    @pytest.mark.parametrize(
        ("value", "message"), [(math.nan, "Clip 1 has NaN"), (math.inf, "Clip 1 has NaN or inf"), (300.0, "peaks at")]
    )
    def test_unusable_samples_are_refused(self, on_device, extractor, value, message):
        clips = [torch.from_numpy(noise(n)) for n in (RATE, RATE, 8000)]
        clips[1][-1] = value
        with pytest.raises(ValueError, match=message):
            on_device(extractor, clips)
