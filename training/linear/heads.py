"""Linear heads, many of them fitted at once on features in memory.

A linear head is the classifier of `SSLAMForAudioClassification` on pooled tokens: LayerNorm and a linear layer. H
heads (one per layer and pooling) train as one batched matmul. Losses are summed and AdamW is elementwise, so each head
ends exactly as it would on its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from training.evaluation.metrics import ProblemType
from training.linear.features import FEATURE_POOLINGS
from training.run.losses import Loss, loss_sum, loss_weight
from training.run.optimization import OptimizerConfig, learning_rate

# `layers` reads pooled features of all layers, and two kinds read patch tokens.
KINDS = ("linear", "ridge", "layers", "attentive", "prototypes", "knn")
TOKEN_KINDS = ("attentive", "prototypes")
# As in the published linear evaluation.
FINAL_LEARNING_RATE = 1e-6
# Below this standard deviation after LayerNorm, a feature is constant up to rounding, such as the embedded CLS token.
LEAST_DEVIATION = 1e-4


@dataclass
class HeadConfig:
    """Settings of fitting a head: AdamW with a cosine schedule that ends at 1e-6, without warm-up, as published."""

    kinds: list[str] = field(
        default_factory=lambda: ["linear"],
        metadata={
            "help": "Kinds of heads to fit in cached mode. linear: on pooled features, as published. ridge: ridge "
            "regression in closed form on pooled features, the first choice for small data sets. layers: linear, on a "
            "weighted sum of all layers' pooled features. attentive: learned queries over patch tokens. prototypes: "
            "greatest similarity of learned prototypes to a patch token. knn: nearest neighbours by pooled features.",
            "default": "linear",
        },
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the first update."})
    learning_rates: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Learning rates for the kinds linear and layers in cached mode. Validation chooses one.",
            "default": "learning_rate alone",
        },
    )
    weight_decays: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Weight decays for the kinds linear and layers in cached mode. Validation chooses one.",
            "default": "weight_decay alone",
        },
    )
    epochs: int = field(default=50, metadata={"help": "Passes over the training clips."})
    batch_size: int = field(default=48, metadata={"help": "Clips per update in cached mode."})
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"help": "AdamW's betas."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled weight decay."})
    standardize: bool = field(
        default=True,
        metadata={
            "help": "In cached mode, initialise the LayerNorm to give every feature mean 0 and standard deviation 1 "
            "over the training clips. (The published initialisation learns less in 50 epochs.)"
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
        if not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates={self.learning_rates} must be positive")
        if not all(decay >= 0 for decay in self.weight_decays):
            raise ValueError(f"weight_decays={self.weight_decays} must not be negative")
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds={self.kinds} must be some of {', '.join(KINDS)}")


class Head(NamedTuple):
    """A head: the features that it reads, its kind and its settings.

    Attributes:
        layer: 0 for the output of the embeddings, i for the output of block i, "concat" for all of them side by side,
            or "all" for the kind `layers`.
        pooling: One of [`training.linear.features.FEATURE_POOLINGS`], or several joined by +. "patches" for a head on
            patch tokens.
        kind: One of [`KINDS`], "few_shot" or "forest".
        setting: Names and values of the settings that distinguish it from other heads on the same features.
    """

    layer: int | str
    pooling: str
    kind: str = "linear"
    setting: tuple[tuple[str, float], ...] = ()

    @property
    def columns(self) -> list[int]:
        """Indices of the poolings along the pooling axis of cached features. MFCC features have one pooling."""
        if self.kind == "forest":
            return [0]
        return [FEATURE_POOLINGS.index(name) for name in self.pooling.split("+")]

    @property
    def settings(self) -> str:
        """The settings as text."""
        return ", ".join(f"{name} {value:g}" for name, value in self.setting)

    def __str__(self) -> str:
        if self.kind == "forest":
            return "MFCC and random forest"
        names: dict[int | str, str] = {"all": "sum of layers", "concat": "all layers side by side"}
        where = names.get(self.layer, f"layer {self.layer}")
        kind = [] if self.kind == "linear" else [self.kind]
        return ", ".join([where, self.pooling, *kind, *([self.settings] if self.setting else [])])


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
        """Set scale and shift to give each of the features `(H, N, width)` mean 0 and deviation 1 over clips."""
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


class LayerSumHeads(nn.Module):
    """H linear heads, each on a weighted sum of all layers' features. The weights are a softmax over layers.

    Fixed means and standard deviations standardise each layer's features, so the weights compare layers at one scale.

    Args:
        features: Features of the training clips, `(H, N, layers, width)`.
        num_classes: Number of classes K.
        eps: Epsilon of the LayerNorm.
        std: Standard deviation of the initial weights.
        generator: Random generator for the initial weights.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, features: torch.Tensor, num_classes: int, eps: float, std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        num_heads, _, num_layers, width = features.shape
        deviation, mean = torch.std_mean(features, dim=1, keepdim=True, correction=0)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", 1 / deviation.clamp(min=LEAST_DEVIATION), persistent=False)
        self.gate = nn.Parameter(torch.zeros(num_heads, num_layers, 1, device=features.device))
        self.linear = LinearHeads(num_heads, width, num_classes, eps, std, generator).to(features.device)

    def layer_weights(self) -> torch.Tensor:
        """Return the weights of the layers, `(H, layers)`."""
        return self.gate.softmax(1)[..., 0]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Compute logits `(H, B, K)` of features `(H, B, layers, width)`."""
        standard = (features - self.mean) * self.scale
        return self.linear((standard * self.gate.softmax(1)[:, None]).sum(2))


class Inputs(Protocol):
    """The input of H heads for N clips."""

    @property
    def rows_at_once(self) -> int:
        """Number of clips to evaluate at once."""

    def __len__(self) -> int:
        """Return N."""

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the input of some clips, `(H, B, ...)`."""


