"""Decoding of sound files to float32 channels at the file's own sampling rate.

There are three decoders:

- libsndfile (by soundfile) is tried first. It decodes from bytes or a path and needs no FFmpeg.
- The program `ffmpeg` streams what libsndfile cannot read, such as m4a and webm, from a path.
- torchcodec decodes the same formats, also from bytes. It always decodes the whole file, because for a range it would
  start from the beginning every time.

Every call of a decoder is made within [`decoder_errors`], which turns whatever it raises into [`ClipError`].
"""

import contextlib
import io
import math
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator

import numpy as np
import soundfile
import torch

from .errors import ClipError

# Header of Sun's AU format: magic, offset of the samples, their size, encoding, sampling rate, channels.
AU_HEADER = struct.Struct(">4sIIIII")
# soundfile raises LibsndfileError, a RuntimeError, and for headerless .raw TypeError. torchcodec raises the others.
DECODER_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)


@contextlib.contextmanager
def decoder_errors(decoder: str, refusal: ClipError | None = None) -> Iterator[None]:
    """Turn the errors of a decoder into ClipError "undecodable".

    Args:
        decoder: The decoder's name, for the message.
        refusal: The error of the decoder that was tried before; the message repeats it.
    """
    try:
        yield
    except DECODER_ERRORS as error:
        # The text of a LibsndfileError begins with the address of a buffer, which differs from run to run.
        said = f"{decoder} says: {getattr(error, 'error_string', error)}"
        raise ClipError("undecodable", f"{refusal.detail} {said}" if refusal else said) from error


def decode_blocks(audio: bytes | str, block_seconds: float) -> Iterator[tuple[torch.Tensor, int]]:
    """Decode a file from its beginning to its end, in blocks.

    Args:
        audio: Path of the file, or its encoded bytes.
        block_seconds: Approximate length of a block in seconds.

    Yields:
        Channels of shape `(channels, num_samples)` and their sampling rate in Hz.

    Raises:
        ClipError: If the file is missing, empty or undecodable.
    """
    try:
        file = _open_soundfile(audio)
    except ClipError as refusal:
        yield from _decode_without_libsndfile(audio, block_seconds, refusal)
        return
    with file:
        rate = file.samplerate
        step = max(1, round(block_seconds * rate))
        while True:
            with decoder_errors(f"after {file.tell() / rate:g} s libsndfile"):
                block = _read(file, step)
            if not block.numel():
                return
            yield block, rate


def decode_crop(audio: bytes | str, max_samples: int, sampling_rate: int, position: float) -> tuple[torch.Tensor, int]:
    """Decode one crop of a file. libsndfile reads nothing beyond it.

    Args:
        audio: Path of the file, or its encoded bytes.
        max_samples: Longest crop, in samples at `sampling_rate`.
        sampling_rate: Rate in Hz by which `max_samples` counts.
        position: Place of the crop in a longer file, in [0, 1): 0 is its head.

    Returns:
        Channels of shape `(channels, num_samples)` and their sampling rate in Hz, which is the file's own.

    Raises:
        ClipError: If the file is missing, empty or undecodable.
    """
    try:
        with _open_soundfile(audio) as file, decoder_errors("libsndfile"):
            start, length = _crop(file.frames, file.samplerate, max_samples, sampling_rate, position)
            if start:
                file.seek(start)
            return _read(file, length), file.samplerate
    except ClipError as refusal:
        channels, rate = _decode_with_torchcodec(audio, refusal)
    start, length = _crop(channels.shape[1], rate, max_samples, sampling_rate, position)
    return channels[:, start : start + length], rate


def duration_seconds(audio: bytes | str) -> float | None:
    """Return the length that the header of a sound file states, or `None` where libsndfile cannot tell."""
    try:
        with decoder_errors("libsndfile"):
            info = soundfile.info(_readable(audio))
    except ClipError:
        return None
    return info.frames / info.samplerate


def _crop(num_frames: int, rate: int, max_samples: int, sampling_rate: int, position: float) -> tuple[int, int]:
    """Return the first frame and the number of frames of a crop, at the file's own rate."""
    length = min(num_frames, math.ceil(max_samples * rate / sampling_rate))
    return int(position * (num_frames - length + 1)), length


