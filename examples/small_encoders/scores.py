"""Scores of the finished steps, gathered from their results files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from examples.small_encoders.settings import Study
from examples.small_encoders.steps import (
    ENCODERS,
    FOREST,
    NEW_WEIGHTS,
    PRETRAINED,
    curve_results,
    finetuning_results,
    probe_results,
)

BEST = "best head"
FINETUNED = "fine-tuned"
# The main metric of clips with one label, and of clips with any number.
MAIN_METRICS = {"accuracy", "map"}


class Score(NamedTuple):
    """A metric of an encoder on a test.

    Attributes:
        recipe: The recipe.
        seed: The seed.
        update: Update of pre-training; 0 for rivals, `None` for the end.
        encoder: The encoder, or `FOREST`.
        test: The test.
        head: `BEST` for the head that validation chooses, `FINETUNED`, or layer and pooling.
        metric: Name of the metric.
        value: Its value; over folds the mean.
    """

    recipe: str
    seed: int
    update: int | None
    encoder: str
    test: str
    head: str
    metric: str
    value: float


def head_name(layer: int | str, pooling: str) -> str:
    """Return the name of a head that reads a pooling of a layer, or of all layers side by side ("concat")."""
    return f"{'all layers' if layer == 'concat' else f'layer {layer}'}, {pooling}"


def layer_of(head: str) -> int | None:
    """Return the layer that a head reads; `None` if its name has none."""
    found = re.match(r"layer (\d+), ", head)
    return int(found[1]) if found else None


def gather_scores(out: Path, study: Study) -> list[Score]:
    """Read the scores of all steps that have finished."""
    return [
        score
        for recipe in study.recipes
        for seed in study.seeds
        for score in (
            *(s for test in study.tests for s in probe_scores(out, recipe, seed, test)),
            *(s for test in study.tests for s in curve_scores(out, recipe, seed, test)),
            *(finetuning_scores(out, recipe, seed, study.finetuned_on) if study.finetuned_on else ()),
        )
    ]


def probe_scores(out: Path, recipe: str, seed: int, test: str) -> Iterator[Score]:
    """Yield the scores of the heads on an encoder and on its rivals."""
    path = probe_results(out, recipe, seed, test)
    if path.exists():
        yield from head_scores(path, recipe, seed, None, test)


def curve_scores(out: Path, recipe: str, seed: int, test: str) -> Iterator[Score]:
    """Yield the scores of the heads on each checkpoint that was tested."""
    some = curve_results(out, recipe, seed, test, 0)
    for path in sorted(some.parents[1].glob(f"update-*/{some.name}")):
        yield from head_scores(path, recipe, seed, int(path.parent.name.partition("-")[2]), test)


def head_scores(path: Path, recipe: str, seed: int, update: int | None, test: str) -> Iterator[Score]:
    """Yield the scores of a results file of `training.linear_eval`."""
    found = json.loads(path.read_text(encoding="utf-8"))
    metric = found["metric"]

    def score(row: dict[str, Any], head: str) -> Score:
        name = row["encoder"]
        encoder = FOREST if name == FOREST else NEW_WEIGHTS if name.endswith(NEW_WEIGHTS) else PRETRAINED
        at = update if encoder == PRETRAINED else 0
        return Score(recipe, seed, at, encoder, test, head, metric, row[f"test_{metric}"])

    yield from (score(row, BEST) for row in found["best_heads"] if row["among"] == "all kinds")
    for row in found["places"]:
        # The tables have one kind of head, so that a layer and pooling is one score.
        if row["kind"] == "ridge":
            yield score(row, head_name(row["layer"], row["pooling"]))


def finetuning_scores(out: Path, recipe: str, seed: int, test: str) -> Iterator[Score]:
    """Yield the main metric of fine-tuning, the mean over folds."""
    for encoder in ENCODERS:
        path = finetuning_results(out, recipe, seed, encoder)
        if path.exists():
            summary = json.loads(path.read_text(encoding="utf-8"))["summary"]
            update = None if encoder == PRETRAINED else 0
            # The summary lacks a metric that a fold does not have.
            for metric in MAIN_METRICS & summary.keys():
                yield Score(recipe, seed, update, encoder, test, FINETUNED, metric, summary[metric]["mean"])
