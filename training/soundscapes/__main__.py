r"""Make a labelled data set of polyphonic soundscapes, synthesised or mixed from recordings.

    python -m training.soundscapes OUT --clips 2000 --seconds 10 --seed 0 --plot
    python -m training.soundscapes OUT --sounds FOLDER_OF_CLASSES --background FOLDER --group-by REGEX --clips 2000

Without `--sounds`, each clip has 1 to 5 synthesised sound classes over coloured noise. Every sound has its own pitch,
rhythm, timbre, level, onset and duration.

With `--sounds`, scenes are mixed from labelled recordings of single sounds: a folder with a subfolder for each class,
a .csv table, or a data set that `training.prepare` wrote. Each event has a random excerpt, onset and signal-to-noise
ratio, and on request a random pitch, tempo and room. Splits share no recording, and recordings of the same original
stay in one split: `--group-column` or `--group-by` identifies the originals. The first command below takes the
original from the middle number of a file's name, as in ESC-10 and ESC-50. The second takes the folds of a prepared
ESC-50 as splits:

    python -m training.soundscapes OUT --sounds FOLDER --group-by '\d-(\d+)-'
    python -m training.soundscapes OUT --sounds PREPARED --splits train=fold1+fold2+fold3 validation=fold4 test=fold5

OUT is a folder that `datasets.load_dataset` and the training programs read:

- `data/{train,validation,test}-*.parquet`, with the columns `id`, `audio` (FLAC), `labels` (class names in order of
  onset), `events` (`label`, `onset` and `offset` in seconds, `snr` in dB over the background) and `num_sources`. With
  `--sounds`, `events` also has the file, its original, the start of the excerpt, pitch, stretch and impulse response,
  and the data set has the columns `source_groups`, `background` and `level`;
- `events.csv`, one line for each event;
- `labels.csv`, the classes;
- `README.md`, the command that made the folder;
- with `--plot`, `soundscapes.png`: spectrograms of four clips with their events, and of each class;
- with `--sounds`, `jams/SPLIT/ID.jams`, the annotations in the format of JAMS and scaper; `report.json`, the numbers
  of recordings and events, and the recordings and scenes that were skipped; and `scenes.yaml`, the settings.

`--data OUT/scenes.yaml` makes the training programs mix new scenes in every epoch from the same splits of the
recordings, instead of reading the scenes in OUT.

The seed, the split and the index of a clip determine it bit for bit, for any number of processes.
"""

import argparse
import csv
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.arguments import build, convert, settings
from training.data.mixing.settings import SceneSettings
from training.preparation.shards import card_header, new_folder, write_labels, write_shards
from training.soundscapes.parallel import map_in_order
from training.soundscapes.scene import MIN_EVENT_SECONDS, columns, make_row
from training.soundscapes.sounds import SOURCES

