"""Decoding of sound files to float32 channels at the file's own sampling rate.

There are three decoders:

- libsndfile (by soundfile) is tried first. It decodes from bytes or a path and needs no FFmpeg.
- The program `ffmpeg` streams formats that libsndfile cannot read, such as m4a and webm, from a path.
- torchcodec decodes the same formats, also from bytes. It always decodes the whole file, because for a range it would
  start from the beginning every time.

libsndfile reads through views that correct misleading headers (see [`containers`]), from the beginning to the end, and
the length of a sound is the number of samples that were decoded. Every call of a decoder is made within
[`decoder_errors`], which turns all its errors into [`ClipError`].
"""

import contextlib
import functools
import io
import logging
import math
import os
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import soundfile
import torch

from .containers import Link, find_links
from .errors import ClipError
from .text import escape_controls

logger = logging.getLogger(__name__)

# Accepted sampling rates in Hz, from seismic sensors to ultrasound. Other rates come from damaged headers.
MIN_SAMPLING_RATE, MAX_SAMPLING_RATE = 100, 1_000_000
# Largest block to decode at a time: 87 s of stereo at 48 kHz, 0.17 s of 1024 channels.
MAX_BLOCK_BYTES = 1 << 25
# Headers that state this many frames or more, 50 days at 16 kHz, state no length. libsndfile reports 2 ** 63 - 1 then.
MAX_STATED_FRAMES = 1 << 36
# A file that ends at most this much before its stated end was not cut; its writer counted otherwise.
MIN_MISSING_SECONDS = 0.01
# Header of Sun's AU format: magic, offset of the samples, their size, encoding, sampling rate, channels.
AU_HEADER = struct.Struct(">4sIIIII")
# First bytes of files that are often found under a sound file's name.
NO_SOUND = {
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself by `git lfs pull`",
}


@contextlib.contextmanager
def decoder_errors(decoder: str, refusal: ClipError | None = None) -> Iterator[None]:
    """Turn the errors of a decoder into ClipError "undecodable".

    Args:
        decoder: The decoder's name, for the message.
        refusal: The error of the decoder that was tried before; the message repeats it.
    """
    try:
        yield
    except ClipError:
        raise
    # Catch any type: decoders share no class of errors, and one bad file must cost only that file.
    except Exception as error:
        # The text of a LibsndfileError begins with the address of a buffer, which differs from run to run.
        said = f"{decoder} says: {getattr(error, 'error_string', error)}"
        raise ClipError("undecodable", f"{refusal.detail} {said}" if refusal else said) from error


def decode_blocks(audio: bytes | str, block_seconds: float) -> Iterator[tuple[torch.Tensor, int]]:
    """Decode a file from its beginning to its end, in blocks.

    A file that ends before its header says is decoded as far as it goes, and a warning is logged.

    Args:
        audio: Path of the file, or its encoded bytes. A pipe is read once.
        block_seconds: Approximate length of a block in seconds, limited by [`MAX_BLOCK_BYTES`].

    Yields:
        Channels of shape `(channels, num_samples)` and their sampling rate in Hz. The rate can change where one sound
        of a chained file ends and the next begins.

    Raises:
        ClipError: If the file is missing, empty or undecodable, or has an unsupported sampling rate.
    """
    with _open_file(audio) as file:
        first, *others = find_links(file)
        try:
            sound = _open_link(first, audio)
        except ClipError as refusal:
            yield from _decode_without_libsndfile(audio, file, block_seconds, refusal)
            return
        yield from _decode_link(first, sound, audio, block_seconds)
        for link in others:
            try:
                sound = _open_link(link, audio)
            except ClipError:
                if link is not others[-1] or not link.lacks_its_end:
                    raise
                _warn_if_cut(link, audio)  # too little of the sound is left to open
                return
            yield from _decode_link(link, sound, audio, block_seconds)


