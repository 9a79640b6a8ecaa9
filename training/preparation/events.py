"""Tables with a line for each sound event of each clip."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from training.preparation.listing import Event, Findings, PreparationError, read_table


class Columns(NamedTuple):
    """What the columns of a table of events are called.

    Args:
        onset, offset: In seconds; `None` if the table has none.
        separator: What stands between several labels in a cell; `None` if there is just one.
    """

    file: str
    label: str
    onset: str | None = None
    offset: str | None = None
    separator: str | None = None


def read_events(path: Path, columns: Columns, findings: Findings) -> dict[str, list[Event]]:
    """The events of each file that a table lists, in order of onset; none for a file with an empty label.

    A `.csv` table is separated by commas, any other by tabs. A line that comes twice counts once.

    Raises:
        PreparationError: If the table lacks a column, or a time is not a number.
    """
    events: dict[str, list[Event]] = {}
    seen: set[tuple] = set()
    rows = read_table(path, filter(None, columns[:4]), delimiter_of(path))
    for number, row in enumerate(rows, 2):
        if (line := tuple(str(value) for value in row.values())) in seen:
            findings.add("duplicated_rows", f"{path.name}:{number}")
            continue
        seen.add(line)
        of_file = events.setdefault(row[columns.file], [])
        labels = row[columns.label].split(columns.separator) if columns.separator else [row[columns.label]]
        for label in filter(None, map(str.strip, labels)):
            try:
                times = [float(row[name]) if name else 0.0 for name in (columns.onset, columns.offset)]
            except ValueError as error:
                raise PreparationError(f"{path}, line {number}: not a number of seconds: {error}.") from error
            of_file.append(Event(label, *times))
    return {file: sorted(of_file, key=lambda event: event.onset) for file, of_file in events.items()}


def delimiter_of(path: Path) -> str:
    return "," if path.suffix.lower() == ".csv" else "\t"


def labels_of(events: Iterable[Event]) -> tuple[str, ...]:
    """The labels of events, each once."""
    return tuple(dict.fromkeys(event.label for event in events))
