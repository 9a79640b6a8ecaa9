"""The annotations of a data set before any sound is read: its clips, its classes and its findings.

Each data set has a module in this package with a function `list_clips`, which returns a [`Listing`] of a downloaded
folder. All data sets share the rest of the code.

Annotations that cannot be read, or that put a clip into two splits, raise [`PreparationError`]. Any other problem is a
finding, which the report counts and names.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from modeling_sslam.common.recordings import search_folder
from modeling_sslam.common.text import read_utf8

# Kinds of findings, and the fate of the clip, file, row or label in question.
FINDINGS = {
    "missing_files": "listed, but the file does not exist; left out",
    "unlisted_files": "the file exists, but is not listed; left out",
    "unreadable_files": "libsndfile finds no header or no samples; left out",
    "unchecked_files": "in a format that torchcodec can read and libsndfile cannot; kept",
    "duplicated_rows": "listed again with the same content; counted once",
    "conflicting_rows": "listed again with other content, or unlike the published data set; the first is kept",
    "unknown_labels": "not one of the classes; removed from the clip",
    "clips_without_known_label": "every label is unknown; left out",
    "clips_without_label": "annotated to have none of the classes; kept",
    "clips_without_annotation": "listed without labels; left out",
    "replaced_clips": "in the testing list, which --test-set replaces; left out",
    "labels_without_clip": "labels of a clip that is not listed; left out",
    "classes_without_clip": "no clip has the class; kept in labels.csv",
    "ignored_annotations": "annotation files without labels; not read",
    "noise_files": "background noise, which is not a class; left out",
}

# A download may lack a million files. The first names show what the missing files have in common.
NAMES_KEPT, NAMES_SHOWN = 20, 3
# Key of the cells in a row that exceed the number of columns.
SURPLUS = "surplus cells"


class PreparationError(Exception):
    """The data cannot be prepared; the message names the cause and the remedy."""


class Findings:
    """Problems in a data set: for each kind in `FINDINGS`, the number of findings and the first names."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, *names: Any, show: Callable[[Any], str] = str) -> None:
        """Count findings of one kind.

        Args:
            kind: A key of `FINDINGS`.
            *names: The clip, file, row or label of each finding.
            show: Converts a name to text. It is called only for the names that are kept.
        """
        for name in names:
            entry = self.found.setdefault(kind, {"count": 0, "meaning": FINDINGS[kind], "first": []})
            entry["count"] += 1
            if entry["count"] <= NAMES_KEPT:
                entry["first"].append(show(name))

    def describe(self) -> str:
        """Return one line of text for each kind."""
        return "\n".join(
            f"{kind.replace('_', ' ')} ({entry['meaning']}): {entry['count']}, "
            + ", ".join(entry["first"][:NAMES_SHOWN])
            + (", ..." if entry["count"] > NAMES_SHOWN else "")
            for kind, entry in self.found.items()
        )


class AnnotatedEvent(NamedTuple):
    """One sound event in a clip, with onset and offset in seconds."""

    label: str
    onset: float
    offset: float


@dataclass(frozen=True)
class Clip:
    """An annotated clip.

    Attributes:
        id: Name of the clip, unique in the data set.
        split: Name of its split.
        path: Sound file.
        labels: Names or machine ids of its classes.
        events: Its sound events, where they are annotated.
        span: Samples `[start, stop)` to cut out of the file; `None` for the whole file.
    """

    id: str
    split: str
    path: Path
    labels: tuple[str, ...]
    events: tuple[AnnotatedEvent, ...] = ()
    span: tuple[int, int] | None = None


