"""The picture of a data set of soundscapes: spectrograms of a few clips and of each sound class."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.data.seeding import generator_for
from training.soundscapes.scene import soundscape
from training.soundscapes.sounds import SOURCES

COLUMNS, CLIPS = 4, 4
CLASS_SECONDS = 3


def plot(path: Path, duration: float, rate: int, seed: int, max_sources: int) -> None:
    """Draw the first training clips with their events, and one sound of each class.

    Args:
        path: PNG file to write.
        duration: Length of a clip in seconds.
        rate: Sampling rate in Hz.
        seed: Seed of the data set.
        max_sources: Largest number of classes in a clip.
    """
    class_rows = math.ceil(len(SOURCES) / COLUMNS)
    figure = Figure(figsize=(16, 2.2 * (2 + class_rows)), layout="constrained")
    grid = figure.add_gridspec(2 + class_rows, COLUMNS)
    for i in range(CLIPS):
        waveform, events = soundscape(generator_for(seed, "soundscape", "train", i), duration, rate, max_sources)
        axes = figure.add_subplot(grid[i // 2, 2 * (i % 2) : 2 * (i % 2) + 2])
        _draw_spectrogram(axes, waveform, rate, seed)
        for k, event in enumerate(events):
            height = rate / 2 * (0.86 - 0.13 * k)
            axes.hlines(height, event.onset, event.offset, colors="white", linewidth=2)
            axes.text(event.onset, height, f" {event.label}", color="white", va="bottom", fontsize=9)
        axes.set_title(f"train-{i:06d}", fontsize=9)
    for i, (label, synthesise) in enumerate(SOURCES.items()):
        sound = synthesise(generator_for(seed, "plot", label), CLASS_SECONDS * rate, rate)
        axes = figure.add_subplot(grid[2 + i // COLUMNS, i % COLUMNS])
        _draw_spectrogram(axes, 0.1 * sound / np.sqrt(np.mean(sound**2)), rate, seed)
        axes.set_title(label, fontsize=9)
    figure.savefig(path, dpi=80)


def _draw_spectrogram(axes: Axes, waveform: np.ndarray, rate: int, seed: int) -> None:
    # Faint noise, because specgram takes the logarithm and digital silence has none.
    waveform = waveform + 1e-7 * generator_for(seed, "plot").standard_normal(len(waveform))
    axes.specgram(waveform, NFFT=512, noverlap=352, Fs=rate, cmap="magma", vmin=-140, vmax=-30)
    axes.set_yticks([])
