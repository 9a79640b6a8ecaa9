"""Turns a data set as it was downloaded into a dataset folder that all commands read.

    python -m training.prepare esc50 ESC-50-master esc50
    python -m training.prepare audioset AUDIOSET audioset --by-path

OUT becomes a folder for `datasets.load_dataset` and for `--data` of the training programs:

- `data/{split}-*.parquet`: `id`, `audio` (the file as it is, nothing is transcoded), `labels` (names of classes) and,
  where the annotations say, `events` (`label`, `onset` and `offset` in seconds) and `num_sources` (how many different
  classes sound in the clip);
- `labels.csv`, the classes in the order of a classifier's outputs; `README.md`, how the folder was made;
- `report.json`, of which a summary is printed: clips per split and class, and everything amiss with its number and
  first names: missing, unlisted and unreadable files, unknown labels, duplicated rows. Nothing is left out uncounted.

It stops if annotations are not there or lack a column, if no clip is left, or if a clip is in two splits. SOURCE may
be a zip or tar archive, which is unpacked beside OUT for the time. `python -m training.prepare NAME --help` says what
a data set must look like.
"""

import argparse
import json
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from training.preparation.folder import write_folder
from training.preparation.listing import Listing, PreparationError
from training.preparation.shards import card_header, new_folder

# Each module's docstring is the command's help, its `OPTIONS` are arguments of its `list_clips`.
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
    """Makes the folder `out`; see [`training.prepare`].

    Returns:
        The report.

    Raises:
        PreparationError: If the data cannot be prepared.
    """
    list_clips: Callable[..., Listing] = DATASETS[name].list_clips
    known = getattr(DATASETS[name], "OPTIONS", {})
    if out.exists():
        raise PreparationError(f"{out} exists; name a folder that does not.")
    if by_path and not source.is_dir():
        raise PreparationError(f"{source} is no folder: --by-path needs one, whose files stay where they are.")
    with unpacked(source, out.absolute().parent) as folder, new_folder(out) as made:
        print(f"Reading what {folder} lists ...", file=sys.stderr)
        listing = list_clips(folder, **options)
        report = write_folder(made, listing, by_path)
        report = {
            "dataset": name,
            "options": {
                "by_path": by_path,
                **{key: _shown(value) for key, value in options.items() if value != known[key].get("default")},
            },
            "clips": sum(split["clips"] for split in report["splits"].values()),
            "classes": len(listing.classes),
            **report,
            "findings": listing.findings.found,
        }
        (made / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (made / "README.md").write_text(card(report), encoding="utf-8")
    print(f"{out}: {report['clips']} clips of {report['classes']} classes")
    for split, entry in report["splits"].items():
        counts = entry["classes"].values()
        print(f"  {split}: {entry['clips']} clips, {min(counts)} to {max(counts)} a class")
    print(listing.findings.describe() or "nothing amiss")
    return report


def _shown(value: Any) -> str:
    """An option's value as the card shows it: no folders of this machine."""
    return " ".join(map(str, value)) if isinstance(value, list) else value.name if isinstance(value, Path) else value


@contextmanager
def unpacked(source: Path, workplace: Path) -> Iterator[Path]:
    """The folder with the data: `source` itself, or what is in that archive, without folders that hold just another.

    Raises:
        PreparationError: If it is neither.
    """
    if source.is_dir():
        yield _innermost(source)
        return
    if not source.is_file() or not (zipfile.is_zipfile(source) or tarfile.is_tarfile(source)):
        raise PreparationError(f"{source} is neither a folder nor a zip or tar archive.")
    workplace.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{source.name}-", dir=workplace) as folder:
        print(f"Unpacking {source} ...", file=sys.stderr)
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                archive.extractall(folder)
        else:
            with tarfile.open(source) as archive:
                archive.extractall(folder, filter="data")
        yield _innermost(Path(folder))


def _innermost(folder: Path) -> Path:
    while True:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
        if len(entries) != 1 or not entries[0].is_dir():
            return folder
        folder = entries[0]


def card(report: dict[str, Any]) -> str:
    """The `README.md` of a prepared folder."""
    options = "".join(
        f" --{key.replace('_', '-')}" + ("" if value is True else f" {value}")
        for key, value in report["options"].items()
        if value
    )
    place = " The sounds are elsewhere: rows have their paths." if report["options"]["by_path"] else ""
    splits = "\n".join(f"| {split} | {entry['clips']} |" for split, entry in report["splits"].items())
    findings = "\n".join(
        f"- {entry['count']} {kind.replace('_', ' ')} ({entry['meaning']})"
        for kind, entry in report["findings"].items()
    )
    return (
        f"{card_header(report['splits'])}\n# {report['dataset']}\n\n"
        f"{DATASETS[report['dataset']].__doc__.strip()}\n\nMade by\n\n"
        f"    python -m training.prepare {report['dataset']} SOURCE OUT{options}\n\n"
        f"| split | clips |\n|---|---|\n{splits}\n\n"
        f"{report['classes']} classes, in `labels.csv`.{place} Amiss, with names in `report.json`:\n\n"
        f"{findings or '- nothing'}\n"
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare", description=__doc__, formatter_class=style, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True, title="data sets")
    for name, module in DATASETS.items():
        command = commands.add_parser(
            name, help=module.__doc__.splitlines()[0], description=module.__doc__, formatter_class=style
        )
        command.add_argument("source", type=Path, metavar="SOURCE", help="folder or archive, as downloaded")
        command.add_argument("out", type=Path, metavar="OUT", help="folder to make; it must not exist")
        command.add_argument(
            "--by-path",
            action="store_true",
            help="refer to the sound files by their absolute paths instead of copying them into OUT",
        )
        for option, settings in getattr(module, "OPTIONS", {}).items():
            command.add_argument(f"--{option.replace('_', '-')}", dest=option, **settings)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    try:
        prepare(**vars(parse_arguments(argv)))
    except (PreparationError, OSError) as error:
        sys.exit(f"training.prepare: {error}")


if __name__ == "__main__":
    main()
