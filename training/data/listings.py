"""Listings of sound files: a plain folder, a `.tsv` manifest or a `.csv` table."""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
from datasets.data_files import SPLIT_KEYWORDS

from modeling_sslam.common.recordings import AUDIO_SUFFIXES, search_folder
from modeling_sslam.common.text import escape_undecodable, read_utf8
from training.data.columns import LABEL_COLUMNS, Columns, find_column, find_group_column
from training.data.config import DataConfig
from training.data.tables import read_rows

logger = logging.getLogger(__name__)

PATH_COLUMNS = ("audio", "path", "file_name", "filename", "file")
LABEL_SEPARATOR = ";"
# Folders that operating systems and programs make beside those of users. Names with a dot are hidden anyway.
SYSTEM_FOLDER = re.compile(r"__|[$@#]|lost\+found$|System Volume Information$")
# Names of folders that hold a split: train, test_set, fold1, FSD50K.dev_audio.
SPLIT_WORDS = "|".join({"fold", "split", *(word for words in SPLIT_KEYWORDS.values() for word in words)})
SPLIT_FOLDER = re.compile(rf"(?<![a-z])({SPLIT_WORDS})(set|data)?(?![a-z])", re.IGNORECASE)
NAMES_SHOWN = 3

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


def as_dataset(listing: Listing) -> datasets.Dataset:
    """Return a listing as an Arrow table, which holds only UTF-8: paths become bytes, and names are escaped."""
    encoded = {
        "path": [os.fsencode(path) for path in listing["path"]],
        "id": [escape_undecodable(id_) for id_ in listing["id"]],
    }
    if "labels" in listing:
        encoded["labels"] = [[escape_undecodable(label) for label in labels] for labels in listing["labels"]]
    return datasets.Dataset.from_dict(listing | encoded)


def split_names(split: str) -> list[str]:
    """Return the splits that `+` joins, each once."""
    return list(dict.fromkeys(name.strip() for name in split.split("+")))


def find_files(folder: Path) -> list[Path]:
    """Find the sound files in a folder and its subfolders, without hidden files and those of the system."""
    files = sorted(Path(name) for name in search_folder(str(folder)))
    return [file for file in files if not any(map(SYSTEM_FOLDER.match, file.relative_to(folder).parts[:-1]))]


def chosen_splits(folder: Path, files: Sequence[Path], split: str) -> list[str]:
    """Return the subfolders that hold the requested splits; none if the whole folder is one split.

    A subfolder with the name of a split holds a split if it has class folders in it. If it has sounds directly in it,
    it is a class, such as the class train of ESC-50, unless all subfolders have names of splits.

    Args:
        folder: The folder.
        files: The sound files in it.
        split: The requested splits. Their names need not be usual ones.

    Raises:
        ValueError: If the folder has splits, but not those. The message names them.
    """
    wanted = [split] if (folder / split).is_dir() else split_names(split)
    parts = [file.relative_to(folder).parts for file in files]
    asked = {name for name in wanted if name.strip("./") and (folder / name).is_dir()}
    subfolders = {names[0] for names in parts if len(names) > 1} | asked
    usual = {name for name in subfolders if SPLIT_FOLDER.search(name)}
    classes = {names[0] for names in parts if len(names) == 2} - {names[0] for names in parts if len(names) > 2}
    splits = (usual if usual == subfolders else usual - classes) | (asked - usual)
    if splits and (missing := [name for name in wanted if name not in splits]):
        raise ValueError(
            f"{folder} has no split {missing[0]!r}; it has {', '.join(sorted(splits))}. Name one by data.split; "
            "if they are classes, rename them or list the files in a .csv table."
        )
    deeper = {
        "/".join(names[: i + 1]) for names in parts for i in range(1, len(names) - 2) if SPLIT_FOLDER.search(names[i])
    }
    if deeper and not splits:
        raise ValueError(
            f"{folder} seems to have its splits deeper: {_shown(sorted(deeper))}. Name the folder that holds them as "
            "data.source, or rename them if they are classes."
        )
    return wanted if splits else []


def list_folder(folder: Path, config: DataConfig) -> Listing:
    """List the sound files in a folder or, if labels are read, in its subfolders for the splits asked for.

    Ids are paths relative to `folder`. A clip's label is the name of the enclosing folder, as in an audiofolder. Files
    beside the folders of classes have no label and are left out with a warning.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: See [`chosen_splits`].
    """
    files, roots = find_files(folder), [folder]
    if config.label_column:
        roots = [folder / split for split in chosen_splits(folder, files, config.split)] or roots
        files = [file for root in roots for file in _in_classes(root, files)]
    if not files:
        where = " or ".join(map(str, roots))
        raise FileNotFoundError(f"No sound files under {where} (looked for {', '.join(sorted(AUDIO_SUFFIXES))}).")
    listing: Listing = {
        "id": [file.relative_to(folder).as_posix() for file in files],
        "path": [str(file) for file in files],
    }
    if config.label_column:
        listing["labels"] = [[file.parent.name] for file in files]
    return listing


