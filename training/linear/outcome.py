"""Outcome of a linear evaluation in cached mode: its files and the printed summary."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from modeling_sslam.common.files import remove, write_text
from training.classification.task import evaluation_data
from training.evaluation.card import write_results_to_card
from training.evaluation.facts import card_results
from training.evaluation.prediction import Predictions
from training.evaluation.results import MAIN_METRICS, Evaluation, write_results
from training.linear.clips import Clips, Round
from training.linear.comparison import FittedContender, remove_comparison, write_comparison
from training.linear.config import LinearEvalConfig
from training.linear.contenders import FrozenEncoder
from training.linear.facts import common_facts, name_of_encoder, protocol_of, short_name_of
from training.linear.features import FeatureSet
from training.linear.fitting import HeadResult
from training.linear.options import Rival
from training.linear.results import number, remove_sweep, spread, table_of, why_no_model, write_model, write_sweep

# A longer table of heads is not printed; heads.md has it.
MAX_PRINTED_HEADS = 40


@dataclass(frozen=True)
class Outcome:
    """The fitted and tested heads of the encoder and its rivals.

    Attributes:
        config: The settings.
        encoder: The encoder under evaluation.
        sets: Its features of each split.
        contenders: The encoder, then the rivals in the order of `compare`.
        rounds: The clips of each contender, by test split.
        seconds: Time for the features and for the heads.
    """

    config: LinearEvalConfig
    encoder: FrozenEncoder
    sets: dict[str, FeatureSet]
    contenders: list[FittedContender]
    rounds: list[dict[str, Round]]
    seconds: dict[str, float]

    @property
    def own(self) -> FittedContender:
        """The encoder's heads."""
        return self.contenders[0]

    @property
    def metric(self) -> str:
        """Key of the main metric."""
        return next(iter(MAIN_METRICS[self.encoder.task.problem_type]))

    @property
    def metric_name(self) -> str:
        """Display name of the main metric."""
        return MAIN_METRICS[self.encoder.task.problem_type][self.metric]

    @property
    def title(self) -> str:
        """Title of tables and plots."""
        return f"{short_name_of(self.config)}: linear evaluation ({self.config.mode})"

    @property
    def num_clips(self) -> dict[str, dict[str, int]]:
        """Numbers of clips to train, validate and test with, by test split."""
        return {
            test: {name: len(part) for name, part in clips._asdict().items()} for test, clips in self.rounds[0].items()
        }

    @property
    def why_no_model(self) -> str | None:
        """The reason why the best head is not written as a model; `None` if it is."""
        return why_no_model(self.own.chosen().head, has_folds=bool(self.config.folds))

    @property
    def how_chosen(self) -> str:
        """A sentence that says how the head of an encoder was chosen."""
        if self.own.by_round:
            return (
                "For each test fold, cross-validation over the other folds chooses the head; the test fold has no "
                "part in the choice."
            )
        if self.own.rounds[0][0].validation is None:
            return "There is one head and no choice."
        return "The mean metric on the validation clips chooses the head."

    def folder_of(self, folder: Path, test: str) -> Path:
        """Return the folder for the results of a test split: a subfolder if there are folds."""
        return folder / test if self.config.folds else folder


def write_outcome(outcome: Outcome) -> list[Path]:
    """Write all files of the evaluation. Files of an earlier evaluation that has more of them are removed.

    Returns:
        Paths of the files.
    """
    evaluations = {
        test: evaluate_head(result, clips.test, outcome.encoder)
        for (test, clips), result in zip(outcome.rounds[0].items(), outcome.own.chosen_results(), strict=True)
    }
    return [
        *write_rivals(outcome),
        *write_tests(outcome, evaluations),
        *write_tables(outcome),
        *write_best_model(outcome, evaluations),
    ]


def evaluate_head(result: HeadResult, test: Clips, encoder: FrozenEncoder) -> Evaluation:
    """Return the full evaluation of a fitted head on the test clips."""
    labels = encoder.task.labels
    targets = labels.encode(test.column("labels"))
    predictions = Predictions(test.column("ids"), result.predict(test).numpy(), targets.numpy(), test.groups())
    return Evaluation.of(predictions, encoder.task.problem_type, labels.names, test.group_column)


def write_rivals(outcome: Outcome) -> list[Path]:
    """Write the results of each rival's best head into a folder of its own, and return the paths."""
    config, files = outcome.config, []
    for rival in get_args(Rival):
        remove(config.output_dir / rival)
    for rival, contender, rounds in zip(
        dict.fromkeys(config.compare), outcome.contenders[1:], outcome.rounds[1:], strict=True
    ):
        for (test, clips), result in zip(rounds.items(), contender.chosen_results(), strict=True):
            title = f"{contender.name}: {result.head}, split {test}"
            place = outcome.folder_of(config.output_dir / rival, test)
            facts = common_facts(config) | {"model": contender.name, "head": str(result.head)}
            files += write_results(place, evaluate_head(result, clips.test, outcome.encoder), title, facts)
    return files


