"""Sounds to embed, and how to tell a data set from sound files."""

from pathlib import Path
from typing import Any, NamedTuple

from ...common.recordings import AUDIO_SUFFIXES

DATASET_SUFFIXES = {".parquet", ".arrow", ".tar"}


class Sound(NamedTuple):
    """One sound to embed.

    Args:
        key: Unique key: the path, or the place in a data set.
        name: The user's name for it: the path, or an id.
        audio: Path of its file, the encoded bytes, or samples; see [`waveform_blocks`].
        first_window: The first window to embed; those before it are skipped.
    """

    key: str
    name: str
    audio: Any
    first_window: int = 0


def undecoded(value: Any) -> tuple[Any, str | None]:
    """Return a recording in a form that [`waveform_blocks`] takes, and the path that a data set has put beside it.

    Args:
        value: A form that `waveform_blocks` takes, or the `{"bytes": ..., "path": ...}` of an undecoded data set.
    """
    if not isinstance(value, dict):
        return value, None
    path = value.get("path")
    if "bytes" not in value or "array" in value:
        return value, path
    return value["bytes"] if value["bytes"] is not None else path or b"", path


def is_saved_dataset(path: Path) -> bool:
    """Tell whether `save_to_disk` of `datasets` wrote a folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def is_dataset(source: str) -> bool:
    """Tell whether a source names a data set and not sound files.

    A data set is a folder that `save_to_disk` wrote, a folder with shards and without sound files, or a Hub id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        suffixes = {file.suffix.lower() for file in path.rglob("*")}
        return is_saved_dataset(path) or (bool(suffixes & DATASET_SUFFIXES) and not suffixes & AUDIO_SUFFIXES)
    owner, _, name = source.partition("/")
    is_id = bool(owner and name) and not set(source) & set("*?[") and "/" not in name
    return is_id and not path.exists() and path.suffix.lower() not in AUDIO_SUFFIXES
