r"""Compare the objectives of stage 2 by degree of polyphony, as table 2 of the paper does.

    python -m examples.polyphony_study runs/study --sounds ESC-10 --group-by '\d-(\d+)-'   # real sound, on a CPU
    python -m examples.polyphony_study runs/synthetic                                      # synthesised sound

With `--sounds`, the clips are scenes of 1 to 4 labelled recordings (see `python -m training.soundscapes --help`), and
splits share no recording. ESC-10, 400 recordings of ten classes under a CC BY licence, is such a folder of classes:

    git clone https://github.com/karolpiczak/ESC-10

Its recordings whose names have the same middle number are of one original, which `--group-by` keeps in one split.
Without `--sounds` the sounds are synthesised, 1 to 5 in a clip.

For every seed there is one stage 1 and, starting from it, one stage 2 with each objective for the same number of
updates. Each encoder is tested by a linear probe and a prototype probe of the frozen encoder and by fine-tuning. New
weights are tested in the same way; MFCCs with a random forest are another rival. Objectives are compared with `ua`,
paired by seed.

OUT gets, after each step anew:

- results.json: every number of every seed, and all differences;
- table.md: mAP by number of sources, mean and standard deviation over seeds;
- differences.md: the differences from `ua` with 95 % intervals, and what follows from them, in words;
- table.png: the table as bars.

Every step is a command, which is printed before it runs. After an interruption, or when the time of `--minutes` is
over, the same command goes on, and so does `python -m examples.polyphony_study OUT`: OUT/study.json has the settings.
Finished steps are not repeated. A process runs all steps of a seed. With several processes their output goes to
OUT/seed-*/log.txt.

`--preset h200` has a larger model and sizes that are planned for eight minutes of one H200 with 16 cores. Prepare its
data before, on any machine, and copy OUT:

    python -m examples.polyphony_study runs/h200 --preset h200 --sounds ESC-10 --group-by '\d-(\d+)-' --prepare-only
    python -m examples.polyphony_study runs/h200
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from examples.polyphony_study.presets import PRESETS, Preset
from examples.polyphony_study.processes import run_seeds
from examples.polyphony_study.report import FILES, write_report
from examples.polyphony_study.steps import data_folder, steps_of_seed
from examples.steps.step import Options, words
from modeling_sslam.common.files import write_text

SETTINGS_FILE = "study.json"
LOCK_FILE = ".study.lock"
RECIPES = ("stage1", "stage2", "finetuning")
# Arguments of a start that do not change the study.
OF_A_START = ("out", "minutes", "prepare_only")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = vars(parse_arguments(argv))
    out: Path = arguments["out"]
    chosen = {name: value for name, value in arguments.items() if name not in OF_A_START}
    try:
        preset, chosen = settle(out, chosen)
    except ValueError as error:
        sys.exit(f"error: {error}")
    prepare(out, preset, chosen)
    if arguments.get("prepare_only"):
        print(f"The data of the study are in {data_folder(out)}.")
        return
    if "minutes" in arguments:
        preset = replace(preset, minutes=arguments["minutes"])
    study(out, preset)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. The result has only the arguments that were given."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.polyphony_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the study")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="sizes of model, data and runs (default: cpu)")
    parser.add_argument(
        "--sounds", metavar="FOLDER", help="labelled recordings to mix scenes from: a folder of classes or a table"
    )
    parser.add_argument("--group-by", metavar="REGEX", help="finds the original of a recording in its file's path")
    parser.add_argument("--group-column", metavar="COLUMN", help="column of the original of a recording in a table")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="seeds, each for one run of everything (default: of the preset)"
    )
    parser.add_argument("--clips", type=int, help="clips to generate, 15 %% each for validation and test")
    parser.add_argument("--seconds", type=float, help="length of a clip")
    for name in RECIPES:
        option = f"--{'finetune' if name == 'finetuning' else name}_config"
        parser.add_argument(
            option, dest=name, metavar="FILE", help=f"configuration of {name} instead of all settings of the preset"
        )
    parser.add_argument("--minutes", type=float, help="time after which to save and stop (default: of the preset)")
    parser.add_argument("--prepare-only", action="store_true", help="generate the data and stop")
    return parser.parse_args(argv)


def settle(out: Path, chosen: dict[str, Any]) -> tuple[Preset, dict[str, Any]]:
    """Return the settings of a study and the arguments that they follow from, and record them in its folder.

    Arguments that were given at an earlier start need not be given again.

    Raises:
        ValueError: If the folder holds another study, or a setting is wrong.
    """
    chosen = json.loads(json.dumps(chosen))
    path = out / SETTINGS_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if before is not None:
        for name, value in chosen.items():
            if value != before["chosen"].get(name):
                raise ValueError(
                    f"{out} holds a study with {name}={before['chosen'].get(name)}, not {value}. Leave the argument "
                    "out to go on with it, or name another OUT."
                )
        chosen = before["chosen"]
    if "sounds" not in chosen and (names := {"group_by", "group_column"} & set(chosen)):
        raise ValueError(f"--{names.pop().replace('_', '-')} is for recordings; it needs --sounds.")
    preset = preset_of(chosen)
    files = {str(getattr(preset, name)["config"]) for name in RECIPES}
    try:
        recipes = {file: yaml.safe_load(Path(file).read_text(encoding="utf-8")) for file in sorted(files)}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"A recipe cannot be read: {error}") from error
    now = json.loads(json.dumps({"chosen": chosen, "settings": asdict(preset), "recipes": recipes}, default=str))
    if before is None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(now, indent=1) + "\n")
    elif changed := [part for part in now if now[part] != before[part]]:
        raise ValueError(
            f"The {' and '.join(changed)} differ from those in {path}: a preset or a configuration file was changed "
            "since. Restore it, or name another OUT."
        )
    return preset, chosen


def preset_of(chosen: dict[str, Any]) -> Preset:
    """Return the preset with the changes that the arguments ask for."""
    preset = PRESETS[chosen.get("preset", "cpu")]
    scenes: Options = {name: chosen[name] for name in ("clips", "seconds") if name in chosen}
    own: dict[str, Any] = {name: {"config": chosen[name]} for name in RECIPES if name in chosen}
    own["seeds"] = tuple(chosen.get("seeds", preset.seeds))
    return replace(preset, scenes={**preset.scenes, **scenes}, **own)


def prepare(out: Path, preset: Preset, chosen: dict[str, Any]) -> None:
    """Generate the data of the study, unless an earlier start did."""
    folder = data_folder(out)
    if folder.exists():
        return
    recordings = {
        name.replace("_", "-"): chosen[name] for name in ("sounds", "group_by", "group_column") if name in chosen
    }
    kind = {**preset.mixing, **recordings} if recordings else preset.synthesis
    command = ["-m", "training.soundscapes", str(folder), *words({**preset.scenes, **kind})]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    # A process of its own, because its workers would import again what this one has imported.
    if subprocess.run([sys.executable, *command], check=False).returncode:
        sys.exit("error: The data could not be generated; see above.")


def study(out: Path, preset: Preset) -> None:
    """Run all steps that have not finished, and write the report after each."""
    steps = [step for seed in preset.seeds for step in steps_of_seed(out, preset, seed)]

    def report() -> None:
        num_finished = sum(step.is_finished for step in steps)
        write_report(out, preset.seeds, num_finished, len(steps))
        print(f"{num_finished} of {len(steps)} steps have finished.", flush=True)

    deadline = None if preset.minutes is None else time.time() + 60 * preset.minutes
    try:
        with FileLock(out / LOCK_FILE, blocking=False):
            is_complete = run_seeds(out, preset, deadline, report)
    except Timeout:
        sys.exit(f"error: Another process runs the study in {out}. Wait until it has ended, or name another OUT.")
    if not is_complete:
        print(f"\nStopped. This goes on: python -m examples.polyphony_study {shlex.quote(str(out))}")
    for path in (out / name for name in FILES):
        if path.exists():
            print(f"\n{path.read_text(encoding='utf-8')}" if path.suffix == ".md" else path)


if __name__ == "__main__":
    main()
