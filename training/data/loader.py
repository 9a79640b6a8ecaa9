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
from typing import Any

import pyarrow
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from modeling_sslam import SSLAMFeatureExtractor
from training.data.config import MIN_CLIPS_FOR_FRACTION, DataConfig, DataError
from training.data.selection import selections_of
from training.data.sources import open_source
from training.data.stream import Augmentation, ClipStream, input_values_of

logger = logging.getLogger(__name__)


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
