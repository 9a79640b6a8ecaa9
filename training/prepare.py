"""Convert a data set as downloaded into a dataset folder for the training programs.

    python -m training.prepare esc50 ESC-50-master esc50
    python -m training.prepare audioset AUDIOSET audioset --by-path
    python -m training.prepare NAME --help

SOURCE is the downloaded folder, or a zip or tar archive, which is unpacked beside OUT for the duration of the run. The
help of each data set describes the files that SOURCE must hold. OUT is a new folder for `datasets.load_dataset` and
for `--data` of the training programs:

- `data/{split}-*.parquet`, with the columns `id`, `audio` (the unchanged file), `labels` (class names) and, where they
  are annotated, `events` (`label`, `onset` and `offset` in seconds) and `num_sources` (number of different classes in
  the clip);
- `labels.csv`, the classes in the order of the classifier's outputs;
- `report.json`, clips for each split and class and all findings: missing, unlisted and unreadable files, unknown
  labels, repeated rows. A summary is printed. Nothing is left out without being counted;
- `README.md`, the command that made the folder.

The command stops with an error and leaves nothing behind if annotations are missing or lack a column, if no clip is
left, or if a clip is in two splits.
"""

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from training.preparation import (
    audioset,
    desed,
    esc50,
    idmt_desed_fl,
    manifest,
    spass,
    speech_commands_v1,
    speech_commands_v2,
    urban_sed,
)
from training.preparation.archive import unpacked
from training.preparation.folder import write_listing
from training.preparation.listing import Listing, PreparationError
from training.preparation.shards import card_header, new_folder

# A module has a docstring, which is the help of its command, a function `list_clips`, and optionally `OPTIONS`:
# arguments of `list_clips` that become options of the command.
DATASETS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        audioset,
        esc50,
        speech_commands_v1,
        speech_commands_v2,
        spass,
        urban_sed,
        desed,
        idmt_desed_fl,
        manifest,
    )
}


def prepare(name: str, source: Path, out: Path, by_path: bool = False, **options: Any) -> dict[str, Any]:
    """Write the dataset folder `out`, whole or not at all.

    Args:
        name: Key of `DATASETS`.
        source: Folder or archive as downloaded.
        out: Folder to create.
        by_path: Whether rows refer to sound files by absolute path instead of holding their bytes.
        **options: Arguments of the data set's `list_clips`.

    Returns:
        The content of `report.json`.

    Raises:
        PreparationError: If the data cannot be prepared.
        OSError: If a file cannot be read or written.
    """
    if out.exists():
        raise PreparationError(f"{out} exists already; name a new folder.")
    if by_path and not source.is_dir():
        raise PreparationError(
            f"{source} is not a folder. --by-path needs a folder, whose sound files stay where they are."
        )
    # An archive is unpacked within the unfinished folder and removed with it; after a kill the next call does that.
    with new_folder(out) as unfinished, unpacked(source, unfinished) as folder:
        print(f"Reading the annotations in {folder} ...", file=sys.stderr)
        listing: Listing = DATASETS[name].list_clips(folder, **options)
        counts = write_listing(unfinished, listing, by_path)
        report = {
            "dataset": name,
            "options": {"by_path": by_path, **_changed_options(name, options)},
            "clips": sum(split["clips"] for split in counts["splits"].values()),
            "classes": len(listing.classes),
            **counts,
            "findings": listing.findings.found,
        }
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (unfinished / "report.json").write_text(text + "\n", encoding="utf-8")
        (unfinished / "README.md").write_text(card(report), encoding="utf-8")
    print(f"{out}: {report['clips']} clips of {report['classes']} classes")
    for split, entry in report["splits"].items():
        clips = entry["classes"].values()
        print(f"  {split}: {entry['clips']} clips, {min(clips)} to {max(clips)} per class")
    print(listing.findings.describe() or "no findings")
    return report


def guide(name: str) -> str:
    """Return the description of a data set: its files, splits, classes and options."""
    return (DATASETS[name].__doc__ or "").strip()


def options_of(name: str) -> dict[str, dict[str, Any]]:
    """Return the options of a data set, with arguments of `argparse.ArgumentParser.add_argument`."""
    return getattr(DATASETS[name], "OPTIONS", {})


def _changed_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that differ from their defaults, as the report shows them."""
    known = options_of(name)
    return {key: _shown(value) for key, value in options.items() if value != known[key].get("default")}


def _shown(value: Any) -> Any:
    """Convert an option's value for the report. Only the last part of a path is shown, without local folders."""
    return " ".join(map(str, value)) if isinstance(value, list) else value.name if isinstance(value, Path) else value


def card(report: dict[str, Any]) -> str:
    """Return the `README.md` of a dataset folder."""
    options = "".join(
        f" --{key.replace('_', '-')}" + ("" if value is True else f" {value}")
        for key, value in report["options"].items()
        if value
    )
    place = " Rows refer to sound files outside this folder." if report["options"]["by_path"] else ""
    splits = "\n".join(f"| {split} | {entry['clips']} |" for split, entry in report["splits"].items())
    findings = "\n".join(
        f"- {entry['count']} {kind.replace('_', ' ')} ({entry['meaning']})"
        for kind, entry in report["findings"].items()
    )
    return (
        f"{card_header(report['splits'])}\n# {report['dataset']}\n\n"
        f"{guide(report['dataset'])}\n\nMade by\n\n"
        f"    python -m training.prepare {report['dataset']} SOURCE OUT{options}\n\n"
        f"| split | clips |\n|---|---|\n{splits}\n\n"
        f"{report['classes']} classes, in `labels.csv`.{place} Findings, with names in `report.json`:\n\n"
        f"{findings or '- none'}\n"
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line: one subcommand for each data set."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True, title="data sets")
    for name in DATASETS:
        description = guide(name)
        command = commands.add_parser(
            name, help=description.splitlines()[0], description=description, formatter_class=style
        )
        command.add_argument("source", type=Path, metavar="SOURCE", help="folder or archive as downloaded")
        command.add_argument("out", type=Path, metavar="OUT", help="folder to create; it must not exist")
        command.add_argument(
            "--by-path",
            action="store_true",
            help="refer to the sound files by absolute path instead of copying them into OUT",
        )
        for option, settings in options_of(name).items():
            command.add_argument(f"--{option.replace('_', '-')}", dest=option, **settings)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    try:
        prepare(**vars(parse_arguments(argv)))
    except (PreparationError, OSError) as error:
        sys.exit(f"training.prepare: {error}")


if __name__ == "__main__":
    main()
