"""Sound files to waveforms: any container, sampling rate and channel count to mono float32 at the model's rate.

- [`stream_blocks`] reads a recording of any length in bounded memory. Its blocks joined equal the resampled whole.
  (Files that only torchcodec can read are decoded whole.)
- [`waveform_blocks`] does the same for every form of audio that transformers' pipelines take.
- [`read_waveform`] crops before it resamples, so an hour-long recording costs as much as a clip. The outermost few
  samples of a resampled crop differ from the crop of a resampled file.

Files are read at sampling rates of 100 Hz to 1 MHz and resampled as by `torchaudio.functional.resample`. A file that
ends before its header says is used as far as it goes, and a warning is logged.

A file that cannot be used raises [`ClipError`], whose `reason` is one word to count by.
"""

import math
import numbers
import operator
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..feature_extraction_sslam import PEAK_LIMIT
from .decoding import check_sampling_rate, decode_blocks, decode_crop, decoder_errors
from .errors import ClipError
from .resampling import StreamResampler, resample

# Long enough that the cost per block is negligible, and a few megabytes at any rate.
BLOCK_SECONDS = 20.0


def stream_blocks(
    audio: bytes | str, sampling_rate: int, block_seconds: float = BLOCK_SECONDS
) -> Iterator[torch.Tensor]:
    """Read a sound file from its beginning to its end, in memory that does not grow with its length.

    Args:
        audio: Path of the file, or its encoded bytes.
        sampling_rate: Sampling rate in Hz to return.
        block_seconds: Approximate length in seconds to decode at a time.

    Yields:
        float32 of shape `(num_samples,)`, full scale 1, the mean over the channels. Joined they equal
        [`resample`] of the whole file.

    Raises:
        ClipError: If the file is missing, empty or undecodable, has an unsupported sampling rate, NaN or infinite
            samples or lies far beyond full scale. It is raised where the fault is found; blocks may have come before.
    """
    resampler, resampled_rate, position = None, 0, 0.0
    for channels, rate in decode_blocks(audio, block_seconds):
        if resampler is not None and rate != resampled_rate:  # the next sound of a chained file
            block = resampler.finish()
            if len(block):
                yield block
            resampler = None
        if resampler is None:
            resampler, resampled_rate = StreamResampler(rate, sampling_rate), rate
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
    audio: bytes | str | Path | dict[str, Any] | np.ndarray | torch.Tensor, sampling_rate: int
) -> Iterator[torch.Tensor]:
    """Read a recording in any of the forms that transformers' pipelines take; see [`stream_blocks`].

    Args:
        audio: A path; encoded bytes; `{"array": samples, "sampling_rate": Hz}` (or "raw" for "array"); samples
            at `sampling_rate`; or torchcodec's AudioDecoder, as `datasets` returns it. Samples are floats of shape
            `(num_samples,)` or `(channels, num_samples)`.
        sampling_rate: Sampling rate in Hz to return.

    Yields:
        float32 of shape `(num_samples,)`, full scale 1, the mean over the channels.

    Raises:
        ClipError: See [`stream_blocks`]; "unsupported_samples" if `audio` has none of these forms.
    """
    if isinstance(audio, (bytes, str, Path)):
        yield from stream_blocks(audio if isinstance(audio, bytes) else str(audio), sampling_rate)
        return
    samples, rate = _samples_and_rate(audio, sampling_rate)
    waveform = _as_waveform(samples)
    _check_samples(waveform)
    yield resample(waveform, _as_rate(rate), sampling_rate)


def read_waveform(
    audio: bytes | str, sampling_rate: int, max_samples: int, min_samples: int = 1, position: float = 0.0
) -> torch.Tensor:
    """Read at most `max_samples` of a sound file, as the model takes them.

    Args:
        audio: Path of the file, or its encoded bytes.
        sampling_rate: Sampling rate in Hz to return.
        max_samples: Longest clip, in samples at `sampling_rate`.
        min_samples: Shortest clip, in samples at `sampling_rate`.
        position: Place of the crop in a longer file, in [0, 1): 0 is its head.

    Returns:
        float32 of shape `(num_samples,)`, full scale 1, the mean over the channels.

    Raises:
        ClipError: If the file is missing, empty, undecodable, shorter than `min_samples`, has an unsupported sampling
            rate, NaN or infinite samples or lies far beyond full scale.
    """
    waveform, rate = decode_crop(audio, max_samples, sampling_rate, position)
    if not waveform.numel():
        raise ClipError("empty", "the file has no samples")
    num_samples = math.ceil(len(waveform) * sampling_rate / rate)
    if num_samples < min_samples:
        raise ClipError(
            "too_short",
            f"{len(waveform) / rate:.3f} s, less than the {min_samples / sampling_rate:.3f} s of one patch",
        )
    _check_samples(waveform)
    return resample(waveform, rate, sampling_rate)[:max_samples]


