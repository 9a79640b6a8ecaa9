"""Batches of `input_values` from any source of sound, in an order that survives any number of restarts.

    source = open_source(DataConfig("agkphysics/AudioSet", config_name="unbalanced"))
    loader = make_loader(source, feature_extractor, batch_size=12, seed=0, rank=rank, world_size=world_size)
    for batch in loader:                      # endless: steps end a run, not epochs
        input_values = loader.input_values(batch, device)
        ...
        checkpoint = loader.state_dict()      # of this rank; load it before iterating to continue after this batch

- **Sharing.** Ranks share the source's shards, and a rank's workers share its shards: each clip goes to exactly one
  worker per epoch. Every worker fills its own batches; a rank takes its batches from its workers in turn.
- **Shuffling.** Each epoch draws an order of the shards. Within a worker's stream, blocks of `shuffle_buffer` clips
  are permuted. The next block fills while the current one is used, so about `shuffle_buffer` encoded clips are held.
- **Exact resume.** A checkpoint of half a kilobyte per worker gives the same clips, crops and batches: see
  [`training.data.stream`].
- **Endless epochs.** With `repeat` each worker continues into the next epoch within a batch: no clip is dropped, no
  batch is short, and ranks with different numbers of clips never wait for one another. Without `repeat` the loader
  gives one pass. Its last batches may be short and their number differs from rank to rank, so gather results after it.
- **Crops.** A longer file is cropped *first*; the feature extractor then subtracts the mean of the crop, not of the
  file.
- **Faults.** Unusable clips are skipped, counted and logged (see [`modeling_sslam.common.errors.ClipError`]). A source
  that fails is opened again at the same row.
"""

import logging
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from modeling_sslam import SSLAMFeatureExtractor
from training.data.config import MIN_CLIPS_FOR_FRACTION, DataError
from training.data.mixing.mixer import Fault
from training.data.selection import selections_of
from training.data.sources import Source
from training.data.stream import Augmentation, ClipStream, input_values_of

logger = logging.getLogger(__name__)


class AudioLoader:
    """Batches of one rank; see [`make_loader`].

    Attributes:
        num_clips: Number of clips given so far.
        skipped: Number of clips skipped so far, by reason.
        unusable_recordings: Names of recordings that scenes could not use; each is logged once.
        epoch: The latest epoch among the clips given so far, counted from 0.
    """

    def __init__(self, stream: ClipStream, num_workers: int) -> None:
        self.stream = stream
        self.num_clips = 0
        self.skipped: Counter[str] = Counter()
        self.unusable_recordings: set[str] = set()
        self.epoch = 0
        # Everything that determines the clips and their order, except the data's location, which may change.
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
            "num_shards": stream.dataset.num_shards,
            "clips_per_epoch": stream.config.clips_per_epoch,
            "hold_out": stream.config.hold_out,
        }
        if stream.source.mixer is not None:
            self._settings |= {"scenes": stream.source.mixer.digest, "seconds": stream.source.mixer.settings.seconds}
        self._loader = StatefulDataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            # The loader draws a seed for its workers, which ignore it. Without a generator of its own it would draw
            # from the global one.
            generator=torch.Generator().manual_seed(stream.seed),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_set_up_worker,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            self._count(batch.pop("skipped"), len(batch["ids"]))
            self._report(batch.pop("faults", []))
            if batch["ids"]:
                self.epoch = max(self.epoch, *batch["epochs"])
                yield batch
        if self.stream.repeat:
            raise DataError(
                f"{self.stream.config.source} has no clip for rank {self.stream.rank} of {self.stream.world_size}."
            )

    def input_values(self, batch: dict[str, Any], device: torch.device | str) -> torch.Tensor:
        """Return the batch's `input_values` on `device`: moved there, or computed there with `front_end="device"`."""
        if "input_values" in batch:
            return batch["input_values"].to(device, non_blocking=True)
        return input_values_of(self.stream.feature_extractor, batch, device)

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at an epoch. A resumed loader ignores the call."""
        self.stream.epoch = self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's position after the last batch. Every rank saves and loads its own."""
        return {
            "settings": self._settings,
            "loader": self._loader.state_dict(),
            "num_clips": self.num_clips,
            "skipped": dict(self.skipped),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration continue from a saved position.

        Raises:
            ValueError: If the settings differ from the saved ones, so that the loader would give other clips.
        """
        for name, value in self._settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"The data position was saved with {name}={state['settings'].get(name)!r}, this run has "
                    f"{name}={value!r} and would see other clips. Resume with the same value, or start a new run from "
                    "the weights."
                )
        self._loader.load_state_dict(state["loader"])
        self.num_clips = state["num_clips"]
        self.skipped = Counter(state["skipped"])
        self.epoch = state["epoch"]

    def _report(self, faults: list[Fault]) -> None:
        """Log recordings that scenes could not use, so that others of their labels took their places."""
        for id_, _, message in faults:
            if id_ not in self.unusable_recordings:
                self.unusable_recordings.add(id_)
                logger.warning("Recording %s is unusable (%d so far): %s", id_, len(self.unusable_recordings), message)

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
    # torch limits its own threads in workers to one.
    pyarrow.set_cpu_count(1)
    # Terminals and schedulers signal all processes of a run. The main process still needs its workers' batches to
    # finish the update and save. A second SIGTERM comes from the main process at its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def make_loader(
    source: Source,
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
    """Make the loader of one rank. The same arguments give the same batches.

    Args:
        source: The open source, whose configuration says how to read it.
        feature_extractor: Clips are cropped or padded to its `max_length` frames.
        batch_size: Clips per batch of this rank.
        seed: Determines order, crops and augmentation.
        rank: This process.
        world_size: Number of processes.
        repeat: Whether epochs follow one another without end.
        drop_last: Without `repeat`, whether to drop a worker's last batch if it is short.
        augment: Applied to every waveform after cropping.

    Returns:
        An iterable of dicts: `input_values` float32 `(B, T, F)`, or with `front_end == "device"` `waveforms` float32
        `(B, samples)`, zero-padded, and `num_samples` int64 `(B,)` (see [`AudioLoader.input_values`]); `ids` and
        `epochs`, lists of length B; with a label column `labels`, a list of B lists of names; with a group column
        `groups`, a list of B values.

    Raises:
        ValueError: If `batch_size` is less than 1, or the table of sample weights is unusable.
        DataError: While iterating, if too many clips are unusable.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    config = source.config
    stream = ClipStream(
        source,
        source.in_shards(num_readers=world_size * max(1, config.num_workers), seed=seed),
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


__all__ = ["AudioLoader", "make_loader"]
