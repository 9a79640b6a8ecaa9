r"""Compare the objectives of stage 2 by degree of polyphony, as table 2 of the paper does.

    python -m examples.polyphony_study runs/study --sounds ESC-10 --group-by '\d-(\d+)-'   # real sound, on a CPU
    python -m examples.polyphony_study runs/synthetic                                      # synthesised sound

With `--sounds FOLDER`, the clips are scenes of 1 to 4 labelled recordings (see
`python -m training.soundscapes --help`), and splits share no recording. FOLDER has a subfolder for each class, as
ESC-10 has: 400 recordings of ten classes under a CC BY licence.

    git clone https://github.com/karolpiczak/ESC-10

Recordings of ESC-10 whose names have the same middle number come from one original. `--group-by` keeps them in one
split. Without `--sounds`, each clip has 1 to 5 synthesised sounds.

The study runs stage 1 once for every seed. Each objective's stage 2 starts from it and has the same number of updates.
A linear probe and a prototype probe of the frozen encoder, and fine-tuning, test each encoder. New weights are tested
in the same way. MFCCs with a random forest are another rival. Objectives are compared with `ua`, paired by seed.

These files in OUT are rewritten after each step:

- results.json: every number of every seed, and all differences;
- table.md: mAP by number of sources, mean and standard deviation over seeds;
- differences.md: the differences from `ua` with 95 % intervals, and sentences that follow from them;
- table.png: the table as bars.

Every step is a command, which is printed before it runs. After an interruption or the time limit of `--minutes`, run
the same command again, or `python -m examples.polyphony_study OUT`: OUT/study.json has the settings. Finished steps
are not repeated. One process runs all steps of a seed. If there are several processes, their output goes to
OUT/seed-*/log.txt.

`--preset h200` has a larger model and sizes that are planned for eight minutes of one H200 with 16 cores. Prepare its
data first, on any machine, and copy OUT:

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
# Arguments of a single start, which do not change the study.
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
    """Parse the command line. The result has only the given arguments."""
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
    parser.add_argument(
        "--group-by", metavar="REGEX", help="regular expression that finds a recording's original in its file's path"
    )
    parser.add_argument("--group-column", metavar="COLUMN", help="column of a table that names a recording's original")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="seeds; each repeats the whole study (default: those of the preset)"
    )
    parser.add_argument("--clips", type=int, help="number of clips to generate; validation and test get 15 %% each")
    parser.add_argument("--seconds", type=float, help="length of a clip in seconds")
    for name in RECIPES:
        option = f"--{'finetune' if name == 'finetuning' else name}_config"
        parser.add_argument(
            option, dest=name, metavar="FILE", help=f"configuration of {name}; replaces all settings of the preset"
        )
    parser.add_argument(
        "--minutes", type=float, help="minutes after which to save and stop (default: that of the preset)"
    )
    parser.add_argument("--prepare-only", action="store_true", help="generate the data and stop")
    return parser.parse_args(argv)


def settle(out: Path, chosen: dict[str, Any]) -> tuple[Preset, dict[str, Any]]:
    """Return the settings of a study and the arguments that determine them, and record both in the study's folder.

    Arguments of an earlier start need not be given again.

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
                    "out to continue that study, or name another OUT."
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
            f"The {' and '.join(changed)} differ from those in {path}: a preset or a configuration file has changed "
            "since then. Restore it, or name another OUT."
        )
    return preset, chosen


def preset_of(chosen: dict[str, Any]) -> Preset:
    """Return the preset, changed by the arguments."""
    preset = PRESETS[chosen.get("preset", "cpu")]
    scenes: Options = {name: chosen[name] for name in ("clips", "seconds") if name in chosen}
    own: dict[str, Any] = {name: {"config": chosen[name]} for name in RECIPES if name in chosen}
    own["seeds"] = tuple(chosen.get("seeds", preset.seeds))
    return replace(preset, scenes={**preset.scenes, **scenes}, **own)


def prepare(out: Path, preset: Preset, chosen: dict[str, Any]) -> None:
    """Generate the data of the study, unless an earlier start has generated them."""
    folder = data_folder(out)
    if folder.exists():
        return
    recordings = {
        name.replace("_", "-"): chosen[name] for name in ("sounds", "group_by", "group_column") if name in chosen
    }
    kind = {**preset.mixing, **recordings} if recordings else preset.synthesis
    command = ["-m", "training.soundscapes", str(folder), *words({**preset.scenes, **kind})]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    # Run it in a process of its own. Workers of this process would import all of its packages again.
    if subprocess.run([sys.executable, *command], check=False).returncode:
        sys.exit("error: The data could not be generated; see above.")


def study(out: Path, preset: Preset) -> None:
    """Run all unfinished steps, and write the report after each."""
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
        print(f"\nStopped. To continue: python -m examples.polyphony_study {shlex.quote(str(out))}")
    for path in (out / name for name in FILES):
        if path.exists():
            print(f"\n{path.read_text(encoding='utf-8')}" if path.suffix == ".md" else path)


if __name__ == "__main__":
    main()
