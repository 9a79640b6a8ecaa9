"""Embeddings of any number of sounds as a folder of Parquet, by one process or many, which may be killed at any time.

OUT/data/*.parquet    the rows; README.md in the same folder says what is in them and how to read them
OUT/settings.json     what they were made with: to go on with anything else is refused
OUT/failures.csv      the sounds that could not be used, which every call tries again
"""

import csv
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ...common.errors import ClipError, InferenceError
from ...common.files import replacing
from ...common.recordings import find_recordings
from .embedder import Embedder
from .shards import Progress, ShardWriter, read_progress, remove_leftovers
from .sounds import Sound
from .table import COLUMNS, table_schema, to_table

if TYPE_CHECKING:
    from .dataset import AudioDataset

# The first process to finish waits for the last, however long that takes.
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
{hop:g} s. `settings.json` has every setting, `failures.csv` (where there is one) the sounds that could not be used.

| column | |
|---|---|
{columns}

```python
import datasets, duckdb, numpy as np, pyarrow.parquet as pq

datasets.load_dataset("{out}", split="train").with_format("numpy")
table = pq.read_table("{out}/data")  # or pandas.read_parquet, polars.read_parquet
vectors = np.stack(table["embedding"].to_pandas())  # ({size} columns), for faiss or scikit-learn
duckdb.sql("SELECT {key}, count(*) FROM '{out}/data/*.parquet' GROUP BY {key}")
```
"""


class Summary(NamedTuple):
    """Sounds that the folder holds whole, those that could not be used, and whether work was stopped."""

    num_sounds: int
    num_failures: int
    stopped: bool


class Processes(NamedTuple):
    """This process among those that work together, as `accelerate launch` or torchrun started them."""

    rank: int
    count: int
    device: str | torch.device
    wait: Callable[[], None]
    broadcast: Callable[[Any], Any]

    @classmethod
    def find(cls) -> "Processes":
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


def embed_to_folder(
    sources: "list[str] | AudioDataset",
    out: str | Path,
    embedder: Embedder,
    model_id: str,
    dtype: str = "float32",
    shard_rows: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes | None = None,
) -> Summary:
    """Embeds what `out` does not hold yet.

    Args:
        sources: Files, folders and patterns as for [`find_recordings`], or a data set.
        out: Folder to write, or to go on with. Processes on several machines must see the same one.
        model_id: What the column `model` is to say.
        dtype: Of the vectors: "float32" or "float16".
        shard_rows: Rows of a file, about; by default as many as make 128 MB.
        should_stop: Asked after every batch; what was embedded until then is kept.
        processes: By default those of this launch.

    Raises:
        InferenceError: If `out` was begun with other settings, is being written by another call or holds other files.
    """
    out, processes = Path(out), processes or Processes.find()
    key = "path" if isinstance(sources, list) else "row"
    schema = table_schema(embedder, key, dtype)
    lock, plan = FileLock(out / ".lock"), None
    try:
        if processes.rank == 0:
            try:
                plan = _plan(sources, out, embedder, model_id, dtype, schema, lock)
            except InferenceError as error:
                plan = error
        # Decided once: another process might see other files, or shards that the first has written since.
        plan = processes.broadcast(plan)
        if isinstance(plan, InferenceError):
            raise plan
        settings, progress, paths, call = plan
        if isinstance(sources, list):
            paths = paths[processes.rank :: processes.count]
            sounds = (Sound(path, path, path, progress.begun.get(path, 0)) for path in paths)
        else:
            sounds = (
                sound._replace(first_window=progress.begun.get(sound.key, 0))
                for sound in sources.sounds(processes.rank, processes.count)
                if sound.key not in progress.done
            )
        prefix = f"embeddings-{call:04d}-{processes.rank:05d}"
        writer = ShardWriter(out / "data", prefix, schema, key, {"sslam.settings": settings}, shard_rows)
        total = len(paths) if isinstance(sources, list) else None
        # One bar for all: that of the first process, whose share is like the others'.
        disable = None if processes.rank == 0 else True
        with tqdm(total=total, unit="sound", desc="Embedding", disable=disable, dynamic_ncols=True) as bar:

            def on_failure(sound: Sound, error: ClipError) -> None:
                _record_failure(out, sound, error)
                bar.update()

            num_windows, stopped = 0, False
            with closing(embedder.stream(sounds, on_failure)) as batches:
                for clips in batches:
                    rows = to_table(clips, embedder, schema, model_id)
                    writer.write(rows, [(clip.key, clip.window, clip.is_last) for clip in clips])
                    writer.publish_if_full()
                    num_windows += len(clips)
                    bar.update(sum(clip.is_last for clip in clips))
                    # Also drawn where a recording goes on for hours.
                    bar.set_postfix(windows=num_windows)
                    if stopped := should_stop():
                        break
        writer.publish()
        if not stopped:
            # A launcher ends all processes once one has an error to report.
            processes.wait()
        return Summary(len(read_progress(out / "data", key).done), len(read_failures(out)), stopped)
    finally:
        lock.release()


def read_failures(out: Path) -> list[dict[str, str]]:
    """The rows of `failures.csv`: path (or id), reason and detail."""
    path = out / "failures.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Plan(NamedTuple):
    """What all processes are to know before they begin; `paths` are the files still to embed."""

    settings: dict[str, Any]
    progress: Progress
    paths: list[str]
    call: int


def _plan(
    sources: "list[str] | AudioDataset",
    out: Path,
    embedder: Embedder,
    model_id: str,
    dtype: str,
    schema: pa.Schema,
    lock: FileLock,
) -> Plan:
    """Takes the folder for this call and sees what is to be done."""
    files = None
    if isinstance(sources, list):
        files = list(dict.fromkeys(os.path.normpath(path) for path in find_recordings(sources)))
    settings = _settings(embedder, model_id, dtype, files or sources)
    (out / "data").mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InferenceError(f"{out} is being written by another call; choose another.") from None
    _begin(out, settings, schema)
    progress = read_progress(out / "data", schema.names[0])
    remaining = [path for path in files or [] if path not in progress.done]
    return Plan(settings, progress, remaining, _next_call(out / "data"))


def _settings(embedder: Embedder, model_id: str, dtype: str, source: "list[str] | AudioDataset") -> dict[str, Any]:
    """All that the rows depend on, in plain values."""
    if not isinstance(source, list):
        description = source.description
    elif all(os.path.isabs(path) for path in source):
        description = {"files": "by absolute path"}
    else:
        # The same file must have the same path in every call, or it would be embedded twice.
        description = {"files": f"by path from {os.getcwd()}"}
    return {"model": model_id, **embedder.settings(), "dtype_out": dtype, "source": description}


def _begin(out: Path, settings: dict[str, Any], schema: pa.Schema) -> None:
    """Makes the folder ready for another call, unless it was begun with other settings."""
    path = out / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed:
            changes = "; ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in changed)
            raise InferenceError(f"{out} was begun with other settings: {changes}. Use the same, or another folder.")
    elif any((out / "data").iterdir()):
        raise InferenceError(f"{out}/data holds files, but {path} is missing; choose another folder.")
    card = CARD.format(
        source=settings["source"].get("dataset", "sound files"),
        columns="\n".join(f"| `{name}` | {COLUMNS[name]} |" for name in schema.names),
        size=schema.field("embedding").type.list_size,
        out=out.name,
        key=schema.names[0],
        **{name: settings[name] for name in ("model", "dtype_out", "pooling", "layer", "window", "hop")},
    )
    for target, text in ((out / "README.md", card), (path, json.dumps(settings, indent=2) + "\n")):
        with replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    (out / "failures.csv").unlink(missing_ok=True)
    remove_leftovers(out / "data")


def _next_call(folder: Path) -> int:
    return 1 + max((int(path.name.split("-")[1]) for path in folder.glob("embeddings-*.parquet")), default=-1)


def _record_failure(out: Path, sound: Sound, error: ClipError) -> None:
    tqdm.write(f"{sound.name}: {error}", file=sys.stderr)
    path = out / "failures.csv"
    with FileLock(out / ".failures.lock"), open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(("path" if sound.key == sound.name else "id", "reason", "detail"))
        writer.writerow((sound.name, error.reason, str(error).removeprefix(f"{error.reason}: ")))
