"""Linear evaluation by the published protocol: fine-tuning with a frozen encoder."""

import json
import statistics
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import set_seed

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMModel
from modeling_sslam.common.files import write_text
from modeling_sslam.common.signals import StopRequest
from training.evaluation.results import Evaluation
from training.finetune import FinetuneConfig, finetune
from training.linear.config import LinearEvalConfig
from training.linear.facts import check_results_dir, common_facts, name_of_encoder, protocol_of
from training.linear.results import save_folder
from training.run.config import TrainingError
from training.run.processes import join_processes


def evaluate_as_published(config: LinearEvalConfig, stop: StopRequest) -> None:
    """Fine-tune a head on the frozen encoder, and write results.json.

    Raises:
        TrainingError: If the settings, the model or the data are wrong, or the folder has other results.
    """
    check_results_dir(config)
    results = finetune(finetuning_from_encoder(config), stop)
    if results and join_processes().is_main_process:
        report(config, results)


def finetuning_from_encoder(config: LinearEvalConfig) -> FinetuneConfig:
    """Return the settings of the fine-tuning. Write an encoder folder if the model itself cannot be the start.

    Linear evaluation starts from a new head. The encoder of a classifier is therefore saved without its head. With
    `new_weights`, an encoder with new weights is saved.

    Raises:
        TrainingError: If the model cannot be read.
    """
    changes: dict[str, Any] = {}
    if config.poolings is not None:
        changes["classifier_pooling"] = config.poolings[0]
    try:
        architectures = SSLAMConfig.from_pretrained(config.model).architectures or ()
        if not config.new_weights and "SSLAMForAudioClassification" not in architectures:
            return replace(config.finetuning(), **changes)
        folder = config.output_dir / "encoder"
        if join_processes().is_main_process:
            feature_extractor = SSLAMFeatureExtractor.from_pretrained(config.model)
            if config.new_weights:
                set_seed(config.seed)
                encoder = SSLAMModel(SSLAMConfig.from_pretrained(config.model))
            else:
                encoder = SSLAMModel.from_pretrained(config.model, dtype=torch.float32)
            folder.parent.mkdir(parents=True, exist_ok=True)
            save_folder(folder, encoder, feature_extractor)
        join_processes().wait_for_everyone()
    except (ValueError, OSError) as error:
        raise TrainingError(f"model={config.model!r}: {' '.join(str(error).split())}") from error
    return replace(config.finetuning(), model=str(folder), **changes)


def report(config: LinearEvalConfig, results: dict[str, Evaluation]) -> None:
    """Write results.json and print the metrics: by split, or by fold with mean and standard deviation."""
    metrics = {
        split: {name: evaluation.metrics[name] for name in evaluation.main_metrics}
        for split, evaluation in results.items()
    }
    if config.folds:
        columns = {name: [values[name] for values in metrics.values()] for name in next(iter(metrics.values()))}
        for word, moment in (("mean", statistics.mean), ("spread", statistics.stdev)):
            metrics[word] = {name: None if None in column else moment(column) for name, column in columns.items()}
    path = config.output_dir / "results.json"
    facts = common_facts(config) | {"metrics": metrics}
    write_text(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(
        f"Linear evaluation of {name_of_encoder(config)} on {config.data.source}", f"  {protocol_of(config)}", sep="\n"
    )
    for split, values in metrics.items():
        print(f"  {split}: {', '.join(f'{name} {value:.4f}' for name, value in values.items() if value is not None)}")
    print(path)
