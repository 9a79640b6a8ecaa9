"""Mix labelled recordings into scenes: a background, and events at random places, levels, pitches and tempos.

A scene is a function of a random generator, its length and its sampling rate. Neither earlier scenes nor the process
have an influence.

1. The number of events is uniform between `min_sources` and `max_sources`. Their labels are drawn, without repetition
   unless `repeat_labels` is set, and for each label one of its recordings.
2. The background is a part of a background recording at a random place, repeated with crossfades if the recording is
   shorter than the scene. Without background recordings it is noise with a power spectrum of f^0 to f^-2. Its RMS gets
   a level that is uniform in `level`.
3. An event is an excerpt of its recording, with a length that is uniform in `event_seconds` and around a frame that is
   not silent, without the silence at its ends. It gets a pitch, a tempo and short fades, and is convolved with an
   impulse response.
4. The RMS over the event is `snr` dB above the RMS of the background over the scene. The onset is uniform among those
   at which the whole event is in the scene. The tail of the reverberation follows and is not part of the event.
5. A scene whose peak is beyond [`PEAK`] is turned down as a whole.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from modeling_sslam.common.errors import ClipError
from training.data.mixing import effects
from training.data.mixing.noise import noise
from training.data.mixing.recordings import Recordings, Sound, SoundCache
from training.data.mixing.settings import MIN_EVENT_SECONDS, SceneSettings

PEAK = 0.9
FADE_SECONDS = 0.01
# Responses at lower levels than this, relative to the loudest frame in dB, are no silence.
RESPONSE_RANGE_DB = 120.0
MAX_RESPONSE_SECONDS = 10.0
# Settings that have no influence on a single scene of a given length.
NOT_OF_A_SCENE = ("splits", "clips", "seconds", "cache_mib", "sounds", "background", "impulse_responses")


class Event(NamedTuple):
    """A recording in a scene. Times are in seconds.

    Attributes:
        label: Its class.
        onset: Start in the scene.
        offset: End in the scene, without reverberation.
        snr: RMS over the event above that of the background over the scene, in dB.
        source_file: Name of the recording.
        source_group: Its original recording.
        source_time: Start of the excerpt in the recording, or in the part of it that was decoded.
        pitch: Pitch shift in semitones.
        stretch: Ratio of the duration in the scene to that in the recording.
        impulse_response: Name of the impulse response, or `None`.
    """

    label: str
    onset: float
    offset: float
    snr: float
    source_file: str
    source_group: str
    source_time: float
    pitch: float
    stretch: float
    impulse_response: str | None


class Fault(NamedTuple):
    """A recording that could not be used, and why."""

    id: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.id}: {self.message}"


class Scene(NamedTuple):
    """A mixture.

    Attributes:
        waveform: float32 of shape `(num_samples,)`.
        events: In order of onset.
        background: Name of the background recording; `None` for noise.
        level: RMS of the background in dB of full scale, before step 5.
        faults: Recordings that were drawn and unusable, so that others took their places.
    """

    waveform: np.ndarray
    events: list[Event]
    background: str | None
    level: float
    faults: list[Fault]

    @property
    def labels(self) -> list[str]:
        """The labels in order of onset, each once."""
        return list(dict.fromkeys(event.label for event in self.events))


class Mixer:
    """Scenes from the recordings of one split.

    Args:
        settings: How to mix.
        sounds: Recordings of the events, with labels.
        background: Recordings for the background; `None` for noise.
        impulse_responses: Impulse responses of rooms, if any.

    Raises:
        ValueError: If there are fewer classes than events in a scene, and classes are not repeated.
    """

    def __init__(
        self,
        settings: SceneSettings,
        sounds: Recordings,
        background: Recordings | None = None,
        impulse_responses: Recordings | None = None,
    ) -> None:
        self.settings = settings
        self.sounds = sounds
        self.background = background
        self.impulse_responses = impulse_responses
        members: dict[str, list[int]] = {}
        for i, label in enumerate(sounds.labels):
            members.setdefault(label, []).append(i)
        self.members = {label: np.array(members[label]) for label in sorted(members)}
        self.labels = list(self.members)
        if settings.max_sources > len(self.labels) and not settings.repeat_labels:
            names = ", ".join(self.labels[:5]) + (", ..." if len(self.labels) > 5 else "")
            raise ValueError(
                f"max_sources={settings.max_sources}, but there are {len(self.labels)} classes ({names}). Lower it, "
                "or set repeat_labels to true."
            )
        self._cache = SoundCache(settings.cache_mib << 20)

    @property
    def digest(self) -> str:
        """A digest of the settings and of the names, labels and groups of the recordings."""
        digest = blake2b(digest_size=8)
        digest.update(repr([item for item in asdict(self.settings).items() if item[0] not in NOT_OF_A_SCENE]).encode())
        for pool in (self.sounds, self.background, self.impulse_responses):
            digest.update(repr(pool and (pool.ids, pool.labels, pool.groups)).encode())
        return digest.hexdigest()

    def draw_labels(self, rng: Generator) -> list[str]:
        """Draw the labels of a scene's events. [`mix`] draws the same with a new generator of the same key."""
        settings = self.settings
        count = int(rng.integers(settings.min_sources, settings.max_sources + 1))
        return [self.labels[i] for i in rng.choice(len(self.labels), count, replace=settings.repeat_labels)]

    @effects.one_thread()
    def mix(self, rng: Generator, num_samples: int, rate: int) -> Scene:
        """Mix a scene.

        Args:
            rng: Random generator; it determines the scene.
            num_samples: Length of the scene.
            rate: Sampling rate in Hz.

        Raises:
            ClipError: If all recordings of all drawn labels, or all background recordings, are unusable.
        """
        labels = self.draw_labels(rng)
        faults: list[Fault] = []
        level = float(rng.uniform(*self.settings.level))
        mixture, background = self._draw_background(rng, num_samples, rate, faults)
        mixture *= 10 ** (level / 20) / effects.rms(mixture)
        events = []
        for label in labels:
            event = self._add_event(rng, mixture, 10 ** (level / 20), label, rate, faults)
            if event is not None:
                events.append(event)
        if not events:
            raise ClipError("no_source", f"no recording of {', '.join(labels)} is usable; the first: {faults[0]}")
        peak = np.abs(mixture).max()
        waveform = (mixture * min(1.0, PEAK / peak)).astype(np.float32)
        return Scene(waveform, sorted(events, key=lambda event: event.onset), background, round(level, 2), faults)

    def example(self, label: str, num_samples: int, rate: int) -> np.ndarray:
        """Return the first recording of a class, from its first sound on and at most `num_samples` long.

        Raises:
            ClipError: If the recording is unusable.
        """
        index = int(self.members[label][0])
        sound = self.sounds.read(index, rate, num_samples, 0.0, self.settings.trim, self._cache)
        first = int(sound.active[0]) * effects.frame_samples(rate)
        return sound.waveform[first : first + num_samples]

    def _draw_background(
        self, rng: Generator, num_samples: int, rate: int, faults: list[Fault]
    ) -> tuple[np.ndarray, str | None]:
        """Return a background, float64 of shape `(num_samples,)` at any level, and the name of its recording."""
        if self.background is None:
            slope = rng.uniform(0, 1)
            return noise(rng, num_samples, rate, lambda f: np.maximum(f, 20.0) ** -slope), None
        position, start = rng.random(2)
        everything = np.arange(len(self.background))
        for index, sound in self._usable(
            rng, self.background, everything, rate, num_samples, position, RESPONSE_RANGE_DB, faults
        ):
            excerpt = effects.loop(sound.waveform, num_samples, start, rate)
            if excerpt.any():
                return excerpt.astype(np.float64), self.background.ids[index]
            faults.append(Fault(self.background.ids[index], "silent", "a part of it is silent"))
        raise ClipError("no_background", f"no background recording is usable; the first: {faults[0]}")

    def _add_event(
        self,
        rng: Generator,
        mixture: np.ndarray,
        background_level: float,
        label: str,
        rate: int,
        faults: list[Fault],
    ) -> Event | None:
        """Add an event to the mixture and return it, or `None` if no recording of its label is usable."""
        settings = self.settings
        # All draws come first, so that no draw depends on a recording.
        position, where, before, place = rng.random(4)
        seconds, snr, semitones, stretch = (
            float(rng.uniform(*limits))
            for limits in (settings.event_seconds, settings.snr, settings.pitch, settings.stretch)
        )
        ratio, stretch, snr = effects.pitch_ratio(semitones), round(stretch, 4), round(snr, 1)
        longest = min(round(seconds * rate), len(mixture))
        length = max(1, int(longest / stretch))
        wanted = round(settings.event_seconds[1] * rate / settings.stretch[0])
        usable = self._usable(rng, self.sounds, self.members[label], rate, wanted, position, settings.trim, faults)
        for index, sound in usable:
            if len(sound.waveform) < MIN_EVENT_SECONDS * rate:
                seconds = len(sound.waveform) / rate
                message = f"it has {seconds:g} s, and an event at least {MIN_EVENT_SECONDS:g} s"
                faults.append(Fault(self.sounds.ids[index], "too_short", message))
                continue
            start, stop = excerpt_bounds(sound, length, rate, where, before)
            event = effects.shift_and_stretch(sound.waveform[start:stop], rate, ratio, stretch)[:longest]
            if not event.any():
                faults.append(Fault(self.sounds.ids[index], "silent", "it is silent after the change of pitch"))
                continue
            length = len(event)
            event, response = self._in_a_room(rng, effects.fade_edges(event, round(FADE_SECONDS * rate)), rate, faults)
            onset = int(place * (len(mixture) - length + 1))
            gain = background_level * 10 ** (snr / 20) / effects.rms(event[:length])
            audible = event[: len(mixture) - onset]
            mixture[onset : onset + len(audible)] += gain * audible
            return Event(
                label=label,
                onset=round(onset / rate, 4),
                offset=round((onset + length) / rate, 4),
                snr=snr,
                source_file=self.sounds.ids[index],
                source_group=self.sounds.groups[index],
                source_time=round(start / rate, 4),
                pitch=round(12 * math.log2(ratio), 2),
                stretch=stretch,
                impulse_response=response,
            )
        return None

    def _in_a_room(
        self, rng: Generator, event: np.ndarray, rate: int, faults: list[Fault]
    ) -> tuple[np.ndarray, str | None]:
        """Return an event with reverberation, and the name of the impulse response, if there is one."""
        pool = self.impulse_responses
        if pool is None:
            return event, None
        longest = round(MAX_RESPONSE_SECONDS * rate)
        usable = self._usable(rng, pool, np.arange(len(pool)), rate, longest, 0.0, RESPONSE_RANGE_DB, faults)
        for index, sound in usable:
            return effects.reverberate(event.astype(np.float32), sound.waveform[:longest]), pool.ids[index]
        return event, None

    def _usable(
        self,
        rng: Generator,
        pool: Recordings,
        members: np.ndarray,
        rate: int,
        num_samples: int,
        position: float,
        below_peak: float,
        faults: list[Fault],
    ) -> Iterator[tuple[int, Sound]]:
        """Yield usable recordings among some of a pool, in random order, and list the unusable ones in `faults`."""
        # One generator for the order alone, so that a fault changes no later draw of the scene.
        order = np.random.default_rng(rng.integers(1 << 62))
        first = int(order.integers(len(members)))
        for k in _first_then_others(first, len(members), order):
            index = int(members[k])
            try:
                sound = pool.read(index, rate, num_samples, position, below_peak, self._cache)
            except ClipError as error:
                faults.append(Fault(pool.ids[index], error.reason, str(error)))
                continue
            yield index, sound


