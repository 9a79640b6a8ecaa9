"""Pre-training of SSLAM and EAT encoders from audio, on one device or many.

    accelerate launch -m training.pretrain --config training/configs/pretrain_stage2.yaml --data.source SOURCE
        --init_from STAGE_1_FOLDER --output_dir runs/stage2 [--any.key value]

The loop is `pretrain`, from top to bottom the run itself. Worth knowing:

- The published objective depends on the batch *per device*: its global (CLS) term is a sum over a device's clips, and
  clips mix with clips of the same device. 4 devices with `batch_size` 12 are 1 device with `batch_size` 12 and
  `gradient_accumulation_steps` 4. One device with `batch_size` 48 weighs the global term 4 times as much, unless
  `model.global_loss_weight` is 0.25, and shares the windows of a mixture among 48 clips instead of 12.
- The gradient is that of all devices' summed losses over all devices' masked tokens. Batches are equal in size, so the
  mean over devices and accumulation steps of the loss per masked token is just that.
- All randomness follows from `seed`. Masks and mixing windows come from a generator of each process on the CPU, so
  they do not depend on the kind of device; the decoder's noise comes from torch's own generator.
- `--resume auto` goes on from the latest checkpoint as if nothing had happened (on CPU to the last bit), or starts if
  there is none: the same command line can be submitted again and again. SIGTERM and Ctrl-C finish the update, save and
  exit with 0; a second Ctrl-C exits at once. (A launcher that was signalled reports failure all the same, and for a
  single process `accelerate launch` keeps a SIGTERM to itself: send it to the process group.)

RUN_DIR gets config.yaml, metrics.jsonl, checkpoints/, tensorboard/ and at the end curves.png and model/, a folder for
the Hub (`python -m training.report RUN_DIR` makes these two at any time).
"""

import json
import logging
import math
import os
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils.logging import disable_progress_bar

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForPreTraining
from modeling_sslam.feature_extraction_sslam import DATASET_PRESETS
from training.arguments import flatten, optional_section, parse, to_yaml
from training.checkpointing import (
    CheckpointConfig,
    CheckpointError,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_optimizer,
    remove_leftovers,
    rng_state,
    rotate,
    save_optimizer,
    save_tensors,
    set_rng_state,
    write_folder,
    write_text,
)
from training.data import DataConfig, DataError, make_loader
from training.metrics import append_metrics, truncate_metrics
from training.optimization import OptimizerConfig, learning_rate, make_optimizer
from training.report import write_report

logger = logging.getLogger(__name__)

LOSS_TERMS = ("ua_local_loss", "ua_global_loss", "pma_local_loss", "pma_global_loss", "srl_loss")

ModelOverrides = optional_section("ModelOverrides", SSLAMConfig)


@dataclass
class FeatureConfig:
    """Normalisation of the log-mel frames: (x - mean) / (2 * std)."""

    mean: float = field(default=DATASET_PRESETS["audioset"]["mean"], metadata={"help": "Mean over the data set."})
    std: float = field(default=DATASET_PRESETS["audioset"]["std"], metadata={"help": "Standard deviation over it."})


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
    min_pred_var: float = field(
        default=0.0, metadata={"help": "Stop as collapsed when the predictions' deviation is less. 0: never."}
    )
    min_target_var: float = field(
        default=0.0, metadata={"help": "Stop as collapsed when the targets' deviation is less. 0: never."}
    )
    collapse_after: int = field(default=5000, metadata={"help": "Updates after which those two hold."})
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


