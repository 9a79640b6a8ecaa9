"""Class names, from a label file or from AudioSet's own list."""

import csv
import io
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from .text import read_utf8

AUDIOSET_NUM_LABELS = 527
# AudioSet's published file: index, machine id, display name.
AUDIOSET_LABELS = Path(__file__).with_name("audioset_labels.csv")
# Ids of the ontology, as AudioSet and FSD50K have them.
MACHINE_ID = re.compile(r"/[mtg]/\w+")
SEPARATORS = ",;\t|"
# Headers of a file that has names alone.
NAME_HEADERS = (
    "index",
    "name",
    "names",
    "label",
    "labels",
    "class",
    "classes",
    "class_name",
    "display_name",
    "category",
)


class LabelFileError(ValueError):
    """A label file cannot be read. The message names the file and the line."""


def read_labels(path: Path) -> list[str]:
    """Read class names in the order of the classifier's outputs; see [`read_label_table`]."""
    return [name for name, _ in read_label_table(path)]


def read_label_table(path: Path) -> list[tuple[str, str | None]]:
    """Read class names and, where the file has them, machine ids.

    Args:
        path: A CSV file with one line for each class: `index,mid,name` (as AudioSet's), `index,name,mid` (as
            FSD50K's), `index,name`, or just `name`. A header line is optional. Cells may be separated by semicolons,
            tabs or vertical bars, too. The index is the column of numbers, and the mid is the column of AudioSet's
            ids. Other ids come before the name, unless the header says otherwise.

    Returns:
        Name and machine id of each class, in the order of the classifier's outputs.

    Raises:
        LabelFileError: If there are no classes, if the columns are not recognised, if the indices are not 0, 1, ...,
            or if a name is empty or occurs twice.
    """
    try:
        text = read_utf8(path)
        parsed = [_parse(text, separator) for separator in SEPARATORS]
    except (OSError, ValueError, csv.Error) as error:
        raise LabelFileError(f"The labels in {path} cannot be read: {error}") from error
    indexed = next(filter(None, map(_read_columns, parsed)), None)
    names_alone = _read_names(parsed[0])
    if indexed:
        indexed.sort(key=lambda row: row[0])
        for position, (index, _, _) in enumerate(indexed):
            if index != position:
                raise LabelFileError(f"{path}: class {position} is missing or comes twice; the next index is {index}.")
        table = [(name, id_) for _, name, id_ in indexed]
    elif names_alone is not None:
        table = [(name, None) for name in names_alone]
    else:
        raise LabelFileError(
            f'{path}: the lines are neither `index,mid,"name"`, nor `index,"name",mid`, nor `index,name`, nor `name`.'
        )
    if not table:
        raise LabelFileError(f"{path} lists no classes.")
    names = [name for name, _ in table]
    for position, name in enumerate(names):
        if not name or name in names[:position]:
            raise LabelFileError(f"{path}: class {position} is named {name!r}, which is empty or taken.")
    return table


def _parse(text: str, separator: str) -> list[list[str]]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    return [[cell.strip() for cell in row] for row in rows if row]


def _read_columns(rows: Sequence[Sequence[str]]) -> list[tuple[int, str, str | None]] | None:
    """Return index, name and machine id of each row; `None` if the rows have no such columns."""
    if not rows or not 2 <= len(rows[0]) <= 3 or any(len(row) != len(rows[0]) for row in rows):
        return None
    header: Sequence[str] = ()
    column = _column_of_numbers(rows)
    if column is None:
        header, rows = rows[0], rows[1:]
        column = _column_of_numbers(rows)
    if column is None:
        return None
    others = [i for i in range(len(rows[0])) if i != column]
    if len(others) == 2:
        ids = [all(MACHINE_ID.fullmatch(row[i]) for row in rows) for i in others]
        says_name = ["name" in header[i].lower() for i in others] if header else [False, False]
        if ids == [False, True] or (ids == [False, False] and says_name == [True, False]):
            others.reverse()
        if ids != [True, True] and any(MACHINE_ID.fullmatch(row[others[1]]) for row in rows):
            return None
    return [(int(row[column]), row[others[-1]], row[others[0]] if len(others) == 2 else None) for row in rows]


def _column_of_numbers(rows: Sequence[Sequence[str]]) -> int | None:
    columns = range(len(rows[0])) if rows else ()
    return next((i for i in columns if all(row[i].isdecimal() for row in rows)), None)


def _read_names(rows: Sequence[Sequence[str]]) -> list[str] | None:
    """Return the names of a file with one column; `None` if it has several, or numbers in the names."""
    if any(len(row) != 1 for row in rows):
        return None
    names = [row[0] for row in rows]
    if len(names) > 1 and names[0].lower() in NAME_HEADERS:
        names = names[1:]
    # Lines such as `0 dog` or `0:dog` have columns too.
    numbers = [re.match(r"\d+(?=\W)", name) for name in names]
    if len(names) > 1 and all(numbers) and [int(n[0]) for n in numbers if n] == list(range(len(names))):
        return None
    return names


@lru_cache
def audioset_labels() -> list[str]:
    """Return AudioSet's 527 display names in the order of the published classifiers."""
    return read_labels(AUDIOSET_LABELS)
