"""Linear evaluation in cached mode: heads fitted on cached features of a frozen encoder."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple, get_args

from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.contrib.logging import logging_redirect_tqdm

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.common.files import remove, write_text
from modeling_sslam.onednn_sslam import use_onednn
from training.classification.classifier import compile_blocks, make_classifier
from training.classification.task import Task, check_splits, evaluation_data, find_task
from training.data.config import DataConfig
from training.data.sources import Source
from training.evaluation.card import write_results_to_card
from training.evaluation.facts import card_results
from training.evaluation.prediction import Predictions
from training.evaluation.results import MAIN_METRICS, Evaluation, write_results
from training.linear.choice import inner_scores
from training.linear.clips import Clips, make_rounds
from training.linear.comparison import Entrant, remove_comparison, write_comparison
from training.linear.config import ALL_POOLINGS, LinearEvalConfig
from training.linear.facts import check_results_dir, common_facts, name_of_encoder, protocol_of
from training.linear.features import FEATURE_POOLINGS, FeatureSet, cached_features, cached_tokens, cached_values
from training.linear.fitting import HeadResult, Setup
from training.linear.forest import cepstral_extractor
from training.linear.heads import TOKEN_KINDS, Head
from training.linear.kinds import fit_kinds
from training.linear.lengths import length_advice, typical_seconds
from training.linear.options import Rival
from training.linear.results import (
    HeadSummary,
    number,
    remove_sweep,
    spread,
    table_of,
    why_no_model,
    write_model,
    write_sweep,
)
from training.run.config import TrainingError
from training.run.processes import make_accelerator

logger = logging.getLogger(__name__)

REMEDIES = {
    "validation": " (--data.hold_out 0.1 validates with a tenth of the training clips)",
    "test": " (--test_split null reports on the validation clips)",
}
FOREST = Head(0, "mean and deviation of MFCCs", "forest")
# A longer table of heads is not printed; heads.md has it.
MAX_PRINTED_HEADS = 40


class FrozenEncoder(NamedTuple):
    """The encoder under evaluation, and its task.

    Attributes:
        model: A classifier for the task's classes that contains the encoder. Its own head is not used.
        feature_extractor: Computes its input.
        task: Classes and problem type.
    """

    model: SSLAMForAudioClassification
    feature_extractor: SSLAMFeatureExtractor
    task: Task


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
    setup = setup_of(config, encoder)
    name = short_name_of(config)
    contenders = [contender_of(name, config, encoder, heads, accelerator)]
    check_apart(contenders[0].sets, by_fold=bool(config.folds))
    for rival in dict.fromkeys(config.compare):
        if rival == "new_weights":
            new = freeze_encoder(replace(config, random_weights=True, compare=[]), task, accelerator)
            contenders.append(contender_of(f"{name}, new weights", config, new, heads, accelerator))
        else:
            contenders.append(forest_of(config, encoder, accelerator))
    # Heads are small: one device fits them faster than several could share them.
    if accelerator.is_main_process:
        try:
            fit_and_report(config, encoder, contenders, setup)
        except OSError as error:
            raise TrainingError(f"The results cannot be written into {config.output_dir}: {error}") from error


class Contender(NamedTuple):
    """An encoder or a baseline with its features, before its heads are fitted.

    Attributes:
        name: Name for tables.
        heads: The heads to fit.
        sets: The features of each split.
        seconds: Time to compute the features or to find them in the cache.
    """

    name: str
    heads: list[Head]
    sets: dict[str, FeatureSet]
    seconds: float


def short_name_of(config: LinearEvalConfig) -> str:
    """Return the encoder's name for tables and titles."""
    return "/".join(Path(name_of_encoder(config)).parts[-2:])


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


