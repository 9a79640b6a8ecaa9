"""Sounds to embed, and how to tell a data set from sound files."""

from pathlib import Path
from typing import NamedTuple

from ...common.recordings import audio_suffixes

DATASET_SUFFIXES = {".parquet", ".arrow", ".tar"}


class Sound(NamedTuple):
    """Something to embed.

    Args:
        key: What tells it apart from the others.
        name: What its user calls it.
        audio: Path of its file, or the encoded bytes.
        first_window: Windows before this are not wanted.
    """

    key: str
    name: str
    audio: bytes | str
    first_window: int = 0


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` of `datasets` wrote."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def is_dataset(source: str) -> bool:
    """Whether a source names a data set rather than sound files: a folder that has shards of one and no sound files,
    or an id on the Hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        suffixes = {file.suffix.lower() for file in path.rglob("*")}
        return is_saved_dataset(path) or (bool(suffixes & DATASET_SUFFIXES) and not suffixes & audio_suffixes())
    owner, _, name = source.partition("/")
    is_id = bool(owner and name) and not set(source) & set("*?[") and "/" not in name
    return is_id and not path.exists() and path.suffix.lower() not in audio_suffixes()
