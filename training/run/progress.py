"""TODO."""

import logging
import time
from dataclasses import dataclass, field

from training.run.config import TrainingError, WatchConfig

logger = logging.getLogger(__name__)

# Waiting for data is worth a word from this share of the time on.
NOTABLE_WAIT = 0.1


@dataclass
class Progress:
    """How far a run has come: all that the loop counts, the same in every process."""

    update: int = 0
    # Whether the run is to end before its last update.
    ended_early: bool = False
    clips: int = 0
    dropped_updates: int = 0
    dropped_in_a_row: int = 0
    # Clips under suspicion since the last update that was not dropped.
    suspects: list[str] = field(default_factory=list)
    # Of the updates since the last line of the log.
    sums: dict[str, float] = field(default_factory=dict)
    num_summed: int = 0

    def count_update(self, values: dict[str, float]) -> None:
        self.update += 1
        self.dropped_in_a_row = 0
        self.num_summed += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take_means(self) -> dict[str, float]:
        """Means over the updates since the last call."""
        means = {name: total / self.num_summed for name, total in self.sums.items()}
        self.sums, self.num_summed = {}, 0
        return means


class IntervalTimer:
    """Speed of this process's updates since the last line of the log, and how much of the time went into waiting for
    data."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.updates = 0

    def start_waiting(self) -> None:
        self.waited -= time.perf_counter()

    def stop_waiting(self) -> None:
        self.waited += time.perf_counter()

    def count_update(self) -> None:
        self.updates += 1

    @property
    def updates_per_second(self) -> float:
        return self.updates / (time.perf_counter() - self.started)

    @property
    def wait_fraction(self) -> float:
        return self.waited / (time.perf_counter() - self.started)


def drop_update(progress: Progress, config: WatchConfig, values: dict[str, float], ids: list[str]) -> None:
    """Counts and logs an update that does not happen.

    Raises:
        TrainingError: If too many in a row did not.
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
