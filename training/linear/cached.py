"""Linear evaluation in cached mode: heads fitted on cached features of a frozen encoder."""

import logging
import time
from dataclasses import replace
from itertools import product

from training.classification.task import check_splits, find_task
from training.linear.choice import inner_scores
from training.linear.clips import Round, make_rounds
from training.linear.comparison import FittedContender
from training.linear.config import ALL_POOLINGS, LinearEvalConfig
from training.linear.contenders import (
    Contender,
    FrozenEncoder,
    check_apart,
    contender_of,
    forest_of,
    freeze_encoder,
)
from training.linear.facts import check_results_dir, short_name_of
from training.linear.features import FEATURE_POOLINGS
from training.linear.fitting import Setup
from training.linear.heads import TOKEN_KINDS, Head
from training.linear.kinds import fit_kinds
from training.linear.lengths import length_advice, typical_seconds
from training.linear.outcome import Outcome, print_summary, write_outcome
from training.run.config import TrainingError
from training.run.processes import make_accelerator

logger = logging.getLogger(__name__)


def evaluate_cached(config: LinearEvalConfig) -> None:
    """Extract features, fit heads, test them and write the results. Call it in every process.

    Raises:
        TrainingError: If the settings, the model or the data are wrong, or the folder has other results.
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
    if not config.folds:
        check_splits(config.data, config.validation_source, config.validation_split, config.test_split)
    config = replace(
        config,
        problem_type=task.labels_per_clip,
        validation_source=config.validation_source or config.data.source,
        validation_split=config.data.split if config.data.hold_out else config.validation_split,
    )
    encoder = freeze_encoder(config, task, accelerator)
    model_config = encoder.model.config
    seconds = typical_seconds(task.source) if accelerator.is_main_process else None
    if seconds and (advice := length_advice(seconds, encoder.feature_extractor, model_config)):
        logger.warning(advice)
    heads = chosen_heads(config, model_config.num_hidden_layers, model_config.classifier_pooling)
    name = short_name_of(config)
    contenders = [contender_of(name, config, encoder, heads, accelerator)]
    check_apart(contenders[0].sets, by_fold=bool(config.folds))
    for rival in dict.fromkeys(config.compare):
        if rival == "new_weights":
            new = freeze_encoder(replace(config, new_weights=True, compare=[]), task, accelerator)
            contenders.append(contender_of(f"{name}, new weights", config, new, heads, accelerator))
        else:
            contenders.append(forest_of(config, encoder, accelerator))
    # Heads are small: one device fits them faster than several could share them.
    if accelerator.is_main_process:
        outcome = fit_contenders(config, encoder, contenders)
        try:
            files = write_outcome(outcome)
        except OSError as error:
            raise TrainingError(f"The results cannot be written into {config.output_dir}: {error}") from error
        print_summary(outcome, files)


def setup_of(config: LinearEvalConfig, encoder: FrozenEncoder) -> Setup:
    """Return everything except the clips that determines a fit."""
    model = encoder.model
    return Setup(
        config,
        encoder.task.labels,
        encoder.task.problem_type,
        model.config.hidden_size,
        # A fitted head always has a LayerNorm, even if the model's own head has none.
        model.config.classifier_norm_eps or 1e-6,
        model.config.initializer_range,
        model.device,
    )


def chosen_heads(config: LinearEvalConfig, last_layer: int, model_pooling: str) -> list[Head]:
    """Return the heads that `head.kinds`, `few_shot.shots`, `layers` and `poolings` ask for.

    Args:
        config: The settings.
        last_layer: Number of the encoder's last layer.
        model_pooling: The model's own pooling, the default.

    Raises:
        TrainingError: If there is no such layer or pooling, or if a kind needs patch tokens and only concat is named.
    """
    named: dict[str, list[int | str]] = {str(layer): [layer] for layer in range(last_layer + 1)}
    named |= {"last": [last_layer], "all": [*range(last_layer + 1)], "concat": ["concat"]}
    layers: list[int | str] = []
    for name in config.layers:
        if name not in named:
            raise TrainingError(f"layers: {name!r} is not one of 0 to {last_layer}, last, all, concat.")
        layers += named[name]
    poolings: list[str] = []
    for name in config.poolings or [model_pooling]:
        if name != "all" and not set(name.split("+")) <= set(FEATURE_POOLINGS):
            raise TrainingError(
                f"poolings: {name!r} is not one of {', '.join(FEATURE_POOLINGS)}, all, nor some of them joined by +."
            )
        poolings += ALL_POOLINGS if name == "all" else [name]
    return [
        head
        for kind in dict.fromkeys([*config.head.kinds, *(["few_shot"] if config.few_shot.shots else [])])
        for head in heads_of_kind(config, kind, list(dict.fromkeys(layers)), list(dict.fromkeys(poolings)))
    ]


def heads_of_kind(config: LinearEvalConfig, kind: str, layers: list[int | str], poolings: list[str]) -> list[Head]:
    """Return the heads of one kind: one for each layer, pooling and setting that the kind uses."""
    if kind in TOKEN_KINDS:
        if layers == ["concat"]:
            raise TrainingError(f"layers: concat has no patch tokens, which {kind} reads; add last, all or a number.")
        return [Head(layer, "patches", kind) for layer in layers if layer != "concat"]
    settings: list[tuple[tuple[str, float], ...]] = [()]
    if kind in ("linear", "layers"):
        grid = {"lr": config.head.learning_rates, "wd": config.head.weight_decays}
        settings = list(product(*([(name, value) for value in values] for name, values in grid.items() if values)))
    elif kind == "ridge":
        settings = [(("strength", value),) for value in dict.fromkeys(config.ridge.strengths)]
    elif kind == "knn":
        settings = [(("k", k),) for k in dict.fromkeys(config.knn.neighbours)]
    elif kind == "few_shot":
        settings = [(("shots", config.few_shot.shots),)]
    return [Head(*of_head) for of_head in product(["all"] if kind == "layers" else layers, poolings, [kind], settings)]


def fit_contenders(config: LinearEvalConfig, encoder: FrozenEncoder, contenders: list[Contender]) -> Outcome:
    """Fit and test all heads of the encoder and its rivals.

    Args:
        config: The settings.
        encoder: The encoder.
        contenders: The encoder's features, then those of the rivals.
    """
    started = time.perf_counter()
    setup = setup_of(config, encoder)
    rounds = [make_rounds(config, contender.sets) for contender in contenders]
    fitted = [fit_contender(config, *pair, setup) for pair in zip(contenders, rounds, strict=True)]
    seconds = {
        "features": round(sum(contender.seconds for contender in contenders), 2),
        "heads": round(time.perf_counter() - started, 2),
    }
    return Outcome(config, encoder, contenders[0].sets, fitted, rounds, seconds)


def fit_contender(
    config: LinearEvalConfig, contender: Contender, rounds: dict[str, Round], setup: Setup
) -> FittedContender:
    """Fit and test all heads of an encoder or baseline.

    With folds and no clips held out, each head's validation metric is its mean over the inner folds.
    """
    heads = contender.heads
    has_choice = sum(head.kind != "few_shot" for head in heads) > 1
    by_fold = bool(config.folds) and not config.data.hold_out and has_choice
    inner = inner_scores(heads, contender.sets, setup) if by_fold else {}
    results = []
    for test, clips in rounds.items():
        fitted = fit_kinds(heads, clips.train, clips.validation, [clips.test], setup, f"Heads for {test}")
        if by_fold:
            fitted = [result._replace(validation=value) for result, value in zip(fitted, inner[test], strict=True)]
        results.append(fitted)
    return FittedContender(contender.name, heads, results, by_fold)
