"""metrics.jsonl: one line of JSON for every interval of a run, in order and without repetition however often the run
was killed and resumed."""

import json
from pathlib import Path
from typing import Any

from modeling_sslam.common.files import write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of the file; without the last line if a killed process left it half-written."""
    if not path.exists():
        return []
    *lines, _half_written = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def truncate_metrics(path: Path, update: int) -> None:
    """Drops the rows after `update`, which a run that goes on from there will write again."""
    rows = [row for row in read_metrics(path) if row["update"] <= update]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
