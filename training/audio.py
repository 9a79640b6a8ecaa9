"""Sound files to waveforms: any container, sampling rate and channel count to mono float32 at the model's rate.

- libsndfile (soundfile) decodes from bytes or a path, so nothing needs a system FFmpeg. What it cannot read (m4a,
  webm) goes to torchcodec where that is installed.
- A crop is taken *before* resampling, and libsndfile reads no more than the crop: an hour-long recording costs as much
  as a clip. A resampled crop differs from the crop of a resampled file in its outermost few samples.
- A file that cannot give a clip raises [`ClipError`], whose `reason` is one word to count by.
"""

import io
import math
from fractions import Fraction

import soundfile
import torch
import torchaudio

from modeling_sslam.feature_extraction_sslam import PEAK_LIMIT

# The resampling kernel holds (reduced source rate) x (reduced target rate) taps. 44 100 Hz reduces to 441/160, an odd
# rate such as 11 127 Hz to nothing: that would take gigabytes. Fractions under this bound are within 1e-6 of any rate.
MAX_RESAMPLING_DENOMINATOR = 2000


class ClipError(Exception):
    """A clip that cannot be used.

    Args:
        reason: "missing", "empty", "undecodable", "too_short", "not_finite" or "out_of_range".
        detail: What is wrong and, where there is one, the remedy.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def resample(waveform: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    """`torchaudio.functional.resample` with its defaults, in bounded memory for any pair of rates."""
    ratio = Fraction(orig_freq, new_freq).limit_denominator(MAX_RESAMPLING_DENOMINATOR)
    return torchaudio.functional.resample(waveform, ratio.numerator, ratio.denominator)


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
    if not audio:
        raise ClipError("empty", "the file has no bytes")
    try:
        channels, rate = _read_with_soundfile(audio, sampling_rate, max_samples, position)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless .raw
        if isinstance(audio, str):
            try:
                with open(audio, "rb") as file:
                    if not file.read(1):
                        raise ClipError("empty", "the file has no bytes") from None
            except OSError as missing:
                raise ClipError("missing", str(missing)) from None
        channels, rate = _read_with_torchcodec(audio, sampling_rate, max_samples, position, error)
    if not channels.numel():
        raise ClipError("empty", "the file has no samples")
    waveform = channels.mean(0)
    num_samples = math.ceil(len(waveform) * sampling_rate / rate)
    if num_samples < min_samples:
        raise ClipError(
            "too_short",
            f"{len(waveform) / rate:.3f} s, less than the {min_samples / sampling_rate:.3f} s of one patch",
        )
    if not torch.isfinite(waveform).all():
        raise ClipError("not_finite", "NaN or infinite samples")
    if waveform.abs().max() > PEAK_LIMIT:
        raise ClipError(
            "out_of_range",
            f"peak {waveform.abs().max():g} where full scale is 1: integer samples stored as floats; "
            "divide them by their full scale",
        )
    return resample(waveform, rate, sampling_rate)[:max_samples]


def _crop(num_frames: int, rate: int, sampling_rate: int, max_samples: int, position: float) -> tuple[int, int]:
    """First frame and number of frames of the crop, at the file's own rate."""
    length = min(num_frames, math.ceil(max_samples * rate / sampling_rate))
    return int(position * (num_frames - length + 1)), length


def _read_with_soundfile(
    audio: bytes | str, sampling_rate: int, max_samples: int, position: float
) -> tuple[torch.Tensor, int]:
    with soundfile.SoundFile(io.BytesIO(audio) if isinstance(audio, bytes) else audio) as file:
        start, length = _crop(file.frames, file.samplerate, sampling_rate, max_samples, position)
        if start:
            file.seek(start)
        samples = file.read(length, dtype="float32", always_2d=True)
        return torch.from_numpy(samples.T), file.samplerate


def _read_with_torchcodec(
    audio: bytes | str, sampling_rate: int, max_samples: int, position: float, sndfile_error: Exception
) -> tuple[torch.Tensor, int]:
    # soundfile's message opens with the address of a buffer, which says nothing and differs from run to run.
    detail = f"libsndfile says: {getattr(sndfile_error, 'error_string', sndfile_error)}"
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, OSError, RuntimeError):  # as it raises without FFmpeg's libraries
        raise ClipError(
            "undecodable", f"{detail} For m4a, webm and other formats of FFmpeg's, install torchcodec and FFmpeg."
        ) from None

    try:
        samples = AudioDecoder(audio).get_all_samples()
    except (RuntimeError, ValueError, IndexError) as error:
        raise ClipError("undecodable", f"{detail} torchcodec says: {error}") from error
    start, length = _crop(samples.data.shape[1], samples.sample_rate, sampling_rate, max_samples, position)
    return samples.data[:, start : start + length], samples.sample_rate
