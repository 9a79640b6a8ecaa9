"""The study's tables, statement and picture, from the steps that have finished."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.polyphony_study.intervals import LEVEL, Difference, Interval, percentile_interval, student_interval
from examples.polyphony_study.scores import (
    ALL,
    RESAMPLES,
    Scores,
    finished_results,
    gather_scores,
    read_scores,
    resampled_scores,
)
from examples.polyphony_study.steps import BASELINE, ENCODERS, FOREST, OBJECTIVES, PROTOCOLS
from examples.steps.tables import cell, line
from modeling_sslam.common.files import replacing, write_text

FILES = ("results.json", "table.md", "differences.md", "table.png")


def write_report(out: Path, seeds: Sequence[int], num_finished: int, num_steps: int) -> None:
    """Write all files of the report, from the results so far.

    Args:
        out: Folder of the study.
        seeds: Its seeds.
        num_finished: Number of steps that have finished.
        num_steps: Number of all steps.
    """
    files = finished_results(out, seeds)
    scores = gather_scores(files)
    some = next((path for by_seed in files.values() for path in by_seed.values()), None)
    if some is None:
        return
    state = "complete" if num_finished == num_steps else f"{num_finished} of {num_steps} steps have finished"
    chance = read_scores(some, "chance_map")
    differences = differences_of(scores, files)
    text = statement(differences)
    write_text(out / "results.json", json.dumps(as_json(state, scores, chance, differences, text), indent=1) + "\n")
    write_text(out / "table.md", table(scores, chance, len(seeds), state))
    write_text(out / "differences.md", table_of_differences(differences, text, state))
    with replacing(out / "table.png") as temporary:
        plot(scores, chance).savefig(temporary, dpi=110)


def columns_of(scores: Mapping[str, object]) -> list[str]:
    """Return the numbers of sources in ascending order, and `ALL`."""
    return [*sorted((name for name in scores if name != ALL), key=int), ALL]


def differences_of(scores: Scores, files: dict[tuple[str, str], dict[int, Path]]) -> list[Difference]:
    """Return the differences between each objective and the baseline, for the seeds that have both."""
    found = []
    for protocol in PROTOCOLS:
        base = scores[protocol, BASELINE]
        for encoder in OBJECTIVES:
            own = scores[protocol, encoder]
            if encoder == BASELINE or not own or not base:
                continue
            for sources in columns_of(own):
                seeds = [seed for seed in own[sources] if seed in base.get(sources, {})]
                if not seeds:
                    continue
                by_seed = {seed: own[sources][seed] - base[sources][seed] for seed in seeds}
                resampled = {
                    seed: resampled_scores(files[protocol, encoder][seed], sources)
                    - resampled_scores(files[protocol, BASELINE][seed], sources)
                    for seed in seeds
                }
                within = {seed: percentile_interval(values) for seed, values in resampled.items()}
                found.append(Difference(protocol, encoder, sources, by_seed, within))
    return found


def statement(differences: Sequence[Difference]) -> str:
    """Return sentences that say which objectives differ from the baseline beyond the intervals over seeds."""
    with_interval = [(d, d.interval) for d in differences]
    known = [(d, interval) for d, interval in with_interval if interval is not None]
    if not known:
        return f"No statement is possible yet: an interval needs {BASELINE} and another objective with two seeds."
    level = f"{100 * LEVEL:.0f} % interval"
    lines = []
    for protocol, words in PROTOCOLS.items():
        of_all = [(d, interval) for d, interval in known if d.protocol == protocol and d.sources == ALL]
        if not of_all:
            continue
        beyond = [
            f"{d.encoder} is {100 * abs(d.mean):.1f} points {'above' if d.mean > 0 else 'below'} {BASELINE} "
            f"({level} {points(interval)})"
            for d, interval in of_all
            if interval.excludes_zero
        ]
        if not beyond:
            beyond = [f"no objective differs from {BASELINE} beyond the {level} over seeds"]
        elif len(beyond) < len(of_all):
            beyond.append(f"no other objective differs from {BASELINE} beyond its interval")
        num_seeds = min(len(d.by_seed) for d, _ in of_all)
        lines.append(f"{words.capitalize()}, all clips, {num_seeds} seeds: {'; '.join(beyond)}.")
    num_beyond = sum(interval.excludes_zero for _, interval in known)
    lines.append(
        f"Of all {len(known)} intervals, by protocol, objective and number of sources, "
        f"{num_beyond} {'excludes' if num_beyond == 1 else 'exclude'} zero; "
        f"{(1 - LEVEL) * len(known):.1f} would on average if no objective differed."
    )
    return "\n".join(lines)


def points(interval: Interval) -> str:
    """Return an interval of differences in percentage points."""
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def table(scores: Scores, chance: dict[str, float], num_seeds: int, state: str) -> str:
    """Return a Markdown table of the mAP in per cent, by protocol and encoder and by number of sources.

    The first row has the mAP of random scores, which grows with the number of sources. If a cell does not have all
    seeds, it names their number.
    """
    columns = columns_of(chance)
    head = ["", "encoder", *(f"{n} source{'s' if n != '1' else ''}" for n in columns if n != ALL), ALL]
    lines = [line(head), f"|{'---|' * len(head)}"]
    lines.append(line(["", "random scores", *(f"{100 * chance[n]:.1f}" for n in columns)]))
    rows = [("", FOREST), *((protocol, encoder) for protocol in PROTOCOLS for encoder in ENCODERS)]
    for protocol, encoder in rows:
        by_sources = scores[protocol, encoder]
        cells = [cell(list(by_sources.get(n, {}).values()), num_seeds) for n in columns]
        lines.append(line([PROTOCOLS.get(protocol, ""), encoder, *cells]))
    title = f"mAP in per cent, mean and standard deviation over {num_seeds} seeds; {state}"
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def table_of_differences(differences: Sequence[Difference], text: str, state: str) -> str:
    """Return the statement and a Markdown table of the differences, with a column for each seed."""
    seeds = sorted({seed for d in differences for seed in d.by_seed})
    lines = [
        f"Difference in mAP from {BASELINE} in percentage points, paired by seed; {state}",
        "",
        *text.split("\n"),
        "",
        f"The last column is Student's {100 * LEVEL:.0f} % interval of the mean over seeds. In brackets is the "
        f"{100 * LEVEL:.0f} % interval of a seed's difference over {RESAMPLES} resamples of the test clips.",
        "",
    ]
    head = ["", "objective", "sources", *(f"seed {seed}" for seed in seeds), "mean", "interval"]
    lines += [line(head), f"|{'---|' * len(head)}"]
    for d in differences:
        by_seed = [
            f"{100 * d.by_seed[seed]:+.1f} ({points(d.within[seed])})" if seed in d.by_seed else "-" for seed in seeds
        ]
        interval = "-" if d.interval is None else points(d.interval)
        lines.append(line([PROTOCOLS[d.protocol], d.encoder, d.sources, *by_seed, f"{100 * d.mean:+.1f}", interval]))
    return "\n".join(lines) + "\n"


def as_json(
    state: str, scores: Scores, chance: dict[str, float], differences: Sequence[Difference], text: str
) -> dict[str, object]:
    """Return all numbers as plain values."""
    return {
        "state": state,
        "chance": chance,
        "scores": [
            {"protocol": protocol, "encoder": encoder, "map": by_sources}
            for (protocol, encoder), by_sources in scores.items()
            if by_sources
        ],
        "differences": [
            {**d._asdict(), "mean": d.mean, "interval": d.interval, "baseline": BASELINE} for d in differences
        ],
        "statement": text.split("\n"),
    }


def plot(scores: Scores, chance: dict[str, float]) -> Figure:
    """Plot mAP by number of sources: a panel for each protocol, a bar with its interval for each encoder."""
    columns = columns_of(chance)
    figure = Figure(figsize=(4.6 * len(PROTOCOLS), 4.4), layout="constrained")
    panels = figure.subplots(1, len(PROTOCOLS), sharey=True)
    for axes, (protocol, words) in zip(panels, PROTOCOLS.items(), strict=True):
        for i, encoder in enumerate(ENCODERS):
            bars(axes, columns, scores[protocol, encoder], i, encoder)
        for position, name in enumerate(columns):
            levels = {"random scores": (chance[name], ":")}
            if forest := list(scores["", FOREST].get(name, {}).values()):
                levels[FOREST] = (statistics.mean(forest), "--")
            for label, (value, style) in levels.items():
                reach = (position - 0.42, position + 0.42)
                axes.plot(reach, (value, value), style, color="0.3", linewidth=1.2, label=None if position else label)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_xlabel("sources in a clip")
        axes.set_title(words)
        axes.spines[["top", "right"]].set_visible(False)
    # The intervals of two seeds can far exceed the range of the mAP.
    panels[0].set_ylim(0, 1)
    panels[0].set_ylabel(f"mAP, mean and {100 * LEVEL:.0f} % interval over seeds")
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def bars(axes: Axes, columns: Sequence[str], by_sources: dict[str, dict[int, float]], index: int, label: str) -> None:
    """Draw the bars of one encoder, at position `index` in each group of bars."""
    width = 0.84 / len(ENCODERS)
    # An encoder without results has an empty bar, so that all panels have the same legend.
    values = [list(by_sources.get(name, {}).values()) for name in columns]
    means = [statistics.mean(of_seeds) if of_seeds else 0.0 for of_seeds in values]
    intervals = [student_interval(of_seeds) for of_seeds in values]
    halves = [
        float("nan") if found is None else found.high - mean for found, mean in zip(intervals, means, strict=True)
    ]
    places = [position + (index - (len(ENCODERS) - 1) / 2) * width for position in range(len(columns))]
    style = {"ecolor": "0.25", "elinewidth": 0.8, "capsize": 1.5}
    axes.bar(places, means, width, yerr=halves, color=f"C{index}", label=label, error_kw=style)
