"""Training loop of a run: logging, checkpoints, graceful stop and exact resume.

    run = open_run(config, stop)                                # processes, folder, and a checkpoint if there is one
    ...                                                         # the program makes its model and its data
    trainer = Trainer(run, model, loader, feature_extractor, run.progress(Progress))
    for batches in trainer.updates():                           # until the end, or until the run is asked to stop
        ...                                                     # the program's forward and backward passes
        values = trainer.step(outputs, batches)                 # optimiser step; None for an update that is dropped
        trainer.log(...)
    trainer.end()

Checkpoints are saved between two updates, so they include everything that a program does in the body of its loop.
"""

import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from modeling_sslam import SSLAMFeatureExtractor, SSLAMPreTrainedModel
from modeling_sslam.common.files import write_text
from modeling_sslam.cuda_sslam import use_cuda
from modeling_sslam.onednn_sslam import use_onednn
from modeling_sslam.transfers_sslam import read_later
from training.arguments import flatten, to_yaml
from training.data.loader import AudioLoader
from training.run.checkpointing import (
    checkpoint_path,
    load_optimizer,
    rng_state,
    rotate,
    save_optimizer,
    save_tensors,
    set_rng_state,
    write_checkpoint,
)
from training.run.config import TrainingError, plain_settings
from training.run.metrics_log import append_metrics, truncate_metrics
from training.run.optimization import learning_rate, make_optimizer
from training.run.progress import NOTABLE_WAIT, IntervalTimer, drop_update
from training.run.run import ProgressT, Run

logger = logging.getLogger(__name__)


