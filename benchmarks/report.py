"""Results of the benchmarks as a table and as JSON, with machine, versions and settings."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import Measurement
from modeling_sslam import SSLAMConfig

OUTPUT_DIR = Path("outputs/benchmarks")
# The picture that `scaling` draws; it is copied beside the page.
PICTURE = OUTPUT_DIR / "scaling.png"
PACKAGES = (
    "torch",
    "torchaudio",
    "transformers",
    "torchao",
    "onnxruntime",
    "onnx",
    "datasets",
    "numpy",
    "safetensors",
)
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One figure with its target.

    Attributes:
        what: The computation.
        where: The device.
        figure: The meaning of the value, for example "of the GEMM limit".
        value: The value; None if the machine lacks the device.
        at_least: The target's lower bound; None for no bound.
        at_most: The target's upper bound; None for no bound.
        note: Further conditions of the figure.
        if_missing: Text in place of the value where there is none, with the reason.
    """

    what: str
    where: str
    figure: str
    value: Measurement | float | None
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""
    if_missing: str = "not measured"

    @property
    def is_reached(self) -> bool | None:
        """Whether the target is reached; None if the figure was not measured or has no target."""
        if self.value is None or (self.at_least is None and self.at_most is None):
            return None
        value = self.value.median if isinstance(self.value, Measurement) else self.value
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def as_dict(self) -> dict[str, Any]:
        value = self.value.as_dict() if isinstance(self.value, Measurement) else self.value
        return {
            "what": self.what,
            "where": self.where,
            "figure": self.figure,
            "value": value,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "reached": self.is_reached,
            "note": self.note,
            "if_missing": self.if_missing,
        }


@dataclass
class Report:
    """All figures of one program."""

    program: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)

    def add(self, *rows: Row) -> None:
        """Add rows and print them at once, because a whole run takes minutes."""
        self.rows += rows
        for row in rows:
            print(" | ".join(cells_of(row.as_dict())), flush=True)

    def record(self, name: str, value: Any) -> None:
        """Keep a figure that no row shows, such as the seconds behind a ratio."""
        self.measurements[name] = value.as_dict() if isinstance(value, Measurement) else value

    def as_dict(self) -> dict[str, Any]:
        # `python -m benchmarks gpu` has the program's name among its arguments.
        arguments = sys.argv[2:] if sys.argv[1:2] == [self.program] else sys.argv[1:]
        return {
            "program": self.program,
            "command": " ".join(["python", "-m", f"benchmarks.{self.program}", *arguments]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
            "machine": machine(),
            "versions": versions(),
            "settings": self.settings,
            "rows": [row.as_dict() for row in self.rows],
            "measurements": self.measurements,
        }

    def save(self, path: Path) -> None:
        """Write the JSON under a temporary name and rename it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        partial.replace(path)

    def write(self, path: Path) -> None:
        """Write the JSON and print the table."""
        self.save(path)
        print(f"\n{table_of([row.as_dict() for row in self.rows])}\n\nWritten to {path}")


def cells_of(row: dict[str, Any]) -> list[str]:
    """Format a row of the JSON as the cells of a table."""
    value = row["value"]
    if value is None:
        measured = row.get("if_missing", "not measured")  # results written before this key existed lack it
    elif isinstance(value, dict):
        measured = f"{value['median']:.3g} ({value['lower']:.3g} to {value['upper']:.3g})"
    else:
        measured = f"{value:.6g}"
    targets = [f"{sign} {row[key]:g}" for sign, key in (("≥", "at_least"), ("≤", "at_most")) if row[key] is not None]
    reached = {True: "yes", False: "no", None: ""}[row["reached"]]
    return [row["what"], row["where"], row["figure"], measured, " ".join(targets), reached, row["note"]]


def table_of(rows: list[dict[str, Any]]) -> str:
    """Format rows of the JSON as a Markdown table with aligned columns."""
    header = ["what", "where", "figure", "median (middle half)", "target", "reached", "note"]
    lines = [header, *map(cells_of, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def section_of(report: dict[str, Any]) -> list[str]:
    """Format the results of a program as the lines of a Markdown section."""
    machine, versions = report["machine"], report["versions"]
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"## {report['program']}",
        "",
        f"`{report['command']}`, {report['date'][:16].replace('T', ' ')} UTC, {machine['processor']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['gpu'] or 'no GPU'}; {found}.",
    ]
    if report["rows"]:
        lines += ["", table_of(report["rows"])]
    if report["program"] == "scaling":
        lines += ["", f"![How cost grows]({PICTURE.name})"]
    lines += ["", "<details><summary>Figures behind it</summary>", "", "```"]
    lines += [f"{name}: {_short(value)}" for name, value in report["measurements"].items()]
    return [*lines, "```", "", "</details>"]


def _short(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g} ({value['lower']:.4g} to {value['upper']:.4g}, {len(value['repeats'])} rounds)"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(part)}" for key, part in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@cache
def machine() -> dict[str, Any]:
    """Describe the machine."""
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines()
    features = next((line for line in cpu_info if line.startswith(("flags", "Features"))), "").split()
    return {
        "processor": next((line.partition(": ")[2] for line in cpu_info if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "instruction_sets": [name for name in features if name.startswith(("avx512f", "avx512_", "amx", "avx2"))],
        "system": platform.system() + " " + platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages among `PACKAGES`."""
    found = {"python": platform.python_version()}
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}


def make_parser(program: str, description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Create a parser with the options that all programs share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="measured rounds; each contestant runs once a round (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument(
        "--layers", type=int, default=12, help="layers of the model; fewer for a trial run (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUTPUT_DIR / f"{program}.json", help="JSON to write (%(default)s)")
    return parser


def base_config(num_layers: int, **overrides: Any) -> SSLAMConfig:
    """Return the configuration of the base size with AudioSet's classes."""
    return SSLAMConfig(num_hidden_layers=num_layers, num_labels=527, **overrides)
