"""What the training programs' loops stand on: a run that logs, saves, stops and goes on.

    run = Run(config, stop, Progress())           # accelerator, folder, and the checkpoint to go on from, if any
    ...                                           # the program makes its model and its data
    run.start(model, loader, feature_extractor)   # optimiser; all of it as the checkpoint left it
    for batches in run.updates():                 # until the end, or until the run is asked to stop
        ...                                       # forward and backward are the program's
        values = run.step(outputs, batches)       # optimiser, or None for an update that must not happen
        run.log(...)
    run.end()

A checkpoint is saved between two updates, so whatever a program does in the body of its loop is in it.
"""

import json
import logging
import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from modeling_sslam import SSLAMFeatureExtractor, SSLAMPreTrainedModel
from modeling_sslam.common.files import remove_leftovers, write_text
from modeling_sslam.common.signals import StopRequest
from training.arguments import flatten, parse, to_yaml
from training.data.config import DataError
from training.data.loader import AudioLoader
from training.run.checkpointing import (
    CheckpointError,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_optimizer,
    rng_state,
    rotate,
    save_optimizer,
    save_tensors,
    set_rng_state,
    write_folder,
)
from training.run.config import NEUTRAL_SETTINGS, RunConfig, TrainingError, plain_settings
from training.run.metrics_log import append_metrics, truncate_metrics
from training.run.optimization import learning_rate, make_optimizer
from training.run.processes import join_processes, make_accelerator
from training.run.progress import NOTABLE_WAIT, IntervalTimer, Progress, drop_update

logger = logging.getLogger(__name__)


C = TypeVar("C", bound=RunConfig)


def run_program(
    config_class: type[C], program: Callable[[C, StopRequest], None], argv: Sequence[str] | None, description: str
) -> None:
    """A training program's `main`: settings from the command line, signals, and errors as one line."""
    config = parse(config_class, argv, description=description)
    join_processes()
    try:
        with StopRequest() as stop:
            program(config, stop)
    except (TrainingError, CheckpointError, DataError) as error:
        sys.exit(f"error: {error}")
    PartialState().destroy_process_group()


