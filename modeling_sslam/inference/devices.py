"""Choice of device, dtype and batch size."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..common.errors import InferenceError
from ..configuration_sslam import SSLAMConfig

T = TypeVar("T")
R = TypeVar("R")

# On a CPU the matrix products of a few clips keep every core busy. Larger batches only take more memory.
CPU_BATCH_SIZE = 8
# A GPU gains nothing from larger batches of 10 s clips.
MAX_BATCH_SIZE = 256
# Share of the free memory that a batch may take. Other programs and fragmentation need some too.
MEMORY_SHARE = 0.5


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device of a name. "auto" is this machine's accelerator, or the CPU if it has none.

    Raises:
        InferenceError: If this machine has no such device.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise InferenceError(f"device {str(device)!r} cannot be used: {reason} Take cpu, or auto.") from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return the value for `from_pretrained(dtype=...)`: "auto", or the dtype of a name.

    "int8" gives float32, since weights are rounded to int8 after they are loaded.
    """
    if dtype == "int8":
        return torch.float32
    return dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def choose_batch_size(config: SSLAMConfig, num_frames: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return how many clips of `num_frames` frames fit into the device's free memory in inference."""
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    tokens = 1 + num_frames // config.patch_size * config.num_mel_patches
    # In memory: residual, its norm, query, key, value, attended values; the MLP before and after its activation.
    values = tokens * (6 * config.hidden_size + 2 * config.intermediate_size)
    free, _ = torch.cuda.mem_get_info(device)
    return min(MAX_BATCH_SIZE, max(1, int(MEMORY_SHARE * free / (values * dtype.itemsize))))


def compute_in_parts(compute: Callable[[Sequence[T]], R], batch: Sequence[T], size: int) -> tuple[list[R], int]:
    """Apply `compute` to a batch in parts, and halve the parts whenever the device runs out of memory.

    Args:
        compute: A function of several items.
        batch: The items.
        size: Number of items in a part at first.

    Returns:
        The results of the parts, in order, and the size that fitted.

    Raises:
        InferenceError: If the memory does not suffice for a single item.
    """
    results: list[R] = []
    start = 0
    while start < len(batch):
        part = batch[start : start + size]
        try:
            results.append(compute(part))
        except torch.OutOfMemoryError as error:
            if len(part) == 1:
                raise InferenceError(
                    "The device has not enough memory for a single window; take a shorter one, bfloat16, or the CPU."
                ) from error
            size = (len(part) + 1) // 2
        else:
            start += len(part)
            continue
        # Free memory outside `except`, where the error would still hold the tensors of the failed computation.
        torch.cuda.empty_cache()
    return results, size
