"""Any collection of sound as one stream of examples whose audio stays encoded.

`DataConfig.source` can be:
- a Hub dataset (`agkphysics/AudioSet`), streamed or downloaded first, or a builder of `datasets` with `data_files`
  (`parquet`, `arrow`, `webdataset`, `json`; local paths, globs or URLs);
- a local folder of a dataset: parquet, arrow or WebDataset tar shards, an audiofolder with its `metadata.csv` or
  `metadata.jsonl`, or the output of `Dataset.save_to_disk`;
- a `.tsv` manifest: the root folder in the first line, then `relative/path.wav<TAB>number` in each line. Labels are
  read from the `.lbl` file beside it;
- a `.csv` table with a column of paths relative to it and, optionally, a column of labels (several in a cell are
  separated by `;`) and a column `split`;
- a `.yaml` file of [`SceneSettings`]: scenes mixed from recordings while they are read, new ones in each epoch;
- any other folder: all sound files in it. With labels, those in its subfolder of the split's name, if it has a
  subfolder for each split; labels are the names of the enclosing folders.

`+` joins several splits: `fold1+fold2`.

[`open_source`] finds the examples and their columns. [`Source.in_shards`] turns them into a `datasets.IterableDataset`
of shards, which ranks and workers share and each epoch reorders. Neither reads or decodes audio.
"""

import atexit
import dataclasses
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp
import datasets
import numpy as np

from modeling_sslam.common.encoded_audio import EncodedAudio
from training.data.columns import Columns, find_columns, find_group_column
from training.data.config import DataConfig
from training.data.listings import (
    Listing,
    as_dataset,
    chosen_splits,
    columns_of,
    find_files,
    has_split_column,
    list_folder,
    read_manifest,
    read_table,
    split_names,
)
from training.data.mixing.mixer import Mixer
from training.data.mixing.pools import Pool, make_pools, scene_id
from training.data.mixing.recordings import Recordings
from training.data.mixing.settings import SETTINGS_SUFFIXES, SceneSettings, read_settings
from training.data.seeding import generator_for

logger = logging.getLogger(__name__)

# Threads of pyarrow release files a moment after the last row of a Parquet stream. If the interpreter has ended by
# then, the process aborts (https://github.com/apache/arrow/issues/45214). The program therefore waits before it ends.
atexit.register(time.sleep, 0.2)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SHARD_SUFFIXES = (".parquet", ".arrow", ".tar")
# Enough shards to mix a folder by their order. `datasets` is slow with many more.
MAX_SHARDS = 1024


class Part(Protocol):
    """The examples of one split."""

    def in_shards(self, num_readers: int, seed: int | None) -> datasets.IterableDataset:
        """Return the examples, cut into shards.

        Args:
            num_readers: Number of worker processes over all ranks.
            seed: Mixes examples whose order costs nothing to change; `None` keeps their order.
        """

    def rows(self, columns: Sequence[str]) -> Iterable[dict[str, Any]]:
        """Return the examples' values in some columns, in the order of the source."""

    def indexed(self) -> datasets.Dataset:
        """Return the examples for access by index, with encoded audio.

        Raises:
            ValueError: If they can only be streamed.
        """


