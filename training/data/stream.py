"""One worker's stream of clips and the batches it makes of them, with a position that can be saved and restored.

All random numbers are functions of (seed, epoch, block, worker) or of (seed, epoch, clip id). Between two batches the
only state is a [`Position`]: the state of the source at the start of a block of clips, and the number of clips used
since. To resume, the block is read again, still encoded. (The shuffle buffer of `datasets` would lose its content.)
"""

import logging
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import aiohttp
import datasets
import fsspec
import numpy as np
import pyarrow
import torch
from datasets.distributed import split_dataset_by_node
from fsspec.exceptions import FSTimeoutError
from huggingface_hub.utils import httpx
from torch.utils.data import get_worker_info

from modeling_sslam import SSLAMFeatureExtractor
from modeling_sslam.common.audio import read_waveform
from modeling_sslam.common.errors import ClipError
from modeling_sslam.filter_bank_sslam import is_host
from training.data.mixing.mixer import Mixer
from training.data.seeding import generator_for
from training.data.selection import Selection
from training.data.sources import Source, http_options

logger = logging.getLogger(__name__)

# Errors of a remote source that may not occur again.
TRANSIENT_ERRORS = (
    OSError,
    FSTimeoutError,
    aiohttp.ClientError,
    httpx.HTTPError,
    pyarrow.ArrowException,
    tarfile.TarError,
    EOFError,
)
PERMANENT_ERRORS = (FileNotFoundError, PermissionError)
PERMANENT_STATUS = (401, 403, 404, 410)
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 60.0
# Skipped clips are reported with the next batch, or alone if this many occur without a batch.
MAX_UNREPORTED_SKIPS = 64


T = TypeVar("T")


def with_retries(action: Callable[[], T], max_retries: int, name: str) -> T:
    """Return the result of `action`. After a transient error, call it again, at intervals that double.

    Args:
        action: The function.
        max_retries: How often it is called again.
        name: What it does, for the log.
    """
    retry, seconds = 0, FIRST_RETRY_SECONDS
    while True:
        try:
            return action()
        except (*TRANSIENT_ERRORS, ValueError) as error:
            if isinstance(error, ValueError) and not _is_answer_without_range(error):
                raise
            cause, retry = _cause(error), retry + 1
            if retry > max_retries or _is_permanent(cause):
                raise
            logger.warning(
                "%s failed (%s: %s); retry %d of %d in %g s.",
                name, type(cause).__name__, cause, retry, max_retries, seconds,
            )  # fmt: skip
            time.sleep(seconds)
            seconds = min(2 * seconds, LONGEST_RETRY_SECONDS)


def _cause(error: BaseException) -> BaseException:
    """Return the error behind an error of fsspec, which reports any file of unknown size as missing."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_answer_without_range(error: BaseException) -> bool:
    """Return whether a server answered a range request with the whole file. Its next answer may differ."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__") == "fsspec.implementations.http"


def _is_permanent(cause: BaseException) -> bool:
    # aiohttp's errors have a status, those of the Hub's client a response.
    status = getattr(cause, "status", getattr(getattr(cause, "response", None), "status_code", None))
    return isinstance(cause, PERMANENT_ERRORS) or status in PERMANENT_STATUS


# Maps a waveform `(samples,)` and a generator that depends on seed, epoch and clip to another waveform.
Augmentation = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


class Rows:
    """The rows of a dataset from a saved state on. If reading fails, the dataset is opened again at the same row.

    Args:
        dataset: A dataset of this process alone, with its epoch set.
        state: The result of an earlier `state_dict()`, or `None` for the start.
        max_retries: How often to open again.
        name: What is read, for the log.
    """

    def __init__(self, dataset: datasets.IterableDataset, state: dict | None, max_retries: int, name: str) -> None:
        self.dataset = dataset
        self.max_retries = max_retries
        self.name = name
        self.checkpoint = state
        self.rows_since_checkpoint = 0
        self.has_given = False
        self.rows: Iterator[dict] | None = None

    def state_dict(self) -> dict | None:
        """Return the state of the source after the rows given so far; `None` at its start."""
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
        self.has_given = True
        return row

    def _read(self) -> dict | None:
        # A source that fails within a table may have counted rows that it never gave. So restart from the last state
        # taken between two rows, and skip the rows given since.
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
    """A place in a worker's stream: after `used` clips of the `block` that starts at state `rows` of the source."""

    epoch: int
    block: int
    rows: dict | None
    used: int


