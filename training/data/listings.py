"""Listings of sound files: a plain folder, a `.tsv` manifest or a `.csv` table."""

import csv
import os
from pathlib import Path

from modeling_sslam.common.recordings import AUDIO_SUFFIXES, is_recording_name
from training.data.columns import LABEL_COLUMNS, Columns, find_column, find_group_column
from training.data.config import DataConfig

PATH_COLUMNS = ("audio", "path", "file_name", "filename", "file")
LABEL_SEPARATOR = ";"

# Columns of equal length by name: "id", "path" and, if they were asked for, "labels" and a group column.
Listing = dict[str, list]


def columns_of(listing: Listing) -> Columns:
    """Return the names of a listing's columns."""
    return Columns(
        audio="path",
        id="id",
        label="labels" if "labels" in listing else None,
        group=next((name for name in listing if name not in ("id", "path", "labels")), None),
    )


def list_folder(folder: Path, config: DataConfig) -> Listing:
    """List the sound files in a folder, or in its subfolder of the split's name if labels are read and it exists.

    Ids are paths relative to `folder`. A clip's label is the name of the enclosing folder, as in an audiofolder.

    Raises:
        FileNotFoundError: If there are none.
    """
    root = folder / config.split if config.label_column and (folder / config.split).is_dir() else folder
    files = sorted(file for file in root.rglob("*") if is_recording_name(file.name) and file.is_file())
    if not files:
        raise FileNotFoundError(f"No sound files under {root} (looked for {', '.join(sorted(AUDIO_SUFFIXES))}).")
    listing: Listing = {
        "id": [file.relative_to(folder).as_posix() for file in files],
        "path": [str(file) for file in files],
    }
    if config.label_column:
        listing["labels"] = [[file.parent.name] for file in files]
    return listing


def read_manifest(path: Path, with_labels: bool) -> Listing:
    """Read a `.tsv` manifest, and labels from the `.lbl` file beside it.

    The first line of a manifest is the root folder. The others are `relative/path.wav<TAB>number`. Ids are the
    relative paths.

    Raises:
        ValueError: If the manifest is empty or its `.lbl` file lists other clips.
    """
    root, *lines = path.read_text(encoding="utf-8").splitlines()
    ids = [line.split("\t")[0] for line in lines if line.strip()]
    if not ids:
        raise ValueError(
            f"{path} lists no files. The first line of a manifest is the root folder, every other line is "
            "relative/path.wav<TAB>number."
        )
    listing: Listing = {"id": ids, "path": [os.path.join(root.strip(), id_) for id_ in ids]}
    if with_labels:
        label_file = path.with_suffix(".lbl")
        entries = [line.split("\t") for line in label_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        # A line names its clip by the file's stem or, in SPASS, by the path without its suffix.
        if len(entries) != len(ids) or any(
            entry[0] not in (Path(id_).stem, os.path.splitext(id_)[0]) for entry, id_ in zip(entries, ids, strict=True)
        ):
            raise ValueError(f"{label_file} does not list the stems of {path} in the same order.")
        listing["labels"] = [entry[1].split(",") for entry in entries]
    return listing


def read_table(path: Path, config: DataConfig) -> Listing:
    """Read a `.csv` table: the rows of `config.split`, or all rows if there is no column `split`.

    Paths are relative to the table's folder, or URLs.

    Raises:
        ValueError: If a column or a split does not exist. The message lists those that do.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or [])
    if "split" in names:
        wanted = [split.strip() for split in config.split.split("+")]
        present = sorted({row["split"] for row in rows})
        if missing := [split for split in wanted if split not in present]:
            raise ValueError(f"{path} has no split {missing[0]!r}; it has {', '.join(present)}.")
        rows = [row for row in rows if row["split"] in wanted]
    audio = find_column(path, names, config.audio_column or "auto", PATH_COLUMNS, "audio_column")
    paths = [row[audio] for row in rows]
    listing: Listing = {
        "id": [row[config.id_column] if config.id_column else row[audio] for row in rows],
        "path": [value if "://" in value else os.path.join(path.parent, value) for value in paths],
    }
    label = find_column(path, names, config.label_column, LABEL_COLUMNS, "label_column")
    if label is not None:
        cells = [(row[label] or "").split(LABEL_SEPARATOR) for row in rows]
        listing["labels"] = [[name.strip() for name in cell if name.strip()] for cell in cells]
    if (group := find_group_column(path, names, config.group_column)) is not None:
        listing[group] = [row[group] for row in rows]
    return listing


def has_split_column(path: Path) -> bool:
    """Return whether a `.csv` table has a column `split`."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return "split" in next(csv.reader(file), [])
