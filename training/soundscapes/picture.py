"""The picture of a data set of soundscapes: spectrograms of a few clips and of each sound class."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modeling_sslam.common.errors import ClipError
from training.data.mixing.mixer import Event
from training.data.mixing.pools import Pool, scene_id
from training.data.seeding import generator_for
from training.soundscapes.scene import SceneEvent, soundscape
from training.soundscapes.sounds import SOURCES

COLUMNS, CLIPS = 4, 4
CLASS_SECONDS = 3
# Largest number of classes of recordings to draw. A data set can have hundreds.
MAX_CLASSES = 60

Drawn = Event | SceneEvent


def plot(path: Path, duration: float, rate: int, seed: int, max_sources: int) -> None:
    """Draw the first training clips of a synthesised data set with their events, and one sound of each class.

    Args:
        path: PNG file to write.
        duration: Length of a clip in seconds.
        rate: Sampling rate in Hz.
        seed: Seed of the data set.
        max_sources: Largest number of classes in a clip.
    """
    clips = {
        f"train-{i:06d}": soundscape(generator_for(seed, "soundscape", "train", i), duration, rate, max_sources)
        for i in range(CLIPS)
    }
    sounds = {
        label: synthesise(generator_for(seed, "plot", label), CLASS_SECONDS * rate, rate)
        for label, synthesise in SOURCES.items()
    }
    draw(path, clips, sounds, rate, seed)


def plot_recorded(path: Path, pool: Pool, split: str, rate: int, seed: int) -> None:
    """Draw the first scenes of a split with their events, and one recording of each class.

    Scenes and recordings that cannot be used are left out.

    Args:
        path: PNG file to write.
        pool: The mixer and the number of scenes of the split.
        split: Name of the split.
        rate: Sampling rate in Hz.
        seed: Seed of the data set.
    """
    clips: dict[str, tuple[np.ndarray, Sequence[Drawn]]] = {}
    sounds = {}
    mixer = pool.mixer
    for id_ in (scene_id(split, i) for i in range(min(CLIPS, pool.num_scenes))):
        with suppress(ClipError):
            scene = mixer.mix(generator_for(seed, "scene", 0, id_), round(mixer.settings.seconds * rate), rate)
            clips[id_] = scene.waveform, scene.events
    for label in mixer.labels[:MAX_CLASSES]:
        with suppress(ClipError):
            sounds[label] = mixer.example(label, CLASS_SECONDS * rate, rate)
    draw(path, clips, sounds, rate, seed)


def draw(
    path: Path,
    clips: Mapping[str, tuple[np.ndarray, Sequence[Drawn]]],
    sounds: Mapping[str, np.ndarray],
    rate: int,
    seed: int,
) -> None:
    """Draw clips with their events, and sounds.

    Args:
        path: PNG file to write.
        clips: Waveforms and events by the clip's name.
        sounds: Waveforms by class; none is zero everywhere.
        rate: Sampling rate in Hz.
        seed: Determines the faint noise that keeps the spectrograms finite.
    """
    class_rows = math.ceil(len(sounds) / COLUMNS)
    figure = Figure(figsize=(16, 2.2 * (2 + class_rows)), layout="constrained")
    grid = figure.add_gridspec(2 + class_rows, COLUMNS)
    for i, (name, (waveform, events)) in enumerate(clips.items()):
        axes = figure.add_subplot(grid[i // 2, 2 * (i % 2) : 2 * (i % 2) + 2])
        _draw_spectrogram(axes, waveform, rate, seed)
        for k, event in enumerate(events):
            height = rate / 2 * (0.86 - 0.13 * k)
            axes.hlines(height, event.onset, event.offset, colors="white", linewidth=2)
            axes.text(event.onset, height, f" {event.label}", color="white", va="bottom", fontsize=9)
        axes.set_title(name, fontsize=9)
    for i, (label, sound) in enumerate(sounds.items()):
        axes = figure.add_subplot(grid[2 + i // COLUMNS, i % COLUMNS])
        _draw_spectrogram(axes, 0.1 * sound / np.sqrt(np.mean(sound**2)), rate, seed)
        axes.set_title(label, fontsize=9)
    figure.savefig(path, dpi=80)


def _draw_spectrogram(axes: Axes, waveform: np.ndarray, rate: int, seed: int) -> None:
    # Add faint noise, because specgram takes the logarithm, which digital silence does not have.
    waveform = waveform + 1e-7 * generator_for(seed, "plot").standard_normal(len(waveform))
    axes.specgram(waveform, NFFT=512, noverlap=352, Fs=rate, cmap="magma", vmin=-140, vmax=-30)
    axes.set_yticks([])
