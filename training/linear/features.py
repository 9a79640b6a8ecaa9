"""Pooled features of a frozen encoder: computed once, kept in memory-mapped files, found again.

    features = cached_features(encoder, feature_extractor, DataConfig("soundscapes", split="train"), "runs/features",
                               accelerator)
    features.pooled[:, layer, POOLINGS.index("mean")]     # (N, hidden_size), read from disk as far as it is used

A split's features are a folder `CACHE/SPLIT-KEY` with `features.npy`, of shape (N, 1 + layers, poolings, hidden_size),
`clips.json` (names, labels and groups of the N clips, sorted by name) and `key.json`: all that the features follow
from. Another weight, another setting of the feature extractor, a file of the data that has changed, and it is another
key. Layer 0 is the output of the embeddings, layer i that of block i, the last what classifiers read.

Every process of a launch writes the clips it is given into a file of its own; the main process sorts them together in
a hidden folder, which gets its name when all of it is on disk. Memory holds a batch, never a split.
"""

import dataclasses
import glob
import inspect
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tqdm.auto import tqdm

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMModel
from modeling_sslam.common.files import publish, temporary_path
from modeling_sslam.modeling_sslam import linear_softmax_pooling
from training.data.config import DataConfig, DataError
from training.data.loader import make_loader
from training.data.sources import AUDIO_SUFFIXES, SHARD_SUFFIXES, open_source

logger = logging.getLogger(__name__)

# The axis of poolings, in this order: the classifier's own, and the largest value over the patches.
POOLINGS = ("cls", "mean", "lin_softmax", "max")
# Another number here, and what older versions of this file cached is computed anew.
CACHE_FORMAT = 1
# Settings of the model that its encoder does not know.
HEAD_SETTINGS = {"classifier_pooling", "classifier_norm_eps"}
TABLE_SUFFIXES = (".csv", ".tsv", ".lbl", ".json", ".jsonl")
# Rows that are moved at once when the processes' files are sorted together: some 150 MB of a base model's.
ROWS_PER_COPY = 1024


class FeatureSet(NamedTuple):
    """The features of a split's N clips, sorted by name.

    Args:
        folder: Where they are.
        ids: The clips' names.
        labels: Their labels by name.
        group_column, groups: Name and values of the column to report by, or `None` if the data have none.
        skipped: How many further clips were unusable, by reason.
        pooled: Memory-mapped, of shape `(N, 1 + layers, poolings, hidden_size)`, poolings as in [`POOLINGS`].
    """

    folder: Path
    ids: list[str]
    labels: list[list[str]]
    group_column: str | None
    groups: list[Any] | None
    skipped: dict[str, int]
    pooled: np.ndarray


def pooled_states(encoder: SSLAMModel, input_values: torch.Tensor) -> torch.Tensor:
    """Every layer's states, pooled in every way: `(B, T, F)` to float32 `(B, 1 + layers, poolings, hidden_size)`."""
    layers = []
    for states in encoder(input_values, output_hidden_states=True, return_dict=True).hidden_states:
        cls, patches = states[:, 0].float(), states[:, 1:].float()
        layers.append(torch.stack((cls, patches.mean(1), linear_softmax_pooling(patches), patches.amax(1)), dim=1))
    return torch.stack(layers, dim=1)


