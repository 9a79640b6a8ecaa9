"""Evaluation of a classifier on a labelled split: numbers, tables and pictures.

    python -m training.evaluate --model DIR --data SOURCE [--data.split test] [--any.key value]
    accelerate launch -m training.evaluate --model DIR --data SOURCE

For clips with any number of labels: mean average precision over the classes that occur (mAP), AP and AUC per class,
mean AUC and d-prime. For clips with one label: accuracy, recall per class and the confusion matrix. The model's
`problem_type` selects one of the two; for a model without one the data decide. If the data say how many sources a clip
has (`num_sources`, or another --data.group_column), all metrics are also reported by that number.

Every clip counts once, for any number of processes. Results are written to DIR/evaluation/DATASET-SPLIT (see
`training/evaluation/results.py` for the files), and their means into the `model-index` of DIR/README.md.
"""

import json
import logging
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from safetensors import SafetensorError
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils.logging import set_verbosity_error

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification
from modeling_sslam.onednn_sslam import use_onednn
from training.arguments import parse
from training.data.config import DataError, EvaluationDataConfig
from training.data.labels import LabelSet, find_label_set
from training.data.loader import make_loader
from training.data.sources import Source, open_source
from training.evaluation.card import read_card, write_results_to_card
from training.evaluation.facts import PACKAGES, card_results, dataset_facts, dataset_name, describe, split_name
from training.evaluation.metrics import problem_type_of
from training.evaluation.prediction import predict, skipped_clips
from training.evaluation.results import MAIN_METRICS, Evaluation, summary, write_results
from training.run.config import TrainingError, plain_settings
from training.run.failure import reported
from training.run.lock import locked_by_launch
from training.run.processes import join_processes, make_accelerator

logger = logging.getLogger(__name__)


