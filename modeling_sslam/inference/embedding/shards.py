"""A growing table of Parquet files that is whole whenever its writer is killed and records which items are done.

The rows of the table belong to items (recordings), and within an item to windows, numbered from 0. A writer fills one
hidden file at a time and renames it into its place. The metadata of a file names every item whose rows do not all lie
in that file, with the windows that do. The key column and the metadata of all files therefore tell which items are
done and where to go on with the others. For items that are sound files, the metadata also holds the size and the time
of change of each, which tell whether its rows are still right. No other record exists that could contradict the rows.
"""

import json
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...common.errors import InferenceError
from ...common.files import TEMPORARY_PREFIX, publish, remove

PARTS_KEY = b"sslam.parts"
STAMPS_KEY = b"sslam.files"
# Names of shards: the number of the call, of the process and of the shard.
SHARD_NAME = re.compile(r"embeddings-(\d+)-(\d+)-(\d+)\.parquet")
# Shards of this size suit the Hub and every reader. On slow machines the time limits how much work a kill can lose.
SHARD_BYTES = 128 << 20
SHARD_SECONDS = 300
# Rows are held in memory up to this size and then encoded.
ROW_GROUP_BYTES = 16 << 20


class ShardError(InferenceError):
    """A folder of shards cannot be continued. The message states the remedy."""


class Part(NamedTuple):
    """The windows `first` to `stop` (exclusive) of an item, and whether the last of them ends it."""

    first: int
    stop: int
    ends: bool


class Stamp(NamedTuple):
    """Size of a file in bytes and time of its last change in nanoseconds."""

    size: int
    mtime_ns: int


class ShardProgress(NamedTuple):
    """Content of a folder of shards.

    Attributes:
        done: The items that are done.
        begun: The next window of each item that is begun.
        stamps: The stamps of the items that were embedded with one.
    """

    done: set[str]
    begun: dict[str, int]
    stamps: dict[str, Stamp]


def read_progress(folder: Path, key: str) -> ShardProgress:
    """Read which items the shards in a folder hold.

    Args:
        folder: The folder of the shards.
        key: The column that names a row's item.

    Raises:
        ShardError: If a file is no shard, or if an item has a window but not all windows before it.
    """
    done: set[str] = set()
    parts: dict[str, list[Part]] = {}
    stamps: dict[str, Stamp] = {}
    for path in sorted(folder.glob("*.parquet")):
        try:
            items = pq.read_table(path, columns=[key], read_dictionary=[key], partitioning=None)
            metadata = pq.read_metadata(path).metadata or {}
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{path} cannot be read ({error}). Remove it: its rows will be made again.") from error
        if PARTS_KEY not in metadata:
            raise ShardError(f"{path} was not written by this command; move it elsewhere, or choose another folder.")
        shard_parts = {item: Part(*part) for item, part in json.loads(metadata[PARTS_KEY]).items()}
        stamps |= {item: Stamp(*stamp) for item, stamp in json.loads(metadata.get(STAMPS_KEY, "{}")).items()}
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
    return ShardProgress(done, begun, stamps)


def next_call(folder: Path) -> int:
    """Return a number for the names of a call's shards, greater than the number of every earlier call.

    It does not depend on the number of shards, so a shard that was removed leads to no name that another one has.
    """
    return 1 + max((number for number, *_ in map(_numbers, folder.glob("*.parquet"))), default=-1)


def drop_items(folder: Path, key: str, items: Collection[str]) -> None:
    """Remove all rows of items.

    Each shard is replaced whole, the newest first. So after a kill the rows that are left of an item are its first
    windows, with their stamp, and the next call drops them too.

    Args:
        folder: The folder of the shards.
        key: The column that names a row's item.
        items: The items.
    """
    for path in sorted(folder.glob("*.parquet"), key=_numbers, reverse=True):
        with pq.ParquetFile(path) as shard:
            held = set(shard.read([key])[key].unique().to_pylist())
            if held.isdisjoint(items):
                continue
            if held.issubset(items):
                path.unlink()
                continue
            temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.stem}")
            try:
                with disk_errors(folder):
                    _copy_without(shard, temporary, key, items)
                    publish(temporary, path)
            finally:
                remove(temporary)


def _copy_without(shard: pq.ParquetFile, target: Path, key: str, items: Collection[str]) -> None:
    """Copy a shard to a new file, without the rows of some of its items."""
    metadata = dict(shard.metadata.metadata)
    records = {name: json.loads(metadata.pop(name, "{}")) for name in (PARTS_KEY, STAMPS_KEY)}
    metadata.pop(b"ARROW:schema", None)
    dropped = pa.array(items, pa.string())
    with _open_parquet(target, shard.schema_arrow.with_metadata(metadata)) as copy:
        for number in range(shard.num_row_groups):
            rows = shard.read_row_group(number)
            rows = rows.filter(pc.invert(pc.is_in(rows[key], dropped)))
            if len(rows):
                copy.write_table(rows.cast(copy.schema), row_group_size=len(rows))
        kept = {name: {i: value for i, value in record.items() if i not in items} for name, record in records.items()}
        copy.add_key_value_metadata({name: json.dumps(record) for name, record in kept.items()})


