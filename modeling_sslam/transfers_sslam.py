"""Copies between the CPU and a GPU that run beside other work; plain copies on other devices."""

from collections.abc import Callable

import torch


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device. Neither the CPU nor kernels of other streams wait for a copy to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def read_later(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to copy a tensor to the CPU. Call the result to wait for the copy and get it.

    On a GPU the call waits for the kernels before the copy alone. Later kernels may overwrite the tensor.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    is_copied = torch.cuda.Event()
    is_copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        is_copied.synchronize()
        return copy

    return wait
