"""Results of heads: summaries, the files of a sweep over layers and poolings, and the best head as a model."""

import copy
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMPreTrainedModel
from modeling_sslam.common.files import replacing, write_errors, write_text
from modeling_sslam.common.model_card import render_card
from modeling_sslam.configuration_sslam import POOLINGS as MODEL_POOLINGS
from training.linear.fitting import Cost, HeadResult
from training.linear.heads import Head

SWEEP_FILES = ("sweep.csv", "sweep.png")


class HeadSummary(NamedTuple):
    """Results of a head over all folds, or of a single fit. A chosen head can differ between folds.

    Attributes:
        heads: The head of each fold.
        best_epochs: Best epoch of each fold.
        validation: Mean validation metric; `None` if there are no validation clips.
        test: Mean test metric.
        test_spread: Standard deviation (n - 1) of the test metric over folds. For a single fit it is `None`, except
            for a few-shot head, which has the standard deviation over draws.
        tests: Test metric of each fold.
        cost: The cost of the first fold's head. The time is the sum over folds.
    """

    heads: list[Head]
    best_epochs: list[int | None]
    validation: float | None
    test: float
    test_spread: float | None
    tests: list[float]
    cost: Cost

    @property
    def head(self) -> Head:
        """The head of the first fold."""
        return self.heads[0]

    @classmethod
    def of(cls, results: Sequence[HeadResult]) -> "HeadSummary":
        """Summarise the results of one head, one result for each fold."""
        tests = [result.test for result in results]
        validations = [result.validation for result in results if result.validation is not None]
        return cls(
            [result.head for result in results],
            [result.best_epoch for result in results],
            float(np.mean(validations)) if len(validations) == len(results) else None,
            float(np.mean(tests)),
            float(np.std(tests, ddof=1)) if len(tests) > 1 else results[0].spread,
            tests,
            results[0].cost._replace(seconds=sum(result.cost.seconds for result in results)),
        )

    def value_of(self, name: str) -> Any:
        """Return an attribute of the head, or its list of values by fold if they differ."""
        values = [getattr(head, name) for head in self.heads]
        return values[0] if len(set(values)) == 1 else values

    def as_row(self, metric: str) -> dict[str, Any]:
        """Return a row of sweep.csv and results.json, with `metric` in the names of the columns."""
        row: dict[str, Any] = {
            "layer": self.value_of("layer"),
            "pooling": self.value_of("pooling"),
            "best_epochs": self.best_epochs,
            f"validation_{metric}": self.validation,
            f"test_{metric}": self.test,
        }
        if self.test_spread is not None:
            row |= {f"test_{metric}_spread": self.test_spread, f"test_{metric}_by_fold": self.tests}
        return row

    def as_full_row(self, metric: str) -> dict[str, Any]:
        """Return the row of results.json, with kind, settings and cost. Times are left out, so equal runs agree."""
        cost = {
            "parameters": self.cost.parameters,
            "flops_per_clip": self.cost.flops,
            "cached_bytes_per_clip": self.cost.cached_bytes,
        }
        return {"kind": self.value_of("kind"), "settings": self.value_of("settings")} | self.as_row(metric) | cost


def table_of(table: Sequence[HeadSummary], metric_name: str, best: HeadSummary | None) -> list[str]:
    """Return a header and the summaries as lines of text.

    Args:
        table: Summary of each head.
        metric_name: Display name of the metric.
        best: The row to mark as the best by validation, if one head was chosen for all folds.
    """
    names = [name_of(row) for row in table]
    width = max(15, *(len(name) + 1 for name in names))
    lines = [f"  {'layer':>6}  {'pooling':<{width}}{'validation':>10}  {'test ' + metric_name:>13}"]
    for row, name in zip(table, names, strict=True):
        mark = "  best by validation" if row is best and len(table) > 1 else ""
        figures = f"{number(row.validation):>10}  {row.test:>13.4f}{spread(row)}{mark}"
        layer = row.value_of("layer")
        lines.append(f"  {'' if isinstance(layer, list) else layer:>6}  {name:<{width}}{figures}")
    return lines


def name_of(row: HeadSummary) -> str:
    """Return pooling, kind and settings of a row as text; settings that differ between folds are left out."""
    pooling, kind, settings = (row.value_of(name) for name in ("pooling", "kind", "settings"))
    words = [text for text in (pooling, "" if kind == "linear" else kind, settings) if text]
    return ", ".join(text for text in words if not isinstance(text, list))


def number(value: float | None) -> str:
    """Return a metric as text; a dash if there is none."""
    return "-" if value is None else f"{value:.4f}"


def spread(row: HeadSummary) -> str:
    """Return the standard deviation of the test metric as text, if there is one."""
    return "" if row.test_spread is None else f" ± {row.test_spread:.4f}"