def _open_soundfile(audio: bytes | str) -> soundfile.SoundFile:
    """Open a file with libsndfile.

    Raises:
        ClipError: "missing" or "empty"; "undecodable" where another decoder may know better.
    """
    if not audio:
        raise ClipError("empty", "the file has no bytes")
    if isinstance(audio, str):
        # soundfile opens one file at a time, under a lock of the whole process. A file that does not open at once,
        # such as a pipe, would hold up all others, so wait for it here, without the lock.
        with contextlib.suppress(OSError):  # soundfile raises what is wrong
            open(audio, "rb").close()
    try:
        with decoder_errors("libsndfile"):
            return soundfile.SoundFile(_readable(audio))
    except ClipError:
        _check_content(audio)
        raise


def _readable(audio: bytes | str) -> io.BytesIO | bytes | str:
    """Return a form of the file that soundfile takes."""
    if isinstance(audio, bytes):
        return io.BytesIO(audio)
    # soundfile cannot encode file names that are not in the system's encoding; Python can.
    return audio if os.name == "nt" else os.fsencode(audio)


def _read(file: soundfile.SoundFile, num_frames: int) -> torch.Tensor:
    return torch.from_numpy(file.read(num_frames, dtype="float32", always_2d=True).T)


def _check_content(audio: bytes | str) -> None:
    """Raise ClipError "missing" or "empty" if there is nothing that any decoder could read."""
    if isinstance(audio, str):
        try:
            with open(audio, "rb") as file:
                if not file.read(1):
                    raise ClipError("empty", "the file has no bytes")
        except OSError as missing:
            raise ClipError("missing", str(missing)) from None


def _decode_without_libsndfile(
    audio: bytes | str, block_seconds: float, refusal: ClipError
) -> Iterator[tuple[torch.Tensor, int]]:
    """Decode in blocks what libsndfile refused."""
    if refusal.reason == "undecodable" and isinstance(audio, str) and shutil.which("ffmpeg"):
        yield from _decode_with_ffmpeg(audio, block_seconds, refusal)
        return
    channels, rate = _decode_with_torchcodec(audio, refusal)
    step = max(1, round(block_seconds * rate))
    for start in range(0, channels.shape[1], step):
        yield channels[:, start : start + step], rate


def _decode_with_torchcodec(audio: bytes | str, refusal: ClipError) -> tuple[torch.Tensor, int]:
    """Decode the whole of a file that libsndfile refused."""
    if refusal.reason != "undecodable":
        raise refusal
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, OSError, RuntimeError):  # the latter two where FFmpeg's libraries are missing
        raise ClipError(
            "undecodable",
            f"{refusal.detail} For m4a, webm and other formats of FFmpeg's, install torchcodec and FFmpeg.",
        ) from None
    with decoder_errors("torchcodec", refusal):
        samples = AudioDecoder(audio).get_all_samples()
    return samples.data, samples.sample_rate


def _decode_with_ffmpeg(path: str, block_seconds: float, refusal: ClipError) -> Iterator[tuple[torch.Tensor, int]]:
    """Decode what libsndfile refused, from a pipe in AU format: big-endian floats after a header."""
    # Only local files are allowed, also for a playlist that names addresses. The prefix file: keeps ffmpeg from
    # reading a file name as an option or a protocol.
    command = ["ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file", "-i", f"file:{path}"]
    command += ["-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages)
        assert process.stdout is not None  # because of PIPE
        try:
            header = process.stdout.read(AU_HEADER.size)
            if len(header) == AU_HEADER.size:
                _, offset, _, _, rate, channels = AU_HEADER.unpack(header)
                process.stdout.read(offset - AU_HEADER.size)
                frame_bytes = 4 * channels
                while data := process.stdout.read(max(1, round(block_seconds * rate)) * frame_bytes):
                    samples = np.frombuffer(data[: len(data) - len(data) % frame_bytes], dtype=">f4")
                    yield torch.from_numpy(samples.astype(np.float32).reshape(-1, channels).T), rate
            if process.wait() != 0:
                messages.seek(0)
                with decoder_errors("ffmpeg", refusal):
                    raise RuntimeError(messages.read(1000).decode(errors="replace").strip())
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