@dataclasses.dataclass(frozen=True)
class ListedPart:
    """A listing of sound files. Mixing a listing is free, so it is mixed whole; each epoch then varies that order.

    Args:
        listing: An Arrow table, which worker processes share; each would soon have its own copy of Python lists.
    """

    listing: datasets.Dataset

    def in_shards(self, num_readers: int, seed: int | None) -> datasets.IterableDataset:
        """See [`Part.in_shards`]."""
        size = len(self.listing)
        mixed = self.listing
        if seed is not None:
            order = np.random.default_rng(seed).permutation(size)
            columns = self.listing.to_dict()
            mixed = datasets.Dataset.from_dict({name: [column[i] for i in order] for name, column in columns.items()})
        return mixed.to_iterable_dataset(choose_num_shards(size, num_readers))

    def rows(self, columns: Sequence[str]) -> Iterable[dict[str, Any]]:
        """See [`Part.rows`]."""
        return self.listing.select_columns(list(columns))

    def indexed(self) -> datasets.Dataset:
        """See [`Part.indexed`]."""
        return self.listing


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """A dataset on disk, which can be cut anywhere."""

    dataset: datasets.Dataset
    columns: Columns

    def in_shards(self, num_readers: int, seed: int | None) -> datasets.IterableDataset:
        """See [`Part.in_shards`]."""
        num_shards = choose_num_shards(len(self.dataset), num_readers)
        return keep_encoded(self.dataset.to_iterable_dataset(num_shards), self.columns)

    def rows(self, columns: Sequence[str]) -> Iterable[dict[str, Any]]:
        """See [`Part.rows`]."""
        return keep_encoded(self.dataset.to_iterable_dataset(), self.columns).select_columns(list(columns))

    def indexed(self) -> datasets.Dataset:
        """See [`Part.indexed`]."""
        return keep_encoded(self.dataset, self.columns)


@dataclasses.dataclass(frozen=True)
class StreamedPart:
    """A dataset that is read as a stream of files.

    Args:
        dataset: The stream.
        columns: Its columns.
        reopen: Opens the stream again with an argument `columns`, so that only those are read; `None` if the file
            format stores whole rows.
    """

    dataset: datasets.IterableDataset
    columns: Columns
    reopen: "partial[datasets.IterableDataset] | None" = None

    def in_shards(self, num_readers: int, seed: int | None) -> datasets.IterableDataset:
        """See [`Part.in_shards`]."""
        # Parquet files can be cut further, into their row groups.
        too_few = self.dataset.num_shards < num_readers
        return keep_encoded(self.dataset.reshard() if too_few else self.dataset, self.columns)

    def rows(self, columns: Sequence[str]) -> Iterable[dict[str, Any]]:
        """See [`Part.rows`]."""
        if self.reopen is not None and self.columns.audio not in columns:
            return self.reopen(columns=list(columns))
        return keep_encoded(self.dataset, self.columns).select_columns(list(columns))

    def indexed(self) -> datasets.Dataset:
        """See [`Part.indexed`]."""
        raise ValueError("The examples are streamed; set streaming to false.")


