"""Compiled models for inference: torch.compile, with CUDA graphs on GPUs, for batches of a fixed shape."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..common.errors import InferenceError
from ..modeling_sslam import SSLAMForAudioClassification, SSLAMModel
from .packed_blocks import PackedEncoder

T = TypeVar("T")


def check_compilable(model: SSLAMModel | SSLAMForAudioClassification) -> None:
    """Refuse models with packed blocks, which call kernels that torch.compile cannot look into.

    Raises:
        InferenceError: If the model has been optimised for CPUs.
    """
    body = model if isinstance(model, SSLAMModel) else model.sslam
    if isinstance(body.encoder, PackedEncoder):
        raise InferenceError(
            f"A model that is optimised for CPUs ({body.encoder.precision}) cannot be compiled: load it anew, or "
            "leave out compile."
        )


def compile_function(function: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """Compile a function of tensors, once for each shape of its arguments.

    On a GPU with CUDA the second call of a shape records a CUDA graph, and later calls start all kernels at once. A
    recorded graph belongs to one thread: always call the result from the same thread.

    Args:
        function: The function.
        device: Device of the tensors.

    Returns:
        The compiled function. Its result is new memory, which later calls do not overwrite.
    """
    mode = "reduce-overhead" if device.type == "cuda" else None
    compiled = torch.compile(function, dynamic=False, mode=mode)

    def call(*arguments: Any) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*arguments).clone()

    return call


def fill_batch(items: Sequence[T], batch_size: int) -> list[T]:
    """Repeat the last item up to the batch size, so that all batches have one shape.

    A single item stays alone: a whole batch would take much longer, and this adds a single shape. More items than
    `batch_size` are returned as they are.
    """
    missing = 0 if len(items) == 1 else batch_size - len(items)
    return [*items, *[items[-1]] * missing]
