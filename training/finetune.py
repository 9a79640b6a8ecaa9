"""Fine-tuning of a pre-trained encoder for audio classification, on one device or many.

    accelerate launch -m training.finetune --config training/configs/finetune_esc50.yaml
        --model ENCODER --data DATASET --output_dir runs/esc50 [--any.key value]

ENCODER is a folder (or Hub id) from pre-training, conversion or an earlier fine-tuning. DATASET is the output of
`python -m training.prepare`, or any labelled folder, .csv table, .tsv manifest or dataset. The configurations in
training/configs/ are the published protocols; finetune_custom.yaml is for your own data.

`train` is the run from top to bottom.

- Every `evaluate_every` updates the model predicts the validation split, each clip once. The weights with the best
  metric (mAP, or accuracy for one label per clip) are kept in RUN_DIR/best and become RUN_DIR/model.
- The loss is the update's summed loss divided by the update's divisor (targets or clips), over all processes and
  forward passes. So 4 devices with 12 clips equal 1 device with 48, except that mixup mixes the clips of a device.
- With `folds`, one run per fold trains on the other folds. RUN_DIR/folds.json has the mean and standard deviation.
- Resume and signals work as in pre-training: see `training/pretrain.py`.

RUN_DIR receives config.yaml, metrics.jsonl, checkpoints/, tensorboard/, best/ and at the end curves.png and model/, a
folder for the Hub. The card and evaluation/ in it hold the results on the validation and test splits.
"""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification
from modeling_sslam.common.files import write_text
from modeling_sslam.common.signals import StopRequest
from training.arguments import changed_default
from training.classification.classifier import FeatureOverrides, compile_blocks, make_classifier, resume_classifier
from training.classification.task import Task, check_splits, evaluation_data, find_task
from training.data.augmentation import AugmentationConfig, augment_batch, roll_and_gain
from training.data.config import EvaluationDataConfig, LabelledDataConfig
from training.data.listings import split_names
from training.data.loader import make_loader
from training.evaluate import EvaluateConfig, EvaluationError, evaluate
from training.evaluation.metrics import compute_metrics
from training.evaluation.prediction import predict
from training.evaluation.results import MAIN_METRICS, Evaluation
from training.report import write_report
from training.run.accumulation import accumulate_gradients
from training.run.checkpointing import BEST
from training.run.config import RunConfig, TrainingError
from training.run.lock import locked_by_launch
from training.run.losses import Loss, loss_sum, loss_weight
from training.run.optimization import OptimizerConfig
from training.run.processes import join_processes
from training.run.progress import Progress
from training.run.run import Run, open_run, run_program, stoppable
from training.run.trainer import Trainer

# Number of evaluations of a run by default.
DEFAULT_NUM_EVALUATIONS = 20


