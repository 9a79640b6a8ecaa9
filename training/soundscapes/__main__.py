"""Synthesise a labelled data set of polyphonic soundscapes, to try the training programs without real data.

    python -m training.soundscapes OUT --clips 2000 --seconds 10 --seed 0 --plot

Each clip holds 1 to 5 sound classes over coloured noise. Every sound has its own pitch, rhythm, timbre, level
and place in time. OUT is a folder that `datasets.load_dataset` and the training programs read:

- `data/{train,validation,test}-*.parquet`, with the columns `id`, `audio` (FLAC), `labels` (class names in order of
  onset), `events` (`label`, `onset` and `offset` in seconds, `snr` in dB over the background) and `num_sources`;
- `events.csv`, one line for each event;
- `labels.csv`, the classes;
- `README.md`, the command that made the folder;
- with `--plot`, `soundscapes.png`: spectrograms of four clips with their events, and of each class.

Seed, split and index determine a clip bit for bit. The number of processes does not matter.
"""

import argparse
import csv
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.preparation.shards import card_header, new_folder, write_labels, write_shards
from training.soundscapes.scene import MIN_EVENT_SECONDS, columns, make_row
from training.soundscapes.sounds import SOURCES

CLIPS_PER_SHARD = 250


def write_dataset(
    folder: Path, splits: dict[str, int], duration: float, rate: int, seed: int, max_sources: int, num_processes: int
) -> None:
    """Write the shards, `events.csv` and `labels.csv` of a data set.

    Args:
        folder: Folder to write into.
        splits: Number of clips of each split.
        duration: Length of a clip in seconds.
        rate: Sampling rate in Hz.
        seed: Seed of the data set.
        max_sources: Largest number of classes in a clip.
        num_processes: Processes that synthesise clips; the data do not depend on it.
    """
    write_labels(folder, sorted(SOURCES))
    items = [(split, index) for split, count in splits.items() for index in range(count)]
    make = partial(make_row, seed=seed, duration=duration, rate=rate, max_sources=max_sources)
    rows = iter(tqdm(_map(make, items, num_processes), total=len(items), unit="clip", desc="Soundscapes"))
    with open(folder / "events.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("id", "label", "onset", "offset", "snr"))

        def with_events_listed(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for row in rows:
                table.writerows((row["id"], *event.values()) for event in row["events"])
                yield row

        for split, count in splits.items():
            write_shards(
                folder, split, with_events_listed(islice(rows, count)), columns(rate), max_rows=CLIPS_PER_SHARD
            )


def _map(
    function: Callable[[tuple[str, int]], dict[str, Any]], items: list[tuple[str, int]], num_processes: int
) -> Iterator[dict[str, Any]]:
    """Apply a function in several processes and yield the results in order."""
    if num_processes <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, items, chunksize=8)


def write_card(folder: Path, splits: dict[str, int], arguments: argparse.Namespace) -> None:
    """Write the `README.md` of the data set, with the command that reproduces it."""
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
    """Parse and check the command line; `splits` is the number of clips of each split."""
    parser = argparse.ArgumentParser(
        prog="python -m training.soundscapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to create; it must not exist")
    parser.add_argument("--clips", type=int, default=2000, help="total number of clips (default: 2000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip in seconds (default: 10)")
    parser.add_argument("--max-sources", type=int, default=5, help="largest number of sources in a clip (default: 5)")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        help="fraction of the clips in each of validation and test (default: 0.1)",
    )
    parser.add_argument("--sampling-rate", type=int, default=16_000, help="sampling rate in Hz (default: 16000)")
    parser.add_argument("--seed", type=int, default=0, help="seed; each seed gives different clips (default: 0)")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="processes that synthesise clips; the data do not depend on it (default: one per core)",
    )
    parser.add_argument("--plot", action="store_true", help="also write OUT/soundscapes.png")
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists already; name a new folder.")
    if not 1 <= arguments.max_sources <= len(SOURCES):
        parser.error(f"--max-sources {arguments.max_sources} must lie between 1 and {len(SOURCES)}.")
    if arguments.seconds < MIN_EVENT_SECONDS:
        parser.error(f"--seconds {arguments.seconds:g} is shorter than the shortest event, {MIN_EVENT_SECONDS} s.")
    if arguments.sampling_rate < 16_000:
        parser.error(
            f"--sampling-rate {arguments.sampling_rate} must be at least 16000, because the sounds reach 7 kHz."
        )
    held_out = round(arguments.held_out * arguments.clips)
    arguments.splits = {"train": arguments.clips - 2 * held_out, "validation": held_out, "test": held_out}
    arguments.splits = {split: count for split, count in arguments.splits.items() if count}
    if arguments.clips < 1 or not 0 <= arguments.held_out < 0.5 or "train" not in arguments.splits:
        parser.error(f"--clips {arguments.clips} and --held-out {arguments.held_out:g} leave no clip for training.")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
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
            # Each worker process imports this module again, so matplotlib is loaded only where it is needed.
            from training.soundscapes.picture import plot

            plot(
                folder / "soundscapes.png",
                arguments.seconds,
                arguments.sampling_rate,
                arguments.seed,
                arguments.max_sources,
            )
    print(f"Wrote {sum(arguments.splits.values())} clips to {arguments.output}.")


if __name__ == "__main__":
    main()
