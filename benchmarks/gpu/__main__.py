"""Measure everything that needs a GPU, in one process and in a few minutes.

    python -m benchmarks gpu                            # all rows; needs a GPU
    python -m benchmarks gpu --minutes 2                # as many as two minutes allow
    python -m benchmarks gpu --device cpu --layers 2    # the same code at a tiny size, where there is no GPU

GPUs are rented by the minute. Each row is printed and written as soon as it is measured, fast ones first and those
that compile last, so an interruption keeps what was measured. When the minutes are used up, imports included, the
remaining rows are "not measured: out of time".

The limit of a row is its matrix products' FLOPs over the rate of large products, which is measured first. The rivals
are the plain transcription in float16, transformers' AST compiled, and torchaudio's kaldi.fbank; they take turns with
ours. Peak memory is torch's count of allocated bytes from before the model exists; on a CPU, resident bytes.

Files, beside each other (--out names the first): gpu.json (for the page of `python -m benchmarks`), gpu.jsonl (a line
for each row), gpu.md (a section for RESULTS.md), gpu_*_kernels.txt (dearest kernels and the device's idle share) and
gpu_*_trace.json.gz (traces for Perfetto or Chrome).
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu.bench import TRIAL_SIZES, Bench, Sizes, run_stages
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.stages import stages
from benchmarks.measurement import process_age
from benchmarks.report import Report, make_parser, table_of

NO_GPU = """no GPU: torch finds no CUDA device, so nothing is measured and nothing is written.
- On a machine with a GPU, check that `nvidia-smi` lists it and that this torch is built for CUDA (torch.version.cuda
  is {version}).
- To run the same code at a tiny size here: python -m benchmarks gpu --device cpu --layers 2"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("gpu", __doc__, rounds=Sizes.rounds)
    parser.set_defaults(threads=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help='"cpu" is a trial run at a tiny size (%(default)s)'
    )
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="end after this time, imports included (%(default)s)"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU.format(version=torch.version.cuda))
        return 0
    budget = Budget(args.minutes)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    sizes = Sizes() if args.device == "cuda" else TRIAL_SIZES
    workers = min(sizes.workers, len(os.sched_getaffinity(0)))
    sizes = replace(sizes, layers=args.layers, rounds=args.rounds, workers=workers)
    report = Report("gpu", {name: value for name, value in vars(args).items() if name != "out"})
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU, trial run"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, sizes, report, args.out, Path(folder))
        bench.start()
        failed = run_stages(bench, stages(sizes, where), budget)
    print(f"\n{table_of(report.as_dict()['rows'])}\n\n{process_age():.0f} s. Written beside {args.out}")
    if failed:
        print(f"Failed: {'; '.join(failed)}; the errors are above.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
