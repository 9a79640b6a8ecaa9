"""How much of a labelled data set a frozen encoder makes linearly separable.

    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT                       # in seconds
    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT --layers all --poolings all
    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT --random_weights true # to compare with
    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT --folds fold1,fold2,fold3,fold4,fold5

A head is the published classifier, LayerNorm and a linear layer on a clip's pooled states, with the losses of
fine-tuning. In either mode it is the one after its best epoch on the validation clips that is tested.

- `--mode cached`, the fast one: every clip goes through the encoder once, as it is, and the pooled states of all
  layers stay in `cache_dir`, where further calls with the same encoder and data find them. Heads are fitted on these,
  those of a sweep over layers and poolings all at once. The first part may be launched on many devices.
- `--mode published`: the encoder is frozen, but computes every clip anew in every epoch, augmented as in fine-tuning.

OUT gets results.json, per_class.csv and pictures of the best head (by validation), of a sweep sweep.csv and sweep.png,
and model/, the encoder with that head for `pipeline("audio-classification")`.
"""

import json
import logging
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils.logging import disable_progress_bar

from modeling_sslam import SSLAMFeatureExtractor, SSLAMModel
from training.arguments import flatten, parse
from training.checkpointing import write_text
from training.data import DataConfig, DataError
from training.evaluate import PACKAGES, card_results, dataset_facts
from training.evaluation.card import write_results_to_card
from training.evaluation.results import MAIN_METRICS, Evaluation, write_results
from training.features import POOLINGS, FeatureSet, cached_features
from training.labels import LabelSet, find_label_set
from training.linear_heads import METRICS, Head, HeadConfig, fit_heads, head_logits
from training.linear_results import HeadResult, HeadSummary, table_of, why_no_model, write_model, write_sweep
from training.prediction import Predictions, ProblemType
from training.selection import HoldOut
from training.sources import open_source

logger = logging.getLogger(__name__)

CACHED_PROTOCOL = (
    "fast mode (cached): features of the frozen encoder computed once, without augmentation; linear heads fitted on "
    "them"
)
ALL_POOLINGS = (*POOLINGS, "cls+mean")
# Of features in memory at once; a sweep that needs more is fitted in parts.
MAX_BYTES_IN_MEMORY = 4 * 2**30