def _in_classes(root: Path, files: Sequence[Path]) -> list[Path]:
    """Return the files of a root that are in class folders. Warn of other files, and of classes with the same name."""
    files = [file for file in files if root in file.parents]
    loose = [file for file in files if file.parent == root]
    if 0 < len(loose) < len(files):
        logger.warning(
            "%s: %d files are in no folder of a class and left out: %s.",
            root, len(loose), _shown(file.name for file in loose),
        )  # fmt: skip
        files = [file for file in files if file.parent != root]
    folders: dict[str, list[Path]] = {}
    for place in dict.fromkeys(file.parent for file in files):
        folders.setdefault(place.name, []).append(place)
    for name, places in folders.items():
        if len(places) > 1:
            logger.warning(
                "%s: %d folders become the one class %r: %s. Rename them if they are different classes.",
                root, len(places), name, _shown(place.relative_to(root).as_posix() for place in places),
            )  # fmt: skip
    return files


def _shown(paths: Iterable[str]) -> str:
    names = [escape_undecodable(path) for path in paths]
    return ", ".join(names[:NAMES_SHOWN] + ["..."] * (len(names) > NAMES_SHOWN))


def read_manifest(path: Path, with_labels: bool) -> Listing:
    """Read a `.tsv` manifest, and labels from the `.lbl` file beside it.

    The first line of a manifest is the root folder. The others are `relative/path.wav<TAB>number`. Ids are the
    relative paths.

    Raises:
        ValueError: If the manifest is empty, a file is not UTF-8, or the `.lbl` file lists other clips or has lines
            without labels.
    """
    root, *lines = _read_lines(path)
    ids = [line.split("\t")[0] for line in lines if line.strip()]
    if not ids:
        raise ValueError(
            f"{path} lists no files. The first line of a manifest is the root folder, every other line is "
            "relative/path.wav<TAB>number."
        )
    listing: Listing = {"id": ids, "path": [os.path.join(root.strip(), id_) for id_ in ids]}
    if with_labels:
        label_file = path.with_suffix(".lbl")
        entries = [line.split("\t") for line in _read_lines(label_file) if line.strip()]
        # A line names its clip by the file's stem or, in SPASS, by the path without its suffix.
        if len(entries) != len(ids) or any(
            entry[0] not in (Path(id_).stem, os.path.splitext(id_)[0]) for entry, id_ in zip(entries, ids, strict=True)
        ):
            raise ValueError(f"{label_file} does not list the stems of {path} in the same order.")
        if wrong := [entry for entry in entries if len(entry) < 2]:
            raise ValueError(f"{label_file}: {wrong[0][0]!r} is not name<TAB>label,label,...")
        listing["labels"] = [entry[1].split(",") for entry in entries]
    return listing


def _read_lines(path: Path) -> list[str]:
    return re.split(r"\r\n|\r|\n", read_utf8(path))


def read_table(path: Path, config: DataConfig) -> Listing:
    """Read a `.csv` table: the rows of `config.split`, or all rows if there is no column `split`.

    Paths are relative to the table's folder, or URLs.

    Raises:
        ValueError: If a column or a split does not exist, or a row is damaged. The message names those that do,
            or the line.
    """
    names, rows = read_rows(path)
    if "split" in names:
        wanted = split_names(config.split)
        present = sorted({row["split"] for row in rows})
        if missing := [split for split in wanted if split not in present]:
            raise ValueError(f"{path} has no split {missing[0]!r}; it has {', '.join(present)}.")
        rows = [row for row in rows if row["split"] in wanted]
    audio = find_column(path, names, config.audio_column or "auto", PATH_COLUMNS, "audio_column")
    assert audio is not None  # find_column raises an error if no column is usual
    paths = [row[audio] for row in rows]
    listing: Listing = {
        "id": [row[config.id_column] if config.id_column else row[audio] for row in rows],
        "path": [value if "://" in value else os.path.join(path.parent, value) for value in paths],
    }
    label = find_column(path, names, config.label_column, LABEL_COLUMNS, "label_column")
    if label is not None:
        cells = [row[label].split(LABEL_SEPARATOR) for row in rows]
        listing["labels"] = [[name.strip() for name in cell if name.strip()] for cell in cells]
    if (group := find_group_column(path, names, config.group_column)) is not None:
        listing[group] = [row[group] for row in rows]
    return listing


def has_split_column(path: Path) -> bool:
    """Return whether a `.csv` table has a column `split`."""
    return "split" in read_rows(path)[0]