def decode_crop(audio: bytes | str, max_samples: int, sampling_rate: int, position: float) -> tuple[torch.Tensor, int]:
    """Decode one crop of a file, mixed down. libsndfile reads nothing beyond it if the file can seek.

    Args:
        audio: Path of the file, or its encoded bytes. A pipe is read once.
        max_samples: Longest crop, in samples at `sampling_rate`.
        sampling_rate: Rate in Hz by which `max_samples` counts.
        position: Place of the crop in a longer file, in [0, 1): 0 is its head.

    Returns:
        The mean over the channels, of shape `(num_samples,)`, and its sampling rate in Hz, which is the file's own.

    Raises:
        ClipError: If the file is missing, empty or undecodable, has an unsupported sampling rate, or is a chain of
            sounds of different rates.
    """
    with _open_file(audio) as file:
        try:
            links = find_links(file)
            crop = None
            if len(links) == 1:
                crop = _seek_crop(links[0], audio, max_samples, sampling_rate, position)
            return crop or _counted_crop(links, audio, max_samples, sampling_rate, position)
        except ClipError as refusal:
            channels, rate = _decode_with_torchcodec(audio, file, refusal)
    start, length = _crop(channels.shape[1], rate, max_samples, sampling_rate, position)
    return channels[:, start : start + length].mean(0), rate


def duration_seconds(audio: bytes | str) -> float | None:
    """Return the length that the header of a sound file states, or `None` where libsndfile cannot tell.

    The header can be wrong; only decoding tells the true length. A pipe is not opened.
    """
    if isinstance(audio, str) and not os.path.isfile(audio):
        return None
    seconds = 0.0
    try:
        with _open_file(audio) as file:
            for link in find_links(file):
                with _open_link(link, audio) as sound:
                    if sound.frames >= MAX_STATED_FRAMES:
                        return None
                    seconds += sound.frames / sound.samplerate
    except ClipError:
        return None
    return seconds


def check_sampling_rate(rate: int) -> None:
    """Raise ClipError "unsupported_rate" for a sampling rate in Hz at which no sound is recorded."""
    if not MIN_SAMPLING_RATE <= rate <= MAX_SAMPLING_RATE:
        raise ClipError(
            "unsupported_rate",
            f"a sampling rate of {rate} Hz; it must be {MIN_SAMPLING_RATE} Hz to {MAX_SAMPLING_RATE} Hz",
        )


class _SequentialSoundFile(soundfile.SoundFile):
    """A sound file that is read from its beginning to its end.

    soundfile seeks before and after every read of a file that libsndfile calls seekable, which fails for some codecs,
    and reads no more frames than the header states.
    """

    def seekable(self) -> bool:
        return False

    @property
    def can_seek(self) -> bool:
        """Whether libsndfile calls the file seekable."""
        return super().seekable()


@contextlib.contextmanager
def _open_file(audio: bytes | str) -> Iterator[BinaryIO]:
    """Open a file, or the whole content of a pipe or socket, so that it can seek.

    Raises:
        ClipError: "missing", "empty", or "undecodable" for a device.
    """
    with contextlib.ExitStack() as stack:
        file: BinaryIO
        if isinstance(audio, bytes):
            file = io.BytesIO(audio)
        else:
            try:
                if not os.path.isfile(audio) and _is_device(audio):
                    raise ClipError("undecodable", f"{escape_controls(audio)} is a device, not a file")
                file = stack.enter_context(open(audio, "rb"))
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    stored = stack.enter_context(tempfile.TemporaryFile())
                    shutil.copyfileobj(file, stored)
                    file = stored
            except (OSError, ValueError) as missing:  # ValueError for a name with NUL
                raise ClipError("missing", str(missing)) from None
        if not file.seek(0, io.SEEK_END):
            raise ClipError("empty", "the file has no bytes")
        yield file


