"""What a data set's annotations say, before any sound is read: its clips, its classes, and what is amiss.

Every data set has a function from the folder it was downloaded to, to a [`Listing`]; the rest is shared. Annotations
that cannot be read or contradict each other about what to train on are an error; anything else that is amiss is a
finding: counted, named, and said what became of it.
"""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from training.data.sources import AUDIO_SUFFIXES

# The kinds of findings and what became of them.
FINDINGS = {
    "missing_files": "listed, but not there; left out",
    "unlisted_files": "there, but not listed; left out",
    "unreadable_files": "without a header or samples that libsndfile can read; left out",
    "unchecked_files": "of a format that torchcodec reads, not libsndfile; kept",
    "duplicated_rows": "listed again in the same way; counted once",
    "conflicting_rows": "listed again in another way, or not as the data set is published; the first is kept",
    "unknown_labels": "none of the classes; not among the clip's labels",
    "clips_without_known_label": "whose every label is unknown; left out",
    "clips_without_label": "that are annotated to have none of the classes; kept",
    "clips_without_annotation": "listed without labels; left out",
    "replaced_clips": "of the testing list, in whose place stands --test-set; left out",
    "labels_without_clip": "labels for which no clip is listed; left out",
    "classes_without_clip": "classes that no clip has; kept in labels.csv",
    "ignored_annotations": "annotation files that do not say what is in a clip; not read",
    "noise_files": "background noise, which is no class of its own; left out",
}

# A download may lack a million files: their first names tell what they have in common.
NAMES_KEPT, NAMES_SHOWN = 20, 3


class PreparationError(Exception):
    """Data that cannot be prepared; the message says why and what to do."""


class Findings:
    """What is amiss: of each of the `FINDINGS` how many, and the first names."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, *names: Any, show: Callable[[Any], str] = str) -> None:
        for name in names:
            entry = self.found.setdefault(kind, {"count": 0, "meaning": FINDINGS[kind], "first": []})
            entry["count"] += 1
            if entry["count"] <= NAMES_KEPT:
                entry["first"].append(show(name))

    def describe(self) -> str:
        """A line for each kind."""
        return "\n".join(
            f"{kind.replace('_', ' ')} ({entry['meaning']}): {entry['count']}, "
            + ", ".join(entry["first"][:NAMES_SHOWN])
            + (", ..." if entry["count"] > NAMES_SHOWN else "")
            for kind, entry in self.found.items()
        )


class Event(NamedTuple):
    """One sound in a clip; onset and offset in seconds."""

    label: str
    onset: float
    offset: float


@dataclass(frozen=True)
class Clip:
    """A clip as it is annotated.

    Args:
        labels: Names or machine ids of its classes.
        span: First and last + 1 sample to cut out of the file; the whole file if not given.
    """

    id: str
    split: str
    path: Path
    labels: tuple[str, ...]
    events: tuple[Event, ...] = ()
    span: tuple[int, int] | None = None


@dataclass
class Listing:
    """A data set as it is annotated.

    Args:
        root: Folder of the sound files, by which findings name them.
        classes: Display names in the order of a classifier's outputs.
        files: The sound files that are there, of which each is expected to be listed.
        ids: The classes' machine ids, where they have.
        has_sources: Whether a clip's labels are the sources that sound in it: then their number goes along.
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
        """A path as findings show it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)


def sound_files(folder: Path) -> list[Path]:
    """All sound files under a folder, also behind symbolic links, in order of their names."""
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(root, name)
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not name.startswith(".")
        ]
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text.

    Raises:
        PreparationError: If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PreparationError(f"{path} cannot be read: {error}.") from error


def read_table(path: Path, columns: Iterable[str], delimiter: str = ",") -> Iterator[dict[str, str]]:
    """The rows of a table with a header, which must have these columns. What a short row lacks is empty.

    Raises:
        PreparationError: If it cannot be read or lacks one of the columns.
    """
    reader = csv.DictReader(read_lines(path), delimiter=delimiter, restval="")
    if missing := [name for name in columns if name not in (reader.fieldnames or [])]:
        raise PreparationError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ['none'])}."
        )
    yield from reader


def without_duplicates(clips: Iterable[Clip], findings: Findings) -> list[Clip]:
    """Each id once, the first time.

    Raises:
        PreparationError: If a clip is in two splits: what is tested on must not be trained on.
    """
    kept: dict[str, Clip] = {}
    for clip in clips:
        first = kept.setdefault(clip.id, clip)
        if first is clip:
            continue
        if first.split != clip.split:
            raise PreparationError(
                f"{clip.id} is listed in the split {first.split} and in {clip.split}. A clip that is trained on must "
                "not be tested on: take it out of one of the annotation files."
            )
        findings.add("duplicated_rows" if first == clip else "conflicting_rows", clip.id)
    return list(kept.values())


def with_known_labels(clips: Iterable[Clip], listing: Listing) -> list[Clip]:
    """Clips whose labels and events go by the display names of classes, each label once; the others are findings."""
    names = {name: name for name in listing.classes}
    names |= {id_: name for id_, name in zip(listing.ids, listing.classes) if id_}  # noqa: B905 - there may be no ids
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
    """Clips whose file is there; those that are not, and files that no clip is made of, are findings."""
    clips, there = list(clips), set(listing.files)
    listing.findings.add("missing_files", *(clip.path for clip in clips if clip.path not in there), show=listing.name)
    listed = {clip.path for clip in clips}
    listing.findings.add("unlisted_files", *(path for path in listing.files if path not in listed), show=listing.name)
    return [clip for clip in clips if clip.path in there]
