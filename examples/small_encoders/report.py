"""Tables and pictures of the study, from the steps that have finished."""

import csv
import io
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.small_encoders.scores import BEST, FINETUNED, Score, gather_scores, head_name, layer_of
from examples.small_encoders.settings import Study
from examples.small_encoders.steps import FOREST, NEW_WEIGHTS, PRETRAINED
from examples.steps.tables import cell, line
from modeling_sslam.common.files import replacing, write_text

FILES = ("scores.csv", "table.md", "curves.md", "curves.png")


def write_report(out: Path, study: Study, state: str) -> None:
    """Write all files of the report, from the steps that have finished.

    Args:
        out: Folder of the study.
        study: Its settings.
        state: State of the study, in words.
    """
    scores = gather_scores(out, study)
    if not scores:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Score._fields)
    writer.writerows(scores)
    write_text(out / "scores.csv", text.getvalue())
    write_text(out / "table.md", table(scores, study, state))
    of_curves = [score for score in scores if score.seed in study.curve_seeds]
    if any(is_on_curve(score) for score in of_curves):
        write_text(out / "curves.md", table_of_curves(of_curves, study))
        with replacing(out / "curves.png") as temporary:
            plot(of_curves, study).savefig(temporary, dpi=110)


def last_layer(scores: Iterable[Score], recipe: str) -> int:
    """Return the number of the last layer of a recipe's encoders."""
    return max((layer_of(score.head) or 0 for score in scores if score.recipe == recipe), default=0)


def poolings_of(study: Study) -> list[str]:
    """Return the poolings of the probes."""
    return values_of(study.probes["poolings"])


def heads_on_all_layers(study: Study) -> list[str]:
    """Return the name of the head that reads the last of the poolings of all layers, if the probes have it."""
    has_concat = "concat" in values_of(study.probes.get("layers", []))
    return [head_name("concat", poolings_of(study)[-1])] if has_concat else []


def values_of(option: Any) -> list[str]:
    """Return the values of an option that has one or several."""
    return list(map(str, option)) if isinstance(option, (list, tuple)) else [str(option)]


def is_on_curve(score: Score) -> bool:
    """Return whether a score is of a checkpoint, and not of a finished encoder or a rival."""
    return bool(score.update)


def select(
    scores: Iterable[Score], recipe: str, encoder: str, test: str, head: str, update: int | None = None
) -> list[float]:
    """Return the values of all seeds."""
    wanted = (recipe, encoder, test, head)
    return [s.value for s in scores if (s.recipe, s.encoder, s.test, s.head) == wanted and s.update == update]


def table(scores: Sequence[Score], study: Study, state: str) -> str:
    """Return Markdown tables in per cent: the best head on all tests, then all heads on each test."""
    metrics = {score.test: score.metric for score in scores if score.test in study.tests}
    lines = [
        f"State: {state}. Scores are means and standard deviations over seeds, in per cent. The best head is chosen "
        "without the test clips. The columns of poolings are ridge regression on the last layer, or on all layers.",
    ]
    best = {f"{test}: {metric}": (test, BEST) for test, metric in metrics.items()}
    lines += ["", "## Best head", "", *rows(scores, study, best)]
    for test, metric in metrics.items():
        heads = {BEST: BEST} | {pooling: head_name("{last}", pooling) for pooling in poolings_of(study)}
        heads |= {head: head for head in heads_on_all_layers(study)}
        heads |= {FINETUNED: FINETUNED} if test == study.finetuned_on else {}
        columns = {title: (test, head) for title, head in heads.items()}
        lines += ["", f"## {test}: {metric}", "", *rows(scores, study, columns)]
    return "\n".join(lines) + "\n"