@dataclass
class LinearEvalConfig:
    """All settings of a linear evaluation."""

    model: str = field(
        metadata={"help": "Folder of an encoder, of whichever head (pre-training, classifier), or its id on the Hub."}
    )
    data: DataConfig
    output_dir: Path = field(metadata={"help": "Folder for the results, on a disk that all processes share."})
    head: HeadConfig
    mode: Literal["cached", "published"] = field(default="cached", metadata={"help": "See the top."})
    validation_split: str | None = field(
        default="validation",
        metadata={"help": "Split to choose the epoch and the head by; null holds out validation_fraction of data."},
    )
    validation_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share of the training clips to hold out where there is no validation split. 0: none, the last "
            "epoch counts; for a single head."
        },
    )
    test_split: str = field(default="test", metadata={"help": "Split that the results are of."})
    folds: list[str] | None = field(
        default=None,
        metadata={
            "help": "Splits of which each is the test split once, the others together the training clips, in place of "
            "the three splits above."
        },
    )
    layers: list[str] = field(
        default_factory=lambda: ["last"],
        metadata={"help": "Layers to fit heads on: 0 (the embeddings), 1 (after block 1), ..., last, or all."},
    )
    poolings: list[str] = field(
        default_factory=lambda: ["cls", "mean"],
        metadata={
            "help": f"Poolings to fit heads on: {', '.join(POOLINGS)}, concatenations such as cls+mean, or all."
        },
    )
    random_weights: bool = field(
        default=False, metadata={"help": "Evaluate new weights in the architecture of the model, to compare with."}
    )
    label_file: str | None = field(
        default=None,
        metadata={
            "help": "Table index,id,name (or index,name) of the classes, where the data bring none. Without any, the "
            "classes are the labels of the training clips."
        },
    )
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None = field(
        default=None, metadata={"help": "By default single-label if every training clip has just one."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Frames (10 ms) that clips are padded or cut to; by default the feature extractor's."},
    )
    cache_dir: Path = field(
        default=Path("runs/features"), metadata={"help": "Folder for cached features, shared by all evaluations."}
    )
    cache_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "Of cached features; float16 halves their size."}
    )
    batch_size: int = field(default=32, metadata={"help": "Clips per device and forward pass of the encoder."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Of the encoder; overrides what accelerate was launched with."}
    )
    seed: int = field(
        default=0,
        metadata={"help": "What new weights, held-out clips and the heads' start and batches follow from."},
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must be at least 0 and less than 1")
        if self.folds is not None and len(set(self.folds)) < max(2, len(self.folds)):
            raise ValueError(f"folds={self.folds} must be two or more different splits")
        if self.mode == "cached" and self.data.sample_weights is not None:
            raise ValueError("data.sample_weights has no effect on cached features; use mode=published")


class LinearEvalError(Exception):
    """The evaluation cannot start; the message says why and what to do."""


class Clips:
    """Some of the clips of some splits, with their cached features.

    Args:
        choose: Of all clips of the splits those that it chooses by name.
    """

    def __init__(self, sets: Sequence[FeatureSet], choose: Any = lambda id_: True) -> None:
        self.sets = sets
        self.rows = [np.array([choose(id_) for id_ in features.ids]).nonzero()[0] for features in sets]

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def column(self, name: str) -> list[Any]:
        """`ids`, `labels` or, if there are any, `groups` of all clips."""
        return [getattr(features, name)[i] for features, rows in zip(self.sets, self.rows, strict=True) for i in rows]

    def groups(self) -> list[Any] | None:
        """Values of the group column; `None` if the data have none."""
        return self.column("groups") if all(features.groups for features in self.sets) else None

    def pooled(self, head: Head) -> torch.Tensor:
        """float32 `(len(self), width)`."""
        parts = [
            np.asarray(features.pooled[:, head.layer, head.columns], dtype=np.float32)[rows].reshape(len(rows), -1)
            for features, rows in zip(self.sets, self.rows, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts))


class Round(NamedTuple):
    """The clips of one fit and its test; without validation that part is empty."""

    train: Clips
    validation: Clips
    test: Clips


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(LinearEvalConfig, argv, description=__doc__)
    try:
        linear_eval(config)
    except (LinearEvalError, DataError) as error:
        sys.exit(f"error: {error}")


def linear_eval(config: LinearEvalConfig) -> None:
    """One linear evaluation, from the model's folder to the files."""
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision)
    except ValueError as error:
        raise LinearEvalError(f"accelerate: {error}") from error
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.INFO if accelerator.is_main_process else logging.WARNING,
    )
    disable_progress_bar()
    encoder, feature_extractor = load_encoder(config)
    heads = chosen_heads(config, encoder.config.num_hidden_layers)
    data = replace(
        config.data,
        label_column=config.data.label_column or "auto",
        group_column=config.data.group_column or "auto",
    )
    names = config.folds or [
        split for split in (config.data.split, config.validation_split, config.test_split) if split is not None
    ]
    started = time.perf_counter()
    encoder.to(accelerator.device)
    sets = {}
    for name in names:
        try:
            with logging_redirect_tqdm():
                sets[name] = cached_features(
                    encoder,
                    feature_extractor,
                    replace(data, split=name),
                    config.cache_dir,
                    accelerator,
                    batch_size=config.batch_size,
                    dtype=config.cache_dtype,
                )
        except (ValueError, FileNotFoundError) as error:
            raise LinearEvalError(f"data.source={data.source!r}, split {name!r}: {error}") from error
    extraction_seconds = time.perf_counter() - started
    # Heads are small: one device fits them sooner than it could share them out.
    if accelerator.is_main_process:
        fit_and_report(config, data, encoder, feature_extractor, heads, sets, accelerator.device, extraction_seconds)
    accelerator.end_training()


def load_encoder(config: LinearEvalConfig) -> tuple[SSLAMModel, SSLAMFeatureExtractor]:
    """The frozen encoder, or a new one, and its feature extractor.

    Raises:
        LinearEvalError: If they cannot be read, or the folder has no weights of an encoder.
    """
    overrides = {} if config.max_length is None else {"max_length": config.max_length}
    try:
        encoder, loading = SSLAMModel.from_pretrained(config.model, dtype=torch.float32, output_loading_info=True)
        feature_extractor = SSLAMFeatureExtractor.from_pretrained(config.model, **overrides)
    except (OSError, ValueError, RuntimeError) as error:
        raise LinearEvalError(f"model={config.model!r}: {' '.join(str(error).split())}") from error
    if loading["missing_keys"] or loading.get("mismatched_keys"):
        raise LinearEvalError(f"model={config.model!r} lacks weights of the encoder, which would be random.")
    if config.random_weights:
        set_seed(config.seed)
        encoder = SSLAMModel(encoder.config)
    return encoder.eval().requires_grad_(False), feature_extractor


