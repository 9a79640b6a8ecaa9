"""A growing table of Parquet files that is whole whenever its writer is killed, and that itself says what is done.

The rows of a table belong to items (recordings), and within an item to windows, numbered from 0. A writer fills one
hidden file at a time and renames it into its place. An item whose rows do not all lie in that one file is named in the
file's metadata with the windows that do, so that reading the key column and the metadata of all files tells which
items are done and where to go on with the others. There is no other record that could disagree with the rows.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ...common.errors import InferenceError
from ...common.files import TEMPORARY_PREFIX, force_to_disk

PARTS_KEY = b"sslam.parts"
# Shards of this size suit the Hub and every reader; on slow machines the time bounds what a kill can cost.
SHARD_BYTES = 128 << 20
SHARD_SECONDS = 300
# What a writer holds in memory before it encodes it.
ROW_GROUP_BYTES = 16 << 20


class ShardError(InferenceError):
    """A folder of shards that cannot be continued; the message says what to do."""


class Part(NamedTuple):
    """The windows `first` to `stop` (exclusive) of an item, and whether these end it."""

    first: int
    stop: int
    ends: bool


class Progress(NamedTuple):
    """What a folder of shards holds: items that are done, and the next window of those that are begun."""

    done: set[str]
    begun: dict[str, int]


def read_progress(folder: Path, key: str) -> Progress:
    """What the shards in `folder` hold by their own account.

    Args:
        key: The column that names a row's item.

    Raises:
        ShardError: If a file is no shard, or if windows of an item are missing before others that are there.
    """
    done: set[str] = set()
    parts: dict[str, list[Part]] = {}
    for path in sorted(folder.glob("*.parquet")):
        try:
            items = pq.read_table(path, columns=[key], read_dictionary=[key], partitioning=None)
            metadata = pq.read_metadata(path).metadata or {}
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{path} cannot be read ({error}). Remove it: its rows will be made again.") from error
        if PARTS_KEY not in metadata:
            raise ShardError(f"{path} was not written by this command; move it elsewhere, or choose another folder.")
        shard_parts = {item: Part(*part) for item, part in json.loads(metadata[PARTS_KEY]).items()}
        done.update(item for item in items[key].unique().to_pylist() if item not in shard_parts)
        for item, part in shard_parts.items():
            parts.setdefault(item, []).append(part)

    begun = {}
    for item, chain in parts.items():
        stop = 0
        for part in sorted(chain):
            if part.first != stop:
                raise ShardError(
                    f"{folder} has windows {part.first} and later of {item}, but not all before. Has a shard been "
                    "removed? Put it back, or start again in an empty folder."
                )
            stop = part.stop
        if any(part.ends for part in chain):
            done.add(item)
        else:
            begun[item] = stop
    return Progress(done, begun)


class ShardWriter:
    """Writes one process's rows, a shard after the other.

    Args:
        folder: Where the shards go, as `{prefix}-00000.parquet` and so on.
        prefix: Of this writer alone.
        metadata: Goes into every file.
        max_rows: Rows of a shard, about; by default as many as make `SHARD_BYTES` of uncompressed columns.
    """

    def __init__(
        self, folder: Path, prefix: str, schema: pa.Schema, key: str, metadata: dict[str, Any], max_rows: int | None
    ) -> None:
        self.folder = folder
        self.prefix = prefix
        self.schema = schema.with_metadata({name: json.dumps(value) for name, value in metadata.items()})
        # A dictionary of numbers that hardly repeat only costs time.
        self.dictionary_columns = [field.name for field in schema if pa.types.is_string(field.type)]
        self.key = key
        self.max_rows = max_rows
        self.num_shards = 0
        self._open()

    def _open(self) -> None:
        self.temporary = self.folder / f"{TEMPORARY_PREFIX}{self.prefix}-{self.num_shards:05d}"
        self.file: pq.ParquetWriter | None = None
        self.parts: dict[str, Part] = {}
        self.buffer: list[pa.Table] = []
        self.buffered_bytes = self.num_rows = self.num_bytes = 0
        self.opened = time.monotonic()

    def write(self, rows: pa.Table, windows: Iterable[tuple[str, int, bool]]) -> None:
        """Adds the rows of whole windows: each window's item, its number, and whether it is the item's last."""
        for item, window, ends in windows:
            part = self.parts.get(item, Part(window, window, False))
            if window != part.stop:
                raise ValueError(f"window {window} of {item} does not follow on {part.stop - 1}")
            self.parts[item] = Part(part.first, window + 1, ends)
        self.buffer.append(rows)
        self.num_rows += len(rows)
        self.num_bytes += rows.nbytes
        self.buffered_bytes += rows.nbytes
        if self.buffered_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def publish_if_full(self) -> None:
        """To be called between batches."""
        full = self.num_bytes >= SHARD_BYTES if self.max_rows is None else self.num_rows >= self.max_rows
        if full or time.monotonic() - self.opened >= SHARD_SECONDS:
            self.publish()

    def publish(self) -> None:
        """Gives the shard so far its name, whole and on disk, and begins another."""
        if not self.parts:
            self._open()
            return
        self._flush()
        partly = {item: part for item, part in self.parts.items() if part.first > 0 or not part.ends}
        self.file.add_key_value_metadata({PARTS_KEY: json.dumps(partly)})
        self.file.close()
        force_to_disk(self.temporary)
        self.temporary.rename(self.folder / f"{self.prefix}-{self.num_shards:05d}.parquet")
        force_to_disk(self.folder)
        self.num_shards += 1
        self._open()

    def _flush(self) -> None:
        if self.file is None:
            self.file = pq.ParquetWriter(self.temporary, self.schema, use_dictionary=self.dictionary_columns)
        if self.buffer:
            rows = pa.concat_tables(self.buffer).combine_chunks()
            self.file.write_table(rows.cast(self.schema), row_group_size=len(rows))
        self.buffer, self.buffered_bytes = [], 0


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left half-written."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink()
