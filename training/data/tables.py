"""Users' tables: `.csv` files with a header."""

import csv
import io
from pathlib import Path

from modeling_sslam.common.text import read_utf8


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a `.csv` table.

    Returns:
        The names of the columns, and the rows by column.

    Raises:
        ValueError: If the table is not UTF-8, or a row does not have one cell for each column: a comma without quotes
            would shift or cut the cells. The message names the line. Surplus cells at the end of a row may be empty.
    """
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), strict=True)
    rows: list[dict[str, str]] = []
    try:
        names = next(reader, [])
        if doubled := [name for name in names if name and names.count(name) > 1]:
            raise ValueError(f"{path} has two columns {doubled[0]!r}; rename one.")
        for cells in filter(None, reader):
            if len(cells) < len(names) or any(cells[len(names) :]):
                raise ValueError(
                    f"{path}, line {reader.line_num} has {len(cells)} cells for {len(names)} columns. Put a cell with "
                    'a comma into quotes, as in "Speech, human", and give every cell, even if it is empty.'
                )
            rows.append(dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}. Check the quotes of its cells.") from error
    return names, rows