class CountedBlocks:
    """Iterate blocks of samples and count the samples in `num_samples`."""

    def __init__(self, blocks: Iterable[torch.Tensor]) -> None:
        self._blocks = blocks
        self.num_samples = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for block in self._blocks:
            self.num_samples += len(block)
            yield block


def _samples_and_rate(audio: Any, sampling_rate: int) -> tuple[Any, Any]:
    """Return the samples of a recording that is no file, and their sampling rate in Hz."""
    if hasattr(audio, "get_all_samples"):  # torchcodec's AudioDecoder
        with decoder_errors("torchcodec"):
            decoded = audio.get_all_samples()
        return decoded.data, decoded.sample_rate
    if isinstance(audio, dict):
        samples = audio.get("raw") if audio.get("array") is None else audio["array"]
        if samples is None or "sampling_rate" not in audio:
            raise ClipError(
                "unsupported_samples", f'audio of keys {list(audio)}; pass {{"array": samples, "sampling_rate": Hz}}'
            )
        return samples, audio["sampling_rate"]
    return audio, sampling_rate


def _as_rate(rate: Any) -> int:
    """Return a sampling rate as an integer, from any type of number."""
    try:
        is_whole = isinstance(rate, numbers.Real) and float(rate).is_integer()
        integer = int(float(rate)) if is_whole else operator.index(rate)
    except (TypeError, ValueError, OverflowError):
        raise ClipError("unsupported_rate", f"sampling_rate={rate!r}; pass a whole number of Hz") from None
    check_sampling_rate(integer)
    return integer


def _as_waveform(samples: Any) -> torch.Tensor:
    """Return samples as float32 `(num_samples,)`, the mean over the channels.

    Arrays of any byte order, memory layout or float type are accepted, also arrays of Python's numbers.
    """
    if not isinstance(samples, (np.ndarray, torch.Tensor, list, tuple)):
        raise ClipError(
            "unsupported_samples",
            f"audio must be a path, bytes, samples or a dictionary, not {type(samples).__name__}",
        )
    try:
        if isinstance(samples, np.ndarray) and samples.dtype == object:
            samples = samples.tolist()
        if isinstance(samples, np.ndarray) and np.issubdtype(samples.dtype, np.floating):
            samples = np.require(samples, np.float32, ("C", "W"))
        waveform = torch.as_tensor(samples)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ClipError("unsupported_samples", f"not an array of numbers: {error}") from error
    if not waveform.is_floating_point() or waveform.ndim not in (1, 2):
        raise ClipError(
            "unsupported_samples",
            f"samples of {waveform.dtype} and shape {tuple(waveform.shape)}; pass floats in [-1, 1] of shape "
            "(num_samples,) or (channels, num_samples)",
        )
    if not waveform.numel():
        raise ClipError("empty", "the recording has no samples")
    if waveform.ndim == 2 and len(waveform) > waveform.shape[1]:
        raise ClipError(
            "unsupported_samples",
            f"samples of shape {tuple(waveform.shape)}; pass (num_samples,) or (channels, num_samples). Transpose "
            "audio that has its channels last.",
        )
    waveform = waveform.detach().float()
    return waveform.mean(0) if waveform.ndim == 2 else waveform


def _check_samples(waveform: torch.Tensor, where: str = "") -> None:
    """Raise ClipError "not_finite" or "out_of_range" for samples that the model cannot take."""
    if not torch.isfinite(waveform).all():
        raise ClipError("not_finite", f"NaN or infinite samples{where}")
    peak = waveform.abs().max()
    if peak > PEAK_LIMIT:
        raise ClipError(
            "out_of_range",
            f"peak {peak:g}{where} where full scale is 1: integer samples stored as floats; divide them by their full "
            "scale",
        )
