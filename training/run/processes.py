"""What every program does at its start, in each of the processes it was launched in."""

import logging
from datetime import timedelta
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from transformers.utils.logging import disable_progress_bar

from modeling_sslam.common.glibc import keep_freed_memory

# A process whose share of an uneven pass is small waits for the others at its end, however long they take.
LONGEST_WAIT = timedelta(days=1)


def join_processes() -> PartialState:
    """Joins the other processes of the launch and sets up logging: the main one says all, the others warn."""
    # accelerate itself reads this wish of its launcher only later, when several processes on CPUs would not be joined.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.INFO if state.is_main_process else logging.WARNING,
    )
    disable_progress_bar()  # transformers' own, at every file of weights
    return state


def make_accelerator(mixed_precision: str | None, **arguments: Any) -> Accelerator:
    """Device, precision and processes.

    Raises:
        ValueError: If the precision or anything else is not to be had here.
    """
    join_processes()
    accelerator = Accelerator(mixed_precision=mixed_precision, **arguments)
    if accelerator.mixed_precision == "fp16" and not accelerator.native_amp:
        raise ValueError("mixed_precision=fp16 needs a GPU; on this device use bf16 or no.")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator
