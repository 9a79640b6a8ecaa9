"""Settings, results, training and metrics that the fits of all kinds of heads share."""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from training.data.labels import LabelSet
from training.evaluation.metrics import ProblemType
from training.linear.clips import Clips
from training.linear.config import LinearEvalConfig
from training.linear.heads import DEFAULT_LOSS, METRICS, FittedHeads, Head, HeadConfig, Inputs, logits_of, train_heads
from training.run.config import TrainingError

# Limit of the features and logits in memory. A sweep that needs more is fitted in parts.
MAX_BYTES_IN_MEMORY = 4 * 2**30


class Setup(NamedTuple):
    """Everything except the clips that determines a fit.

    Attributes:
        config: The settings.
        labels: The classes.
        problem_type: The kind of task.
        width: Width of a token or of a pooled token.
        eps: Epsilon of the heads' LayerNorm.
        std: Standard deviation of initial weights.
        device: Device to fit on.
    """

    config: LinearEvalConfig
    labels: LabelSet
    problem_type: ProblemType
    width: int
    eps: float
    std: float
    device: torch.device


class Cost(NamedTuple):
    """The cost of a head.

    Attributes:
        parameters: Number of fitted parameters. For nearest neighbours, the values kept; for a forest, its nodes.
        flops: Floating point operations to classify a clip from its cached features. For a forest, its comparisons.
        cached_bytes: Bytes of cached features that the head reads per clip.
        seconds: Time to fit and test it. Heads that are fitted together share their time equally.
    """

    parameters: int
    flops: int
    cached_bytes: int
    seconds: float


class HeadResult(NamedTuple):
    """A fitted head and its metric.

    Attributes:
        head: The head.
        best_epoch: Epoch of its weights, counted from 1; `None` for a head without epochs.
        loss: Mean training loss of that epoch, or `None`.
        validation: Metric on the validation clips; `None` if there are none.
        tests: Metric on each of the sets of test clips.
        spread: Standard deviation of the first test metric over draws, for a few-shot head; `None` for other kinds.
        predict: Computes the logits `(N, K)` of clips, on the CPU.
        state: State dict of a linear head as an `SSLAMClassifier`; `None` for other kinds.
        cost: The head's cost.
    """

    head: Head
    best_epoch: int | None
    loss: float | None
    validation: float | None
    tests: list[float]
    spread: float | None
    predict: Callable[[Clips], torch.Tensor]
    state: dict[str, torch.Tensor] | None
    cost: Cost

    @property
    def test(self) -> float:
        """Metric on the first set of test clips."""
        return self.tests[0]


class Parts(NamedTuple):
    """Clips and targets of one fit. `clips[1]` is empty if there is no validation.

    Attributes:
        clips: Training clips, validation clips, and sets of test clips.
        targets: Their targets, `(N, K)` each, on the device of the fit.
    """

    clips: Sequence[Clips]
    targets: Sequence[torch.Tensor]

    @property
    def has_validation(self) -> bool:
        """Whether there are validation clips."""
        return len(self.clips[1]) > 0


def train(
    module: nn.Module,
    heads: Sequence[Head],
    inputs: Sequence[Inputs],
    parts: Parts,
    setup: Setup,
    settings: HeadConfig,
    generator: torch.Generator,
    description: str,
    cost: Cost,
    started: float,
    inputs_of: Callable[[Clips, Head, Setup], Inputs],
) -> list[HeadResult]:
    """Train and test several heads that are one module.

    Args:
        module: Computes the logits of all heads.
        heads: The heads.
        inputs: Inputs of training, validation and test clips.
        parts: The same clips, with their targets.
        setup: Settings and task.
        settings: Settings of the fit.
        generator: Determines the order of the clips.
        description: Title of the progress bar.
        cost: Cost of a head without its time.
        started: Value of `time.perf_counter` at which the work on these heads began.
        inputs_of: Makes the input of one head.
    """
    fitted = train_heads(
        module,
        inputs[0],
        parts.targets[0],
        (inputs[1], parts.targets[1]) if parts.has_validation else None,
        setup.problem_type,
        settings,
        generator=generator,
        loss=setup.config.loss or DEFAULT_LOSS[setup.problem_type],
        label_smoothing=setup.config.label_smoothing,
        description=f"{description}, {heads[0].kind}",
    )
    check_losses(fitted, heads)
    scores = scores_of([logits_of(module, part) for part in inputs[2:]], parts.targets[2:], setup)
    cost = cost._replace(seconds=(time.perf_counter() - started) / len(heads))
    return [
        result_of(
            head,
            fitted,
            i,
            scores,
            partial(predict_module, module=one_head(module, i), head=head, setup=setup, inputs_of=inputs_of),
            cost,
        )
        for i, head in enumerate(heads)
    ]


def one_head(module: nn.Module, index: int) -> nn.Module:
    """Return a copy of a module that has only one of its heads. The first axis of each tensor is that of the heads."""
    alone = copy.deepcopy(module)
    for tensor in (*alone.parameters(), *alone.buffers()):
        tensor.data = tensor.data[index : index + 1].clone()
    return alone


def predict_module(
    clips: Clips,
    module: nn.Module,
    head: Head,
    setup: Setup,
    inputs_of: Callable[[Clips, Head, Setup], Inputs],
) -> torch.Tensor:
    """Compute the logits of one head."""
    return logits_of(module, inputs_of(clips, head, setup))[0].cpu()


def check_losses(fitted: FittedHeads, heads: Sequence[Head]) -> None:
    """Check that the losses of all heads are finite.

    Raises:
        TrainingError: If a head's loss is not finite.
    """
    if not (finite := fitted.losses.isfinite().all(0)).all():
        head = heads[int(finite.int().argmin())]
        section = head.kind if head.kind in ("attentive", "prototypes") else "head"
        raise TrainingError(f"The loss of the head on {head} is not finite. Lower {section}.learning_rate.")


def scores_of(logits: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], setup: Setup) -> list[list[float]]:
    """Return the metric of each set of clips and head, from logits `(H, N, K)` and targets `(N, K)` of each set."""
    metric = METRICS[setup.problem_type]
    return [metric(part, of).tolist() if len(of) else [] for part, of in zip(logits, targets, strict=True)]


def result_of(
    head: Head,
    fitted: FittedHeads,
    index: int,
    scores: list[list[float]],
    predict: Callable[[Clips], torch.Tensor],
    cost: Cost,
    state: dict[str, torch.Tensor] | None = None,
) -> HeadResult:
    """Return the result of one of several heads that were trained together."""
    epoch = fitted.best_epochs[index]
    validation = None if fitted.scores is None else fitted.scores[index]
    tests = [part[index] for part in scores]
    return HeadResult(
        head, epoch, fitted.losses[epoch - 1, index].item(), validation, tests, None, predict, state, cost
    )


def itemsize(clips: Clips) -> int:
    """Return the number of bytes of a cached value."""
    return clips.sets[0].pooled.dtype.itemsize