def _is_device(path: str) -> bool:
    mode = os.stat(path).st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _open_link(link: Link, audio: bytes | str) -> _SequentialSoundFile:
    """Open one sound of a file with libsndfile.

    Raises:
        ClipError: "unsupported_rate", or "undecodable" where another decoder may know better.
    """
    try:
        sound = _open_view(link)
    except ClipError as refusal:
        if not isinstance(audio, str) or not os.path.isfile(audio):
            raise _described(refusal, link.head) from refusal.__cause__
        # libsndfile knows some headerless formats by the file's name alone, and SD2 has a second file.
        try:
            sound = _SequentialSoundFile(audio if os.name == "nt" else os.fsencode(audio))
        except (RuntimeError, TypeError):
            raise _described(refusal, link.head) from refusal.__cause__
    try:
        check_sampling_rate(sound.samplerate)
    except ClipError:
        sound.close()
        raise
    return sound


def _open_view(link: Link) -> _SequentialSoundFile:
    try:
        with decoder_errors("libsndfile"):
            return _SequentialSoundFile(link.open())
    except ClipError:
        # A stated length that is shorter than the encoder's delay is refused.
        unbounded = link.open_unbounded()
        if unbounded is None:
            raise
        with decoder_errors("libsndfile"):
            return _SequentialSoundFile(unbounded[0])


