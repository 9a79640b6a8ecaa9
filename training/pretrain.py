"""Pre-training of SSLAM and EAT encoders from audio, on one device or many.

    accelerate launch -m training.pretrain --config training/configs/pretrain_stage2.yaml --data.source SOURCE
        --init_from STAGE_1_FOLDER --output_dir runs/stage2 [--any.key value]

`pretrain` is the run from top to bottom.

- The published objective depends on the batch *per device*: its global (CLS) term is a sum over a device's clips, and
  clips mix with clips of the same device. 4 devices with `batch_size` 12 equal 1 device with `batch_size` 12 and
  `gradient_accumulation_steps` 4. One device with `batch_size` 48 gives the global term 4 times the weight, unless
  `model.global_loss_weight` is 0.25, and shares the windows of a mixture among 48 clips instead of 12.
- The gradient is that of the summed losses of all devices, divided by their masked tokens. All batches have the same
  size, so it equals the mean of the loss per masked token over devices and accumulation steps.
- All randomness follows from `seed`. Each process draws masks and mixing windows from a generator on the CPU, so they
  do not depend on the kind of device. The decoder's noise comes from torch's own generator.
- `--resume auto` continues from the latest checkpoint (on a CPU exactly, to the last bit), or starts if there is none.
  So the same command line can be submitted again and again. SIGTERM and Ctrl-C finish the update, save and exit with
  0; a second Ctrl-C exits at once. (A launcher that was signalled reports a failure all the same. With a single
  process, `accelerate launch` does not forward a SIGTERM: send it to the process group.)

RUN_DIR receives config.yaml, metrics.jsonl, checkpoints/, tensorboard/ and at the end curves.png and model/, a folder
for the Hub (`python -m training.report RUN_DIR` makes these two at any time).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from torch import nn

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForPreTraining
from modeling_sslam.common.signals import StopRequest
from modeling_sslam.feature_extraction_sslam import DATASET_PRESETS
from modeling_sslam.modeling_sslam import saves_memory
from training.arguments import changed_default, with_optional_fields
from training.data.loader import AudioLoader, make_loader
from training.data.sources import open_source
from training.report import write_report
from training.run.accumulation import accumulate_gradients
from training.run.config import RunConfig, TrainingError, WatchConfig
from training.run.initialization import whiten_patches
from training.run.progress import Progress
from training.run.run import Run, open_run, run_program, stoppable
from training.run.trainer import Trainer

LOSS_TERMS = ("ua_local_loss", "ua_global_loss", "pma_local_loss", "pma_global_loss", "srl_loss")
# Clips that `patch_whitening` estimates the data's covariance from; a clip has a hundred patches or more.
WHITENING_CLIPS = 256


@dataclass
@with_optional_fields(SSLAMConfig)
class ModelOverrides:
    """Changes to the model's configuration, or to the default one of a new model."""


@dataclass
class FeatureConfig:
    """Normalisation of the log-mel frames, (x - mean) / (2 * std), and padding of short clips."""

    mean: float = field(
        default=DATASET_PRESETS["audioset"]["mean"], metadata={"help": "Mean of the data set's log-mel frames."}
    )
    std: float = field(default=DATASET_PRESETS["audioset"]["std"], metadata={"help": "Their standard deviation."})
    padding_value: float = field(
        default=0.0, metadata={"help": "Log-mel value of padding frames, before normalisation; -15.94 is silence."}
    )


