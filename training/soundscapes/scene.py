"""TODO."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from training.soundscapes.sounds import SOURCES, noise

MIN_EVENT_SECONDS = 0.5


FADE_SECONDS = 0.01


SNR_RANGE_DB = (3.0, 30.0)


BACKGROUND_RANGE_DB = (-60.0, -35.0)


PEAK = 0.9


@dataclass(frozen=True)
class Event:
    """A source in a clip: its class, onset and offset in seconds, level in dB over the background."""

    label: str
    onset: float
    offset: float
    snr: float


def soundscape(
    rng: Generator, duration: float, rate: int, max_sources: int = 5, labels: list[str] | None = None
) -> tuple[np.ndarray, list[Event]]:
    """One clip.

    Args:
        labels: Its classes; by default 1 to `max_sources` different ones, every number as likely.

    Returns:
        float32 of shape `(duration * rate,)` and the events in order of onset.
    """
    n = round(duration * rate)
    if labels is None:
        labels = list(rng.choice(list(SOURCES), rng.integers(1, max_sources + 1), replace=False))
    slope = rng.uniform(0, 1)
    background = noise(rng, n, rate, lambda f: np.maximum(f, 20.0) ** -slope)
    background_level = 10 ** (rng.uniform(*BACKGROUND_RANGE_DB) / 20)
    mixture = background * (background_level / np.sqrt(np.mean(background**2)))

    events = []
    fade = round(FADE_SECONDS * rate)
    for label in labels:
        length = int(rng.uniform(min(n, MIN_EVENT_SECONDS * rate), n + 1))
        start = int(rng.integers(0, n - length + 1))
        snr = round(float(rng.uniform(*SNR_RANGE_DB)), 1)
        sound = SOURCES[label](rng, length, rate)
        ramp = np.minimum(1.0, np.arange(1, length + 1) / fade)
        sound = sound * ramp * ramp[::-1]
        level = background_level * 10 ** (snr / 20)
        mixture[start : start + length] += sound * (level / np.sqrt(np.mean(sound**2)))
        events.append(Event(str(label), round(start / rate, 4), round((start + length) / rate, 4), snr))
    peak = np.abs(mixture).max()
    return (mixture * min(1.0, PEAK / peak)).astype(np.float32), sorted(events, key=lambda event: event.onset)
