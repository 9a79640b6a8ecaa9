"""Compare the objectives of stage 2 by degree of polyphony, as table 2 of the paper does, on generated sounds.

    python -m examples.polyphony_study runs/study                        # tiny, on a CPU
    python -m examples.polyphony_study runs/study --clips 40000 ...      # larger, on a GPU

For every seed there is one stage 1 and, starting from it, one stage 2 with each objective for the same number of
updates. Each encoder is evaluated by linear evaluation (frozen, mean of the patches) and by fine-tuning, on clips with
1 to 5 sources. Every step is a command, which is printed before it runs. Finished steps are not repeated, so the study
can be interrupted.

OUT gets results.json (every number of every seed), table.md (mean and standard deviation over seeds) and table.png.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from examples.quickstart import CONFIGS, run

MAX_SOURCES = 5
STAGE1 = "stage 1 alone"
OBJECTIVES = ("ua", "pma", "ua+pma", "sslam")
PROTOCOLS = {"linear": "linear evaluation", "finetuned": "fine-tuning"}
ALL = "all"

# mAP by (protocol, encoder), then by number of sources; one value for each seed.
Scores = dict[tuple[str, str], dict[str, list[float]]]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the study")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds, each for one run of everything"
    )
    parser.add_argument(
        "--clips", type=int, default=4000, help="clips to generate, 15 %% each for validation and test"
    )
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
        data_and_seed = ("--data", data, "--seed", seed)
        for name, encoder in encoders.items():
            settings: tuple[object, ...]
            if name == STAGE1:
                settings = ("--config", arguments.stage1_config)
            else:
                settings = ("--config", arguments.stage2_config, "--init_from", encoders[STAGE1] / "model")
                settings = (*settings, "--model.pretraining_objective", name)
            pretrain(encoder, *settings, *data_and_seed)
            results = evaluate(encoder, arguments.finetune_config, *data_and_seed)
            for protocol, path in results.items():
                for sources, value in read_scores(path).items():
                    scores[protocol, name][sources].append(value)
    # The scores of a random classifier depend on the test clips alone.
    chance = read_scores(results["finetuned"], "chance_map")

    (out / "results.json").write_text(
        json.dumps({f"{protocol}, {name}": by for (protocol, name), by in scores.items()}, indent=1) + "\n"
    )
    text = table(scores, chance, len(arguments.seeds))
    (out / "table.md").write_text(text)
    plot(scores, out / "table.png")
    print(f"\n{text}\n{out / 'results.json'}\n{out / 'table.md'}\n{out / 'table.png'}")


def pretrain(encoder: Path, *settings: object) -> None:
    """Pre-train an encoder, unless an earlier call did."""
    if not (encoder / "model").exists():
        run("training.pretrain", *settings, "--resume", "auto", "--output_dir", encoder)


def evaluate(encoder: Path, finetune_config: Path, *data_and_seed: object) -> dict[str, Path]:
    """Evaluate an encoder by both protocols, unless an earlier call did, and return the results files."""
    model = ("--model", encoder / "model")
    linear = encoder.with_name(f"{encoder.name}-linear")
    finetuned = encoder.with_name(f"{encoder.name}-finetuned")
    results = {
        "linear": linear / "results.json",
        "finetuned": finetuned / "model" / "evaluation" / "data-test" / "results.json",
    }
    if not results["linear"].exists():
        run("training.linear_eval", *model, *data_and_seed, "--poolings", "mean", "--output_dir", linear)
    if not results["finetuned"].exists():
        settings = ("--config", finetune_config, *model, *data_and_seed, "--resume", "auto")
        run("training.finetune", *settings, "--output_dir", finetuned)
    return results


def read_scores(results: Path, metric: str = "map") -> dict[str, float]:
    """Read a metric of the test clips by their number of sources, and of all of them."""
    found = json.loads(results.read_text())
    by_sources = {str(row["group"]): row[metric] for row in found["by_group"]}
    return by_sources | {ALL: found["metrics"][metric]}


def moments(values: list[float]) -> tuple[float, float]:
    """Return mean and standard deviation (0 for one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def columns() -> list[str]:
    """Return the numbers of sources and `ALL`."""
    return [*map(str, range(1, MAX_SOURCES + 1)), ALL]


def table(scores: Scores, chance: dict[str, float], num_seeds: int) -> str:
    """Return a Markdown table of the mAP in per cent, by protocol and encoder and by number of sources.

    Its first row has the mAP of random scores, which grows with the number of sources.
    """
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
    """Plot mAP against the number of sources: a panel for each protocol, a line with error bars for each encoder."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (protocol, words) in zip(figure.subplots(1, 2), PROTOCOLS.items(), strict=True):
        for shift, name in enumerate((STAGE1, *OBJECTIVES)):
            means, spreads = zip(*(moments(scores[protocol, name][n]) for n in columns()), strict=True)
            places = [i + 0.06 * (shift - 2) for i in range(len(means))]
            style = {"marker": "o", "markersize": 4, "capsize": 2, "color": f"C{shift}"}
            # The mAP of all clips has no line to it, because "all" is not a number of sources.
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
