"""The optimiser: AdamW with linear warm-up, cosine decay and layer-wise learning rates."""

import math
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from modeling_sslam import SSLAMPreTrainedModel


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. The defaults are the published ones of pre-training."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate, reached at the end of warm-up."})
    warmup_updates: int = field(
        default=53_333, metadata={"help": "Updates of linear warm-up to the peak learning rate."}
    )
    initial_learning_rate: float = field(default=0.0, metadata={"help": "Learning rate at the start of warm-up."})
    final_learning_rate: float = field(default=0.0, metadata={"help": "Learning rate at the end of the cosine decay."})
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Block i of L has the learning rate times this to the power of L - i; other parameters have the "
            "learning rate itself."
        },
    )
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"help": "Adam's two decay rates."})
    eps: float = field(default=1e-8, metadata={"help": "Adam's epsilon."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled weight decay."})
    decay_1d_parameters: bool = field(
        default=True,
        metadata={
            "help": "Whether weight decay applies to biases, norms and the CLS token too, as in the published runs: "
            "their configuration intends an exemption that their optimiser never applied."
        },
    )
    max_grad_norm: float = field(default=4.0, metadata={"help": "Norm to which the gradient is clipped."})

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
    """Return the learning rate of an update.

    It rises linearly from the initial to the peak learning rate at `warmup_updates`, then falls along half a cosine to
    the final one at `max_updates`.

    Args:
        update: Counted from 1.
        config: The schedule.
        max_updates: Number of updates of the run.
    """
    peak, warmup_updates = config.learning_rate, config.warmup_updates
    if update < warmup_updates:
        return config.initial_learning_rate + (peak - config.initial_learning_rate) * update / warmup_updates
    progress = (update - warmup_updates) / max(max_updates - warmup_updates, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.final_learning_rate + (peak - config.final_learning_rate) * cosine


def parameter_groups(model: SSLAMPreTrainedModel, config: OptimizerConfig) -> list[dict]:
    """Group the trainable parameters by weight decay and by `lr_scale`, a factor of their learning rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # At most one axis is longer than 1 in biases, norms and the CLS token.
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
    """Return AdamW over the trainable parameters of `model`, which is on its device already.

    The trainer sets the learning rate before each update; see [`learning_rate`].
    """
    groups = parameter_groups(model, config)
    # torch has fused AdamW for GPUs and CPUs only.
    fused = all(parameter.device.type in ("cuda", "cpu") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)