class Run:
    """A run as one process sees it.

    Args:
        progress: Of a run that starts; one that goes on has it from its checkpoint.

    Attributes:
        accelerator: Device, precision and the other processes.
        checkpoint: Model folder to go on from, `None` for a run that starts.
        model, plain_model: As the processes share it, and without the wrapping.
        loader: This process's batches.

    Raises:
        TrainingError: If the folder, the precision or an earlier run in the folder does not allow it.
    """

    def __init__(self, config: RunConfig, stop: StopRequest, progress: Progress) -> None:
        self.config = config
        self.stop = stop
        self.run_dir = config.output_dir
        self.accelerator = accelerator = accelerator_of(config)
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.clips_per_update = config.batch_size * config.gradient_accumulation_steps * self.world_size
        if accelerator.is_main_process:
            try:
                self.run_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TrainingError(f"output_dir={str(self.run_dir)!r} cannot be made: {error}") from error
            remove_leftovers(self.run_dir)
        accelerator.wait_for_everyone()
        self.checkpoint, self._state = find_checkpoint(config, accelerator)
        self.progress = type(progress)(**self._state["progress"]) if self.checkpoint else progress
        # This process's own, for the global generators and for one of the program's.
        self.noise_seed, self.program_seed = (
            np.random.SeedSequence([config.seed, self.rank]).generate_state(2).tolist()
        )
        set_seed(config.seed)  # new weights, alike in all processes

    def start(
        self,
        model: SSLAMPreTrainedModel,
        loader: AudioLoader,
        feature_extractor: SSLAMFeatureExtractor,
        generators: Mapping[str, torch.Generator] | None = None,
        description: str = "",
    ) -> None:
        """Sets up all that updates need, where the checkpoint left it.

        Args:
            feature_extractor: Saved beside the model.
            generators: Of this process, beside the global ones; saved and restored by name.
            description: What the run does, for the log.
        """
        config, accelerator, rank = self.config, self.accelerator, self.rank
        self.loader, self.feature_extractor, self.generators = loader, feature_extractor, dict(generators or {})
        model.to(accelerator.device)
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(model, config.optimizer))
        self.plain_model = accelerator.unwrap_model(self.model)

        # --- Randomness and place in the data, each process its own
        set_seed(self.noise_seed)
        # Two runs have seen the same clips in the same order if this is the same.
        self.clips_digest = 0
        if self.checkpoint:
            load_optimizer(self.checkpoint, self.model, self.optimizer)
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(self._state["scaler"])
            own = torch.load(self.checkpoint / f"rank-{rank:05d}.pt", map_location="cpu", weights_only=True)
            try:
                loader.load_state_dict(own["data"])
            except ValueError as error:
                raise TrainingError(f"data.source={config.data.source!r}: {error}") from error
            for name, generator in self.generators.items():
                generator.set_state(own["generators"][name])
            self.clips_digest = own["clips_digest"]
        self._batches = iter(loader)
        if self.checkpoint:
            set_rng_state(own["rng"])

        # --- Log
        if accelerator.is_main_process:
            write_text(self.run_dir / "config.yaml", to_yaml(config))
            truncate_metrics(self.metrics_path, self.progress.update)
        accelerator.init_trackers(
            "sslam",
            config=None if self.checkpoint else {key: str(value) for key, value in flatten(config).items()},
            init_kwargs={
                "tensorboard": {"purge_step": self.progress.update + 1},
                "wandb": {"name": self.run_dir.name, "dir": str(self.run_dir)},
            },
        )
        logger.info(
            "%s: %s%.1f M trainable parameters; %d clips an update on %d %s process(es), precision %s; %s at update "
            "%d.",
            self.run_dir,
            description and f"{description}, ",
            sum(parameter.numel() for parameter in self.plain_model.parameters() if parameter.requires_grad) / 1e6,
            self.clips_per_update,
            self.world_size,
            accelerator.device.type,
            accelerator.mixed_precision,
            "resumed" if self.checkpoint else "started",
            self.progress.update,
        )
        self.timer = IntervalTimer()
        self._has_hinted = False

    @property
    def metrics_path(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    @property
    def is_complete(self) -> bool:
        return self.progress.update == self.config.max_updates or self.progress.ended_early

    def updates(self) -> Iterator[list[dict[str, Any]]]:
        """The batches of one update after another. Between two it saves if that is due, or if the run must stop."""
        config, progress = self.config, self.progress
        saved_at = progress.update
        self.must_stop = False
        self.bar = tqdm(
            total=config.max_updates,
            initial=progress.update,
            unit="update",
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        )
        with self.bar, logging_redirect_tqdm():
            while not self.is_complete:
                self.timer.start_waiting()
                batches = [next(self._batches) for _ in range(config.gradient_accumulation_steps)]
                self.timer.stop_waiting()
                for batch in batches:
                    self.clips_digest = zlib.crc32("\n".join(batch["ids"]).encode(), self.clips_digest)
                progress.clips += self.clips_per_update
                yield batches
                self.optimizer.zero_grad()
                is_due = self.must_stop or self.is_complete or progress.update % config.checkpoint.every == 0
                if progress.update > saved_at and is_due:
                    self.save()
                    saved_at = progress.update
                if self.must_stop and not self.is_complete:
                    logger.info(
                        "Asked to stop: saved after update %d; --resume auto goes on from there.", progress.update
                    )
                    return

    def step(
        self, outputs: Sequence[dict[str, torch.Tensor]], batches: Sequence[dict[str, Any]]
    ) -> dict[str, float] | None:
        """One step of the optimiser, if loss and gradient are finite.

        Args:
            outputs: For each forward pass of the update what is to be logged of it, all scalars, "loss" among them.

        Returns:
            Their means over passes and processes and the gradient's norm before clipping; `None` if the update was
            dropped.

        Raises:
            TrainingError: If too many in a row were dropped.
        """
        config, accelerator, progress = self.config, self.accelerator, self.progress
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.max_grad_norm)
        # One exchange and one wait for the device per update, so that all processes decide alike.
        values = {name: torch.stack([output[name] for output in outputs]).mean() for name in outputs[0]}
        values["grad_norm"] = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        values["stop"] = torch.tensor(float(self.stop.requested))
        values = mean_over_processes(accelerator, values)
        self.must_stop = values.pop("stop") > 0

        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            # Neither weights nor schedules see it. In fp16 this is how the loss scale falls.
            if accelerator.scaler is not None:
                accelerator.scaler.update()
            drop_update(progress, config.watch, values, offending_ids(accelerator, batches, outputs))
            return None
        progress.count_update(values)
        self.learning_rate = learning_rate(progress.update, config.optimizer, config.max_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_scale"]
        self.optimizer.step()
        self.timer.count_update()
        self.bar.update()
        losses = {k.removesuffix("_loss"): v for k, v in values.items() if k == "loss" or k.endswith("_loss")}
        speed = self.timer.updates_per_second * self.clips_per_update
        self.bar.set_postfix_str(" ".join(f"{k}={v:.3g}" for k, v in losses.items()) + f", {speed:.1f} clips/s")
        return values

    def log(self, **extra: float) -> None:
        """Where it is due, a line of what happened since the last one: to metrics.jsonl and the tracker."""
        progress, config = self.progress, self.config
        if progress.update % config.watch.every and progress.update != config.max_updates:
            return
        skipped = sum(map(Counter, gather_object([dict(self.loader.skipped)])), Counter())
        row = {
            **progress.take_means(),
            "learning_rate": self.learning_rate,
            **extra,
            "clips_per_second": self.timer.updates_per_second * self.clips_per_update,
            "data_wait_fraction": self.timer.wait_fraction,
            "memory_gib": memory_gib(self.accelerator.device),
            "dropped_updates": progress.dropped_updates,
            "skipped_clips": skipped.total(),
            **{f"skipped_{reason}": count for reason, count in sorted(skipped.items())},
            "clips_digest": self.clips_digest,
        }
        if self.accelerator.scaler is not None:
            row["loss_scale"] = self.accelerator.scaler.get_scale()
        self.write_row(row)
        if self.timer.wait_fraction > NOTABLE_WAIT and not self._has_hinted:
            self._has_hinted = True
            logger.warning(
                "%.0f %% of the time goes into waiting for data: more workers may help (data.num_workers is %d).",
                100 * self.timer.wait_fraction,
                config.data.num_workers,
            )
        self.timer = IntervalTimer()

    def write_row(self, row: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl and the tracker, at the current update."""
        row = {**row, "clips": self.progress.clips, "epoch": self.loader.epoch}
        if self.accelerator.is_main_process:
            append_metrics(self.metrics_path, {"update": self.progress.update, **row})
        self.accelerator.log(row, step=self.progress.update)

    def save(self) -> None:
        """Writes a checkpoint of the current update."""
        weights = self.accelerator.get_state_dict(self.model)

        def write(folder: Path) -> None:
            save_optimizer(folder, self.accelerator, self.model, self.optimizer)
            own = {
                "rng": rng_state(),
                "generators": {name: generator.get_state() for name, generator in self.generators.items()},
                "data": self.loader.state_dict(),
                "clips_digest": self.clips_digest,
            }
            save_tensors(own, folder / f"rank-{self.rank:05d}.pt")
            scaler = self.accelerator.scaler
            state = {
                "num_processes": self.world_size,
                "precision": self.accelerator.mixed_precision,
                "scaler": None if scaler is None else scaler.state_dict(),
                "settings": plain_settings(self.config),
            }
            self._write_model(folder, weights, state)

        write_folder(checkpoint_path(self.run_dir, self.progress.update), write, self.accelerator)
        if self.accelerator.is_main_process:
            rotate(self.run_dir, self.config.checkpoint.keep)

    def save_model(self, name: str) -> None:
        """Writes the current weights into the model folder `name` of the run, in place of what is there."""
        weights = self.accelerator.get_state_dict(self.model)

        write_folder(self.run_dir / name, lambda folder: self._write_model(folder, weights, {}), self.accelerator)

    def _write_model(self, folder: Path, weights: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.plain_model.save_pretrained(folder, state_dict=weights)
            self.feature_extractor.save_pretrained(folder)
            state = {"progress": asdict(self.progress), **state}
            (folder / "trainer.json").write_text(json.dumps(state, indent=1))

    def end(self) -> None:
        """After the last update: closes the tracker. The processes stay together."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def accelerator_of(config: RunConfig) -> Accelerator:
    """Device, precision, processes and tracker of a run.

    Raises:
        TrainingError: If what the settings ask for is not there.
    """
    run_dir, tracker = config.output_dir, config.watch.tracker
    try:
        accelerator = make_accelerator(
            config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if tracker == "none" else tracker,
            project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "tensorboard")),
            # The only buffers are constants.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except ValueError as error:  # such as a tracker or a precision that it does not know
        raise TrainingError(f"accelerate: {error}") from error
    if tracker != "none" and not accelerator.log_with:
        raise TrainingError(f"watch.tracker={tracker!r} is not installed; pip install it, or use none.")
    return accelerator


def find_checkpoint(config: RunConfig, accelerator: Accelerator) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and its trainer.json, or `None` to start.

    Raises:
        TrainingError: If that would mix two runs, or continue one as another.
    """
    run_dir = config.output_dir
    if config.resume == "no":
        if list_checkpoints(run_dir):
            raise TrainingError(
                f"{run_dir} holds a run. Continue it with --resume auto, or choose another --output_dir."
            )
        return None, {}
    # One process reads it all to check it, and decides.
    (checkpoint,) = broadcast_object_list([latest_checkpoint(run_dir) if accelerator.is_main_process else None])
    if checkpoint is None:
        if list_checkpoints(run_dir):
            raise TrainingError(f"All checkpoints of {run_dir} are damaged: start anew in another --output_dir.")
        return None, {}
    state = json.loads((checkpoint / "trainer.json").read_text())
    spread = {"num_processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
    for name, value in spread.items():
        if state[name] != value:
            raise TrainingError(
                f"{checkpoint} was made with {name}={state[name]}, this run has {value}: it would not be the same "
                f"run. Use the same, or start a new run with --init_from {checkpoint}."
            )
    settings, before = plain_settings(config), state["settings"]
    changed = [
        f"{key} ({before.get(key)} before, {settings.get(key)} now)"
        for key in sorted(settings.keys() | before.keys())
        if key not in NEUTRAL_SETTINGS and settings.get(key) != before.get(key)
    ]
    if changed and not config.allow_changed_config:
        raise TrainingError(
            f"These settings are not those of the run in {run_dir}: {'; '.join(changed)}. Set them back, start anew "
            "in another --output_dir, or pass --allow_changed_config true."
        )
    return checkpoint, state


def mean_over_processes(accelerator: Accelerator, values: dict[str, torch.Tensor]) -> dict[str, float]:
    stacked = torch.stack([value.to(accelerator.device, torch.float32) for value in values.values()])
    return dict(zip(values, accelerator.reduce(stacked, "mean").tolist(), strict=True))


def offending_ids(
    accelerator: Accelerator, batches: Sequence[dict[str, Any]], outputs: Sequence[dict[str, torch.Tensor]]
) -> list[str]:
    """Of all processes' clips those whose batch had a loss that is not finite."""
    pairs = zip(batches, outputs, strict=True)
    return gather_object([id_ for batch, output in pairs if not output["loss"].isfinite() for id_ in batch["ids"]])


def memory_gib(device: torch.device) -> float:
    """Most memory of the GPU in use so far, or on other devices memory of the process."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30
