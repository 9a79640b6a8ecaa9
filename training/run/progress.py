"""Counters of a run: updates and dropped updates, means for the log, speed."""

import logging
import time
from dataclasses import dataclass, field

from training.run.config import TrainingError, WatchConfig

logger = logging.getLogger(__name__)

# A larger share of time waiting for data is worth a hint.
NOTABLE_WAIT = 0.1


@dataclass
class Progress:
    """Counters of a run, the same in every process. Checkpoints hold them.

    Attributes:
        update: Number of updates so far.
        ended_early: Whether the run ends before its last update.
        clips: Number of clips used so far.
        dropped_updates: Number of updates dropped so far.
        dropped_in_a_row: Number of consecutive updates dropped last.
        suspects: Clips whose batches had a non-finite loss in those.
        sums: Sums of the logged values over the updates since the last line of the log.
        num_summed: Number of these updates.
    """

    update: int = 0
    ended_early: bool = False
    clips: int = 0
    dropped_updates: int = 0
    dropped_in_a_row: int = 0
    suspects: list[str] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    num_summed: int = 0

    def count_update(self, values: dict[str, float]) -> None:
        """Count an update and add its values to the sums."""
        self.update += 1
        self.dropped_in_a_row = 0
        self.num_summed += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take_means(self) -> dict[str, float]:
        """Return the means over the updates since the last call, and reset the sums."""
        means = {name: total / self.num_summed for name, total in self.sums.items()}
        self.sums, self.num_summed = {}, 0
        return means


class IntervalTimer:
    """Speed of this process since the last line of the log, and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.updates = 0

    def start_waiting(self) -> None:
        """Start counting time as waiting."""
        self.waited -= time.perf_counter()

    def stop_waiting(self) -> None:
        """Stop counting time as waiting."""
        self.waited += time.perf_counter()

    def count_update(self) -> None:
        """Count an update."""
        self.updates += 1

    @property
    def updates_per_second(self) -> float:
        """The speed."""
        return self.updates / (time.perf_counter() - self.started)

    @property
    def wait_fraction(self) -> float:
        """The share of time spent waiting for data."""
        return self.waited / (time.perf_counter() - self.started)


def drop_update(progress: Progress, config: WatchConfig, values: dict[str, float], ids: list[str]) -> None:
    """Count and log an update that is dropped.

    Args:
        progress: The run's counters.
        config: Limits the number of dropped updates in a row.
        values: "loss" and "grad_norm" of the update.
        ids: Clips of the batches whose loss is not finite.

    Raises:
        TrainingError: If too many updates in a row were dropped.
    """
    progress.dropped_updates += 1
    progress.dropped_in_a_row += 1
    progress.suspects = (progress.suspects + ids) if progress.dropped_in_a_row > 1 else ids
    message = (
        f"Dropped an update after update {progress.update}: loss {values['loss']:g}, gradient norm "
        f"{values['grad_norm']:g}, "
        + (f"not finite for the batches of clips {', '.join(ids)}." if ids else "the loss of every batch finite.")
    )
    logger.warning(message)
    if progress.dropped_in_a_row >= config.max_dropped:
        raise TrainingError(
            f"{progress.dropped_in_a_row} updates in a row were dropped; the last checkpoint is from before. "
            f"Batches of these clips had a loss that is not finite: {', '.join(progress.suspects) or 'none'}. Listen "
            "to them, lower optimizer.learning_rate, or try another mixed_precision."
        )
