"""How much of a labelled data set a frozen encoder makes linearly separable.

    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT                        # in seconds
    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT --layers all --poolings all
    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT --random_weights true  # to compare with
    accelerate launch -m training.linear_eval --config training/configs/finetune_as20k.yaml --mode published
        --model DIR --data SOURCE --output_dir OUT

A head is the published classifier, LayerNorm and a linear layer on a clip's pooled states, with the losses of
fine-tuning. In either mode the head after its best epoch on the validation clips is what is tested.

- `--mode cached`, the fast one: every clip goes through the encoder once, as it is, and the pooled states of all
  layers stay in `cache_dir`, where further calls with the same encoder and data find them. Heads are fitted on these,
  those of a sweep over layers and poolings all at once. The first part may be launched on many devices.
- `--mode published`: the encoder is frozen, but computes every clip anew in every epoch, augmented as in fine-tuning.

The settings are those of `training.finetune`, whose configurations it takes: of them hold classes, splits, frames,
architecture and, in the published mode, augmentation, loss and batch size. Learning rate, epochs and the rest of how a
head is fitted are those of the section `head`.

OUT gets results.json, which names the mode as does all that is printed, and model/, the encoder with its head for
`pipeline("audio-classification")`. The fast mode also writes tables and pictures of the best head (by validation) by
class and group, and of a sweep sweep.csv and sweep.png; the published mode all that fine-tuning does.
"""

import json
import logging
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from tqdm.contrib.logging import logging_redirect_tqdm

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.common.files import write_text
from modeling_sslam.common.signals import StopRequest
from training.arguments import flatten
from training.data.config import DataConfig, DataError
from training.data.labels import LabelSet
from training.data.sources import open_source
from training.evaluation.card import write_results_to_card
from training.evaluation.facts import PACKAGES, card_results, dataset_facts
from training.evaluation.prediction import Predictions
from training.evaluation.results import MAIN_METRICS, Evaluation, write_results
from training.finetune import FinetuneConfig, evaluation_data, finetune, make_classifier, settle
from training.linear.clips import Round, make_rounds
from training.linear.config import ALL_POOLINGS, PROTOCOLS, LinearEvalConfig
from training.linear.features import FEATURE_POOLINGS, FeatureSet, cached_features
from training.linear.heads import DEFAULT_LOSS, METRICS, Head, fit_heads, head_logits
from training.linear.results import (
    HeadResult,
    HeadSummary,
    remove_sweep,
    save_folder,
    table_of,
    why_no_model,
    write_model,
    write_sweep,
)
from training.run.config import TrainingError
from training.run.processes import join_processes
from training.run.run import accelerator_of, run_program

logger = logging.getLogger(__name__)

REMEDIES = {
    "validation": " (--data.hold_out 0.1 validates with a tenth of the training clips)",
    "test": " (--test_split null reports on the validation clips)",
}
# Of features and logits in memory at once; a sweep that needs more is fitted in parts.
MAX_BYTES_IN_MEMORY = 4 * 2**30


def main(argv: Sequence[str] | None = None) -> None:
    run_program(LinearEvalConfig, linear_eval, argv, __doc__)


def linear_eval(config: LinearEvalConfig, stop: StopRequest) -> None:
    """One linear evaluation, from the model's folder to the files."""
    if config.mode == "published":
        evaluate_as_published(config, stop)
    else:
        # What is under way has nothing to save: signals end it as usual.
        stop.__exit__()
        evaluate_cached(config)


