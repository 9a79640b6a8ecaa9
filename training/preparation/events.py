"""Tables with one row for each sound event of each clip."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from training.preparation.listing import AnnotatedEvent, Findings, PreparationError, read_table


class Columns(NamedTuple):
    """The column names of a table of events.

    Attributes:
        file: Column with the file name.
        label: Column with the class.
        onset: Column with the onset in seconds; `None` if the table has no times.
        offset: Column with the offset in seconds; `None` if the table has no times.
        separator: Separator of several labels in a cell; `None` if a cell holds one label.
    """

    file: str
    label: str
    onset: str | None = None
    offset: str | None = None
    separator: str | None = None


def read_events(path: Path, columns: Columns, findings: Findings) -> dict[str, list[AnnotatedEvent]]:
    """Read the events of each file in a table, in order of onset.

    A file with an empty label has no events. Repeated rows become findings and count once.

    Args:
        path: Table. Commas separate its cells if its suffix is `.csv`, otherwise tabs.
        columns: The column names of the table.
        findings: Receives the findings.

    Raises:
        PreparationError: If the table lacks a column, or a time is not a number.
    """
    events: dict[str, list[AnnotatedEvent]] = {}
    seen: set[tuple[str, ...]] = set()
    rows = read_table(path, filter(None, columns[:4]), delimiter_of(path))
    for number, row in enumerate(rows, 2):
        if (line := tuple(str(value) for value in row.values())) in seen:
            findings.add("duplicated_rows", f"{path.name}:{number}")
            continue
        seen.add(line)
        events_of_file = events.setdefault(row[columns.file], [])
        labels = row[columns.label].split(columns.separator) if columns.separator else [row[columns.label]]
        for label in filter(None, map(str.strip, labels)):
            try:
                onset = float(row[columns.onset]) if columns.onset else 0.0
                offset = float(row[columns.offset]) if columns.offset else 0.0
            except ValueError as error:
                raise PreparationError(
                    f"{path}, line {number}: a time is not a number of seconds: {error}."
                ) from error
            events_of_file.append(AnnotatedEvent(label, onset, offset))
    return {file: sorted(found, key=lambda event: event.onset) for file, found in events.items()}


def delimiter_of(path: Path) -> str:
    """Return a comma for a `.csv` file, and a tab for other files."""
    return "," if path.suffix.lower() == ".csv" else "\t"


def labels_of(events: Iterable[AnnotatedEvent]) -> tuple[str, ...]:
    """Return the labels of events, each once."""
    return tuple(dict.fromkeys(event.label for event in events))