@dataclass
class FinetuneOptimizerConfig(OptimizerConfig):
    """AdamW with layer-wise learning rates. The defaults are the published ones for AudioSet."""

    learning_rate: float = changed_default(OptimizerConfig, "learning_rate", 5e-5)
    warmup_updates: int = changed_default(OptimizerConfig, "warmup_updates", 0)
    initial_learning_rate: float = changed_default(OptimizerConfig, "initial_learning_rate", 1e-6)
    final_learning_rate: float = changed_default(OptimizerConfig, "final_learning_rate", 1e-6)
    layer_decay: float = changed_default(OptimizerConfig, "layer_decay", 0.65)


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """All settings of a fine-tuning run."""

    model: str = field(
        metadata={"help": "Folder (or Hub id) of the encoder. Its head is kept only if it has the data's classes."}
    )
    data: LabelledDataConfig
    optimizer: FinetuneOptimizerConfig
    features: FeatureOverrides
    augmentation: AugmentationConfig
    validation_source: str | None = field(
        default=None, metadata={"help": "Source of the validation and test splits.", "default": "data.source"}
    )
    validation_split: str = field(
        default="validation",
        metadata={"help": "Split that chooses the best weights. With data.hold_out the clips held out replace it."},
    )
    test_split: str | None = field(
        default=None, metadata={"help": "Split on which the best weights are evaluated at the end."}
    )
    folds: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Splits for cross-validation: one run per split, which validates on it and trains on the others."
        },
    )
    label_file: str | None = field(
        default=None,
        metadata={
            "help": "Table index,id,name (or index,name, or name) of the classes. By default labels.csv beside the "
            "data, the data's own class names, or all labels that occur, sorted."
        },
    )
    problem_type: Literal["auto", "single", "multi"] = field(
        default="auto",
        metadata={"help": "Whether clips have one label or any number. auto: single if every clip has exactly one."},
    )
    loss: Loss | None = field(
        default=None,
        metadata={
            "help": "Binary cross-entropy per target or per clip, or cross-entropy.",
            "default": "cross_entropy for one label per clip, bce_per_target for several",
        },
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of a target spread over all classes."})
    drop_path_rate: float = field(default=0.1, metadata={"help": "Stochastic depth of the last block."})
    classifier_pooling: Literal["cls", "mean", "lin_softmax"] | None = field(
        default=None,
        metadata={
            "help": "Input of the head: the CLS token, or a mean over the patches.",
            "default": "as it was",
        },
    )
    freeze_encoder: bool = field(default=False, metadata={"help": "Train only the head: linear evaluation."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the blocks in the backward pass: less memory, more time."}
    )
    max_updates: int | None = field(
        default=None, metadata={"help": "Optimiser updates of the whole run, unless epochs is set."}
    )
    epochs: float | None = field(
        default=None, metadata={"help": "Passes over the training clips, instead of max_updates."}
    )
    warmup_fraction: float | None = field(
        default=None, metadata={"help": "Warm-up as a share of all updates, instead of optimizer.warmup_updates."}
    )
    evaluate_every: int | None = field(
        default=None,
        metadata={"help": "Updates between evaluations.", "default": f"{DEFAULT_NUM_EVALUATIONS} evaluations in all"},
    )
    patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations in a row without a new best."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.max_updates is None) == (self.epochs is None):
            raise ValueError("give either max_updates or epochs")
        for name in ("epochs", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and less than 1")
        if len(self.folds) == 1:
            raise ValueError(f"folds={self.folds[0]}: cross-validation needs two or more")
        splits = Counter(name for fold in self.folds for name in split_names(fold))
        if repeated := [name for name, count in splits.items() if count > 1]:
            raise ValueError(f"folds={','.join(self.folds)} has {repeated[0]} twice; name each split once")

    def is_evaluation_due(self, update: int) -> bool:
        """Return whether the validation split is evaluated after an update."""
        every = self.evaluate_every or default_evaluate_every(self.num_updates)
        return update % every == 0 or update == self.num_updates


def default_evaluate_every(num_updates: int) -> int:
    """Return the default number of updates between evaluations."""
    return max(1, num_updates // DEFAULT_NUM_EVALUATIONS)


@dataclass
class FinetuneProgress(Progress):
    """Counters of a run that is evaluated.

    Attributes:
        best: The best metric so far.
        best_update: The update that it belongs to.
        evaluations_since_best: Number of evaluations since.
    """

    best: float | None = None
    best_update: int = 0
    evaluations_since_best: int = 0

    def count_evaluation(self, metric: float, patience: int | None) -> bool:
        """Count an evaluation, and end the run if patience is exhausted. Return whether it is the best so far."""
        is_best = self.best is None or metric > self.best
        if is_best:
            self.best, self.best_update = metric, self.update
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        self.ended_early = self.evaluations_since_best == patience
        return is_best


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_program(FinetuneConfig, stoppable(finetune), argv, __doc__)


def finetune(config: FinetuneConfig, stop: StopRequest) -> dict[str, Evaluation]:
    """Train once, or once per fold.

    Returns:
        The final evaluations by split; none if the run was stopped.

    Raises:
        TrainingError: If the settings, the data or an earlier run in the folder do not allow it, or the run failed.
    """
    if not config.folds:
        return train(config, stop)
    if config.data.hold_out:
        raise TrainingError(
            f"data.hold_out={config.data.hold_out:g} would replace the folds as validation clips, and no fold would "
            "be tested; with folds set it to 0."
        )
    results: dict[str, Evaluation] = {}
    for fold in config.folds:
        others = "+".join(other for other in config.folds if other != fold)
        fold_config = replace(
            config,
            output_dir=config.output_dir / fold,
            data=replace(config.data, split=others),
            validation_split=fold,
            folds=[],
        )
        with locked_by_launch(fold_config.output_dir):
            results |= train(fold_config, stop)
        if stop.requested:
            return results
    if join_processes().is_main_process:
        report_folds(config.output_dir, results)
    return results


def train(config: FinetuneConfig, stop: StopRequest) -> dict[str, Evaluation]:
    """Run or resume one training, to its end or until `stop` is requested. See [`finetune`]."""
    config, task = settle(config)
    labels, problem_type = task.labels, task.problem_type
    loss = config.loss or ("cross_entropy" if task.labels_per_clip == "single" else "bce_per_target")
    run = open_run(config, stop)
    model, feature_extractor = prepare_classifier(config, task, run)

    # --- Data
    try:
        loader = make_loader(
            task.source,
            feature_extractor,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=run.rank,
            world_size=run.world_size,
            augment=roll_and_gain if config.augmentation.roll_and_gain else None,
        )
        validation_data = evaluation_data(config.data, config.validation_source, config.validation_split)
        validation_source = task.source.read_as(validation_data)
        validation_loader = make_loader(
            validation_source,
            feature_extractor,
            batch_size=config.batch_size,
            seed=0,
            rank=run.rank,
            world_size=run.world_size,
            repeat=False,
        )
    except (ValueError, FileNotFoundError) as error:
        raise TrainingError(f"data.source={config.data.source!r}: {error}") from error

    # --- Loop
    progress = run.progress(FinetuneProgress)
    description = f"{problem_type}, {len(labels)} classes"
    trainer = Trainer(run, model, loader, feature_extractor, progress, description=description)
    metric_names = list(MAIN_METRICS[problem_type])
    for batches in trainer.updates():
        inputs = []
        for batch in batches:
            input_values = loader.input_values(batch, run.accelerator.device)
            targets = labels.encode(batch["labels"]).to(run.accelerator.device)
            inputs.append(augment_batch(input_values, targets, config.augmentation))
        outputs = backpropagate(run.accelerator, trainer.model, inputs, loss, config.label_smoothing)
        if trainer.step(outputs, batches) is None:
            continue
        trainer.log()
        if config.is_evaluation_due(progress.update):
            predictions = predict(trainer.model, validation_loader, labels, run.accelerator, "Validating")
            metrics = compute_metrics(predictions, problem_type, labels.names)
            trainer.write_row({f"validation_{name}": metrics[name] for name in metric_names})
            if progress.count_evaluation(metrics[metric_names[0]], config.patience):
                trainer.save_model(BEST)
            trainer.restart_timer()
    trainer.end()
    if not trainer.is_complete:
        return {}

    # --- The best weights, as a folder for the Hub with their results
    if run.accelerator.is_main_process:
        write_report(run.folder)
    run.accelerator.wait_for_everyone()
    splits = {config.validation_split: validation_data}
    if config.test_split is not None:
        splits[config.test_split] = data_of_test(config, config.test_split)
    try:
        return {split: evaluate(evaluation_config(config, data), validation_source) for split, data in splits.items()}
    except EvaluationError as error:
        raise TrainingError(f"The run is complete, but its evaluation failed: {error}") from error


def data_of_test(config: FinetuneConfig, split: str) -> EvaluationDataConfig:
    """Return the settings to read a test split whole."""
    return replace(evaluation_data(config.data, config.validation_source, split), hold_out=0.0, held_out=False)


def settle(config: FinetuneConfig) -> tuple[FinetuneConfig, Task]:
    """Find the task, and fill in all settings that follow from the data.

    Raises:
        TrainingError: If the data cannot be read, have labels that are not classes, or have a split that would be both
            trained and evaluated on.
    """
    has_epochs = config.epochs is not None
    task = find_task(config.data, config.label_file, config.problem_type, config.seed, count_clips=has_epochs)
    check_splits(config.data, config.validation_source, config.validation_split, config.test_split)
    if config.test_split is not None:
        # A split that is missing should not end a run after its training.
        try:
            task.source.read_as(data_of_test(config, config.test_split))
        except (ValueError, FileNotFoundError) as error:
            raise TrainingError(f"test_split={config.test_split!r}: {error} (null: no test)") from error
    changes: dict[str, Any] = {
        "validation_source": config.validation_source or config.data.source,
        "problem_type": task.labels_per_clip,
    }
    if config.data.hold_out:
        changes["validation_split"] = config.data.split
    if config.epochs is not None and task.num_clips is not None:
        clips_per_update = config.batch_size * config.gradient_accumulation_steps * join_processes().num_processes
        num_updates = max(1, round(config.epochs * task.num_clips / clips_per_update))
        changes |= {"epochs": None, "max_updates": num_updates}
    else:
        num_updates = config.num_updates
    if config.warmup_fraction is not None:
        optimizer = replace(config.optimizer, warmup_updates=round(config.warmup_fraction * num_updates))
        changes |= {"warmup_fraction": None, "optimizer": optimizer}
    if config.evaluate_every is None:
        changes["evaluate_every"] = default_evaluate_every(num_updates)
    return replace(config, **changes), task


def prepare_classifier(
    config: FinetuneConfig, task: Task, run: Run
) -> tuple[SSLAMForAudioClassification, SSLAMFeatureExtractor]:
    """Return the classifier in train mode, from another model or this run's checkpoint, and its feature extractor.

    Raises:
        TrainingError: If there is no such model, or settings contradict each other.
    """
    if run.checkpoint is not None:
        model, feature_extractor = resume_classifier(run.checkpoint)
    else:
        model, feature_extractor = make_classifier(
            config.model,
            task.labels,
            task.problem_type,
            config.features,
            config.classifier_pooling,
            # Stochastic depth would only add noise to a frozen encoder's features.
            drop_path_rate=0.0 if config.freeze_encoder else config.drop_path_rate,
        )
    if config.freeze_encoder:
        model.sslam.requires_grad_(False)
    model.set_memory(config.memory)
    if config.gradient_checkpointing:
        # The method's name in transformers 5, and in transformers 4.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    if config.compile:
        compile_blocks(model)
    return model.train(), feature_extractor


def evaluation_config(config: FinetuneConfig, data: EvaluationDataConfig) -> EvaluateConfig:
    """Return the settings with which `training.evaluate` evaluates the run's model folder."""
    return EvaluateConfig(
        model=str(config.output_dir / "model"),
        data=data,
        label_file=config.label_file,
        batch_size=config.batch_size,
        mixed_precision=config.mixed_precision,
    )


def backpropagate(
    accelerator: Accelerator,
    model: nn.Module,
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    loss: Loss,
    label_smoothing: float,
) -> list[dict[str, torch.Tensor]]:
    """Add the gradient of one update to the parameters.

    Args:
        accelerator: The processes.
        model: The model as the processes share it (DDP or FSDP).
        inputs: For each forward pass frames `(B, T, F)` and targets `(B, K)`.
        loss: The loss.
        label_smoothing: Share of a target that is spread evenly over all classes.

    Returns:
        For each forward pass its "loss". Their mean over passes and processes is the update's.
    """
    # The divisor covers the whole update, and is known before the first pass.
    divisor = torch.stack([loss_weight(targets, loss) for _, targets in inputs]).sum()
    total = accelerator.reduce(divisor, "sum").clamp(min=1.0)
    scale = len(inputs) * accelerator.num_processes / total

    def compute_losses(batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        input_values, targets = batch
        return {"loss": scale * loss_sum(model(input_values).logits, targets, loss, label_smoothing)}

    return accumulate_gradients(accelerator, model, inputs, compute_losses)


def report_folds(run_dir: Path, results: dict[str, Evaluation]) -> None:
    """Write folds.json and print it: each fold's metrics, and their mean and standard deviation over the folds."""
    names = next(iter(results.values())).main_metrics
    values = {key: [evaluation.metrics[key] for evaluation in results.values()] for key in names}
    summary = {
        key: {"mean": statistics.mean(column), "std": statistics.stdev(column)}
        for key, column in values.items()
        if None not in column
    }
    folds = {fold: {key: evaluation.metrics[key] for key in names} for fold, evaluation in results.items()}
    path = run_dir / "folds.json"
    write_text(path, json.dumps({"summary": summary, "folds": folds}, indent=1) + "\n")
    for key, moments in summary.items():
        print(f"{names[key]} over {len(results)} folds: {moments['mean']:.4f} ± {moments['std']:.4f}")
    print(path)


if __name__ == "__main__":
    main()
