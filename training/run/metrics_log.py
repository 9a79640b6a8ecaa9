"""The log metrics.jsonl of a run: a line of JSON per interval, in order and without repetition after any restart."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from modeling_sslam.common.files import write_text

logger = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the file, without a last line that a killed process left incomplete.

    Damaged lines are left out with a warning.
    """
    rows, damaged = _parse(path)
    if damaged:
        logger.warning("%s: left out damaged lines (%s).", path, ", ".join(map(str, damaged)))
    return rows


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Append a row.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def truncate_metrics(path: Path, update: int) -> None:
    """Remove the rows after `update`: a run that resumes there writes them again. A damaged file is kept as a copy."""
    if _parse(path)[1]:
        shutil.copyfile(path, path.with_name(f"{path.name}.damaged"))
    rows = [row for row in read_metrics(path) if row["update"] <= update]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the rows of the file and the numbers of its damaged lines."""
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    *lines, _incomplete = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("update"), int):
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged
