"""Facts about evaluated data, for results files, titles and model cards."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from training.data.config import DataConfig
from training.evaluation.card import TASK
from training.evaluation.results import Evaluation

# Packages whose versions results files list.
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn", "numpy")


def dataset_name(data: DataConfig) -> str:
    """Return a short name of the data: the last part of an id or a path, and the configuration."""
    path = Path(data.source).expanduser().resolve()
    return (path.stem if path.is_file() else path.name) + (f"-{data.config_name}" if data.config_name else "")


def split_name(data: DataConfig) -> str:
    """Return the split's name, or the name of its held-out or kept part."""
    return data.split + ("-held-out" if data.held_out else "-kept" if data.hold_out else "")


def describe(data: DataConfig) -> str:
    """Return data and split in words."""
    return f"{dataset_name(data)}, split {split_name(data)}"


def dataset_facts(data: DataConfig) -> dict[str, Any]:
    """Return the settings that identify the data."""
    path = Path(data.source).expanduser()
    keys = ("config_name", "split", "hold_out", "held_out", "revision", "data_files")
    return {"source": str(path.resolve()) if path.exists() else data.source} | {
        key: getattr(data, key) for key in keys
    }


def card_results(data: DataConfig, evaluation: Evaluation) -> list[EvalResult]:
    """Return the main metrics as entries of the Hub's `model-index`, without those that are undefined."""
    is_local = Path(data.source).expanduser().exists()
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset_name(data) if is_local else data.source,
            dataset_name=dataset_name(data),
            dataset_config=data.config_name,
            dataset_split=split_name(data),
            dataset_revision=data.revision,
            metric_type=metric,
            metric_name=name,
            metric_value=evaluation.metrics[metric],
        )
        for metric, name in evaluation.main_metrics.items()
        if evaluation.metrics[metric] is not None
    ]
