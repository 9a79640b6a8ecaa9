"""Features of a frozen encoder, computed once and kept in memory-mapped files.

    source = open_source(DataConfig("soundscapes", split="train"))
    features = cached_features(encoder, feature_extractor, source, "runs/features", accelerator)
    features.pooled[:, layer, FEATURE_POOLINGS.index("mean")]     # (N, hidden_size), read from disk on use

A split's features are a folder `CACHE/SPLIT-KEY` with `features.npy`, of shape (N, 1 + layers, poolings, hidden_size),
`clips.json` (names, labels and groups of the N clips, sorted by name) and `key.json`, which holds everything that
determines the features. A changed weight, setting of the feature extractor or data file changes the key. Layer 0 is
the output of the embeddings, layer i that of block i; classifiers read the last.

Patch tokens are cached in the same way, in a folder of their own, as float16 of shape (N, layers, patches,
hidden_size) and only for the requested layers ([`cached_tokens`]). Their size is checked before the first forward
pass. The statistics of MFCCs that the random forest reads are cached in the same way, too
([`training.linear.forest`]).

Every process of a launch writes its clips into its own file. The main process merges these files in a hidden folder,
which gets its final name once it is complete on disk. Memory holds a batch, never a split.
"""

import dataclasses
import glob
import inspect
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from modeling_sslam.common.files import publish, remove, temporary_path
from modeling_sslam.common.recordings import AUDIO_SUFFIXES
from modeling_sslam.modeling_sslam import linear_softmax_pooling
from training.data.config import DataError
from training.data.loader import make_loader
from training.data.mixing.mixer import Mixer
from training.data.sources import SHARD_SUFFIXES, Source

logger = logging.getLogger(__name__)

# The axis of poolings, in this order: the three of the model's classifier, the maximum over the patches and their
# standard deviation.
FEATURE_POOLINGS = ("cls", "mean", "lin_softmax", "max", "std")
# Version of the files. A new number invalidates all cached features.
CACHE_FORMAT = 1
# Settings of the model that do not affect the encoder.
HEAD_SETTINGS = {"classifier_pooling", "classifier_norm_eps"}
TABLE_SUFFIXES = (".csv", ".tsv", ".lbl", ".json", ".jsonl")
# Rows that are copied at once when the processes' files are merged: about 150 MB for a base model.
ROWS_PER_COPY = 1024


class FeatureSet(NamedTuple):
    """The features of a split's N clips, sorted by name.

    Args:
        folder: The folder that holds them.
        ids: The clips' names.
        labels: The clips' labels by name.
        group_column: Name of the column to report by, or `None`.
        groups: Its values, or `None`.
        skipped: Number of unusable clips, which have no features, by reason.
        pooled: Memory-mapped, `(N, 1 + layers, poolings, hidden_size)`, poolings as in [`FEATURE_POOLINGS`].
        tokens: Memory-mapped patch tokens, float16 `(N, len(token_layers), patches, hidden_size)`; `None` if no head
            reads them.
        token_layers: The layers of `tokens`.
    """

    folder: Path
    ids: list[str]
    labels: list[list[str]]
    group_column: str | None
    groups: list[Any] | None
    skipped: dict[str, int]
    pooled: np.ndarray
    tokens: np.ndarray | None = None
    token_layers: Sequence[int] = ()


class Extractor(NamedTuple):
    """A function of log-mel frames whose values are cached.

    Attributes:
        key: Everything except the data and the feature extractor that determines the values, as plain values.
        shape: Shape of a clip's values.
        compute: Computes values `(B, *shape)` of `input_values` `(B, T, F)`.
        name: Title of the progress bar.
    """

    key: dict[str, Any]
    shape: tuple[int, ...]
    compute: Callable[[torch.Tensor], torch.Tensor]
    name: str


def pooled_states(encoder: SSLAMModel, input_values: torch.Tensor) -> torch.Tensor:
    """Compute all poolings of every layer: `(B, T, F)` to float32 `(B, 1 + layers, poolings, hidden_size)`."""
    layers = []
    for states in encoder(input_values, output_hidden_states=True, return_dict=True).hidden_states:
        cls, patches = states[:, 0].float(), states[:, 1:].float()
        deviation = patches.std(1, correction=0)
        pooled = (cls, patches.mean(1), linear_softmax_pooling(patches), patches.amax(1), deviation)
        layers.append(torch.stack(pooled, dim=1))
    return torch.stack(layers, dim=1)


