"""Pre-train small encoders by recipes, and test them beside new weights and MFCCs with a random forest.

    python -m examples.small_encoders runs/small_encoders

The settings are a YAML file, by default examples/small_encoders/study.yaml: recipes for pre-training and fine-tuning,
and the data on which encoders are tested. docs/small_encoders.md says how to get these data.

For every recipe and seed, an encoder is pre-trained. On each test, ridge regression reads its frozen features, for
each pooling of each layer and of all layers side by side. New weights of the same architecture and MFCCs with a random
forest are tested beside it. With folds, inner folds choose the head. Then the encoder and new weights are fine-tuned
over the folds of the test `finetuned_on`. All checkpoints of the seeds in `curve_seeds` are tested.

OUT gets:

- table.md: a table for each test, mean and standard deviation over seeds;
- curves.md and curves.png: scores by update;
- scores.csv: every score of every seed, layer and pooling;
- study.json: the settings and options, which later starts must not change. Recipes, tests and seeds can be added.

Every step is a command, which is printed before it runs. Finished steps are not repeated: after an interruption, the
same command goes on. Words after `--` are added to the commands of pre-training and fine-tuning. These save time on a
CPU with bfloat16 instructions:

    python -m examples.small_encoders OUT -- --mixed_precision bf16 --compile true --memory fast
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from examples.small_encoders.report import FILES, write_report
from examples.small_encoders.settings import DEFAULT_FILE, Study, read_study, record_settings
from examples.small_encoders.steps import all_steps
from modeling_sslam.common.signals import StopRequest

LOCK_FILE = ".study.lock"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    arguments = parse_arguments(words[:at])
    try:
        study = read_study(arguments.config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if unknown := set(arguments.recipes) - set(study.recipes):
        sys.exit(f"error: {arguments.config} has no recipe {unknown.pop()}; it has {', '.join(study.recipes)}.")
    study = replace(study, seeds=tuple(dict.fromkeys((*study.seeds, *arguments.seeds))))
    chosen = [
        (seed, recipe)
        for seed in arguments.seeds or study.seeds
        for recipe in study.recipes
        if recipe in (arguments.recipes or study.recipes)
    ]
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: {arguments.out} cannot be the study's folder: {error.strerror}. Name another OUT.")
    try:
        with FileLock(arguments.out / LOCK_FILE, blocking=False):
            run(arguments.out, study, chosen, words[at + 1 :])
    except Timeout:
        sys.exit(f"error: Another process runs the study in {arguments.out}. Wait, or name another OUT.")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words before `--`."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.small_encoders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the study")
    parser.add_argument("--config", type=Path, default=DEFAULT_FILE, metavar="FILE", help="settings of the study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="run these seeds now (default: all)")
    parser.add_argument("--recipes", nargs="+", default=[], help="run these recipes now (default: all)")
    return parser.parse_args(argv)


def run(out: Path, study: Study, chosen: Sequence[tuple[int, str]], options: Sequence[str]) -> None:
    """Run the unfinished steps of the chosen seeds and recipes, and write the report after each of them."""
    # The training programs take seconds to import, which --help should not.
    from examples.steps.running import check_steps, run_steps

    groups = all_steps(out, study, options)
    steps = [step for group in groups.values() for step in group]
    check_steps([step for key in chosen for step in groups[key]])
    try:
        record_settings(out, study, options)
    except ValueError as error:
        sys.exit(f"error: {error}")
    with StopRequest() as stop:
        for key in chosen:
            is_complete = run_steps(groups[key], stop)
            num_finished = sum(step.is_finished for step in steps)
            state = "complete" if num_finished == len(steps) else f"{num_finished} of {len(steps)} steps have finished"
            write_report(out, study, state)
            print(f"{num_finished} of {len(steps)} steps have finished.", flush=True)
            if not is_complete:
                break
    for path in (out / name for name in FILES):
        if path.exists():
            print(f"\n{path.read_text(encoding='utf-8')}" if path.suffix == ".md" else path)


if __name__ == "__main__":
    main()
