"""Kaldi's log-mel filter bank in torch alone: a plain reference, and fast versions for CPUs and for other devices.

[`reference_log_mel`] is the definition (as in `torchaudio.compliance.kaldi.fbank`). [`LogMelFilterBank`] computes the
same values in float32 on CPUs. It keeps the order of the published operations, because the logarithm magnifies
rounding differences wherever a mel bin holds little energy. [`transform_frames`] needs few kernels on a GPU, and
torch.compile fuses them further. Its FFT rounds in another order (benchmarks/NOTES.md has the errors).
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

FRAME_LENGTH_MS, FRAME_SHIFT_MS = 25, 10
PREEMPHASIS = 0.97
LOWEST_FREQUENCY = 20.0
LOG_FLOOR = torch.finfo(torch.float32).eps
MEL_BINS_PER_BAND = 16
HUGE_PAGE_BYTES = 1 << 21
# Frames that a CPU transforms at a time: intermediate results fit its cache, and several threads are busy.
FRAMES_AT_A_TIME_ON_CPU = 1024
# Frames that another device transforms at a time: few kernels, and each intermediate result takes 32 MB at most.
FRAMES_AT_A_TIME_ON_DEVICE = 1 << 14


def frame_sizes(sampling_rate: int) -> tuple[int, int, int]:
    """Return the frame length, the frame shift and the FFT length in samples: 400, 160 and 512 at 16 kHz."""
    frame_length = sampling_rate * FRAME_LENGTH_MS // 1000
    return frame_length, sampling_rate * FRAME_SHIFT_MS // 1000, 1 << (frame_length - 1).bit_length()


@lru_cache
@torch.inference_mode(False)  # The cached filters must be usable where a later caller computes gradients.
def mel_filters(num_mel_bins: int, sampling_rate: int, fft_length: int) -> torch.Tensor:
    """Build Kaldi's triangular filters, equally spaced on the mel scale 1127 ln(1 + f / 700) from 20 Hz to Nyquist.

    The filters are computed in float32, as published: a filter between two FFT bins is the small difference of large
    numbers.

    Returns:
        float32 of shape `(fft_length // 2, num_mel_bins)` on the CPU, without the Nyquist bin, which no filter passes.
    """

    def mel(frequency: float) -> float:
        return 1127.0 * math.log(1.0 + frequency / 700.0)

    lowest, highest = mel(LOWEST_FREQUENCY), mel(sampling_rate / 2)
    spacing = (highest - lowest) / (num_mel_bins + 1)
    index = torch.arange(num_mel_bins, dtype=torch.float32, device="cpu")
    left, center, right = (lowest + (index + k) * spacing for k in range(3))
    frequencies = (sampling_rate / fft_length) * torch.arange(fft_length // 2, dtype=torch.float32, device="cpu")
    mels = (1127.0 * (1.0 + frequencies / 700.0).log())[:, None]
    rising, falling = (mels - left) / (center - left), (right - mels) / (right - center)
    return torch.minimum(rising, falling).clamp(min=0.0)


def reference_log_mel(waveforms: torch.Tensor, num_mel_bins: int = 128, sampling_rate: int = 16_000) -> torch.Tensor:
    """Compute the log-mel filter bank step by step, in the waveforms' dtype and without regard to speed.

    Args:
        waveforms: Zero-mean clips of shape `(batch_size, num_samples)` on the CPU.
        num_mel_bins: Mel bins F.
        sampling_rate: Sampling rate in Hz.

    Returns:
        Shape `(batch_size, num_frames, num_mel_bins)`: natural logarithm of the power, at least ln(eps) of float32.
    """
    frame_length, frame_shift, fft_length = frame_sizes(sampling_rate)
    frames = waveforms.unfold(-1, frame_length, frame_shift)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    frames = frames - PREEMPHASIS * previous
    frames = frames * torch.hann_window(frame_length, periodic=False, dtype=waveforms.dtype)
    power = torch.fft.rfft(frames, fft_length)[..., :-1].abs().square()
    mel_energies = power @ mel_filters(num_mel_bins, sampling_rate, fft_length).to(waveforms.dtype)
    return mel_energies.clamp(min=LOG_FLOOR).log()


@torch.no_grad()
def log_mel_spectrogram(waveforms: torch.Tensor, num_mel_bins: int = 128, sampling_rate: int = 16_000) -> torch.Tensor:
    """Compute the log-mel filter bank of zero-mean waveforms: a 25 ms Hann window every 10 ms, whole windows only.

    Args:
        waveforms: float32 of shape `(batch_size, num_samples)`, on any device.
        num_mel_bins: Mel bins F.
        sampling_rate: Sampling rate in Hz.

    Returns:
        float32 of shape `(batch_size, num_frames, num_mel_bins)`: natural logarithm of the power, at least ln(eps).
    """
    if not is_host(waveforms.device):
        return log_mel_in_parts(waveforms, device_constants(num_mel_bins, sampling_rate, waveforms.device))
    frame_length, frame_shift, _ = frame_sizes(sampling_rate)
    frames = waveforms.unfold(-1, frame_length, frame_shift)
    batch_size, num_frames, _ = frames.shape
    max_frames = min(batch_size * num_frames, FRAMES_AT_A_TIME_ON_CPU)
    log_mel = torch.empty(batch_size, num_frames, num_mel_bins, dtype=torch.float32, device="cpu")
    filter_bank = LogMelFilterBank(num_mel_bins, sampling_rate, max_frames)
    clips_per_part = max(1, max_frames // num_frames)
    for part, result in zip(frames.split(clips_per_part), log_mel.split(clips_per_part), strict=True):
        filter_bank(part, result)
    return log_mel


def is_host(device: torch.device) -> bool:
    """Whether a device is the CPU, which has a filter bank of its own."""
    return device.type == "cpu"


class DeviceConstants(NamedTuple):
    """Constants of the filter bank on a device.

    Attributes:
        window: The Hann window without its first sample, which is 0; float32 of shape `(frame_length - 1,)`.
        filters: The mel filters, each row twice, of shape `(fft_length, num_mel_bins)`.
        sizes: See [`frame_sizes`].
    """

    window: torch.Tensor
    filters: torch.Tensor
    sizes: tuple[int, int, int]


def device_constants(num_mel_bins: int, sampling_rate: int, device: torch.device) -> DeviceConstants:
    """Return the constants of a device.

    Where TF32 is allowed, a GPU would round float32 factors to 10 bits. The filters are then in float64.
    """
    may_round = device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return _device_constants(num_mel_bins, sampling_rate, device, torch.float64 if may_round else torch.float32)


@lru_cache
@torch.inference_mode(False)
def _device_constants(
    num_mel_bins: int, sampling_rate: int, device: torch.device, dtype: torch.dtype
) -> DeviceConstants:
    frame_length, _, fft_length = sizes = frame_sizes(sampling_rate)
    window = torch.hann_window(frame_length, periodic=False, dtype=torch.float32, device="cpu")[1:]
    filters = mel_filters(num_mel_bins, sampling_rate, fft_length).repeat_interleave(2, 0)
    return DeviceConstants(window.to(device), filters.to(device, dtype), sizes)


def transform_frames(frames: torch.Tensor, constants: DeviceConstants) -> torch.Tensor:
    """Compute the log-mel values of frames in few kernels; torch.compile fuses all but the FFT and the product.

    Args:
        frames: float32 of shape `(..., frame_length)`.
        constants: See [`device_constants`].

    Returns:
        float32 of shape `(..., num_mel_bins)`.
    """
    centered = frames - frames.mean(-1, keepdim=True)
    # The window is 0 at a frame's first sample. Without that sample the FFT has another phase and the same power.
    windowed = torch.sub(centered[..., 1:], centered[..., :-1], alpha=PREEMPHASIS).mul_(constants.window)
    spectrum = torch.fft.rfft(windowed, constants.sizes[2])
    # Real and imaginary parts have the same weight, so the product also adds their squares up to the power.
    squares = torch.view_as_real(spectrum)[..., :-1, :].flatten(-2).square()
    with torch.autocast(frames.device.type, enabled=False):
        mel_energies = (squares.to(constants.filters.dtype) @ constants.filters).float()
    return mel_energies.clamp_(min=LOG_FLOOR).log_()


def log_mel_in_parts(waveforms: torch.Tensor, constants: DeviceConstants) -> torch.Tensor:
    """Apply [`transform_frames`] to waveforms, in parts that bound the memory of intermediate results.

    A compiled graph computes all frames together, because it has fewer and smaller intermediate results.

    Args:
        waveforms: float32 of shape `(batch_size, num_samples)`.
        constants: See [`device_constants`].

    Returns:
        float32 of shape `(batch_size, num_frames, num_mel_bins)`.
    """
    frame_length, frame_shift, _ = constants.sizes
    frames = waveforms.unfold(-1, frame_length, frame_shift)
    batch_size, num_frames, _ = frames.shape
    if torch.compiler.is_compiling() or batch_size * num_frames <= FRAMES_AT_A_TIME_ON_DEVICE:
        return transform_frames(frames, constants)
    log_mel = waveforms.new_empty(batch_size, num_frames, constants.filters.shape[1])
    clips = max(1, FRAMES_AT_A_TIME_ON_DEVICE // num_frames)
    for some_frames, results in zip(frames.split(clips), log_mel.split(clips), strict=True):
        blocks = some_frames.split(FRAMES_AT_A_TIME_ON_DEVICE, 1)
        for block, result in zip(blocks, results.split(FRAMES_AT_A_TIME_ON_DEVICE, 1), strict=True):
            result.copy_(transform_frames(block, constants))
    return log_mel


def allocate(shape: tuple[int, ...]) -> torch.Tensor:
    """Allocate float32 memory on the CPU, without setting its values, on huge pages if it is large.

    numpy asks Linux for huge pages, torch does not. The system zeroes each page on first touch, which with small pages
    takes a sixth of the front end's time.
    """
    memory = np.empty(shape, dtype=np.float32)
    # Touch each huge page once from one thread. Otherwise several threads fault on one page and each zeroes a copy.
    memory.reshape(-1)[:: HUGE_PAGE_BYTES // memory.itemsize] = 0
    return torch.from_numpy(memory)


class _Band(NamedTuple):
    """Neighbouring mel filters, restricted to the columns of the spectrum where they are not zero."""

    columns: slice
    mel_bins: slice
    weights: torch.Tensor


@lru_cache
def _filter_bands(num_mel_bins: int, sampling_rate: int, fft_length: int) -> list[_Band]:
    """Split the filters into bands of neighbouring mel bins.

    A band reads a narrow range of the spectrum; most of the whole matrix is zeros that need no multiplication. An FFT
    bin is two columns, the squares of its real and its imaginary part. Both have the same weight, so the product with
    the weights also adds the squares up to the power.
    """
    filters = mel_filters(num_mel_bins, sampling_rate, fft_length)
    bands = []
    for start in range(0, num_mel_bins, MEL_BINS_PER_BAND):
        mel_bins = slice(start, start + MEL_BINS_PER_BAND)
        passed = filters[:, mel_bins].any(1).nonzero().flatten().tolist() or [0]
        first, last = passed[0], passed[-1] + 1
        weights = filters[first:last, mel_bins].repeat_interleave(2, 0)
        bands.append(_Band(slice(2 * first, 2 * last), mel_bins, weights))
    return bands


class _BlockViews(NamedTuple):
    """Views of the scratch memory for a block of one size, named as in `LogMelFilterBank._transform`."""

    centered: torch.Tensor
    scaled: torch.Tensor
    samples: torch.Tensor
    scaled_previous: torch.Tensor
    windowed: torch.Tensor
    padded: torch.Tensor
    mel: torch.Tensor
    products: list[tuple[slice, torch.Tensor, torch.Tensor]]


class LogMelFilterBank:
    """The filter bank on CPUs, with its constants and the scratch memory that all blocks of frames share.

    The scratch memory is small enough to stay in cache.

    Args:
        num_mel_bins: Mel bins F.
        sampling_rate: Sampling rate in Hz.
        max_frames: Frames of a block, counted over clips.
        mean: Subtracted from the logarithm.
        scale: Divides the difference. Normalising here saves a pass over the results after they have left the cache.
    """

    def __init__(
        self, num_mel_bins: int, sampling_rate: int, max_frames: int, mean: float = 0.0, scale: float = 1.0
    ) -> None:
        frame_length, _, fft_length = frame_sizes(sampling_rate)
        factory: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        self.max_frames = max_frames
        self._frame_length = frame_length
        self._window = torch.hann_window(frame_length, periodic=False, **factory)
        # Tensors, because torch makes a tensor of a Python number at every call.
        self._preemphasis = torch.tensor(PREEMPHASIS, **factory)
        self._offset = torch.tensor(-mean / scale, **factory)
        self._inverse_scale = 1 / scale
        self._bands = _filter_bands(num_mel_bins, sampling_rate, fft_length)
        widths = (frame_length, frame_length, fft_length, num_mel_bins)
        scratch = allocate((max_frames * sum(widths),))  # in one piece, which is large enough for huge pages
        self._centered, self._scaled, self._padded, self._mel = (
            part.view(max_frames, width)
            for part, width in zip(scratch.split([max_frames * width for width in widths]), widths, strict=True)
        )
        self._padded[:, frame_length:].zero_()
        # Nearly all blocks have the same size, and making views takes time.
        self._views: dict[tuple[int, int], _BlockViews] = {}

    def __call__(self, frames: torch.Tensor, outputs: torch.Tensor) -> None:
        """Fill `outputs` with `(log_mel - mean) / scale`.

        Args:
            frames: float32 frames of zero-mean clips, of shape `(batch_size, num_frames, frame_length)`: one clip of
                any length, or several clips that have at most `max_frames` frames together.
            outputs: float32 of shape `(batch_size, num_frames, num_mel_bins)`.
        """
        if frames.shape[1] <= self.max_frames:  # splitting a single block would take a fortieth of the time
            self._transform(frames, outputs)
        else:
            for block, result in zip(frames.split(self.max_frames, 1), outputs.split(self.max_frames, 1), strict=True):
                self._transform(block, result)

    def _transform(self, frames: torch.Tensor, output: torch.Tensor) -> None:
        batch_size, num_frames, _ = frames.shape
        views = self._views.get((batch_size, num_frames))
        if views is None:
            views = self._views[batch_size, num_frames] = self._make_views(batch_size, num_frames)
        torch.sub(frames, frames.mean(-1, keepdim=True), out=views.centered)
        torch.mul(views.centered, self._preemphasis, out=views.scaled)
        views.samples.sub_(views.scaled_previous)
        torch.mul(views.centered, self._window, out=views.windowed)
        squares = torch.view_as_real(torch.fft.rfft(views.padded)).flatten(1).square_()
        for columns, weights, filtered in views.products:
            torch.mm(squares[:, columns], weights, out=filtered)  # autocast does not apply to products with `out`
        torch.add(self._offset, views.mel.clamp_(min=LOG_FLOOR).log_(), alpha=self._inverse_scale, out=output)

    def _make_views(self, batch_size: int, num_frames: int) -> _BlockViews:
        centered, scaled, padded, mel = (
            buffer[: batch_size * num_frames] for buffer in (self._centered, self._scaled, self._padded, self._mel)
        )
        shape = (batch_size, num_frames, -1)
        return _BlockViews(
            centered=centered.view(shape),
            scaled=scaled.view(shape),
            # All frames are one long row, because torch is slow on many rows of 399 samples. A frame's first sample is
            # then paired with another frame's last one, but the window is 0 there.
            samples=centered.view(-1)[1:],
            scaled_previous=scaled.view(-1)[:-1],
            windowed=padded[:, : self._frame_length].view(shape),
            padded=padded,
            mel=mel.view(shape),
            products=[(band.columns, band.weights, mel[:, band.mel_bins]) for band in self._bands],
        )


__all__ = ["log_mel_spectrogram", "mel_filters", "reference_log_mel"]
