"""Linear heads, many of them fitted at once on features in memory.

A head is the classifier that `SSLAMForAudioClassification` puts on its pooled tokens: LayerNorm and a linear layer. H
heads (one per layer and pooling) train as one batched matmul. Losses are summed and AdamW is elementwise, so each head
ends exactly as it would on its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from training.evaluation.metrics import ProblemType
from training.linear.features import FEATURE_POOLINGS
from training.run.losses import Loss, loss_sum, loss_weight
from training.run.optimization import OptimizerConfig, learning_rate

# As in the published linear evaluation.
FINAL_LEARNING_RATE = 1e-6
# A feature with a smaller deviation after LayerNorm is constant up to rounding, such as the embedded CLS token.
LEAST_DEVIATION = 1e-4


@dataclass
class HeadConfig:
    """Fitting of a head: AdamW with a cosine schedule that ends at 1e-6, without warm-up, as published."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the first update."})
    epochs: int = field(default=50, metadata={"help": "Passes over the training clips."})
    batch_size: int = field(default=48, metadata={"help": "Clips per update in the fast mode."})
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"help": "AdamW's betas."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled weight decay."})
    standardize: bool = field(
        default=True,
        metadata={
            "help": "In the fast mode, initialise the LayerNorm such that every feature has mean 0 and standard "
            "deviation 1 over the training clips. (The published initialisation learns less in 50 epochs.)"
        },
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay} must not be negative")


class Head(NamedTuple):
    """The features that a head reads.

    Attributes:
        layer: 0 for the output of the embeddings, i for the output of block i.
        pooling: One of [`training.linear.features.FEATURE_POOLINGS`], or several joined by +.
    """

    layer: int
    pooling: str

    @property
    def columns(self) -> list[int]:
        """Indices of the poolings along the pooling axis of cached features."""
        return [FEATURE_POOLINGS.index(name) for name in self.pooling.split("+")]

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.pooling}"


