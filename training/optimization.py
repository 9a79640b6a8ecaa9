"""The optimiser of pre-training: AdamW over all parameters, linear warm-up, cosine to zero."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay; the defaults are the published ones."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate, reached at the end of warm-up."})
    warmup_updates: int = field(default=53_333, metadata={"help": "Updates over which it rises linearly from 0."})
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"help": "Adam's two decays."})
    eps: float = field(default=1e-8, metadata={"help": "Adam's epsilon."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled weight decay."})
    decay_1d_parameters: bool = field(
        default=True,
        metadata={
            "help": "Whether biases, norms and the CLS token decay too. The published runs decayed everything: their "
            "configuration means to spare these, but its optimiser never did."
        },
    )
    max_grad_norm: float = field(default=4.0, metadata={"help": "The gradient is clipped to this norm."})

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.warmup_updates < 0 or self.weight_decay < 0:
            raise ValueError("warmup_updates and weight_decay must not be negative")


def learning_rate(update: int, peak: float, warmup_updates: int, max_updates: int) -> float:
    """The learning rate of optimiser update `update`, counted from 1: `peak * update / warmup_updates` at first, then
    half a cosine that is 0 at `max_updates`."""
    if update < warmup_updates:
        return peak * update / warmup_updates
    progress = (update - warmup_updates) / max(max_updates - warmup_updates, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, decay_1d_parameters: bool = True
) -> list[dict]:
    """Groups for a torch optimiser out of all trainable parameters: one, or one that decays and one that does not, of
    what has a single axis longer than 1."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if decay_1d_parameters:
        return [{"params": trainable, "weight_decay": weight_decay}]
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in trainable:
        groups[sum(size > 1 for size in parameter.shape) > 1].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, which is on its device already. The learning rate is set before
    each update, from [`learning_rate`]."""
    groups = parameter_groups(model.parameters(), config.weight_decay, config.decay_1d_parameters)
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)
