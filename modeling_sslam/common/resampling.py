"""Resampling of waveforms, whole or in blocks, in bounded memory for any pair of rates."""

import math
from fractions import Fraction

import torch
import torchaudio

# The resampling kernel holds (reduced source rate) x (reduced target rate) taps. 44 100 Hz to 16 000 Hz reduces to
# 441/160, but 11 127 Hz does not reduce, and its kernel would take gigabytes. A fraction below this bound is within
# 1e-6 of any ratio.
MAX_RESAMPLING_DENOMINATOR = 2000


def resampling_ratio(orig_freq: int, new_freq: int) -> tuple[int, int]:
    """Return the ratio of two rates in lowest terms, rounded to a fraction of bounded denominator."""
    ratio = Fraction(orig_freq, new_freq).limit_denominator(MAX_RESAMPLING_DENOMINATOR)
    return ratio.numerator, ratio.denominator


def resample(waveform: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    """Resample a waveform by `torchaudio.functional.resample` with its defaults."""
    return torchaudio.functional.resample(waveform, *resampling_ratio(orig_freq, new_freq))


class StreamResampler:
    """Resample a waveform that comes in blocks. The outputs joined equal [`resample`] of the joined blocks.

    torchaudio's filter turns `orig` samples into `new` and reads `width` samples on either side. From one block to the
    next this class keeps the samples that later outputs still read.
    """

    def __init__(self, orig_freq: int, new_freq: int) -> None:
        self.orig, self.new = resampling_ratio(orig_freq, new_freq)
        self._num_samples = self._num_outputs = 0
        if self.orig != self.new:
            # The function also computes its kernel in float32 for float32 samples.
            resampler = torchaudio.transforms.Resample(self.orig, self.new, dtype=torch.float32)
            self._kernel, self._width = resampler.kernel, resampler.width
            self._pending = torch.zeros(self._width)

    def push(self, block: torch.Tensor) -> torch.Tensor:
        """Take float32 samples `(num_samples,)` and return the outputs that they complete, perhaps none."""
        if self.orig == self.new:
            return block
        self._num_samples += len(block)
        self._pending = torch.cat((self._pending, block))
        groups = (len(self._pending) - self._kernel.shape[-1]) // self.orig + 1
        if groups <= 0:
            return block.new_empty(0)
        reach = (groups - 1) * self.orig + self._kernel.shape[-1]
        outputs = torch.nn.functional.conv1d(self._pending[None, None, :reach], self._kernel, stride=self.orig)
        # A copy, because a view would keep the whole block alive.
        self._pending = self._pending[groups * self.orig :].clone()
        self._num_outputs += groups * self.new
        return outputs[0].T.reshape(-1)

    def finish(self) -> torch.Tensor:
        """Return the last outputs, whose filter reads beyond the end."""
        if self.orig == self.new:
            return torch.empty(0)
        total, already = math.ceil(self.new * self._num_samples / self.orig), self._num_outputs
        return self.push(torch.zeros(self._width + self.orig))[: total - already]
