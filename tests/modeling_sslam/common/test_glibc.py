"""Freed memory is used again, where the system would have cleared it anew."""

import subprocess
import sys

# Page faults of pieces of 1 to 30 MiB, one after the other. Left to itself, glibc asks the system for each: it
# is larger than all that have been freed.
SCRIPT = """
import resource, sys
import torch
from training.run.processes import make_accelerator
if sys.argv[1] == "training":
    make_accelerator(None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for mebibytes in range(1, 31):
    torch.ones(mebibytes << 18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(who: str) -> int:
    command = [sys.executable, "-c", SCRIPT, who]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def test_training_keeps_what_it_frees():
    pages = sum(range(1, 31)) * (1 << 20) // 4096
    assert page_faults("training") < pages // 4
    assert page_faults("anything else") > pages // 2
