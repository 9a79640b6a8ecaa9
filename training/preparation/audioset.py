"""AudioSet: two million clips of 10 s, 527 classes (Gemmeke et al. 2017, research.google.com/audioset).

SOURCE holds, anywhere, `balanced_train_segments.csv`, `unbalanced_train_segments.csv` or `eval_segments.csv` as
published (`YTID, start, end, "mid,mid"` a line), which become the splits balanced, unbalanced and eval, and the sound
files, which were downloaded by other means. A file is found by its name: the YTID of 11 characters, with or without a
Y before it, followed by nothing or by an underscore and numbers such as the start (`Y--PJHxphWEs.wav`,
`--PJHxphWEs_30000.flac`, `--PJHxphWEs_30.000_40.000.wav`). The classes are in the order of the published classifiers:
from `class_labels_indices.csv` in SOURCE if it is there, else from this repository.

As most downloads lack clips, missing ones are counted and left out. `--by-path` spares a copy of the audio.
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
    """See [`training.preparation.audioset`]."""
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
    """YTID and machine ids of the labels of every line.

    Raises:
        PreparationError: If a line is not `YTID, start, end, "mids"`.
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
    """The YTIDs that a file may be of by its name: itself, and what follows a Y."""
    starts = (0, 1) if stem.startswith("Y") else (0,)
    return [
        stem[start : start + YTID_LENGTH]
        for start in starts
        if len(stem) >= start + YTID_LENGTH and AFTER_YTID.fullmatch(stem[start + YTID_LENGTH :])
    ]