class ClipStream(torch.utils.data.IterableDataset):
    """One worker's batches. The state is the position after the last batch.

    Args:
        source: The open source; its configuration says how to read it.
        dataset: The source's examples, cut into shards for all readers.
        feature_extractor: Turns waveforms into `input_values`.
        batch_size: Clips per batch.
        seed: Determines order, crops and augmentation.
        rank: This process.
        world_size: Number of processes.
        repeat: Whether epochs follow one another without end.
        drop_last: Whether to drop a last batch that is short.
        selections: Clips that take part; see [`training.data.selection`].
        augment: Applied to every waveform after cropping.
    """

    def __init__(
        self,
        source: Source,
        dataset: datasets.IterableDataset,
        feature_extractor: SSLAMFeatureExtractor,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        repeat: bool,
        drop_last: bool,
        selections: Sequence[Selection] = (),
        augment: Augmentation | None = None,
    ) -> None:
        self.source = source
        self.config = source.config
        self.dataset = dataset
        self.feature_extractor = feature_extractor
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeat = repeat
        self.drop_last = drop_last
        self.selections = selections
        self.augment = augment
        self.epoch = 0
        self._resumed: tuple[Position, int] | None = None
        self._current: tuple[Position, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch."""
        position, num_reported = self._current or (Position(self.epoch, 0, None, 0), 0)
        return position._asdict() | {"num_reported": num_reported}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue from a saved position."""
        position = Position(*(state[name] for name in Position._fields))
        self._resumed = self._current = position, state["num_reported"]

    def dataset_of_rank(self, epoch: int = 0) -> datasets.IterableDataset:
        """Return this rank's part of the source, in the order of an epoch.

        Every worker makes its own: a dataset keeps its epoch in memory that worker processes share.
        """
        # "examples" makes every rank read everything, so it is used only if there are fewer shards than ranks.
        strategy = "shards" if self.dataset.num_shards >= self.world_size else "examples"
        dataset = split_dataset_by_node(self.dataset, self.rank, self.world_size, strategy=strategy)
        if self.config.shuffle_buffer:
            # `datasets` derives the order of the shards from the epoch's number alone, and keeps it in epoch 0.
            dataset.set_epoch(int(generator_for(self.seed, "shards", epoch).integers(1, 2**62)))
        return dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, num_reported = self._resumed or (Position(self.epoch, 0, None, 0), 0)
        self._resumed, self._current = None, (start, num_reported)
        clips: list[dict[str, Any]] = []
        skipped: list[tuple[str, str, str]] = []
        position = start
        for row, position in self._rows(start):
            try:
                clips.append(self._load(row, position.epoch))
            except ClipError as error:
                skipped.append((self.source.id(row), error.reason, str(error)))
            if len(clips) == self.batch_size:
                self._current = position, 0
                yield self._batch(clips, skipped[num_reported:])
                start, clips, skipped, num_reported = position, [], [], 0
            elif len(skipped) - num_reported >= MAX_UNREPORTED_SKIPS:
                # The position stays after the last batch: the clips collected for the next one are not returned yet.
                report, num_reported = skipped[num_reported:], len(skipped)
                self._current = start, num_reported
                yield {"ids": [], "skipped": report}
        self._current = position, 0
        if clips and not self.drop_last:
            yield self._batch(clips, skipped[num_reported:])
        elif skipped[num_reported:]:
            yield {"ids": [], "skipped": skipped[num_reported:]}

    def _rows(self, start: Position) -> Iterator[tuple[dict, Position]]:
        """Yield rows in the order of use, each with the position after it."""
        epoch, index, state, used = start
        worker = info.id if (info := get_worker_info()) else 0
        size = max(1, self.config.shuffle_buffer)
        while True:
            source = Rows(self.dataset_of_rank(epoch), state, self.config.max_retries, f"Reading {self.config.source}")
            is_empty = state is None
            rows = self._selected(source, epoch)
            # The first block has a random size, so that the borders between blocks differ from epoch to epoch.
            first_size = int(generator_for(self.seed, "blocks", epoch, self.rank, worker).integers(1, size + 1))
            block = list(islice(rows, first_size if index == 0 else size))
            while block:
                is_empty = False
                next_state = source.state_dict()
                next_block: list[dict] = []
                order = np.arange(len(block))
                if self.config.shuffle_buffer:
                    order = generator_for(self.seed, "order", epoch, index, self.rank, worker).permutation(len(block))
                for i, k in enumerate(order.tolist()):
                    row, block[k] = block[k], {}  # a used clip's memory is free for the next block
                    if i >= used:
                        next_block.extend(islice(rows, 1))
                        yield row, Position(epoch, index, state, i + 1)
                next_block.extend(islice(rows, size - len(next_block)))
                block, index, state, used = next_block, index + 1, next_state, 0
            if not self.repeat or (is_empty and not source.has_given):
                return
            epoch, index, state, used = epoch + 1, 0, None, 0

    def _selected(self, rows: Iterator[dict], epoch: int) -> Iterator[dict]:
        if not self.selections:
            return rows
        return (row for row in rows if all(select(self.source.id(row), epoch) for select in self.selections))

    def _load(self, row: dict, epoch: int) -> dict[str, Any]:
        id_ = self.source.id(row)
        clip = self._read(row, id_, epoch) if self.source.mixer is None else self._mix(self.source.mixer, id_, epoch)
        if self.augment is not None:
            clip["waveform"] = self.augment(clip["waveform"], generator_for(self.seed, "augment", epoch, id_))
        return clip | {"id": id_, "epoch": epoch}

    def _read(self, row: dict, id_: str, epoch: int) -> dict[str, Any]:
        """Return the waveform, labels and group of an example."""
        extractor = self.feature_extractor
        encoded, path = self.source.audio(row)
        if encoded is None and path is not None and "://" in path:
            read = partial(_read_remote, path, self.config.read_timeout)
            encoded = with_retries(read, self.config.max_retries, f"Reading {path}")
        file = path if encoded is None else encoded
        if file is None:
            raise ClipError("missing", f"{id_} has neither a file nor a path.")
        waveform = read_waveform(
            file,
            extractor.sampling_rate,
            max_samples=extractor.num_samples(extractor.max_length),
            min_samples=extractor.num_samples(extractor.patch_size),
            position=generator_for(self.seed, "crop", epoch, id_).random() if self.config.crop == "random" else 0.0,
        )
        columns = self.source.columns
        return {
            "waveform": waveform,
            "labels": None if columns.label is None else self.source.labels(row),
            "group": None if columns.group is None else row[columns.group],
        }

    def _mix(self, mixer: Mixer, id_: str, epoch: int) -> dict[str, Any]:
        """Return the waveform, labels and group of a scene, and the recordings that it could not use."""
        extractor = self.feature_extractor
        rate, most = extractor.sampling_rate, extractor.num_samples(extractor.max_length)
        length = max(min(round(mixer.settings.seconds * rate), most), extractor.num_samples(extractor.patch_size))
        scene = mixer.mix(generator_for(self.seed, "scene", epoch, id_), length, rate)
        return {
            "waveform": torch.from_numpy(scene.waveform),
            "labels": scene.labels,
            "group": len(scene.events),
            "faults": scene.faults,
        }

    def _batch(self, clips: list[dict[str, Any]], skipped: list[tuple[str, str, str]]) -> dict[str, Any]:
        waveforms = [clip["waveform"] for clip in clips]
        batch = {
            "waveforms": torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True),
            "num_samples": torch.tensor([len(waveform) for waveform in waveforms]),
            "ids": [clip["id"] for clip in clips],
            "epochs": [clip["epoch"] for clip in clips],
            "skipped": skipped,
        }
        if self.source.columns.label is not None:
            batch["labels"] = [clip["labels"] for clip in clips]
        if self.source.columns.group is not None:
            batch["groups"] = [clip["group"] for clip in clips]
        if self.source.mixer is not None:
            batch["faults"] = [fault for clip in clips for fault in clip["faults"]]
        if self.config.front_end == "worker":
            batch["input_values"] = input_values_of(self.feature_extractor, batch)
            del batch["waveforms"], batch["num_samples"]
        return batch


