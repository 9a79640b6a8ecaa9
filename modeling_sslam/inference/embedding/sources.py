"""Sources of an embedding call: sound files or one data set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.errors import InferenceError
from .sounds import is_dataset

if TYPE_CHECKING:
    # Importing `datasets` takes a second, which sound files need not wait for.
    from .dataset import AudioDataset


def open_sources(sources: Iterable[str | Path], **options: Any) -> list[str] | AudioDataset:
    """Open a data set if the only source names one, or else return the sources as they are.

    Args:
        sources: Files, folders and patterns, or one data set.
        options: Options of [`AudioDataset`].

    Raises:
        InferenceError: If a data set is one source among others, or if it cannot be read.
    """
    names = [str(source) for source in sources]
    if not any(is_dataset(name) for name in names):
        return names
    if len(names) > 1:
        raise InferenceError("A data set is embedded by itself; name other files and folders in another call.")
    from .dataset import AudioDataset

    return AudioDataset(names[0], **options)