def cached_features(
    encoder: SSLAMModel,
    feature_extractor: SSLAMFeatureExtractor,
    data: DataConfig,
    cache_dir: str | Path,
    accelerator: Accelerator,
    *,
    batch_size: int = 32,
    dtype: Literal["float32", "float16"] = "float32",
) -> FeatureSet:
    """The features of one split, from the cache or else computed and cached; to be called in every process.

    Clips longer than the feature extractor's `max_length` are cut to their head, shorter ones padded to it.

    Args:
        encoder: In evaluation mode, on the device of `accelerator`, whose precision it runs in.
        data: The split, and how to read it; `label_column` set.
        cache_dir: On a disk that all processes share.
        dtype: Of the file. float16 halves it.

    Raises:
        DataError: If a clip has features that are not finite, a name is there twice, there are no clips, or too many
            are unusable.
        ValueError, FileNotFoundError: If the source cannot be opened.
    """
    data = dataclasses.replace(data, crop="head", shuffle_buffer=0)
    cache_dir = Path(cache_dir)
    found: list[Path | bool | None] = [None, None]
    lock = None
    try:
        if accelerator.is_main_process:
            key = json.dumps(cache_key(encoder, feature_extractor, data, accelerator.mixed_precision, dtype), indent=1)
            digest = blake2b(key.encode(), digest_size=8).hexdigest()
            folder = cache_dir / f"{data.split.replace('/', '_')}-{digest}"
            cache_dir.mkdir(parents=True, exist_ok=True)
            # Another run that wants the same features waits here and then finds them.
            lock = FileLock(cache_dir / f".{folder.name}.lock")
            lock.acquire()
            found = [folder, folder.is_dir()]
        folder, is_cached = broadcast_object_list(found)
        if not is_cached:
            temporary = temporary_path(folder)
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                (temporary / "key.json").write_text(key)
            accelerator.wait_for_everyone()
            _write_part(temporary, encoder, feature_extractor, data, accelerator, batch_size, dtype)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _merge_parts(temporary, accelerator.num_processes, data.source)
                publish(temporary, folder)
            accelerator.wait_for_everyone()
        elif accelerator.is_main_process:
            logger.info("Features of %s %s: found in %s", data.source, data.split, folder)
    finally:
        if lock is not None:
            lock.release()
    return read_features(folder)


def read_features(folder: Path) -> FeatureSet:
    """What an earlier call has cached in `folder`."""
    clips = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    pooled = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    return FeatureSet(folder, pooled=pooled, **clips)


