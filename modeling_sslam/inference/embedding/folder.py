"""Embeddings of any number of sounds as a folder of Parquet, by one process or many, which may be killed at any time.

OUT/data/*.parquet    the rows, one vector each
OUT/README.md         the columns and how to read them
OUT/settings.json     the settings; continuing with other settings is refused
OUT/failures.csv      the sounds that could not be used; every call tries them again
"""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ...common.errors import ClipError, InferenceError
from ...common.files import write_text
from ...common.recordings import find_recordings
from ...common.text import escape_controls, escape_markdown, escape_undecodable, unescape_undecodable
from .embedder import ClipEmbedding, Embedder
from .shards import (
    ShardProgress,
    ShardWriter,
    Stamp,
    disk_errors,
    drop_items,
    next_call,
    read_progress,
    remove_leftovers,
)
from .sounds import Sound
from .table import COLUMNS, table_schema, to_table

if TYPE_CHECKING:
    # Importing `datasets` takes a second, which sound files need not wait for.
    from .dataset import AudioDataset

# The first process to finish waits for the last one for as long as that takes.
PATIENCE = timedelta(days=365)
CARD = """\
---
configs:
- config_name: default
  data_files: data/*.parquet
tags:
- audio
- embeddings
---
# Embeddings by {model}

Vectors of {size} numbers ({dtype_out}) of {source}: pooling {pooling}, layer {layer}, a window of {window:g} s every
{hop:g} s. `settings.json` has every setting. `failures.csv`, if it exists, lists the sounds that could not be used.

| column | |
|---|---|
{columns}

```python
import datasets, duckdb, numpy as np, pyarrow.parquet as pq

datasets.load_dataset({out}, split="train").with_format("numpy")
table = pq.read_table({data})  # or pandas.read_parquet, polars.read_parquet
vectors = np.stack(table["embedding"].to_pandas())  # ({size} columns), for faiss or scikit-learn
duckdb.sql({query})
```
"""


class Summary(NamedTuple):
    """Content of the folder after a call.

    Attributes:
        num_sounds: Number of sounds that the folder holds whole.
        num_failures: Number of sounds that could not be used.
        stopped: Whether the call was stopped.
        changed: Paths of the sound files that had changed, so that their old rows were dropped.
        removed: Paths of the folder's sounds that no longer exist, sorted.
    """

    num_sounds: int
    num_failures: int
    stopped: bool
    changed: list[str]
    removed: list[str]


