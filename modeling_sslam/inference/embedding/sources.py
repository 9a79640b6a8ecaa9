"""Sources of an embedding call: sound files or one data set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.errors import InferenceError
from .sounds import is_dataset

if TYPE_CHECKING:
    from .dataset import AudioDataset


def open_sources(sources: Iterable[str | Path], **options: Any) -> list[str] | AudioDataset:
    """The sources as they are, or the data set that the only one names.

    Args:
        options: Of [`AudioDataset`].
    """
    sources = [str(source) for source in sources]
    if not any(is_dataset(source) for source in sources):
        return sources
    if len(sources) > 1:
        raise InferenceError("A data set is embedded by itself; name other files and folders in another call.")
    # Here, because importing `datasets` takes a second that sound files need not wait for.
    from .dataset import AudioDataset

    return AudioDataset(sources[0], **options)