def write_tests(outcome: Outcome, evaluations: dict[str, Evaluation]) -> list[Path]:
    """Write results.json and the results of the encoder's best head on each test split, and return the paths."""
    out, files, facts = outcome.config.output_dir, [], facts_of(outcome)
    for (test, evaluation), result in zip(evaluations.items(), outcome.own.chosen_results(), strict=True):
        title = f"{outcome.title}, {result.head}, split {test}"
        files += write_results(outcome.folder_of(out, test), evaluation, title, facts)
    if outcome.config.folds:
        write_text(out / "results.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        files.append(out / "results.json")
    return files


def facts_of(outcome: Outcome) -> dict[str, Any]:
    """Return the content of results.json."""
    contenders, own, metric = outcome.contenders, outcome.own, outcome.metric
    return common_facts(outcome.config) | {
        "num_clips": outcome.num_clips,
        "num_classes": len(outcome.encoder.task.labels),
        "skipped": {name: features.skipped for name, features in outcome.sets.items()},
        "metric": metric,
        "chosen_by": outcome.how_chosen,
        "best_head": own.chosen().as_full_row(metric),
        "best_head_model": outcome.why_no_model or "model/",
        "heads": [row.as_full_row(metric) for row in own.table()],
        "best_heads": [
            {"encoder": contender.name, "among": kind or "all kinds"} | contender.chosen(kind).as_full_row(metric)
            for contender in contenders
            for kind in (None, *contender.kinds)
        ],
        "places": [
            {"encoder": contender.name} | row.as_full_row(metric)
            for contender in contenders
            for row in contender.table_of_places()
        ],
        "seconds": outcome.seconds,
        "features": {name: str(features.folder) for name, features in outcome.sets.items()},
    }


def write_tables(outcome: Outcome) -> list[Path]:
    """Write the sweep over linear heads and the comparison of all heads, if there are several; return the paths."""
    out, own, title = outcome.config.output_dir, outcome.own, outcome.title
    metric, metric_name, files = outcome.metric, outcome.metric_name, []
    remove_sweep(out)
    remove_comparison(out)
    plain = [row for row in own.table() if row.head.kind == "linear" and not row.head.setting]
    if len(plain) > 1:
        files += write_sweep(out, plain, metric, metric_name, title)
    if len(own.heads) > 1 or len(outcome.contenders) > 1:
        files += write_comparison(out, outcome.contenders, metric, metric_name, title, outcome.how_chosen)
    return files


def write_best_model(outcome: Outcome, evaluations: dict[str, Evaluation]) -> list[Path]:
    """Write the encoder with its best head as a model, if a classifier can have this head; return its path."""
    config, folder, encoder = outcome.config, outcome.config.output_dir / "model", outcome.encoder
    if outcome.why_no_model is not None:
        remove(folder)
        return []
    (result,) = outcome.own.chosen_results()
    write_model(folder, encoder.model, encoder.feature_extractor, result, name_of_encoder(config), protocol_of(config))
    if config.test_split is not None:
        data = evaluation_data(config.data, config.validation_source, config.test_split)
        write_results_to_card(folder, card_results(data, evaluations[config.test_split]), replaced=set())
    return [folder]


def print_summary(outcome: Outcome, files: list[Path]) -> None:
    """Print what was evaluated, the tables of heads and the paths of the files."""
    config, seconds = outcome.config, outcome.seconds
    trained = [f"  AdamW, learning rate {config.head.learning_rate:g}, {config.head.epochs} epochs"]
    if not {"linear", "layers"} & set(config.head.kinds):
        trained = []
    counts = ", ".join(" + ".join(f"{n:,}" for n in size.values()) for size in outcome.num_clips.values())
    num_heads = sum(len(contender.heads) for contender in outcome.contenders)
    print(
        f"Linear evaluation of {name_of_encoder(config)} on {config.data.source}",
        f"  {protocol_of(config)}",
        *trained,
        f"  {len(outcome.encoder.task.labels)} classes; clips to train, validate and test with: {counts}",
        f"  features {seconds['features']} s, {num_heads} head{'s' * (num_heads > 1)} {seconds['heads']} s",
        *printed_heads(outcome),
        *printed_choices(outcome),
        *([outcome.why_no_model] if outcome.why_no_model else []),
        *files,
        sep="\n",
    )


def printed_heads(outcome: Outcome) -> list[str]:
    """Return the table of the encoder's heads; with inner folds, also the head that each test fold has."""
    own = outcome.own
    best, rows = own.chosen(), own.table_of_places()
    marked = None if own.by_round else next(row for row in rows if row.head == best.head)
    lines = table_of(rows, outcome.metric_name, marked) if len(rows) <= MAX_PRINTED_HEADS else []
    if own.by_round:
        folds = zip(outcome.rounds[0], best.heads, best.tests, strict=True)
        lines += [f"  {outcome.how_chosen}", *(f"    {test}: {head}, test {value:.4f}" for test, head, value in folds)]
    return lines


def printed_choices(outcome: Outcome) -> list[str]:
    """Return the best head of each encoder and of each of its kinds, if there are several."""
    if len(outcome.contenders) == 1 and len(outcome.own.kinds) == 1:
        return []
    lines = [f"  best by validation{'':<34}{'validation':>10}  {'test ' + outcome.metric_name:>13}"]
    for contender in outcome.contenders:
        for kind in [None, *(contender.kinds if len(contender.kinds) > 1 else [])]:
            row = contender.chosen(kind)
            name = f"{contender.name}, {'all kinds' if kind is None else kind}"
            lines.append(f"    {name:<50}{number(row.validation):>10}  {row.test:>13.4f}{spread(row)}")
    return lines
