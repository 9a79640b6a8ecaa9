"""Where and how wide to compute, when the user leaves it to us."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..common.errors import InferenceError
from ..configuration_sslam import SSLAMConfig

T, R = TypeVar("T"), TypeVar("R")

# On a CPU the matrix products of a few clips keep every core busy; more only take memory.
CPU_BATCH_SIZE = 8
# Beyond this a GPU gains nothing from more clips of 10 s.
MAX_BATCH_SIZE = 256
# Of the memory that is free: other programs and fragmentation need some too.
MEMORY_SHARE = 0.5


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the accelerator of this machine or else the CPU.

    Raises:
        InferenceError: If there is no such device here.
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
    """What `from_pretrained(dtype=...)` takes: "auto" as it is, a name as torch's type of that name; for "int8", which
    weights are rounded to later, float32."""
    if dtype == "int8":
        return torch.float32
    return dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def choose_batch_size(config: SSLAMConfig, num_frames: int, device: torch.device, dtype: torch.dtype) -> int:
    """Clips of `num_frames` frames that fit into the device's free memory when no gradients are kept."""
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    tokens = 1 + num_frames // config.patch_size * config.num_mel_patches
    # Residual, its norm, query, key, value and the attended, beside the MLP before and after its activation.
    values = tokens * (6 * config.hidden_size + 2 * config.intermediate_size)
    free, _ = torch.cuda.mem_get_info(device)
    return min(MAX_BATCH_SIZE, max(1, int(MEMORY_SHARE * free / (values * dtype.itemsize))))


def compute_in_parts(compute: Callable[[Sequence[T]], R], batch: Sequence[T], size: int) -> tuple[list[R], int]:
    """Applies `compute` to a batch in parts of `size`, of half as many each time the device runs out of memory.

    Returns:
        The results of the parts, in order, and the size that fitted.

    Raises:
        InferenceError: If there is too little memory even for one.
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
        # Outside of `except`, where the error still holds the tensors of the failed computation.
        torch.cuda.empty_cache()
    return results, size