def cache_key(
    encoder: SSLAMModel, feature_extractor: SSLAMFeatureExtractor, data: DataConfig, precision: str, dtype: str
) -> dict[str, Any]:
    """All that the features of a split follow from, as JSON takes it."""
    architecture = inspect.get_annotations(SSLAMConfig).keys() - HEAD_SETTINGS
    columns = ("config_name", "split", "audio_column", "id_column", "label_column", "group_column")
    return {
        "format": CACHE_FORMAT,
        "poolings": POOLINGS,
        "weights": weights_digest(encoder),
        "model": {name: getattr(encoder.config, name) for name in sorted(architecture)},
        "feature_extractor": feature_extractor.to_dict(),
        "data": {name: getattr(data, name) for name in columns} | {"content": data_digest(data)},
        "precision": precision,
        "dtype": dtype,
    }


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of a model's tensors, the same whichever file they came from."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def data_digest(data: DataConfig) -> str:
    """A digest of a local source's files by name, size and time of change; of a Hub dataset the commit."""
    digest = blake2b(digest_size=16)
    path = Path(data.source).expanduser()
    if path.exists() or data.data_files:
        for name, file in _files(path, data):
            state = file.stat() if file.exists() else None
            digest.update(f"{name} {state and state.st_size} {state and state.st_mtime_ns}\n".encode())
        return digest.hexdigest()
    try:
        return HfApi().dataset_info(data.source, revision=data.revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        logger.warning(
            "The commit of %s could not be asked for (%s): if that dataset changes, features cached before will be "
            "used all the same.",
            data.source,
            error,
        )
        return f"{data.source} {data.revision}"


def _files(path: Path, data: DataConfig) -> Iterator[tuple[str, Path]]:
    """The local files of a source and what to call them."""
    for pattern in data.data_files or ():
        yield from ((name, Path(name)) for name in sorted(glob.glob(pattern, recursive=True)) or [pattern])
    if path.is_dir():
        suffixes = AUDIO_SUFFIXES | {*SHARD_SUFFIXES, *TABLE_SUFFIXES}
        files = (file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        yield from sorted((file.relative_to(path).as_posix(), file) for file in files)
    elif path.is_file():
        yield path.name, path
        if (labels := path.with_suffix(".lbl")).exists():
            yield labels.name, labels
        # A list of files: they may lie anywhere.
        source = open_source(data, num_readers=1, seed=0)
        for row in source.dataset.select_columns([source.audio_column]):
            name = source.audio(row)[1]
            yield name, Path(name)


@torch.inference_mode()
def _write_part(
    folder: Path,
    encoder: SSLAMModel,
    feature_extractor: SSLAMFeatureExtractor,
    data: DataConfig,
    accelerator: Accelerator,
    batch_size: int,
    dtype: str,
) -> None:
    """Writes this process's share of the clips: rows of features, and what they are of."""
    loader = make_loader(
        data,
        feature_extractor,
        batch_size=batch_size,
        seed=0,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        repeat=False,
    )
    clips: dict[str, list[Any]] = {"ids": [], "labels": [], "groups": []}
    shape = (encoder.config.num_hidden_layers + 1, len(POOLINGS), encoder.config.hidden_size)
    bar = tqdm(desc=f"Features of {data.split}", unit="clip", disable=not accelerator.is_local_main_process)
    part = folder / f"part-{accelerator.process_index:05d}"
    with bar, open(part.with_suffix(".bin"), "wb") as file:
        for batch in loader:
            with accelerator.autocast():
                pooled = pooled_states(encoder, loader.input_values(batch, accelerator.device))
            rows = pooled.cpu().numpy().astype(dtype)
            if not (finite := np.isfinite(rows).all(axis=(1, 2, 3))).all():
                names = [id_ for id_, good in zip(batch["ids"], finite, strict=True) if not good]
                raise DataError(
                    f"The features of clips {', '.join(names)} are not finite as {dtype}. Has the model's training "
                    "diverged? Else use float32 and no mixed precision."
                )
            file.write(rows.tobytes())
            clips["ids"] += batch["ids"]
            clips["labels"] += batch["labels"]
            clips["groups"] += batch.get("groups", [None] * len(rows))
            bar.update(len(rows) * accelerator.num_processes)
    content = {"shape": shape, "dtype": dtype, "skipped": loader.skipped} | clips
    content["group_column"] = loader.stream.source.group_column
    part.with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")


def _merge_parts(folder: Path, num_parts: int, source: str) -> None:
    """Makes features.npy and clips.json of what the processes wrote, sorted by name."""
    parts = [folder / f"part-{index:05d}" for index in range(num_parts)]
    contents = [json.loads(part.with_suffix(".json").read_text(encoding="utf-8")) for part in parts]
    clips = {name: [value for content in contents for value in content[name]] for name in ("ids", "labels", "groups")}
    ids = clips["ids"]
    if not ids:
        raise DataError(f"{source} has no clip that can be used.")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    twice = next((ids[i] for i, j in pairwise(order) if ids[i] == ids[j]), None)
    if twice is not None:
        raise DataError(f"{source} has the clip {twice!r} twice; set data.id_column to a column of unique names.")
    shape, dtype = tuple(contents[0]["shape"]), contents[0]["dtype"]
    merged = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=dtype, shape=(len(ids), *shape))
    place = np.empty(len(ids), dtype=np.int64)
    place[order] = np.arange(len(ids))
    first = 0
    for part, content in zip(parts, contents, strict=True):
        size = len(content["ids"])
        if size:
            rows = np.memmap(part.with_suffix(".bin"), dtype=dtype, mode="r", shape=(size, *shape))
            for start in range(0, size, ROWS_PER_COPY):
                chunk = rows[start : start + ROWS_PER_COPY]
                merged[place[first + start : first + start + len(chunk)]] = chunk
            del rows
        first += size
    merged.flush()
    sorted_clips: dict[str, Any] = {name: [values[i] for i in order] for name, values in clips.items()}
    sorted_clips["group_column"] = contents[0]["group_column"]
    if sorted_clips["group_column"] is None:
        sorted_clips["groups"] = None
    sorted_clips["skipped"] = sum((Counter(content["skipped"]) for content in contents), Counter())
    (folder / "clips.json").write_text(json.dumps(sorted_clips), encoding="utf-8")
    for part in parts:
        part.with_suffix(".bin").unlink()
        part.with_suffix(".json").unlink()


__all__ = ["POOLINGS", "FeatureSet", "cache_key", "cached_features", "pooled_states", "read_features"]
