"""A run before its model exists: processes, folder, seeds, and the checkpoint to continue from."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)

from modeling_sslam.common.files import remove_leftovers
from modeling_sslam.common.signals import StopRequest
from training.arguments import parse
from training.data.config import DataError
from training.run.checkpointing import CheckpointError, latest_checkpoint, list_checkpoints
from training.run.config import NEUTRAL_SETTINGS, RunConfig, TrainingError, plain_settings
from training.run.failure import reported
from training.run.lock import locked_by_launch
from training.run.processes import join_processes, make_accelerator
from training.run.progress import Progress


class _HasOutputFolder(Protocol):
    @property
    def output_dir(self) -> Path: ...


ConfigT = TypeVar("ConfigT", bound=_HasOutputFolder)
ProgressT = TypeVar("ProgressT", bound=Progress)


def run_program(
    config_class: type[ConfigT],
    program: Callable[[ConfigT], object],
    argv: Sequence[str] | None,
    description: str | None,
) -> None:
    """Run a training program: parse its settings, join the processes, lock its folder, and report errors as one line.

    Args:
        config_class: The settings of the program.
        program: The program itself.
        argv: Its arguments; `None` for those of the command line.
        description: The text at the top of `--help`.
    """
    config = parse(config_class, argv, description=description)
    join_processes()
    with reported(TrainingError, CheckpointError, DataError), locked_by_launch(config.output_dir):
        program(config)
    PartialState().destroy_process_group()


def stoppable(program: Callable[[ConfigT, StopRequest], object]) -> Callable[[ConfigT], object]:
    """Wrap a program so that SIGTERM and SIGINT ask it to stop instead of ending it."""

    def run(config: ConfigT) -> object:
        with StopRequest() as stop:
            return program(config, stop)

    return run


@dataclass(frozen=True)
class Run:
    """A run as one process sees it, before its model exists.

    Attributes:
        config: The settings.
        stop: Tells whether the run was asked to stop.
        accelerator: Device, precision and the other processes.
        checkpoint: The checkpoint to continue from; `None` for a run that starts.
        saved: The content of the checkpoint's trainer.json; empty for a run that starts.
        noise_seed: This process's seed of the global random number generators.
        program_seed: This process's seed of a generator of the program.
    """

    config: RunConfig
    stop: StopRequest
    accelerator: Accelerator
    checkpoint: Path | None
    saved: dict[str, Any]
    noise_seed: int
    program_seed: int

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.config.output_dir

    @property
    def rank(self) -> int:
        """This process."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.accelerator.num_processes

    @property
    def clips_per_update(self) -> int:
        """The number of clips of one update, over all processes."""
        return self.config.batch_size * self.config.gradient_accumulation_steps * self.world_size

    def progress(self, progress_class: type[ProgressT]) -> ProgressT:
        """Return the run's counters: those of the checkpoint, or new ones."""
        return progress_class(**self.saved.get("progress", {}))


def open_run(config: RunConfig, stop: StopRequest) -> Run:
    """Start a run or continue one in its folder, whose lock the program holds.

    All processes then draw the same random numbers, so that their new weights are equal.

    Raises:
        TrainingError: If the folder, the precision or an earlier run in the folder does not allow it.
    """
    accelerator = accelerator_of(config)
    if accelerator.is_main_process:
        try:
            config.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"output_dir={str(config.output_dir)!r} cannot be made: {error}") from error
        remove_leftovers(config.output_dir)
    accelerator.wait_for_everyone()
    checkpoint, saved = find_checkpoint(config, accelerator)
    noise_seed, program_seed = (
        np.random.SeedSequence([config.seed, accelerator.process_index]).generate_state(2).tolist()
    )
    set_seed(config.seed)
    return Run(config, stop, accelerator, checkpoint, saved, noise_seed, program_seed)


def accelerator_of(config: RunConfig) -> Accelerator:
    """Return the device, precision, processes and tracker of a run.

    Raises:
        TrainingError: If the precision or the tracker is not available.
    """
    run_dir, tracker = config.output_dir, config.watch.tracker
    try:
        accelerator = make_accelerator(
            config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if tracker == "none" else tracker,
            project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "tensorboard")),
            # Buffers need no broadcast, because all of them are constants.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        raise TrainingError(f"accelerate: {error}") from error
    if tracker != "none" and not accelerator.log_with:
        raise TrainingError(f"watch.tracker={tracker!r} is not installed; install it with pip, or use none.")
    return accelerator


def find_checkpoint(config: RunConfig, accelerator: Accelerator) -> tuple[Path | None, dict[str, Any]]:
    """Return the checkpoint to continue from and the content of its trainer.json; `None` and `{}` to start.

    Raises:
        TrainingError: If the folder holds another run, or the checkpoint belongs to a run with other settings.
    """
    run_dir = config.output_dir
    if config.resume == "no":
        if list_checkpoints(run_dir):
            raise TrainingError(
                f"{run_dir} holds a run. Continue it with --resume auto, or choose another --output_dir."
            )
        return None, {}
    # Checking reads whole checkpoints, so a single process does it for all.
    (checkpoint,) = broadcast_object_list([latest_checkpoint(run_dir) if accelerator.is_main_process else None])
    if checkpoint is None:
        if list_checkpoints(run_dir):
            raise TrainingError(f"All checkpoints of {run_dir} are damaged: start again in another --output_dir.")
        return None, {}
    saved = json.loads((checkpoint / "trainer.json").read_text())
    launch = {"num_processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
    for name, value in launch.items():
        if saved[name] != value:
            raise TrainingError(
                f"{checkpoint} was made with {name}={saved[name]}, this run has {value}: it would not be the same "
                f"run. Use the same value, or start a new run with --init_from {checkpoint}."
            )
    settings, before = plain_settings(config), saved["settings"]
    changed = [
        f"{key} ({before.get(key)} before, {settings.get(key)} now)"
        for key in sorted(settings.keys() | before.keys())
        if key not in NEUTRAL_SETTINGS and settings.get(key) != before.get(key)
    ]
    if changed and not config.allow_changed_config:
        raise TrainingError(
            f"These settings differ from those of the run in {run_dir}: {'; '.join(changed)}. Set them back, start "
            "again in another --output_dir, or pass --allow_changed_config true."
        )
    return checkpoint, saved
