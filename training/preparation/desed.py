"""DESED: recorded and synthesised domestic soundscapes of 10 s, 10 classes (Turpault et al. 2019).

As downloaded, DESED is a tree of tables, such as `metadata/train/weak.tsv`, and one of sounds, such as
`audio/train/weak/*.wav`. A sound is looked for by its name below the table's folder, with `audio` for `metadata`, and
there first in folders that are called as the table, or as the table and more (`weak_16k`). A table has a header, and
the columns `filename`, `onset`, `offset` and `event_label` with a line for each event (an empty label for a clip
without any), or `filename` and `event_labels` with the labels of a clip, separated by commas. The first folder gives
the split: train, validation, or, for eval, test. Tables without labels (durations, unlabelled clips) are not read.
Classes are in alphabetical order.

Where the tables are elsewhere or have other columns, options name them (`--annotations train=train.tsv test=eval.csv`,
paths in SOURCE; a `.csv` is separated by commas). Sounds are then looked for in all of SOURCE.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from training.preparation.events import Columns, delimiter_of, labels_of, read_events
from training.preparation.listing import Clip, Findings, Listing, PreparationError, read_lines, sound_files

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
    for split, table, folder in _tables(source, annotations):
        header = read_lines(table)[0].split(delimiter_of(table))
        is_strong = label_column in header
        if not is_strong and WEAK_LABELS not in header:
            findings.add("ignored_annotations", str(table.relative_to(source)))
            continue
        events = read_events(
            table, columns if is_strong else Columns(file_column, WEAK_LABELS, separator=","), findings
        )
        has_events |= is_strong
        for name, of_clip in events.items():
            candidates = [path for path in by_name[Path(name).name] if path.is_relative_to(folder)]
            path = _nearest(candidates, name, table, folder) or folder / name
            id_ = path.relative_to(source).with_suffix("").as_posix()
            clips.append(Clip(id_, split, path, labels_of(of_clip), tuple(of_clip) if is_strong else ()))
    return Listing(source, clips, CLASSES, files, has_events=has_events, has_sources=True, findings=findings)


def _tables(source: Path, annotations: list[str] | None) -> list[tuple[str, Path, Path]]:
    """Splits, their tables, and the folder under which the sounds of each are.

    Raises:
        PreparationError: If there is none, or an argument is not SPLIT=TABLE.
    """
    if annotations:
        named = [(split, source / name, source) for split, _, name in (item.partition("=") for item in annotations)]
        for item, (split, table, _) in zip(annotations, named, strict=True):
            if not split or not table.is_file():
                raise PreparationError(f"--annotations {item} is not SPLIT=TABLE with a table in {source}.")
        return named
    found = []
    for table in sorted(source.rglob("*.tsv")):
        above, metadata, below = _partition(table.relative_to(source).parts, "metadata")
        if metadata and below[0] in SPLITS:
            found.append((SPLITS[below[0]], table, source.joinpath(*above, "audio", *below[:-1])))
    if not found:
        raise PreparationError(
            f"{source} has no metadata/{{{','.join(SPLITS)}}}/*.tsv; name the tables with --annotations SPLIT=TABLE."
        )
    return found


def _partition(parts: tuple[str, ...], name: str) -> tuple[tuple[str, ...], bool, tuple[str, ...]]:
    """What is before and after a name, and whether it is there, as `str.partition` does."""
    at = parts.index(name) if name in parts else len(parts)
    return parts[:at], at < len(parts), parts[at + 1 :]


def _nearest(paths: list[Path], name: str, table: Path, folder: Path) -> Path | None:
    """Of the files below a folder that a table may mean by a name, the one whose own folders are most like the table's
    name; of two such, where one is called as the other and more (`weak_16k`), the other.

    Raises:
        PreparationError: If that is true of several.
    """
    paths = [path for path in paths if path.parts[-len(Path(name).parts) :] == Path(name).parts]
    if not paths:
        return None

    def likeness(path: Path) -> tuple[bool, bool]:
        folders = path.parent.relative_to(folder).parts
        return table.stem in folders, any(part.startswith(table.stem) for part in folders)

    best = max(map(likeness, paths))
    first, *others = sorted((path for path in paths if likeness(path) == best), key=lambda path: len(str(path)))
    for other in others:
        if not str(other.parent).startswith(str(first.parent)):
            raise PreparationError(
                f"{table} lists {name}, which may be {first} or {other}. Call the folder of sounds as the table, or "
                "put it before the name in the table."
            )
    return first
