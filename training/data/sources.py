"""Any collection of sound as one stream of examples with the audio still encoded.

What `DataConfig.source` may be:
- a Hub dataset (`agkphysics/AudioSet`), streamed or downloaded first, or a builder of `datasets` with `data_files`
  (`parquet`, `arrow`, `webdataset`, `json`; local paths, globs or URLs);
- a local folder of a dataset: parquet, arrow or WebDataset tar shards, an audiofolder with its `metadata.csv` /
  `metadata.jsonl`, or what `Dataset.save_to_disk` wrote;
- a `.tsv` manifest: the root folder in the first line, then `relative/path.wav<TAB>number` a line; labels, if asked
  for, from the `.lbl` file beside it;
- a `.csv` table with a column of paths (relative to it) and, if asked for, one of labels (several in a cell are
  separated by `;`) and one named `split`;
- any other folder: every sound file under it, or under its subfolder of the split's name if there is one; labels, if
  asked for, are the names of the enclosing folders.

Several splits are joined by `+`, as in `fold1+fold2`.

All of them become a `datasets.IterableDataset` cut into shards, which is what rank and worker share out and what an
epoch shuffles. No audio is read here, and none decoded: `datasets` would need torchcodec for that.
"""

import csv
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import datasets
import numpy as np
import soundfile
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

from modeling_sslam.common.encoded_audio import ID_COLUMNS, EncodedAudio

if TYPE_CHECKING:
    from training.data.config import DataConfig

# Where a label or group column is "auto". AudioSet's `labels` are ids of the ontology, which label files explain.
LABEL_COLUMNS = ("labels", "label", "category", "class", "target")
GROUP_COLUMNS = ("num_sources",)
PATH_COLUMNS = ("audio", "path", "file_name", "filename", "file")
LABEL_SEPARATOR = ";"
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SHARD_SUFFIXES = (".parquet", ".arrow", ".tar")
AUDIO_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} | set(AudioFolder.EXTENSIONS)
AUDIO_SUFFIXES = (AUDIO_SUFFIXES | {".aif", ".aifc", ".oga", ".m4a", ".aac", ".mka", ".weba"}) - {".raw"}
# Enough shards that their order alone mixes a folder well, few enough that `datasets` handles them at once.
MAX_LISTED_SHARDS = 1024


@dataclasses.dataclass
class Source:
    """A stream of examples and the names of the columns that matter.

    Args:
        dataset: The examples, `dataset.num_shards` shards of them.
        audio_column: A string column of paths, or a struct of `bytes` and `path`.
        id_column, label_column, group_column: `None` where there is none.
        label_names: Names of an integer label column's classes.
        openers: Open the parts of the dataset again, reading no other columns than `columns`, where its format allows.
    """

    dataset: datasets.IterableDataset
    audio_column: str
    id_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    label_names: list[str] | None = None
    openers: tuple[Callable[..., datasets.IterableDataset], ...] = ()

    def id(self, row: dict[str, Any]) -> str:
        """The name of a clip: by its column, else the audio's path, else a digest of its bytes."""
        if self.id_column is not None:
            return str(row[self.id_column])
        encoded, path = self.audio(row)
        return path or hashlib.blake2b(encoded or b"", digest_size=8).hexdigest()

    def audio(self, row: dict[str, Any]) -> tuple[bytes | None, str | None]:
        """The encoded file of an example and its path or name."""
        value = row[self.audio_column]
        if isinstance(value, str):
            return None, value
        return (value["bytes"], value["path"]) if value else (b"", None)

    def labels(self, row: dict[str, Any]) -> list[str]:
        """The labels of an example by name, however the column stores them."""
        value = row[self.label_column]
        values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return [self.label_names[v] if self.label_names and isinstance(v, int) else str(v) for v in values]

    def ids_and_labels(self) -> Iterator[tuple[str, list[str]]]:
        """Of all clips, without decoding any; without reading the audio where the names do not follow from it."""
        columns = [self.label_column, self.id_column or self.audio_column]
        parts = [opener(columns=columns) for opener in self.openers] if self.audio_column not in columns else ()
        for row in chain.from_iterable(parts or [self.dataset.select_columns(columns)]):
            yield self.id(row), self.labels(row)


