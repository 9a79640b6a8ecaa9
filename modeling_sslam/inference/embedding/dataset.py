"""A data set with an audio column as shards of rows whose audio is still encoded.

Nothing is decoded by `datasets`, which would need torchcodec for that, and nothing copied into its cache: local files
are read where they lie, and repositories on the Hub are streamed.
"""

from collections.abc import Iterator
from pathlib import Path

import datasets
from huggingface_hub import HfApi

from ...common.encoded_audio import ID_COLUMNS, EncodedAudio
from ...common.errors import InferenceError
from .sounds import Sound, is_saved_dataset

# A saved data set has no shards of its own; more than there will be processes.
SAVED_DATASET_SHARDS = 1024


class AudioDataset:
    """The sounds of a data set, by shards that depend on nothing but the data.

    Args:
        source: Id on the Hub, or a local folder of parquet, arrow or WebDataset shards or of `save_to_disk`.
        audio_column, id_column: By default the only audio column, and the first of `video_id`, `id` and `__key__`
            or, where there is none, the audio's own file name.

    Raises:
        InferenceError: If it cannot be told which columns to read, naming those there are.
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
                # A branch may move on before another call, and with it the rows.
                revision = HfApi().dataset_info(source, revision=revision).sha
            dataset = _open(path, source, config_name, split, revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InferenceError(f"{source} cannot be read as a data set: {error}") from error
        features = dataset.features
        if features is None:
            raise InferenceError(f"The columns of {source} are not known before it is read.")
        if audio_column is None:
            candidates = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
            candidates = candidates or [name for name in ("audio",) if name in features]
            if len(candidates) != 1:
                raise InferenceError(
                    f"{source} has {'several' if candidates else 'no'} audio columns; choose one of "
                    f"{', '.join(candidates or features)} (--audio-column)."
                )
            audio_column = candidates[0]
        id_column = id_column or next((name for name in ID_COLUMNS if name in features), None)
        columns = [name for name in (audio_column, id_column) if name is not None]
        for name in columns:
            if name not in features:
                raise InferenceError(f"{source} has no column {name!r}; it has {', '.join(features)}.")
        self.audio_column, self.id_column = audio_column, id_column
        self.description = {
            "dataset": str(path.resolve()) if path.is_dir() else source,
            "config_name": config_name,
            "split": split,
            "revision": revision,
            "audio_column": audio_column,
            "id_column": id_column,
            "num_shards": dataset.num_shards,
        }
        self.dataset = dataset.select_columns(list(dict.fromkeys(columns)))
        self.dataset = self.dataset.cast_column(audio_column, EncodedAudio())

    def sounds(self, rank: int = 0, num_processes: int = 1) -> Iterator[Sound]:
        """The share of one process. The keys are shard and row, whatever the number of processes.

        Processes share out the shards; if there are more processes than shards, the rows of each.
        """
        num_shards = self.dataset.num_shards
        by_row = num_shards < num_processes
        for shard in range(num_shards) if by_row else range(rank, num_shards, num_processes):
            for index, row in enumerate(self.dataset.shard(num_shards, shard)):
                if by_row and index % num_processes != rank:
                    continue
                key, audio = f"{shard:05d}-{index:07d}", row[self.audio_column] or {"bytes": b"", "path": None}
                encoded = audio["bytes"] if audio["bytes"] is not None else audio["path"] or b""
                name = row[self.id_column] if self.id_column else Path(audio["path"] or key).name
                yield Sound(key, str(name), encoded)


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