class Trainer(Generic[ProgressT]):
    """Optimiser, data position, log and checkpoints of a run. A resumed run restores them from its checkpoint.

    Args:
        run: The run.
        model: The model to train, on the CPU or on the device.
        loader: This process's batches.
        feature_extractor: Saved beside the model.
        progress: The run's counters.
        generators: Random number generators of this process besides the global ones; saved and restored by name.
        description: What the run does, for the log.

    Attributes:
        model: The model as the processes share it.
        plain_model: The model without the wrappers of accelerate.

    Raises:
        TrainingError: If the data's settings do not allow the run to resume.
    """

    def __init__(
        self,
        run: Run,
        model: SSLAMPreTrainedModel,
        loader: AudioLoader,
        feature_extractor: SSLAMFeatureExtractor,
        progress: ProgressT,
        generators: Mapping[str, torch.Generator] | None = None,
        description: str = "",
    ) -> None:
        self.run, self.config, self.accelerator = run, run.config, run.accelerator
        self.loader, self.feature_extractor, self.progress = loader, feature_extractor, progress
        self.generators = dict(generators or {})
        use_cuda(use_onednn(model.to(self.accelerator.device)))
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model, self.config.optimizer))
        self.plain_model = self.accelerator.unwrap_model(self.model)
        self.metrics_path = run.folder / "metrics.jsonl"
        # Equal digests mean that two runs have used the same clips in the same order.
        self.clips_digest = 0
        set_seed(run.noise_seed)
        # Starting the data draws from the global generators, so a checkpoint restores them afterwards.
        self._batches: Iterator[dict[str, Any]]
        if run.checkpoint is None:
            self._batches = iter(loader)
        else:
            own = self._restore(run.checkpoint)
            self._batches = iter(loader)
            set_rng_state(own["rng"])
        self._start_log(description)
        self.timer = IntervalTimer()
        self.must_stop = False
        self._has_hinted = False
        self._bar = tqdm(
            total=self.config.num_updates,
            initial=progress.update,
            unit="update",
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        )

    @property
    def is_complete(self) -> bool:
        """Whether the run has reached its end."""
        return self.progress.update == self.config.num_updates or self.progress.ended_early

    @property
    def learning_rate(self) -> float:
        """The learning rate of the latest update."""
        return learning_rate(self.progress.update, self.config.optimizer, self.config.num_updates)

    def updates(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the batches of each update. Between two updates, save if it is due or the run must stop."""
        config, progress = self.config, self.progress
        saved_at = progress.update
        with self._bar, logging_redirect_tqdm():
            while not self.is_complete:
                self.timer.start_waiting()
                batches = [next(self._batches) for _ in range(config.gradient_accumulation_steps)]
                self.timer.stop_waiting()
                for batch in batches:
                    self.clips_digest = zlib.crc32("\n".join(batch["ids"]).encode(), self.clips_digest)
                progress.clips += self.run.clips_per_update
                yield batches
                self.optimizer.zero_grad()
                is_due = self.must_stop or self.is_complete or progress.update % config.checkpoint.every == 0
                if progress.update > saved_at and is_due:
                    self.save()
                    saved_at = progress.update
                if self.must_stop and not self.is_complete:
                    logger.info(
                        "Asked to stop: saved after update %d; --resume auto continues from there.", progress.update
                    )
                    return

    def step(
        self, outputs: Sequence[dict[str, torch.Tensor]], batches: Sequence[dict[str, Any]]
    ) -> dict[str, float] | None:
        """Take one step of the optimiser, if loss and gradient are finite.

        Args:
            outputs: Scalars to log for each forward pass of the update, among them "loss".
            batches: The batch of each forward pass.

        Returns:
            The means of the scalars over passes and processes, and the gradient's norm before clipping as "grad_norm";
            `None` if the update was dropped.

        Raises:
            TrainingError: If too many updates in a row were dropped.
        """
        config, accelerator, progress = self.config, self.accelerator, self.progress
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.max_grad_norm)
        tensors = {name: torch.stack([output[name] for output in outputs]).mean() for name in outputs[0]}
        tensors["grad_norm"] = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        # Filled on the device: a copy from the host would wait for the device.
        tensors["stop"] = torch.full((), float(self.run.stop.requested), device=accelerator.device)
        # A single exchange per update, so that all processes take the same decisions and wait for the device once.
        means = mean_over_processes(accelerator, tensors)
        read_means = read_later(torch.stack(list(means.values())))
        if self._skips_on_device:
            # Queue the step before waiting for the loss, so that the device has work while the host decides.
            is_finite = means["loss"].isfinite() & means["grad_norm"].isfinite()
            self.optimizer.optimizer.found_inf = (~is_finite).float()
            self._step_optimizer()
        values = dict(zip(means, read_means().tolist(), strict=True))
        self.must_stop = values.pop("stop") > 0

        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            # The update changes neither weights nor schedules. In fp16 the loss scale falls.
            if accelerator.scaler is not None:
                accelerator.scaler.update()
            drop_update(progress, config.watch, values, ids_of_bad_batches(accelerator, batches, outputs))
            return None
        if not self._skips_on_device:
            self._step_optimizer()
        progress.count_update(values)
        self.timer.count_update()
        self._bar.update()
        losses = {k.removesuffix("_loss"): v for k, v in values.items() if k == "loss" or k.endswith("_loss")}
        losses_text = " ".join(f"{k}={v:.3g}" for k, v in losses.items())
        self._bar.set_postfix_str(f"{losses_text}, {self.clips_per_second:.1f} clips/s")
        return values

    @property
    def _skips_on_device(self) -> bool:
        """Whether the optimiser can be told by a tensor on the device to skip its step.

        Fused AdamW can, as loss scaling has it do. With fp16 the scaler gives it that tensor. With sharded parameters
        it does not take a tensor that is not sharded.
        """
        is_sharded = self.accelerator.distributed_type == DistributedType.FSDP
        return bool(self.optimizer.defaults["fused"]) and self.accelerator.scaler is None and not is_sharded

    def _step_optimizer(self) -> None:
        rate = learning_rate(self.progress.update + 1, self.config.optimizer, self.config.num_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.step()

    @property
    def clips_per_second(self) -> float:
        """The speed of all processes since the last line of the log."""
        return self.timer.updates_per_second * self.run.clips_per_update

    def log(self, **extra: float) -> None:
        """Write a line of the log if one is due: means since the last line, and `extra`."""
        progress, config = self.progress, self.config
        if progress.update % config.watch.every and progress.update != config.num_updates:
            return
        skipped: Counter[str] = sum(map(Counter, gather_object([dict(self.loader.skipped)])), Counter())
        row = {
            **progress.take_means(),
            "learning_rate": self.learning_rate,
            **extra,
            "clips_per_second": self.clips_per_second,
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
                "%.0f %% of the time is spent waiting for data: more workers may help (data.num_workers is %d).",
                100 * self.timer.wait_fraction,
                config.data.num_workers,
            )
        self.restart_timer()

    def restart_timer(self) -> None:
        """Start a new interval, so that the time since the last one does not count."""
        self.timer = IntervalTimer()

    def write_row(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and the tracker, at the current update."""
        row = {**row, "clips": self.progress.clips, "epoch": self.loader.epoch}
        if self.accelerator.is_main_process:
            append_metrics(self.metrics_path, {"update": self.progress.update, **row})
        self.accelerator.log(row, step=self.progress.update)

    def save(self) -> None:
        """Write a checkpoint of the current update.

        Raises:
            CheckpointError: If it cannot be written.
        """
        weights = self.accelerator.get_state_dict(self.model)

        def write(folder: Path) -> None:
            save_optimizer(folder, self.accelerator, self.model, self.optimizer)
            own = {
                "rng": rng_state(),
                "generators": {name: generator.get_state() for name, generator in self.generators.items()},
                "data": self.loader.state_dict(),
                "clips_digest": self.clips_digest,
            }
            save_tensors(own, folder / f"rank-{self.run.rank:05d}.pt")
            scaler = self.accelerator.scaler
            state = {
                "num_processes": self.run.world_size,
                "precision": self.accelerator.mixed_precision,
                "scaler": None if scaler is None else scaler.state_dict(),
                "settings": plain_settings(self.config),
            }
            self._write_model(folder, weights, state)

        target = checkpoint_path(self.run.folder, self.progress.update)
        write_checkpoint(target, write, self.accelerator)
        if self.accelerator.is_main_process:
            rotate(target, self.config.checkpoint.keep)

    def save_model(self, name: str) -> None:
        """Write the current weights into the run's model folder `name`, replacing its content.

        Raises:
            CheckpointError: If it cannot be written.
        """
        weights = self.accelerator.get_state_dict(self.model)

        write_checkpoint(
            self.run.folder / name, lambda folder: self._write_model(folder, weights, {}), self.accelerator
        )

    def end(self) -> None:
        """Close the tracker after the last update. The processes stay joined."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _restore(self, checkpoint: Path) -> dict[str, Any]:
        """Restore optimiser, loss scale, generators and data position. Return this process's own state."""
        load_optimizer(checkpoint, self.model, self.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.run.saved["scaler"])
        own = torch.load(checkpoint / f"rank-{self.run.rank:05d}.pt", map_location="cpu", weights_only=True)
        try:
            self.loader.load_state_dict(own["data"])
        except ValueError as error:
            raise TrainingError(f"data.source={self.config.data.source!r}: {error}") from error
        for name, generator in self.generators.items():
            generator.set_state(own["generators"][name])
        self.clips_digest = own["clips_digest"]
        return own

    def _start_log(self, description: str) -> None:
        run, update = self.run, self.progress.update
        if self.accelerator.is_main_process:
            write_text(run.folder / "config.yaml", to_yaml(self.config))
            truncate_metrics(self.metrics_path, update)
        self.accelerator.init_trackers(
            "sslam",
            config=None if run.checkpoint else {key: str(value) for key, value in flatten(self.config).items()},
            init_kwargs={
                "tensorboard": {"purge_step": update + 1},
                "wandb": {"name": run.folder.name, "dir": str(run.folder)},
            },
        )
        logger.info(
            "%s: %s%.1f M trainable parameters; %d clips an update on %d %s process(es), precision %s; %s at update "
            "%d.",
            run.folder,
            description and f"{description}, ",
            sum(parameter.numel() for parameter in self.plain_model.parameters() if parameter.requires_grad) / 1e6,
            run.clips_per_update,
            run.world_size,
            self.accelerator.device.type,
            self.accelerator.mixed_precision,
            "resumed" if run.checkpoint else "started",
            update,
        )

    def _write_model(self, folder: Path, weights: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.plain_model.save_pretrained(folder, state_dict=weights)
            self.feature_extractor.save_pretrained(folder)
            state = {"progress": asdict(self.progress), **state}
            (folder / "trainer.json").write_text(json.dumps(state, indent=1))


def mean_over_processes(accelerator: Accelerator, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the mean of each scalar over all processes, in float32 on the device."""
    stacked = torch.stack([value.to(accelerator.device, torch.float32) for value in values.values()])
    return dict(zip(values, accelerator.reduce(stacked, "mean").unbind(), strict=True))


def ids_of_bad_batches(
    accelerator: Accelerator, batches: Sequence[dict[str, Any]], outputs: Sequence[dict[str, torch.Tensor]]
) -> list[str]:
    """Return the clips of all processes whose batch has a loss that is not finite."""
    pairs = zip(batches, outputs, strict=True)
    return gather_object([id_ for batch, output in pairs if not output["loss"].isfinite() for id_ in batch["ids"]])


def memory_gib(device: torch.device) -> float:
    """Return the peak memory use of a GPU, or on other devices the memory of the process, in GiB."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30