def rows(scores: Sequence[Score], study: Study, columns: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """Yield the lines of a table: recipes and their encoders in rows.

    Args:
        scores: The scores.
        study: The settings.
        columns: By the title of a column a test and a head. "{last}" in its name stands for the last layer.
    """
    yield line(["recipe", "encoder", *columns])
    yield line(["---"] * (len(columns) + 2))
    for recipe in study.recipes:
        layer = last_layer(scores, recipe)
        for encoder in (PRETRAINED, NEW_WEIGHTS, FOREST):
            update = None if encoder == PRETRAINED else 0
            of_columns = [
                select(scores, recipe, encoder, test, head.format(last=layer), update)
                for test, head in columns.values()
            ]
            yield line([recipe, encoder, *(cell(values, len(study.seeds)) for values in of_columns)])


def table_of_curves(scores: Sequence[Score], study: Study) -> str:
    """Return a Markdown table for each recipe and test: updates in rows, heads in columns, in per cent."""
    lines = ["Scores of checkpoints by update are means over the seeds of `curve_seeds`, in per cent."]
    for recipe in study.recipes:
        layer = last_layer(scores, recipe)
        columns = [BEST, *(head_name(layer, pooling) for pooling in poolings_of(study)), *heads_on_all_layers(study)]
        for test in study.tests:
            updates = updates_of(scores, recipe, test)
            if not updates:
                continue
            lines += ["", f"## {recipe}, {test}", "", line(["updates", *columns])]
            lines.append(line(["---"] * (len(columns) + 1)))
            for update in (0, *updates):
                encoder = PRETRAINED if update else NEW_WEIGHTS
                values = [select(scores, recipe, encoder, test, head, update) for head in columns]
                cells = [cell(of_head, len(study.curve_seeds)) for of_head in values]
                lines.append(line([str(update or NEW_WEIGHTS), *cells]))
    return "\n".join(lines) + "\n"


def updates_of(scores: Iterable[Score], recipe: str, test: str) -> list[int]:
    """Return the updates whose checkpoints were tested."""
    return sorted({s.update for s in scores if s.update and s.recipe == recipe and s.test == test})


def plot(scores: Sequence[Score], study: Study) -> Figure:
    """Plot the scores of checkpoints against updates: a column for each test, and for each recipe two rows.

    The first row of a recipe has the poolings of the last layer, the second has the last pooling of each layer.
    Dotted lines are new weights.
    """
    recipes = [recipe for recipe in study.recipes if any(s.recipe == recipe and is_on_curve(s) for s in scores)]
    tests = [test for test in study.tests if any(s.test == test and is_on_curve(s) for s in scores)]
    metrics = {score.test: score.metric for score in scores}
    poolings = poolings_of(study)
    figure = Figure(figsize=(1.6 + 3 * len(tests), 0.6 + 5.2 * len(recipes)), layout="constrained")
    grid = iter(figure.subplots(2 * len(recipes), len(tests), squeeze=False))
    for recipe in recipes:
        layer = last_layer(scores, recipe)
        heads_of_rows = {
            f"layer {layer}": {BEST: BEST} | {pooling: head_name(layer, pooling) for pooling in poolings},
            poolings[-1]: {f"layer {k}": head_name(k, poolings[-1]) for k in range(layer + 1)}
            | {head: head for head in heads_on_all_layers(study)},
        }
        for name, heads in heads_of_rows.items():
            panels = next(grid)
            for axes, test in zip(panels, tests, strict=True):
                draw_curves(axes, scores, recipe, test, heads)
                axes.set_title(f"{test}: {metrics[test]}", fontsize=9)
            panels[0].set_ylabel(f"{recipe}, {name}")
            panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.supxlabel("update")
    figure.suptitle("Scores in per cent by update; dotted: new weights")
    return figure


def draw_curves(axes: Axes, scores: Sequence[Score], recipe: str, test: str, heads: Mapping[str, str]) -> None:
    """Draw a curve for each head, and a dotted line for new weights."""
    for i, (label, head) in enumerate(heads.items()):
        values = {
            update: select(scores, recipe, PRETRAINED, test, head, update)
            for update in updates_of(scores, recipe, test)
        }
        means = {update: 100 * statistics.mean(found) for update, found in values.items() if found}
        axes.plot(list(means), list(means.values()), marker=".", color=f"C{i}", label=label)
        if new := select(scores, recipe, NEW_WEIGHTS, test, head, 0):
            axes.axhline(100 * statistics.mean(new), color=f"C{i}", linestyle=":", linewidth=1)
    axes.grid(alpha=0.3)
