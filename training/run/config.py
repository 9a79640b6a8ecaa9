"""TODO."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from training.arguments import flatten
from training.data.config import DataConfig
from training.run.checkpointing import (
    CheckpointConfig,
)
from training.run.optimization import OptimizerConfig

# Settings that may change between a run and its continuation, which stays the same run.
NEUTRAL_SETTINGS = {
    *("output_dir", "resume", "allow_changed_config", "checkpoint.every", "checkpoint.keep"),
    *("data.max_skipped_fraction", "data.max_retries", "data.read_timeout"),
    *("watch.every", "watch.tracker", "watch.max_dropped"),
}


class TrainingError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


@dataclass
class WatchConfig:
    """What is logged, and when a run that has gone wrong stops."""

    every: int = field(default=100, metadata={"help": "Updates between two lines of the log."})
    tracker: str = field(
        default="tensorboard",
        metadata={
            "help": "Where to log beside metrics.jsonl: a tracker of accelerate (tensorboard, wandb, ...) or none."
        },
    )
    max_dropped: int = field(
        default=20,
        metadata={
            "help": "Stop after so many updates in a row that were dropped for a loss or gradient that is not finite. "
            "(In fp16 a few in a row are normal: that is how the loss scale finds its value.)"
        },
    )

    def __post_init__(self) -> None:
        for name in ("every", "max_dropped"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(kw_only=True)
class RunConfig:
    """The settings that all training programs have."""

    output_dir: Path = field(metadata={"help": "Folder of the run, on a disk that all processes share."})
    data: DataConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    watch: WatchConfig
    resume: Literal["no", "auto"] = field(
        default="no",
        metadata={"help": "auto: go on from the latest checkpoint in output_dir, or start if there is none."},
    )
    allow_changed_config: bool = field(
        default=False, metadata={"help": "Resume even if settings changed that alter the run."}
    )
    seed: int = field(
        default=0, metadata={"help": "What weights, order of clips, crops, masks and noise follow from."}
    )
    max_updates: int = field(default=400_000, metadata={"help": "Optimiser updates of the whole run."})
    batch_size: int = field(default=12, metadata={"help": "Clips per device and forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per update."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Overrides what accelerate was launched with."}
    )
    compile: bool = field(default=False, metadata={"help": "Compile the transformer blocks by torch.compile."})

    def __post_init__(self) -> None:
        for name in ("max_updates", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def plain_settings(config: RunConfig) -> dict[str, Any]:
    """All settings by their dotted keys, as JSON gives them back."""
    return json.loads(json.dumps(flatten(config), default=str))
