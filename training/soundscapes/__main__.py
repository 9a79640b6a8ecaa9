"""Labelled polyphonic soundscapes, synthesised: data to try a training run on where there is none.

    python -m training.soundscapes OUT --clips 2000 --seconds 10 --seed 0 --plot

Every clip holds 1 to 5 sources out of the classes in `SOURCES`, each with its own pitch, rhythm, timbre, level and
place in time, over coloured noise. OUT is a folder that `datasets.load_dataset` and the training programs read:

- `data/{train,validation,test}-*.parquet`: `id`, `audio` (FLAC), `labels` (class names, in order of onset), `events`
  (`label`, `onset` and `offset` in seconds, `snr` in dB over the background) and `num_sources`;
- `events.csv` (one line an event), `labels.csv` (the classes) and `README.md` (how it was made);
- with `--plot`, `soundscapes.png`: spectrograms of a few clips with their events, and one of each class.

A clip is a function of (seed, split, index), bit for bit, however many processes make it.
"""

import argparse
import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import soundfile
from tqdm import tqdm

from training.data.seeding import generator_for
from training.preparation.shards import card_header, new_folder, write_labels, write_shards
from training.soundscapes.scene import MIN_EVENT_SECONDS, Event, soundscape
from training.soundscapes.sounds import SOURCES

CLIPS_PER_SHARD = 250


# ---------------------------------------------------------------------------------------------------- building blocks


# ------------------------------------------------------------------------------------------------------------- classes


# --------------------------------------------------------------------------------------------------------------- clips


def make_row(item: tuple[str, int], seed: int, duration: float, rate: int, max_sources: int) -> dict:
    """The row of clip `index` of a split."""
    split, index = item
    waveform, events = soundscape(generator_for(seed, "soundscape", split, index), duration, rate, max_sources)
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format="FLAC", subtype="PCM_16")
    id_ = f"{split}-{index:06d}"
    return {
        "id": id_,
        "audio": {"bytes": file.getvalue(), "path": f"{id_}.flac"},
        "labels": [event.label for event in events],
        "events": [vars(event) for event in events],
        "num_sources": len(events),
    }


# ------------------------------------------------------------------------------------------------------------ data set


def features(rate: int) -> datasets.Features:
    event = {name: datasets.Value("string" if name == "label" else "float64") for name in Event.__dataclass_fields__}
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "audio": datasets.Audio(sampling_rate=rate),
            "labels": datasets.List(datasets.Value("string")),
            "events": datasets.List(event),
            "num_sources": datasets.Value("int32"),
        }
    )


def write_dataset(
    folder: Path, splits: dict[str, int], duration: float, rate: int, seed: int, max_sources: int, num_processes: int
) -> None:
    """Writes the shards, `events.csv` and `labels.csv` of a data set with so many clips in each split."""
    columns = features(rate)
    write_labels(folder, sorted(SOURCES))
    items = [(split, index) for split, count in splits.items() for index in range(count)]
    make = partial(make_row, seed=seed, duration=duration, rate=rate, max_sources=max_sources)
    rows = iter(tqdm(_map(make, items, num_processes), total=len(items), unit="clip", desc="Soundscapes"))
    with open(folder / "events.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("id", "label", "onset", "offset", "snr"))

        def listed(rows: Iterable[dict]) -> Iterator[dict]:
            for row in rows:
                table.writerows((row["id"], *event.values()) for event in row["events"])
                yield row

        for split, count in splits.items():
            write_shards(folder, split, listed(islice(rows, count)), columns, max_rows=CLIPS_PER_SHARD)


def _map(function: Callable, items: list, num_processes: int) -> Iterator:
    if num_processes <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, items, chunksize=8)


