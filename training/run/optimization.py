"""The optimiser: AdamW, linear warm-up, cosine, and for fine-tuning a learning rate for each layer."""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from modeling_sslam import SSLAMPreTrainedModel


@dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay; the defaults are the published ones of pre-training."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate, reached at the end of warm-up."})
    warmup_updates: int = field(default=53_333, metadata={"help": "Updates over which it rises linearly to that."})
    initial_learning_rate: float = field(default=0.0, metadata={"help": "Where it rises from."})
    final_learning_rate: float = field(default=0.0, metadata={"help": "Where half a cosine takes it in the end."})
    layer_decay: float = field(
        default=1.0,
        metadata={"help": "Block i of L has the learning rate times this to the power L - i, all else has it whole."},
    )
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
        for name in ("warmup_updates", "weight_decay", "initial_learning_rate", "final_learning_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay} must be greater than 0 and at most 1")


def learning_rate(update: int, config: OptimizerConfig, max_updates: int) -> float:
    """The learning rate of optimiser update `update`, counted from 1: linear from the initial to the peak one at
    `warmup_updates`, then half a cosine to the final one at `max_updates`."""
    peak, warmup_updates = config.learning_rate, config.warmup_updates
    if update < warmup_updates:
        return config.initial_learning_rate + (peak - config.initial_learning_rate) * update / warmup_updates
    progress = (update - warmup_updates) / max(max_updates - warmup_updates, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.final_learning_rate + (peak - config.final_learning_rate) * cosine


def parameter_groups(model: SSLAMPreTrainedModel, config: OptimizerConfig) -> list[dict]:
    """Groups for a torch optimiser out of all trainable parameters: those with the same weight decay and the same
    `lr_scale`, by which their learning rate is multiplied."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # What has a single axis longer than 1: biases, norms, the CLS token.
        is_1d = sum(size > 1 for size in parameter.shape) <= 1
        weight_decay = 0.0 if is_1d and not config.decay_1d_parameters else config.weight_decay
        key = _layer_scale(name, model.config.num_hidden_layers, config.layer_decay), weight_decay
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": lr_scale, "weight_decay": weight_decay}
        for (lr_scale, weight_decay), parameters in groups.items()
    ]


def _layer_scale(name: str, num_layers: int, layer_decay: float) -> float:
    block = re.search(r"(?:^|\.)encoder\.layers\.(\d+)\.", name)
    return 1.0 if block is None else layer_decay ** (num_layers - int(block[1]))


def make_optimizer(model: SSLAMPreTrainedModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, which is on its device already. The learning rate is set before
    each update, from [`learning_rate`]."""
    groups = parameter_groups(model, config)
    # Elsewhere than on GPUs and CPUs torch has no fused one.
    fused = all(parameter.device.type in ("cuda", "cpu") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)