def patch_tokens(encoder: SSLAMModel, input_values: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """Return some layers' patch tokens: `(B, T, F)` to float32 `(B, len(layers), patches, hidden_size)`."""
    states = encoder(input_values, output_hidden_states=True, return_dict=True).hidden_states
    return torch.stack([states[layer][:, 1:].float() for layer in layers], dim=1)


def cached_features(
    encoder: SSLAMModel,
    feature_extractor: SSLAMFeatureExtractor,
    source: Source,
    cache_dir: str | Path,
    accelerator: Accelerator,
    *,
    batch_size: int = 32,
    dtype: Literal["float32", "float16"] = "float32",
) -> FeatureSet:
    """Return the features of one split, from the cache or newly computed. Call it in every process.

    A clip keeps its first `max_length` frames. A shorter clip is padded to that length.

    Args:
        encoder: The encoder in eval mode, on the device of `accelerator`. It runs in the accelerator's precision.
        feature_extractor: Computes the log-mel frames.
        source: The split, read with labels.
        cache_dir: Folder of the cache, on a disk that all processes share.
        accelerator: The processes.
        batch_size: Clips per forward pass.
        dtype: Type of the cached values; float16 halves the file.

    Raises:
        DataError: If a clip has features that are not finite, two clips share a name, there are no clips, or too many
            are unusable.
    """
    shape = (encoder.config.num_hidden_layers + 1, len(FEATURE_POOLINGS), encoder.config.hidden_size)
    key = {"poolings": FEATURE_POOLINGS, **encoder_key(encoder)}
    extractor = Extractor(key, shape, lambda frames: pooled_states(encoder, frames), "Features")
    return cached_values(extractor, feature_extractor, source, cache_dir, accelerator, batch_size, dtype)


def cached_tokens(
    features: FeatureSet,
    encoder: SSLAMModel,
    feature_extractor: SSLAMFeatureExtractor,
    source: Source,
    cache_dir: str | Path,
    accelerator: Accelerator,
    *,
    layers: Sequence[int],
    batch_size: int = 32,
    max_bytes: float,
) -> FeatureSet:
    """Add the patch tokens of some layers to a split's features. Call it in every process.

    Args:
        features: The split's pooled features.
        encoder: The encoder, as for [`cached_features`].
        feature_extractor: Computes the log-mel frames.
        source: The split, read with labels.
        cache_dir: Folder of the cache.
        accelerator: The processes.
        layers: The layers.
        batch_size: Clips per forward pass.
        max_bytes: Limit of the tokens' size.

    Raises:
        ValueError: If the tokens would exceed `max_bytes` or the free space of the disk.
        DataError: See [`cached_features`].
    """
    config = encoder.config
    frames = torch.zeros(1, feature_extractor.max_length, config.num_mel_bins, device=encoder.device)
    with torch.inference_mode():
        shape = tuple(patch_tokens(encoder, frames, layers).shape[1:])
    check_room(len(features.ids), shape, Path(cache_dir), max_bytes)
    extractor = Extractor(
        {"tokens": list(layers), **encoder_key(encoder)},
        shape,
        lambda frames: patch_tokens(encoder, frames, layers),
        "Patch tokens",
    )
    found = cached_values(extractor, feature_extractor, source, cache_dir, accelerator, batch_size, "float16")
    return features._replace(tokens=found.pooled, token_layers=tuple(layers))


def check_room(num_clips: int, shape: Sequence[int], cache_dir: Path, max_bytes: float) -> None:
    """Check that float16 patch tokens fit into a limit and on the disk.

    Args:
        num_clips: Number of clips.
        shape: Shape of a clip's tokens: layers, patches, hidden_size.
        cache_dir: Folder of the cache.
        max_bytes: The limit.

    Raises:
        ValueError: If they do not.
    """
    size = 2 * num_clips * int(np.prod(shape))
    what = f"The patch tokens of {num_clips} clips ({shape[0]} layers, {shape[1]} patches, width {shape[2]})"
    if size > max_bytes:
        raise ValueError(
            f"{what} take {size / 2**30:.2f} GiB, more than token_cache_gib={max_bytes / 2**30:g}. Raise the limit, "
            "name fewer layers, or leave attentive and prototypes out of head.kinds."
        )
    place = next(path for path in (cache_dir.absolute(), *cache_dir.absolute().parents) if path.exists())
    # The processes' parts and the merged file exist at the same time.
    if 2 * size > (free := shutil.disk_usage(place).free):
        raise ValueError(
            f"{what} need {2 * size / 2**30:.2f} GiB while they are written, and {place} has {free / 2**30:.2f} GiB "
            "free. Name another cache_dir, fewer layers, or leave attentive and prototypes out of head.kinds."
        )


def cached_values(
    extractor: Extractor,
    feature_extractor: SSLAMFeatureExtractor,
    source: Source,
    cache_dir: str | Path,
    accelerator: Accelerator,
    batch_size: int,
    dtype: Literal["float32", "float16"],
) -> FeatureSet:
    """Return an extractor's values of one split as `pooled`, from the cache or newly computed.

    See [`cached_features`] for the arguments.
    """
    source = source.read_as(dataclasses.replace(source.config, crop="head", shuffle_buffer=0))
    data = source.config
    cache_dir = Path(cache_dir)
    found: list[Path | bool | None] = [None, None]
    lock, temporary = None, None
    try:
        if accelerator.is_main_process:
            key = json.dumps(
                cache_key(extractor, feature_extractor, source, accelerator.mixed_precision, dtype), indent=1
            )
            digest = blake2b(key.encode(), digest_size=8).hexdigest()
            folder = cache_dir / f"{data.split.replace('/', '_')}-{digest}"
            cache_dir.mkdir(parents=True, exist_ok=True)
            # Another run that needs the same features waits here and then finds them.
            lock = FileLock(cache_dir / f".{folder.name}.lock")
            lock.acquire()
            found = [folder, _is_intact(folder)]
        folder, is_cached = broadcast_object_list(found)
        if not is_cached:
            temporary = temporary_path(folder)
            if accelerator.is_main_process:
                remove(temporary)
                temporary.mkdir()
                (temporary / "key.json").write_text(key)
            accelerator.wait_for_everyone()
            _write_part(temporary, extractor, feature_extractor, source, accelerator, batch_size, dtype)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _merge_parts(temporary, accelerator.num_processes, data.source)
                publish(temporary, folder)
            accelerator.wait_for_everyone()
        elif accelerator.is_main_process:
            logger.info("%s of %s %s: found in %s", extractor.name, data.source, data.split, folder)
    finally:
        if lock is not None:
            if temporary is not None:
                remove(temporary)
            lock.release()
    return read_features(folder)


def _is_intact(folder: Path) -> bool:
    """Return whether a folder of the cache exists and can be read."""
    if not folder.is_dir():
        return False
    try:
        features = read_features(folder)
        if len(features.ids) == len(features.pooled):
            return True
        problem = "incomplete"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = str(error)
    logger.warning("The cached features in %s are damaged (%s) and are computed again.", folder, problem)
    return False


def read_features(folder: Path) -> FeatureSet:
    """Open the features that an earlier call cached in `folder`."""
    clips = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    pooled = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    return FeatureSet(folder, pooled=pooled, **clips)


def encoder_key(encoder: SSLAMModel) -> dict[str, Any]:
    """Return everything that determines an encoder's states, as plain values."""
    architecture = inspect.get_annotations(SSLAMConfig).keys() - HEAD_SETTINGS
    return {
        "weights": weights_digest(encoder),
        "model": {name: getattr(encoder.config, name) for name in sorted(architecture)},
    }


def cache_key(
    extractor: Extractor, feature_extractor: SSLAMFeatureExtractor, source: Source, precision: str, dtype: str
) -> dict[str, Any]:
    """Return everything that determines the values of a split, as plain values."""
    columns = ("config_name", "split", "audio_column", "id_column", "label_column", "group_column")
    return {
        "format": CACHE_FORMAT,
        **extractor.key,
        "feature_extractor": feature_extractor.to_dict(),
        "data": {name: getattr(source.config, name) for name in columns} | {"content": data_digest(source)},
        "precision": precision,
        "dtype": dtype,
    }


def weights_digest(model: torch.nn.Module) -> str:
    """Return a digest of a model's tensors. It does not depend on the file that they came from."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def data_digest(source: Source) -> str | None:
    """Return a digest of a local source's files (name, size, modification time), or the commit of a Hub dataset."""
    digest = blake2b(digest_size=16)
    data = source.config
    path = Path(data.source).expanduser()
    if path.exists() or data.data_files:
        for name, file in _files(path, source):
            state = file.stat() if file.exists() else None
            digest.update(
                f"{name} {state and state.st_size} {state and state.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
        return digest.hexdigest()
    try:
        return HfApi().dataset_info(data.source, revision=data.revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        logger.warning(
            "The commit of %s on the Hub is unknown (%s). If the data set changes, cached features of its old version "
            "will still be used.",
            data.source,
            error,
        )
        return f"{data.source} {data.revision}"


def _files(path: Path, source: Source) -> Iterator[tuple[str, Path]]:
    """Yield the names and paths of a source's local files."""
    for pattern in source.config.data_files or ():
        yield from ((name, Path(name)) for name in sorted(glob.glob(pattern, recursive=True)) or [pattern])
    if path.is_dir():
        yield from _files_in(path)
    elif path.is_file() and source.mixer is not None:
        yield path.name, path
        yield from _files_of_scenes(source.mixer)
    elif path.is_file():
        yield path.name, path
        if (labels := path.with_suffix(".lbl")).exists():
            yield labels.name, labels
        # The files of a listing can be anywhere.
        for row in source.rows([source.columns.audio]):
            _, name = source.audio(row)
            if name is not None:
                yield name, Path(name)


def _files_in(folder: Path) -> list[tuple[str, Path]]:
    """Return the names and paths of the sound files, shards and tables in a folder, sorted by name."""
    suffixes = AUDIO_SUFFIXES | {*SHARD_SUFFIXES, *TABLE_SUFFIXES}
    files = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    return sorted((file.relative_to(folder).as_posix(), file) for file in files)


def _files_of_scenes(mixer: Mixer) -> Iterator[tuple[str, Path]]:
    """Yield a digest of all recordings, then the names and paths of the local files from which scenes are mixed."""
    yield mixer.digest, Path(mixer.digest)
    settings = mixer.settings
    sources = {
        settings.sounds: mixer.sounds,
        settings.background: mixer.background,
        settings.impulse_responses: mixer.impulse_responses,
    }
    for name, recordings in sources.items():
        if name is None or recordings is None:
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            yield from _files_in(path)
        elif path.is_file():
            yield path.name, path
            for row in recordings.table:
                _, file = recordings.audio(row)
                if file is not None:
                    yield file, Path(file)


@torch.inference_mode()
def _write_part(
    folder: Path,
    extractor: Extractor,
    feature_extractor: SSLAMFeatureExtractor,
    source: Source,
    accelerator: Accelerator,
    batch_size: int,
    dtype: str,
) -> None:
    """Write this process's share of the clips: rows of features, and their names, labels and groups."""
    loader = make_loader(
        source,
        feature_extractor,
        batch_size=batch_size,
        seed=0,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        repeat=False,
    )
    clips: dict[str, list[Any]] = {"ids": [], "labels": [], "groups": []}
    title = f"{extractor.name} of {source.config.split}"
    bar = tqdm(desc=title, unit="clip", disable=not accelerator.is_local_main_process)
    part = folder / f"part-{accelerator.process_index:05d}"
    with bar, open(part.with_suffix(".bin"), "wb") as file:
        for batch in loader:
            with accelerator.autocast():
                values = extractor.compute(loader.input_values(batch, accelerator.device))
            rows = values.cpu().numpy().astype(dtype)
            if not (finite := np.isfinite(rows).reshape(len(rows), -1).all(axis=1)).all():
                names = [id_ for id_, good in zip(batch["ids"], finite, strict=True) if not good]
                raise DataError(
                    f"The features of clips {', '.join(names)} are not finite as {dtype}. Set cache_dtype=float32 and "
                    "mixed_precision=no. If they still are not finite, the model's training diverged."
                )
            file.write(rows.tobytes())
            clips["ids"] += batch["ids"]
            clips["labels"] += batch["labels"]
            clips["groups"] += batch.get("groups", [None] * len(rows))
            bar.update(len(rows) * accelerator.num_processes)
    facts = {"shape": extractor.shape, "dtype": dtype, "skipped": loader.skipped, "group_column": source.columns.group}
    content = facts | clips
    part.with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")


def _merge_parts(folder: Path, num_parts: int, source: str) -> None:
    """Merge the processes' files into features.npy and clips.json, sorted by clip name."""
    parts = [folder / f"part-{index:05d}" for index in range(num_parts)]
    contents = [json.loads(part.with_suffix(".json").read_text(encoding="utf-8")) for part in parts]
    clips = {name: [value for content in contents for value in content[name]] for name in ("ids", "labels", "groups")}
    ids = clips["ids"]
    if not ids:
        raise DataError(f"{source} has no usable clip.")
    order = sorted(range(len(ids)), key=ids.__getitem__)
    twice = next((ids[i] for i, j in pairwise(order) if ids[i] == ids[j]), None)
    if twice is not None:
        raise DataError(f"{source} has the clip {twice!r} twice; set data.id_column to a column of unique names.")
    shape, dtype = tuple(contents[0]["shape"]), contents[0]["dtype"]
    merged = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=dtype, shape=(len(ids), *shape))
    # Writing into the mapped pages of a file that has no room on the disk would kill the process.
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(folder / "features.npy", "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
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


__all__ = [
    "FEATURE_POOLINGS",
    "Extractor",
    "FeatureSet",
    "cache_key",
    "cached_features",
    "cached_tokens",
    "cached_values",
    "patch_tokens",
    "pooled_states",
    "read_features",
]
