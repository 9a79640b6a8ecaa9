"""Fine-tuning of a pre-trained encoder for audio classification, on one device or many.

    accelerate launch -m training.finetune --config training/configs/finetune_esc50.yaml
        --model ENCODER --data DATASET --output_dir runs/esc50 [--any.key value]

ENCODER is a folder (or Hub id) that pre-training, conversion or an earlier fine-tuning made; DATASET is what
`python -m training.prepare` wrote, or any labelled folder, .csv table, .tsv manifest or dataset. The configurations in
training/configs/ are the published protocols; finetune_custom.yaml is for data of your own.

The loop is `train`. Worth knowing:

- Every `evaluate_every` updates the validation split is predicted, each clip once; the weights with the best metric
  (mAP, or accuracy for one label a clip) are kept in RUN_DIR/best and become RUN_DIR/model.
- Loss and gradient are the update's sum over the update's divisor (targets or clips), over all processes and forward
  passes: 4 devices with 12 clips are 1 device with 48, but for mixup, which mixes the clips of a device.
- With `folds` it trains once for each, on the others, and RUN_DIR/folds.json has mean and spread.
- Resume and signals are those of pre-training: see `training/pretrain.py`.

RUN_DIR gets config.yaml, metrics.jsonl, checkpoints/, tensorboard/, best/ and at the end curves.png and model/, a
folder for the Hub whose card and evaluation/ hold the results on validation and test split.
"""

import json
import logging
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.common.files import write_text
from modeling_sslam.common.signals import StopRequest
from training.arguments import changed_default
from training.data.augmentation import AugmentationConfig, augment_batch, roll_and_gain
from training.data.config import EvaluationDataConfig, LabelledDataConfig
from training.data.labels import LabelSet, Survey, find_label_set, survey
from training.data.loader import make_loader
from training.data.sources import is_one_split, open_source
from training.evaluate import EvaluateConfig, EvaluationError, evaluate
from training.evaluation.metrics import compute_metrics
from training.evaluation.prediction import predict
from training.evaluation.results import MAIN_METRICS, Evaluation
from training.report import write_report
from training.run.checkpointing import BEST
from training.run.config import RunConfig, TrainingError
from training.run.losses import Loss, loss_sum, loss_weight
from training.run.optimization import OptimizerConfig
from training.run.processes import join_processes
from training.run.progress import IntervalTimer, Progress
from training.run.run import Run, run_program

logger = logging.getLogger(__name__)


# How often a run is evaluated if nothing else is asked for.
DEFAULT_NUM_EVALUATIONS = 20
PROBLEM_TYPES = {"single": "single_label_classification", "multi": "multi_label_classification"}


@dataclass
class FeatureOverrides:
    """What to change in the front end of the encoder's folder."""

    max_length: int | None = field(
        default=None, metadata={"help": "Frames of 10 ms that clips are cropped or padded to.", "default": "as it was"}
    )
    mean: float | None = field(default=None, metadata={"help": "Mean of the log-mel frames.", "default": "as it was"})
    std: float | None = field(default=None, metadata={"help": "Their standard deviation.", "default": "as it was"})