@dataclass
class PretrainWatchConfig(WatchConfig):
    """Logging, and the limits at which a failing or collapsed run stops."""

    min_pred_var: float = field(
        default=0.0, metadata={"help": "Stop when the predictions' deviation falls below this. 0: never."}
    )
    min_target_var: float = field(
        default=0.0, metadata={"help": "Stop when the targets' deviation falls below this. 0: never."}
    )
    collapse_after: int = field(
        default=5000, metadata={"help": "Updates after which min_pred_var and min_target_var apply."}
    )


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """All settings of a run."""

    model: ModelOverrides
    features: FeatureConfig
    watch: PretrainWatchConfig
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder (or Hub id) with student, teacher and model configuration to start from, with a new "
            "optimiser: the model/ or a checkpoint of another run, or a converted checkpoint. `model` keys override "
            "its configuration."
        },
    )
    patch_whitening: float | None = field(
        default=None,
        metadata={
            "help": "Start a new model's patch projection from the principal components of the data, with variances "
            "v**(1 - patch_whitening): 0 as in the data, 1 all equal. With 0.5, small encoders learn more in a short "
            "training.",
            "default": "random weights, as published",
        },
    )
    max_updates: int = changed_default(RunConfig, "max_updates", 400_000)
    batch_size: int = field(
        default=12,
        metadata={"help": "Clips per device and forward pass. It changes the objective: see the top of this help."},
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "Compile the objective with torch.compile as one graph; where activations are recomputed (memory) "
            "or parameters are sharded (FSDP), compile block by block."
        },
    )
    compile_mode: Literal["default", "cuda_graphs"] = field(
        default="default",
        metadata={
            "help": "cuda_graphs: replay the compiled objective as CUDA graphs, which takes less of the host's time "
            "and more memory. Needs one process, gradient_accumulation_steps 1 and activations that are kept (memory)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_whitening is not None and not 0 <= self.patch_whitening <= 1:
            raise ValueError(f"patch_whitening={self.patch_whitening} must be from 0 to 1")
        if self.patch_whitening is not None and self.init_from is not None:
            raise ValueError(
                f"patch_whitening={self.patch_whitening} would replace the patch projection of "
                f"init_from={self.init_from}: give one of the two"
            )
        if self.compile_mode == "cuda_graphs" and not self.compile:
            raise ValueError("compile_mode=cuda_graphs needs --compile true")
        if self.compile_mode == "cuda_graphs" and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"compile_mode=cuda_graphs with gradient_accumulation_steps={self.gradient_accumulation_steps}: a "
                "graph's next pass overwrites the gradients of the one before. Use compile_mode=default."
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_program(PretrainConfig, stoppable(pretrain), argv, __doc__)


def pretrain(config: PretrainConfig, stop: StopRequest) -> None:
    """Run or resume pre-training, to its end or until `stop` is requested.

    Raises:
        TrainingError: If the settings, the data or an earlier run in the folder do not allow it, or the run failed.
    """
    run = open_run(config, stop)

    # --- Model: new, from another run, or from this run's checkpoint
    overrides = {key: value for key, value in asdict(config.model).items() if value is not None}
    try:
        if start := run.checkpoint or config.init_from:
            model_config = SSLAMConfig.from_pretrained(start, **overrides)
            model: SSLAMForPreTraining = SSLAMForPreTraining.from_pretrained(
                start, config=model_config, dtype=torch.float32
            )
        else:
            model_config = SSLAMConfig(**overrides)
            model = SSLAMForPreTraining(model_config)
    except (ValueError, OSError) as error:
        raise TrainingError(f"model: {error}") from error
    model.train()
    if model_config.pretraining_objective != "ua" and config.batch_size < 2:
        raise TrainingError(
            f"batch_size={config.batch_size}: the objective {model_config.pretraining_objective!r} mixes the clips "
            "of a device with one another and needs at least 2."
        )
    model.set_memory(config.memory)
    if config.compile:
        compile_model(model, config, run)

    # --- Data
    feature_extractor = SSLAMFeatureExtractor(
        num_mel_bins=model_config.num_mel_bins,
        max_length=model_config.max_length,
        patch_size=model_config.patch_size,
        mean=config.features.mean,
        std=config.features.std,
        padding_value=config.features.padding_value,
    )
    try:
        source = open_source(config.data)
        open_loader = partial(
            make_loader,
            source,
            feature_extractor,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=run.rank,
            world_size=run.world_size,
        )
        loader = open_loader()
        if config.patch_whitening is not None and not run.checkpoint:
            # All processes read the clips of the first, so their weights stay alike.
            initialize_patches(model, open_loader(rank=0), config.patch_whitening, config.seed)
    except (ValueError, FileNotFoundError) as error:
        raise TrainingError(f"data.source={config.data.source!r}: {error}") from error

    # --- Loop
    generator = torch.Generator().manual_seed(run.program_seed)
    trainer = Trainer(
        run,
        model,
        loader,
        feature_extractor,
        run.progress(Progress),
        generators={"masks": generator},
        description=model_config.pretraining_objective,
    )
    compute_losses = partial(pretraining_losses, trainer.model, generator)
    for batches in trainer.updates():
        inputs = [loader.input_values(batch, run.accelerator.device) for batch in batches]
        if config.compile_mode == "cuda_graphs":
            # From here on, the graphs reuse the memory of the update before.
            torch.compiler.cudagraph_mark_step_begin()
        outputs = accumulate_gradients(run.accelerator, trainer.model, inputs, compute_losses)
        values = trainer.step(outputs, batches)
        if values is None:
            continue
        update = trainer.progress.update
        decay = trainer.plain_model.ema_decay(update)
        trainer.plain_model.update_teacher(decay)
        trainer.log(ema_decay=decay)
        check_collapse(config.watch, update, values["pred_var"], values["target_var"])
    trainer.end()
    if run.accelerator.is_main_process and trainer.is_complete:
        write_report(run.folder)


def initialize_patches(model: SSLAMForPreTraining, loader: AudioLoader, strength: float, seed: int) -> None:
    """Start student and teacher from the patch projection of [`whiten_patches`], on the run's first clips.

    Args:
        model: A new model, on the CPU.
        loader: A loader whose first batches are read; the run needs another.
        strength: Strength of the whitening.
        seed: Determines the rotation.

    Raises:
        ValueError: If the clips are silent.
    """
    num_batches = math.ceil(WHITENING_CLIPS / loader.stream.batch_size)
    batches = (loader.input_values(batch, "cpu") for batch in islice(loader, num_batches))
    whiten_patches(model.sslam.patch_embeddings, batches, strength, torch.Generator().manual_seed(seed))
    model.update_teacher(0.0)


def compile_model(model: SSLAMForPreTraining, config: PretrainConfig, run: Run) -> None:
    """Compile the objective as one graph, or block by block where one graph does not serve.

    Where activations are recomputed, the graph would repeat the decoder for each part, which takes minutes to compile,
    and DistributedDataParallel could not split it by its buckets. FSDP gathers the weights between blocks.

    Raises:
        TrainingError: If CUDA graphs are asked for and not possible.
    """
    is_sharded = run.accelerator.distributed_type == DistributedType.FSDP
    is_whole = not saves_memory(config.memory, run.accelerator.device) and not is_sharded
    if config.compile_mode == "cuda_graphs" and (run.world_size > 1 or not is_whole):
        raise TrainingError(
            f"compile_mode=cuda_graphs with {run.world_size} process(es) and memory={config.memory} on "
            f"{run.accelerator.device.type}: CUDA graphs need one process that keeps its activations. Use "
            "compile_mode=default, or one process with --memory fast."
        )
    if is_whole:
        mode = "reduce-overhead" if config.compile_mode == "cuda_graphs" else "default"
        model.compile(fullgraph=True, dynamic=False, mode=mode)
    else:
        compile_blocks(model)


def compile_blocks(model: SSLAMForPreTraining, **options: Any) -> None:
    """Compile the blocks of student, teacher and decoder. Each stack compiles once, since its blocks are alike.

    Args:
        model: The model, which is changed in place.
        **options: Arguments of `torch.compile`.
    """
    for layers in (model.sslam.encoder.layers, model.teacher.encoder.layers, model.decoder.layers):
        for layer in layers:
            layer.compile(**options)


def pretraining_losses(
    model: nn.Module, generator: torch.Generator, input_values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Run a forward pass on `(B, T, F)`. Return the loss, its terms, pred_var and target_var."""
    output = model(input_values, generator=generator)
    names = ("loss", *LOSS_TERMS, "pred_var", "target_var")
    return {name: output[name] for name in names if output.get(name) is not None}


def check_collapse(config: PretrainWatchConfig, update: int, pred_var: float, target_var: float) -> None:
    """Stop a run whose student or teacher gives all patches the same output: no run recovers from that.

    Raises:
        TrainingError: If a deviation is below its minimum.
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
                "from an earlier checkpoint, with a lower learning rate or a slower teacher (model.ema_decay)."
            )


if __name__ == "__main__":
    main()
