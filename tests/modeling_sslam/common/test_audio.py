"""Recordings in blocks, compared with the same recordings read and resampled whole."""

import os
import pickle
import sys
import threading
import types
import weakref

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_sslam.common import decoding
from modeling_sslam.common.audio import read_waveform, waveform_blocks
from modeling_sslam.common.decoding import duration_seconds
from modeling_sslam.common.resampling import StreamResampler, resample
from modeling_sslam.inference import ClipError, InferenceError, stream_blocks


@pytest.mark.parametrize("rate", [8_000, 11_025, 11_127, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("block_seconds", [0.004, 0.37, 60.0])
def test_blocks_joined_are_the_resampled_whole(write_sound, rate, block_seconds):
    path = write_sound("sound.wav", seconds=1.37, rate=rate, channels=2)
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0]).mean(1)
    # torchaudio's own function takes rates whose ratio is simple.
    whole = (resample if rate == 11_127 else torchaudio.functional.resample)(samples, rate, 16_000)
    joined = torch.cat(list(stream_blocks(str(path), 16_000, block_seconds)))
    assert joined.dtype == torch.float32
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([8_000, 11_025, 44_100, 48_000]), st.lists(st.integers(0, 700), max_size=6))
def test_resampler_takes_blocks_of_any_size(rate, sizes):
    waveform = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    resampler = StreamResampler(rate, 16_000)
    outputs = [resampler.push(block) for block in waveform.split(sizes)] if sizes else []
    joined = torch.cat([*outputs, resampler.finish()])
    if len(waveform):
        torch.testing.assert_close(joined, resample(waveform, rate, 16_000), rtol=0, atol=1e-6)
    else:
        assert not len(joined)


def test_a_long_file_is_never_held_whole(tmp_path, monkeypatch):
    """At most two blocks of half an hour at 8 kHz are in memory at a time."""
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 8_000, 1, "PCM_16") as file:
        minute = (0.1 * np.random.default_rng(0).standard_normal(60 * 8_000)).astype(np.float32)
        for _ in range(30):
            file.write(minute)
    read, alive, most, reads = decoding._read, set(), 0, 0

    def watched(file, num_frames):
        nonlocal most, reads
        block = read(file, num_frames)
        reads += 1
        alive.add(reads)
        weakref.finalize(block, alive.discard, reads)
        most = max(most, len(alive))
        assert block.numel() <= 20 * 8_000
        return block

    monkeypatch.setattr(decoding, "_read", watched)
    longest = total = 0
    for block in stream_blocks(str(path), 16_000, block_seconds=20.0):
        longest, total = max(longest, block.untyped_storage().nbytes()), total + len(block)
    assert total == 30 * 60 * 16_000
    assert reads == 91
    assert most <= 2
    assert longest <= 21 * 16_000 * 4


def test_errors_say_where_the_fault_is(write_sound):
    samples = np.zeros(32_000, np.float32)
    samples[25_000] = np.nan
    blocks = stream_blocks(str(write_sound("sound.wav", samples=samples)), 16_000, block_seconds=0.5)
    assert sum(len(next(blocks)) for _ in range(3)) == 24_000
    with pytest.raises(ClipError, match=r"not_finite: .* in the 0.5 s after 1.5 s") as caught:
        next(blocks)
    assert caught.value.reason == "not_finite"


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"not a sound" * 99, "undecodable"), (None, "missing")]
)
def test_unusable_files_are_refused(tmp_path, monkeypatch, content, reason):
    monkeypatch.setenv("PATH", "")
    path = tmp_path / "sound.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClipError) as caught:
        list(stream_blocks(str(path), 16_000))
    assert caught.value.reason == reason


def test_a_file_without_samples(write_sound):
    with pytest.raises(ClipError, match="empty: the file has no samples"):
        list(stream_blocks(str(write_sound("sound.wav", samples=np.zeros(0, np.float32))), 16_000))


def test_a_damaged_flac(write_sound):
    path = write_sound("sound.flac", seconds=3)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ClipError, match=r"undecodable: after .* s libsndfile says"):
        list(stream_blocks(str(path), 16_000, block_seconds=0.5))