def write_sweep(folder: Path, table: Sequence[HeadSummary], metric: str, metric_name: str, title: str) -> list[Path]:
    """Write sweep.csv and its plot sweep.png.

    Args:
        folder: Folder to write into.
        table: Summary of each head.
        metric: Key of the metric.
        metric_name: Display name of the metric.
        title: Title of the plot.

    Returns:
        Paths of the two files.
    """
    rows = [summary.as_row(metric) for summary in table]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
    write_text(folder / "sweep.csv", text.getvalue())

    layers = list(dict.fromkeys(summary.head.layer for summary in table))
    poolings = list(dict.fromkeys(summary.head.pooling for summary in table))
    values = np.full((len(poolings), len(layers)), np.nan)
    for summary in table:
        values[poolings.index(summary.head.pooling), layers.index(summary.head.layer)] = summary.test
    figure = Figure(figsize=(3.2 + 0.62 * len(layers), 2.0 + 0.45 * len(poolings)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=8, color="w" if value < middle else "k")
    axes.set_xticks(range(len(layers)), map(str, layers))
    axes.set_yticks(range(len(poolings)), poolings)
    axes.set_xlabel("layer (0: embeddings, i: after block i" + ("; concat: all)" if "concat" in layers else ")"))
    figure.colorbar(image, label=f"test {metric_name}")
    figure.suptitle(title, fontsize=9)
    with replacing(folder / "sweep.png") as temporary:
        figure.savefig(temporary, dpi=110)
    return [folder / name for name in SWEEP_FILES]


def remove_sweep(folder: Path) -> None:
    """Remove the files of an earlier sweep."""
    for name in SWEEP_FILES:
        (folder / name).unlink(missing_ok=True)


def why_no_model(head: Head, has_folds: bool) -> str | None:
    """Return the reason why a head cannot be written as a model, or `None` if it can.

    Args:
        head: The best head.
        has_folds: Whether the evaluation has folds.
    """
    if has_folds:
        return "No model was written: every fold has a head of its own."
    if head.kind != "linear":
        return f"No model was written: the best head is of the kind {head.kind}, and a classifier has a linear head."
    if head.pooling not in MODEL_POOLINGS:
        return (
            f"No model was written: the best head has the pooling {head.pooling}, and a classifier has one of "
            f"{', '.join(MODEL_POOLINGS)}."
        )
    if head.layer == "concat":
        return "No model was written: the best head reads all layers, and a classifier reads the last."
    if head.layer == 0:
        return "No model was written: the best head reads the embeddings, and a model has at least one block."
    return None


def write_model(
    folder: Path,
    model: SSLAMForAudioClassification,
    feature_extractor: SSLAMFeatureExtractor,
    result: HeadResult,
    encoder_name: str,
    protocol: str,
) -> None:
    """Write a model for `pipeline("audio-classification")`: the encoder up to the head's layer, and the head.

    Args:
        folder: Folder of the new model.
        model: Classifier with the encoder and the class names. Its own head is not used.
        feature_extractor: Feature extractor of the encoder.
        result: The fitted head.
        encoder_name: Path or Hub id of the encoder, for the model card.
        protocol: Description of the evaluation, for the model card.
    """
    head, state = result.head, result.state
    assert state is not None, "only a linear head becomes a model"
    config = copy.deepcopy(model.config)
    # The numbers of target layers may exceed the new number of layers. Only pre-training uses them.
    config.update(
        {
            "classifier_pooling": head.pooling,
            "num_hidden_layers": head.layer,
            "num_target_layers": None,
            "num_global_target_layers": None,
        }
    )
    classifier = SSLAMForAudioClassification(config)
    weights = model.sslam.state_dict()
    classifier.sslam.load_state_dict({name: weights[name] for name in classifier.sslam.state_dict()})
    classifier.classifier.load_state_dict(state)
    card = render_card(
        f"{Path(encoder_name).name}, linear head",
        "A frozen encoder with the linear head that is best by validation.",
        {"encoder": f"`{encoder_name}`", "head": head, "made by": f"a linear evaluation, {protocol}"},
        model_class="SSLAMForAudioClassification",
        sampling_rate=feature_extractor.sampling_rate,
        sections={"Notes": "The head measures the encoder. A fine-tuned model classifies better."},
    )
    save_folder(folder, classifier, feature_extractor, card)


def save_folder(
    folder: Path, model: SSLAMPreTrainedModel, feature_extractor: SSLAMFeatureExtractor, card: str | None = None
) -> None:
    """Write a model folder, whole or not at all.

    Args:
        folder: Folder of the model; an existing one is replaced, and missing parents are created.
        model: Model to save.
        feature_extractor: Feature extractor to save.
        card: Text of the model card; `None` for no card.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as temporary, write_errors(folder):
        model.save_pretrained(temporary)
        feature_extractor.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