def contender_of(
    name: str, config: LinearEvalConfig, encoder: FrozenEncoder, heads: list[Head], accelerator: Accelerator
) -> Contender:
    """Return an encoder with its features of all splits. Call it in every process."""
    started = time.perf_counter()
    layers = sorted({layer for head in heads if head.kind in TOKEN_KINDS and isinstance(layer := head.layer, int)})

    def features(source: Source) -> FeatureSet:
        states, extractor = encoder.model.sslam, encoder.feature_extractor
        found = cached_features(
            states,
            extractor,
            source,
            config.cache_dir,
            accelerator,
            batch_size=config.batch_size,
            dtype=config.cache_dtype,
        )
        if not layers:
            return found
        return cached_tokens(
            found,
            states,
            extractor,
            source,
            config.cache_dir,
            accelerator,
            layers=layers,
            batch_size=config.batch_size,
            max_bytes=config.token_cache_gib * 2**30,
        )

    sets = extract_splits(config, encoder.task, features)
    return Contender(name, heads, sets, time.perf_counter() - started)


def forest_of(config: LinearEvalConfig, encoder: FrozenEncoder, accelerator: Accelerator) -> Contender:
    """Return the random forest with the MFCC features of all splits. Call it in every process."""
    started = time.perf_counter()
    cepstra = cepstral_extractor(config.forest.coefficients)

    def features(source: Source) -> FeatureSet:
        frames = encoder.feature_extractor
        return cached_values(cepstra, frames, source, config.cache_dir, accelerator, config.batch_size, "float32")

    sets = extract_splits(config, encoder.task, features)
    return Contender("MFCC + forest", [FOREST], sets, time.perf_counter() - started)


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
    """Return the settings of each split, by fold or by purpose. The training split includes the held-out clips."""
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


def extract_splits(
    config: LinearEvalConfig, task: Task, features: Callable[[Source], FeatureSet]
) -> dict[str, FeatureSet]:
    """Return the features of all splits, from the cache or newly computed.

    Args:
        config: The settings.
        task: The task.
        features: Returns the features of a source.

    Raises:
        TrainingError: If a split cannot be read, or its patch tokens are too large.
        DataError: If its clips are unusable.
    """
    sets = {}
    for part, data in splits_of(config).items():
        try:
            with logging_redirect_tqdm():
                sets[part] = features(task.source.read_as(data))
        except (ValueError, FileNotFoundError) as error:
            where = f"data.source={data.source!r}, split {data.split!r}"
            raise TrainingError(f"{where}: {error}{REMEDIES.get(part, '')}") from error
    return sets


def check_apart(sets: dict[str, FeatureSet], by_fold: bool) -> None:
    """Check that no training clip is a test clip. All clips are both if the data have no splits.

    Args:
        sets: The features of the training clips and of other splits, or those of each fold.
        by_fold: Whether all splits are trained on. Otherwise only the first is.

    Raises:
        TrainingError: If a split shares clips with one that is trained on.
    """
    first, *others = sets.items()
    pairs = combinations(sets.items(), 2) if by_fold else ((first, other) for other in others)
    for (trained_on, train), (name, part) in pairs:
        rows = {id_: row for row, id_ in enumerate(train.ids)}
        # Equal names are not enough: in some data sets, clips of different splits share them.
        shared = [
            id_
            for id_, pooled in zip(part.ids, part.pooled, strict=True)
            if id_ in rows and (pooled == train.pooled[rows[id_]]).all()
        ]
        if shared and by_fold:
            raise TrainingError(
                f"{len(shared)} of the {len(part.ids)} clips of {name} are also in {trained_on}, such as {shared[0]}. "
                "Folds are splits of the data that share no clips."
            )
        if shared:
            raise TrainingError(
                f"{len(shared)} of the {len(part.ids)} {name} clips are training clips, such as {shared[0]}. If the "
                "data have no splits, give --data.hold_out 0.2 --test_split null."
            )