@dataclass
class PretrainConfig:
    """All settings of a run."""

    output_dir: Path = field(metadata={"help": "Folder of the run, on a disk that all processes share."})
    data: DataConfig
    model: ModelOverrides
    optimizer: OptimizerConfig
    features: FeatureConfig
    checkpoint: CheckpointConfig
    watch: WatchConfig
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder (or Hub id) to take student, teacher and model configuration from, with a fresh "
            "optimiser: the model/ or a checkpoint of another run, or a converted one. `model` keys override its "
            "configuration."
        },
    )
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
    batch_size: int = field(
        default=12, metadata={"help": "Clips per device and forward pass. See the top: not neutral."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per update."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Overrides what accelerate was launched with."}
    )
    compile: bool = field(
        default=False, metadata={"help": "Compile the transformer blocks of student and teacher by torch.compile."}
    )

    def __post_init__(self) -> None:
        for name in ("max_updates", "batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


# Settings that may change between a run and its continuation, which stays the same run.
NEUTRAL_SETTINGS = {
    *("output_dir", "resume", "allow_changed_config", "checkpoint.every", "checkpoint.keep"),
    *("data.max_skipped_fraction", "data.max_retries", "data.read_timeout"),
    *("watch.every", "watch.tracker", "watch.max_dropped"),
}


class TrainingError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


@dataclass
class Progress:
    """How far a run has come: all that the loop counts, the same in every process."""

    update: int = 0
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


class StopRequest:
    """Within its context SIGTERM and SIGINT are a request that the loop reads; a second SIGINT interrupts as usual.

    Processes forked within it, such as data workers, heed these signals from their parent alone: terminals and
    launchers send them to all processes of a run, but the update that is to be finished still wants its data.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        os.register_at_fork(after_in_child=self._shield)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _shield(self) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
            threading.Thread(target=self._heed_parent, daemon=True).start()

    def _heed_parent(self) -> None:
        while signal.sigwaitinfo(self.SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Launchers pass a Ctrl-C on as a SIGTERM besides: only the user's own second one aborts.
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(PretrainConfig, argv, description=__doc__)
    try:
        with StopRequest() as stop:
            pretrain(config, stop)
    except (TrainingError, CheckpointError, DataError) as error:
        sys.exit(f"error: {error}")


def pretrain(config: PretrainConfig, stop: StopRequest) -> None:
    """One run, or the rest of one, to its end or until `stop` is requested."""
    # --- Set-up
    run_dir = config.output_dir
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.watch.tracker == "none" else config.watch.tracker,
            project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir / "tensorboard")),
            # The only buffers are constants.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    except ValueError as error:  # such as a tracker or a precision that it does not know
        raise TrainingError(f"accelerate: {error}") from error
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.INFO if accelerator.is_main_process else logging.WARNING,
    )
    if config.watch.tracker != "none" and not accelerator.log_with:
        raise TrainingError(f"watch.tracker={config.watch.tracker!r} is not installed; pip install it, or use none.")
    if accelerator.mixed_precision == "fp16" and not accelerator.native_amp:
        raise TrainingError("mixed_precision=fp16 needs a GPU; on this device use bf16 or no.")
    disable_progress_bar()  # transformers' own, at every checkpoint
    rank, world_size = accelerator.process_index, accelerator.num_processes
    clips_per_update = config.batch_size * config.gradient_accumulation_steps * world_size

    if accelerator.is_main_process:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"output_dir={str(run_dir)!r} cannot be made: {error}") from error
        remove_leftovers(run_dir)
    accelerator.wait_for_everyone()
    checkpoint, state = find_checkpoint(config, accelerator)
    progress = Progress(**state["progress"]) if checkpoint else Progress()

    # --- Model: new, from another run, or from this one
    set_seed(config.seed)
    overrides = {key: value for key, value in asdict(config.model).items() if value is not None}
    try:
        if source := checkpoint or config.init_from:
            model = SSLAMForPreTraining.from_pretrained(source, dtype=torch.float32, **overrides)
        else:
            model = SSLAMForPreTraining(SSLAMConfig(**overrides))
    except (ValueError, OSError) as error:  # fields that contradict each other; no such folder
        raise TrainingError(f"model: {error}") from error
    model.train()
    model_config = model.config
    if model_config.pretraining_objective != "ua" and config.batch_size < 2:
        raise TrainingError(
            f"batch_size={config.batch_size}: the objective {model_config.pretraining_objective!r} mixes the clips "
            "of a device with one another and needs at least 2."
        )
    if config.compile:
        for encoder in (model.sslam.encoder, model.teacher.encoder):
            # The blocks are alike, so one is compiled and serves for all.
            for layer in encoder.layers:
                layer.compile()

    # --- Data
    feature_extractor = SSLAMFeatureExtractor(
        num_mel_bins=model_config.num_mel_bins,
        max_length=model_config.max_length,
        patch_size=model_config.patch_size,
        mean=config.features.mean,
        std=config.features.std,
    )
    try:
        loader = make_loader(
            config.data,
            feature_extractor,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        )
    except (ValueError, FileNotFoundError) as error:
        raise TrainingError(f"data.source={config.data.source!r}: {error}") from error

    # --- Optimiser
    model.to(accelerator.device)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, config.optimizer))
    plain_model = accelerator.unwrap_model(model)

    # --- Randomness and place in the data, each process its own
    noise_seed, mask_seed = np.random.SeedSequence([config.seed, rank]).generate_state(2).tolist()
    set_seed(noise_seed)
    mask_generator = torch.Generator().manual_seed(mask_seed)
    clips_digest = 0
    if checkpoint:
        load_optimizer(checkpoint, model, optimizer)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        own = torch.load(checkpoint / f"rank-{rank:05d}.pt", map_location="cpu", weights_only=True)
        try:
            loader.load_state_dict(own["data"])
        except ValueError as error:
            raise TrainingError(f"data.source={config.data.source!r}: {error}") from error
        mask_generator.set_state(own["mask_generator"])
        clips_digest = own["clips_digest"]
    batches = iter(loader)
    if checkpoint:
        set_rng_state(own["rng"])

    # --- Log
    metrics_path = run_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        write_text(run_dir / "config.yaml", to_yaml(config))
        truncate_metrics(metrics_path, progress.update)
    accelerator.init_trackers(
        "sslam",
        config=None if checkpoint else {key: str(value) for key, value in flatten(config).items()},
        init_kwargs={
            "tensorboard": {"purge_step": progress.update + 1},
            "wandb": {"name": run_dir.name, "dir": str(run_dir)},
        },
    )
    logger.info(
        "%s: %s, %.1f M trainable parameters; %d clips an update on %d %s process(es), precision %s; %s at update %d.",
        run_dir,
        model_config.pretraining_objective,
        sum(parameter.numel() for parameter in plain_model.parameters() if parameter.requires_grad) / 1e6,
        clips_per_update,
        world_size,
        accelerator.device.type,
        accelerator.mixed_precision,
        "resumed" if checkpoint else "started",
        progress.update,
    )

    def save() -> None:
        def write(folder: Path) -> None:
            weights = accelerator.get_state_dict(model)
            save_optimizer(folder, accelerator, model, optimizer)
            own = {
                "rng": rng_state(),
                "mask_generator": mask_generator.get_state(),
                "data": loader.state_dict(),
                "clips_digest": clips_digest,
            }
            save_tensors(own, folder / f"rank-{rank:05d}.pt")
            if accelerator.is_main_process:
                plain_model.save_pretrained(folder, state_dict=weights)
                feature_extractor.save_pretrained(folder)
                state = {
                    "progress": asdict(progress),
                    "num_processes": world_size,
                    "precision": accelerator.mixed_precision,
                    "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                    "settings": plain_settings(config),
                }
                (folder / "trainer.json").write_text(json.dumps(state, indent=1))

        write_folder(checkpoint_path(run_dir, progress.update), write, accelerator)
        if accelerator.is_main_process:
            rotate(run_dir, config.checkpoint.keep)

    # --- Loop
    saved_at = progress.update
    timer = IntervalTimer()
    bar = tqdm(
        total=config.max_updates,
        initial=progress.update,
        unit="update",
        mininterval=0.5,
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
    with bar, logging_redirect_tqdm():
        while progress.update < config.max_updates:
            timer.start_waiting()
            update_batches = [next(batches) for _ in range(config.gradient_accumulation_steps)]
            timer.stop_waiting()
            for batch in update_batches:
                clips_digest = zlib.crc32("\n".join(batch["ids"]).encode(), clips_digest)
            progress.clips += clips_per_update

            inputs = [loader.input_values(batch, accelerator.device) for batch in update_batches]
            outputs = accumulate_gradients(accelerator, model, inputs, mask_generator)
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)

            # One exchange and one wait for the device per update, so that all processes decide alike.
            values = {name: torch.stack([output[name] for output in outputs]).mean() for name in outputs[0]}
            values["grad_norm"] = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
            values["stop"] = torch.tensor(float(stop.requested))
            values = mean_over_processes(accelerator, values)
            must_stop = values.pop("stop") > 0

            if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
                progress.count_update(values)
                rate = learning_rate(
                    progress.update,
                    config.optimizer.learning_rate,
                    config.optimizer.warmup_updates,
                    config.max_updates,
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                decay = plain_model.ema_decay(progress.update)
                plain_model.update_teacher(decay)
                timer.count_update()
                bar.update()
                losses = {name.removesuffix("_loss"): values[name] for name in ("loss", *LOSS_TERMS) if name in values}
                speed = timer.updates_per_second * clips_per_update
                bar.set_postfix_str(" ".join(f"{k}={v:.3g}" for k, v in losses.items()) + f", {speed:.1f} clips/s")

                if progress.update % config.watch.every == 0 or progress.update == config.max_updates:
                    skipped = sum(map(Counter, gather_object([dict(loader.skipped)])), Counter())
                    row = {
                        "update": progress.update,
                        **progress.take_means(),
                        "learning_rate": rate,
                        "ema_decay": decay,
                        "clips": progress.clips,
                        "epoch": loader.epoch,
                        "clips_per_second": timer.updates_per_second * clips_per_update,
                        "data_wait_fraction": timer.wait_fraction,
                        "memory_gib": memory_gib(accelerator.device),
                        "dropped_updates": progress.dropped_updates,
                        "skipped_clips": skipped.total(),
                        **{f"skipped_{reason}": count for reason, count in sorted(skipped.items())},
                        # Two runs have seen the same clips in the same order if this is the same.
                        "clips_digest": clips_digest,
                    }
                    if accelerator.scaler is not None:
                        row["loss_scale"] = accelerator.scaler.get_scale()
                    if accelerator.is_main_process:
                        append_metrics(metrics_path, row)
                    accelerator.log(
                        {key: value for key, value in row.items() if key != "update"}, step=progress.update
                    )
                    timer = IntervalTimer()
                check_collapse(config.watch, progress.update, values["pred_var"], values["target_var"])
            else:
                # Neither weights nor teacher nor their schedules see it. In fp16 this is how the loss scale falls.
                if accelerator.scaler is not None:
                    accelerator.scaler.update()
                drop_update(progress, config.watch, values, offending_ids(accelerator, update_batches, outputs))
            optimizer.zero_grad()

            if progress.update > saved_at and (
                must_stop or progress.update % config.checkpoint.every == 0 or progress.update == config.max_updates
            ):
                save()
                saved_at = progress.update
            if must_stop:
                logger.info("Asked to stop: saved after update %d; --resume auto goes on from there.", progress.update)
                break

    accelerator.end_training()
    if accelerator.is_main_process and progress.update == config.max_updates:
        write_report(run_dir)


def find_checkpoint(config: PretrainConfig, accelerator: Accelerator) -> tuple[Path | None, dict[str, Any]]:
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


def plain_settings(config: PretrainConfig) -> dict[str, Any]:
    """All settings by their dotted keys, as JSON gives them back."""
    return json.loads(json.dumps(flatten(config), default=str))


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    generator: torch.Generator,
) -> list[dict[str, torch.Tensor]]:
    """Adds the gradient of one update to the parameters: the mean over `inputs`, one `(B, T, F)` for each forward
    pass, and over all processes.

    Returns:
        For each forward pass the loss, those of its terms that the objective has, pred_var and target_var.
    """
    outputs = []
    for i, input_values in enumerate(inputs):
        # Processes exchange gradients once per update.
        with nullcontext() if i == len(inputs) - 1 else accelerator.no_sync(model):
            output = model(input_values, generator=generator)
            accelerator.backward(output.loss)
        names = ("loss", *LOSS_TERMS, "pred_var", "target_var")
        outputs.append({name: output[name].detach() for name in names if output.get(name) is not None})
    return outputs


def mean_over_processes(accelerator: Accelerator, values: dict[str, torch.Tensor]) -> dict[str, float]:
    stacked = torch.stack([value.to(accelerator.device, torch.float32) for value in values.values()])
    return dict(zip(values, accelerator.reduce(stacked, "mean").tolist(), strict=True))


def offending_ids(
    accelerator: Accelerator, batches: Sequence[dict[str, Any]], outputs: Sequence[dict[str, torch.Tensor]]
) -> list[str]:
    """Of all processes' clips those whose batch had a loss that is not finite."""
    pairs = zip(batches, outputs, strict=True)
    return gather_object([id_ for batch, output in pairs if not output["loss"].isfinite() for id_ in batch["ids"]])


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


def check_collapse(config: WatchConfig, update: int, pred_var: float, target_var: float) -> None:
    """
    Raises:
        TrainingError: If student or teacher says the same of all patches, which nothing mends.
    """
    if update <= config.collapse_after:
        return
    for name, value, least in (
        ("pred_var", pred_var, config.min_pred_var),
        ("target_var", target_var, config.min_target_var),
    ):
        if value < least:
            raise TrainingError(
                f"Collapsed: {name}={value:.3g} is less than watch.min_{name}={least} at update {update}. Start again "
                "from a checkpoint before the fall, with a lower learning rate or a slower teacher (model.ema_decay)."
            )


def memory_gib(device: torch.device) -> float:
    """Most memory of the GPU in use so far, or on other devices memory of the process."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30


if __name__ == "__main__":
    main()
