"""From any source of sound to batches of `input_values`, the same ones in the same order however often a run is killed.

    loader = make_loader(DataConfig("agkphysics/AudioSet", config_name="unbalanced"), feature_extractor,
                         batch_size=12, seed=0, rank=rank, world_size=world_size)
    for batch in loader:                      # endless: steps end a run, not epochs
        input_values = loader.input_values(batch, device)
        ...
        checkpoint = loader.state_dict()      # of this rank; `load_state_dict` before iterating goes on after this batch

- **Sharing out.** The shards of a source go to the ranks, a rank's to its workers: each clip to exactly one worker per
  epoch. Every worker fills its own batches; the batches of a rank take turns over its workers.
- **Shuffling.** The order of the shards is drawn per epoch, and within a worker's stream blocks of `shuffle_buffer`
  clips are permuted. While one block is used up the next one fills, so at most `shuffle_buffer` encoded clips are held.
- **Exact resume.** Nothing is drawn that is not a function of (seed, epoch, block, worker) or (seed, epoch, clip id).
  A worker's position is the state of the source at the start of its block and the number of clips used since: on resume
  the block is read again, nothing of it decoded twice. That is exact where the shuffle buffer of `datasets` is not (it
  loses its content), for a checkpoint of a few hundred bytes.
- **Epochs run on.** With `repeat` each worker passes from one epoch to the next inside a batch: no clip is dropped, no
  batch is short, and ranks that hold different numbers of clips never wait for one another. Without it the loader gives
  one pass, whose last batches may be short and whose number differs from rank to rank: gather results at its end.
- **Crops.** A longer file is cropped *first*; the feature extractor then takes the mean of the crop, not of the file.
- **Faults.** Unusable clips are skipped, counted and logged (see [`training.audio.ClipError`]); a source that fails is
  opened again at the row it had come to.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import aiohttp
import datasets
import fsspec
import numpy as np
import pyarrow
import torch
from datasets.distributed import split_dataset_by_node
from huggingface_hub.utils import httpx
from torch.utils.data import get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from modeling_sslam import SSLAMFeatureExtractor
from modeling_sslam.feature_extraction_sslam import FRAME_SHIFT_MS
from training.audio import ClipError, read_waveform
from training.sources import Source, open_source

logger = logging.getLogger(__name__)

# What a remote source may raise that another attempt can mend.
TRANSIENT_ERRORS = (OSError, TimeoutError, aiohttp.ClientError, httpx.HTTPError, pyarrow.ArrowException, EOFError)
PERMANENT_ERRORS = (FileNotFoundError, PermissionError)
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 60.0
# A fraction means nothing over the first few clips.
MIN_CLIPS_FOR_FRACTION = 100
# Skipped clips travel with the next batch; where none comes about they are handed over by themselves.
MAX_UNREPORTED_SKIPS = 64


@dataclass
class DataConfig:
    """Where the sound comes from and how it becomes batches."""

    source: str = field(
        metadata={
            "help": "Hub dataset id, folder of sound files or of a dataset (parquet, arrow, WebDataset tar, audiofolder, "
            "save_to_disk), .tsv manifest, or a builder of `datasets` such as parquet or webdataset (with data_files)."
        }
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    split: str = field(
        default="train",
        metadata={"help": "Split to read. A plain folder and a .tsv manifest are one split in themselves."},
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Files, globs or URLs to read in place of what the source would choose."}
    )
    streaming: bool = field(
        default=True,
        metadata={"help": "Whether to stream what load_dataset reads, rather than download and cache it."},
    )
    audio_column: str | None = field(
        default=None, metadata={"help": "Column with the audio; found if there is just one."}
    )
    id_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that names a clip. By default video_id, id or __key__, else the audio's path, else a digest "
            "of its bytes."
        },
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column whose labels go along with the clips. For a .tsv manifest any value reads the .lbl file "
            "beside it; for a plain folder, the names of the enclosing folders."
        },
    )
    crop: Literal["random", "head"] = field(
        default="random",
        metadata={
            "help": "Which part of a file longer than max_length frames: any, or (as published) always its head."
        },
    )
    shuffle_buffer: int = field(
        default=1000,
        metadata={
            "help": "Clips that are shuffled among each other, still encoded, in the memory of every worker. 0 keeps the "
            "order of the source, the same in every epoch."
        },
    )
    num_workers: int = field(default=4, metadata={"help": "Worker processes per rank. 0 loads in the main process."})
    front_end: Literal["worker", "device"] = field(
        default="worker",
        metadata={"help": "Where the filter bank runs: in the workers, or on the device of the model. Same numbers."},
    )
    max_skipped_fraction: float = field(
        default=0.05,
        metadata={
            "help": f"Stop when more of a rank's clips are unusable than this, after {MIN_CLIPS_FOR_FRACTION} clips."
        },
    )
    max_retries: int = field(
        default=8,
        metadata={"help": "Attempts, at growing intervals up to a minute, to go on with a source that fails."},
    )
    read_timeout: float = field(
        default=60.0, metadata={"help": "Seconds without a byte after which an http(s) connection counts as lost."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (("crop", ("random", "head")), ("front_end", ("worker", "device"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        for name in ("shuffle_buffer", "num_workers", "max_retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ValueError(f"max_skipped_fraction={self.max_skipped_fraction} must lie between 0 and 1.")


def generator_for(*key: int | str) -> np.random.Generator:
    """A generator that depends on the key alone, not on what was drawn before or in which process."""
    words = [
        part
        if isinstance(part, int)
        else int.from_bytes(hashlib.blake2b(part.encode(), digest_size=16).digest(), "little")
        for part in key
    ]
    return np.random.default_rng(words)


def with_retries(action: Callable[[], Any], max_retries: int, name: str) -> Any:
    """The result of `action`, called again at doubling intervals while it fails in a way that time may mend."""
    for attempt in range(max_retries + 1):
        try:
            return action()
        except PERMANENT_ERRORS:
            raise
        except TRANSIENT_ERRORS as error:
            if attempt == max_retries:
                raise
            seconds = min(FIRST_RETRY_SECONDS * 2**attempt, LONGEST_RETRY_SECONDS)
            logger.warning(
                "%s failed (%s: %s); attempt %d of %d in %g s.",
                name, type(error).__name__, error, attempt + 1, max_retries, seconds,
            )  # fmt: skip
            time.sleep(seconds)
    raise AssertionError("unreachable")


class Rows:
    """The rows of a dataset from a saved state on, opened again where it was if reading fails.

    Args:
        dataset: Its epoch set; private to this process.
        state: What an earlier `state_dict()` gave, or `None` for the start.
    """

    def __init__(self, dataset: datasets.IterableDataset, state: dict | None, max_retries: int, name: str) -> None:
        self.dataset = dataset
        self.max_retries = max_retries
        self.name = name
        self.checkpoint = state
        self.rows_since_checkpoint = 0
        self.rows: Iterator[dict] | None = None

    def state_dict(self) -> dict | None:
        """The state of the source after the rows given so far; `None` at its start."""
        if self.rows is not None:
            self.checkpoint, self.rows_since_checkpoint = self.dataset.state_dict(), 0
        return self.checkpoint

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> dict:
        row = with_retries(self._read, self.max_retries, self.name)
        if row is None:
            raise StopIteration
        self.rows_since_checkpoint += 1
        return row

    def _read(self) -> dict | None:
        # A source that failed half way through a table may have counted rows it never gave. So it restarts from the
        # last state taken between two rows, and passes over those given since.
        try:
            if self.rows is None:
                if self.checkpoint is not None:
                    self.dataset.load_state_dict(self.checkpoint)
                rows = iter(self.dataset)
                for _ in islice(rows, self.rows_since_checkpoint):
                    pass
                self.rows = rows
            return next(self.rows, None)
        except BaseException:
            self.rows = None
            raise


class Position(NamedTuple):
    """A place in a worker's endless stream of clips: after `used` clips of the block that starts at state `rows`."""

    epoch: int
    block: int
    rows: dict | None
    used: int


