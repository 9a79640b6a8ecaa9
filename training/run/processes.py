"""Start of a program in each process of a launch."""

import logging
from datetime import timedelta
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from transformers.utils.logging import disable_progress_bar

from modeling_sslam.common.glibc import keep_freed_memory

# Timeout of collective operations. After an uneven pass, a process may wait long for the others.
LONGEST_WAIT = timedelta(days=1)


def join_processes() -> PartialState:
    """Join the other processes of the launch and set up logging: INFO in the main process, WARNING in the others."""
    # Without `cpu`, accelerate reads this variable of its launcher too late to join several processes on CPUs.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.INFO if state.is_main_process else logging.WARNING,
    )
    disable_progress_bar()  # transformers shows one for every file of weights
    return state


def make_accelerator(mixed_precision: str | None, **arguments: Any) -> Accelerator:
    """Join the processes and choose device and precision.

    Args:
        mixed_precision: Overrides the launcher's choice, unless it is `None`.
        **arguments: Arguments of `Accelerator`.

    Raises:
        ValueError: If this machine does not support the precision, or accelerate does not know an argument's value.
    """
    join_processes()
    accelerator = Accelerator(mixed_precision=mixed_precision, **arguments)
    if accelerator.mixed_precision == "fp16" and not accelerator.native_amp:
        raise ValueError("mixed_precision=fp16 needs a GPU; on this device use bf16 or no.")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator
