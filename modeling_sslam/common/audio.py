"""Sound files to waveforms: any container, sampling rate and channel count to mono float32 at the model's rate.

- libsndfile (soundfile) decodes from bytes or a path, so nothing needs a system FFmpeg. What it cannot read (m4a,
  webm) goes to torchcodec where that is installed.
- [`stream_blocks`] goes through a recording of any length in bounded memory. Its blocks joined are the resampled
  whole: the resampler carries its state from block to block. What libsndfile cannot read, the program `ffmpeg`
  streams; torchcodec can only give it whole, since it starts from the beginning for every range that is asked for.
- [`read_waveform`] takes a crop *before* resampling, and libsndfile reads no more than the crop: an hour-long
  recording costs as much as a clip. A resampled crop differs from the crop of a resampled file in its outermost few
  samples.
- A file that cannot give sound raises [`ClipError`], whose `reason` is one word to count by.
"""

import contextlib
import io
import math
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
import torchaudio

from ..feature_extraction_sslam import PEAK_LIMIT
from .errors import ClipError, InferenceError

if TYPE_CHECKING:
    from torchcodec import AudioSamples

# The resampling kernel holds (reduced source rate) x (reduced target rate) taps. 44 100 Hz reduces to 441/160, an odd
# rate such as 11 127 Hz to nothing: that would take gigabytes. Fractions under this bound are within 1e-6 of any rate.
MAX_RESAMPLING_DENOMINATOR = 2000
# Long enough that what each block costs beside its samples does not show, and a few megabytes at any rate.
BLOCK_SECONDS = 20.0
# Magic, offset of the samples, their size, encoding, sampling rate, channels.
AU_HEADER = struct.Struct(">4sIIIII")


def resampling_ratio(orig_freq: int, new_freq: int) -> tuple[int, int]:
    """The two rates without common divisors, or very nearly so where that takes large numbers."""
    ratio = Fraction(orig_freq, new_freq).limit_denominator(MAX_RESAMPLING_DENOMINATOR)
    return ratio.numerator, ratio.denominator