def _described(refusal: ClipError, head: bytes) -> ClipError:
    """Return the error of a file that libsndfile refused, with the type that its first bytes show."""
    text = head[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    what = next((what for magic, what in NO_SOUND.items() if head.startswith(magic)), None)
    if what is None and text.startswith((b"<!doctype html", b"<html")):
        what = "a web page (HTML)"
    elif what is None and all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        what = "text"
    elif what is None and not head.strip(b"\0"):
        what = "zeros only"
    if what is None:
        return refusal
    return ClipError(
        refusal.reason, f"{refusal.detail.rstrip('.')}: not a sound file but {what}, beginning with {head[:20]!r}."
    )


def _decode_link(
    link: Link, sound: soundfile.SoundFile, audio: bytes | str, block_seconds: float
) -> Iterator[tuple[torch.Tensor, int]]:
    """Decode one sound of a file, opened as `sound`, from its beginning to its end, in blocks; close it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sound)
        rate, slack = sound.samplerate, 0
        stated = sound.frames if sound.frames < MAX_STATED_FRAMES else None
        _warn_if_cut(link, audio, sound)
        unbounded = link.open_unbounded()
        if unbounded is not None:
            view, following = unbounded
            with decoder_errors("libsndfile"):
                sound = stack.enter_context(_SequentialSoundFile(view))
            stated, slack = (None, 0) if following is None else (stated, following)
        num_decoded = 0
        step = _block_frames(block_seconds, rate, sound.channels)
        while num_decoded != stated:
            wanted = step if stated is None else min(step, stated - num_decoded)
            with decoder_errors(f"after {num_decoded / rate:g} s libsndfile"):
                block = _read(sound, wanted)
            if not block.numel():
                break
            num_decoded += block.shape[1]
            yield block, rate
        if stated is None:
            return
        if num_decoded < stated:
            _warn_missing(audio, num_decoded / rate, stated / rate)
            return
        for block in _surplus(sound, step, slack):
            yield block, rate


def _surplus(sound: soundfile.SoundFile, step: int, slack: int) -> Iterator[torch.Tensor]:
    """Decode the sound beyond the length that a header states, if there are more than `slack` frames.

    Bytes that cannot be decoded here are no sound; they can be tags, for example.
    """
    held: list[torch.Tensor] = []
    while True:
        try:
            with decoder_errors("libsndfile"):
                block = _read(sound, step)
        except ClipError:
            return
        if not block.numel():
            return
        held.append(block)
        if sum(block.shape[1] for block in held) > slack:
            yield from held
            held, slack = [], 0


def _seek_crop(
    link: Link, audio: bytes | str, max_samples: int, sampling_rate: int, position: float
) -> tuple[torch.Tensor, int] | None:
    """Decode a crop where the header says it is.

    Returns:
        See [`decode_crop`]; `None` if only counting tells where the crop is, since the file cannot seek or its header
        states a wrong length, none, or one that is shorter than the crop.
    """
    with _open_link(link, audio) as sound, decoder_errors("libsndfile"):
        rate, is_stated = sound.samplerate, sound.frames < MAX_STATED_FRAMES
        if not is_stated and position:
            return None
        start, length = _crop(sound.frames, rate, max_samples, sampling_rate, position)
        if length < _crop_frames(rate, max_samples, sampling_rate):
            return None
        if start:
            try:
                if not sound.can_seek or sound.seek(start) != start:
                    return None
            except RuntimeError:
                return None
        blocks = list(_mixed_down(sound, length))
        num_decoded = sum(map(len, blocks))
        if is_stated and num_decoded < length:
            return None
        _warn_if_cut(link, audio, sound)
        return torch.cat([torch.empty(0), *blocks]), rate


def _counted_crop(
    links: list[Link], audio: bytes | str, max_samples: int, sampling_rate: int, position: float
) -> tuple[torch.Tensor, int]:
    """Decode a crop of a file whose length only decoding tells: to count and, if it is longer, once more to crop."""

    def blocks() -> Iterator[tuple[torch.Tensor, int]]:
        for link in links:
            yield from _decode_link(link, _open_link(link, audio), audio, math.inf)

    rate, num_frames = None, 0
    kept = [torch.empty(0)]
    for block, block_rate in blocks():
        if rate not in (None, block_rate):
            raise ClipError(
                "unsupported_rate", f"the file is a chain of sounds at {rate} Hz and {block_rate} Hz; divide it"
            )
        rate = block_rate
        if num_frames <= _crop_frames(rate, max_samples, sampling_rate):
            kept.append(block.mean(0))
        num_frames += block.shape[1]
    if rate is None:
        return torch.empty(0), sampling_rate
    start, length = _crop(num_frames, rate, max_samples, sampling_rate, position)
    if start == 0:
        return torch.cat(kept)[:length], rate
    kept, first = [torch.empty(0)], 0
    for block, _ in blocks():
        part = block[:, max(0, start - first) : max(0, start + length - first)]
        kept.append(part.mean(0))
        first += block.shape[1]
        if first >= start + length:
            break
    return torch.cat(kept), rate


def _mixed_down(sound: soundfile.SoundFile, num_frames: int) -> Iterator[torch.Tensor]:
    """Read at most `num_frames` frames, and yield the mean over the channels, a block at a time."""
    step = _block_frames(math.inf, sound.samplerate, sound.channels)
    while num_frames > 0:
        block = _read(sound, min(step, num_frames))
        if not block.numel():
            return
        yield block.mean(0)
        num_frames -= block.shape[1]


def _block_frames(seconds: float, rate: int, channels: int) -> int:
    """Return the number of frames in a block."""
    return max(1, min(MAX_BLOCK_BYTES // (4 * channels), round(min(seconds * rate, MAX_BLOCK_BYTES))))


def _crop(num_frames: int, rate: int, max_samples: int, sampling_rate: int, position: float) -> tuple[int, int]:
    """Return the first frame and the number of frames of a crop, at the file's own rate."""
    length = min(num_frames, _crop_frames(rate, max_samples, sampling_rate))
    return int(position * (num_frames - length + 1)), length


def _crop_frames(rate: int, max_samples: int, sampling_rate: int) -> int:
    """Return the largest number of frames in a crop, at the file's own rate."""
    return math.ceil(max_samples * rate / sampling_rate)


def _read(file: soundfile.SoundFile, num_frames: int) -> torch.Tensor:
    return torch.from_numpy(file.read(num_frames, dtype="float32", always_2d=True).T)


def _warn_if_cut(link: Link, audio: bytes | str, sound: soundfile.SoundFile | None = None) -> None:
    """Log a warning if a sound has fewer bytes than its header states, or lacks the mark of its end."""
    if sound is not None and link.stated_share > 1:
        seconds = sound.frames / sound.samplerate
        _warn_missing(audio, seconds, seconds * link.stated_share)
    elif link.lacks_its_end:
        _warn_once(f"{_name(audio)} ends without Ogg's end-of-stream mark: it was cut; what is there is used.")


def _warn_missing(audio: bytes | str, found: float, stated: float) -> None:
    """Log a warning that a file is shorter than its header states; both lengths are in seconds."""
    if stated - found >= MIN_MISSING_SECONDS:
        _warn_once(
            f"{_name(audio)} holds {found:.2f} s of the {stated:.2f} s that its header states; what is there is used."
        )


@functools.lru_cache(maxsize=4096)
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _name(audio: bytes | str) -> str:
    return escape_controls(audio) if isinstance(audio, str) else f"A sound of {len(audio)} bytes"


def _decode_without_libsndfile(
    audio: bytes | str, file: BinaryIO, block_seconds: float, refusal: ClipError
) -> Iterator[tuple[torch.Tensor, int]]:
    """Decode a file that libsndfile refused, in blocks."""
    if refusal.reason == "undecodable" and isinstance(audio, str) and shutil.which("ffmpeg"):
        yield from _decode_with_ffmpeg(audio, file, block_seconds, refusal)
        return
    channels, rate = _decode_with_torchcodec(audio, file, refusal)
    step = _block_frames(block_seconds, rate, len(channels))
    for start in range(0, channels.shape[1], step):
        yield channels[:, start : start + step], rate


def _decode_with_torchcodec(audio: bytes | str, file: BinaryIO, refusal: ClipError) -> tuple[torch.Tensor, int]:
    """Decode the whole of a file that libsndfile refused."""
    if refusal.reason != "undecodable":
        raise refusal
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, OSError, RuntimeError):  # the last two where FFmpeg's libraries are missing
        if "not a sound file" in refusal.detail:
            raise refusal from None
        raise ClipError(
            "undecodable",
            f"{refusal.detail} For m4a, webm and other formats of FFmpeg's, install torchcodec and FFmpeg.",
        ) from None
    with decoder_errors("torchcodec", refusal):
        file.seek(0)
        readable = audio if isinstance(audio, bytes) or os.path.isfile(audio) else file
        samples = AudioDecoder(readable).get_all_samples()
    check_sampling_rate(samples.sample_rate)
    return samples.data, samples.sample_rate


def _decode_with_ffmpeg(
    path: str, file: BinaryIO, block_seconds: float, refusal: ClipError
) -> Iterator[tuple[torch.Tensor, int]]:
    """Decode a file that libsndfile refused. ffmpeg pipes it in AU format: big-endian floats after a header."""
    if not os.path.isfile(path):  # the content of a pipe
        path = f"/dev/fd/{file.fileno()}"
    # Only local files are allowed, also for a playlist that names addresses. The prefix file: keeps ffmpeg from
    # reading a file name as an option or a protocol.
    command = ["ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file", "-i", f"file:{path}"]
    command += ["-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    with tempfile.TemporaryFile() as messages:
        file.seek(0)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, pass_fds=(file.fileno(),))
        assert process.stdout is not None  # because of PIPE
        try:
            header = process.stdout.read(AU_HEADER.size)
            if len(header) == AU_HEADER.size:
                _, offset, _, _, rate, channels = AU_HEADER.unpack(header)
                check_sampling_rate(rate)
                process.stdout.read(offset - AU_HEADER.size)
                frame_bytes = 4 * channels
                while data := process.stdout.read(_block_frames(block_seconds, rate, channels) * frame_bytes):
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
