"""What each objective of stage 2 is worth by degree of polyphony, as in table 2 of the paper, on generated sounds.

    python -m examples.polyphony_study runs/study                        # tiny, on a CPU
    python -m examples.polyphony_study runs/study --clips 40000 ...      # bigger, where there is a GPU

For every seed: stage 1; from it stage 2 with each objective for the same number of updates; then of each encoder a
linear evaluation (frozen, mean of the patches) and fine-tuning, tested on clips with 1 to 5 sources. Each step is a
command that is printed before it runs; what is there already is not done again, so a study can be interrupted.

OUT gets results.json (every number of every seed), table.md (mean and standard deviation over seeds) and table.png.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from examples.quickstart import CONFIGS, run

MAX_SOURCES = 5
STAGE1 = "stage 1 alone"
OBJECTIVES = ("ua", "pma", "ua+pma", "sslam")
PROTOCOLS = {"linear": "linear evaluation", "finetuned": "fine-tuning"}
ALL = "all"

# mAP by (protocol, encoder), number of sources and seed.
Scores = dict[tuple[str, str], dict[str, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of everything for each")
    parser.add_argument("--clips", type=int, default=4000, help="clips to generate, 15 %% each to validate and test")
    parser.add_argument("--seconds", type=float, default=2.58, help="length of a clip")
    parser.add_argument("--stage1_config", type=Path, default=CONFIGS / "pretrain_tiny.yaml")
    parser.add_argument("--stage2_config", type=Path, default=CONFIGS / "pretrain_tiny_stage2.yaml")
    parser.add_argument("--finetune_config", type=Path, default=CONFIGS / "finetune_tiny.yaml")
    arguments = parser.parse_args()
    out, data = arguments.out, arguments.out / "data"

    if not data.exists():
        size = ("--clips", arguments.clips, "--seconds", arguments.seconds, "--held-out", "0.15")
        run("training.soundscapes", data, *size, "--max-sources", MAX_SOURCES)
    scores: Scores = defaultdict(lambda: defaultdict(list))
    for seed in arguments.seeds:
        folder = out / f"seed-{seed}"
        encoders = {STAGE1: folder / "stage1"} | {objective: folder / objective for objective in OBJECTIVES}
        common = ("--data", data, "--seed", seed, "--resume", "auto")
        for name, encoder in encoders.items():
            if not (encoder / "model").exists():
                if name == STAGE1:
                    how = ("--config", arguments.stage1_config)
                else:
                    how = ("--config", arguments.stage2_config, "--init_from", encoders[STAGE1] / "model")
                    how = (*how, "--model.pretraining_objective", name)
                run("training.pretrain", *how, *common, "--output_dir", encoder)
            model = ("--model", encoder / "model")
            linear, finetuned = folder / f"{encoder.name}-linear", folder / f"{encoder.name}-finetuned"
            if not (linear / "results.json").exists():
                run("training.linear_eval", *model, *common[:4], "--poolings", "mean", "--output_dir", linear)
            if not (results := finetuned / "model" / "evaluation" / "data-test" / "results.json").exists():
                run(
                    "training.finetune",
                    "--config",
                    arguments.finetune_config,
                    *model,
                    *common,
                    "--output_dir",
                    finetuned,
                )
            for protocol, path in {"linear": linear / "results.json", "finetuned": results}.items():
                for sources, value in read_scores(path).items():
                    scores[protocol, name][sources].append(value)
            chance = read_scores(results, "chance_map")

    (out / "results.json").write_text(
        json.dumps({f"{protocol}, {name}": by for (protocol, name), by in scores.items()}, indent=1) + "\n"
    )
    text = table(scores, chance, len(arguments.seeds))
    (out / "table.md").write_text(text)
    plot(scores, out / "table.png")
    print(f"\n{text}\n{out / 'results.json'}\n{out / 'table.md'}\n{out / 'table.png'}")


def read_scores(results: Path, metric: str = "map") -> dict[str, float]:
    """A metric on the test clips by their number of sources, and on all."""
    found = json.loads(results.read_text())
    by_sources = {str(row["group"]): row[metric] for row in found["by_group"]}
    return by_sources | {ALL: found["metrics"][metric]}


def moments(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def columns() -> Iterable[str]:
    return [*map(str, range(1, MAX_SOURCES + 1)), ALL]


def table(scores: Scores, chance: dict[str, float], num_seeds: int) -> str:
    """Markdown: for each protocol and encoder the mAP by number of sources, in per cent; first that of random scores,
    which grows with the number of sources."""
    head = ["", "encoder", *(f"{n} source{'s' if n != '1' else ''}" for n in columns() if n != ALL), ALL]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines.append(f"| {' | '.join(['', 'random scores', *(f'{100 * chance[n]:.1f}' for n in columns())])} |")
    for protocol, words in PROTOCOLS.items():
        for name in (STAGE1, *OBJECTIVES):
            cells = [
                "{:.1f} ± {:.1f}".format(*(100 * m for m in moments(scores[protocol, name][n]))) for n in columns()
            ]
            lines.append(f"| {' | '.join([words, name, *cells])} |")
    return f"mAP in per cent, mean and standard deviation over {num_seeds} seeds\n\n" + "\n".join(lines) + "\n"


def plot(scores: Scores, path: Path) -> None:
    """A panel for each protocol: mAP over the number of sources, one line with its spread for each encoder."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (protocol, words) in zip(figure.subplots(1, 2), PROTOCOLS.items(), strict=True):
        for shift, name in enumerate((STAGE1, *OBJECTIVES)):
            means, spreads = zip(*(moments(scores[protocol, name][n]) for n in columns()), strict=True)
            places = [i + 0.06 * (shift - 2) for i in range(len(means))]
            style = {"marker": "o", "markersize": 4, "capsize": 2, "color": f"C{shift}"}
            # All clips are no further step after the largest number of sources.
            axes.errorbar(places[:-1], means[:-1], spreads[:-1], linewidth=1.2, label=name, **style)
            axes.errorbar(places[-1:], means[-1:], spreads[-1:], **style)
        axes.set_xticks(range(MAX_SOURCES + 1), list(columns()))
        axes.set_xlabel("sources in a clip")
        axes.set_ylabel("mAP")
        axes.set_title(words)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
