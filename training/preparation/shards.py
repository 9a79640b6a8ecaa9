"""Dataset folders for `datasets.load_dataset` and the training programs: parquet shards, labels and card."""

import csv
import errno
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from modeling_sslam.common.files import replacing


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder to fill. It gets the name `path` if the body succeeds, and is removed if the body fails.

    Raises:
        OSError: If `path` exists and is not an empty folder, or its parent is not writable.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, "File exists", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.mkdir()
        yield unfinished


def write_shards(
    folder: Path,
    split: str,
    rows: Iterable[dict[str, Any]],
    features: datasets.Features,
    max_rows: int,
    max_bytes: int | None = None,
    rows_per_group: int = 50,
) -> int:
    """Write `data/{split}-00000-of-000NN.parquet` in a dataset folder.

    Args:
        folder: Dataset folder.
        split: Name of the split.
        rows: Rows of the split.
        features: Columns of the rows. They are stored in the files, so that `datasets` recognises the audio column.
        max_rows: A shard ends with the row group that reaches this number of rows.
        max_bytes: A shard ends with the row group that reaches this size; `None` for no limit.
        rows_per_group: Rows of a row group. Workers share a shard by row groups.

    Returns:
        The number of rows.
    """
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    schema = features.arrow_schema.with_metadata(metadata)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    paths: list[Path] = []
    num_rows = 0
    rows = iter(rows)
    group = list(islice(rows, rows_per_group))
    while group:
        paths.append(data / f"{split}-{len(paths):05d}.parquet")
        shard_rows = shard_bytes = 0
        with pq.ParquetWriter(paths[-1], schema, compression="none") as writer:
            while group and shard_rows < max_rows and (max_bytes is None or shard_bytes < max_bytes):
                table = pa.Table.from_pylist(group, schema)
                writer.write_table(table)
                shard_rows, shard_bytes = shard_rows + len(group), shard_bytes + table.nbytes
                group = list(islice(rows, rows_per_group))
        num_rows += shard_rows
    for path in paths:
        path.rename(path.with_name(f"{path.stem}-of-{len(paths):05d}.parquet"))
    return num_rows


def write_labels(folder: Path, names: Sequence[str], ids: Sequence[str | None] = ()) -> None:
    """Write `labels.csv`: the classes in the order of the classifier's outputs, with machine ids where known."""
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        if any(ids):
            table.writerows([("index", "mid", "label"), *zip(range(len(names)), ids, names, strict=True)])
        else:
            table.writerows([("index", "label"), *enumerate(names)])


def card_header(splits: Iterable[str]) -> str:
    """Return the front matter of a dataset folder's `README.md`. It tells `load_dataset` the files of each split."""
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in splits)
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n"
        "task_categories:\n- audio-classification\n---\n"
    )