def _first_then_others(first: int, count: int, order: Generator) -> Iterator[int]:
    """Yield one index and then the others in random order, which is drawn only if they are needed."""
    yield first
    yield from (k for k in order.permutation(count).tolist() if k != first)


def excerpt_bounds(sound: Sound, length: int, rate: int, where: float, before: float) -> tuple[int, int]:
    """Return the bounds of an excerpt of at most `length` samples that begins and ends with sound.

    Args:
        sound: The recording.
        length: Longest excerpt in samples.
        rate: Sampling rate in Hz.
        where: Chooses a frame that is not silent, in [0, 1).
        before: Share of the excerpt before that frame, in [0, 1).
    """
    size, total = effects.frame_samples(rate), len(sound.waveform)
    first, last = int(sound.active[0]) * size, min((int(sound.active[-1]) + 1) * size, total)
    if last - first <= length:
        return first, last
    frame = int(sound.active[int(where * len(sound.active))])
    start = round(frame * size - before * max(0, length - size))
    start = min(max(start, first), last - length)
    frames = sound.active[(sound.active * size >= start) & (sound.active * size < start + length)]
    # The frame that was chosen is among them.
    start, stop = int(frames[0]) * size, min((int(frames[-1]) + 1) * size, start + length)
    return start, min(max(stop, start + round(MIN_EVENT_SECONDS * rate)), total)


__all__ = ["PEAK", "Event", "Fault", "Mixer", "Scene", "excerpt_bounds"]
