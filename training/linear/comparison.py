"""Tables and picture of all heads of an encoder and of its rivals.

- `heads.md`: the best head by validation of each encoder and of each kind, then every head with its cost;
- `heads.csv`: every head with every setting;
- `heads.png`: the metric by layer and kind.
"""

import csv
import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure

from modeling_sslam.common.files import replacing, write_text
from training.linear.choice import chosen_summary
from training.linear.fitting import HeadResult
from training.linear.heads import Head
from training.linear.results import HeadSummary, number, spread

COMPARISON_FILES = ("heads.md", "heads.csv", "heads.png")
COLUMNS = (
    *("encoder", "kind", "layer", "pooling", "settings", "validation", "test"),
    *("parameters", "FLOPs per clip", "cached bytes per clip", "seconds"),
)
KIND_NAMES = {
    "linear": "linear",
    "ridge": "ridge regression",
    "layers": "weighted sum of layers",
    "attentive": "attentive pooling",
    "prototypes": "prototypes",
    "knn": "nearest neighbours",
    "few_shot": "few-shot",
    "forest": "random forest",
}


class FittedContender(NamedTuple):
    """An encoder, or a baseline without one, with its fitted heads.

    Attributes:
        name: Name for tables.
        heads: The heads.
        rounds: The result of each head, for each test split.
        by_round: Whether validation chooses a head for each round. Otherwise one head is chosen for all rounds.
    """

    name: str
    heads: list[Head]
    rounds: list[list[HeadResult]]
    by_round: bool

    def chosen(self, kind: str | None = None) -> HeadSummary:
        """Return the best head by validation, of one kind or of all. All kinds exclude few-shot heads."""
        candidates = [
            i
            for i, head in enumerate(self.heads)
            if (head.kind == kind if kind is not None else head.kind != "few_shot")
        ]
        return chosen_summary(self.rounds, candidates, self.by_round)

    def chosen_results(self) -> list[HeadResult]:
        """Return the result of the best head by validation, for each test split."""
        return [
            next(result for result in results if result.head == head)
            for results, head in zip(self.rounds, self.chosen().heads, strict=True)
        ]

    @property
    def kinds(self) -> list[str]:
        """The kinds of the heads."""
        return list(dict.fromkeys(head.kind for head in self.heads))

    def table(self) -> list[HeadSummary]:
        """Return the summary of each head. Heads that differ only in a setting have a row each."""
        return [HeadSummary.of([results[i] for results in self.rounds]) for i in range(len(self.heads))]

    def table_of_places(self) -> list[HeadSummary]:
        """Return a summary for each kind, layer and pooling, with the settings that validation chooses."""
        places: dict[tuple[str, int | str, str], list[int]] = {}
        for i, head in enumerate(self.heads):
            places.setdefault((head.kind, head.layer, head.pooling), []).append(i)
        return [chosen_summary(self.rounds, candidates, self.by_round) for candidates in places.values()]


def write_comparison(
    folder: Path, contenders: Sequence[FittedContender], metric: str, metric_name: str, title: str, how_chosen: str
) -> list[Path]:
    """Write heads.md, heads.csv and heads.png.

    Args:
        folder: Folder to write into.
        contenders: The encoder and its rivals.
        metric: Key of the metric.
        metric_name: Display name of the metric.
        title: Title of table and plot.
        how_chosen: A sentence that says how heads were chosen.

    Returns:
        Paths of the files.
    """
    best = [(contender, contender.chosen()) for contender in contenders]
    by_kind = [(contender, contender.chosen(kind)) for contender in contenders for kind in contender.kinds]
    places = [(contender, row) for contender in contenders for row in contender.table_of_places()]
    sections = {"Best head by validation": best, "Best head of each kind": by_kind, "All heads": places}
    lines = [f"# {title}", "", f"The metric is {metric_name}. {how_chosen}"]
    lines += ["± is the standard deviation over folds, or over draws for few-shot heads without folds."]
    for heading, rows in sections.items():
        if heading == "Best head of each kind" and len(by_kind) == len(best):
            continue
        lines += ["", f"## {heading}", "", line_of(COLUMNS), line_of(["---"] * len(COLUMNS))]
        lines += [line_of(cells_of(contender, row)) for contender, row in rows]
    write_text(folder / "heads.md", "\n".join(lines) + "\n")

    records = [
        {"encoder": contender.name} | row.as_full_row(metric) | {"seconds": round(row.cost.seconds, 3)}
        for contender in contenders
        for row in contender.table()
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, max(records, key=len), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in record.items()})
    write_text(folder / "heads.csv", text.getvalue())
    plot(folder / "heads.png", contenders, metric_name, title)
    return [folder / name for name in COMPARISON_FILES]


