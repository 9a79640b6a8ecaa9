"""Signal processing of scenes: levels, active parts, pitch and tempo, reverberation, loops.

Waveforms are NumPy arrays of shape `(num_samples,)`, full scale 1. Levels are root mean squares (RMS).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import torch
import torchaudio

# Length of the frames whose levels tell sound from silence.
FRAME_SECONDS = 0.02
# A pitch ratio is rounded to a fraction with a denominator of at most this, which keeps the resampling filter small.
# The error is at most 14 cents.
MAX_PITCH_DENOMINATOR = 64
# Length of the phase vocoder's window, rounded to a power of two of samples. Four windows overlap.
VOCODER_SECONDS, VOCODER_OVERLAP = 0.064, 4
# Longest crossfade between two rounds of a loop, and its longest share of the looped recording.
CROSSFADE_SECONDS, CROSSFADE_SHARE = 0.5, 0.25


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: on some processors, the last bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rms(waveform: np.ndarray) -> float:
    """Return the root mean square of a waveform."""
    return math.sqrt(np.mean(np.square(waveform, dtype=np.float64)))


def active_frames(waveform: np.ndarray, rate: int, below_peak: float, floor: float = -math.inf) -> np.ndarray:
    """Return the indices of the frames of [`FRAME_SECONDS`] that are not silent.

    Args:
        waveform: The waveform.
        rate: Sampling rate in Hz.
        below_peak: A frame is silent if its RMS is more than this many dB below that of the loudest frame.
        floor: All frames are silent if the RMS of the loudest one is below this level in dB of full scale.
    """
    size = frame_samples(rate)
    num_frames = math.ceil(len(waveform) / size)
    frames = np.zeros((num_frames, size), np.float32)
    frames.reshape(-1)[: len(waveform)] = waveform
    energy = np.square(frames).sum(1)
    loudest = energy.max(initial=0.0)
    if loudest < size * 10 ** (floor / 10):
        return np.array([], int)
    return np.flatnonzero((energy >= loudest * 10 ** (-below_peak / 10)) & (energy > 0))


def frame_samples(rate: int) -> int:
    """Return the length of a frame in samples."""
    return max(1, round(FRAME_SECONDS * rate))


def pitch_ratio(semitones: float) -> Fraction:
    """Return the frequency ratio of a pitch shift, rounded to a denominator of [`MAX_PITCH_DENOMINATOR`]."""
    return Fraction(2 ** (semitones / 12)).limit_denominator(MAX_PITCH_DENOMINATOR)


def shift_and_stretch(waveform: np.ndarray, rate: int, pitch: Fraction, stretch: float) -> np.ndarray:
    """Shift the pitch and change the duration, by torchaudio's phase vocoder and resampling.

    Args:
        waveform: float32 of shape `(num_samples,)`.
        rate: Sampling rate in Hz.
        pitch: Ratio of the new frequencies to the old ones.
        stretch: Ratio of the new duration to the old one.

    Returns:
        float32 of about `stretch * num_samples` samples. Sounds of two samples or less are not stretched.
    """
    result = torch.from_numpy(waveform)
    # Resampling shortens the sound by the pitch ratio, so the vocoder lengthens it by as much more.
    factor = float(pitch) * stretch
    # The window of a short sound is the shortest power of two that holds the sound.
    size = min(1 << round(math.log2(VOCODER_SECONDS * rate)), 1 << (len(result) - 1).bit_length())
    if factor != 1 and size >= VOCODER_OVERLAP:
        hop, window = size // VOCODER_OVERLAP, torch.hann_window(size)
        spectrum = torch.stft(result, size, hop, window=window, return_complex=True)
        advance = torch.linspace(0, math.pi * hop, size // 2 + 1)[:, None]
        spectrum = torchaudio.functional.phase_vocoder(spectrum, 1 / factor, advance)
        result = torch.istft(spectrum, size, hop, window=window, length=round(len(result) * factor))
    if pitch != 1:
        result = torchaudio.functional.resample(result, pitch.numerator, pitch.denominator)
    return result.numpy()


def reverberate(waveform: np.ndarray, impulse_response: np.ndarray) -> np.ndarray:
    """Convolve a waveform with the impulse response of a room.

    The response's largest sample, the direct sound, becomes its beginning, so that the sound does not move.

    Returns:
        float32 of shape `(num_samples + len(response) - 1,)`, with the response from its largest sample on.
    """
    response = impulse_response[np.abs(impulse_response).argmax() :]
    return torchaudio.functional.fftconvolve(torch.from_numpy(waveform), torch.from_numpy(response)).numpy()


def loop(waveform: np.ndarray, num_samples: int, start: float, rate: int) -> np.ndarray:
    """Cut `num_samples` out of a recording. A shorter recording is repeated, with crossfades of constant power.

    Args:
        waveform: The recording.
        num_samples: Length of the result.
        start: Place of the cut in [0, 1): among all possible ones, or in a round of the loop.
        rate: Sampling rate in Hz.
    """
    length = len(waveform)
    if length >= num_samples:
        first = int(start * (length - num_samples + 1))
        return waveform[first : first + num_samples]
    fade = min(round(CROSSFADE_SECONDS * rate), int(CROSSFADE_SHARE * length))
    period = waveform[: length - fade].copy()
    angle = np.linspace(0, math.pi / 2, fade + 2, dtype=waveform.dtype)[1:-1]
    period[:fade] = period[:fade] * np.sin(angle) + waveform[length - fade :] * np.cos(angle)
    return np.take(period, np.arange(num_samples) + int(start * len(period)), mode="wrap")


def fade_edges(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    """Fade a waveform in and out by linear ramps of `num_samples`."""
    ramp = np.minimum(1.0, np.arange(1, len(waveform) + 1) / max(1, num_samples))
    return waveform * (ramp * ramp[::-1])
