"""Dataset folders: parquet shards that `datasets.load_dataset` and the training programs read, labels and card."""

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
    """Gives a folder beside `path` to fill, which gets its name once all is well and on disk. When not, it is removed.

    Raises:
        OSError: If `path` is there already and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, "This is there already", str(path))
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
    """Writes the `data/{split}-00000-of-000NN.parquet` of a dataset folder.

    Args:
        features: Columns of the rows; they are written into the files, so that `datasets` knows the audio for audio.
        max_rows, max_bytes: A shard ends with the row group that reaches one of them.
        rows_per_group: Rows of a row group, which is what several workers share a shard by.

    Returns:
        The number of rows.
    """
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    schema = features.arrow_schema.with_metadata(metadata)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    rows, paths, num_rows = iter(rows), [], 0
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
    """Writes `labels.csv`: the classes in the order of a classifier's outputs, with their machine ids if they have."""
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        if any(ids):
            table.writerows([("index", "mid", "label"), *zip(range(len(names)), ids, names, strict=True)])
        else:
            table.writerows([("index", "label"), *enumerate(names)])


def card_header(splits: Iterable[str]) -> str:
    """The front matter of a dataset folder's `README.md`, by which `load_dataset` tells the splits."""
    files = "\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in splits)
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n"
        "task_categories:\n- audio-classification\n---\n"
    )
