"""From any source of sound to batches of `input_values`, the same in the same order however often a run is killed.

    loader = make_loader(DataConfig("agkphysics/AudioSet", config_name="unbalanced"), feature_extractor,
                         batch_size=12, seed=0, rank=rank, world_size=world_size)
    for batch in loader:                      # endless: steps end a run, not epochs
        input_values = loader.input_values(batch, device)
        ...
        checkpoint = loader.state_dict()      # of this rank; load it before iterating to go on after this batch

- **Sharing out.** The shards of a source go to the ranks, a rank's to its workers: each clip to exactly one worker per
  epoch. Every worker fills its own batches; the batches of a rank take turns over its workers.
- **Shuffling.** The order of the shards is drawn per epoch, and within a worker's stream blocks of `shuffle_buffer`
  clips are permuted. While one block is used up the next fills, so about `shuffle_buffer` encoded clips are held.
- **Exact resume.** A checkpoint of half a kilobyte per worker gives the same clips, crops and batches: see
  [`training.stream`].
- **Epochs run on.** With `repeat` each worker passes from one epoch to the next inside a batch: no clip is dropped, no
  batch is short, and ranks that hold different numbers of clips never wait for one another. Without it the loader
  gives one pass, whose last batches may be short and whose number differs from rank to rank: gather results after it.
- **Crops.** A longer file is cropped *first*; the feature extractor then takes the mean of the crop, not of the file.
- **Faults.** Unusable clips are skipped, counted and logged (see [`training.audio.ClipError`]); a source that fails is
  opened again at the row it had come to.
"""

import logging
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from modeling_sslam import SSLAMFeatureExtractor
from training.arguments import changed_default
from training.selection import selections_of
from training.sources import open_source
from training.stream import Augmentation, ClipStream, input_values_of

logger = logging.getLogger(__name__)

# A fraction means nothing over the first few clips.
MIN_CLIPS_FOR_FRACTION = 100