def remove_comparison(folder: Path) -> None:
    """Remove the files of an earlier comparison."""
    for name in COMPARISON_FILES:
        (folder / name).unlink(missing_ok=True)


def cells_of(contender: FittedContender, row: HeadSummary) -> list[str]:
    """Return the cells of a row of heads.md. A cell whose value differs between folds lists all values."""
    parts = [row.value_of(name) for name in ("kind", "layer", "pooling", "settings")]
    if row.head.kind == "forest":
        parts[1] = "-"
    texts = [" / ".join(str(v) or "-" for v in part) if isinstance(part, list) else str(part) for part in parts]
    cost = [f"{value:,}" for value in row.cost[:3]]
    return [
        contender.name,
        *texts,
        number(row.validation),
        f"{row.test:.4f}{spread(row)}",
        *cost,
        f"{row.cost[3]:.3g}",
    ]


def line_of(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def plot(path: Path, contenders: Sequence[FittedContender], metric_name: str, title: str) -> None:
    """Plot the test metric of each kind by layer, with the pooling and settings that validation chooses.

    Horizontal lines show the forest and the heads that read all layers. The panels share the vertical axis.
    """
    encoders = [contender for contender in contenders if contender.kinds != ["forest"]]
    figure = Figure(figsize=(1.2 + 4.2 * len(encoders), 4.4), layout="constrained")
    all_axes = figure.subplots(1, len(encoders), sharey=True, squeeze=False)[0]
    for axes, contender in zip(all_axes, encoders, strict=True):
        plot_contender(axes, contender)
        for rival in contenders:
            if rival.kinds == ["forest"]:
                axes.axhline(rival.chosen().test, color="0.4", linestyle=":", label=rival.name)
        axes.set_title(contender.name, fontsize=9)
        axes.set_xlabel("layer (0: embeddings, i: after block i)")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(f"test {metric_name}")
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(title, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def plot_contender(axes: Axes, contender: FittedContender) -> None:
    """Draw a curve over the layers for each kind of head, and a line for heads that read all layers."""
    layers = sorted({head.layer for head in contender.heads if isinstance(head.layer, int)})
    axes.set_xticks(layers)
    for kind, color in zip(contender.kinds, cycle(TABLEAU_COLORS), strict=False):
        of_kind = [i for i, head in enumerate(contender.heads) if head.kind == kind]
        rows: dict[int | str, HeadSummary] = {}
        for layer in dict.fromkeys(contender.heads[i].layer for i in of_kind):
            group = [i for i in of_kind if contender.heads[i].layer == layer]
            rows[layer] = chosen_summary(contender.rounds, group, contender.by_round)
        curve = {layer: rows[layer].test for layer in layers if layer in rows}
        if curve:
            axes.plot(*zip(*curve.items(), strict=True), color, marker="o", markersize=3, label=KIND_NAMES[kind])
        for layer, style, name in (("all", "--", KIND_NAMES[kind]), ("concat", "-.", f"{KIND_NAMES[kind]}, concat")):
            if layer in rows:
                axes.axhline(rows[layer].test, linestyle=style, color=color, label=name)
