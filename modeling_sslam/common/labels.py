"""Class names, from a label file or from AudioSet's own list."""

import csv
from functools import lru_cache
from pathlib import Path

AUDIOSET_NUM_LABELS = 527
# AudioSet's published file: index, machine id, display name.
AUDIOSET_LABELS = Path(__file__).with_name("audioset_labels.csv")


class LabelFileError(ValueError):
    """A label file cannot be read. The message names the file and the line."""


def read_labels(path: Path) -> list[str]:
    """Read class names in the order of the classifier's outputs; see [`read_label_table`]."""
    return [name for name, _ in read_label_table(path)]


def read_label_table(path: Path) -> list[tuple[str, str | None]]:
    """Read class names and, where the file has them, machine ids.

    Args:
        path: A CSV file with one line for each class: `index,mid,name` (as AudioSet's), `index,name`, or just `name`.
            A header line is optional.

    Returns:
        Name and machine id of each class, in the order of the classifier's outputs.

    Raises:
        LabelFileError: If the indices are not 0, 1, ..., or if a name is empty or occurs twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, skipinitialspace=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelFileError(f"The labels in {path} cannot be read: {error}") from error
    if rows and rows[0][0].lower() == "index":
        rows = rows[1:]
    table: list[tuple[str, str | None]]
    if rows and all(row[0].isdecimal() and 2 <= len(row) <= 3 for row in rows):
        rows.sort(key=lambda row: int(row[0]))
        for position, row in enumerate(rows):
            if int(row[0]) != position:
                raise LabelFileError(
                    f"{path}: class {position} is missing or comes twice; the next index is {row[0]}."
                )
        table = [(row[-1], row[1] if len(row) == 3 else None) for row in rows]
    elif all(len(row) == 1 for row in rows):
        table = [(row[0], None) for row in rows]
    else:
        raise LabelFileError(f'{path}: the lines are neither `index,mid,"name"`, nor `index,name`, nor `name`.')
    names = [name for name, _ in table]
    for position, name in enumerate(names):
        if not name or name in names[:position]:
            raise LabelFileError(f"{path}: class {position} is named {name!r}, which is empty or taken.")
    return table


@lru_cache
def audioset_labels() -> list[str]:
    """Return AudioSet's 527 display names in the order of the published classifiers."""
    return read_labels(AUDIOSET_LABELS)
