"""Run the benchmarks one after another and write their results as one page.

    python -m benchmarks [PROGRAM ...] [--results benchmarks/RESULTS.md]

Each program runs in its own process, prints its table and writes JSON to outputs/benchmarks/. The page shows all JSON
in that folder, including that of earlier runs. All programs take half an hour on two cores.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import OUTPUT_DIR, table_of

PROGRAMS = ("startup", "front_end", "inference", "onnx_inference", "pretraining_step", "data", "scaling")

# The picture that `scaling` draws; it is copied beside the page.
PICTURE = OUTPUT_DIR / "scaling.png"


def page_of(reports: list[dict[str, Any]]) -> str:
    """Format the results of several programs as Markdown."""
    lines = [
        "# Results",
        "",
        "`make bench` measured these figures. [README.md](README.md) explains them; [NOTES.md](NOTES.md) lists the "
        "decisions that follow from them. Ratios are medians over rounds in which the contestants took turns, with "
        'the quartiles in brackets. "Not measured" means that the machine had no such device.',
    ]
    for report in reports:
        machine, versions = report["machine"], report["versions"]
        found = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines += [
            "",
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
        lines += ["```", "", "</details>"]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g} ({value['lower']:.4g} to {value['upper']:.4g}, {len(value['repeats'])} rounds)"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(part)}" for key, part in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
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