@dataclass
class Listing:
    """An annotated data set.

    Attributes:
        root: Folder of the sound files; findings show paths relative to it.
        clips: Clips as annotated.
        classes: Display names of the classes in the order of the classifier's outputs.
        files: Sound files that exist. A file without a clip is a finding.
        ids: Machine ids of the classes. Empty if there are none.
        has_events: Whether clips have annotated events, which become the column `events`.
        has_sources: Whether the labels of a clip name all its sources. Their number then becomes `num_sources`.
        findings: Problems found so far.
    """

    root: Path
    clips: list[Clip]
    classes: Sequence[str]
    files: list[Path]
    ids: Sequence[str | None] = ()
    has_events: bool = False
    has_sources: bool = False
    findings: Findings = field(default_factory=Findings)

    def name(self, path: Path) -> str:
        """Return a path as findings show it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)


def sound_files(folder: Path) -> list[Path]:
    """Return all sound files under a folder, sorted by name. Symbolic links are followed last."""
    return [Path(path) for path in search_folder(str(folder))]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file.

    Raises:
        PreparationError: If the file cannot be read.
    """
    try:
        return re.split(r"\r\n|\r|\n", read_utf8(path).rstrip("\r\n"))
    except (OSError, ValueError) as error:
        raise PreparationError(f"{path} cannot be read: {error}.") from error


def read_table(path: Path, columns: Iterable[str], delimiter: str = ",") -> Iterator[dict[str, str]]:
    """Yield the rows of a table with a header. Missing cells at the end of a row are empty strings.

    Args:
        path: Table to read.
        columns: Columns that it must have.
        delimiter: Separator of the cells.

    Raises:
        PreparationError: If the table cannot be read or lacks one of the columns, or a row has more cells.
    """
    reader = csv.DictReader(read_lines(path), delimiter=delimiter, restval="", restkey=SURPLUS)
    if missing := [name for name in columns if name not in (reader.fieldnames or [])]:
        raise PreparationError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['none'])}."
        )
    for row in reader:
        if any(row.pop(SURPLUS, ())):
            raise PreparationError(
                f"{path}, line {reader.line_num} has more than {len(reader.fieldnames or [])} cells. Put cells that "
                f"contain {delimiter!r} into quotes."
            )
        yield row


def without_duplicates(clips: Iterable[Clip], findings: Findings) -> list[Clip]:
    """Return the first clip of each id. Repetitions become findings.

    Raises:
        PreparationError: If a clip is in two splits, because test clips must not be trained on.
    """
    kept: dict[str, Clip] = {}
    for clip in clips:
        first = kept.setdefault(clip.id, clip)
        if first is clip:
            continue
        if first.split != clip.split:
            raise PreparationError(
                f"{clip.id} is listed in the split {first.split} and in {clip.split}. A clip must be in one split: "
                "remove it from one of the annotation files."
            )
        findings.add("duplicated_rows" if first == clip else "conflicting_rows", clip.id)
    return list(kept.values())


def with_known_labels(clips: Iterable[Clip], listing: Listing) -> list[Clip]:
    """Replace machine ids by display names, and keep each label once. Unknown labels become findings.

    A clip whose labels are all unknown is left out.
    """
    names = {name: name for name in listing.classes}
    if listing.ids:
        names |= {id_: name for id_, name in zip(listing.ids, listing.classes, strict=True) if id_}
    kept = []
    for clip in clips:
        known = tuple(dict.fromkeys(names[label] for label in clip.labels if label in names))
        listing.findings.add(
            "unknown_labels", *(f"{label} ({clip.id})" for label in dict.fromkeys(clip.labels) if label not in names)
        )
        if clip.labels and not known:
            listing.findings.add("clips_without_known_label", clip.id)
            continue
        if not clip.labels:
            listing.findings.add("clips_without_label", clip.id)
        events = tuple(event._replace(label=names[event.label]) for event in clip.events if event.label in names)
        kept.append(replace(clip, labels=known, events=events))
    return kept


def with_files(clips: Iterable[Clip], listing: Listing) -> list[Clip]:
    """Return the clips whose files exist. Missing files and files without a clip become findings."""
    clips, existing = list(clips), set(listing.files)
    listing.findings.add(
        "missing_files", *(clip.path for clip in clips if clip.path not in existing), show=listing.name
    )
    listed = {clip.path for clip in clips}
    listing.findings.add("unlisted_files", *(path for path in listing.files if path not in listed), show=listing.name)
    return [clip for clip in clips if clip.path in existing]