def open_source(config: "DataConfig", num_readers: int, seed: int) -> Source:
    """Opens what `config.source` names.

    Args:
        num_readers: Worker processes over all ranks; sources that can choose are cut into a multiple of it.
        seed: Mixes the listing of a folder or manifest, unless `config.shuffle_buffer` is 0.

    Raises:
        ValueError: If it cannot be told which column or split to read, naming those there are.
        FileNotFoundError: If a local source has no sound files.
    """
    path = Path(config.source).expanduser()
    if path.suffix == ".tsv":
        return _from_listing(
            config, _read_manifest(path, with_labels=config.label_column is not None), num_readers, seed
        )
    if path.suffix == ".csv":
        return _from_listing(config, _read_table(config, path), num_readers, seed)
    if path.is_dir() and not (config.data_files or _is_dataset(path)):
        return _from_listing(config, _list_folder(path, config), num_readers, seed)
    splits = config.split.split("+")
    sources = [
        _open_split(dataclasses.replace(config, split=split.strip()), path, num_readers, seed) for split in splits
    ]
    if len(sources) == 1:
        return sources[0]
    dataset = datasets.concatenate_datasets([source.dataset for source in sources])
    return dataclasses.replace(
        sources[0], dataset=dataset, openers=tuple(opener for source in sources for opener in source.openers)
    )


def is_one_split(config: "DataConfig") -> bool:
    """Whether the source knows nothing of splits, so that every split is all of it."""
    path = Path(config.source).expanduser()
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            return "split" not in next(csv.reader(file), [])
    if path.is_dir() and not (config.data_files or _is_dataset(path)):
        return not (config.label_column and (path / config.split).is_dir())
    return path.suffix == ".tsv"


def _is_dataset(path: Path) -> bool:
    names = [name for _, _, files in os.walk(path) for name in files]
    return _is_saved_dataset(path) or _has_shards(names) or any(name in METADATA_FILES for name in names)


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _open_split(config: "DataConfig", path: Path, num_readers: int, seed: int) -> Source:
    """What `datasets` reads."""
    if path.is_dir():
        if _is_saved_dataset(path):
            return _from_dataset(config, _load_from_disk(path, config.split), num_readers)
        names = [name for _, _, files in os.walk(path) for name in files]
        if any(name in METADATA_FILES for name in names) and not _has_shards(names):
            return _from_audiofolder(config, path, num_readers, seed)
    load = partial(
        datasets.load_dataset,
        str(path) if path.is_dir() else config.source,
        config.config_name,
        data_files=config.data_files,
        split=config.split,
        revision=config.revision,
        streaming=config.streaming,
        storage_options=http_options(config.read_timeout),
    )
    dataset = load()
    if isinstance(dataset, datasets.Dataset):
        return _from_dataset(config, dataset, num_readers)
    if dataset.num_shards < num_readers:
        # Row groups are shards of a parquet file.
        dataset = dataset.reshard()
    openers = (load,) if dataset.info.builder_name == "parquet" else ()
    return dataclasses.replace(_select_columns(config, dataset), openers=openers)


