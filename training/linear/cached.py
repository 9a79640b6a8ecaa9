"""Fast linear evaluation: heads fitted on cached features of a frozen encoder."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.contrib.logging import logging_redirect_tqdm

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.common.files import remove, write_text
from modeling_sslam.onednn_sslam import use_onednn
from training.classification.classifier import compile_blocks, make_classifier
from training.classification.task import Task, check_splits, evaluation_data, find_task
from training.data.config import DataConfig, DataError
from training.data.labels import LabelSet
from training.evaluation.card import write_results_to_card
from training.evaluation.facts import card_results
from training.evaluation.metrics import ProblemType
from training.evaluation.prediction import Predictions
from training.evaluation.results import MAIN_METRICS, Evaluation, write_results
from training.linear.clips import Round, make_rounds
from training.linear.config import ALL_POOLINGS, LinearEvalConfig
from training.linear.facts import check_results_dir, common_facts, name_of_encoder, protocol_of
from training.linear.features import FEATURE_POOLINGS, FeatureSet, cached_features
from training.linear.heads import DEFAULT_LOSS, METRICS, Head, fit_heads, head_logits
from training.linear.results import (
    HeadResult,
    HeadSummary,
    remove_sweep,
    table_of,
    why_no_model,
    write_model,
    write_sweep,
)
from training.run.config import TrainingError
from training.run.processes import make_accelerator

REMEDIES = {
    "validation": " (--data.hold_out 0.1 validates with a tenth of the training clips)",
    "test": " (--test_split null reports on the validation clips)",
}
# Limit of features and logits in memory at once. A sweep that needs more is fitted in parts.
MAX_BYTES_IN_MEMORY = 4 * 2**30


class FrozenEncoder(NamedTuple):
    """The encoder under evaluation, and its task.

    Attributes:
        model: The encoder within a classifier for the task's classes, whose own head is not used.
        feature_extractor: Computes its input.
        task: Classes and problem type.
    """

    model: SSLAMForAudioClassification
    feature_extractor: SSLAMFeatureExtractor
    task: Task


def evaluate_cached(config: LinearEvalConfig) -> None:
    """Extract features, fit heads, test them and write the results. Call it in every process.

    Raises:
        TrainingError: If the settings, the model, the data or an earlier evaluation do not allow it.
        DataError: If the data do not have the labels that the task needs, or too many clips are unusable.
    """
    try:
        accelerator = make_accelerator(config.mixed_precision)
    except ValueError as error:
        raise TrainingError(f"accelerate: {error}") from error
    if config.folds:
        # The classes are those of all folds.
        config = replace(config, data=replace(config.data, split="+".join(config.folds)))
    check_results_dir(config)
    task = find_task(config.data, config.label_file, config.problem_type, config.seed, count_clips=True)
    check_splits(config.data, config.validation_source, config.validation_split, config.test_split)
    config = replace(
        config,
        problem_type=task.labels_per_clip,
        validation_source=config.validation_source or config.data.source,
        validation_split=config.data.split if config.data.hold_out else config.validation_split,
    )
    encoder = freeze_encoder(config, task, accelerator)
    model_config = encoder.model.config
    heads = chosen_heads(config, model_config.num_hidden_layers, model_config.classifier_pooling)

    started = time.perf_counter()
    sets = {part: extract(config, encoder, part, data, accelerator) for part, data in splits_of(config).items()}
    if not config.folds:
        check_apart(sets)
    seconds = time.perf_counter() - started
    # Heads are small: one device fits them faster than several could share them.
    if accelerator.is_main_process:
        try:
            fit_and_report(config, encoder, heads, sets, seconds)
        except OSError as error:
            raise TrainingError(f"The results cannot be written into {config.output_dir}: {error}") from error


def freeze_encoder(config: LinearEvalConfig, task: Task, accelerator: Accelerator) -> FrozenEncoder:
    """Load the encoder in eval mode on the device, without gradients.

    Raises:
        TrainingError: If there is no such model, or settings contradict each other.
    """
    model, feature_extractor = make_classifier(
        config.model, task.labels, task.problem_type, config.features, config.classifier_pooling, drop_path_rate=0.0
    )
    if config.random_weights:
        set_seed(config.seed)
        model.sslam = SSLAMModel(SSLAMConfig.from_dict(model.config.to_dict()))
    if config.compile:
        compile_blocks(model)
    use_onednn(model.eval().requires_grad_(False).to(accelerator.device))
    return FrozenEncoder(model, feature_extractor, task)


def splits_of(config: LinearEvalConfig) -> dict[str, DataConfig]:
    """Return the settings of each split, by fold or by purpose. The training split includes the clips held out."""
    training = replace(config.data, hold_out=0.0, held_out=False)
    if config.folds:
        return {fold: replace(training, split=fold) for fold in config.folds}
    names = {"validation": None if config.data.hold_out else config.validation_split, "test": config.test_split}
    splits: dict[str, DataConfig] = {"train": training}
    for part, name in names.items():
        if name is not None:
            data = evaluation_data(config.data, config.validation_source, name)
            splits[part] = replace(data, hold_out=0.0, held_out=False)
    return splits


def extract(
    config: LinearEvalConfig, encoder: FrozenEncoder, part: str, data: DataConfig, accelerator: Accelerator
) -> FeatureSet:
    """Return the features of a split, from the cache or newly computed.

    Args:
        config: The settings.
        encoder: The encoder.
        part: The split's purpose, for the error message.
        data: The split.
        accelerator: The processes.

    Raises:
        TrainingError: If the split cannot be read.
        DataError: If its clips are unusable.
    """
    try:
        with logging_redirect_tqdm():
            return cached_features(
                encoder.model.sslam,
                encoder.feature_extractor,
                encoder.task.source.read_as(data),
                config.cache_dir,
                accelerator,
                batch_size=config.batch_size,
                dtype=config.cache_dtype,
            )
    except (ValueError, FileNotFoundError) as error:
        where = f"data.source={data.source!r}, split {data.split!r}"
        raise TrainingError(f"{where}: {error}{REMEDIES.get(part, '')}") from error


def check_apart(sets: dict[str, FeatureSet]) -> None:
    """Check that the other splits share no clips with the first. They would if the data have no splits.

    Raises:
        TrainingError: If a split shares clips with the first.
    """
    (_, train), *others = sets.items()
    rows = {id_: row for row, id_ in enumerate(train.ids)}
    for name, part in others:
        # Equal names are not enough: in some data sets, clips of different splits share them.
        shared = [
            id_
            for id_, pooled in zip(part.ids, part.pooled, strict=True)
            if id_ in rows and (pooled == train.pooled[rows[id_]]).all()
        ]
        if shared:
            raise TrainingError(
                f"{len(shared)} of the {len(part.ids)} {name} clips are training clips, such as {shared[0]}. For data "
                "without splits give --data.hold_out 0.2 --test_split null."
            )


def chosen_heads(config: LinearEvalConfig, last_layer: int, model_pooling: str) -> list[Head]:
    """Return the heads that `layers` and `poolings` ask for, layer by layer.

    Args:
        config: The settings.
        last_layer: Number of the encoder's last layer.
        model_pooling: The model's own pooling, the default.

    Raises:
        TrainingError: If there is no such layer or pooling, or several heads without validation clips to choose by.
    """
    layers: list[int] = []
    for name in config.layers:
        if not (name in ("all", "last") or (name.isdecimal() and int(name) <= last_layer)):
            raise TrainingError(f"layers: {name!r} is not one of 0 to {last_layer}, last, all.")
        layers += range(last_layer + 1) if name == "all" else [last_layer if name == "last" else int(name)]
    poolings: list[str] = []
    for name in config.poolings or [model_pooling]:
        if name != "all" and not set(name.split("+")) <= set(FEATURE_POOLINGS):
            raise TrainingError(
                f"poolings: {name!r} is not one of {', '.join(FEATURE_POOLINGS)}, all, nor some of them joined by +."
            )
        poolings += ALL_POOLINGS if name == "all" else [name]
    heads = [Head(layer, pooling) for layer in dict.fromkeys(layers) for pooling in dict.fromkeys(poolings)]
    if len(heads) > 1 and config.folds and not config.data.hold_out:
        raise TrainingError(
            f"There are {len(heads)} heads and no validation clips to choose by: the test folds must not. Set "
            "data.hold_out, or a single one of layers and of poolings."
        )
    return heads


def fit_and_report(
    config: LinearEvalConfig,
    encoder: FrozenEncoder,
    heads: list[Head],
    sets: dict[str, FeatureSet],
    extraction_seconds: float,
) -> None:
    """Fit the heads, test them, write all files and print a summary."""
    labels, problem_type = encoder.task.labels, encoder.task.problem_type
    started = time.perf_counter()
    rounds = make_rounds(config, sets)
    results = {
        test: evaluate_round(config, heads, clips, encoder, f"Heads for {test}") for test, clips in rounds.items()
    }
    seconds = {"features": round(extraction_seconds, 2), "heads": round(time.perf_counter() - started, 2)}

    table = [HeadSummary.of([part[i] for part in results.values()]) for i in range(len(heads))]
    # Of equal heads the first is chosen. Without validation there is only one head.
    chosen = max(range(len(heads)), key=lambda i: table[i].validation or 0.0)
    best = heads[chosen]
    metric, metric_name = next(iter(MAIN_METRICS[problem_type].items()))
    encoder_name, protocol = name_of_encoder(config), protocol_of(config)
    short_name = "/".join(Path(encoder_name).parts[-2:])
    no_model = why_no_model(best, has_folds=bool(config.folds))
    sizes = {test: {name: len(part) for name, part in clips._asdict().items()} for test, clips in rounds.items()}
    facts = common_facts(config) | {
        "num_clips": sizes,
        "num_classes": len(labels),
        "skipped": {name: features.skipped for name, features in sets.items()},
        "metric": metric,
        "best_head": table[chosen].as_row(metric),
        "best_head_model": no_model or "model/",
        "heads": [row.as_row(metric) for row in table],
        "seconds": seconds,
        "features": {name: str(features.folder) for name, features in sets.items()},
    }

    out, files = config.output_dir, []
    evaluations = {}
    for test, clips in rounds.items():
        evaluations[test] = evaluate_head(results[test][chosen], clips, encoder)
        title = f"{short_name}: linear evaluation ({config.mode}), {best}, split {test}"
        files += write_results(out / test if config.folds else out, evaluations[test], title, facts)
    if config.folds:
        write_text(out / "results.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        files.append(out / "results.json")
    remove_sweep(out)
    if len(heads) > 1:
        files += write_sweep(out, table, metric, metric_name, f"{short_name}: linear evaluation ({config.mode})")
    if no_model is not None:
        remove(out / "model")
    else:
        (result,) = (part[chosen] for part in results.values())
        write_model(out / "model", encoder.model, encoder.feature_extractor, result, encoder_name, protocol)
        if config.test_split is not None:
            data = evaluation_data(config.data, config.validation_source, config.test_split)
            results_of_card = card_results(data, evaluations[config.test_split])
            write_results_to_card(out / "model", results_of_card, replaced=set())
        files.append(out / "model")
    counts = ", ".join(" + ".join(f"{n:,}" for n in size.values()) for size in sizes.values())
    print(
        f"Linear evaluation of {encoder_name} on {config.data.source}",
        f"  {protocol}",
        f"  AdamW, learning rate {config.head.learning_rate:g}, {config.head.epochs} epochs",
        f"  {len(labels)} classes; clips to train, validate and test with: {counts}",
        f"  features {seconds['features']} s, {len(heads)} head{'s' * (len(heads) > 1)} {seconds['heads']} s",
        *table_of(table, metric_name, best),
        *([no_model] if no_model else []),
        *files,
        sep="\n",
    )


def norm_eps(config: SSLAMConfig) -> float:
    """Return the epsilon of the heads' norm. A fitted head has a norm, even if the model's own head has none."""
    return config.classifier_norm_eps or 1e-6


def evaluate_head(result: HeadResult, clips: Round, encoder: FrozenEncoder) -> Evaluation:
    """Return the full evaluation of a fitted head on the test clips."""
    test, labels = clips.test, encoder.task.labels
    logits = head_logits(test.pooled(result.head), result.state, norm_eps(encoder.model.config))
    targets = labels.encode(test.column("labels"))
    predictions = Predictions(test.column("ids"), logits.numpy(), targets.numpy(), test.groups())
    return Evaluation.of(predictions, encoder.task.problem_type, labels.names, test.group_column)


def evaluate_round(
    config: LinearEvalConfig, heads: list[Head], clips: Round, encoder: FrozenEncoder, description: str
) -> list[HeadResult]:
    """Fit all heads on the training clips, choose their epochs by the validation clips, and test them.

    Args:
        config: The settings.
        heads: The heads.
        clips: The clips of the round.
        encoder: The encoder that computed their features.
        description: Title of the progress bar.

    Raises:
        TrainingError: If a head's loss is not finite.
        DataError: If the clips do not have the labels that the task needs.
    """
    settings, device = encoder.model.config, encoder.model.device
    labels, problem_type = encoder.task.labels, encoder.task.problem_type
    targets = encode_targets(clips, labels, problem_type, device)
    results = {}
    for part in parts_that_fit(heads, sum(map(len, clips)), settings.hidden_size + len(labels)):
        features = [torch.stack([split.pooled(head) for head in part]).to(device) for split in clips]
        fitted = fit_heads(
            features[0],
            targets[0],
            (features[1], targets[1]) if len(clips.validation) else None,
            problem_type,
            config.head,
            eps=norm_eps(settings),
            std=settings.initializer_range,
            loss=config.loss or DEFAULT_LOSS[problem_type],
            label_smoothing=config.label_smoothing,
            seed=config.seed,
            description=description,
        )
        if not (finite := fitted.losses.isfinite().all(0)).all():
            raise TrainingError(
                f"The loss of the head on {part[int(finite.int().argmin())]} is not finite; lower head.learning_rate."
            )
        with torch.no_grad():
            scores = METRICS[problem_type](fitted.heads(features[2]), targets[2]).tolist()
        for i, head in enumerate(part):
            state = {name: value.cpu() for name, value in fitted.heads.classifier_state(i).items()}
            epoch = fitted.best_epochs[i]
            validation = None if fitted.scores is None else fitted.scores[i]
            results[head] = HeadResult(head, epoch, fitted.losses[epoch - 1, i].item(), validation, scores[i], state)
    return [results[head] for head in heads]


def encode_targets(
    clips: Round, labels: LabelSet, problem_type: ProblemType, device: torch.device
) -> Sequence[torch.Tensor]:
    """Return the targets of training, validation and test clips: `(N, K)` each.

    Raises:
        DataError: If none of these clips has a label, or the task needs one label each and they do not have it.
    """
    targets = [labels.encode(part.column("labels")).to(device) for part in clips]
    for name, part in zip(Round._fields, targets, strict=True):
        if len(part) and not part.any():
            raise DataError(f"None of the {len(part)} {name} clips has a label.")
        odd = (part.sum(1) != 1).sum().item()
        if problem_type == "single_label_classification" and odd:
            raise DataError(
                f"{odd} of the {len(part)} {name} clips do not have one label each; is problem_type multi?"
            )
    return targets


def parts_that_fit(heads: list[Head], num_clips: int, values_per_clip: int) -> list[list[Head]]:
    """Divide heads into lists of one width each whose features and logits fit into memory together.

    Args:
        heads: The heads.
        num_clips: Number of clips of the round.
        values_per_clip: Features and logits per clip of a head that reads one pooling.
    """
    parts: list[list[Head]] = []
    for head in sorted(heads, key=lambda head: len(head.columns)):
        size = (len(parts[-1]) + 1) * num_clips * values_per_clip * len(head.columns) * 4 if parts else 0
        if parts and len(parts[-1][0].columns) == len(head.columns) and size <= MAX_BYTES_IN_MEMORY:
            parts[-1].append(head)
        else:
            parts.append([head])
    return parts
