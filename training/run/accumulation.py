"""Gradients of one update, accumulated over forward passes and processes."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import nn

T = TypeVar("T")


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Sequence[T],
    compute_losses: Callable[[T], dict[str, torch.Tensor]],
) -> list[dict[str, torch.Tensor]]:
    """Add the gradient of one update: the mean of the losses over `batches` and over all processes.

    Args:
        accelerator: The processes.
        model: The model as the processes share it (DDP or FSDP).
        batches: The inputs of each forward pass.
        compute_losses: Runs a forward pass. Returns scalars, of which "loss" is differentiated.

    Returns:
        For each forward pass its scalars, detached.
    """
    outputs = []
    for i, batch in enumerate(batches):
        # Processes exchange gradients once per update, in the last backward pass.
        with nullcontext() if i == len(batches) - 1 else accelerator.no_sync(model):
            losses = compute_losses(batch)
            accelerator.backward(losses["loss"])
        outputs.append({name: value.detach() for name, value in losses.items()})
    return outputs
