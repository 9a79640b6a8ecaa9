"""A training process reuses the memory that it frees, instead of letting the system zero it again."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Page faults of tensors of 1 to 30 MiB, one after the other. By default glibc asks the system for each of them,
# because each is larger than all that were freed before.
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


def test_training_keeps_freed_memory():
    pages = sum(range(1, 31)) * (1 << 20) // 4096
    assert page_faults("training") < pages // 4
    assert page_faults("anything else") > pages // 2