def fake_ffmpeg(folder, monkeypatch, script: str) -> None:
    """Replace the program ffmpeg by a script, because the tests do not require ffmpeg."""
    program = folder / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_ffmpeg_streams_files_that_libsndfile_cannot_read(tmp_path, monkeypatch, write_sound):
    stereo = np.random.default_rng(0).uniform(-1, 1, (20_000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "sound.au", stereo, 8_000, subtype="FLOAT", endian="BIG", format="AU")
    path = tmp_path / "-odd:name.m4a"
    path.write_bytes(b"not for libsndfile")
    fake_ffmpeg(
        tmp_path,
        monkeypatch,
        "import sys, shutil\n"
        f"assert sys.argv[sys.argv.index('-i') + 1] == 'file:{path}'\n"
        f"shutil.copyfileobj(open({str(tmp_path / 'sound.au')!r}, 'rb'), sys.stdout.buffer)\n",
    )
    blocks = list(stream_blocks(str(path), 8_000, block_seconds=0.3))
    assert len(blocks) == 9
    torch.testing.assert_close(torch.cat(blocks), torch.from_numpy(stereo.mean(1)), rtol=0, atol=1e-7)


def test_a_file_that_ffmpeg_cannot_read_either(tmp_path, monkeypatch):
    path = tmp_path / "sound.m4a"
    path.write_bytes(b"nor for FFmpeg")
    fake_ffmpeg(tmp_path, monkeypatch, "import sys\nsys.exit('Invalid data found')\n")
    with pytest.raises(ClipError, match=r"undecodable: libsndfile says: .* ffmpeg says: Invalid data found"):
        list(stream_blocks(str(path), 8_000))


def test_a_reader_that_stops_ends_ffmpeg(tmp_path, monkeypatch):
    path = tmp_path / "sound.m4a"
    path.write_bytes(b"not for libsndfile")
    fake_ffmpeg(
        tmp_path,
        monkeypatch,
        "import os, struct, sys\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "sys.stdout.buffer.write(struct.pack('>4sIIIII', b'.snd', 24, 0xffffffff, 6, 8000, 1))\n"
        "while True: sys.stdout.buffer.write(bytes(4000))\n",
    )
    blocks = stream_blocks(str(path), 8_000, block_seconds=1.0)
    assert len(next(blocks)) == 8_000
    blocks.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_without_ffmpeg_torchcodec_decodes_the_whole_file(tmp_path, monkeypatch):
    stereo = torch.linspace(-1, 1, 4000).reshape(2, 2000)
    samples = types.SimpleNamespace(data=stereo, sample_rate=16_000)
    decoder = types.SimpleNamespace(get_all_samples=lambda: samples)
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(AudioDecoder=lambda audio: decoder))
    monkeypatch.setenv("PATH", "")
    blocks = list(stream_blocks(b"not for libsndfile", 16_000, block_seconds=0.05))
    assert len(blocks) == 3
    torch.testing.assert_close(torch.cat(blocks), stereo.mean(0))


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, IndexError])
def test_every_error_of_a_decoder_is_a_clip_error(monkeypatch, write_sound, error):
    path = str(write_sound("sound.wav", seconds=1))

    def broken(*arguments, **options):
        raise error("no sound")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setattr(soundfile.SoundFile, "read", broken)
    with pytest.raises(ClipError, match="undecodable: after 0 s libsndfile says: no sound"):
        list(stream_blocks(path, 16_000))
    with pytest.raises(ClipError, match=r"undecodable: libsndfile says: no sound .* install torchcodec"):
        read_waveform(path, 16_000, 100)
    with pytest.raises(ClipError, match="undecodable: torchcodec says: no sound"):
        list(waveform_blocks(types.SimpleNamespace(get_all_samples=broken), 16_000))
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(AudioDecoder=broken))
    with pytest.raises(ClipError, match="undecodable: libsndfile says: no sound torchcodec says: no sound"):
        read_waveform(path, 16_000, 100)


def test_clip_errors_pass_between_processes():
    error = pickle.loads(pickle.dumps(ClipError("empty", "the file has no bytes")))
    assert (str(error), error.reason, error.detail) == (
        "empty: the file has no bytes",
        "empty",
        "the file has no bytes",
    )


def test_every_form_of_a_recording(write_sound):
    path = write_sound("sound.wav", seconds=0.3, rate=8_000, channels=2)
    samples = soundfile.read(path, dtype="float32")[0].T
    expected = torch.cat(list(stream_blocks(str(path), 16_000)))
    decoder = types.SimpleNamespace(
        get_all_samples=lambda: types.SimpleNamespace(data=torch.from_numpy(samples), sample_rate=8_000)
    )
    for form in (
        path,
        path.read_bytes(),
        {"array": samples, "sampling_rate": 8_000},
        {"raw": torch.from_numpy(samples), "sampling_rate": 8_000, "path": None},
        decoder,
        expected,
        expected.double().numpy(),
    ):
        torch.testing.assert_close(torch.cat(list(waveform_blocks(form, 16_000))), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"array": np.zeros(9)}, "sampling_rate"),
        ({"path": "sound.wav"}, r"keys \['path'\]"),
        (np.zeros(9, np.int16), r"int16 and shape \(9,\)"),
        (np.zeros((1, 1, 9)), r"shape \(1, 1, 9\)"),
        (3, "not int"),
    ],
)
def test_forms_that_are_no_recording(form, message):
    with pytest.raises(InferenceError, match=message):
        list(waveform_blocks(form, 16_000))


def test_samples_are_checked():
    with pytest.raises(ClipError, match="out_of_range: peak 20000 where"):
        list(waveform_blocks(torch.full((900,), 20_000.0), 16_000))
    with pytest.raises(ClipError, match="empty"):
        list(waveform_blocks(torch.zeros(0), 16_000))


def test_duration_from_the_head(write_sound, tmp_path):
    path = write_sound("sound.wav", seconds=2.5, rate=8_000)
    assert duration_seconds(str(path)) == duration_seconds(path.read_bytes()) == 2.5
    assert duration_seconds(str(tmp_path / "nowhere.wav")) is None


def test_a_file_that_hangs_on_opening_blocks_no_other(tmp_path):
    pipe, wav = str(tmp_path / "pipe.wav"), str(tmp_path / "sound.wav")
    os.mkfifo(pipe)
    soundfile.write(wav, np.zeros(16_000), 16_000)
    errors = []

    def read(path: str) -> None:
        try:
            list(stream_blocks(path, 16_000))
        except ClipError as error:
            errors.append(error)

    hanging = threading.Thread(target=read, args=(pipe,), daemon=True)
    hanging.start()
    hanging.join(0.5)
    other = threading.Thread(target=read, args=(wav,), daemon=True)
    other.start()
    other.join(10)
    was_held_up = other.is_alive()
    while hanging.is_alive():  # let the thread end, so that it does not disturb later tests
        try:
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            hanging.join(0.01)  # there is no reader at the moment
    other.join()
    assert not was_held_up
    assert [error.reason for error in errors] == ["empty"]