def resample(waveform: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    """`torchaudio.functional.resample` with its defaults, in bounded memory for any pair of rates."""
    return torchaudio.functional.resample(waveform, *resampling_ratio(orig_freq, new_freq))


class StreamResampler:
    """`resample` for a waveform that comes in blocks: the outputs joined are the resampled whole.

    torchaudio's filter turns `orig` samples into `new`, looking `width` samples to either side. What is kept from one
    block to the next are the samples that the next outputs still look at.
    """

    def __init__(self, orig_freq: int, new_freq: int) -> None:
        self.orig, self.new = resampling_ratio(orig_freq, new_freq)
        self._num_samples = self._num_outputs = 0
        if self.orig != self.new:
            # In float32, as the function computes its kernel for float32 samples.
            resampler = torchaudio.transforms.Resample(self.orig, self.new, dtype=torch.float32)
            self._kernel, self._width = resampler.kernel, resampler.width
            self._pending = torch.zeros(self._width)

    def push(self, block: torch.Tensor) -> torch.Tensor:
        """float32 samples `(num_samples,)` to those that they complete, perhaps none."""
        if self.orig == self.new:
            return block
        self._num_samples += len(block)
        self._pending = torch.cat((self._pending, block))
        groups = (len(self._pending) - self._kernel.shape[-1]) // self.orig + 1
        if groups <= 0:
            return block.new_empty(0)
        reach = (groups - 1) * self.orig + self._kernel.shape[-1]
        outputs = torch.nn.functional.conv1d(self._pending[None, None, :reach], self._kernel, stride=self.orig)
        # A copy: a view would keep the whole block alive.
        self._pending = self._pending[groups * self.orig :].clone()
        self._num_outputs += groups * self.new
        return outputs[0].T.reshape(-1)

    def finish(self) -> torch.Tensor:
        """The samples that looked beyond the end."""
        if self.orig == self.new:
            return torch.empty(0)
        total, already = -(-self.new * self._num_samples // self.orig), self._num_outputs
        return self.push(torch.zeros(self._width + self.orig))[: total - already]


def stream_blocks(
    audio: bytes | str, sampling_rate: int, block_seconds: float = BLOCK_SECONDS
) -> Iterator[torch.Tensor]:
    """A sound file from its beginning to its end, in memory that does not grow with its length.

    Args:
        audio: Path of the file, or its encoded bytes.
        sampling_rate: Sampling rate in Hz to return.
        block_seconds: About how much to decode at a time.

    Yields:
        float32 of shape `(num_samples,)`, full scale 1, the mean over the channels. Joined they equal
        [`resample`] of the whole file.

    Raises:
        ClipError: As soon as the file turns out to be missing, empty, undecodable, to have NaN or infinite samples or
            to lie far beyond full scale; blocks may have come before.
    """
    resampler, position = None, 0.0
    for channels, rate in _decode(audio, block_seconds):
        resampler = resampler or StreamResampler(rate, sampling_rate)
        waveform = channels.mean(0)
        _check_samples(waveform, f" in the {len(waveform) / rate:g} s after {position:g} s")
        position += len(waveform) / rate
        block = resampler.push(waveform)
        if len(block):
            yield block
    if resampler is None:
        raise ClipError("empty", "the file has no samples")
    block = resampler.finish()
    if len(block):
        yield block


def waveform_blocks(
    audio: "bytes | str | Path | dict[str, Any] | np.ndarray | torch.Tensor", sampling_rate: int
) -> Iterator[torch.Tensor]:
    """[`stream_blocks`] for a recording in any of the forms that transformers' pipelines take.

    Args:
        audio: A path; encoded bytes; `{"array": samples, "sampling_rate": Hz}` ("raw" will do for "array"); samples
            at `sampling_rate`; or torchcodec's AudioDecoder, as `datasets` gives it. Samples are floats of shape
            `(num_samples,)` or `(channels, num_samples)`.
        sampling_rate: Sampling rate in Hz to return.

    Raises:
        ClipError: See [`stream_blocks`].
        InferenceError: If it is none of these.
    """
    if isinstance(audio, (bytes, str, Path)):
        yield from stream_blocks(audio if isinstance(audio, bytes) else str(audio), sampling_rate)
        return
    rate = sampling_rate
    if hasattr(audio, "get_all_samples"):
        samples = audio.get_all_samples()
        audio, rate = samples.data, samples.sample_rate
    elif isinstance(audio, dict):
        samples = audio.get("raw") if audio.get("array") is None else audio["array"]
        if samples is None or "sampling_rate" not in audio:
            raise InferenceError(f'Audio of keys {sorted(audio)}; pass {{"array": samples, "sampling_rate": Hz}}.')
        audio, rate = samples, audio["sampling_rate"]
    if not isinstance(audio, (np.ndarray, torch.Tensor, list, tuple)):
        raise InferenceError(f"Audio must be a path, bytes, samples or a dictionary, not {type(audio).__name__}.")
    waveform = torch.as_tensor(audio)
    if not waveform.is_floating_point() or waveform.ndim not in (1, 2):
        raise InferenceError(
            f"Samples of {waveform.dtype} and shape {tuple(waveform.shape)}; pass floats in [-1, 1] of shape "
            "(num_samples,) or (channels, num_samples)."
        )
    if not waveform.numel():
        raise ClipError("empty", "the recording has no samples")
    waveform = waveform.detach().float()
    waveform = waveform.mean(0) if waveform.ndim == 2 else waveform
    _check_samples(waveform)
    yield resample(waveform, rate, sampling_rate)


class CountedBlocks:
    """Blocks of samples, and in `num_samples` how many have gone by."""

    def __init__(self, blocks: Iterable[torch.Tensor]) -> None:
        self._blocks = blocks
        self.num_samples = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for block in self._blocks:
            self.num_samples += len(block)
            yield block


def duration_seconds(audio: bytes | str) -> float | None:
    """Length that the head of a sound file states; `None` where libsndfile cannot tell."""
    try:
        info = soundfile.info(_readable(audio))
    except (soundfile.LibsndfileError, TypeError):
        return None
    return info.frames / info.samplerate


def read_waveform(
    audio: bytes | str, sampling_rate: int, max_samples: int, min_samples: int = 1, position: float = 0.0
) -> torch.Tensor:
    """At most `max_samples` of a sound file, as the model takes them.

    Args:
        audio: The encoded file, or its path.
        sampling_rate: Sampling rate in Hz to return.
        max_samples, min_samples: Longest and shortest clip, in samples at `sampling_rate`.
        position: Where in a longer file the crop lies, in [0, 1): 0 is its head.

    Returns:
        float32 of shape `(num_samples,)`, full scale 1, the mean over the channels.

    Raises:
        ClipError: If the file is missing, empty, undecodable, shorter than `min_samples`, has NaN or infinite samples
            or lies far beyond full scale.
    """
    try:
        with _open_soundfile(audio) as file:
            rate = file.samplerate
            start, length = _crop(file.frames, rate, sampling_rate, max_samples, position)
            if start:
                file.seek(start)
            channels = _read(file, length)
    except (soundfile.LibsndfileError, TypeError) as error:
        _check_bytes(audio)
        samples = _decode_with_torchcodec(audio, error)
        channels, rate = samples.data, samples.sample_rate
        start, length = _crop(channels.shape[1], rate, sampling_rate, max_samples, position)
        channels = channels[:, start : start + length]
    if not channels.numel():
        raise ClipError("empty", "the file has no samples")
    waveform = channels.mean(0)
    num_samples = math.ceil(len(waveform) * sampling_rate / rate)
    if num_samples < min_samples:
        raise ClipError(
            "too_short",
            f"{len(waveform) / rate:.3f} s, less than the {min_samples / sampling_rate:.3f} s of one patch",
        )
    _check_samples(waveform)
    return resample(waveform, rate, sampling_rate)[:max_samples]


def _crop(num_frames: int, rate: int, sampling_rate: int, max_samples: int, position: float) -> tuple[int, int]:
    """First frame and number of frames of the crop, at the file's own rate."""
    length = min(num_frames, math.ceil(max_samples * rate / sampling_rate))
    return int(position * (num_frames - length + 1)), length


def _check_samples(waveform: torch.Tensor, where: str = "") -> None:
    if not torch.isfinite(waveform).all():
        raise ClipError("not_finite", f"NaN or infinite samples{where}")
    peak = waveform.abs().max()
    if peak > PEAK_LIMIT:
        raise ClipError(
            "out_of_range",
            f"peak {peak:g}{where} where full scale is 1: integer samples stored as floats; divide them by their full "
            "scale",
        )


def _decode(audio: bytes | str, block_seconds: float) -> Iterator[tuple[torch.Tensor, int]]:
    """Blocks `(channels, num_samples)` with their sampling rate."""
    try:
        file = _open_soundfile(audio)
    except (soundfile.LibsndfileError, TypeError) as error:
        _check_bytes(audio)
        if isinstance(audio, str) and shutil.which("ffmpeg"):
            yield from _decode_with_ffmpeg(audio, block_seconds, error)
            return
        samples = _decode_with_torchcodec(audio, error)
        step = max(1, round(block_seconds * samples.sample_rate))
        for start in range(0, samples.data.shape[1], step):
            yield samples.data[:, start : start + step], samples.sample_rate
        return
    with file:
        step = max(1, round(block_seconds * file.samplerate))
        while True:
            position = file.tell()
            try:
                block = _read(file, step)
            except soundfile.LibsndfileError as error:
                raise ClipError(
                    "undecodable", f"after {position / file.samplerate:g} s libsndfile says: {error.error_string}"
                ) from error
            if not block.numel():
                return
            yield block, file.samplerate


def _open_soundfile(audio: bytes | str) -> soundfile.SoundFile:
    """Raises LibsndfileError, or TypeError for headerless .raw, where another decoder may know better."""
    if not audio:
        raise ClipError("empty", "the file has no bytes")
    if isinstance(audio, str):
        # soundfile opens one file at a time: one that does not open at once, such as a pipe, would hold up all others.
        with contextlib.suppress(OSError):  # soundfile says what is wrong
            open(audio, "rb").close()
    return soundfile.SoundFile(_readable(audio))


def _readable(audio: bytes | str) -> io.BytesIO | bytes | str:
    """What soundfile takes: it cannot encode file names that are not in the system's encoding, as Python can."""
    if isinstance(audio, bytes):
        return io.BytesIO(audio)
    return audio if os.name == "nt" else os.fsencode(audio)


def _read(file: soundfile.SoundFile, num_frames: int) -> torch.Tensor:
    return torch.from_numpy(file.read(num_frames, dtype="float32", always_2d=True).T)


def _check_bytes(audio: bytes | str) -> None:
    """Raises ClipError where there is nothing that any decoder could read."""
    if isinstance(audio, str):
        try:
            with open(audio, "rb") as file:
                if not file.read(1):
                    raise ClipError("empty", "the file has no bytes")
        except OSError as missing:
            raise ClipError("missing", str(missing)) from None


def _decode_with_torchcodec(audio: bytes | str, sndfile_error: Exception) -> "AudioSamples":
    """The whole of what libsndfile refused."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, OSError, RuntimeError):  # as it raises without FFmpeg's libraries
        raise ClipError(
            "undecodable",
            f"{_libsndfile_says(sndfile_error)} For m4a, webm and other formats of FFmpeg's, install torchcodec and "
            "FFmpeg.",
        ) from None
    try:
        return AudioDecoder(audio).get_all_samples()
    except (RuntimeError, ValueError, IndexError) as error:
        raise ClipError("undecodable", f"{_libsndfile_says(sndfile_error)} torchcodec says: {error}") from error


def _decode_with_ffmpeg(
    path: str, block_seconds: float, sndfile_error: Exception
) -> Iterator[tuple[torch.Tensor, int]]:
    """Blocks of what libsndfile refused, read from a pipe in Sun's AU format: big-endian floats after a header."""
    # Local files alone, also where a playlist names addresses; and no file name is an option or a protocol.
    command = ["ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file", "-i", f"file:{path}"]
    command += ["-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints)
        try:
            header = process.stdout.read(AU_HEADER.size)
            if len(header) == AU_HEADER.size:
                _, offset, _, _, rate, channels = AU_HEADER.unpack(header)
                process.stdout.read(offset - AU_HEADER.size)
                size = max(1, round(block_seconds * rate)) * channels * 4
                while data := process.stdout.read(size):
                    samples = np.frombuffer(data[: len(data) // (4 * channels) * 4 * channels], dtype=">f4")
                    yield torch.from_numpy(samples.astype(np.float32).reshape(-1, channels).T), rate
            if process.wait() != 0:
                complaints.seek(0)
                said = complaints.read(1000).decode(errors="replace").strip()
                raise ClipError("undecodable", f"{_libsndfile_says(sndfile_error)} ffmpeg says: {said}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _libsndfile_says(error: Exception) -> str:
    # soundfile's message opens with the address of a buffer, which says nothing and differs from run to run.
    return f"libsndfile says: {getattr(error, 'error_string', error)}"
