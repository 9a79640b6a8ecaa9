"""Synthesise a clip of several sources over coloured noise, and its row in the data set."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
from numpy.random import Generator

from training.data.mixing.noise import noise
from training.data.seeding import generator_for
from training.soundscapes.encoding import encode_flac
from training.soundscapes.sounds import SOURCES

MIN_EVENT_SECONDS = 0.5
FADE_SECONDS = 0.01
SNR_RANGE_DB = (3.0, 30.0)
BACKGROUND_RANGE_DB = (-60.0, -35.0)
PEAK = 0.9


@dataclass(frozen=True)
class SceneEvent:
    """A source in a clip.

    Attributes:
        label: Class, a key of `SOURCES`.
        onset: Start in seconds.
        offset: End in seconds.
        snr: Level over the background in dB.
    """

    label: str
    onset: float
    offset: float
    snr: float


def soundscape(
    rng: Generator, duration: float, rate: int, max_sources: int = 5, labels: Sequence[str] | None = None
) -> tuple[np.ndarray, list[SceneEvent]]:
    """Synthesise one clip: a background, and one event of each drawn class at a random onset and level.

    Args:
        rng: Random generator. It determines the clip.
        duration: Length in seconds.
        rate: Sampling rate in Hz.
        max_sources: Largest number of classes. All numbers from 1 to `max_sources` are equally likely.
        labels: Classes to use instead of drawing them.

    Returns:
        The waveform, float32 of shape `(duration * rate,)`, and the events in order of onset.
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
        events.append(SceneEvent(str(label), round(start / rate, 4), round((start + length) / rate, 4), snr))
    peak = np.abs(mixture).max()
    return (mixture * min(1.0, PEAK / peak)).astype(np.float32), sorted(events, key=lambda event: event.onset)


def columns(rate: int) -> datasets.Features:
    """Return the columns of the data set for clips at a sampling rate in Hz."""
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "audio": datasets.Audio(sampling_rate=rate),
            "labels": datasets.List(datasets.Value("string")),
            "events": datasets.List(
                {
                    "label": datasets.Value("string"),
                    "onset": datasets.Value("float64"),
                    "offset": datasets.Value("float64"),
                    "snr": datasets.Value("float64"),
                }
            ),
            "num_sources": datasets.Value("int32"),
        }
    )


def make_row(item: tuple[str, int], seed: int, duration: float, rate: int, max_sources: int) -> dict[str, Any]:
    """Synthesise a clip and encode it as FLAC.

    Args:
        item: The split and the index of the clip in it. Together with `seed`, they determine the clip.
        seed: Seed of the data set.
        duration: Length in seconds.
        rate: Sampling rate in Hz.
        max_sources: Largest number of classes in the clip.

    Returns:
        The row, with the columns of [`columns`].
    """
    split, index = item
    waveform, events = soundscape(generator_for(seed, "soundscape", split, index), duration, rate, max_sources)
    id_ = f"{split}-{index:06d}"
    return {
        "id": id_,
        "audio": {"bytes": encode_flac(waveform, rate), "path": f"{id_}.flac"},
        "labels": [event.label for event in events],
        "events": [asdict(event) for event in events],
        "num_sources": len(events),
    }
