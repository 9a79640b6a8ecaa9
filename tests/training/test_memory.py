"""Freed memory is used again, where the system would have cleared it anew."""

import subprocess
import sys

# Page faults of one more round of pieces that together pass what glibc keeps by itself, 64 MiB.
SCRIPT = """
import resource, sys
import torch
from training.processes import make_accelerator
if sys.argv[1] == "training":
    make_accelerator(None)
def round_of_pieces():
    pieces = [torch.ones(4 << 20) for _ in range(8)]
for _ in range(3):
    round_of_pieces()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
round_of_pieces()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(who: str) -> int:
    command = [sys.executable, "-c", SCRIPT, who]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def test_training_keeps_what_it_frees():
    pages = 8 * (16 << 20) // 4096
    assert page_faults("training") < pages // 10
    assert page_faults("anything else") > pages // 10
