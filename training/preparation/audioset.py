"""AudioSet: two million clips of 10 s, 527 classes (Gemmeke et al. 2017, research.google.com/audioset).

SOURCE contains these files, at any depth:

- `balanced_train_segments.csv`, `unbalanced_train_segments.csv` or `eval_segments.csv` as published, with lines
  `YTID, start, end, "mid,mid"`. They become the splits balanced, unbalanced and eval;
- the sound files. A file is matched by its name: the YTID of 11 characters, optionally after a Y, and optionally
  followed by an underscore and numbers such as the start (`Y--PJHxphWEs.wav`, `--PJHxphWEs_30000.flac`,
  `--PJHxphWEs_30.000_40.000.wav`);
- optionally `class_labels_indices.csv`. Without it, this repository's copy is used. The classes have the order of this
  table, which is also the order of the published classifiers.

Most downloads are incomplete. Missing clips are counted and left out. `--by-path` avoids a copy of the audio.
"""

import csv
import re
from pathlib import Path

from modeling_sslam.common.labels import AUDIOSET_LABELS, LabelFileError, read_label_table
from training.preparation.listing import Clip, Findings, Listing, PreparationError, read_lines, sound_files

SEGMENTS = {
    "balanced": "balanced_train_segments.csv",
    "unbalanced": "unbalanced_train_segments.csv",
    "eval": "eval_segments.csv",
}
LABELS = "class_labels_indices.csv"
YTID_LENGTH = 11
AFTER_YTID = re.compile(r"(_[0-9][0-9._]*)?")


def list_clips(source: Path) -> Listing:
    """List the clips of AudioSet; the module describes the files."""
    findings, clips = Findings(), []
    tables = {path.name: path for path in sorted(source.rglob("*.csv"), reverse=True)}
    try:
        classes = read_label_table(tables.get(LABELS, AUDIOSET_LABELS))
    except LabelFileError as error:
        raise PreparationError(str(error)) from error
    files = sound_files(source)
    by_ytid: dict[str, Path] = {}
    for path in files:
        for ytid in possible_ytids(path.stem):
            by_ytid.setdefault(ytid, path)
    for split, name in SEGMENTS.items():
        if name in tables:
            for ytid, labels in read_segments(tables[name]):
                clips.append(Clip(ytid, split, by_ytid.get(ytid) or source / ytid, labels))
    if not clips:
        raise PreparationError(f"{source} holds none of {', '.join(SEGMENTS.values())}.")
    names, ids = zip(*classes, strict=True)
    return Listing(source, clips, names, files, ids, findings=findings)


def read_segments(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Return the YTID and the machine ids of the labels, for each line of a table of segments.

    Raises:
        PreparationError: If a line does not have the format `YTID, start, end, "mids"`.
    """
    segments = []
    for row in csv.reader(read_lines(path), skipinitialspace=True):
        if not row or row[0].startswith("#"):
            continue
        if len(row) != 4:
            raise PreparationError(f'{path}: {row} is not `YTID, start, end, "mids"`.')
        segments.append((row[0], tuple(row[3].split(","))))
    return segments


def possible_ytids(stem: str) -> list[str]:
    """Return the YTIDs that a file name may stand for. A leading Y may be a prefix or belong to the YTID."""
    starts = (0, 1) if stem.startswith("Y") else (0,)
    return [
        stem[start : start + YTID_LENGTH]
        for start in starts
        if len(stem) >= start + YTID_LENGTH and AFTER_YTID.fullmatch(stem[start + YTID_LENGTH :])
    ]
