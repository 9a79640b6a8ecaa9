"""Settings that all training programs share."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from training.arguments import flatten
from training.data.config import DataConfig
from training.run.optimization import OptimizerConfig

# Settings that may change when a run is resumed: they do not alter its result, `memory` by no more than rounding.
NEUTRAL_SETTINGS = {
    *("output_dir", "resume", "allow_changed_config", "checkpoint.every", "checkpoint.keep", "memory", "compile_mode"),
    *("data.max_skipped_fraction", "data.max_retries", "data.read_timeout"),
    *("watch.every", "watch.tracker", "watch.max_dropped"),
}


class TrainingError(Exception):
    """The run cannot start or continue. The message gives the reason and the remedy."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int = field(default=5000, metadata={"help": "Updates between checkpoints."})
    keep: int = field(default=2, metadata={"help": "Number of latest checkpoints to keep."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "every", "keep")


@dataclass
class WatchConfig:
    """Logging, and the limits at which a failing run stops."""

    every: int = field(default=100, metadata={"help": "Updates between two lines of the log."})
    tracker: str = field(
        default="tensorboard",
        metadata={
            "help": "Where to log besides metrics.jsonl: a tracker of accelerate (tensorboard, wandb, ...) or none."
        },
    )
    max_dropped: int = field(
        default=20,
        metadata={
            "help": "Stop after this many consecutive updates were dropped for a loss or gradient that is not finite. "
            "(In fp16 a few in a row are normal while the loss scale falls.)"
        },
    )

    def __post_init__(self) -> None:
        check_at_least_one(self, "every", "max_dropped")


@dataclass(kw_only=True)
class RunConfig:
    """Settings that all training programs have."""

    output_dir: Path = field(metadata={"help": "Folder of the run, on a disk that all processes share."})
    data: DataConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    watch: WatchConfig
    resume: Literal["no", "auto"] = field(
        default="no",
        metadata={"help": "auto: continue from the latest checkpoint in output_dir, or start if there is none."},
    )
    allow_changed_config: bool = field(
        default=False, metadata={"help": "Resume even if settings changed that alter the run."}
    )
    seed: int = field(default=0, metadata={"help": "Determines weights, order of clips, crops, masks and noise."})
    max_updates: int | None = field(default=None, metadata={"help": "Optimiser updates of the whole run."})
    batch_size: int = field(default=12, metadata={"help": "Clips per device and forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per update."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Overrides the precision that accelerate was launched with."}
    )
    memory: Literal["auto", "fast", "small"] = field(
        default="auto",
        metadata={
            "help": "fast: keep what the backward pass needs. small: recompute activations, and in pre-training the "
            "decoder. auto: small on CPUs, fast on other devices."
        },
    )
    compile: bool = field(default=False, metadata={"help": "Compile the transformer blocks with torch.compile."})

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_updates", "batch_size", "gradient_accumulation_steps")

    @property
    def num_updates(self) -> int:
        """The number of updates of the whole run."""
        if self.max_updates is None:
            raise ValueError("max_updates is not set")
        return self.max_updates


def check_at_least_one(config: Any, *names: str) -> None:
    """Check settings that must be at least 1 if they are given.

    Raises:
        ValueError: If one is less.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def plain_settings(config: Any) -> dict[str, Any]:
    """Return all settings of a configuration by their dotted keys, as plain values that JSON preserves."""
    return json.loads(json.dumps(flatten(config), default=str))