def chosen_heads(config: LinearEvalConfig, last_layer: int, model_pooling: str) -> list[Head]:
    """Return the heads that `head.kinds`, `few_shot.shots`, `layers` and `poolings` ask for.

    Args:
        config: The settings.
        last_layer: Number of the encoder's last layer.
        model_pooling: The model's own pooling, the default.

    Raises:
        TrainingError: If there is no such layer or pooling.
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
    return [
        head
        for kind in dict.fromkeys([*config.head.kinds, *(["few_shot"] if config.few_shot.shots else [])])
        for head in heads_of_kind(config, kind, list(dict.fromkeys(layers)), list(dict.fromkeys(poolings)))
    ]


def heads_of_kind(config: LinearEvalConfig, kind: str, layers: list[int], poolings: list[str]) -> list[Head]:
    """Return the heads of one kind: one for each layer, pooling and setting that the kind uses."""
    if kind in TOKEN_KINDS:
        return [Head(layer, "patches", kind) for layer in layers]
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
    places: list[int | str] = ["all"] if kind == "layers" else [*layers]
    return [Head(*of_head) for of_head in product(places, poolings, [kind], settings)]


def fit_contender(config: LinearEvalConfig, contender: Contender, setup: Setup) -> Entrant:
    """Fit and test all heads of an encoder or baseline.

    With folds and no clips held out, each head's validation metric is its mean over the inner folds.
    """
    heads, sets = contender.heads, contender.sets
    rounds = make_rounds(config, sets)
    by_fold = bool(config.folds) and not config.data.hold_out and len(heads) > 1
    inner = inner_scores(heads, sets, setup) if by_fold else {}
    results = []
    for test, clips in rounds.items():
        fitted = fit_kinds(heads, clips.train, clips.validation, [clips.test], setup, f"Heads for {test}")
        if by_fold:
            fitted = [result._replace(validation=value) for result, value in zip(fitted, inner[test], strict=True)]
        results.append(fitted)
    return Entrant(contender.name, heads, results, by_fold)


def fit_and_report(
    config: LinearEvalConfig, encoder: FrozenEncoder, contenders: list[Contender], setup: Setup
) -> None:
    """Fit the heads, test them, write all files and print a summary."""
    labels, problem_type = encoder.task.labels, encoder.task.problem_type
    started = time.perf_counter()
    entrants = [fit_contender(config, contender, setup) for contender in contenders]
    own, sets = entrants[0], contenders[0].sets
    rounds = make_rounds(config, sets)
    extraction = sum(contender.seconds for contender in contenders)
    seconds = {"features": round(extraction, 2), "heads": round(time.perf_counter() - started, 2)}

    best = own.chosen()
    chosen = dict(zip(rounds, own.chosen_results(), strict=True))
    metric, metric_name = next(iter(MAIN_METRICS[problem_type].items()))
    encoder_name, protocol = name_of_encoder(config), protocol_of(config)
    short_name = short_name_of(config)
    no_model = why_no_model(best.head, has_folds=bool(config.folds))
    sizes = {test: {name: len(part) for name, part in clips._asdict().items()} for test, clips in rounds.items()}
    facts = common_facts(config) | {
        "num_clips": sizes,
        "num_classes": len(labels),
        "skipped": {name: features.skipped for name, features in sets.items()},
        "metric": metric,
        "chosen_by": how_chosen(own, config),
        "best_head": best.as_full_row(metric),
        "best_head_model": no_model or "model/",
        "heads": [row.as_full_row(metric) for row in own.table()],
        "best_heads": [
            {"encoder": entrant.name, "among": kind or "all kinds"} | entrant.chosen(kind).as_full_row(metric)
            for entrant in entrants
            for kind in (None, *entrant.kinds)
        ],
        "places": [
            {"encoder": entrant.name} | row.as_full_row(metric)
            for entrant in entrants
            for row in entrant.table_of_places()
        ],
        "seconds": seconds,
        "features": {name: str(features.folder) for name, features in sets.items()},
    }

    out, files = config.output_dir, []
    for rival in get_args(Rival):
        remove(out / rival)
    for rival, entrant, contender in zip(dict.fromkeys(config.compare), entrants[1:], contenders[1:], strict=True):
        tests = make_rounds(config, contender.sets).items()
        for (test, clips), result in zip(tests, entrant.chosen_results(), strict=True):
            title = f"{entrant.name}: {result.head}, split {test}"
            place = out / rival / test if config.folds else out / rival
            rival_facts = common_facts(config) | {"model": entrant.name, "head": str(result.head)}
            files += write_results(place, evaluate_head(result, clips.test, encoder), title, rival_facts)
    evaluations = {}
    for test, clips in rounds.items():
        evaluations[test] = evaluate_head(chosen[test], clips.test, encoder)
        title = f"{short_name}: linear evaluation ({config.mode}), {chosen[test].head}, split {test}"
        files += write_results(out / test if config.folds else out, evaluations[test], title, facts)
    if config.folds:
        write_text(out / "results.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        files.append(out / "results.json")
    title = f"{short_name}: linear evaluation ({config.mode})"
    remove_sweep(out)
    remove_comparison(out)
    plain = [row for row in own.table() if row.head.kind == "linear" and not row.head.setting]
    if len(plain) > 1:
        files += write_sweep(out, plain, metric, metric_name, title)
    if len(own.heads) > 1 or len(entrants) > 1:
        files += write_comparison(out, entrants, metric, metric_name, title, how_chosen(own, config))
    if no_model is not None:
        remove(out / "model")
    else:
        (result,) = chosen.values()
        write_model(out / "model", encoder.model, encoder.feature_extractor, result, encoder_name, protocol)
        if config.test_split is not None:
            data = evaluation_data(config.data, config.validation_source, config.test_split)
            results_of_card = card_results(data, evaluations[config.test_split])
            write_results_to_card(out / "model", results_of_card, replaced=set())
        files.append(out / "model")
    trained = [f"  AdamW, learning rate {config.head.learning_rate:g}, {config.head.epochs} epochs"]
    if not {"linear", "layers"} & set(config.head.kinds):
        trained = []
    counts = ", ".join(" + ".join(f"{n:,}" for n in size.values()) for size in sizes.values())
    num_heads = sum(len(entrant.heads) for entrant in entrants)
    print(
        f"Linear evaluation of {encoder_name} on {config.data.source}",
        f"  {protocol}",
        *trained,
        f"  {len(labels)} classes; clips to train, validate and test with: {counts}",
        f"  features {seconds['features']} s, {num_heads} head{'s' * (num_heads > 1)} {seconds['heads']} s",
        *summary_of(entrants, best, metric_name, list(rounds), how_chosen(own, config)),
        *([no_model] if no_model else []),
        *files,
        sep="\n",
    )


def how_chosen(entrant: Entrant, config: LinearEvalConfig) -> str:
    """Return a sentence that says how the head of an encoder was chosen."""
    if entrant.by_round:
        return (
            "For each test fold, cross-validation over the other folds chooses the head; the test fold has no part in "
            "the choice."
        )
    if entrant.rounds[0][0].validation is None:
        return "There is one head and no choice."
    return "The mean metric on the validation clips chooses the head."


def summary_of(
    entrants: list[Entrant], best: HeadSummary, metric_name: str, tests: list[str], sentence: str
) -> list[str]:
    """Return the printed tables: the encoder's heads, the choice, and the best head of each encoder and kind.

    Args:
        entrants: The encoder and its rivals.
        best: The chosen head of the encoder.
        metric_name: Display name of the metric.
        tests: Name of each round's test split.
        sentence: How heads were chosen.
    """
    own = entrants[0]
    rows = own.table_of_places()
    marked = None if own.by_round else next(row for row in rows if row.head == best.head)
    lines = table_of(rows, metric_name, marked) if len(rows) <= MAX_PRINTED_HEADS else []
    if own.by_round:
        lines += [f"  {sentence}"]
        folds = zip(tests, best.heads, best.tests, strict=True)
        lines += [f"    {test}: {head}, test {value:.4f}" for test, head, value in folds]
    if len(entrants) > 1 or len(own.kinds) > 1:
        lines.append(f"  best by validation{'':<34}{'validation':>10}  {'test ' + metric_name:>13}")
        for entrant in entrants:
            for kind in [None, *(entrant.kinds if len(entrant.kinds) > 1 else [])]:
                row = entrant.chosen(kind)
                name = f"{entrant.name}, {'all kinds' if kind is None else kind}"
                lines.append(f"    {name:<50}{number(row.validation):>10}  {row.test:>13.4f}{spread(row)}")
    return lines


def evaluate_head(result: HeadResult, test: Clips, encoder: FrozenEncoder) -> Evaluation:
    """Return the full evaluation of a fitted head on the test clips."""
    labels = encoder.task.labels
    targets = labels.encode(test.column("labels"))
    predictions = Predictions(test.column("ids"), result.predict(test).numpy(), targets.numpy(), test.groups())
    return Evaluation.of(predictions, encoder.task.problem_type, labels.names, test.group_column)