def _read_remote(url: str, read_timeout: float) -> bytes:
    try:
        with fsspec.open(url, "rb", **http_options(read_timeout).get(url.split("://")[0], {})) as file:
            return file.read()
    except FileNotFoundError as error:
        if _is_permanent(_cause(error)):
            raise ClipError("missing", str(error)) from error
        raise


def input_values_of(
    feature_extractor: SSLAMFeatureExtractor, batch: dict[str, Any], device: torch.device | str | None = None
) -> torch.Tensor:
    """Compute the `input_values` `(B, T, F)` of a batch on `device`.

    Args:
        feature_extractor: Computes them.
        batch: `waveforms` `(B, samples)`, zero-padded, and `num_samples` `(B,)`.
        device: The device; by default that of the waveforms.
    """
    waveforms, num_samples = batch["waveforms"], batch["num_samples"].tolist()
    device = waveforms.device if device is None else torch.device(device)
    if not is_host(device):
        # The loader has pinned the waveforms, so nothing waits for this copy or for the device.
        return feature_extractor.extract_rows(waveforms, num_samples, feature_extractor.max_length, device)
    clips = [waveform[:n] for waveform, n in zip(waveforms.to(device), num_samples, strict=True)]
    features = feature_extractor(clips, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    return features["input_values"]