def plot(rate: int, seed: int, duration: float, max_sources: int, path: Path) -> None:
    """Spectrograms of four clips with their events, and of each class by itself."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    def draw(axes: Axes, waveform: np.ndarray) -> None:
        waveform = waveform + 1e-7 * generator_for(seed, "plot").standard_normal(len(waveform))
        axes.specgram(waveform, NFFT=512, noverlap=352, Fs=rate, cmap="magma", vmin=-140, vmax=-30)
        axes.set_yticks([])

    columns = 4
    class_rows = math.ceil(len(SOURCES) / columns)
    figure = Figure(figsize=(16, 2.2 * (2 + class_rows)), layout="constrained")
    grid = figure.add_gridspec(2 + class_rows, columns)
    for i in range(4):
        waveform, events = soundscape(generator_for(seed, "soundscape", "train", i), duration, rate, max_sources)
        axes = figure.add_subplot(grid[i // 2, 2 * (i % 2) : 2 * (i % 2) + 2])
        draw(axes, waveform)
        for k, event in enumerate(events):
            height = rate / 2 * (0.86 - 0.13 * k)
            axes.hlines(height, event.onset, event.offset, colors="white", linewidth=2)
            axes.text(event.onset, height, f" {event.label}", color="white", va="bottom", fontsize=9)
        axes.set_title(f"train-{i:06d}", fontsize=9)
    for i, (label, function) in enumerate(SOURCES.items()):
        sound = function(generator_for(seed, "plot", label), 3 * rate, rate)
        axes = figure.add_subplot(grid[2 + i // columns, i % columns])
        draw(axes, 0.1 * sound / np.sqrt(np.mean(sound**2)))
        axes.set_title(label, fontsize=9)
    figure.savefig(path, dpi=80)


def write_card(folder: Path, splits: dict[str, int], arguments: argparse.Namespace) -> None:
    counts = ", ".join(f"{count} {split}" for split, count in splits.items())
    (folder / "README.md").write_text(
        f"{card_header(splits)}\n# Synthesised soundscapes\n\n"
        f"{counts} clips of {arguments.seconds:g} s at {arguments.sampling_rate} Hz, each with 1 to "
        f"{arguments.max_sources} of {len(SOURCES)} classes of sources over coloured noise, made by\n\n"
        f"    python -m training.soundscapes OUT --clips {arguments.clips} --seconds {arguments.seconds:g} "
        f"--sampling-rate {arguments.sampling_rate} --max-sources {arguments.max_sources} "
        f"--held-out {arguments.held_out:g} --seed {arguments.seed}\n\n"
        f"Classes: {', '.join(sorted(SOURCES))}.\n",
        encoding="utf-8",
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.soundscapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make; it must not exist")
    parser.add_argument("--clips", type=int, default=2000, help="clips in all (default: 2000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip (default: 10)")
    parser.add_argument("--max-sources", type=int, default=5, help="most sources in a clip (default: 5)")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        help="fraction of the clips in each of validation and test (default: 0.1)",
    )
    parser.add_argument("--sampling-rate", type=int, default=16_000, help="in Hz (default: 16000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other clips (default: 0)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="processes that make clips; the data do not depend on it"
    )
    parser.add_argument("--plot", action="store_true", help="also draw OUT/soundscapes.png")
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; name a folder that does not.")
    if not 1 <= arguments.max_sources <= len(SOURCES):
        parser.error(f"--max-sources {arguments.max_sources} must lie between 1 and {len(SOURCES)}.")
    if arguments.seconds < MIN_EVENT_SECONDS:
        parser.error(f"--seconds {arguments.seconds:g} is shorter than the shortest event, {MIN_EVENT_SECONDS} s.")
    if arguments.sampling_rate < 16_000:
        parser.error(
            f"--sampling-rate {arguments.sampling_rate} must be at least 16000: the sources reach up to 7 kHz."
        )
    held_out = round(arguments.held_out * arguments.clips)
    arguments.splits = {"train": arguments.clips - 2 * held_out, "validation": held_out, "test": held_out}
    arguments.splits = {split: count for split, count in arguments.splits.items() if count}
    if arguments.clips < 1 or not 0 <= arguments.held_out < 0.5 or "train" not in arguments.splits:
        parser.error(f"--clips {arguments.clips} and --held-out {arguments.held_out:g} leave no clip to train on.")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    with new_folder(arguments.output) as folder:
        write_dataset(
            folder,
            arguments.splits,
            arguments.seconds,
            arguments.sampling_rate,
            arguments.seed,
            arguments.max_sources,
            arguments.processes,
        )
        write_card(folder, arguments.splits, arguments)
        if arguments.plot:
            plot(
                arguments.sampling_rate,
                arguments.seed,
                arguments.seconds,
                arguments.max_sources,
                folder / "soundscapes.png",
            )
    print(f"Wrote {sum(arguments.splits.values())} clips to {arguments.output}.")


if __name__ == "__main__":
    main()
