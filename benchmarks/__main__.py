"""Run the benchmarks one after another and write their results as one page.

    python -m benchmarks [PROGRAM ...] [--results benchmarks/RESULTS.md]
    python -m benchmarks gpu [--minutes 4] [--device cpu --layers 2]

Each program runs in its own process, prints its table and writes JSON to outputs/benchmarks/. The page shows all JSON
in that folder, including that of earlier runs. All programs take half an hour on two cores. `gpu` measures everything
that needs a GPU; named alone it runs in this process and takes its own options (`python -m benchmarks gpu --help`).
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.__main__ import main as gpu_main
from benchmarks.gpu.stages import planned_rows
from benchmarks.report import OUTPUT_DIR, PICTURE, section_of, table_of

PROGRAMS = ("startup", "front_end", "inference", "onnx_inference", "pretraining_step", "data", "scaling", "gpu")


def page_of(reports: list[dict[str, Any]]) -> str:
    """Format the results of several programs as Markdown."""
    lines = [
        "# Results",
        "",
        "`make bench` measured these figures. [README.md](README.md) explains them; [NOTES.md](NOTES.md) lists the "
        "decisions that follow from them. Ratios are medians over rounds in which the contestants took turns, with "
        'the quartiles in brackets. "Not measured" comes with the reason.',
    ]
    for report in reports:
        lines += ["", *section_of(report)]
    if all(report["program"] != "gpu" for report in reports):
        rows = [replace(row, if_missing="not measured at this state") for row in planned_rows()]
        lines += [
            "",
            "## gpu",
            "",
            "No GPU was available. `python -m benchmarks gpu` measures these rows where there is one.",
            "",
            table_of([row.as_dict() for row in rows]),
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gpu"]:
        return gpu_main(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"any of {', '.join(PROGRAMS)} (default: all)")
    parser.add_argument("--results", type=Path, default=OUTPUT_DIR / "RESULTS.md", help="page to write (%(default)s)")
    parser.add_argument("--rounds", type=int, help="rounds of every program (default: its own number)")
    parser.add_argument("--layers", type=int, help="layers of the models; fewer for a trial run")
    args = parser.parse_args(argv)
    if unknown := set(args.programs) - set(PROGRAMS):
        parser.error(f"no program {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}")
    options = [f"--{name}={getattr(args, name)}" for name in ("rounds", "layers") if getattr(args, name) is not None]
    failed = []
    for program in args.programs or PROGRAMS:
        print(f"\n== {program}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{program}", *options], check=False).returncode:
            failed.append(program)
    paths = [OUTPUT_DIR / f"{program}.json" for program in PROGRAMS]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(page_of([json.loads(path.read_text()) for path in paths if path.exists()]))
    if PICTURE.exists() and args.results.parent.resolve() != PICTURE.parent.resolve():
        shutil.copy(PICTURE, args.results.parent)
    print(f"\nResults of all programs: {args.results}")
    if failed:
        print(f"Failed: {', '.join(failed)}; the errors are above.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
