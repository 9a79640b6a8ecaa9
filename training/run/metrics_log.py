"""The log metrics.jsonl of a run: a line of JSON per interval, in order and without repetition after any restart."""

import json
from pathlib import Path
from typing import Any

from modeling_sslam.common.files import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the file, without a last line that a killed process left incomplete."""
    if not path.exists():
        return []
    *lines, _incomplete = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Append a row."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def truncate_metrics(path: Path, update: int) -> None:
    """Remove the rows after `update`: a run that resumes there writes them again."""
    rows = [row for row in read_metrics(path) if row["update"] <= update]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
