"""Audio columns of data sets: how to find them and how to keep their files encoded."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import datasets

# The usual names of the column that names a data set's sounds, in order of preference.
ID_COLUMNS = ("video_id", "id", "__key__")


@dataclasses.dataclass
class EncodedAudio(datasets.Audio):
    """An audio column whose files stay encoded, as a struct of `bytes` and `path`.

    `datasets.Audio(decode=False)` is not enough: for tars and folders `datasets` asks for torchcodec even so.
    """

    decode: bool = False

    def encode_example(self, value: str | bytes | dict) -> dict:
        """Return the struct of a path, of the bytes of a file, or of a struct."""
        if isinstance(value, dict):
            return {"bytes": value.get("bytes"), "path": value.get("path")}
        return {"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": str(value)}


def find_audio_column(source: str, features: Mapping[str, Any], wanted: str | None, option: str) -> str:
    """Return the name of a data set's audio column.

    Args:
        source: The data set, as messages name it.
        features: The data set's columns and their types.
        wanted: The name that the user chose, or `None` for the only audio column.
        option: The option or setting that chooses the column, for the message.

    Raises:
        ValueError: If there is no such column, or not exactly one to take. The message names the columns there are.
    """
    if wanted is not None:
        return _existing_column(source, features, wanted)
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    candidates = candidates or [name for name in ("audio",) if name in features]
    if len(candidates) != 1:
        number = "several" if candidates else "no"
        raise ValueError(
            f"{source} has {number} audio columns; choose one of {', '.join(candidates or features)} ({option})."
        )
    return candidates[0]


def find_id_column(source: str, features: Mapping[str, Any], wanted: str | None) -> str | None:
    """Return the name of the column that names a data set's sounds, or `None` where there is none.

    Args:
        source: The data set, as messages name it.
        features: The data set's columns and their types.
        wanted: The name that the user chose, or `None` for the first of [`ID_COLUMNS`].

    Raises:
        ValueError: If there is no column `wanted`. The message names the columns there are.
    """
    if wanted is not None:
        return _existing_column(source, features, wanted)
    return next((name for name in ID_COLUMNS if name in features), None)


def _existing_column(source: str, features: Mapping[str, Any], name: str) -> str:
    if name not in features:
        raise ValueError(f"{source} has no column {name!r}; it has {', '.join(features)}.")
    return name