class LinearHeads(nn.Module):
    """H heads as one batched module. All start from the same weights.

    Args:
        num_heads: Number of heads H.
        width: Number of features that a head reads.
        num_classes: Number of classes K.
        eps: Epsilon of the LayerNorm.
        std: Standard deviation of the normal distribution of the initial weights.
        generator: Random generator for the initial weights.
    """

    def __init__(
        self, num_heads: int, width: int, num_classes: int, eps: float, std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.eps = eps
        self.norm_weight = nn.Parameter(torch.ones(num_heads, 1, width))
        self.norm_bias = nn.Parameter(torch.zeros(num_heads, 1, width))
        weight = torch.empty(num_classes, width).normal_(std=std, generator=generator)
        self.weight = nn.Parameter(weight.repeat(num_heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, num_classes))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Compute logits `(H, B, K)` of features `(H, B, width)`."""
        normalised = nn.functional.layer_norm(features, features.shape[-1:], eps=self.eps)
        scaled = normalised * self.norm_weight + self.norm_bias
        return torch.baddbmm(self.bias, scaled, self.weight.transpose(1, 2))

    @torch.no_grad()
    def standardize(self, features: torch.Tensor) -> None:
        """Set scale and shift such that each of the features `(H, N, width)` has mean 0 and deviation 1 over clips."""
        for head, clips in enumerate(features):
            normalised = nn.functional.layer_norm(clips, clips.shape[-1:], eps=self.eps)
            deviation, mean = torch.std_mean(normalised, dim=0, correction=0)
            scale = torch.where(deviation < LEAST_DEVIATION, 1.0, 1 / deviation.clamp(min=LEAST_DEVIATION))
            self.norm_weight[head, 0], self.norm_bias[head, 0] = scale, -mean * scale

    def classifier_state(self, head: int) -> dict[str, torch.Tensor]:
        """Return the state dict of one head as an `SSLAMClassifier`."""
        return {
            "layernorm.weight": self.norm_weight[head, 0].detach(),
            "layernorm.bias": self.norm_bias[head, 0].detach(),
            "dense.weight": self.weight[head].detach(),
            "dense.bias": self.bias[head, 0].detach(),
        }


def head_logits(features: torch.Tensor, state: dict[str, torch.Tensor], eps: float) -> torch.Tensor:
    """Compute the logits `(N, K)` of one head.

    Args:
        features: Features of shape `(N, width)`.
        state: State dict of [`LinearHeads.classifier_state`].
        eps: Epsilon of the LayerNorm.
    """
    scale, shift = state["layernorm.weight"], state["layernorm.bias"]
    normalised = nn.functional.layer_norm(features, features.shape[-1:], scale, shift, eps)
    return nn.functional.linear(normalised, state["dense.weight"], state["dense.bias"])


class FittedHeads(NamedTuple):
    """Result of [`fit_heads`].

    Attributes:
        heads: The heads, each with its weights after its best epoch.
        best_epochs: Best epoch of each head, counted from 1; without validation the last one.
        scores: Validation metric of each head after its best epoch; `None` without validation.
        losses: Mean training loss of each epoch, float32 of shape `(epochs, H)`.
    """

    heads: LinearHeads
    best_epochs: list[int]
    scores: list[float] | None
    losses: torch.Tensor


def head_losses(logits: torch.Tensor, targets: torch.Tensor, loss: Loss, label_smoothing: float = 0.0) -> torch.Tensor:
    """Compute the fine-tuning loss of each head, shape `(H,)`.

    Args:
        logits: Logits of shape `(H, B, K)`.
        targets: Targets of shape `(B, K)`, shared by the heads.
        loss: Name of the loss.
        label_smoothing: Share of a target that is spread over all classes.
    """
    sums = torch.stack([loss_sum(head, targets, loss, label_smoothing) for head in logits])
    return sums / loss_weight(targets, loss).clamp(min=1.0)


def mean_average_precision(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the mean average precision of each head, over the classes with a positive clip.

    Equals scikit-learn's `average_precision_score`, ties included, but handles all classes at once.

    Args:
        logits: Logits of shape `(H, N, K)`.
        targets: Targets of shape `(N, K)`, 0 or 1.

    Returns:
        Values of shape `(H,)`.
    """
    occurring = targets.any(0)
    positive = targets[:, occurring].T.bool()
    means = []
    for scores in logits[:, :, occurring].transpose(1, 2):
        ascending, order = scores.contiguous().sort(dim=1)
        # A threshold retrieves all clips with that score or a higher one, so equal scores share their precision.
        below = torch.searchsorted(ascending, ascending, side="left")
        hits = positive.gather(1, order)
        hits_below = nn.functional.pad(hits.cumsum(1), (1, 0)).gather(1, below)
        total = hits.sum(1, keepdim=True)
        precision = (total - hits_below) / (scores.shape[1] - below)
        means.append(((precision * hits).sum(1) / total[:, 0]).mean())
    return torch.stack(means)


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the accuracy of each head, shape `(H,)`, from logits `(H, N, K)` and one-hot targets `(N, K)`."""
    return (logits.argmax(-1) == targets.argmax(-1)).float().mean(1)


DEFAULT_LOSS: dict[ProblemType, Loss] = {
    "multi_label_classification": "bce_per_target",
    "single_label_classification": "cross_entropy",
}
METRICS: dict[ProblemType, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "multi_label_classification": mean_average_precision,
    "single_label_classification": accuracy,
}


def fit_heads(
    features: torch.Tensor,
    targets: torch.Tensor,
    validation: tuple[torch.Tensor, torch.Tensor] | None,
    problem_type: ProblemType,
    config: HeadConfig,
    *,
    eps: float,
    std: float,
    loss: Loss,
    label_smoothing: float = 0.0,
    seed: int = 0,
    description: str = "Fitting heads",
) -> FittedHeads:
    """Fit H heads, each on its own features of the same clips.

    Args:
        features: Features of shape `(H, N, width)`, on the device to fit on.
        targets: Targets of shape `(N, K)`, 0 or 1, on the same device.
        validation: Features and targets of other clips. They choose the best epoch of each head, by mean average
            precision or, with one label, by accuracy. Without them the last epoch is used.
        problem_type: Selects the validation metric.
        config: Settings of the fit.
        eps: Epsilon of the LayerNorm.
        std: Standard deviation of the initial weights.
        loss: Name of the loss.
        label_smoothing: Share of a target that is spread over all classes.
        seed: Determines the initial weights and the order of the clips.
        description: Label of the progress bar.
    """
    num_heads, num_clips, width = features.shape
    # Weights and order are drawn on the CPU, so that they are the same on every device.
    generator = torch.Generator().manual_seed(seed)
    heads = LinearHeads(num_heads, width, targets.shape[1], eps, std, generator).to(features.device)
    if config.standardize:
        heads.standardize(features)
    optimizer = torch.optim.AdamW(
        heads.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    max_updates = config.epochs * math.ceil(num_clips / config.batch_size)
    schedule = OptimizerConfig(config.learning_rate, warmup_updates=0, final_learning_rate=FINAL_LEARNING_RATE)
    best = {name: parameter.detach().clone() for name, parameter in heads.named_parameters()}
    best_scores = torch.full((num_heads,), -torch.inf, device=features.device)
    best_epochs = torch.full((num_heads,), config.epochs)
    losses = torch.zeros(config.epochs, num_heads)
    update = 0
    for epoch in tqdm(range(config.epochs), desc=description, unit="epoch", leave=False):
        total = torch.zeros(num_heads, device=features.device)
        for rows in torch.randperm(num_clips, generator=generator).split(config.batch_size):
            rows = rows.to(features.device)
            update += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(update, schedule, max_updates)
            values = head_losses(heads(features[:, rows]), targets[rows], loss, label_smoothing)
            optimizer.zero_grad()
            values.sum().backward()
            optimizer.step()
            total += values.detach() * len(rows)
        losses[epoch] = (total / num_clips).cpu()
        if validation is not None:
            with torch.no_grad():
                scores = METRICS[problem_type](heads(validation[0]), validation[1])
            better = scores > best_scores
            best_scores = torch.where(better, scores, best_scores)
            best_epochs[better.cpu()] = epoch + 1
            for name, parameter in heads.named_parameters():
                best[name] = torch.where(better[:, None, None], parameter.detach(), best[name])
    if validation is not None:
        heads.load_state_dict(best)
    return FittedHeads(heads, best_epochs.tolist(), best_scores.tolist() if validation is not None else None, losses)