@dataclass
class DataConfig:
    """Where the sound comes from and how it becomes batches."""

    source: str = field(
        metadata={
            "help": "Hub dataset id, folder of sound files or of a dataset (parquet, arrow, WebDataset tar, "
            "audiofolder, save_to_disk), .tsv manifest, .csv table, or a builder of `datasets` such as parquet or "
            "webdataset with data_files.",
            "stands_for_section": True,
        }
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    split: str = field(
        default="train",
        metadata={
            "help": "Split to read, or several joined by +. A plain folder and a .tsv manifest are one split in "
            "themselves."
        },
    )
    revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of a Hub dataset. Only a commit stays what it is until a run is resumed."
        },
    )
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
            "help": "Column that names a clip. By default video_id, id or __key__, else the audio's path, else a "
            "digest of its bytes. Names must differ: a clip's crops are drawn by its name."
        },
    )
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column whose labels go along with the clips, auto for the first of the usual names. For a .tsv "
            "manifest any value reads the .lbl file beside it; for a plain folder, the names of the enclosing folders."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column by whose values results are reported, auto for num_sources where the data have it."},
    )
    sample_weights: str | None = field(
        default=None,
        metadata={
            "help": "Table id,weight by which clips_per_epoch clips are drawn for each epoch, without replacement; "
            "`python -m training.class_weights` writes it."
        },
    )
    clips_per_epoch: int | None = field(default=None, metadata={"help": "How many clips sample_weights draws."})
    hold_out: float = field(
        default=0.0,
        metadata={"help": "Share of the split's clips to hold out for validation; which, follows from their names."},
    )
    held_out: bool = field(
        default=False, metadata={"help": "Whether to read the clips that are held out, rather than the others."}
    )
    crop: Literal["random", "head"] = field(
        default="random",
        metadata={
            "help": "Which part of a file longer than max_length frames: any, or (as published) always its head."
        },
    )
    shuffle_buffer: int = field(
        default=500,
        metadata={
            "help": "Clips that are shuffled among each other; every worker holds as many encoded files in memory. 0 "
            "keeps the order of the source, the same in every epoch."
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
        metadata={"help": "How often, at intervals that grow to a minute, to try again when a source fails."},
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
        if (self.sample_weights is None) != (self.clips_per_epoch is None):
            raise ValueError("sample_weights and clips_per_epoch go together: give both, or neither.")
        if not 0 <= self.hold_out < 1 or (self.held_out and not self.hold_out):
            raise ValueError(
                f"hold_out={self.hold_out} must be at least 0, less than 1, and more than 0 for held_out."
            )
        if not 0 <= self.max_skipped_fraction < 1:
            raise ValueError(f"max_skipped_fraction={self.max_skipped_fraction} must be at least 0 and less than 1.")


@dataclass
class LabelledDataConfig(DataConfig):
    """Where labelled sound comes from and how it becomes batches."""

    label_column: str | None = changed_default(DataConfig, "label_column", "auto")
    group_column: str | None = changed_default(DataConfig, "group_column", "auto")


@dataclass
class EvaluationDataConfig(LabelledDataConfig):
    """A labelled split, read once in its order."""

    split: str = changed_default(DataConfig, "split", "test")
    crop: Literal["random", "head"] = changed_default(DataConfig, "crop", "head")
    shuffle_buffer: int = changed_default(DataConfig, "shuffle_buffer", 0)


class DataError(RuntimeError):
    """The data cannot carry a run on; the message says why and what to do."""


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
        # What the clips and their order follow from, but for the place of the data, which may have moved.
        self._settings = {
            "split": stream.config.split,
            "crop": stream.config.crop,
            "max_length": stream.feature_extractor.max_length,
            "shuffle_buffer": stream.config.shuffle_buffer,
            "num_workers": num_workers,
            "batch_size": stream.batch_size,
            "seed": stream.seed,
            "rank": stream.rank,
            "world_size": stream.world_size,
            "num_shards": stream.source.dataset.num_shards,
            "clips_per_epoch": stream.config.clips_per_epoch,
            "hold_out": stream.config.hold_out,
        }
        self._loader = StatefulDataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            # Workers are given a seed they have no use for; without a generator it would be drawn from the global one.
            generator=torch.Generator().manual_seed(stream.seed),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_set_up_worker,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            self._count(batch.pop("skipped"), len(batch["ids"]))
            if batch["ids"]:
                self.epoch = max(self.epoch, *batch["epochs"])
                yield batch
        if self.stream.repeat:
            raise DataError(
                f"{self.stream.config.source} has no clip for rank {self.stream.rank} of {self.stream.world_size}."
            )

    def input_values(self, batch: dict[str, Any], device: torch.device | str) -> torch.Tensor:
        """The batch's `input_values` on `device`: moved there, or with `front_end="device"` computed there."""
        if "input_values" in batch:
            return batch["input_values"].to(device, non_blocking=True)
        return input_values_of(self.stream.feature_extractor, batch, device)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration begin with that epoch; not for one that is resumed."""
        self.stream.epoch = self.epoch = epoch

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
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"The data position was saved with {name}={state['settings'][name]!r}, this run has "
                    f"{name}={value!r} and would see other clips. Resume with the same value, or start a new run from "
                    "the weights."
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
            raise DataError(
                f"{self.skipped.total()} of {total} clips of {self.stream.config.source} are unusable ({reasons}), "
                f"more than max_skipped_fraction={self.stream.config.max_skipped_fraction}. The log names each. Mend "
                "the data, or raise the fraction."
            )


def _set_up_worker(worker_id: int) -> None:
    # torch keeps a worker to one thread itself.
    pyarrow.set_cpu_count(1)
    # A terminal or a scheduler signals every process of a run, and a worker that died of it would take down the main
    # process while that finishes its step and saves. The second SIGTERM is the main process's own, at its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


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
    augment: Augmentation | None = None,
) -> AudioLoader:
    """The batches of one rank, the same for the same arguments.

    Args:
        feature_extractor: Clips are cropped to its `max_length` frames and padded to it.
        batch_size: Clips per batch of this rank.
        repeat: Whether epochs follow one another without end.
        drop_last: Without `repeat`, whether to drop a worker's last batch if it is short.
        augment: Applied to every waveform after cropping.

    Returns:
        An iterable of dicts: `input_values` float32 `(B, T, F)`, or with `config.front_end == "device"` `waveforms`
        float32 `(B, samples)` zero-padded and `num_samples` int64 `(B,)` (see [`AudioLoader.input_values`]); `ids` and
        `epochs`, lists of length B; with `config.label_column` `labels`, a list of B lists of names; with
        `config.group_column` `groups`, a list of B values.

    Raises:
        ValueError, FileNotFoundError: If the source cannot be opened (see [`training.sources.open_source`]).
        DataError: While iterating, if too many clips are unusable.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    source = open_source(config, num_readers=world_size * max(1, config.num_workers), seed=seed)
    stream = ClipStream(
        source,
        config,
        feature_extractor,
        batch_size,
        seed,
        rank,
        world_size,
        repeat=repeat,
        drop_last=drop_last,
        selections=selections_of(config, seed),
        augment=augment,
    )
    num_shards = stream.dataset_of_rank().num_shards
    if num_shards < config.num_workers:
        logger.warning("%s has %d shards for rank %d: using as many workers.", config.source, num_shards, rank)
    return AudioLoader(stream, num_workers=min(config.num_workers, num_shards))


__all__ = ["AudioLoader", "DataConfig", "DataError", "input_values_of", "make_loader"]