def evaluate_as_published(config: LinearEvalConfig, stop: StopRequest) -> None:
    """Fine-tuning with a frozen encoder."""
    check_results_dir(config)
    model = config.model
    try:
        architectures = SSLAMConfig.from_pretrained(model).architectures or ()
        if config.random_weights or "SSLAMForAudioClassification" in architectures:
            # A linear evaluation starts from a new head, also where the model has one.
            model = str(config.output_dir / "encoder")
            if join_processes().is_main_process:
                feature_extractor = SSLAMFeatureExtractor.from_pretrained(config.model)
                encoder = SSLAMModel.from_pretrained(config.model, dtype=torch.float32)
                encoder = new_weights(encoder, config) if config.random_weights else encoder
                save_folder(Path(model), encoder, feature_extractor)
            join_processes().wait_for_everyone()
    except (ValueError, OSError) as error:
        raise TrainingError(f"model={config.model!r}: {' '.join(str(error).split())}") from error
    settings = {item.name: getattr(config, item.name) for item in fields(FinetuneConfig)} | {"model": model}
    if config.poolings is not None:
        settings["classifier_pooling"] = config.poolings[0]
    results = finetune(FinetuneConfig(**settings), stop)
    if not (results and join_processes().is_main_process):
        return
    metrics = {
        split: {name: evaluation.metrics[name] for name in evaluation.main_metrics}
        for split, evaluation in results.items()
    }
    encoder_name = name_of_encoder(config)
    if config.folds:
        columns = {name: [values[name] for values in metrics.values()] for name in next(iter(metrics.values()))}
        for word, moment in (("mean", statistics.mean), ("spread", statistics.stdev)):
            metrics[word] = {name: None if None in column else moment(column) for name, column in columns.items()}
    facts = common_facts(config, encoder_name) | {"metrics": metrics}
    write_text(config.output_dir / "results.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(f"Linear evaluation of {encoder_name} on {config.data.source}", f"  {protocol_of(config)}", sep="\n")
    for split, values in metrics.items():
        print(f"  {split}: {', '.join(f'{name} {value:.4f}' for name, value in values.items() if value is not None)}")
    print(config.output_dir / "results.json")


def evaluate_cached(config: LinearEvalConfig) -> None:
    """Features, heads, results."""
    accelerator = accelerator_of(config)
    if config.folds:
        # For the classes, which are those of all folds.
        config = replace(config, data=replace(config.data, split="+".join(config.folds)))
    check_results_dir(config)
    config, labels = settle(config)
    model, feature_extractor = make_classifier(config, labels, None)
    if config.random_weights:
        model.sslam = new_weights(model.sslam, config)
    model.eval().requires_grad_(False).to(accelerator.device)
    heads = chosen_heads(config, model.config)

    started = time.perf_counter()
    sets = {}
    for part, data in splits_of(config).items():
        try:
            with logging_redirect_tqdm():
                sets[part] = cached_features(
                    model.sslam,
                    feature_extractor,
                    open_source(data),
                    config.cache_dir,
                    accelerator,
                    batch_size=config.batch_size,
                    dtype=config.cache_dtype,
                )
        except (ValueError, FileNotFoundError) as error:
            where = f"data.source={data.source!r}, split {data.split!r}"
            raise TrainingError(f"{where}: {error}{REMEDIES.get(part, '')}") from error
    if not config.folds:
        check_apart(sets)
    seconds = time.perf_counter() - started
    # Heads are small: one device fits them sooner than it could share them out.
    if accelerator.is_main_process:
        fit_and_report(config, model, feature_extractor, heads, sets, labels, seconds)


def check_apart(sets: dict[str, FeatureSet]) -> None:
    """Raises:
    TrainingError: If a part has clips of the first, as the splits of a folder that has none do.
    """
    (_, train), *others = sets.items()
    rows = {id_: row for row, id_ in enumerate(train.ids)}
    for name, part in others:
        # In some data sets clips of different splits share their names.
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


def new_weights(encoder: SSLAMModel, config: LinearEvalConfig) -> SSLAMModel:
    """An encoder of the same architecture that has learnt nothing."""
    set_seed(config.seed)
    return SSLAMModel(encoder.config)


def name_of_encoder(config: LinearEvalConfig) -> str:
    return f"{config.model}, new weights" if config.random_weights else config.model


def splits_of(config: LinearEvalConfig) -> dict[str, DataConfig]:
    """What takes part, by fold or by what it is for; of the training split also the clips that are held out."""
    training = replace(config.data, hold_out=0.0, held_out=False)
    if config.folds:
        return {fold: replace(training, split=fold) for fold in config.folds}
    names = {"validation": None if config.data.hold_out else config.validation_split, "test": config.test_split}
    others = {part: evaluation_data(config, name) for part, name in names.items() if name is not None}
    return {"train": training} | {part: replace(data, hold_out=0.0, held_out=False) for part, data in others.items()}


def protocol_of(config: LinearEvalConfig) -> str:
    """In words."""
    start = ", which start from standardised features" if config.mode == "cached" and config.head.standardize else ""
    return PROTOCOLS[config.mode] + start


def common_facts(config: LinearEvalConfig, encoder_name: str) -> dict[str, Any]:
    """What results.json says in either mode."""
    return {
        "mode": config.mode,
        "protocol": protocol_of(config),
        "model": encoder_name,
        "dataset": dataset_facts(config.data),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in flatten(config).items()},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }


def check_results_dir(config: LinearEvalConfig) -> None:
    """Raises:
    TrainingError: If the folder holds another evaluation's results, which this one would mix with its own.
    """
    path = config.output_dir / "results.json"
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    facts = common_facts(config, name_of_encoder(config))
    for name in ("mode", "model", "dataset"):
        if before.get(name) != facts[name]:
            raise TrainingError(
                f"{path} is of another evaluation ({name} {before.get(name)}, not {facts[name]}); name another "
                "--output_dir."
            )


def chosen_heads(config: LinearEvalConfig, encoder: SSLAMConfig) -> list[Head]:
    """The heads that `layers` and `poolings` ask for, layer by layer.

    Raises:
        TrainingError: If there is no such layer or pooling, or several heads but nothing to choose among them by.
    """
    last, layers, poolings = encoder.num_hidden_layers, [], []
    for name in config.layers:
        if not (name in ("all", "last") or (name.isdecimal() and int(name) <= last)):
            raise TrainingError(f"layers: {name!r} is not one of 0 to {last}, last, all.")
        layers += range(last + 1) if name == "all" else [last if name == "last" else int(name)]
    for name in config.poolings or [encoder.classifier_pooling]:
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
    model: SSLAMForAudioClassification,
    feature_extractor: SSLAMFeatureExtractor,
    heads: list[Head],
    sets: dict[str, FeatureSet],
    labels: LabelSet,
    extraction_seconds: float,
) -> None:
    """Fits the heads on cached features, tests them, writes all files and prints what came out.

    Args:
        model: With the encoder that the features are of; its head counts for nothing.
    """
    started = time.perf_counter()
    problem_type, eps = model.config.problem_type, model.config.classifier_norm_eps
    rounds = make_rounds(config, sets)
    results = {
        test: evaluate_round(config, heads, clips, labels, model, description=f"Heads for {test}")
        for test, clips in rounds.items()
    }
    seconds = {"features": round(extraction_seconds, 2), "heads": round(time.perf_counter() - started, 2)}

    table = [HeadSummary.of([part[i] for part in results.values()]) for i in range(len(heads))]
    # The first of equals; the only one where there is no validation.
    chosen = max(range(len(heads)), key=lambda i: table[i].validation or 0.0)
    best = heads[chosen]
    metric, metric_name = next(iter(MAIN_METRICS[problem_type].items()))
    encoder_name, protocol = name_of_encoder(config), protocol_of(config)
    short_name = "/".join(Path(encoder_name).parts[-2:])
    no_model = why_no_model(best, has_folds=bool(config.folds))
    sizes = {test: {name: len(part) for name, part in clips._asdict().items()} for test, clips in rounds.items()}
    facts = common_facts(config, encoder_name) | {
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
    for test, clips in rounds.items():
        logits = head_logits(clips.test.pooled(best), results[test][chosen].state, eps)
        targets = labels.encode(clips.test.column("labels"))
        predictions = Predictions(clips.test.column("ids"), logits.numpy(), targets.numpy(), clips.test.groups())
        evaluation = Evaluation.of(predictions, problem_type, labels.names, clips.test.group_column)
        title = f"{short_name}: linear evaluation ({config.mode}), {best}, split {test}"
        files += write_results(out / test if config.folds else out, evaluation, title, facts)
    if config.folds:
        write_text(out / "results.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        files.append(out / "results.json")
    remove_sweep(out)
    if len(heads) > 1:
        files += write_sweep(out, table, metric, metric_name, f"{short_name}: linear evaluation ({config.mode})")
    shutil.rmtree(out / "model", ignore_errors=True)
    if no_model is None:
        (result,) = (part[chosen] for part in results.values())
        write_model(out / "model", model, feature_extractor, result, encoder_name, protocol)
        if config.test_split is not None:
            data = evaluation_data(config, config.test_split)
            write_results_to_card(out / "model", card_results(data, evaluation), replaced=set())
        files.append(out / "model")
    clips = ", ".join(" + ".join(f"{n:,}" for n in size.values()) for size in sizes.values())
    print(
        f"Linear evaluation of {encoder_name} on {config.data.source}",
        f"  {protocol}",
        f"  AdamW, learning rate {config.head.learning_rate:g}, {config.head.epochs} epochs",
        f"  {len(labels)} classes; clips to train, validate and test with: {clips}",
        f"  features {seconds['features']} s, {len(heads)} head{'s' * (len(heads) > 1)} {seconds['heads']} s",
        *table_of(table, metric_name, best),
        *([no_model] if no_model else []),
        *files,
        sep="\n",
    )


def evaluate_round(
    config: LinearEvalConfig,
    heads: list[Head],
    clips: Round,
    labels: LabelSet,
    model: SSLAMForAudioClassification,
    description: str,
) -> list[HeadResult]:
    """Fits all heads on the training clips, chooses their epochs by the validation clips, and tests them."""
    settings, device = model.config, model.device
    targets = [labels.encode(part.column("labels")).to(device) for part in clips]
    check_targets(targets, settings.problem_type)
    results = {}
    for part in parts_that_fit(heads, sum(map(len, clips)), settings.hidden_size + len(labels)):
        features = [torch.stack([split.pooled(head) for head in part]).to(device) for split in clips]
        fitted = fit_heads(
            features[0],
            targets[0],
            (features[1], targets[1]) if len(clips.validation) else None,
            settings.problem_type,
            config.head,
            eps=settings.classifier_norm_eps,
            std=settings.initializer_range,
            loss=config.loss or DEFAULT_LOSS[settings.problem_type],
            label_smoothing=config.label_smoothing,
            seed=config.seed,
            description=description,
        )
        if not (finite := fitted.losses.isfinite().all(0)).all():
            raise TrainingError(
                f"The loss of the head on {part[finite.int().argmin()]} is not finite; lower head.learning_rate."
            )
        with torch.no_grad():
            scores = METRICS[settings.problem_type](fitted.heads(features[2]), targets[2]).tolist()
        for i, head in enumerate(part):
            state = {name: value.cpu() for name, value in fitted.heads.classifier_state(i).items()}
            epoch = fitted.best_epochs[i]
            validation = None if fitted.scores is None else fitted.scores[i]
            results[head] = HeadResult(head, epoch, fitted.losses[epoch - 1, i].item(), validation, scores[i], state)
    return [results[head] for head in heads]


def check_targets(targets: Sequence[torch.Tensor], problem_type: str) -> None:
    """Raises:
    DataError: If training, validation or test clips have no label, or not one each where they should.
    """
    for name, part in zip(Round._fields, targets, strict=True):
        if len(part) and not part.any():
            raise DataError(f"None of the {len(part)} {name} clips has a label.")
        odd = (part.sum(1) != 1).sum().item()
        if problem_type == "single_label_classification" and odd:
            raise DataError(
                f"{odd} of the {len(part)} {name} clips do not have one label each; is problem_type multi?"
            )


def parts_that_fit(heads: list[Head], num_clips: int, values_per_clip: int) -> list[list[Head]]:
    """The heads in lists of one width each, whose features and logits fit into memory together."""
    parts: list[list[Head]] = []
    for head in sorted(heads, key=lambda head: len(head.columns)):
        size = (len(parts[-1]) + 1) * num_clips * values_per_clip * len(head.columns) * 4 if parts else 0
        if parts and len(parts[-1][0].columns) == len(head.columns) and size <= MAX_BYTES_IN_MEMORY:
            parts[-1].append(head)
        else:
            parts.append([head])
    return parts


if __name__ == "__main__":
    main()