@dataclass
class FinetuneOptimizerConfig(OptimizerConfig):
    """AdamW with a learning rate for each layer; the defaults are the published ones for AudioSet."""

    learning_rate: float = changed_default(OptimizerConfig, "learning_rate", 5e-5)
    warmup_updates: int = changed_default(OptimizerConfig, "warmup_updates", 0)
    initial_learning_rate: float = changed_default(OptimizerConfig, "initial_learning_rate", 1e-6)
    final_learning_rate: float = changed_default(OptimizerConfig, "final_learning_rate", 1e-6)
    layer_decay: float = changed_default(OptimizerConfig, "layer_decay", 0.65)


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """All settings of a run."""

    model: str = field(
        metadata={"help": "Folder (or Hub id) of the encoder; a head for other classes than the data's is left out."}
    )
    data: LabelledDataConfig
    optimizer: FinetuneOptimizerConfig
    features: FeatureOverrides
    augmentation: AugmentationConfig
    validation_source: str | None = field(
        default=None, metadata={"help": "Where the validation and test splits are.", "default": "data.source"}
    )
    validation_split: str = field(
        default="validation",
        metadata={"help": "Split that chooses the best weights; with data.hold_out it is the clips held out instead."},
    )
    test_split: str | None = field(
        default=None, metadata={"help": "Split on which the best weights are evaluated at the end, if any."}
    )
    folds: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Splits for cross-validation: one run for each, which validates on it and trains on the others."
        },
    )
    label_file: str | None = field(
        default=None,
        metadata={
            "help": "Table index,id,name (or index,name, or name) of the classes. By default labels.csv beside the "
            "data, the data's own class names, or else all labels that occur in them, sorted."
        },
    )
    problem_type: Literal["auto", "single", "multi"] = field(
        default="auto",
        metadata={"help": "Whether clips have one label or any number; auto: single if every clip has just one."},
    )
    loss: Loss | None = field(
        default=None,
        metadata={
            "help": "Binary cross-entropy per target or per clip, or cross-entropy.",
            "default": "cross_entropy for one label a clip, bce_per_target for several",
        },
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of a target spread over all classes."})
    drop_path_rate: float = field(default=0.1, metadata={"help": "Stochastic depth of the last block."})
    classifier_pooling: Literal["cls", "mean", "lin_softmax"] | None = field(
        default=None,
        metadata={
            "help": "What the head classifies: the CLS token, or the patches by a mean.",
            "default": "as it was",
        },
    )
    freeze_encoder: bool = field(default=False, metadata={"help": "Train the head alone: linear evaluation."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute blocks twice rather than keep what they computed: less memory."}
    )
    max_updates: int | None = field(default=None, metadata={"help": "Optimiser updates of the whole run; or epochs."})
    epochs: float | None = field(default=None, metadata={"help": "Passes over the training clips, for max_updates."})
    warmup_fraction: float | None = field(
        default=None, metadata={"help": "Warm-up as a share of all updates, in place of optimizer.warmup_updates."}
    )
    evaluate_every: int | None = field(
        default=None,
        metadata={"help": "Updates between evaluations.", "default": f"{DEFAULT_NUM_EVALUATIONS} evaluations in all"},
    )
    patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations in a row that were no better than the best."}
    )

    def __post_init__(self) -> None:
        if (self.max_updates is None) == (self.epochs is None):
            raise ValueError("give either max_updates or epochs")
        if self.max_updates is not None:
            super().__post_init__()
        for name in ("epochs", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and less than 1")
        if len(self.folds) == 1:
            raise ValueError(f"folds={self.folds[0]}: cross-validation needs two or more")


@dataclass
class FinetuneProgress(Progress):
    best: float | None = None
    best_update: int = 0
    evaluations_since_best: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    run_program(FinetuneConfig, finetune, argv, __doc__)


def finetune(config: FinetuneConfig, stop: StopRequest) -> dict[str, Evaluation]:
    """A run, or one for each fold.

    Returns:
        The evaluations at its end, by split; none if it was stopped before.
    """
    if not config.folds:
        return train(config, stop)
    results: dict[str, Evaluation] = {}
    for fold in config.folds:
        others = "+".join(other for other in config.folds if other != fold)
        results |= train(
            replace(
                config,
                output_dir=config.output_dir / fold,
                data=replace(config.data, split=others),
                validation_split=fold,
                folds=[],
            ),
            stop,
        )
        if stop.requested:
            return results
    if join_processes().is_main_process:
        report_folds(config.output_dir, results)
    return results


def train(config: FinetuneConfig, stop: StopRequest) -> dict[str, Evaluation]:
    """One run, or the rest of one, to its end or until `stop` is requested."""
    config, labels = settle(config)
    run = Run(config, stop, FinetuneProgress())
    validation_data = evaluation_data(config, config.validation_split)

    # --- Model: the encoder of another, or this run's own
    model, feature_extractor = make_classifier(config, labels, run.checkpoint)
    problem_type = model.config.problem_type
    is_single = problem_type == PROBLEM_TYPES["single"]
    loss = config.loss or ("cross_entropy" if is_single else "bce_per_target")

    # --- Data
    distributed = {"rank": run.rank, "world_size": run.world_size}
    augment = roll_and_gain if config.augmentation.roll_and_gain else None
    try:
        loader = make_loader(
            open_source(config.data),
            feature_extractor,
            batch_size=config.batch_size,
            seed=config.seed,
            augment=augment,
            **distributed,
        )
        validation_loader = make_loader(
            open_source(validation_data),
            feature_extractor,
            batch_size=config.batch_size,
            seed=0,
            repeat=False,
            **distributed,
        )
    except (ValueError, FileNotFoundError) as error:
        raise TrainingError(f"data.source={config.data.source!r}: {error}") from error

    # --- Loop
    metric = next(iter(MAIN_METRICS[problem_type]))
    run.start(model, loader, feature_extractor, description=f"{problem_type}, {len(labels)} classes")
    for batches in run.updates():
        inputs = []
        for batch in batches:
            input_values = loader.input_values(batch, run.accelerator.device)
            targets = labels.encode(batch["labels"]).to(run.accelerator.device)
            inputs.append(augment_batch(input_values, targets, config.augmentation))
        outputs = accumulate_gradients(run.accelerator, run.model, inputs, loss, config.label_smoothing)
        if run.step(outputs, batches) is None:
            continue
        run.log()
        progress = run.progress
        if progress.update % config.evaluate_every == 0 or progress.update == config.max_updates:
            predictions = predict(run.model, validation_loader, labels, run.accelerator, "Validating")
            metrics = compute_metrics(predictions, problem_type, labels.names)
            run.write_row({f"validation_{name}": metrics[name] for name in MAIN_METRICS[problem_type]})
            progress.evaluations_since_best += 1
            if progress.best is None or metrics[metric] > progress.best:
                progress.best, progress.best_update = metrics[metric], progress.update
                progress.evaluations_since_best = 0
                run.save_model(BEST)
            progress.ended_early = progress.evaluations_since_best == config.patience
            run.timer = IntervalTimer()
    run.end()
    if not run.is_complete:
        return {}

    # --- The best weights, as a folder for the Hub with what they are worth
    if run.accelerator.is_main_process:
        write_report(run.run_dir)
    run.accelerator.wait_for_everyone()
    splits = {config.validation_split: validation_data}
    if config.test_split is not None:
        splits[config.test_split] = replace(evaluation_data(config, config.test_split), hold_out=0.0, held_out=False)
    try:
        return {split: evaluate(evaluation_config(config, data)) for split, data in splits.items()}
    except EvaluationError as error:
        raise TrainingError(f"The run is complete, its evaluation failed: {error}") from error


def settle(config: FinetuneConfig) -> tuple[FinetuneConfig, LabelSet]:
    """The settings with all that follows from the data filled in, and the classes.

    The labels of all training clips are looked through first, if anything follows from them.

    Raises:
        TrainingError: If the data cannot be read, or have labels that are none of the classes.
    """
    where = f"data.source={config.data.source!r}"
    try:
        source = open_source(config.data)
        labels = find_label_set(source, config.label_file)
        found: Survey | None = None
        if labels is None or config.epochs is not None or config.problem_type == "auto":
            state = join_processes()
            found = survey(source, config.seed) if state.is_main_process else None
            (found,) = broadcast_object_list([found])
    except (ValueError, FileNotFoundError) as error:
        raise TrainingError(f"{where}: {error}") from error
    if found is not None:
        if not found.num_clips:
            raise TrainingError(f"{where} has no clip in split {config.data.split!r}.")
        labels = labels or LabelSet(sorted(found.counts))
        labels.encode([found.counts])
        logger.info(
            "%s: %d clips, %d labels of %d classes.", where, found.num_clips, found.counts.total(), len(labels)
        )
    if not len(labels):
        raise TrainingError(f"{where} has no labels in split {config.data.split!r}.")
    check_splits(config)
    changes: dict[str, Any] = {"validation_source": config.validation_source or config.data.source}
    if config.data.hold_out:
        changes["validation_split"] = config.data.split
    max_updates = config.max_updates
    if config.problem_type == "auto":
        changes["problem_type"] = "single" if found.is_single_label else "multi"
    if config.epochs is not None:
        clips_per_update = config.batch_size * config.gradient_accumulation_steps * join_processes().num_processes
        max_updates = max(1, round(config.epochs * found.num_clips / clips_per_update))
        changes |= {"epochs": None, "max_updates": max_updates}
    if config.warmup_fraction is not None:
        optimizer = replace(config.optimizer, warmup_updates=round(config.warmup_fraction * max_updates))
        changes |= {"warmup_fraction": None, "optimizer": optimizer}
    if config.evaluate_every is None:
        changes["evaluate_every"] = max(1, max_updates // DEFAULT_NUM_EVALUATIONS)
    return replace(config, **changes), labels


def check_splits(config: FinetuneConfig) -> None:
    """Raises:
    TrainingError: If clips that are trained on would be evaluated on.
    """
    if config.validation_source not in (None, config.data.source):
        return
    for key, split in {"validation_split": config.validation_split, "test_split": config.test_split}.items():
        if split is None or (key == "validation_split" and config.data.hold_out):
            continue
        if split == config.data.split or is_one_split(replace(config.data, split=split)):
            raise TrainingError(
                f"{key}={split!r} of {config.data.source!r} would be the clips that it trains on. Hold some out by "
                "data.hold_out, name other data by validation_source, or set test_split to null."
            )


def evaluation_data(config: FinetuneConfig, split: str) -> EvaluationDataConfig:
    """A split that is evaluated: where and how the training data are read, but in order and each clip from its
    start.
    """
    return EvaluationDataConfig(
        **asdict(config.data)
        | {
            "source": config.validation_source,
            "split": split,
            "crop": "head",
            "shuffle_buffer": 0,
            "sample_weights": None,
            "clips_per_epoch": None,
            "held_out": config.data.hold_out > 0,
        }
    )


def evaluation_config(config: FinetuneConfig, data: EvaluationDataConfig) -> EvaluateConfig:
    """The evaluation of the run's model folder, as the command would do it."""
    return EvaluateConfig(
        model=str(config.output_dir / "model"),
        data=data,
        label_file=config.label_file,
        batch_size=config.batch_size,
        mixed_precision=config.mixed_precision,
    )


def make_classifier(
    config: FinetuneConfig, labels: LabelSet, checkpoint: Path | None
) -> tuple[SSLAMForAudioClassification, SSLAMFeatureExtractor]:
    """The classifier to train, in float32 and train mode, and the front end that goes with it.

    Raises:
        TrainingError: If there is no such model, or settings contradict each other.
    """
    try:
        if checkpoint is not None:
            model = SSLAMForAudioClassification.from_pretrained(checkpoint, dtype=torch.float32)
            feature_extractor = SSLAMFeatureExtractor.from_pretrained(checkpoint)
        else:
            changed = {key: value for key, value in asdict(config.features).items() if value is not None}
            feature_extractor = SSLAMFeatureExtractor.from_pretrained(config.model, **changed)
            # A frozen encoder gives the same features every time.
            drop_path_rate = 0.0 if config.freeze_encoder else config.drop_path_rate
            model_config = SSLAMConfig.from_pretrained(
                config.model, max_length=feature_extractor.max_length, drop_path_rate=drop_path_rate
            )
            model_config.classifier_pooling = config.classifier_pooling or model_config.classifier_pooling
            has_head = LabelSet.of_model(model_config).names == labels.names and (
                "SSLAMForAudioClassification" in (model_config.architectures or ())
            )
            model_config.id2label = dict(enumerate(labels.names))
            model_config.label2id = {name: i for i, name in enumerate(labels.names)}
            model_config.problem_type = PROBLEM_TYPES[config.problem_type]
            if has_head:
                model = SSLAMForAudioClassification.from_pretrained(
                    config.model, config=model_config, dtype=torch.float32
                )
            else:
                model = SSLAMForAudioClassification(model_config)
                model.sslam = SSLAMModel.from_pretrained(config.model, config=model_config, dtype=torch.float32)
            logger.info("%s: %s", config.model, "encoder and head" if has_head else "encoder, with a new head")
    except (ValueError, OSError) as error:
        raise TrainingError(f"model={config.model!r}: {error}") from error
    if config.freeze_encoder:
        model.sslam.requires_grad_(False)
    if config.gradient_checkpointing:
        # As transformers 5 calls it, and transformers 4.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    if config.compile:
        for layer in model.sslam.encoder.layers:
            layer.compile()
    return model.train(), feature_extractor


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    loss: Loss,
    label_smoothing: float,
) -> list[dict[str, torch.Tensor]]:
    """Adds the gradient of one update to the parameters.

    Args:
        inputs: For each forward pass frames `(B, T, F)` and targets `(B, K)`.

    Returns:
        For each forward pass its "loss"; their mean, over passes and processes, is the update's.
    """
    # The divisor is the whole update's, and known before the first pass.
    weights = [loss_weight(targets, loss) for _, targets in inputs]
    total = accelerator.reduce(torch.stack(weights).sum(), "sum").clamp(min=1.0)
    scale = len(inputs) * accelerator.num_processes / total
    outputs = []
    for i, (input_values, targets) in enumerate(inputs):
        # Processes exchange gradients once per update.
        with nullcontext() if i == len(inputs) - 1 else accelerator.no_sync(model):
            logits = model(input_values).logits
            value = scale * loss_sum(logits, targets, loss, label_smoothing)
            accelerator.backward(value)
        outputs.append({"loss": value.detach()})
    return outputs


def report_folds(run_dir: Path, results: dict[str, Evaluation]) -> None:
    """Writes folds.json and prints it: every fold's metrics, their mean and standard deviation over the folds."""
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
