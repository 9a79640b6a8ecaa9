"""Sources of an embedding call: sound files, one data set, or recordings in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...common.errors import InferenceError
from ...common.recordings import find_recordings
from .sounds import Sound, is_dataset, undecoded

if TYPE_CHECKING:
    # Importing `datasets` takes a second, which sound files need not wait for.
    from .dataset import AudioDataset


def open_sources(sources: Iterable[str | Path], **options: Any) -> list[str] | AudioDataset:
    """Open a data set if the only source names one, or else return the sources as they are.

    Args:
        sources: Files, folders and patterns, or one data set.
        options: Options of [`AudioDataset`].

    Raises:
        InferenceError: If a data set is one source among others, if it cannot be read, or if a source is no path.
    """
    names = []
    for source in sources:
        if not isinstance(source, (str, Path)):
            raise InferenceError(f"{type(source).__name__} is among paths; pass either paths or samples.")
        names.append(str(source))
    if not any(is_dataset(name) for name in names):
        return names
    if len(names) > 1:
        raise InferenceError("A data set is embedded by itself; name other files and folders in another call.")
    from .dataset import AudioDataset

    return AudioDataset(names[0], **options)


def find_sounds(sources: Any) -> Iterable[Sound]:
    """Find the sounds of the forms that [`embed`] takes.

    Raises:
        InferenceError: If the sources have no such form, or if there are no sounds.
    """
    if hasattr(sources, "sounds"):  # AudioDataset
        return sources.sounds()
    if hasattr(sources, "cast_column"):  # a data set of the library `datasets`
        from .dataset import dataset_sounds

        return dataset_sounds(sources)
    if isinstance(sources, (str, Path)) or _is_recording(sources):
        sources = [sources]
    if hasattr(sources, "read") or not isinstance(sources, Iterable):
        raise InferenceError(
            f"{type(sources).__name__} cannot be embedded; pass paths, a data set, the bytes of a file, samples, "
            'or {"array": samples, "sampling_rate": Hz}.'
        )
    remaining = iter(sources)
    first = list(islice(remaining, 1))
    if first and not isinstance(first[0], (str, Path)):
        return _recordings(chain(first, remaining))
    opened = open_sources(chain(first, remaining))
    if isinstance(opened, list):
        return [Sound(path, path, path) for path in find_recordings(opened)]
    return opened.sounds()


def _is_recording(source: Any) -> bool:
    """Tell whether a source is one recording and not several sources."""
    if isinstance(source, np.ndarray):
        return source.dtype.kind not in "OU"  # arrays of paths
    if isinstance(source, dict):
        return not source.keys().isdisjoint({"array", "raw", "bytes"})
    return isinstance(source, (bytes, torch.Tensor)) or hasattr(source, "get_all_samples")


def _recordings(values: Iterable[Any]) -> Iterator[Sound]:
    for index, value in enumerate(values):
        audio, name = undecoded(value)
        yield Sound(str(index), str(name or index), audio)