def _open_parquet(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Numbers hardly repeat, so a dictionary of them only costs time.
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    return pq.ParquetWriter(path, schema, use_dictionary=strings)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Report a file that cannot be written, such as on a full disk, with the remedy."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ShardError(
            f"{folder} cannot be written ({error}). It keeps the shards that are whole. Make room and give the same "
            "command again: it continues from there."
        ) from error


def _numbers(path: Path) -> tuple[int, ...]:
    """Return the numbers in a shard's name, in the order of writing; (-1,) if the file was renamed."""
    match = SHARD_NAME.fullmatch(path.name)
    return tuple(map(int, match.groups())) if match else (-1,)


class ShardWriter:
    """Write the rows of one process, one shard after the other.

    In a `with` statement, an error removes the unfinished file. The shards before it stay.

    Args:
        folder: The folder of the shards, which are named `{prefix}-00000.parquet` and so on.
        prefix: A prefix that no other writer has.
        schema: The columns.
        key: The column that names a row's item.
        metadata: JSON values for the metadata of every file.
        max_rows: Approximate number of rows of a shard; by default it has `SHARD_BYTES` of uncompressed columns.
        stamps: The stamps of the items that are files, from before they were read.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        schema: pa.Schema,
        key: str,
        metadata: dict[str, Any],
        max_rows: int | None,
        stamps: Mapping[str, Stamp],
    ) -> None:
        self.folder = folder
        self.prefix = prefix
        self.schema = schema.with_metadata({name: json.dumps(value) for name, value in metadata.items()})
        self.key = key
        self.max_rows = max_rows
        self.stamps = stamps
        self.num_shards = 0
        self._open()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        remove(self.temporary)

    def _open(self) -> None:
        self.temporary = self.folder / f"{TEMPORARY_PREFIX}{self.prefix}-{self.num_shards:05d}"
        self.file: pq.ParquetWriter | None = None
        self.parts: dict[str, Part] = {}
        self.buffer: list[pa.Table] = []
        self.buffered_bytes = self.num_rows = self.num_bytes = 0
        self.opened = time.monotonic()

    def write(self, rows: pa.Table, windows: Iterable[tuple[str, int, bool]]) -> None:
        """Add the rows of whole windows.

        Args:
            rows: The rows of all these windows.
            windows: The item and the number of each window, and whether it is the item's last.

        Raises:
            ValueError: If a window does not follow the item's previous one.
        """
        for item, window, ends in windows:
            part = self.parts.get(item, Part(window, window, False))
            if window != part.stop:
                raise ValueError(f"window {window} of {item} does not follow window {part.stop - 1}")
            self.parts[item] = Part(part.first, window + 1, ends)
        self.buffer.append(rows)
        self.num_rows += len(rows)
        self.num_bytes += rows.nbytes
        self.buffered_bytes += rows.nbytes
        if self.buffered_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def publish_if_full(self) -> None:
        """Publish the shard if it is large or old enough. Call it between batches."""
        full = self.num_bytes >= SHARD_BYTES if self.max_rows is None else self.num_rows >= self.max_rows
        if full or time.monotonic() - self.opened >= SHARD_SECONDS:
            self.publish()

    def publish(self) -> None:
        """Give the shard its name, whole and on disk, and begin another."""
        if not self.parts:
            self._open()
            return
        file = self._flush()
        partly = {item: part for item, part in self.parts.items() if part.first > 0 or not part.ends}
        stamps = {item: self.stamps[item] for item in self.parts if item in self.stamps}
        file.add_key_value_metadata({PARTS_KEY: json.dumps(partly), STAMPS_KEY: json.dumps(stamps)})
        with disk_errors(self.folder):
            file.close()
            publish(self.temporary, self.folder / f"{self.prefix}-{self.num_shards:05d}.parquet")
        self.num_shards += 1
        self._open()

    def _flush(self) -> pq.ParquetWriter:
        """Encode the rows in memory and return the open file."""
        with disk_errors(self.folder):
            if self.file is None:
                self.file = _open_parquet(self.temporary, self.schema)
            if self.buffer:
                rows = pa.concat_tables(self.buffer).combine_chunks()
                self.file.write_table(rows.cast(self.schema), row_group_size=len(rows))
        self.buffer, self.buffered_bytes = [], 0
        return self.file


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of killed writers."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}embeddings-*"):
        remove(path)
