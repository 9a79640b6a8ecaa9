"""Settings of the study of small encoders, read from a YAML file."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from examples.steps.step import Options

DEFAULT_FILE = Path(__file__).with_name("study.yaml")


@dataclass(frozen=True)
class Recipe:
    """How an encoder is made and fine-tuned.

    Attributes:
        pretraining: Options of `training.pretrain`.
        finetuning: Options of `training.finetune`.
    """

    pretraining: Options
    finetuning: Options


@dataclass(frozen=True)
class Study:
    """Settings of the study.

    Attributes:
        seeds: Each is the seed of one run of everything.
        recipes: The recipes by name.
        tests: Options of `training.linear_eval` that name the data of a test, by the name of the test.
        probes: Options of `training.linear_eval` for all tests.
        finetuned_on: The test whose data and folds also fine-tune each encoder.
        curve_seeds: Seeds whose checkpoints are all tested.
    """

    seeds: tuple[int, ...]
    recipes: dict[str, Recipe]
    tests: dict[str, Options]
    probes: Options
    finetuned_on: str
    curve_seeds: tuple[int, ...]


def read_study(path: Path) -> Study:
    """Read the settings of a study.

    Raises:
        ValueError: If the file is missing, has unknown or missing keys, or names an unknown test.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    check_keys(content, Study, str(path))
    recipes = {}
    for name, recipe in content["recipes"].items():
        check_keys(recipe, Recipe, f"{path}: recipes.{name}")
        recipes[name] = Recipe(**recipe)
    study = Study(
        **content
        | {"seeds": tuple(content["seeds"]), "recipes": recipes, "curve_seeds": tuple(content["curve_seeds"])}
    )
    if study.finetuned_on not in study.tests:
        raise ValueError(f"{path}: finetuned_on={study.finetuned_on} must be one of tests: {', '.join(study.tests)}")
    if "folds" not in study.tests[study.finetuned_on]:
        raise ValueError(f"{path}: finetuned_on={study.finetuned_on} names a test without folds, which are needed")
    return study


def check_keys(content: Any, kind: type, where: str) -> None:
    """Raise ValueError unless a mapping has exactly the fields of a dataclass as keys."""
    names = {field.name for field in fields(kind)}
    if not isinstance(content, dict) or set(content) != names:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{where} must have the keys {', '.join(sorted(names))}, and has {found}")