# Settings that scenes and synthesised soundscapes share.
SHARED = ("clips", "seconds", "max_sources")
MIN_RATE_OF_RECORDINGS = 8000
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
        num_processes: Number of processes that synthesise clips. The data do not depend on it.
    """
    write_labels(folder, sorted(SOURCES))
    items = [(split, index) for split, count in splits.items() for index in range(count)]
    make = partial(make_row, seed=seed, duration=duration, rate=rate, max_sources=max_sources)
    rows = iter(tqdm(map_in_order(make, items, num_processes), total=len(items), unit="clip", desc="Soundscapes"))
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


def write_scene_card(folder: Path, splits: dict[str, int], arguments: argparse.Namespace) -> None:
    """Write the `README.md` of a data set of scenes mixed from recordings, with the command that reproduces it."""
    counts = ", ".join(f"{count} {split}" for split, count in splits.items())
    scenes = arguments.scenes
    (folder / "README.md").write_text(
        f"{card_header(splits)}\n# Soundscapes mixed from recordings\n\n"
        f"{counts} scenes of {scenes.seconds:g} s at {arguments.sampling_rate} Hz, each with {scenes.min_sources} to "
        f"{scenes.max_sources} events. Splits share no original recording. `snr` is the ratio in dB of an event's RMS "
        "to the RMS of the background over the scene. `scenes.yaml` has all settings. Made by\n\n"
        f"    python -m training.soundscapes OUT {shlex.join(arguments.given)}\n",
        encoding="utf-8",
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line.

    Returns:
        The arguments. `scenes` has the settings of scenes from recordings, or is `None`. `splits` has the number of
        synthesised clips of each split. `given` has the options that reproduce the scenes.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.soundscapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to create; it must not exist")
    parser.add_argument("--clips", type=int, default=2000, help="total number of clips (default: 2000)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip in seconds (default: 10)")
    parser.add_argument("--max-sources", type=int, default=5, help="largest number of events in a clip (default: 5)")
    parser.add_argument(
        "--held-out",
        type=float,
        help="fraction of the clips for validation, and the same fraction for test (default: 0.1); with --sounds, use "
        "--splits instead",
    )
    parser.add_argument("--sampling-rate", type=int, default=16_000, help="sampling rate in Hz (default: 16000)")
    parser.add_argument("--seed", type=int, default=0, help="seed; each seed gives different clips (default: 0)")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="number of processes; the data do not depend on it (default: one per core)",
    )
    parser.add_argument("--plot", action="store_true", help="also write OUT/soundscapes.png")
    group = parser.add_argument_group("scenes from recordings")
    known = {setting.key: setting for setting in settings(SceneSettings) if setting.key not in SHARED}
    for setting in known.values():
        is_range, is_list = isinstance(setting.default, tuple), isinstance(setting.default, list)
        values = setting.default if is_range or is_list else [setting.default]
        default = " ".join(map(str, values))
        group.add_argument(
            f"--{setting.key.replace('_', '-')}",
            **{"action": "store_true"}
            if setting.default is False
            else {
                "nargs": 2 if is_range else "+" if is_list else None,
                "metavar": ("LOW", "HIGH") if is_range else "NAME=SHARE" if is_list else None,
            },
            default=argparse.SUPPRESS,
            help=setting.help.replace("%", "%%")
            + ("" if setting.default in (MISSING, None, False) else f" (default: {default})"),
        )
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists already; name a new folder.")
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed} must not be negative.")
    given = {key: getattr(arguments, key) for key in known if hasattr(arguments, key)}
    if "sounds" in given:
        if arguments.held_out is not None:
            parser.error("--held-out is for synthesised clips; with --sounds, give --splits instead.")
        if arguments.sampling_rate < MIN_RATE_OF_RECORDINGS:
            parser.error(f"--sampling-rate {arguments.sampling_rate} must be at least {MIN_RATE_OF_RECORDINGS}.")
        try:
            values = {key: convert(value, known[key].type, f"--{key}") for key, value in given.items()}
            arguments.scenes = build(SceneSettings, values | {key: getattr(arguments, key) for key in SHARED})
        except ValueError as error:
            parser.error(str(error))
        for source in (arguments.scenes.sounds, arguments.scenes.background, arguments.scenes.impulse_responses):
            if source is not None and Path(source).expanduser().resolve() in arguments.output.resolve().parents:
                parser.error(f"{arguments.output} lies in {source}, where its files would count as recordings.")
        shared = {key: getattr(arguments, key) for key in (*SHARED, "sampling_rate", "seed")}
        arguments.given = list(_as_options(given | shared))
        return arguments
    if given:
        parser.error(f"--{next(iter(given)).replace('_', '-')} is for scenes from recordings; it needs --sounds.")
    arguments.scenes = None
    _check_synthesis(parser, arguments)
    return arguments


def _as_options(values: dict[str, Any]) -> Iterator[str]:
    """Yield the words of a command line that sets options to the values."""
    for key, value in values.items():
        yield f"--{key.replace('_', '-')}"
        if value is not True:
            yield from map(str, value if isinstance(value, list) else [value])


def _check_synthesis(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Check the arguments of synthesised soundscapes and set `splits`."""
    if not 1 <= arguments.max_sources <= len(SOURCES):
        parser.error(f"--max-sources {arguments.max_sources} must lie between 1 and {len(SOURCES)}.")
    if arguments.seconds < MIN_EVENT_SECONDS:
        parser.error(f"--seconds {arguments.seconds:g} is shorter than the shortest event, {MIN_EVENT_SECONDS} s.")
    if arguments.sampling_rate < 16_000:
        parser.error(
            f"--sampling-rate {arguments.sampling_rate} must be at least 16000, because the sounds reach 7 kHz."
        )
    if arguments.held_out is None:
        arguments.held_out = 0.1
    held_out = round(arguments.held_out * arguments.clips)
    arguments.splits = {"train": arguments.clips - 2 * held_out, "validation": held_out, "test": held_out}
    arguments.splits = {split: count for split, count in arguments.splits.items() if count}
    if arguments.clips < 1 or not 0 <= arguments.held_out < 0.5 or "train" not in arguments.splits:
        parser.error(f"--clips {arguments.clips} and --held-out {arguments.held_out:g} leave no clip for training.")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    if arguments.scenes is None:
        _synthesise(arguments)
        return
    logging.basicConfig(format="%(message)s")
    try:
        _mix(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error if error.filename else f'{arguments.output}: {error}'}")


def _synthesise(arguments: argparse.Namespace) -> None:
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
            # Each worker process imports this module again and does not need matplotlib.
            from training.soundscapes.picture import plot

            plot(
                folder / "soundscapes.png",
                arguments.seconds,
                arguments.sampling_rate,
                arguments.seed,
                arguments.max_sources,
            )
    print(f"Wrote {sum(arguments.splits.values())} clips to {arguments.output}.")


def _mix(arguments: argparse.Namespace) -> None:
    # Synthesis does not need these, and would load torch for seconds in each of its processes.
    from training.data.sources import open_scene_pools
    from training.soundscapes.recorded import write_scenes

    scenes, rate, seed = arguments.scenes, arguments.sampling_rate, arguments.seed
    pools = open_scene_pools(scenes)
    with new_folder(arguments.output) as folder:
        report = write_scenes(folder, scenes, pools, rate, seed, arguments.processes)
        counts = {split: facts["scenes"] for split, facts in report["splits"].items()}
        write_scene_card(folder, counts, arguments)
        if arguments.plot:
            from training.soundscapes.picture import plot_recorded

            split = next(iter(pools))
            plot_recorded(folder / "soundscapes.png", pools[split], split, rate, seed)
    for what in ("unusable_recordings", "skipped_scenes"):
        if report[what]:
            print(f"{len(report[what])} {what.replace('_', ' ')}: {arguments.output / 'report.json'} lists them.")
    print(f"Wrote {sum(counts.values())} scenes to {arguments.output}.")


if __name__ == "__main__":
    # The default action would leave worker processes and an unfinished folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended by SIGTERM"))
    main()
