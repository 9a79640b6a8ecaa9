"""Reading sound files of every kind, compared with soundfile and torchaudio."""

import io
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from modeling_sslam.common.audio import read_waveform
from modeling_sslam.common.errors import ClipError


@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_formats_from_bytes_and_path(encode, tmp_path, file_format):
    data = encode(seconds=0.5, file_format=file_format)
    path = tmp_path / "clip"
    path.write_bytes(data)
    expected = soundfile.read(io.BytesIO(data), dtype="float32")[0]
    for audio in (data, str(path)):
        waveform = read_waveform(audio, 16_000, 10**6)
        assert waveform.dtype == torch.float32
        torch.testing.assert_close(waveform, torch.from_numpy(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_rates_and_channels(encode, rate, channels):
    data = encode(seconds=0.4, rate=rate, channels=channels, file_format="WAV")
    samples = torch.from_numpy(soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0])
    expected = torchaudio.functional.resample(samples.mean(1), rate, 16_000)
    torch.testing.assert_close(read_waveform(data, 16_000, 10**6), expected, rtol=0, atol=1e-7)


def test_a_rate_without_a_simple_ratio_takes_little_memory():
    """11 127 Hz and 16 000 Hz have no common divisor. The test checks that a sine keeps its frequency."""
    file = io.BytesIO()
    soundfile.write(file, 0.5 * np.sin(2 * np.pi * 500 / 11_127 * np.arange(11_127)), 11_127, "FLOAT", format="WAV")
    waveform = read_waveform(file.getvalue(), 16_000, 10**6)
    expected = 0.5 * torch.sin(2 * torch.pi * 500 / 16_000 * torch.arange(16_000))
    torch.testing.assert_close(waveform[100:-100], expected[100:-100], rtol=0, atol=2e-3)


def test_position_places_the_crop(encode):
    data = encode(seconds=1.0)
    whole = read_waveform(data, 16_000, 10**6)
    torch.testing.assert_close(read_waveform(data, 16_000, 4000), whole[:4000], rtol=0, atol=0)
    torch.testing.assert_close(read_waveform(data, 16_000, 4000, position=0.5), whole[6000:10_000], rtol=0, atol=0)
    torch.testing.assert_close(read_waveform(data, 16_000, 4000, position=1 - 1e-9), whole[-4000:], rtol=0, atol=0)
    assert len(read_waveform(data, 16_000, 20_000, position=0.9)) == 16_000


def test_a_resampled_crop_has_the_full_length(encode):
    data = encode(seconds=1.0, rate=44_100)
    assert len(read_waveform(data, 16_000, 5360, position=0.3)) == 5360


def float_wav(samples):
    file = io.BytesIO()
    soundfile.write(file, np.array(samples, dtype=np.float32), 16_000, subtype="FLOAT", format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (float_wav([]), "empty"),
        (bytes(1000), "undecodable"),
        (float_wav([0.1] * 100), "too_short"),
        (float_wav([0.1] * 999 + [float("nan")]), "not_finite"),
        (float_wav([0.1] * 999 + [float("inf")]), "not_finite"),
        (float_wav([20_000.0] * 1000), "out_of_range"),
    ],
    # Names from the data would differ from process to process, because the data hold the time.
    ids=["no bytes", "no samples", "zeros", "short", "nan", "infinity", "loud"],
)
def test_errors_of_unusable_clips_give_the_reason(tmp_path, data, reason):
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    for audio in (data, str(path)):
        with pytest.raises(ClipError) as caught:
            read_waveform(audio, 16_000, 10**6, min_samples=1000)
        assert caught.value.reason == reason


def test_a_truncated_flac_is_undecodable(encode):
    data = encode(seconds=1.0)
    with pytest.raises(ClipError, match=r"undecodable: .*torchcodec"):
        read_waveform(data[: len(data) // 2], 16_000, 10**6)


def test_torchcodec_reads_other_formats_than_libsndfile(monkeypatch):
    """A stand-in with torchcodec's interface, because m4a and webm files need FFmpeg's libraries."""
    stereo = torch.linspace(-1, 1, 4000).reshape(2, 2000)

    class AudioDecoder:
        def __init__(self, audio):
            assert audio == b"not for libsndfile"

        def get_all_samples(self):
            return types.SimpleNamespace(data=stereo, sample_rate=16_000)

    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(AudioDecoder=AudioDecoder))
    waveform = read_waveform(b"not for libsndfile", 16_000, 1000, position=0.5)
    torch.testing.assert_close(waveform, stereo.mean(0)[500:1500])


def test_a_missing_file(tmp_path):
    with pytest.raises(ClipError, match=r"missing: .*nowhere\.wav"):
        read_waveform(str(tmp_path / "nowhere.wav"), 16_000, 10**6)