@dataclass
class EvaluateConfig:
    """All settings of an evaluation."""

    model: str = field(metadata={"help": "Folder of a classifier, or its id on the Hub."})
    data: EvaluationDataConfig
    output_dir: Path | None = field(
        default=None,
        metadata={
            "help": "Folder for the results; must be given for a model on the Hub.",
            "default": "MODEL/evaluation/DATASET-SPLIT",
        },
    )
    update_card: bool = field(
        default=True, metadata={"help": "Whether to write the results into the model folder's README.md too."}
    )
    label_file: str | None = field(
        default=None,
        metadata={
            "help": "Table index,id,name (or index,name) of the classes: for data that label clips by ids without "
            "such a table, or for a model without class names."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Clips per device and forward pass."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Overrides the precision that accelerate was launched with."}
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


class EvaluationError(Exception):
    """The evaluation cannot start or end. The message gives the reason and the remedy."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = parse(EvaluateConfig, argv, description=__doc__)
    join_processes()
    with reported(EvaluationError, TrainingError, DataError), locked_by_launch(output_dir_of(config)):
        evaluate(config)
    PartialState().destroy_process_group()


def evaluate(config: EvaluateConfig, opened: Source | None = None) -> Evaluation:
    """Evaluate a model folder and write the results. Call it in every process.

    Args:
        config: The settings.
        opened: A source that is open already. It is used if it has the data that `config` names.

    Returns:
        The evaluation, in every process.

    Raises:
        EvaluationError: If the model, the data or the places of the results do not allow it.
    """
    try:
        accelerator = make_accelerator(config.mixed_precision)
    except ValueError as error:
        raise EvaluationError(f"accelerate: {error}") from error
    set_verbosity_error()  # hides transformers' report of missing weights: load_classifier reports them

    # Check the output places before the work.
    model_dir = path if (path := Path(config.model).expanduser()).is_dir() else None
    output_dir = output_dir_of(config)
    card_dir = model_dir if config.update_card else None
    try:
        if card_dir is not None:
            read_card(card_dir)
        if accelerator.is_main_process:
            check_results_dir(output_dir, config)
    except (OSError, ValueError) as error:
        raise EvaluationError(str(error)) from error

    model, feature_extractor = load_classifier(config.model)
    try:
        source = open_source(config.data) if opened is None else opened.read_as(config.data)
        loader = make_loader(
            source,
            feature_extractor,
            batch_size=config.batch_size,
            seed=0,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            repeat=False,
        )
        labels = find_labels(config, model.config, source)
    except (ValueError, OSError) as error:
        raise EvaluationError(f"data.source={config.data.source!r}: {error}") from error

    with logging_redirect_tqdm():
        predictions = predict(use_onednn(model.to(accelerator.device)), loader, labels, accelerator)
    skipped = skipped_clips(loader)
    problem_type = problem_type_of(model.config.problem_type, predictions)
    if model.config.problem_type is None:
        reason = "Every clip has" if problem_type == "single_label_classification" else "Not every clip has"
        logger.info("The model has no problem_type. %s one label: taken for %s.", reason, problem_type)
    group_column = source.columns.group if config.data.group_column == "auto" else config.data.group_column
    evaluation = Evaluation.of(predictions, problem_type, labels.names, group_column)
    if accelerator.is_main_process:
        title = f"{'/'.join(Path(config.model).parts[-2:])} on {describe(config.data)}"
        try:
            files = write_results(output_dir, evaluation, title, facts(config, accelerator, evaluation, skipped))
            if card_dir is not None:
                results = card_results(config.data, evaluation)
                write_results_to_card(card_dir, results, set(MAIN_METRICS[problem_type]))
                files.append(card_dir / "README.md")
        except OSError as error:
            raise EvaluationError(f"The results cannot be written: {error}") from error
        print(summary(evaluation, title, skipped), "", *files, sep="\n")
    return evaluation


def load_classifier(model: str) -> tuple[SSLAMForAudioClassification, SSLAMFeatureExtractor]:
    """Load a classifier in eval mode, and its feature extractor, from a folder or the Hub.

    Raises:
        EvaluationError: If they cannot be read, or the weights do not include a classifier.
    """
    try:
        # transformers annotates the model alone, without the loading information.
        loaded: Any = SSLAMForAudioClassification.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        classifier, loading = loaded
        feature_extractor = SSLAMFeatureExtractor.from_pretrained(model)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EvaluationError(f"model={model!r}: {' '.join(str(error).split())}") from error
    if loading["missing_keys"] or loading.get("mismatched_keys"):
        raise EvaluationError(
            f"model={model!r} has weights without a classifier, which would be random. Fine-tune it first, with "
            "training.finetune or training.linear_eval."
        )
    return classifier.eval(), feature_extractor


def find_labels(config: EvaluateConfig, model_config: Any, source: Source) -> LabelSet:
    """Return the model's classes, with the ids that the data may use for them.

    Raises:
        ValueError: If the label file cannot be read.
    """
    labels = LabelSet.of_model(model_config)
    table = find_label_set(source, config.label_file)
    if table is None:
        return labels
    is_unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in labels.names)
    if config.label_file is not None and is_unnamed and len(table) == len(labels):
        logger.info("The model has no names for its classes: taken in the order of %s.", config.label_file)
        return table
    ids: list[str | None] = [None] * len(labels)
    for id_, k in table.index.items():
        if id_ != table.names[k] and table.names[k] in labels.index:
            ids[labels.index[table.names[k]]] = id_
    return LabelSet(labels.names, ids)


def output_dir_of(config: EvaluateConfig) -> Path:
    """Return the folder for the results.

    Raises:
        EvaluationError: If none is given and the model is not a folder.
    """
    if config.output_dir is not None:
        return config.output_dir
    model_dir = Path(config.model).expanduser()
    if not model_dir.is_dir():
        raise EvaluationError(
            f"model={config.model!r} is not a folder. If it is an id on the Hub, name a folder for the results by "
            "--output_dir."
        )
    name = re.sub(r"[^\w.+-]+", "_", f"{dataset_name(config.data)}-{split_name(config.data)}")
    return model_dir / "evaluation" / name


def check_results_dir(folder: Path, config: EvaluateConfig) -> None:
    """Check that results can be written into a folder.

    Raises:
        OSError: If it cannot be made or written to.
        ValueError: If it holds results on other data.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise OSError(f"The results cannot be put into {folder}: {place} is not a folder that may be written to.")
    if not (folder / "results.json").is_file():
        return
    try:
        before = json.loads((folder / "results.json").read_text(encoding="utf-8"))["dataset"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/results.json is not of an evaluation; name another --output_dir.") from error
    if before != dataset_facts(config.data):
        raise ValueError(
            f"{folder} holds results on other data ({', '.join(f'{k} {v}' for k, v in before.items() if v)}); name "
            "another folder by --output_dir."
        )


def facts(
    config: EvaluateConfig, accelerator: Accelerator, evaluation: Evaluation, skipped: dict[str, int]
) -> dict[str, Any]:
    """Return the content of results.json besides the metrics."""
    return {
        "model": config.model,
        "dataset": dataset_facts(config.data),
        "evaluated_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "num_clips": len(evaluation.predictions.ids),
        "num_skipped": sum(skipped.values()),
        "skipped": skipped,
        "num_classes": len(evaluation.names),
        "precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "settings": plain_settings(config),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }


if __name__ == "__main__":
    main()