def http_options(read_timeout: float) -> dict[str, dict[str, Any]]:
    """Options for fsspec by protocol: a connection is lost after `read_timeout` seconds without a byte.

    (aiohttp itself gives up 5 minutes after it began, however well the bytes flow.)
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=read_timeout, sock_read=read_timeout)
    return {protocol: {"client_kwargs": {"timeout": timeout}} for protocol in ("http", "https")}


def _has_shards(names: list[str]) -> bool:
    return any(name.endswith(SHARD_SUFFIXES) for name in names if name not in METADATA_FILES)


def _load_from_disk(path: Path, split: str) -> datasets.Dataset:
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"{path} has no split {split!r}; it has {', '.join(dataset)}.")
        dataset = dataset[split]
    return dataset


def _list_folder(path: Path, config: "DataConfig") -> dict[str, list]:
    """Ids (relative paths), paths and, as audiofolder has them, the names of the enclosing folders as labels."""
    root = path / config.split if config.label_column and (path / config.split).is_dir() else path
    files = sorted(
        file
        for file in root.rglob("*")
        if file.suffix.lower() in AUDIO_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise FileNotFoundError(f"No sound files under {root} (looked for {', '.join(sorted(AUDIO_SUFFIXES))}).")
    columns = {"id": [file.relative_to(path).as_posix() for file in files], "path": [str(file) for file in files]}
    return columns | ({"labels": [[file.parent.name] for file in files]} if config.label_column else {})


def _read_manifest(path: Path, with_labels: bool) -> dict[str, list]:
    """Ids (relative paths), paths and labels of a `.tsv` manifest."""
    root, *lines = path.read_text(encoding="utf-8").splitlines()
    ids = [line.split("\t")[0] for line in lines if line.strip()]
    if not ids:
        raise ValueError(
            f"{path} lists no files. A manifest has the root folder in its first line, then "
            "relative/path.wav<TAB>number in each."
        )
    columns = {"id": ids, "path": [os.path.join(root.strip(), id_) for id_ in ids]}
    if with_labels:
        label_file = path.with_suffix(".lbl")
        entries = [line.split("\t") for line in label_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        # Named by the stem or, as SPASS's are, by the path without its suffix.
        if len(entries) != len(ids) or any(
            entry[0] not in (Path(id_).stem, os.path.splitext(id_)[0]) for entry, id_ in zip(entries, ids, strict=True)
        ):
            raise ValueError(f"{label_file} does not list the stems of {path} in the same order.")
        columns["labels"] = [entry[1].split(",") for entry in entries]
    return columns


def _read_table(config: "DataConfig", path: Path) -> dict[str, list]:
    """The columns of a `.csv` table, its rows of `config.split` if it names splits."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), reader.fieldnames or []
    if "split" in names:
        wanted = [split.strip() for split in config.split.split("+")]
        present = sorted({row["split"] for row in rows})
        if missing := [split for split in wanted if split not in present]:
            raise ValueError(f"{path} has no split {missing[0]!r}; it has {', '.join(present)}.")
        rows = [row for row in rows if row["split"] in wanted]
    audio = _find_column(path, names, config.audio_column or "auto", PATH_COLUMNS, "audio_column")
    paths = [row[audio] for row in rows]
    columns = {
        "id": [row[config.id_column] if config.id_column else row[audio] for row in rows],
        "path": [value if "://" in value else os.path.join(path.parent, value) for value in paths],
    }
    label = _find_column(path, names, config.label_column, LABEL_COLUMNS, "label_column")
    if label is not None:
        cells = [(row[label] or "").split(LABEL_SEPARATOR) for row in rows]
        columns["labels"] = [[name.strip() for name in cell if name.strip()] for cell in cells]
    if (group := _find_group(path, names, config.group_column)) is not None:
        columns[group] = [row[group] for row in rows]
    return columns


def _find_column(
    source: str | Path, names: list[str], wanted: str | None, candidates: tuple[str, ...], key: str
) -> str | None:
    """The column that a key of the configuration asks for by name, or by "auto" for the first of the usual names."""
    if wanted is None or wanted in names:
        return wanted
    found = next((name for name in candidates if name in names), None) if wanted == "auto" else None
    if found is None:
        asked = "of the usual names" if wanted == "auto" else repr(wanted)
        raise ValueError(f"{source} has no column {asked}; set {key} to one of those it has: {', '.join(names)}.")
    return found