def chosen_heads(config: LinearEvalConfig, num_layers: int) -> list[Head]:
    """The heads that `layers` and `poolings` ask for, layer by layer.

    Raises:
        LinearEvalError: If there is no such layer or pooling, or several heads but nothing to choose among them by.
    """
    layers: list[int] = []
    for name in config.layers:
        if name == "all":
            layers += range(num_layers + 1)
        elif name == "last":
            layers.append(num_layers)
        elif name.isdigit() and int(name) <= num_layers:
            layers.append(int(name))
        else:
            raise LinearEvalError(f"layers: {name!r} is not one of 0 to {num_layers}, last, all.")
    poolings: list[str] = []
    for name in config.poolings:
        if name != "all" and not set(name.split("+")) <= set(POOLINGS):
            raise LinearEvalError(
                f"poolings: {name!r} is not one of {', '.join(POOLINGS)}, all, nor some of them joined by +."
            )
        poolings += ALL_POOLINGS if name == "all" else [name]
    heads = [Head(layer, pooling) for layer in dict.fromkeys(layers) for pooling in dict.fromkeys(poolings)]
    if len(heads) > 1 and not config.validation_fraction and (config.folds or config.validation_split is None):
        raise LinearEvalError(
            f"There are {len(heads)} heads and no validation clips to choose by: the test clips must not. Set "
            "validation_split or validation_fraction, or a single one of layers and of poolings."
        )
    return heads


def find_classes(
    config: LinearEvalConfig, data: DataConfig, train: Sequence[list[str]]
) -> tuple[LabelSet, ProblemType]:
    """The classes, and whether a clip has just one.

    Args:
        train: The labels of the training clips.

    Raises:
        DataError: If the training clips have no labels, or not one each where they should.
    """
    labels = find_label_set(data, open_source(data, num_readers=1, seed=0), config.label_file)
    if labels is None:
        labels = LabelSet(sorted({name for names in train for name in names}))
    if not any(train):
        raise DataError(
            f"None of the {len(train)} training clips has a label; name their column by data.label_column."
        )
    not_single = sum(len(names) != 1 for names in train)
    if config.problem_type == "single_label_classification" and not_single:
        raise DataError(
            f"{not_single} of {len(train)} training clips do not have one label each, as problem_type says."
        )
    inferred = "multi_label_classification" if not_single else "single_label_classification"
    return labels, config.problem_type or inferred


def make_rounds(config: LinearEvalConfig, sets: dict[str, FeatureSet]) -> dict[str, Round]:
    """The clips to train, validate and test with, by test split: one round, or one for each fold."""

    def held_out(train: list[FeatureSet]) -> tuple[Clips, Clips]:
        rest, chosen = (HoldOut(config.validation_fraction, config.seed, part) for part in (False, True))
        return Clips(train, lambda id_: rest(id_, 0)), Clips(train, lambda id_: chosen(id_, 0))

    if config.folds:
        return {
            fold: Round(*held_out([sets[name] for name in config.folds if name != fold]), Clips([sets[fold]]))
            for fold in config.folds
        }
    train, test = [sets[config.data.split]], Clips([sets[config.test_split]])
    if config.validation_split is None:
        return {config.test_split: Round(*held_out(train), test)}
    return {config.test_split: Round(Clips(train), Clips([sets[config.validation_split]]), test)}


