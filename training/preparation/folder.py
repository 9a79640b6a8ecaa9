"""Write a data set's [`Listing`] as a dataset folder, and report its clips.

Annotations often list the clips sorted by class. The rows are therefore shuffled once, which distributes the classes
over all shards. The name and the size of a split determine the order.
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

from modeling_sslam.common.recordings import AUDIO_SUFFIXES, LIBSNDFILE_SUFFIXES
from training.data.seeding import generator_for
from training.preparation.listing import (
    Clip,
    Listing,
    PreparationError,
    with_files,
    with_known_labels,
    without_duplicates,
)
from training.preparation.shards import write_labels, write_shards

# About the shard size of `datasets.push_to_hub`, which gives few files, but more than one for most data sets.
MAX_SHARD_BYTES = 1 << 28
MAX_SHARD_ROWS = 50_000
# A row group of only 50 paths would be mostly header.
ROWS_PER_GROUP, PATHS_PER_GROUP = 50, 1000
# Formats that libsndfile cannot read, but the loader may read with torchcodec.
UNCHECKED_SUFFIXES = AUDIO_SUFFIXES - {f".{name}" for name in LIBSNDFILE_SUFFIXES}


def write_listing(folder: Path, listing: Listing, by_path: bool) -> dict[str, Any]:
    """Write `data/*.parquet` and `labels.csv` into an empty folder. Problems are added to the listing's findings.

    Args:
        folder: Folder to write into.
        listing: Annotated data set.
        by_path: Whether rows refer to sound files by absolute path. Otherwise they hold the files' bytes.

    Returns:
        The report: number of clips for each split and class.

    Raises:
        PreparationError: If no clip is left, a clip is in two splits, or `datasets` does not accept a split's name.
    """
    findings = listing.findings
    clips = with_known_labels(with_files(without_duplicates(listing.clips, findings), listing), listing)
    splits = {
        split: [clip for clip in clips if clip.split == split] for split in dict.fromkeys(c.split for c in clips)
    }
    for split in splits:
        if not re.fullmatch(r"\w+", split):
            raise PreparationError(f"{split!r} cannot be the name of a split: use only letters, digits and _.")
    columns = columns_of(listing)
    report: dict[str, Any] = {"splits": {}}
    with tqdm(total=len(clips), unit="clip", desc="Clips") as progress:
        for split, members in splits.items():
            counts: Counter[str] = Counter()
            order = generator_for("preparation", split).permutation(len(members))
            size = write_shards(
                folder,
                split,
                _rows([members[i] for i in order], listing, by_path, counts, progress),
                columns,
                max_rows=MAX_SHARD_ROWS,
                max_bytes=MAX_SHARD_BYTES,
                rows_per_group=PATHS_PER_GROUP if by_path else ROWS_PER_GROUP,
            )
            if size:
                report["splits"][split] = {"clips": size, "classes": {name: counts[name] for name in listing.classes}}
    if not report["splits"]:
        raise PreparationError(f"There is no clip to write: {findings.describe() or 'no clip is listed'}")
    write_labels(folder, listing.classes, listing.ids)
    totals = sum((Counter(split["classes"]) for split in report["splits"].values()), Counter())
    findings.add("classes_without_clip", *(name for name in listing.classes if not totals[name]))
    return report


def columns_of(listing: Listing) -> datasets.Features:
    """Return the columns of a listing's rows."""
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
    clips: Sequence[Clip], listing: Listing, by_path: bool, counts: Counter[str], progress: tqdm
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the usable clips, and count their labels in `counts`."""
    for clip in clips:
        progress.update()
        audio, finding = _read_audio(clip, by_path)
        if finding is not None:
            listing.findings.add(finding, listing.name(clip.path))
        if audio is None:
            continue
        counts.update(clip.labels)
        row: dict[str, Any] = {"id": clip.id, "audio": audio, "labels": clip.labels}
        if listing.has_events:
            row["events"] = [event._asdict() for event in clip.events]
        if listing.has_sources:
            row["num_sources"] = len(clip.labels)
        yield row


def _read_audio(clip: Clip, by_path: bool) -> tuple[dict[str, Any] | None, str | None]:
    """Return a clip's audio cell and the kind of finding. The cell is `None` if the clip is unusable.

    Only the header of a file is checked, unless a part of the file is cut out. The finding is `None` if there is none.
    """
    path = clip.path
    try:
        if clip.span is not None:
            return {"bytes": _cut(path, *clip.span), "path": f"{clip.id.replace('/', '-')}.wav"}, None
        num_bytes = path.stat().st_size
        encoded = None if by_path else path.read_bytes()
    except (OSError, soundfile.LibsndfileError):
        return None, "unreadable_files"
    audio = {"bytes": encoded, "path": os.path.abspath(path) if by_path else path.name}
    try:
        header = str(path) if encoded is None else io.BytesIO(encoded)
        num_frames = soundfile.info(header).frames if num_bytes else 0
    except soundfile.LibsndfileError:
        return (audio, "unchecked_files") if path.suffix.lower() in UNCHECKED_SUFFIXES else (None, "unreadable_files")
    return (audio, None) if num_frames else (None, "unreadable_files")


def _cut(path: Path, start: int, stop: int) -> bytes:
    """Return the samples `[start, stop)` of a sound file as a 16-bit WAV file."""
    samples, rate = soundfile.read(path, start=start, stop=stop, dtype="int16")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()