class ClipStream(torch.utils.data.IterableDataset):
    """One worker's batches. Stateful: its state is the position after the batch it gave last."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        feature_extractor: SSLAMFeatureExtractor,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        repeat: bool,
        drop_last: bool,
    ) -> None:
        self.source = source
        self.config = config
        self.feature_extractor = feature_extractor
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeat = repeat
        self.drop_last = drop_last
        self.position = Position(0, 0, None, 0)
        self.num_reported = 0

    def state_dict(self) -> dict[str, Any]:
        return self.position._asdict() | {"num_reported": self.num_reported}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_reported = state["num_reported"]
        self.position = Position(*(state[name] for name in Position._fields))

    def dataset_of_rank(self, epoch: int = 0) -> datasets.IterableDataset:
        """This rank's part of the source, in the order of that epoch.

        Made anew in each worker: the epoch of a dataset lies in memory that worker processes would share.
        """
        dataset = self.source.dataset
        # "examples" has every rank read everything, so it is for when there are too few shards to go round.
        strategy = "shards" if dataset.num_shards >= self.world_size else "examples"
        dataset = split_dataset_by_node(dataset, self.rank, self.world_size, strategy=strategy)
        if self.config.shuffle_buffer:
            # `datasets` orders the shards by the epoch's number alone, and leaves them alone in epoch 0.
            dataset.set_epoch(int(generator_for(self.seed, "shards", epoch).integers(1, 2**62)))
        return dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        clips: list[dict[str, Any]] = []
        skipped: list[tuple[str, str, str]] = []
        num_reported = self.num_reported
        position = self.position
        for row, position in self._rows(position):
            try:
                clips.append(self._load(row, position.epoch))
            except ClipError as error:
                skipped.append((self._id(row), error.reason, str(error)))
            if len(clips) == self.batch_size:
                self.position, self.num_reported = position, 0
                yield self._batch(clips, skipped[num_reported:])
                clips, skipped, num_reported = [], [], 0
            elif len(skipped) - num_reported >= MAX_UNREPORTED_SKIPS:
                # The position stays at the last batch: the clips waiting for the next one are not given yet.
                report, num_reported = skipped[num_reported:], len(skipped)
                self.num_reported = num_reported
                yield {"ids": [], "skipped": report}
        self.position, self.num_reported = position, 0
        if clips and not self.drop_last:
            yield self._batch(clips, skipped[num_reported:])
        elif skipped[num_reported:]:
            yield {"ids": [], "skipped": skipped[num_reported:]}

    def _rows(self, start: Position) -> Iterator[tuple[dict, Position]]:
        """Rows in the order they are used, each with the position after it."""
        epoch, index, state, used = start
        worker = info.id if (info := get_worker_info()) else 0
        size = max(1, self.config.shuffle_buffer)
        while True:
            rows = Rows(self.dataset_of_rank(epoch), state, self.config.max_retries, f"Reading {self.config.source}")
            is_empty = state is None
            state = rows.state_dict()
            draw = generator_for(self.seed, "blocks", epoch, self.rank, worker)
            # The first block is of random size, so that the borders between blocks move from epoch to epoch.
            block = list(islice(rows, int(draw.integers(1, size + 1)) if index == 0 else size))
            while block:
                is_empty = False
                next_state, next_block = rows.state_dict(), []
                order = np.arange(len(block))
                if self.config.shuffle_buffer:
                    order = generator_for(self.seed, "order", epoch, index, self.rank, worker).permutation(len(block))
                for i, k in enumerate(order):
                    if i >= used:
                        next_block.extend(islice(rows, 1))
                        yield block[k], Position(epoch, index, state, i + 1)
                    block[k] = None
                next_block.extend(islice(rows, size - len(next_block)))
                block, index, state, used = next_block, index + 1, next_state, 0
            if not self.repeat or is_empty:
                return
            epoch, index, state, used = epoch + 1, 0, None, 0

    def _id(self, row: dict) -> str:
        if self.source.id_column is not None:
            return str(row[self.source.id_column])
        encoded, path = self.source.audio(row)
        return path or hashlib.blake2b(encoded or b"", digest_size=8).hexdigest()

    def _load(self, row: dict, epoch: int) -> dict[str, Any]:
        extractor = self.feature_extractor
        encoded, path = self.source.audio(row)
        id_ = self._id(row)
        if encoded is None and path is not None and "://" in path:
            encoded = with_retries(lambda: _read_remote(path), self.config.max_retries, f"Reading {path}")
        crop = self.config.crop == "random"
        waveform = read_waveform(
            path if encoded is None else encoded,
            extractor.sampling_rate,
            max_samples=num_samples_of(extractor, extractor.max_length),
            min_samples=num_samples_of(extractor, extractor.patch_size),
            position=generator_for(self.seed, "crop", epoch, id_).random() if crop else 0.0,
        )
        clip = {"id": id_, "epoch": epoch, "waveform": waveform}
        return clip | ({"labels": self.source.labels(row)} if self.source.label_column else {})

    def _batch(self, clips: list[dict[str, Any]], skipped: list[tuple[str, str, str]]) -> dict[str, Any]:
        waveforms = [clip["waveform"] for clip in clips]
        batch = {
            "waveforms": torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True),
            "num_samples": torch.tensor([len(waveform) for waveform in waveforms]),
            "ids": [clip["id"] for clip in clips],
            "epochs": [clip["epoch"] for clip in clips],
            "skipped": skipped,
        }
        if self.source.label_column:
            batch["labels"] = [clip["labels"] for clip in clips]
        if self.config.front_end == "worker":
            batch["input_values"] = input_values_of(self.feature_extractor, batch)
            del batch["waveforms"], batch["num_samples"]
        return batch


def _read_remote(path: str) -> bytes:
    with fsspec.open(path, "rb") as file:
        return file.read()


def num_samples_of(feature_extractor: SSLAMFeatureExtractor, num_frames: int) -> int:
    """Samples that so many frames reach over."""
    frame_shift = feature_extractor.sampling_rate * FRAME_SHIFT_MS // 1000
    return feature_extractor.min_samples + (num_frames - 1) * frame_shift


def input_values_of(
    feature_extractor: SSLAMFeatureExtractor, batch: dict[str, Any], device: torch.device | str | None = None
) -> torch.Tensor:
    """The feature extractor over a batch's `waveforms` `(B, samples)` of `num_samples` `(B,)` each: `(B, T, F)`."""
    waveforms = batch["waveforms"].to(device, non_blocking=True)
    clips = [waveform[:n] for waveform, n in zip(waveforms, batch["num_samples"].tolist(), strict=True)]
    features = feature_extractor(clips, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    return features["input_values"]


class AudioLoader:
    """Batches of one rank; see [`make_loader`].

    Attributes:
        num_clips: Clips given so far.
        skipped: How many clips were skipped so far, by reason.
        epoch: The latest epoch that a clip given so far belongs to, counted from 0.
    """

    def __init__(self, stream: ClipStream, num_workers: int) -> None:
        self.stream = stream
        self.num_clips = 0
        self.skipped: Counter[str] = Counter()
        self.epoch = 0
        self._settings = {
            name: value
            for name, value in asdict(stream.config).items()
            if name not in ("front_end", "max_skipped_fraction", "max_retries", "read_timeout")
        } | {
            "num_workers": num_workers,
            "batch_size": stream.batch_size,
            "seed": stream.seed,
            "rank": stream.rank,
            "world_size": stream.world_size,
        }
        self._loader = StatefulDataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            # Workers are given a seed they have no use for; without a generator it would be drawn from the global one.
            generator=torch.Generator().manual_seed(stream.seed),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_one_thread,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            self._count(batch.pop("skipped"), len(batch["ids"]))
            if batch["ids"]:
                self.epoch = max(self.epoch, *batch["epochs"])
                yield batch

    def input_values(self, batch: dict[str, Any], device: torch.device | str) -> torch.Tensor:
        """The batch's `input_values` on `device`: moved there, or with `front_end="device"` computed there."""
        if "input_values" in batch:
            return batch["input_values"].to(device, non_blocking=True)
        return input_values_of(self.stream.feature_extractor, batch, device)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration begin with that epoch; not for one that is resumed."""
        self.stream.position = Position(epoch, 0, None, 0)
        self.stream.num_reported = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is: after the batch given last. Every rank saves and loads its own."""
        return {
            "settings": self._settings,
            "loader": self._loader.state_dict(),
            "num_clips": self.num_clips,
            "skipped": dict(self.skipped),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration go on from a saved state.

        Raises:
            ValueError: If the loader is set up otherwise than the one that saved it: it could not give the same clips.
        """
        for name, value in self._settings.items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"The data position was saved with {name}={state['settings'][name]!r}, this run has {name}={value!r}: "
                    "it would not see the same clips. Resume with the same value, or start a new run from the weights."
                )
        self._loader.load_state_dict(state["loader"])
        self.num_clips = state["num_clips"]
        self.skipped = Counter(state["skipped"])
        self.epoch = state["epoch"]

    def _count(self, skipped: list[tuple[str, str, str]], num_clips: int) -> None:
        for id_, reason, message in skipped:
            self.skipped[reason] += 1
            logger.warning("Skipped clip %s: %s", id_, message)
        self.num_clips += num_clips
        total = self.num_clips + self.skipped.total()
        fraction = self.skipped.total() / max(1, total)
        if total >= MIN_CLIPS_FOR_FRACTION and fraction > self.stream.config.max_skipped_fraction:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
            raise RuntimeError(
                f"{self.skipped.total()} of {total} clips of {self.stream.config.source} are unusable ({reasons}), more than "
                f"max_skipped_fraction={self.stream.config.max_skipped_fraction}. The log names each. Mend the data, or "
                "raise the fraction."
            )


def _one_thread(worker_id: int) -> None:
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)


def make_loader(
    config: DataConfig,
    feature_extractor: SSLAMFeatureExtractor,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    repeat: bool = True,
    drop_last: bool = False,
) -> AudioLoader:
    """The batches of one rank, the same for the same arguments.

    Args:
        feature_extractor: Clips are cropped to its `max_length` frames and padded to it.
        batch_size: Clips per batch of this rank.
        repeat: Whether epochs follow one another without end.
        drop_last: Without `repeat`, whether to drop a worker's last batch if it is short.

    Returns:
        An iterable of dicts: `input_values` float32 `(B, T, F)`, or with `config.front_end == "device"` `waveforms` float32
        `(B, samples)` zero-padded and `num_samples` int64 `(B,)` (see [`AudioLoader.input_values`]); `ids` and `epochs`,
        lists of length B; and with `config.label_column` `labels`, a list of B lists of names.

    Raises:
        ValueError, FileNotFoundError: If the source cannot be opened (see [`training.sources.open_source`]).
        RuntimeError: While iterating, if too many clips are unusable.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    source = open_source(config, num_readers=world_size * max(1, config.num_workers), seed=seed)
    stream = ClipStream(
        source, config, feature_extractor, batch_size, seed, rank, world_size, repeat=repeat, drop_last=drop_last
    )
    num_shards = stream.dataset_of_rank().num_shards
    if num_shards < config.num_workers:
        logger.warning("%s has %d shards for rank %d: using as many workers.", config.source, num_shards, rank)
    return AudioLoader(stream, num_workers=min(config.num_workers, num_shards))


__all__ = ["AudioLoader", "DataConfig", "input_values_of", "make_loader"]