def fit_and_report(
    config: LinearEvalConfig,
    data: DataConfig,
    encoder: SSLAMModel,
    feature_extractor: SSLAMFeatureExtractor,
    heads: list[Head],
    sets: dict[str, FeatureSet],
    device: torch.device,
    extraction_seconds: float,
) -> None:
    """Fits the heads on cached features, tests them, writes all files and prints what came out."""
    started = time.perf_counter()
    rounds = make_rounds(config, sets)
    train_labels = [labels for clips in rounds.values() for labels in clips.train.column("labels")]
    labels, problem_type = find_classes(config, replace(data, split=next(iter(sets))), train_labels)
    results = {
        test: evaluate_round(config, heads, clips, labels, problem_type, encoder, device, test)
        for test, clips in rounds.items()
    }
    seconds = {"features": round(extraction_seconds, 2), "heads": round(time.perf_counter() - started, 2)}

    table = [HeadSummary.of([part[i] for part in results.values()]) for i in range(len(heads))]
    # The first of equals; the only one where there is no validation.
    chosen = max(range(len(heads)), key=lambda i: table[i].validation or 0.0)
    best = heads[chosen]
    metric, metric_name = next(iter(MAIN_METRICS[problem_type].items()))
    encoder_name = f"{config.model}, new weights" if config.random_weights else config.model
    no_model = why_no_model(best, has_folds=bool(config.folds))
    facts = {
        "mode": config.mode,
        "protocol": CACHED_PROTOCOL,
        "model": encoder_name,
        "dataset": dataset_facts(replace(data, split="+".join(rounds))),
        "num_clips": {
            test: {name: len(part) for name, part in clips._asdict().items()} for test, clips in rounds.items()
        },
        "num_classes": len(labels),
        "skipped": {name: features.skipped for name, features in sets.items()},
        "metric": metric,
        "best_head": table[chosen].as_row(metric),
        "best_head_model": no_model or "model/",
        "heads": [row.as_row(metric) for row in table],
        "seconds": seconds,
        "features": {name: str(features.folder) for name, features in sets.items()},
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in flatten(config).items()},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }

    files: list[Path] = []
    evaluation = None
    for test, clips in rounds.items():
        logits = head_logits(clips.test.pooled(best), results[test][chosen].state, encoder.config.classifier_norm_eps)
        targets = labels.encode(clips.test.column("labels"))
        predictions = Predictions(clips.test.column("ids"), logits.numpy(), targets.numpy(), clips.test.groups())
        evaluation = Evaluation.of(predictions, problem_type, labels.names, data.group_column)
        title = f"{encoder_name}, {best}, on {test} ({config.mode} linear evaluation)"
        folder = config.output_dir / test if config.folds else config.output_dir
        files += write_results(folder, evaluation, title, facts)
    if config.folds:
        write_text(config.output_dir / "results.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        files.append(config.output_dir / "results.json")
    if len(heads) > 1:
        files += write_sweep(config.output_dir, table, metric, metric_name, f"{encoder_name}\n{CACHED_PROTOCOL}")
    if no_model is None:
        (result,) = (part[chosen] for part in results.values())
        folder = config.output_dir / "model"
        write_model(
            folder, encoder, feature_extractor, result, labels.names, problem_type, encoder_name, CACHED_PROTOCOL
        )
        write_results_to_card(folder, card_results(replace(data, split=config.test_split), evaluation), set())
        files.append(folder)
    sizes = [f"{len(clips.train)} + {len(clips.validation)} + {len(clips.test)}" for clips in rounds.values()]
    print(
        f"{encoder_name} on {config.data.source}, {len(labels)} classes",
        CACHED_PROTOCOL,
        f"training + validation + test clips: {', '.join(sizes)}",
        f"features {seconds['features']} s, {len(heads)} heads {seconds['heads']} s",
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
    problem_type: ProblemType,
    encoder: SSLAMModel,
    device: torch.device,
    description: str,
) -> list[HeadResult]:
    """Fits all heads on the training clips, chooses their epochs by the validation clips, and tests them.

    Args:
        description: Of the progress bar.
    """
    targets = [labels.encode(part.column("labels")).to(device) for part in clips]
    results = {}
    for part in parts_that_fit(heads, sum(map(len, clips)), encoder.config.hidden_size + len(labels)):
        train, validation, test = (
            torch.stack([split.pooled(head) for head in part]).to(device) if len(split) else None for split in clips
        )
        fitted = fit_heads(
            train,
            targets[0],
            None if validation is None else (validation, targets[1]),
            problem_type,
            config.head,
            eps=encoder.config.classifier_norm_eps,
            std=encoder.config.initializer_range,
            seed=config.seed,
            description=f"Heads for {description}",
        )
        with torch.no_grad():
            scores = METRICS[problem_type](fitted.heads(test), targets[2]).tolist()
        for i, head in enumerate(part):
            state = {name: value.cpu() for name, value in fitted.heads.classifier_state(i).items()}
            epoch = fitted.best_epochs[i]
            validation_score = None if fitted.scores is None else fitted.scores[i]
            loss = fitted.losses[epoch - 1, i].item()
            results[head] = HeadResult(head, epoch, loss, validation_score, scores[i], state)
    return [results[head] for head in heads]


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