@dataclasses.dataclass(frozen=True)
class Source:
    """An open source: where its examples are and the names of their columns.

    Args:
        config: How to read it.
        parts: The examples, split by split.
        columns: The columns that matter.
        mixer: Mixes the examples' sound and labels, if they are scenes; the examples then only have names.
    """

    config: DataConfig
    parts: Sequence[Part]
    columns: Columns
    mixer: Mixer | None = None

    def in_shards(self, num_readers: int, seed: int) -> datasets.IterableDataset:
        """Return all examples, cut into shards.

        Args:
            num_readers: Number of worker processes over all ranks. The number of shards is a multiple of it where the
                format allows.
            seed: Mixes a listing, unless `config.shuffle_buffer` is 0.
        """
        order_seed = seed if self.config.shuffle_buffer else None
        parts = [part.in_shards(num_readers, order_seed) for part in self.parts]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the examples' values in some columns, in the order of the source."""
        for part in self.parts:
            yield from part.rows(columns)

    def indexed(self) -> datasets.Dataset:
        """Return the examples for access by index, with encoded audio.

        Raises:
            ValueError: If they can only be streamed.
        """
        return datasets.concatenate_datasets([part.indexed() for part in self.parts])

    def id(self, row: dict[str, Any]) -> str:
        """Return a clip's name: from the id column, else the audio's path, else a digest of its bytes."""
        if self.columns.id is not None:
            return str(row[self.columns.id])
        encoded, path = self.audio(row)
        return path or hashlib.blake2b(encoded or b"", digest_size=8).hexdigest()

    def audio(self, row: dict[str, Any]) -> tuple[bytes | None, str | None]:
        """Return an example's encoded file and its path or name."""
        value = row[self.columns.audio]
        if isinstance(value, bytes):
            return None, os.fsdecode(value)
        if isinstance(value, str):
            return None, value
        return (value["bytes"], value["path"]) if value else (b"", None)

    def labels(self, row: dict[str, Any]) -> list[str]:
        """Return an example's labels by name, however the column stores them."""
        names, value = self.columns.label_names, row[self._label_column]
        values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return [names[v] if names and isinstance(v, int) else str(v) for v in values]

    def ids_and_labels(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each clip's name and labels. Audio is read only if the names follow from it, and never decoded."""
        for row in self.rows([self._label_column, self.columns.id or self.columns.audio]):
            yield self.id(row), self.labels(row)

    def read_as(self, config: DataConfig) -> "Source":
        """Return the source that `config` describes: this one if the data are the same, else opened anew.

        Raises:
            ValueError, FileNotFoundError: See [`open_source`].
        """
        if all(getattr(config, name) == getattr(self.config, name) for name in SETTINGS_OF_OPENING):
            return dataclasses.replace(self, config=config)
        return open_source(config)

    @property
    def _label_column(self) -> str:
        if self.columns.label is None:
            raise ValueError(f"{self.config.source} is read without labels; set label_column.")
        return self.columns.label


# The settings that decide what `open_source` finds.
SETTINGS_OF_OPENING = (
    *("source", "config_name", "split", "revision", "data_files", "streaming", "read_timeout"),
    *("audio_column", "id_column", "label_column", "group_column"),
)


def open_source(config: DataConfig) -> Source:
    """Open the source that a configuration names.

    Raises:
        ValueError: If a column or split does not exist or is ambiguous. The message lists those that exist.
        FileNotFoundError: If a local source has no sound files.
    """
    path = Path(config.source).expanduser()
    if path.suffix in SETTINGS_SUFFIXES:
        return _open_scenes(path, config)
    listing = None
    if path.suffix == ".tsv":
        listing = read_manifest(path, with_labels=config.label_column is not None)
    elif path.suffix == ".csv":
        listing = read_table(path, config)
    elif _is_plain_folder(path, config):
        listing = list_folder(path, config)
    if listing is not None:
        return Source(config, [ListedPart(as_dataset(listing))], columns_of(listing))
    if path.is_dir() and _is_saved_dataset(path):
        saved = _load_from_disk(path, config.split)
        columns = find_columns(config, saved[0].features)
        return Source(config, [StoredPart(part, columns) for part in saved], columns)
    opened = [_open_split(dataclasses.replace(config, split=split), path) for split in split_names(config.split)]
    return Source(config, [part for part, _ in opened], opened[0][1])


def is_one_split(config: DataConfig) -> bool:
    """Return whether the source ignores the split's name, so that every split is the whole source.

    Raises:
        ValueError: If it is a folder with a subfolder for each split, and has none for this one.
    """
    path = Path(config.source).expanduser()
    if path.suffix == ".csv":
        return not has_split_column(path)
    if _is_plain_folder(path, config):
        return not (config.label_column and chosen_splits(path, find_files(path), config.split))
    if path.is_dir() and _is_saved_dataset(path):
        saved = datasets.load_from_disk(str(path))
        return isinstance(saved, datasets.Dataset) and saved.split is None
    return path.suffix == ".tsv"


def http_options(read_timeout: float) -> dict[str, dict[str, Any]]:
    """Return fsspec's options by protocol: a connection counts as lost after `read_timeout` seconds without a byte.

    By default aiohttp ends a transfer after 5 minutes, even if bytes still arrive.
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=read_timeout, sock_read=read_timeout)
    return {protocol: {"client_kwargs": {"timeout": timeout}} for protocol in ("http", "https")}


def choose_num_shards(num_examples: int, num_readers: int) -> int:
    """Return a number of shards: a multiple of `num_readers` if there are enough examples."""
    shards = min(num_examples, max(num_readers, MAX_SHARDS))
    return shards - shards % num_readers or shards


AnyDataset = TypeVar("AnyDataset", datasets.Dataset, datasets.IterableDataset)


def keep_encoded(dataset: AnyDataset, columns: Columns) -> AnyDataset:
    """Drop the columns that training ignores, and leave the audio encoded: `datasets` would decode with torchcodec."""
    return dataset.select_columns(columns.names).cast_column(columns.audio, EncodedAudio())


def _is_plain_folder(path: Path, config: DataConfig) -> bool:
    """Return whether the source is a folder of sound files without the files of a dataset."""
    if config.data_files or not path.is_dir():
        return False
    names = _names_in(path)
    return not (_is_saved_dataset(path) or _has_shards(names) or _has_metadata(names))


def _names_in(folder: Path) -> list[str]:
    return [name for _, _, files in os.walk(folder) for name in files]


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _has_shards(names: Iterable[str]) -> bool:
    return any(name.endswith(SHARD_SUFFIXES) for name in names if name not in METADATA_FILES)


def _has_metadata(names: Iterable[str]) -> bool:
    return any(name in METADATA_FILES for name in names)


def _open_split(config: DataConfig, path: Path) -> tuple[Part, Columns]:
    """Open a split of a dataset with the library `datasets`."""
    if path.is_dir():
        names = _names_in(path)
        if _has_metadata(names) and not _has_shards(names):
            return _list_audiofolder(config, path)
    load = partial(
        datasets.load_dataset,
        str(path) if path.is_dir() else config.source,
        config.config_name,
        data_files=config.data_files,
        split=config.split,
        revision=config.revision,
        streaming=config.streaming,
        storage_options=http_options(config.read_timeout),
        cache_dir=_cache_of(path) if path.is_dir() else None,
    )
    dataset = load()
    columns = find_columns(config, dataset.features)
    if isinstance(dataset, datasets.Dataset):
        return StoredPart(dataset, columns), columns
    reopen = load if dataset.info.builder_name == "parquet" else None
    return StreamedPart(dataset, columns, reopen), columns


def _cache_of(folder: Path) -> str:
    """Return a cache folder for the present files of a local data set.

    `datasets` names its own after the folder's last name and the card, so that it would take another data set of the
    same name, or older files, for this one.
    """
    digest = hashlib.sha256(os.fsencode(folder.resolve()))
    for parent, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            status = os.stat(os.path.join(parent, name))
            digest.update(os.fsencode(f"\n{parent}/{name}\t{status.st_size}\t{status.st_mtime_ns}"))
    return os.path.join(datasets.config.HF_DATASETS_CACHE, digest.hexdigest()[:16])


def _load_from_disk(path: Path, split: str) -> list[datasets.Dataset]:
    """Load the splits of a saved dataset. One that was saved without a split's name stands for any split."""
    saved, wanted = datasets.load_from_disk(str(path)), split_names(split)
    if isinstance(saved, datasets.DatasetDict):
        if missing := [name for name in wanted if name not in saved]:
            raise ValueError(f"{path} has no split {missing[0]!r}; it has {', '.join(saved)}.")
        return [saved[name] for name in wanted]
    # A part, such as train[:80%], counts as its split.
    if saved.split is not None and set(wanted) != set(split_names(re.sub(r"\[.*?\]", "", str(saved.split)))):
        raise ValueError(f"{path} has no split {split!r}; it has {saved.split}.")
    return [saved]


def _list_audiofolder(config: DataConfig, folder: Path) -> tuple[Part, Columns]:
    """List an audiofolder: `datasets` reads it as a single shard, a listing can be shared."""
    stream = datasets.load_dataset(
        "audiofolder", data_dir=str(folder), data_files=config.data_files, split=config.split, streaming=True
    )
    columns = find_columns(config, stream.features)
    source = Source(config, [StreamedPart(stream, columns)], columns)
    listing: Listing = {"id": [], "path": []}
    for row in source.rows(columns.names):
        _, path = source.audio(row)
        listing["path"].append(path)
        listing["id"].append(os.path.relpath(str(path), folder) if columns.id is None else row[columns.id])
        if columns.label is not None:
            listing.setdefault("labels", []).append(source.labels(row))
        if columns.group is not None:
            listing.setdefault(columns.group, []).append(row[columns.group])
    part = ListedPart(as_dataset(listing))
    return part, columns_of(listing)._replace(label_names=columns.label_names)


def _open_scenes(path: Path, config: DataConfig) -> Source:
    """Open scenes that are mixed while they are read, from the settings in a YAML file.

    The listing's labels and numbers of sources are those of the first epoch with seed 0. They serve to count classes;
    each scene brings its own.
    """
    if config.hold_out or config.sample_weights:
        raise ValueError(
            f"{path} mixes scenes, which have no clips to select: leave out hold_out and sample_weights. Its splits "
            "have recordings of their own."
        )
    pools = open_scene_pools(read_settings(path))
    if config.split not in pools:
        raise ValueError(
            f"{path} has no split {config.split!r}; it has {', '.join(pools)}, and they cannot be joined by +."
        )
    mixer, count = pools[config.split]
    ids = [scene_id(config.split, i) for i in range(count)]
    # The path holds a digest, so that features cached for other settings or recordings are not taken for these.
    listing: Listing = {"id": ids, "path": [f"{mixer.digest}/{id_}" for id_ in ids]}
    labels = [mixer.draw_labels(generator_for(0, "scene", 0, id_)) for id_ in ids]
    if config.label_column is not None:
        listing["labels"] = [list(dict.fromkeys(names)) for names in labels]
    if (group := find_group_column(path, ["num_sources"], config.group_column)) is not None:
        listing[group] = list(map(len, labels))
    all_labels = sorted({label for pool in pools.values() for label in pool.mixer.labels})
    columns = columns_of(listing)._replace(label_names=all_labels if config.label_column else None)
    return Source(config, [ListedPart(as_dataset(listing))], columns, mixer)


def open_scene_pools(settings: SceneSettings) -> dict[str, Pool]:
    """Return the mixer and the number of scenes of each split.

    Raises:
        ValueError, FileNotFoundError: If recordings cannot be read or divided; see [`make_pools`].
    """
    return make_pools(settings, partial(_open_recordings, settings))


def _open_recordings(settings: SceneSettings, source: str, split: str, with_labels: bool) -> Recordings:
    """Open the recordings of a source. With labels, those that do not have exactly one are left out with a warning."""
    config = DataConfig(
        source,
        split=split,
        streaming=False,
        label_column=settings.label_column if with_labels else None,
        group_column=settings.group_column if with_labels else None,
    )
    opened = open_source(config)
    columns = opened.columns
    names = [name for name in (columns.id or columns.audio, columns.label, columns.group) if name is not None]
    ids, labels, groups = [], [], []
    for row in opened.rows(names):
        ids.append(opened.id(row))
        labels.append(opened.labels(row) if with_labels else [""])
        groups.append(None if columns.group is None else str(row[columns.group]))
    if settings.group_by is not None:
        matches = [re.search(settings.group_by, id_) for id_ in ids]
        if with_labels and ids and not any(matches):
            raise ValueError(f"{source}: group_by={settings.group_by!r} matches no name, such as {ids[0]!r}.")
        if with_labels and not all(matches):
            unmatched = [id_ for id_, match in zip(ids, matches, strict=True) if not match]
            logger.warning(
                "%s: group_by=%r does not match %d of %d names, such as %r; each of them counts as an original.",
                source, settings.group_by, len(unmatched), len(ids), unmatched[0],
            )  # fmt: skip
        groups = [match and (match[1] if match.re.groups else match[0]) for match in matches]
    single = [i for i, own in enumerate(labels) if len(own) == 1]
    if len(single) < len(ids):
        logger.warning("%s: %d recordings without exactly one label are left out.", source, len(ids) - len(single))
    return Recordings(
        opened.indexed().select(single),
        opened.audio,
        [ids[i] for i in single],
        [labels[i][0] for i in single],
        [groups[i] or ids[i] for i in single],
    )


__all__ = ["SHARD_SUFFIXES", "Source", "http_options", "is_one_split", "open_scene_pools", "open_source"]
