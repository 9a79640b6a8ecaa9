"""Sounds of a data set with an audio column, shard by shard and still encoded.

`datasets` decodes nothing, because it would need torchcodec for that, and copies nothing into its cache: local files
are read where they lie, and repositories on the Hub are streamed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi

from ...common.encoded_audio import EncodedAudio, find_audio_column, find_id_column
from ...common.errors import InferenceError
from .sounds import Sound, is_saved_dataset, undecoded

# Shards of a data set of `save_to_disk`, which can be cut anywhere. There will be fewer processes than this.
SAVED_DATASET_SHARDS = 1024


class AudioDataset:
    """A data set whose sounds are shared out by shards. The shards depend on the data alone.

    Args:
        source: Id on the Hub, or a local folder of parquet, arrow or WebDataset shards or of `save_to_disk`.
        config_name: Configuration of a data set on the Hub.
        split: The split to read.
        revision: Branch, tag or commit of a data set on the Hub.
        audio_column: By default the only audio column.
        id_column: By default the first of `video_id`, `id` and `__key__`; without any, a sound's id is the name of its
            audio file.

    Raises:
        InferenceError: If the data set cannot be read or has no such columns. The message names the columns there are.
    """

    def __init__(
        self,
        source: str,
        config_name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        audio_column: str | None = None,
        id_column: str | None = None,
    ) -> None:
        path = Path(source).expanduser()
        try:
            if not path.is_dir():
                # Use the commit, because a branch may move before the next call and then have other rows.
                revision = HfApi().dataset_info(source, revision=revision).sha
            dataset = _open(path, source, config_name, split, revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InferenceError(f"{source} cannot be read as a data set: {error}") from error
        self.dataset, self.audio_column, self.id_column = _undecoded_columns(
            dataset, source, audio_column, id_column, "--audio-column"
        )
        self.description = {
            "dataset": str(path.resolve()) if path.is_dir() else source,
            "config_name": config_name,
            "split": split,
            "revision": revision,
            "audio_column": self.audio_column,
            "id_column": self.id_column,
            "num_shards": dataset.num_shards,
        }

    def sounds(self, rank: int = 0, num_processes: int = 1) -> Iterator[Sound]:
        """Read the sounds of one process.

        Processes share out the shards or, if there are more processes than shards, the rows of every shard. A sound's
        key is its shard and row, so it does not depend on the number of processes.
        """
        num_shards = self.dataset.num_shards
        by_row = num_shards < num_processes
        for shard in range(num_shards) if by_row else range(rank, num_shards, num_processes):
            for index, row in enumerate(self.dataset.shard(num_shards, shard)):
                if by_row and index % num_processes != rank:
                    continue
                key = f"{shard:05d}-{index:07d}"
                yield _sound(row, key, self.audio_column, self.id_column)


def dataset_sounds(dataset: Any) -> Iterator[Sound]:
    """Read the sounds of a data set that the caller has opened.

    Args:
        dataset: A `Dataset` or `IterableDataset` with one audio column, or with a column "audio" of paths, bytes or
            samples. Formats and transforms set on it are not applied.

    Raises:
        InferenceError: If it has several splits, or if it has no such column.
    """
    name = type(dataset).__name__
    if isinstance(dataset, dict):
        raise InferenceError(f"This {name} has the splits {', '.join(dataset)}; pass one of them.")
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise InferenceError(f"{name} cannot be embedded; pass a Dataset or an IterableDataset.")
    rows, audio_column, id_column = _undecoded_columns(dataset, f"this {name}", None, None, "select_columns")
    return (_sound(row, f"{index:07d}", audio_column, id_column) for index, row in enumerate(rows.with_format(None)))


def _undecoded_columns(
    dataset: Any, name: str, audio_column: str | None, id_column: str | None, option: str
) -> tuple[Any, str, str | None]:
    """Choose the columns of sounds and ids; return a data set of these, with undecoded audio, and their names.

    A column of samples stays as it is.

    Args:
        dataset: A `Dataset` or `IterableDataset`.
        name: Its name in messages.
        audio_column: The name that the user chose, or `None`.
        id_column: The name that the user chose, or `None`.
        option: The user's means to choose the audio column, for messages.

    Raises:
        InferenceError: If there are no such columns.
    """
    features = dataset.features
    if features is None:
        raise InferenceError(f"The columns of {name} are not known before it is read; open it with `features`.")
    try:
        audio_column = find_audio_column(name, features, audio_column, option)
        id_column = find_id_column(name, features, id_column)
    except ValueError as error:
        raise InferenceError(str(error)) from error
    dataset = dataset.select_columns(list(dict.fromkeys(filter(None, (audio_column, id_column)))))
    feature = features[audio_column]
    if isinstance(feature, (datasets.Audio, datasets.Value)) or (isinstance(feature, dict) and "bytes" in feature):
        dataset = dataset.cast_column(audio_column, EncodedAudio())
    return dataset, audio_column, id_column


def _sound(row: dict[str, Any], key: str, audio_column: str, id_column: str | None) -> Sound:
    audio, path = undecoded(row[audio_column] or b"")
    return Sound(key, str(row[id_column] if id_column else Path(path or key).name), audio)


def _open(
    path: Path, source: str, config_name: str | None, split: str, revision: str | None
) -> datasets.IterableDataset:
    if not is_saved_dataset(path):
        name = str(path) if path.is_dir() else source
        return datasets.load_dataset(name, config_name, split=split, revision=revision, streaming=True)
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"there is no split {split!r}, but {', '.join(saved)}")
        saved = saved[split]
    return saved.to_iterable_dataset(min(len(saved), SAVED_DATASET_SHARDS))
