"""From a data set's [`Listing`] to the dataset folder that all commands read, and the report of what is amiss.

Rows are mixed once, in an order that follows from the split's name and size: a shard then holds every class, where the
annotations go class by class.
"""

import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import soundfile
from tqdm import tqdm

from training.data.seeding import generator_for
from training.data.sources import AUDIO_SUFFIXES
from training.preparation.listing import (
    Clip,
    Listing,
    PreparationError,
    with_files,
    with_known_labels,
    without_duplicates,
)
from training.preparation.shards import write_labels, write_shards

# As `datasets` cuts what it pushes to the Hub, roughly: few files, and more than one for most data sets.
MAX_SHARD_BYTES = 1 << 28
MAX_SHARD_ROWS = 50_000
# Paths are small: a row group of 50 of them would be mostly header.
ROWS_PER_GROUP, PATHS_PER_GROUP = 50, 1000
# Suffixes that a loader may read with torchcodec, while libsndfile cannot.
UNCHECKED_SUFFIXES = AUDIO_SUFFIXES - {f".{name.lower()}" for name in soundfile.available_formats()}


def write_folder(folder: Path, listing: Listing, by_path: bool) -> dict[str, Any]:
    """Writes `data/*.parquet` and `labels.csv` into an empty folder.

    Args:
        by_path: Whether to refer to sound files by their absolute path, instead of copying their bytes.

    Returns:
        The report: clips per split and class, and the findings.

    Raises:
        PreparationError: If there is no clip to write, one is in two splits, or a split has a name that `datasets`
            does not take.
    """
    findings = listing.findings
    clips = with_known_labels(with_files(without_duplicates(listing.clips, findings), listing), listing)
    splits = {
        split: [clip for clip in clips if clip.split == split] for split in dict.fromkeys(c.split for c in clips)
    }
    for split in splits:
        if not re.fullmatch(r"\w+", split):
            raise PreparationError(f"A split cannot be called {split!r}: letters, digits and _ are what it may have.")
    columns = features(listing)
    report: dict[str, Any] = {"splits": {}}
    with tqdm(total=len(clips), unit="clip", desc="Clips") as progress:
        for split, members in splits.items():
            counts: Counter[str] = Counter()
            order = generator_for("preparation", split).permutation(len(members))
            size = write_shards(
                folder,
                split,
                _rows([members[i] for i in order], columns, by_path, listing, counts, progress),
                columns,
                max_rows=MAX_SHARD_ROWS,
                max_bytes=MAX_SHARD_BYTES,
                rows_per_group=PATHS_PER_GROUP if by_path else ROWS_PER_GROUP,
            )
            if size:
                report["splits"][split] = {"clips": size, "classes": {name: counts[name] for name in listing.classes}}
    if not report["splits"]:
        raise PreparationError(f"There is no clip to write: {findings.describe() or 'nothing is listed'}")
    write_labels(folder, listing.classes, listing.ids)
    totals = sum((Counter(split["classes"]) for split in report["splits"].values()), Counter())
    findings.add("classes_without_clip", *(name for name in listing.classes if not totals[name]))
    return report


def features(listing: Listing) -> datasets.Features:
    columns = {
        "id": datasets.Value("string"),
        "audio": datasets.Audio(),
        "labels": datasets.List(datasets.Value("string")),
    }
    if listing.has_events:
        columns["events"] = datasets.List(
            {
                "label": datasets.Value("string"),
                "onset": datasets.Value("float64"),
                "offset": datasets.Value("float64"),
            }
        )
    if listing.has_sources:
        columns["num_sources"] = datasets.Value("int32")
    return datasets.Features(columns)


def _rows(
    clips: Sequence[Clip],
    columns: datasets.Features,
    by_path: bool,
    listing: Listing,
    counts: Counter[str],
    progress: tqdm,
) -> Iterator[dict[str, Any]]:
    """The rows of the clips that can be read, counting their labels."""
    for clip in clips:
        progress.update()
        try:
            audio = _audio(clip, by_path)
        except (OSError, soundfile.LibsndfileError) as error:
            if isinstance(error, OSError) or clip.path.suffix.lower() not in UNCHECKED_SUFFIXES:
                listing.findings.add("unreadable_files", listing.name(clip.path))
                continue
            listing.findings.add("unchecked_files", listing.name(clip.path))
            audio = {"bytes": None if by_path else clip.path.read_bytes(), "path": _name(clip, by_path)}
        counts.update(clip.labels)
        row = {
            "id": clip.id,
            "audio": audio,
            "labels": clip.labels,
            "events": [event._asdict() for event in clip.events],
            "num_sources": len(clip.labels),
        }
        yield {name: row[name] for name in columns}


def _name(clip: Clip, by_path: bool) -> str:
    return os.path.abspath(clip.path) if by_path else clip.path.name


def _audio(clip: Clip, by_path: bool) -> dict[str, Any]:
    """The encoded audio or its path, its header checked.

    Raises:
        OSError, soundfile.LibsndfileError: If it cannot be read.
    """
    if clip.span is not None:
        samples, rate = soundfile.read(clip.path, start=clip.span[0], stop=clip.span[1], dtype="int16")
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
        return {"bytes": file.getvalue(), "path": f"{clip.id.replace('/', '-')}.wav"}
    if not clip.path.stat().st_size:
        raise OSError(f"{clip.path} is empty.")
    encoded = None if by_path else clip.path.read_bytes()
    if not soundfile.info(str(clip.path) if by_path else io.BytesIO(encoded)).frames:
        raise OSError(f"{clip.path} has no samples.")
    return {"bytes": encoded, "path": _name(clip, by_path)}
