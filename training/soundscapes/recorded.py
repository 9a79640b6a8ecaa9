"""Write a data set of scenes mixed from recordings: shards, table of events, JAMS files and report."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from tqdm import tqdm

from modeling_sslam.common.errors import ClipError
from training.arguments import to_yaml
from training.data.mixing.mixer import Event, Fault
from training.data.mixing.pools import Pool, scene_id
from training.data.mixing.settings import SceneSettings
from training.data.seeding import generator_for
from training.preparation.shards import write_labels, write_shards
from training.soundscapes.encoding import encode_flac
from training.soundscapes.jams import jams_of
from training.soundscapes.parallel import map_in_order

CLIPS_PER_SHARD = 250
SETTINGS_FILE = "scenes.yaml"
# Columns of events.csv beside the scene's name, and the fields of an event that they hold.
EVENT_COLUMNS = {
    "onset": "onset",
    "offset": "offset",
    "label": "label",
    "snr_db": "snr",
    "source_file": "source_file",
    "pitch": "pitch",
    "stretch": "stretch",
    "source_group": "source_group",
    "source_time": "source_time",
    "impulse_response": "impulse_response",
}

# The pools of this process. Each worker process receives them once and not with each scene.
_pools: dict[str, Pool] = {}


class Mixed(NamedTuple):
    """A row of the data set, or `None` if no recording was usable, and the unusable recordings."""

    id: str
    row: dict[str, Any] | None
    faults: list[Fault]


def _set_pools(pools: dict[str, Pool]) -> None:
    _pools.clear()
    _pools.update(pools)


def columns(rate: int) -> datasets.Features:
    """Return the columns of the data set for scenes at a sampling rate in Hz.

    They are the columns of synthesised soundscapes, with the origin of each event in addition.
    """
    text, number = datasets.Value("string"), datasets.Value("float64")
    kinds = {"label": text, "source_file": text, "source_group": text, "impulse_response": text}
    return datasets.Features(
        {
            "id": text,
            "audio": datasets.Audio(sampling_rate=rate),
            "labels": datasets.List(text),
            "events": datasets.List({name: kinds.get(name, number) for name in Event._fields}),
            "num_sources": datasets.Value("int32"),
            "source_groups": datasets.List(text),
            "background": text,
            "level": number,
        }
    )


def make_scene_row(item: tuple[str, int], seed: int, rate: int) -> Mixed:
    """Mix a scene and encode it as FLAC.

    Args:
        item: The split and the index of the scene in it. Together with `seed`, they determine the scene.
        seed: Seed of the data set.
        rate: Sampling rate in Hz.
    """
    split, index = item
    id_, mixer = scene_id(split, index), _pools[split].mixer
    try:
        scene = mixer.mix(generator_for(seed, "scene", 0, id_), round(mixer.settings.seconds * rate), rate)
    except ClipError as error:
        return Mixed(id_, None, [Fault(id_, error.reason, str(error))])
    row = {
        "id": id_,
        "audio": {"bytes": encode_flac(scene.waveform, rate), "path": f"{id_}.flac"},
        "labels": scene.labels,
        "events": [event._asdict() for event in scene.events],
        "num_sources": len(scene.events),
        "source_groups": sorted({event.source_group for event in scene.events}),
        "background": scene.background,
        "level": scene.level,
    }
    return Mixed(id_, row, scene.faults)


def write_scenes(
    folder: Path, settings: SceneSettings, pools: dict[str, Pool], rate: int, seed: int, num_processes: int
) -> dict[str, Any]:
    """Write the shards, `events.csv`, `labels.csv`, `jams/`, `scenes.yaml` and `report.json` of a data set.

    Args:
        folder: Folder to write into.
        settings: The settings of the pools.
        pools: The mixer and number of scenes of each split.
        rate: Sampling rate in Hz.
        seed: Seed of the data set.
        num_processes: Number of processes that mix scenes. The data do not depend on it.

    Returns:
        The report: scenes, recordings and events by split, and the recordings and scenes that were skipped.

    Raises:
        ValueError: If no scene of a split could be mixed.
    """
    write_labels(folder, sorted({label for pool in pools.values() for label in pool.mixer.labels}))
    (folder / SETTINGS_FILE).write_text(to_yaml(with_absolute_paths(settings)), encoding="utf-8")
    items = [(split, i) for split, pool in pools.items() for i in range(pool.num_scenes)]
    make = partial(make_scene_row, seed=seed, rate=rate)
    results = map_in_order(make, items, num_processes, _set_pools, (pools,))
    scenes = iter(tqdm(results, total=len(items), unit="scene", desc="Scenes"))
    report: dict[str, Any] = {"splits": {}, "unusable_recordings": {}, "skipped_scenes": {}}
    with open(folder / "events.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file", *EVENT_COLUMNS))

        def usable(split: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
            """Yield the rows of a split. Write and count the events of each row, and write its JAMS file."""
            for id_, row, faults in islice(scenes, pools[split].num_scenes):
                if row is None:
                    report["skipped_scenes"][id_] = faults[0].message
                    continue
                report["unusable_recordings"].update((fault.id, fault.message) for fault in faults)
                for event in row["events"]:
                    counts[event["label"]] += 1
                    table.writerow((id_, *(event[name] for name in EVENT_COLUMNS.values())))
                annotation = json.dumps(jams_of(row, settings.seconds), indent=1, ensure_ascii=False)
                (folder / "jams" / split / f"{id_}.jams").write_text(annotation, encoding="utf-8")
                yield row

        for split, pool in pools.items():
            (folder / "jams" / split).mkdir(parents=True)
            counts: Counter[str] = Counter()
            num_scenes = write_shards(folder, split, usable(split, counts), columns(rate), max_rows=CLIPS_PER_SHARD)
            if not num_scenes:
                raise ValueError(
                    f"No scene of {split} could be mixed: {next(iter(report['skipped_scenes'].values()))}"
                )
            report["splits"][split] = {
                "scenes": num_scenes,
                "recordings": len(pool.mixer.sounds),
                "originals": len(set(pool.mixer.sounds.groups)),
                "events": {label: counts[label] for label in pool.mixer.labels},
            }
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def with_absolute_paths(settings: SceneSettings) -> SceneSettings:
    """Return the settings with absolute paths, so that their file can lie in any folder."""
    return replace(
        settings,
        sounds=_absolute(settings.sounds),
        background=settings.background and _absolute(settings.background),
        impulse_responses=settings.impulse_responses and _absolute(settings.impulse_responses),
    )


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
