"""Resampling of waveforms, whole or in blocks, in bounded memory for any pair of rates."""

import functools
import math

import torch
import torchaudio

# The defaults of torchaudio.functional.resample: zero crossings on either side of the filter, and its cutoff as a
# share of the lower Nyquist frequency.
ZERO_CROSSINGS, ROLLOFF = 6, 0.99
# torchaudio's kernel holds (reduced source rate) x (reduced target rate) taps. 44 100 Hz to 16 000 Hz reduces to
# 441/160, but 11 127 Hz does not reduce, and almost all of its 178 million taps are zero. Kernels beyond this size
# are built without the zeros.
MAX_KERNEL_TAPS = 1 << 24
# Shortest band of taps that is worth a convolution of its own.
MIN_BAND_TAPS = 64


def resample(waveform: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    """Resample a waveform `(num_samples,)` as `torchaudio.functional.resample` does with its defaults."""
    resampler = StreamResampler(orig_freq, new_freq)
    if resampler.is_banded:
        return torch.cat((resampler.push(waveform), resampler.finish().to(waveform.device)))
    return torchaudio.functional.resample(waveform, resampler.orig, resampler.new)


class StreamResampler:
    """Resample a waveform that comes in blocks. The outputs joined equal [`resample`] of the joined blocks.

    torchaudio's filter turns `orig` samples into `new` and reads `width` samples on either side. From one block to the
    next this class keeps the samples that later outputs still read.
    """

    def __init__(self, orig_freq: int, new_freq: int) -> None:
        divisor = math.gcd(orig_freq, new_freq)
        self.orig, self.new = orig_freq // divisor, new_freq // divisor
        self._num_samples = self._num_outputs = 0
        self._width = math.ceil(ZERO_CROSSINGS * self.orig / (min(self.orig, self.new) * ROLLOFF))
        self._num_taps = 2 * self._width + self.orig
        self._pending = torch.zeros(self._width)

    @property
    def is_banded(self) -> bool:
        """Whether the kernel is too large to be built with its zeros."""
        return self._num_taps * self.new > MAX_KERNEL_TAPS

    def push(self, block: torch.Tensor) -> torch.Tensor:
        """Take float32 samples `(num_samples,)` and return the outputs that they complete, perhaps none."""
        if self.orig == self.new:
            return block
        self._num_samples += len(block)
        self._pending = torch.cat((self._pending.to(block.device), block))
        groups = (len(self._pending) - self._num_taps) // self.orig + 1
        if groups <= 0:
            return block.new_empty(0)
        kernels = _banded_kernels if self.is_banded else _whole_kernel
        outputs = []
        for first, kernel in kernels(self.orig, self.new, self._width):
            reach = self._pending[first : first + (groups - 1) * self.orig + kernel.shape[-1]]
            outputs.append(torch.nn.functional.conv1d(reach[None, None], kernel.to(block.device), stride=self.orig)[0])
        # Copy, because a view would keep the whole block alive.
        self._pending = self._pending[groups * self.orig :].clone()
        self._num_outputs += groups * self.new
        return torch.cat(outputs).T.reshape(-1)

    def finish(self) -> torch.Tensor:
        """Return the last outputs, whose filter reads beyond the end."""
        if self.orig == self.new:
            return torch.empty(0)
        total, already = math.ceil(self.new * self._num_samples / self.orig), self._num_outputs
        return self.push(torch.zeros(self._width + self.orig, device=self._pending.device))[: total - already]


@functools.lru_cache(maxsize=2)
def _whole_kernel(orig: int, new: int, width: int) -> list[tuple[int, torch.Tensor]]:
    """Return torchaudio's kernel `(new, 1, 2 * width + orig)`, which begins at tap 0."""
    # torchaudio's function also computes its kernel in float32 for float32 samples.
    return [(0, torchaudio.transforms.Resample(orig, new, dtype=torch.float32).kernel)]


@functools.lru_cache(maxsize=2)
def _banded_kernels(orig: int, new: int, width: int) -> list[tuple[int, torch.Tensor]]:
    """Return the taps of torchaudio's kernel that are not zero, for some outputs at a time.

    Output j of a group reads the taps within `width` of `width + j * orig / new`. The taps are computed as torchaudio
    does, in float32 and step by step, so that they are equal bit by bit.

    Returns:
        For each band its first tap, and its kernel `(outputs, 1, taps)`.
    """
    base = min(orig, new) * ROLLOFF
    outputs = math.ceil(max(width, MIN_BAND_TAPS) * new / orig)
    kernels = []
    for first in range(0, new, outputs):
        last = min(first + outputs, new)
        start, stop = first * orig // new, math.ceil((last - 1) * orig / new) + 2 * width + 1
        stop = min(stop, 2 * width + orig)
        taps = torch.arange(start - width, stop - width, dtype=torch.float32)[None, None] / orig
        time = torch.arange(-first, -last, -1, dtype=torch.float32)[:, None, None] / new + taps
        time = (time * base).clamp_(-ZERO_CROSSINGS, ZERO_CROSSINGS)
        window = torch.cos(time * math.pi / ZERO_CROSSINGS / 2) ** 2
        time = time * math.pi
        kernel = torch.where(time == 0, torch.tensor(1.0), time.sin() / time) * (window * (base / orig))
        kernels.append((start, kernel))
    return kernels
