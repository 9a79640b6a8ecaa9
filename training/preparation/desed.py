"""DESED: recorded and synthesised domestic soundscapes of 10 s, 10 classes (Turpault et al. 2019).

SOURCE is the data set as downloaded: a tree of tables such as `metadata/train/weak.tsv`, and a tree of sounds such as
`audio/train/weak/*.wav`.

A table has a header and one of two sets of columns:

- `filename`, `onset`, `offset` and `event_label`: one row for each event. A clip without events has an empty label;
- `filename` and `event_labels`: one row for each clip, with its labels separated by commas.

Tables without labels (durations, unlabelled clips) are not read. The first folder below `metadata` is the split:
train, validation, or eval, which becomes test.

A sound that `metadata/SPLIT/.../TABLE.tsv` lists is searched by its name under `audio/SPLIT/...`. Folders named TABLE
come first, then folders whose names begin with TABLE, such as `weak_16k` for `weak`.

`--annotations train=train.tsv test=eval.csv` names other tables (paths in SOURCE; commas separate the cells of a
`.csv`), and further options name other columns. With `--annotations`, sounds are searched in all of SOURCE. Classes
are in alphabetical order.
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
        "help": "tables of each split, instead of those under metadata/",
    },
    "file_column": {"default": "filename", "help": "column with the file name (default: filename)"},
    "label_column": {"default": "event_label", "help": "column with the class (default: event_label)"},
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
    """List the clips of DESED; the module describes the files and the options."""
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
        for name, events_of_clip in events.items():
            candidates = [path for path in by_name[Path(name).name] if path.is_relative_to(folder)]
            path = _nearest(candidates, name, table, folder) or folder / name
            id_ = path.relative_to(source).with_suffix("").as_posix()
            clips.append(Clip(id_, split, path, labels_of(events_of_clip), tuple(events_of_clip) if is_strong else ()))
    return Listing(source, clips, CLASSES, files, has_events=has_events, has_sources=True, findings=findings)


def _tables(source: Path, annotations: list[str] | None) -> list[tuple[str, Path, Path]]:
    """Return the splits, their tables, and the folder with the sounds of each table.

    Args:
        source: Folder of the data set.
        annotations: Items `SPLIT=TABLE`; `None` for the tables under `metadata`.

    Raises:
        PreparationError: If there is no table, or an item is not `SPLIT=TABLE`.
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
    """Split a path at a folder name, like `str.partition`: the parts before, whether it occurs, the parts after."""
    at = parts.index(name) if name in parts else len(parts)
    return parts[:at], at < len(parts), parts[at + 1 :]


def _nearest(paths: list[Path], name: str, table: Path, folder: Path) -> Path | None:
    """Choose the file to which a name in a table refers, or return `None` if there is none.

    Files in a folder with the table's name come first, then files in a folder whose name begins with the table's name.
    If several remain, the one with the shortest path is chosen, provided that the paths of the other folders only
    extend the path of its folder (`weak`, `weak_16k`).

    Args:
        paths: Files below `folder` with that file name.
        name: Entry of the table, a file name with or without folders.
        table: The table.
        folder: Folder with the sounds of the table.

    Raises:
        PreparationError: If several files remain.
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
                f"{table} lists {name}, which may be {first} or {other}. Rename the folder of sounds to the table's "
                "name, or write the folder before the file's name in the table."
            )
    return first
