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

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
from accelerate import Accelerator

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForPreTraining
from modeling_sslam.common.signals import StopRequest
from modeling_sslam.feature_extraction_sslam import DATASET_PRESETS
from training.arguments import optional_section
from training.data.loader import make_loader
from training.data.sources import open_source
from training.report import write_report
from training.run.config import RunConfig, TrainingError, WatchConfig
from training.run.progress import Progress
from training.run.run import Run, run_program

LOSS_TERMS = ("ua_local_loss", "ua_global_loss", "pma_local_loss", "pma_global_loss", "srl_loss")

ModelOverrides = optional_section("ModelOverrides", SSLAMConfig)


@dataclass
class FeatureConfig:
    """Normalisation of the log-mel frames: (x - mean) / (2 * std)."""

    mean: float = field(default=DATASET_PRESETS["audioset"]["mean"], metadata={"help": "Mean over the data set."})
    std: float = field(default=DATASET_PRESETS["audioset"]["std"], metadata={"help": "Standard deviation over it."})


@dataclass
class PretrainWatchConfig(WatchConfig):
    """What is logged, and when a run that has gone wrong stops."""

    min_pred_var: float = field(
        default=0.0, metadata={"help": "Stop as collapsed when the predictions' deviation is less. 0: never."}
    )
    min_target_var: float = field(
        default=0.0, metadata={"help": "Stop as collapsed when the targets' deviation is less. 0: never."}
    )
    collapse_after: int = field(default=5000, metadata={"help": "Updates after which those two hold."})


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """All settings of a run."""

    model: ModelOverrides
    features: FeatureConfig
    watch: PretrainWatchConfig
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder (or Hub id) to take student, teacher and model configuration from, with a fresh "
            "optimiser: the model/ or a checkpoint of another run, or a converted one. `model` keys override its "
            "configuration."
        },
    )
    batch_size: int = field(
        default=12, metadata={"help": "Clips per device and forward pass. See the top: not neutral."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    run_program(PretrainConfig, pretrain, argv, __doc__)


def pretrain(config: PretrainConfig, stop: StopRequest) -> None:
    """One run, or the rest of one, to its end or until `stop` is requested."""
    run = Run(config, stop, Progress())

    # --- Model: new, from another run, or from this one
    overrides = {key: value for key, value in asdict(config.model).items() if value is not None}
    try:
        if source := run.checkpoint or config.init_from:
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
        compile_blocks(model)

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
            open_source(config.data),
            feature_extractor,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=run.rank,
            world_size=run.world_size,
        )
    except (ValueError, FileNotFoundError) as error:
        raise TrainingError(f"data.source={config.data.source!r}: {error}") from error

    # --- Loop
    mask_generator = torch.Generator().manual_seed(run.program_seed)
    run.start(model, loader, feature_extractor, {"masks": mask_generator}, model_config.pretraining_objective)
    for batches in run.updates():
        inputs = [loader.input_values(batch, run.accelerator.device) for batch in batches]
        outputs = accumulate_gradients(run.accelerator, run.model, inputs, mask_generator)
        values = run.step(outputs, batches)
        if values is None:
            continue
        decay = run.plain_model.ema_decay(run.progress.update)
        run.plain_model.update_teacher(decay)
        run.log(ema_decay=decay)
        check_collapse(config.watch, run.progress.update, values["pred_var"], values["target_var"])
    run.end()
    if run.accelerator.is_main_process and run.is_complete:
        write_report(run.run_dir)


def compile_blocks(model: SSLAMForPreTraining) -> None:
    """Has the blocks of student, teacher and decoder compiled. They are alike, so one of each serves for all."""
    for layers in (model.sslam.encoder.layers, model.teacher.encoder.layers, model.decoder.layers):
        for layer in layers:
            layer.compile()


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


def check_collapse(config: PretrainWatchConfig, update: int, pred_var: float, target_var: float) -> None:
    """Raises:
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


if __name__ == "__main__":
    main()
