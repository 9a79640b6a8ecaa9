"""The part of results.json that both modes of linear evaluation write."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training.arguments import flatten
from training.evaluation.facts import PACKAGES, dataset_facts
from training.linear.config import PROTOCOLS, LinearEvalConfig
from training.run.config import TrainingError


def name_of_encoder(config: LinearEvalConfig) -> str:
    """Return the encoder's name, as the results state it."""
    return f"{config.model}, new weights" if config.new_weights else config.model


def short_name_of(config: LinearEvalConfig) -> str:
    """Return the encoder's name for tables and titles."""
    return "/".join(Path(name_of_encoder(config)).parts[-2:])


def protocol_of(config: LinearEvalConfig) -> str:
    """Describe the mode in words."""
    start = ", which start from standardised features" if config.mode == "cached" and config.head.standardize else ""
    if config.mode == "cached" and config.head.kinds != ["linear"]:
        return PROTOCOLS["cached, kinds"].format(kinds=", ".join(config.head.kinds)) + start
    return PROTOCOLS[config.mode] + start


def common_facts(config: LinearEvalConfig) -> dict[str, Any]:
    """Return the facts that both modes write: mode, model, data, settings and versions."""
    settings = flatten(config) | flatten(config.finetuning())
    return {
        "mode": config.mode,
        "protocol": protocol_of(config),
        "model": name_of_encoder(config),
        "dataset": dataset_facts(config.data),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }


def check_results_dir(config: LinearEvalConfig) -> None:
    """Check that the output folder does not hold another evaluation's results.

    Raises:
        TrainingError: If it does.
    """
    path = config.output_dir / "results.json"
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError(f"a {type(before).__name__} instead of a table")
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} is not of an evaluation ({error}). Name another --output_dir.") from error
    facts = common_facts(config)
    for name in ("mode", "model", "dataset"):
        if before.get(name) != facts[name]:
            raise TrainingError(
                f"{path} is of another evaluation ({name} {before.get(name)}, not {facts[name]}). Name another "
                "--output_dir."
            )
