"""Settings of the study of small encoders, read from a YAML file."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from examples.steps.step import Options
from modeling_sslam.common.files import write_text

DEFAULT_FILE = Path(__file__).with_name("study.yaml")
SETTINGS_FILE = "study.json"


@dataclass(frozen=True)
class Recipe:
    """Options of the programs that make and fine-tune an encoder.

    Attributes:
        pretraining: Options of `training.pretrain`.
        finetuning: Options of `training.finetune`.
    """

    pretraining: Options
    finetuning: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Settings of the study.

    Attributes:
        seeds: Seeds. Every recipe runs once with each of them.
        recipes: The recipes by name.
        tests: Options of `training.linear_eval` that name the data of a test, by the name of the test.
        probes: Options of `training.linear_eval` for all tests.
        finetuned_on: The test whose data and folds also fine-tune each encoder; `None` for no fine-tuning.
        curve_seeds: Seeds whose checkpoints are all tested.
    """

    seeds: tuple[int, ...]
    recipes: dict[str, Recipe]
    tests: dict[str, Options]
    probes: Options
    finetuned_on: str | None = None
    curve_seeds: tuple[int, ...] = ()


def read_study(path: Path) -> Study:
    """Read the settings of a study.

    Raises:
        ValueError: If the file cannot be read, or a setting is missing, unknown or wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        return make_study(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_study(content: Any) -> Study:
    """Return the settings of a study from the content of its file.

    Raises:
        ValueError: If a setting is missing, unknown or wrong.
    """
    check_keys(content, Study, "the settings")
    for part in ("recipes", "tests"):
        check_names(content[part], part)
    for name, recipe in content["recipes"].items():
        check_keys(recipe, Recipe, f"recipes.{name}")
        for part, options in recipe.items():
            check_options(options, f"recipes.{name}.{part}")
    for name, options in content["tests"].items():
        check_options(options, f"tests.{name}")
    check_options(content["probes"], "probes")
    for part in ("seeds", "curve_seeds"):
        check_seeds(content.get(part, []), part)
    recipes = {name: Recipe(**recipe) for name, recipe in content["recipes"].items()}
    seeds, curve_seeds = tuple(content["seeds"]), tuple(content.get("curve_seeds", []))
    study = Study(**content | {"seeds": seeds, "recipes": recipes, "curve_seeds": curve_seeds})
    if not seeds:
        raise ValueError("seeds is empty; name at least one seed")
    if others := set(curve_seeds) - set(seeds):
        raise ValueError(f"curve_seeds={list(curve_seeds)} has {others.pop()}, which must also be one of seeds")
    poolings = study.probes.get("poolings")
    if not (isinstance(poolings, list) and poolings) or "all" in poolings:
        raise ValueError(f"probes.poolings={poolings!r} must be a list of poolings without all, such as [mean, max]")
    if study.finetuned_on is not None:
        if study.finetuned_on not in study.tests:
            raise ValueError(f"finetuned_on={study.finetuned_on} must be one of tests: {', '.join(study.tests)}")
        if "folds" not in study.tests[study.finetuned_on]:
            raise ValueError(f"finetuned_on={study.finetuned_on} names a test without folds; give it folds")
    return study


def check_keys(content: Any, kind: type, where: str) -> None:
    """Raise ValueError unless a mapping has the fields of a dataclass as keys. Fields with a default may be absent."""
    names = {item.name for item in fields(kind)}
    required = {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
    if not isinstance(content, dict) or not required <= set(content) <= names:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{where} must have the keys {', '.join(sorted(names))}, and has {found}")


def check_names(content: Any, where: str) -> None:
    """Raise ValueError unless a mapping has at least one key and all keys can be names of folders."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{where}={content!r} must have an entry for each name, and at least one")
    for name in content:
        # Dots are excluded because the names of the study's own files have one.
        if not (isinstance(name, str) and re.fullmatch(r"\w[\w+ -]*", name)):
            raise ValueError(
                f"{where} has the name {name!r}; a name is a folder and has letters, digits, +, -, _ and spaces"
            )


def check_options(content: Any, where: str) -> None:
    """Raise ValueError unless a mapping has values, or lists of values, by the names of options."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}={content!r} must be options with their values, such as batch_size: 16")
    for name, value in content.items():
        if isinstance(value, dict):
            raise ValueError(f"{where}.{name} is a section; write its options with dots, such as data.source: FOLDER")


def check_seeds(content: Any, where: str) -> None:
    """Raise ValueError unless a list has different integers."""
    is_list = isinstance(content, list) and all(type(seed) is int for seed in content)
    if not is_list or len(set(content)) < len(content):
        raise ValueError(f"{where}={content!r} must be a list of different integers, such as [0, 1]")


def record_settings(out: Path, study: Study, options: Sequence[str]) -> None:
    """Record the settings of a study in its folder. Recipes, tests and seeds may be added later.

    Args:
        out: Folder of the study.
        study: Its settings.
        options: Further words of the command line of pre-training and fine-tuning.

    Raises:
        ValueError: If a setting differs from the one that an earlier start recorded.
    """
    path = out / SETTINGS_FILE
    now = {f"recipes.{name}": recipe_with_files(recipe) for name, recipe in study.recipes.items()}
    now |= {f"tests.{name}": options for name, options in study.tests.items()}
    now |= {f"curve_seeds: {seed}": seed in study.curve_seeds for seed in study.seeds}
    now |= {"probes": study.probes} | ({"finetuned_on": study.finetuned_on} if study.finetuned_on else {})
    now["words after --"] = list(options)
    now = json.loads(json.dumps(now, default=str))
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if changed := [name for name in now if name in before and now[name] != before[name]]:
        raise ValueError(
            f"{path} has other settings of {', '.join(changed)}: the command, the file of settings or a configuration "
            "has changed since an earlier start. Restore it, use a new name for what differs, or name another OUT."
        )
    write_text(path, json.dumps(before | now, indent=1) + "\n")


def recipe_with_files(recipe: Recipe) -> dict[str, Any]:
    """Return the options of a recipe with the contents of its configuration files."""
    options: dict[str, Mapping[str, Any]] = asdict(recipe)
    files = {str(of_program["config"]) for of_program in options.values() if "config" in of_program}
    return {**options, "files": {file: yaml.safe_load(Path(file).read_text(encoding="utf-8")) for file in files}}
