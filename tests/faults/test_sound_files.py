"""Sound files that once ended a command, lost sound in silence or took memory without bound."""

import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from modeling_sslam.__main__ import main
from modeling_sslam.common import decoding, resampling
from modeling_sslam.common.audio import read_waveform, stream_blocks, waveform_blocks
from modeling_sslam.common.decoding import duration_seconds
from modeling_sslam.common.errors import ClipError
from modeling_sslam.common.recordings import find_recordings
from modeling_sslam.common.resampling import StreamResampler, resample
from modeling_sslam.common.text import escape_undecodable

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
RATE = 16_000
SAMPLES = (0.3 * np.sin(np.arange(2 * RATE) / 9)).astype(np.float32)
NOT_SEEKABLE = {"GSM610", "G721_32", "G723_24", "G723_40", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32"}


def pairs():
    """Return every pair of format and codec that libsndfile writes, with the file."""
    written = []
    for file_format in soundfile.available_formats():
        for codec in soundfile.available_subtypes(file_format):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"sound.{file_format.lower()}"
                try:
                    soundfile.write(path, SAMPLES, RATE, format=file_format, subtype=codec)
                except RuntimeError:
                    continue
                if file_format != "RAW":
                    written.append((file_format, codec))
    return written


PAIRS = pairs()


def encode(file_format: str, codec: str | None = None, samples=SAMPLES, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=file_format, subtype=codec)
    return file.getvalue()


@pytest.fixture(autouse=True)
def _warn_anew() -> None:
    """Forget which warnings other tests have caused."""
    decoding._warn_once.cache_clear()


def with_bytes(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def whole(audio, rate: int = RATE) -> torch.Tensor:
    return torch.cat([torch.empty(0), *stream_blocks(audio if isinstance(audio, bytes) else str(audio), rate, 0.3)])


def both_ways(tmp_path: Path, data: bytes) -> torch.Tensor:
    """Read a sound by path and by bytes, assert that they agree, and return it."""
    path = tmp_path / "sound"
    path.write_bytes(data)
    by_path, by_bytes = whole(path), whole(data)
    assert_same(by_path, by_bytes)
    return by_path


def as_soundfile_reads(data: bytes) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(io.BytesIO(data), dtype="float32")[0])


def assert_same(waveform: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare up to the last bit, which can differ between two calls of libsndfile's MP3 decoder."""
    torch.testing.assert_close(waveform, expected, rtol=0, atol=1e-7)


def correlation(one, other) -> float:
    n = min(len(one), len(other))
    return float(np.corrcoef(np.asarray(one[:n]), np.asarray(other[:n]))[0, 1])


# A1: every codec, by every route


def test_there_are_as_many_pairs_as_libsndfile_writes():
    assert len(PAIRS) >= 131


@pytest.mark.parametrize(("file_format", "codec"), PAIRS, ids=lambda value: value)
def test_every_format_and_codec_is_decoded(tmp_path, file_format, codec):
    path = tmp_path / f"sound.{file_format.lower()}"
    soundfile.write(path, SAMPLES, RATE, format=file_format, subtype=codec)
    rate = soundfile.info(path).samplerate  # VOC of 8 bits holds rates of 1e6 / n Hz alone
    waveform = whole(path, rate)
    # Codecs with blocks of fixed size fill up their last block.
    assert len(SAMPLES) <= len(waveform) <= len(SAMPLES) + 600
    error = np.abs(waveform[: len(SAMPLES)].numpy() - SAMPLES)
    # libsndfile's SDS is lossless for 16 bits alone, also in its own reader.
    exact = codec in {"PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "DWVW_16", "DWVW_24", "ALAC_16", "DPCM_16"}
    if exact and (file_format, codec) != ("SDS", "PCM_24"):
        assert error.max() <= 1 / 32_000
    elif codec in {"PCM_S8", "PCM_U8", "ULAW", "ALAW"} and file_format not in ("SDS", "VOC"):
        assert error.max() <= 1 / 64
    elif file_format != "SDS":
        # The other codecs delay the sound by up to a few hundred samples.
        shifts = [correlation(waveform[shift : shift + 4000], SAMPLES[:4000]) for shift in range(600)]
        assert max(shifts) > 0.97
    assert torch.equal(read_waveform(str(path), rate, 10**6), waveform)
    crop = read_waveform(str(path), rate, 8000, position=0.5)
    assert len(crop) == 8000
    if codec in NOT_SEEKABLE or codec.startswith("DWVW"):
        start = int(0.5 * (len(waveform) - 8000 + 1))
        assert torch.equal(crop, waveform[start : start + 8000])
    if file_format != "SD2":  # SD2 has its sampling rate in a second file
        assert torch.equal(whole(path.read_bytes(), rate), waveform)
        assert torch.equal(read_waveform(path.read_bytes(), rate, 8000, position=0.5), crop)


def through_pipe(path: Path, data: bytes) -> threading.Thread:
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(data,), daemon=True)
    writer.start()
    return writer


@pytest.mark.parametrize(
    ("file_format", "codec"),
    [("WAV", "PCM_16"), ("WAV", "GSM610"), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None), ("AIFF", None)],
)
def test_a_pipe_is_read_once(tmp_path, file_format, codec):
    data = encode(file_format, codec)
    writer = through_pipe(tmp_path / "pipe", data)
    assert torch.equal(whole(tmp_path / "pipe"), whole(data))
    writer.join()
    assert duration_seconds(str(tmp_path / "pipe")) is None


def test_a_crop_of_a_pipe(tmp_path):
    data = encode("WAV", "G721_32")
    through_pipe(tmp_path / "pipe", data)
    crop = read_waveform(str(tmp_path / "pipe"), RATE, 8000, position=0.9)
    assert torch.equal(crop, read_waveform(data, RATE, 8000, position=0.9))


def test_devices_are_refused():
    with pytest.raises(ClipError, match="/dev/zero is a device"):
        whole("/dev/zero")


# A2: sampling rates


@pytest.mark.parametrize("rate", [1, 2, 5, 99, 1_000_001, 100_000_000, 2**31 - 1])
def test_absurd_rates_are_refused_by_name(tmp_path, rate):
    data = with_bytes(encode("WAV"), 24, rate.to_bytes(4, "little"))
    path = tmp_path / "sound.wav"
    path.write_bytes(data)
    for audio in (str(path), data):
        for read in (whole, lambda audio: read_waveform(audio, RATE, 10**6, position=0.5)):
            with pytest.raises(ClipError, match=f"unsupported_rate: a sampling rate of {rate} Hz; it must be 100 Hz"):
                read(audio)
    with pytest.raises(ClipError, match="unsupported_rate"):
        list(waveform_blocks({"array": SAMPLES, "sampling_rate": rate}, RATE))


@pytest.mark.parametrize(
    ("rate", "target"),
    [
        *[(rate, RATE) for rate in (100, 101, 127, 1_000, 5_512, 12_345, 44_056, 192_000, 768_000, 1_000_000)],
        *[(7_919, 499), (499, 7_919), (9_973, 1_999), (4_801, 1_600), (1_600, 4_801)],
    ],
)
@pytest.mark.parametrize("max_taps", [resampling.MAX_KERNEL_TAPS, 0])
def test_every_rate_is_resampled_as_by_torchaudio(monkeypatch, rate, target, max_taps):
    """Kernels above `max_taps` are built from their nonzero taps; 0 builds every kernel that way."""
    monkeypatch.setattr(resampling, "MAX_KERNEL_TAPS", max_taps)
    waveform = 0.3 * torch.randn(round(0.3 * rate) + 50)
    expected = torchaudio.functional.resample(waveform, rate, target)
    torch.testing.assert_close(resample(waveform, rate, target), expected, rtol=0, atol=1e-6)
    resampler = StreamResampler(rate, target)
    blocks = [resampler.push(block) for block in waveform.split(len(waveform) // 7 + 1)]
    torch.testing.assert_close(torch.cat([*blocks, resampler.finish()]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [999_983, 500_009, 11_127, 15_991])
def test_a_rate_without_a_common_divisor_stays_in_tune(rate):
    """torchaudio's kernel for 999 983 Hz would take 64 GB."""
    time = torch.arange(rate // 2, dtype=torch.float64) / rate
    waveform = resample((0.5 * torch.sin(2 * torch.pi * 500 * time)).float(), rate, RATE)
    expected = 0.5 * torch.sin(2 * torch.pi * 500 / RATE * torch.arange(RATE // 2))
    torch.testing.assert_close(waveform[100:-100], expected[100 : len(waveform) - 100], rtol=0, atol=4e-3)
    taps = sum(kernel.numel() for _, kernel in resampling._banded_kernels.__wrapped__(rate, RATE, 400))
    assert taps <= 1 << 25


# A3, A4: lengths that headers state


@pytest.mark.parametrize("total", [0, 1000, 10**6, 2**36 - 1])
def test_flac_of_any_stated_length_is_decoded(tmp_path, total):
    data = encode("FLAC")
    field = int.from_bytes(data[18:26], "big") >> 36 << 36 | total
    expected = as_soundfile_reads(data)
    data = with_bytes(data, 18, field.to_bytes(8, "big"))
    assert torch.equal(both_ways(tmp_path, data), expected)
    assert torch.equal(read_waveform(data, RATE, 10**6, position=0.5), expected)
    if total != 1000:
        assert torch.equal(read_waveform(data, RATE, 8000, position=0.5), expected[12_000:20_000])
        assert torch.equal(read_waveform(data, RATE, 8000), expected[:8000])


def test_a_tag_after_flac_is_not_decoded(tmp_path):
    data = encode("FLAC")
    assert_same(both_ways(tmp_path, data + b"TAG" + bytes(125)), as_soundfile_reads(data))


def xing(data: bytes) -> int:
    return max(data.find(b"Xing"), data.find(b"Info"))


@pytest.mark.parametrize("count", [1, 10, 40, 1000, 100_000, 2**31, 2**32 - 1])
def test_mp3_of_any_stated_length_is_decoded(tmp_path, count):
    data = encode("MP3")
    expected = as_soundfile_reads(data)
    lying = with_bytes(data, xing(data) + 8, count.to_bytes(4, "big"))
    waveform = both_ways(tmp_path, lying)
    # The encoder's padding at the end cannot be told from sound.
    assert len(expected) <= len(waveform) <= len(expected) + 4095
    assert_same(waveform[: len(expected)], expected)
    if count > 58:
        assert len(read_waveform(lying, RATE, 8000, position=0.9)) == 8000


def test_a_correct_mp3_is_read_as_libsndfile_reads_it(tmp_path, caplog):
    data = encode("MP3")
    assert_same(both_ways(tmp_path, data), as_soundfile_reads(data))
    assert_same(both_ways(tmp_path, data + b"TAG" + bytes(125)), as_soundfile_reads(data))
    assert not caplog.records


def test_mp3_with_a_variable_bitrate_and_no_count(tmp_path):
    """libsndfile assumes the first frame's bitrate for all frames, and would stop at a fifth of this sound."""
    data = encode("MP3")
    data = with_bytes(data, xing(data), bytes(4))
    waveform = both_ways(tmp_path, data)
    assert len(SAMPLES) <= len(waveform) <= len(SAMPLES) + 3000
    assert 0.15 < waveform[-4000:-2500].abs().max() < 0.35
    assert_same(read_waveform(data, RATE, 10**6, position=0.3), waveform)
    assert len(read_waveform(data, RATE, 8000, position=0.3)) == 8000


def test_a_chain_whose_last_sound_was_cut_short(tmp_path, caplog):
    data = encode("OGG")
    assert_same(both_ways(tmp_path, 2 * data + data[: len(data) // 2]), as_soundfile_reads(data).repeat(2))
    assert "ends without Ogg's end-of-stream mark" in caplog.text


# A5: leading tags


def id3(size: int, flags: int = 0) -> bytes:
    footer = b"3DI\x04\0\0" + bytes(4) if flags & 0x10 else b""
    length = bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127])
    return b"ID3\x04\0" + bytes([flags]) + length + bytes(size) + footer


APE = b"APETAGEX" + (2000).to_bytes(4, "little") + (72).to_bytes(4, "little") + bytes(4) + b"\0\0\0\xa0" + bytes(80)


@pytest.mark.parametrize("file_format", ["WAV", "MP3", "FLAC", "OGG", "AIFF", "AU", "W64", "CAF"])
@pytest.mark.parametrize(
    "tag", [id3(10), id3(3 << 14), id3(100, 0x10), id3(500) + id3(70_000), APE, id3(30) + APE], ids=range(6)
)
def test_sound_after_leading_tags_is_decoded_whole(tmp_path, file_format, tag):
    data = encode(file_format)
    assert_same(both_ways(tmp_path, tag + data), as_soundfile_reads(data))


# A6: chained files


@pytest.mark.parametrize(
    ("file_format", "codec"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", None), ("FLAC", "PCM_24")]
)
def test_all_sounds_of_a_chain_are_heard(tmp_path, file_format, codec):
    parts = [encode(file_format, codec, volume * SAMPLES) for volume in (1.0, 0.5, 0.25)]
    waveform = both_ways(tmp_path, b"".join(parts))
    assert torch.equal(waveform, torch.cat([as_soundfile_reads(part) for part in parts]))
    if file_format == "OGG":
        crop = read_waveform(b"".join(parts), RATE, 4000, position=0.999999)
        assert torch.equal(crop, waveform[-4000:])


def test_a_chain_of_one_sound_twice(tmp_path):
    data = encode("OGG")
    assert_same(both_ways(tmp_path, 2 * data), as_soundfile_reads(data).repeat(2))


def test_a_chain_of_different_rates(tmp_path):
    parts = [encode("OGG", rate=RATE), encode("OGG", samples=np.stack([SAMPLES, SAMPLES], 1), rate=8000)]
    waveform = both_ways(tmp_path, b"".join(parts))
    assert torch.equal(waveform, torch.cat([whole(part) for part in parts]))
    assert len(waveform) == 2 * RATE + 4 * RATE
    with pytest.raises(ClipError, match="chain of sounds at 16000 Hz and 8000 Hz"):
        read_waveform(b"".join(parts), RATE, 4000, position=0.5)


def test_a_chain_of_mp3s(tmp_path):
    parts = [encode("MP3", None, SAMPLES), id3(300), encode("MP3", None, 0.3 * SAMPLES)]
    waveform = both_ways(tmp_path, b"".join(parts))
    assert len(waveform) >= 2 * len(SAMPLES)
    assert_same(waveform[: len(SAMPLES)], as_soundfile_reads(parts[0]))
    assert 0.07 < waveform[-12_000:-8_000].abs().max() < 0.11


# A7: cut files, and sizes that streamers leave open


@pytest.mark.parametrize("file_format", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "SVX", "MP3"])
@pytest.mark.parametrize("by", ["path", "bytes"])
def test_a_cut_file_is_used_with_a_warning(tmp_path, caplog, file_format, by):
    samples = np.tile(SAMPLES, 3)
    data = encode(file_format, "PCM_16" if file_format != "MP3" else None, samples)
    path = tmp_path / "sound"
    path.write_bytes(data[: len(data) // 2])
    audio = str(path) if by == "path" else path.read_bytes()
    waveform = whole(audio)
    expected = as_soundfile_reads(data)
    assert 40_000 < len(waveform) < 60_000
    if file_format != "MP3":
        assert torch.equal(waveform, expected[: len(waveform)])
    read_waveform(audio, RATE, 10**6)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    name = str(path) if by == "path" else f"A sound of {len(audio)} bytes"
    assert record.getMessage() == (
        f"{name} holds {len(waveform) / RATE:.2f} s of the 6.00 s that its header states; what is there is used."
    )


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_a_cut_ogg_is_used_with_a_warning(tmp_path, caplog, codec):
    samples = np.tile(SAMPLES, 20)
    data = encode("OGG", codec, samples)
    assert len(whole(data)) == len(samples)
    assert not caplog.records
    waveform = both_ways(tmp_path, data[: len(data) * 3 // 5])
    assert 0.4 * len(samples) < len(waveform) < 0.7 * len(samples)
    messages = {record.getMessage() for record in caplog.records}
    assert (
        f"{tmp_path / 'sound'} ends without Ogg's end-of-stream mark: it was cut; what is there is used." in messages
    )


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
@pytest.mark.parametrize("silence", [0, 4000])
def test_a_file_of_open_size_is_read_to_its_end(tmp_path, caplog, size, silence):
    samples = np.concatenate([np.zeros(silence, np.float32), SAMPLES])
    for file_format, field, order in (("WAV", 40, "little"), ("AU", 8, "big"), ("RF64", None, "little")):
        data = encode(file_format, "PCM_16", samples)
        expected = as_soundfile_reads(data)
        if file_format == "RF64":
            data = with_bytes(data, 28, (size if size < 2**31 else 2**63).to_bytes(8, order))
        else:
            data = with_bytes(data, field, size.to_bytes(4, order))
        if file_format == "WAV":
            both = with_bytes(data, 4, size.to_bytes(4, "little"))
            assert torch.equal(both_ways(tmp_path, both), expected)
        assert torch.equal(both_ways(tmp_path, data), expected)
        if file_format != "RF64":
            assert not caplog.records


@pytest.mark.parametrize("size", [0, 2**64 - 1, 2**63 - 1])
def test_a_caf_of_open_size_is_read_to_its_end(tmp_path, size):
    data = encode("CAF", "PCM_16")
    expected = as_soundfile_reads(data)
    place = data.find(b"data") + 4
    assert torch.equal(both_ways(tmp_path, with_bytes(data, place, size.to_bytes(8, "big"))), expected)


def test_a_wav_without_samples_but_with_chunks_is_empty():
    data = encode("WAV", "PCM_16", SAMPLES[:0]) + b"LIST\x04\0\0\0INFO" + b"note\x06\0\0\0abcdef"
    with pytest.raises(ClipError, match="empty: the file has no samples"):
        whole(data)


# A8: files that are no sound


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<html><body>Not found</body></html>", "a web page"),
        (b"\n<!DOCTYPE HTML>\xff", "a web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture"),
        (b"PK\x03\x04" + bytes(99), "a ZIP archive"),
        (b"%PDF-1.7\n\xff\xfe", "a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b'{"error": 404}', "text"),
        (bytes(5000), "zeros only"),
    ],
)
@pytest.mark.parametrize("name", ["sound.mp3", "sound.wav", "sound"])
def test_errors_say_what_a_file_is_instead_of_a_sound(tmp_path, monkeypatch, content, what, name):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    path = tmp_path / name
    path.write_bytes(content)
    for audio in (str(path), content):
        for read in (whole, lambda audio: read_waveform(audio, RATE, 10**6)):
            with pytest.raises(ClipError, match=f"undecodable: .*not a sound file but {what}") as caught:
                read(audio)
            assert "pipe" not in str(caught.value)
            assert "torchcodec" not in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b.wav", "."])
def test_paths_that_cannot_be_opened(path):
    with pytest.raises(ClipError, match="missing"):
        whole(path)


# A9, A10, A11: folders


def test_pipes_and_sockets_in_a_folder_are_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "a.wav").touch()
    os.mkfifo(tmp_path / "p.wav")
    os.symlink("/dev/zero", tmp_path / "z.wav")
    os.symlink("nowhere", tmp_path / "broken.wav")
    assert find_recordings([str(tmp_path)]) == [str(tmp_path / "a.wav"), str(tmp_path / "broken.wav")]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith(f"{tmp_path / 'p.wav'} is left out")
    assert messages[1].startswith(f"{tmp_path / 'z.wav'} is left out")


def test_linked_folders_are_searched_once(tmp_path):
    for name in ("s/a.wav", "s/sub/b.wav", "ext/c.wav", "ext/deep/d.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink("../ext", tmp_path / "s" / "linked")
    os.symlink("../ext/deep", tmp_path / "s" / "again")
    os.symlink(".", tmp_path / "s" / "itself")
    os.symlink("../s", tmp_path / "ext" / "back")
    os.symlink("../../s/sub", tmp_path / "ext" / "deep" / "sub")
    os.symlink(".hidden", tmp_path / "s" / ".hidden")
    found = [os.path.relpath(path, tmp_path / "s") for path in find_recordings([str(tmp_path / "s")])]
    assert sorted(os.path.basename(path) for path in found) == ["a.wav", "b.wav", "c.wav", "d.wav"]
    assert found[:2] == ["a.wav", "sub/b.wav"]
    found = find_recordings([str(tmp_path / "s" / "**" / "*.wav")])
    assert sorted(os.path.basename(path) for path in found) == ["a.wav", "b.wav", "c.wav", "d.wav"]


def test_a_linked_folder_as_argument(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.wav").touch()
    os.symlink("real", tmp_path / "link")
    assert find_recordings([str(tmp_path / "link")]) == [str(tmp_path / "link" / "a.wav")]


@pytest.fixture
def run(model_folder, capsys):
    """Run `sslam` and return its exit status, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        status = main([*map(str, arguments), "--model", str(model_folder), "--device", "cpu"])
        return status, *capsys.readouterr()

    return run


def test_file_names_that_are_not_utf8(run, tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9.wav")
    soundfile.write(tmp_path / "x.wav", SAMPLES, RATE)
    path = (tmp_path / "x.wav").rename(tmp_path / name)
    escaped = f"{tmp_path}/caf\\udce9.wav"
    assert escape_undecodable(str(path)) == escaped
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + os.fsencode(path) + b"\n")))
    status, out, err = run("tag", "-", "--format", "json", "--top-k", 1)
    assert (status, err) == (0, "")
    assert [entry["path"] for entry in json.loads(out)] == [escaped]
    out = tmp_path / "events.jams"
    status, _, err = run("timeline", path, "--out", out, tmp_path / "events.rttm", "--plot", tmp_path / "plot.png")
    assert (status, err) == (0, "")
    assert json.loads(out.read_bytes())["file_metadata"]["identifiers"]["path"] == escaped
    assert (tmp_path / "plot.png").stat().st_size


# A12, A13: samples given as arrays


def test_channels_last_is_refused(tagger):
    for samples in (np.stack([SAMPLES, SAMPLES], 1), torch.rand(9000, 6)):
        for audio in (samples, {"array": samples, "sampling_rate": 44_100}):
            with pytest.raises(ClipError, match=r"unsupported_samples: .*Transpose audio that has its channels last"):
                tagger.tag(audio)


@pytest.mark.parametrize("rate", [8000, 8000.0, np.int16(8000), np.float32(8000), torch.tensor(8000), np.array(8000)])
def test_whole_numbers_are_sampling_rates(rate):
    (expected,) = waveform_blocks({"array": SAMPLES, "sampling_rate": 8000}, RATE)
    (waveform,) = waveform_blocks({"array": SAMPLES, "sampling_rate": rate}, RATE)
    assert torch.equal(waveform, expected)


@pytest.mark.parametrize("rate", [None, 0, -1, "16000", 16_000.5, float("nan"), float("inf"), [16_000], b"8000", 1j])
def test_other_values_are_no_sampling_rates(rate):
    with pytest.raises(ClipError, match=r"unsupported_rate: .*sampling.rate"):
        list(waveform_blocks({"array": SAMPLES, "sampling_rate": rate}, RATE))


@pytest.mark.parametrize(
    "form",
    [
        SAMPLES[::-1][::-1],
        SAMPLES.astype(">f4"),
        SAMPLES.astype(">f8"),
        SAMPLES.astype(object),
        np.repeat(SAMPLES, 2)[::2],
        SAMPLES.astype(np.longdouble),
        np.broadcast_to(SAMPLES, (2, len(SAMPLES))),
        np.asfortranarray(np.stack([SAMPLES, SAMPLES])),
        np.frombuffer(SAMPLES.tobytes(), np.float32),
        SAMPLES.tolist(),
        [SAMPLES, SAMPLES],
        torch.tensor(SAMPLES, requires_grad=True),
    ],
    ids=range(12),
)
def test_samples_of_every_layout_are_accepted(form):
    (waveform,) = waveform_blocks(form, RATE)
    torch.testing.assert_close(waveform, torch.from_numpy(SAMPLES), rtol=0, atol=0)


@pytest.mark.parametrize(
    "form",
    [
        np.array(["0.5", "0.1"] * 999),
        np.array([None, 1.0]),
        np.array([SAMPLES, SAMPLES[:9]], dtype=object),
        SAMPLES.astype(complex),
        np.zeros(999, ">i2"),
        np.zeros(999, bool),
        np.float32(3),
        [[0.1], [0.2, 0.3]],
        {"array": "sound.wav", "sampling_rate": RATE},
        {1: 2, "a": 3},
        3,
        None,
    ],
    ids=range(12),
)
def test_unusable_samples_cost_only_themselves(tagger, form):
    refused, heard = tagger.tag_each([form, SAMPLES])
    assert isinstance(refused, ClipError)
    assert refused.reason == "unsupported_samples"
    assert heard == tagger.tag(SAMPLES)


# A14: standard output


def damaged_sds() -> bytes:
    data = bytearray(encode("SDS", "PCM_24"))
    for place in range(200, len(data), 997):
        data[place] ^= 0x55
    return bytes(data)


@pytest.mark.parametrize("command", ["tag", "timeline"])
def test_stdout_holds_the_results_alone(model_folder, tmp_path, command):
    path = tmp_path / "é.sds"
    path.write_bytes(damaged_sds())
    options = ["--format", "jsonl", "--top-k", "1"] if command == "tag" else ["--format", "json"]
    line = [
        sys.executable,
        "-m",
        "modeling_sslam",
        command,
        path,
        *options,
        "--model",
        model_folder,
        "--device",
        "cpu",
    ]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*map(str, line)], capture_output=True, env=environment, check=False, cwd=REPOSITORY)
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert (result["path"] if command == "tag" else result["file_metadata"]["identifiers"]["path"]) == str(path)
    assert b"Error " in done.stderr


# A15: memory


def test_blocks_are_bounded_in_bytes(tmp_path):
    path = tmp_path / "wide.wav"
    with soundfile.SoundFile(path, "w", 48_000, 1024, "PCM_U8") as file:
        for _ in range(4):
            file.write(np.full((12_000, 1024), 0.25, np.float32))
    tracemalloc.start()
    waveform, crop = whole(path), read_waveform(str(path), RATE, 10 * RATE, position=0.5)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3 * decoding.MAX_BLOCK_BYTES
    assert len(waveform) == len(crop) == RATE
    torch.testing.assert_close(waveform[100:-100], torch.full((RATE - 200,), 0.25), rtol=0, atol=0.01)


# All together: one bad file costs only that file


def test_commands_go_on_after_every_kind_of_file(run, tmp_path, caplog):
    folder = tmp_path / "s"
    folder.mkdir()
    soundfile.write(folder / "a.wav", SAMPLES, RATE, subtype="GSM610")
    soundfile.write(folder / "b.wav", SAMPLES[:100], 1)
    (folder / "c.mp3").write_bytes(b"<html>")
    os.mkfifo(folder / "d.wav")
    data = encode("WAV")
    (folder / "e.wav").write_bytes(data[: len(data) // 2])
    data = encode("MP3")
    (folder / "f.mp3").write_bytes(with_bytes(data, xing(data) + 8, (100_000).to_bytes(4, "big")))
    status, out, errors = run("tag", folder, "--top-k", 1)
    assert status == 1
    headings = [line for line in out.splitlines() if not line.startswith(" ")]
    assert headings == [f"{folder}/a.wav  (2.00 s)", f"{folder}/e.wav  (1.00 s)", f"{folder}/f.mp3  (2.02 s)"]
    assert f"{folder}/b.wav: unsupported_rate: a sampling rate of 1 Hz" in errors
    assert f"{folder}/c.mp3: undecodable: " in errors
    warnings = "\n".join(record.getMessage() for record in caplog.records)
    assert f"{folder}/d.wav is left out" in warnings
    assert f"{folder}/e.wav holds 1.00 s of the 2.00 s that its header states" in warnings
    assert f"{folder}/f.mp3 holds 2.02 s of the " in warnings
    assert "2 of 5 files could not be used" in errors
    assert "Traceback" not in errors