def _find_group(source: str | Path, names: list[str], wanted: str | None) -> str | None:
    """As [`_find_column`], but data that are not grouped are no error where nobody said they are."""
    if wanted == "auto":
        return next((name for name in GROUP_COLUMNS if name in names), None)
    return _find_column(source, names, wanted, (), "group_column")


def _from_listing(config: "DataConfig", columns: dict[str, list], num_readers: int, seed: int) -> Source:
    """A listing costs nothing to mix whole, once; the epochs then vary that order."""
    size = len(columns["id"])
    order = np.random.default_rng(seed).permutation(size) if config.shuffle_buffer else np.arange(size)
    dataset = datasets.Dataset.from_dict({name: [column[i] for i in order] for name, column in columns.items()})
    return Source(
        dataset.to_iterable_dataset(_num_shards(len(dataset), num_readers)),
        audio_column="path",
        id_column="id",
        label_column="labels" if "labels" in columns else None,
        group_column=next((name for name in columns if name not in ("id", "path", "labels")), None),
    )


def _num_shards(num_examples: int, num_readers: int) -> int:
    """A multiple of `num_readers` where there are examples enough."""
    shards = min(num_examples, max(num_readers, MAX_LISTED_SHARDS))
    return shards - shards % num_readers or shards


def _from_dataset(config: "DataConfig", dataset: datasets.Dataset, num_readers: int) -> Source:
    return _select_columns(config, dataset.to_iterable_dataset(_num_shards(len(dataset), num_readers)))


def _from_audiofolder(config: "DataConfig", path: Path, num_readers: int, seed: int) -> Source:
    """An audiofolder is one shard of paths to `datasets`; listed here, it can be shared out."""
    stream = datasets.load_dataset(
        "audiofolder", data_dir=str(path), data_files=config.data_files, split=config.split, streaming=True
    )
    source = _select_columns(config, stream)
    rows = list(source.dataset)
    paths = [source.audio(row)[1] for row in rows]
    columns = {
        "id": [
            os.path.relpath(p, path) if source.id_column is None else row[source.id_column]
            for p, row in zip(paths, rows, strict=True)
        ],
        "path": paths,
    }
    if source.label_column:
        columns["labels"] = [source.labels(row) for row in rows]
    if source.group_column:
        columns[source.group_column] = [row[source.group_column] for row in rows]
    return dataclasses.replace(_from_listing(config, columns, num_readers, seed), label_names=source.label_names)


def _select_columns(config: "DataConfig", dataset: datasets.IterableDataset) -> Source:
    """Finds the columns, keeps the audio encoded and drops the rest."""
    features = dataset.features
    if features is None:
        raise ValueError(f"The columns of {config.source} are not known before it is read; set streaming to false.")
    audio_column = config.audio_column
    if audio_column is None:
        candidates = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
        candidates = candidates or [name for name in ("audio",) if name in features]
        if len(candidates) != 1:
            raise ValueError(
                f"{config.source} has {'several' if candidates else 'no'} audio columns; set audio_column to one of "
                f"{', '.join(candidates or features)}."
            )
        audio_column = candidates[0]
    id_column = config.id_column or next((name for name in ID_COLUMNS if name in features), None)
    label_column = _find_column(config.source, list(features), config.label_column, LABEL_COLUMNS, "label_column")
    group_column = _find_group(config.source, list(features), config.group_column)
    columns = [name for name in (audio_column, id_column, label_column, group_column) if name is not None]
    for name in columns:
        if name not in features:
            raise ValueError(f"{config.source} has no column {name!r}; it has {', '.join(features)}.")
    label_names = None
    if label_column is not None:
        label = features[label_column]
        label_names = getattr(getattr(label, "feature", label), "names", None)
    dataset = dataset.select_columns(list(dict.fromkeys(columns))).cast_column(audio_column, EncodedAudio())
    return Source(dataset, audio_column, id_column, label_column, group_column, label_names)


__all__ = ["Source", "http_options", "open_source"]
