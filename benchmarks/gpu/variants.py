"""Our models as a GPU runs them. All stages get their variants here."""

from typing import NamedTuple

import torch
from torch import nn

from modeling_sslam import SSLAMForPreTraining
from modeling_sslam.cuda_sslam import use_cuda
from training.pretrain import compile_blocks


class Variant(NamedTuple):
    """A variant of the pre-training step.

    Attributes:
        memory: "fast" keeps the values between operators for the backward pass, "small" recomputes some of them.
        mode: "eager", "compiled", or "CUDA graphs" for a compiled step that is replayed as CUDA graphs.
    """

    memory: str
    mode: str

    def __str__(self) -> str:
        return f"{self.mode}, memory {self.memory}"


def fast_model(model: SSLAMForPreTraining, variant: Variant) -> None:
    """Change a model on its device into a variant of it."""
    model.set_memory(variant.memory)
    use_cuda(model)
    if variant.mode == "eager":
        return
    # As `training.pretrain` compiles: the whole objective, unless activations are recomputed.
    if variant.memory == "small":
        compile_blocks(model)
    else:
        mode = "reduce-overhead" if variant.mode == "CUDA graphs" else "default"
        model.compile(fullgraph=True, dynamic=False, mode=mode)


def start_compile_workers(device: torch.device) -> None:
    """Compile something small. torch starts its compiling processes then, and they import while others measure."""
    torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=device))


def compile_encoder(model: nn.Module) -> nn.Module:
    """Compile a model for inference on batches of one shape, as a CUDA graph on a GPU."""
    return torch.compile(model, dynamic=False, mode="reduce-overhead")