class Processes(NamedTuple):
    """This process among those that `accelerate launch` or torchrun started together.

    Args:
        rank: Number of this process.
        num_processes: Number of all processes.
        device: Device of this process, or "auto".
        wait: Waits for all processes.
        broadcast: Returns the first process's value in all processes.
    """

    rank: int
    num_processes: int
    device: str | torch.device
    wait: Callable[[], None]
    broadcast: Callable[[Any], Any]

    @classmethod
    def find(cls) -> "Processes":
        """Join the processes of this launch."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, "auto", lambda: None, lambda value: value)
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list, parse_flag_from_env

        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
        return cls(
            state.process_index,
            state.num_processes,
            state.device,
            state.wait_for_everyone,
            lambda value: broadcast_object_list([value])[0],
        )


class Plan(NamedTuple):
    """The decisions of the first process, which all processes follow.

    Args:
        settings: All that the rows depend on.
        progress: The sounds that the folder holds.
        files: Paths of the sound files that are still to be embedded, by their names; empty for a data set.
        stamps: The stamps of these files, by the same names. A file that cannot be found has none.
        changed, removed: See [`Summary`].
        call: Number of this call, for the names of its shards.
    """

    settings: dict[str, Any]
    progress: ShardProgress
    files: dict[str, str]
    stamps: dict[str, Stamp]
    changed: list[str]
    removed: list[str]
    call: int


def embed_to_folder(
    sources: "list[str] | AudioDataset",
    out: str | Path,
    embedder: Embedder,
    model_id: str,
    dtype: str = "float32",
    shard_rows: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
    prune: bool = False,
) -> Summary:
    """Embed the sounds that a folder does not hold yet, and anew the files that have changed since.

    Args:
        sources: Files, folders and patterns as for [`find_recordings`], or a data set.
        out: Folder to write or to continue. Processes on several machines must see the same one.
        embedder: The embedder, whose settings may not change from call to call.
        model_id: Content of the column `model`.
        dtype: Type of the vectors, "float32" or "float16".
        shard_rows: Approximate number of rows of a shard; by default its size is 128 MB.
        should_stop: Called after every batch. If it returns true, the call ends and keeps what it has embedded.
        processes: By default the processes of this launch.
        prune: Whether to drop the rows of sound files that no longer exist.

    Returns:
        The content of the folder after this call.

    Raises:
        InferenceError: If `out` was begun with other settings, is being written by another call, holds other files or
            cannot be written, or if the rows of a data set are to be pruned.
    """
    if prune and not isinstance(sources, list):
        raise InferenceError("Only the rows of sound files can be pruned, not those of a data set; leave out --prune.")
    out, processes = Path(out), processes or Processes.find()
    key = "path" if isinstance(sources, list) else "row"
    schema = table_schema(embedder, key, dtype)
    lock = FileLock(out / ".lock")
    try:
        plan = _agree(processes, partial(_plan, sources, out, embedder, model_id, dtype, schema, lock, prune))
        prefix = f"embeddings-{plan.call:04d}-{processes.rank:05d}"
        metadata = {"sslam.settings": plan.settings}
        sounds = _remaining_sounds(sources, plan, processes)
        total = len(sounds) if isinstance(sounds, list) else None
        # Only the first process shows a bar, because the shares are alike.
        disable = None if processes.rank == 0 else True
        with (
            ShardWriter(out / "data", prefix, schema, key, metadata, shard_rows, plan.stamps) as writer,
            tqdm(total=total, unit="sound", desc="Embedding", disable=disable, dynamic_ncols=True) as bar,
        ):

            def on_failure(sound: Sound, error: ClipError) -> None:
                _record_failure(out, sound, error)
                bar.update()

            with closing(embedder.stream(sounds, on_failure)) as batches:
                to_rows = partial(to_table, embedder=embedder, schema=schema, model_id=escape_undecodable(model_id))
                stopped = _write_batches(batches, writer, to_rows, bar, should_stop)
            writer.publish()
        if not stopped:
            # A launcher ends all processes as soon as one ends with an error status, so the last one must be done.
            processes.wait()
        num_sounds, num_failures = len(read_progress(out / "data", key).done), len(read_failures(out))
        return Summary(num_sounds, num_failures, stopped, plan.changed, plan.removed)
    finally:
        lock.release()


def read_failures(out: Path) -> list[dict[str, str]]:
    """Read the rows of `failures.csv`: path (or id), reason and detail."""
    path = out / "failures.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _agree(processes: Processes, make_plan: Callable[[], Plan]) -> Plan:
    """Let the first process plan for all, or raise its error in all.

    Another process might see other files, or shards that the first one has written since.
    """
    plan: Plan | InferenceError | None = None
    if processes.rank == 0:
        try:
            plan = make_plan()
        except InferenceError as error:
            plan = error
    plan = processes.broadcast(plan)
    if isinstance(plan, InferenceError):
        raise plan
    return plan


def _plan(
    sources: "list[str] | AudioDataset",
    out: Path,
    embedder: Embedder,
    model_id: str,
    dtype: str,
    schema: pa.Schema,
    lock: FileLock,
    prune: bool,
) -> Plan:
    """Lock the folder for this call, prepare it and list the sounds to embed."""
    # Parquet holds UTF-8, so a file has a name besides its path.
    files: dict[str, str] = {}
    if isinstance(sources, list):
        files = {escape_undecodable(path): path for path in map(os.path.normpath, find_recordings(sources))}
    settings = _settings(embedder, model_id, dtype, list(files.values()) if isinstance(sources, list) else sources)
    (out / "data").mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InferenceError(f"{out} is being written by another call; choose another.") from None
    _begin(out, settings, schema)
    data, key = out / "data", schema.names[0]
    progress = read_progress(data, key)
    # Read this before shards are removed below, because the numbers of calls must keep rising.
    call = next_call(data)
    stamps = {name: stamp for name, path in files.items() if (stamp := _stamp(path)) is not None}
    # Shards of earlier versions have no stamps.
    changed = [name for name, stamp in stamps.items() if progress.stamps.get(name, stamp) != stamp]
    removed = _removed_files(progress) if isinstance(sources, list) else []
    dropped = {*changed, *(removed if prune else ())}
    if dropped:
        drop_items(data, key, dropped)
        progress = read_progress(data, key)
    remaining = {name: path for name, path in files.items() if name not in progress.done}
    return Plan(
        settings,
        progress,
        files=remaining,
        stamps={name: stamp for name, stamp in stamps.items() if name in remaining},
        changed=[files[name] for name in changed],
        removed=list(map(unescape_undecodable, removed)),
        call=call,
    )


def _stamp(path: str) -> Stamp | None:
    try:
        status = os.stat(path)
    except OSError:
        # Reading the file will report the fault.
        return None
    return Stamp(status.st_size, status.st_mtime_ns)


def _removed_files(progress: ShardProgress) -> list[str]:
    """Return the names of the folder's sounds whose files no longer exist, sorted."""
    return sorted(name for name in {*progress.done, *progress.begun} if not _exists(unescape_undecodable(name)))


