"""Coloured noise."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator


def noise(rng: Generator, n: int, rate: int, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return Gaussian noise filtered by `gain`, a function from frequencies in Hz to amplitudes."""
    size = 1 << max(4, (n - 1).bit_length())
    spectrum = np.fft.rfft(rng.standard_normal(size))
    return np.fft.irfft(spectrum * gain(np.fft.rfftfreq(size, 1 / rate)), size)[:n]