class InMemory(NamedTuple):
    """Inputs held as one tensor `(H, N, ...)`."""

    values: torch.Tensor

    @property
    def rows_at_once(self) -> int:
        """See [`Inputs.rows_at_once`]."""
        return max(1, self.values.shape[1])

    def __len__(self) -> int:
        return self.values.shape[1]

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """See [`Inputs.take`]."""
        return self.values[:, rows.to(self.values.device)]


def logits_of(heads: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Compute the logits `(H, N, K)` of all clips, without gradients."""
    with torch.no_grad():
        return torch.cat(
            [heads(inputs.take(rows)) for rows in torch.arange(len(inputs)).split(inputs.rows_at_once)], dim=1
        )


class FittedHeads(NamedTuple):
    """Result of [`fit_heads`].

    Attributes:
        heads: The heads, each with its weights after its best epoch.
        best_epochs: Best epoch of each head, counted from 1; the last epoch without validation.
        scores: Validation metric of each head after its best epoch; `None` without validation.
        losses: Mean training loss of each epoch, float32 of shape `(epochs, H)`.
    """

    heads: nn.Module
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

    The result equals that of scikit-learn's `average_precision_score`, ties included. All classes are handled at once.

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
            precision or, with one label, by accuracy. `None` selects the last epoch.
        problem_type: Selects the validation metric.
        config: Settings of the fit.
        eps: Epsilon of the LayerNorm.
        std: Standard deviation of the initial weights.
        loss: Name of the loss.
        label_smoothing: Share of a target that is spread over all classes.
        seed: Determines the initial weights and the order of the clips.
        description: Label of the progress bar.
    """
    num_heads, _, width = features.shape
    # Weights and order are drawn on the CPU, so that they are the same on every device.
    generator = torch.Generator().manual_seed(seed)
    heads = LinearHeads(num_heads, width, targets.shape[1], eps, std, generator).to(features.device)
    if config.standardize:
        heads.standardize(features)
    return train_heads(
        heads,
        InMemory(features),
        targets,
        None if validation is None else (InMemory(validation[0]), validation[1]),
        problem_type,
        config,
        generator=generator,
        loss=loss,
        label_smoothing=label_smoothing,
        description=description,
    )


def train_heads(
    heads: nn.Module,
    inputs: Inputs,
    targets: torch.Tensor,
    validation: tuple[Inputs, torch.Tensor] | None,
    problem_type: ProblemType,
    config: HeadConfig,
    *,
    generator: torch.Generator,
    loss: Loss,
    label_smoothing: float,
    description: str,
) -> FittedHeads:
    """Train H heads with one optimiser. The first axis of each parameter is that of the heads.

    Args:
        heads: Computes logits `(H, B, K)` of the inputs.
        inputs: Inputs of the N training clips.
        targets: Targets of shape `(N, K)`, 0 or 1, on the device of the heads.
        validation: Inputs and targets of other clips, as for [`fit_heads`].
        problem_type: Selects the validation metric.
        config: Settings of the fit.
        generator: Determines the order of the clips.
        loss: Name of the loss.
        label_smoothing: Share of a target that is spread over all classes.
        description: Label of the progress bar.
    """
    num_heads, num_clips, device = next(heads.parameters()).shape[0], len(inputs), targets.device
    optimizer = torch.optim.AdamW(
        heads.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    max_updates = config.epochs * math.ceil(num_clips / config.batch_size)
    schedule = OptimizerConfig(config.learning_rate, warmup_updates=0, final_learning_rate=FINAL_LEARNING_RATE)
    best = {name: parameter.detach().clone() for name, parameter in heads.named_parameters()}
    best_scores = torch.full((num_heads,), -torch.inf, device=device)
    best_epochs = torch.full((num_heads,), config.epochs)
    losses = torch.zeros(config.epochs, num_heads)
    update = 0
    for epoch in tqdm(range(config.epochs), desc=description, unit="epoch", leave=False):
        total = torch.zeros(num_heads, device=device)
        for rows in torch.randperm(num_clips, generator=generator).split(config.batch_size):
            rows = rows.to(device)
            update += 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(update, schedule, max_updates)
            values = head_losses(heads(inputs.take(rows)), targets[rows], loss, label_smoothing)
            optimizer.zero_grad()
            values.sum().backward()
            optimizer.step()
            total += values.detach() * len(rows)
        losses[epoch] = (total / num_clips).cpu()
        if validation is not None:
            scores = METRICS[problem_type](logits_of(heads, validation[0]), validation[1])
            better = scores > best_scores
            best_scores = torch.where(better, scores, best_scores)
            best_epochs[better.cpu()] = epoch + 1
            for name, parameter in heads.named_parameters():
                of_head = better.view(-1, *[1] * (parameter.ndim - 1))
                best[name] = torch.where(of_head, parameter.detach(), best[name])
    if validation is not None:
        heads.load_state_dict(best)
    return FittedHeads(heads, best_epochs.tolist(), best_scores.tolist() if validation is not None else None, losses)
