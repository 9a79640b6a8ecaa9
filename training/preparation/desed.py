"""DESED and IDMT-DESED-FL: domestic soundscapes of 10 s, 10 classes (Turpault et al. 2019; Johnson et al. 2021).

As downloaded, DESED is a tree of tables `metadata/REST.tsv` and one of sounds `audio/REST/*.wav` (or `audio/REST_16k`,
or one folder higher). A table has a header, and the columns `filename`, `onset`, `offset` and `event_label` with a
line for each event (an empty label for a clip without any), or `filename` and `event_labels` with the labels of a
clip, separated by commas. The first folder of REST gives the split: train, validation, or, for eval, test. Tables
without labels (durations, unlabelled clips) are not read. Classes are in alphabetical order.

How IDMT-DESED-FL lays out its files is not documented in public: name its tables with `--annotations
train=train.tsv test=eval.csv` (paths in SOURCE; a `.csv` is separated by commas), and their columns if they differ. A
sound is then looked for by its name, nearest to the table first.
"""

from collections import defaultdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from training.preparation.events import Columns, labels_of, read_events
from training.preparation.listing import (
    Clip,
    Event,
    Findings,
    Listing,
    PreparationError,
    read_lines,
    read_table,
    sound_files,
)

CLASSES = [
    "Alarm_bell_ringing", "Blender", "Cat", "Dishes", "Dog", "Electric_shaver_toothbrush", "Frying", "Running_water",
    "Speech", "Vacuum_cleaner",
]  # fmt: skip
SPLITS = {"train": "train", "validation": "validation", "eval": "test", "test": "test"}
WEAK_LABELS = "event_labels"
OPTIONS: dict[str, dict[str, Any]] = {
    "annotations": {
        "nargs": "+",
        "metavar": "SPLIT=TABLE",
        "help": "tables of each split, in place of those under metadata/",
    },
    "file_column": {"default": "filename", "help": "column with the file's name (default: filename)"},
    "label_column": {"default": "event_label", "help": "column with the event's class (default: event_label)"},
    "onset_column": {"default": "onset", "help": "column with the onset in seconds (default: onset)"},
    "offset_column": {"default": "offset", "help": "column with the offset in seconds (default: offset)"},
}


def list_clips(
    source: Path,
    annotations: list[str] | None = None,
    file_column: str = "filename",
    label_column: str = "event_label",
    onset_column: str = "onset",
    offset_column: str = "offset",
) -> Listing:
    """See [`training.preparation.desed`]."""
    columns, findings = Columns(file_column, label_column, onset_column, offset_column), Findings()
    files = sound_files(source)
    by_name: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        by_name[path.name].append(path)
    clips, has_events = [], False
    for split, table in _tables(source, annotations):
        header = _header(table)
        if label_column in header:
            events, is_strong = read_events(table, columns, findings), True
        elif WEAK_LABELS in header:
            events, is_strong = _read_weak(table, file_column), False
        else:
            findings.add("ignored_annotations", str(table.relative_to(source)))
            continue
        has_events |= is_strong
        for name, of_clip in events.items():
            path = _nearest(by_name[Path(name).name], table) or source / "audio" / name
            id_ = path.relative_to(source).with_suffix("").as_posix()
            clips.append(Clip(id_, split, path, labels_of(of_clip), tuple(of_clip) if is_strong else ()))
    return Listing(source, clips, CLASSES, files, has_events=has_events, has_sources=True, findings=findings)


def _tables(source: Path, annotations: list[str] | None) -> list[tuple[str, Path]]:
    """Splits and their tables.

    Raises:
        PreparationError: If there is none, or an argument is not SPLIT=TABLE.
    """
    if annotations:
        pairs = [(split, source / name) for split, _, name in (item.partition("=") for item in annotations)]
        for item, (split, table) in zip(annotations, pairs, strict=True):
            if not split.isidentifier() or not table.is_file():
                raise PreparationError(f"--annotations {item} is not SPLIT=TABLE with a table in {source}.")
        return pairs
    pairs = []
    for table in sorted(source.rglob("*.tsv")):
        parts = table.relative_to(source).with_suffix("").parts
        below = parts[parts.index("metadata") + 1 :] if "metadata" in parts else ()
        if below and below[0] in SPLITS:
            pairs.append((SPLITS[below[0]], table))
    if not pairs:
        raise PreparationError(
            f"{source} has no metadata/{{{','.join(SPLITS)}}}/*.tsv; name the tables with --annotations SPLIT=TABLE."
        )
    return pairs


def _header(table: Path) -> list[str]:
    return read_lines(table)[0].split("," if table.suffix.lower() == ".csv" else "\t")


def _read_weak(table: Path, file_column: str) -> dict[str, list[Event]]:
    """Labels of clips as events without times."""
    rows = read_table(table, (file_column, WEAK_LABELS), "," if table.suffix.lower() == ".csv" else "\t")
    return {
        row[file_column]: [Event(label.strip(), 0.0, 0.0) for label in row[WEAK_LABELS].split(",") if label.strip()]
        for row in rows
    }


def _nearest(paths: list[Path], table: Path) -> Path | None:
    """Of files of the same name the one whose folders are most like the table's path, without its `metadata`.

    Folders that are left over on either side count against it, so that `train/weak` is preferred to `train/weak_16k`.
    """
    wanted = [part for part in table.with_suffix("").parts if part != "metadata"]

    def likeness(path: Path) -> tuple[int, int, str]:
        folders = [part for part in path.parent.parts if part != "audio"]
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(folders, wanted, strict=False)))
        return common, -len(folders), str(path)

    return max(paths, key=likeness, default=None)