def _exists(path: str) -> bool:
    """Tell whether a file exists. One that cannot be looked up for another reason counts as existing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _settings(embedder: Embedder, model_id: str, dtype: str, source: "list[str] | AudioDataset") -> dict[str, Any]:
    """Return everything that the rows depend on, as JSON values."""
    if not isinstance(source, list):
        description = source.description
    elif all(os.path.isabs(path) for path in source):
        description = {"files": "by absolute path"}
    else:
        # A relative path means another file in another folder, and the same file would be embedded twice.
        description = {"files": f"by path from {os.getcwd()}"}
    return {"model": model_id, **embedder.settings(), "dtype_out": dtype, "source": description}


def _begin(out: Path, settings: dict[str, Any], schema: pa.Schema) -> None:
    """Prepare the folder for a call.

    Raises:
        InferenceError: If the folder was begun with other settings or holds other files.
    """
    path = out / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed:
            changes = "; ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in changed)
            raise InferenceError(f"{out} was begun with other settings: {changes}. Use the same, or another folder.")
    elif any((out / "data").iterdir()):
        raise InferenceError(f"{out}/data holds files, but {path} is missing; choose another folder.")
    key, shards = schema.names[0], f"{out.name}/data/*.parquet".replace("'", "''")
    card = CARD.format(
        model=escape_markdown(settings["model"]),
        source=escape_markdown(settings["source"].get("dataset", "sound files")),
        columns="\n".join(f"| `{name}` | {COLUMNS[name]} |" for name in schema.names),
        size=schema.field("embedding").type.list_size,
        out=_python_literal(out.name),
        data=_python_literal(f"{out.name}/data"),
        query=_python_literal(f"SELECT {key}, count(*) FROM '{shards}' GROUP BY {key}"),
        **{name: settings[name] for name in ("dtype_out", "pooling", "layer", "window", "hop")},
    )
    with disk_errors(out):
        write_text(out / "README.md", card)
        write_text(path, json.dumps(settings, indent=2) + "\n")
    (out / "failures.csv").unlink(missing_ok=True)
    remove_leftovers(out / "data")


def _python_literal(text: str) -> str:
    """Return text as a string of Python code in double quotes, on one line and of printable characters."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in quoted)


def _remaining_sounds(
    sources: "list[str] | AudioDataset", plan: Plan, processes: Processes
) -> list[Sound] | Iterator[Sound]:
    """Return this process's share of the sounds that are still to be embedded."""
    begun = plan.progress.begun
    if isinstance(sources, list):
        files = list(plan.files.items())[processes.rank :: processes.num_processes]
        return [Sound(name, path, path, begun.get(name, 0)) for name, path in files]
    return (
        sound._replace(first_window=begun.get(sound.key, 0))
        for sound in sources.sounds(processes.rank, processes.num_processes)
        if sound.key not in plan.progress.done
    )


def _write_batches(
    batches: Iterable[list[ClipEmbedding]],
    writer: ShardWriter,
    to_rows: Callable[[list[ClipEmbedding]], pa.Table],
    bar: tqdm,
    should_stop: Callable[[], bool],
) -> bool:
    """Write batches until none is left or `should_stop` returns true. Return whether it was stopped."""
    num_windows = 0
    for clips in batches:
        writer.write(to_rows(clips), [(clip.key, clip.window, clip.is_last) for clip in clips])
        writer.publish_if_full()
        num_windows += len(clips)
        bar.update(sum(clip.is_last for clip in clips))
        # This also redraws the bar, which does not advance within a long recording.
        bar.set_postfix(windows=num_windows)
        if should_stop():
            return True
    return False


def _record_failure(out: Path, sound: Sound, error: ClipError) -> None:
    """Report an unusable sound on standard error and append it to `failures.csv`."""
    tqdm.write(escape_controls(f"{sound.name}: {error}"), file=sys.stderr)
    path = out / "failures.csv"
    with (
        disk_errors(out),
        FileLock(out / ".failures.lock"),
        open(path, "a", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(("path" if sound.key == escape_undecodable(sound.name) else "id", "reason", "detail"))
        writer.writerow(map(escape_undecodable, (sound.name, error.reason, error.detail)))
