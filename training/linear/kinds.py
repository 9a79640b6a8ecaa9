"""Fitting of heads of every kind on the cached features of clips.

[`fit_kinds`] takes heads of any kinds and returns a [`HeadResult`] for each. Heads of one kind and width are fitted at
once.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from training.data.config import DataError
from training.data.labels import LabelSet
from training.evaluation.metrics import ProblemType
from training.linear.clips import Clips
from training.linear.config import LinearEvalConfig
from training.linear.forest import fit_forest, forest_scores, forest_size
from training.linear.heads import (
    DEFAULT_LOSS,
    METRICS,
    FittedHeads,
    Head,
    HeadConfig,
    InMemory,
    Inputs,
    LayerSumHeads,
    LinearHeads,
    fit_heads,
    head_logits,
    logits_of,
    train_heads,
)
from training.linear.neighbours import draw_shots, few_shot_logits, neighbour_logits
from training.linear.token_heads import AttentiveHeads, PrototypeHeads, TokenInputs, channel_statistics
from training.run.config import TrainingError

# Limit of features and logits in memory at once. A sweep that needs more is fitted in parts.
MAX_BYTES_IN_MEMORY = 4 * 2**30


class Setup(NamedTuple):
    """The facts besides the clips that determine a fit.

    Attributes:
        config: The settings.
        labels: The classes.
        problem_type: The kind of task.
        width: Width of a token or pooling.
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
        parameters: Number of fitted parameters; of neighbours the values kept, of a forest its nodes.
        flops: Floating point operations to classify a clip from its cached features; of a forest the comparisons.
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
        spread: Standard deviation of the first test metric over draws, for a few-shot head.
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
    """Clips and targets of one fit. Without validation `clips[1]` is empty.

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


def fit_kinds(
    heads: Sequence[Head],
    train: Clips,
    validation: Clips,
    tests: Sequence[Clips],
    setup: Setup,
    description: str,
) -> list[HeadResult]:
    """Fit all heads on the training clips, choose their epochs by the validation clips, and test them.

    Args:
        heads: The heads.
        train: The training clips.
        validation: The validation clips; none for heads of the last epoch.
        tests: Sets of test clips.
        setup: Settings and task.
        description: Title of the progress bar.

    Raises:
        TrainingError: If a head's loss is not finite.
        DataError: If the clips do not have the labels that the task needs.
    """
    clips = (train, validation, *tests)
    parts = Parts(clips, [target.to(setup.device) for target in encode_targets(clips, setup)])
    results: dict[Head, HeadResult] = {}
    for kind in dict.fromkeys(head.kind for head in heads):
        of_kind = [head for head in heads if head.kind == kind]
        results |= {result.head: result for result in FITS[kind](of_kind, parts, setup, description)}
    return [results[head] for head in heads]


def encode_targets(clips: Sequence[Clips], setup: Setup) -> list[torch.Tensor]:
    """Return the targets of training, validation and test clips: `(N, K)` each.

    Raises:
        DataError: If none of these clips has a label, or the task needs one label each and they do not have it.
    """
    targets = [setup.labels.encode(part.column("labels")) for part in clips]
    names = ["train", "validation", *["test"] * (len(clips) - 2)]
    for name, part in zip(names, targets, strict=True):
        if len(part) and not part.any():
            raise DataError(f"None of the {len(part)} {name} clips has a label.")
        odd = (part.sum(1) != 1).sum().item()
        if setup.problem_type == "single_label_classification" and odd:
            raise DataError(
                f"{odd} of the {len(part)} {name} clips do not have one label each; is problem_type multi?"
            )
    return targets


def parts_that_fit(heads: Sequence[Head], num_clips: int, values_per_clip: int) -> list[list[Head]]:
    """Divide heads into lists of one width and setting each whose features and logits fit into memory together.

    Args:
        heads: The heads.
        num_clips: Number of clips of the round.
        values_per_clip: Features and logits per clip of a head that reads one pooling.
    """
    parts: list[list[Head]] = []
    for head in sorted(heads, key=lambda head: (len(head.columns), head.setting)):
        size = (len(parts[-1]) + 1) * num_clips * values_per_clip * len(head.columns) * 4 if parts else 0
        if (
            parts
            and len(parts[-1][0].columns) == len(head.columns)
            and parts[-1][0].setting == head.setting
            and size <= MAX_BYTES_IN_MEMORY
        ):
            parts[-1].append(head)
        else:
            parts.append([head])
    return parts


def configured(config: HeadConfig, head: Head) -> HeadConfig:
    """Return the settings of a fit with the values of a head's own setting."""
    own = dict(head.setting)
    return replace(
        config,
        learning_rate=own.get("lr", config.learning_rate),
        weight_decay=own.get("wd", config.weight_decay),
    )


def fit_linear(heads: Sequence[Head], parts: Parts, setup: Setup, description: str) -> list[HeadResult]:
    """Fit linear heads on pooled features."""
    config, results = setup.config, []
    num_classes, num_clips = len(setup.labels), sum(map(len, parts.clips))
    for group in parts_that_fit(heads, num_clips, setup.width + num_classes):
        started = time.perf_counter()
        features = [torch.stack([clips.pooled(head) for head in group]).to(setup.device) for clips in parts.clips]
        fitted = fit_heads(
            features[0],
            parts.targets[0],
            (features[1], parts.targets[1]) if parts.has_validation else None,
            setup.problem_type,
            configured(config.head, group[0]),
            eps=setup.eps,
            std=setup.std,
            loss=config.loss or DEFAULT_LOSS[setup.problem_type],
            label_smoothing=config.label_smoothing,
            seed=config.seed,
            description=description,
        )
        check_losses(fitted, group)
        with torch.no_grad():
            logits = [fitted.heads(part) for part in features[2:]]
        scores = scores_of(logits, parts.targets[2:], setup)
        seconds = (time.perf_counter() - started) / len(group)
        for i, head in enumerate(group):
            assert isinstance(fitted.heads, LinearHeads)
            state = {name: value.cpu() for name, value in fitted.heads.classifier_state(i).items()}
            width = features[0].shape[-1]
            cost = Cost(
                2 * width + (width + 1) * num_classes,
                9 * width + 2 * width * num_classes,
                width * itemsize(parts.clips[0]),
                seconds,
            )
            predict = partial(predict_linear, head=head, state=state, eps=setup.eps)
            results.append(result_of(head, fitted, i, scores, predict, cost, state))
    return results


def predict_linear(clips: Clips, head: Head, state: dict[str, torch.Tensor], eps: float) -> torch.Tensor:
    """Compute the logits of a linear head."""
    return head_logits(clips.pooled(head), state, eps)


def fit_layer_sums(heads: Sequence[Head], parts: Parts, setup: Setup, description: str) -> list[HeadResult]:
    """Fit linear heads on weighted sums of all layers' pooled features."""
    results = []
    num_layers = parts.clips[0].sets[0].pooled.shape[1]
    num_clips, num_classes = sum(map(len, parts.clips)), len(setup.labels)
    for group in parts_that_fit(heads, num_clips, num_layers * setup.width + num_classes):
        started = time.perf_counter()
        features = [torch.stack([clips.pooled(head) for head in group]).to(setup.device) for clips in parts.clips]
        generator = torch.Generator().manual_seed(setup.config.seed)
        module = LayerSumHeads(features[0], num_classes, setup.eps, setup.std, generator)
        if setup.config.head.standardize:
            module.linear.standardize(((features[0] - module.mean) * module.scale).mean(2))
        inputs = [InMemory(part) for part in features]
        width = features[0].shape[-1]
        cost = Cost(
            num_layers + 2 * width + (width + 1) * num_classes,
            4 * num_layers * width + 9 * width + 2 * width * num_classes,
            num_layers * width * itemsize(parts.clips[0]),
            0.0,
        )
        settings = configured(setup.config.head, group[0])
        results += train(module, group, inputs, parts, setup, settings, generator, description, cost, started, pooled)
    return results


def pooled(clips: Clips, head: Head, setup: Setup) -> Inputs:
    """Return the input of one head on pooled features."""
    return InMemory(clips.pooled(head)[None].to(setup.device))


def fit_attentive(heads: Sequence[Head], parts: Parts, setup: Setup, description: str) -> list[HeadResult]:
    """Fit heads with attentive pooling of patch tokens."""
    own, num_classes = setup.config.attentive, len(setup.labels)

    def make(layers: list[int], inputs: TokenInputs, generator: torch.Generator) -> nn.Module:
        return AttentiveHeads(len(layers), setup.width, own.queries, num_classes, setup.std, generator)

    num_patches, width = parts.clips[0].token_shape
    cost = Cost(
        own.queries * width * (1 + num_classes) + num_classes,
        4 * own.queries * num_patches * width + 2 * own.queries * width * num_classes,
        2 * num_patches * width,
        0.0,
    )
    settings = replace(
        setup.config.head, learning_rate=own.learning_rate, epochs=own.epochs, weight_decay=own.weight_decay
    )
    return fit_on_tokens(heads, parts, setup, settings, make, False, cost, description)


def fit_prototypes(heads: Sequence[Head], parts: Parts, setup: Setup, description: str) -> list[HeadResult]:
    """Fit heads with prototypes for patch tokens."""
    own, num_classes = setup.config.prototypes, len(setup.labels)
    # A table of classes can name classes of which there is no clip.
    num_prototypes = own.per_class * int(parts.targets[0].any(0).sum())

    def make(layers: list[int], inputs: TokenInputs, generator: torch.Generator) -> nn.Module:
        module = PrototypeHeads(
            len(layers), setup.width, num_prototypes, num_classes, own.binary, setup.std, generator
        ).to(setup.device)
        with torch.no_grad():
            rows = torch.arange(len(inputs)).split(inputs.rows_at_once)
            module.standardize(torch.cat([module.similarities(inputs.take(part)) for part in rows], dim=1))
        return module

    num_patches, width = parts.clips[0].token_shape
    cost = Cost(
        num_prototypes * (width + 2 + num_classes) + num_classes,
        2 * num_prototypes * (num_patches * width + num_classes),
        2 * num_patches * width,
        0.0,
    )
    settings = replace(
        setup.config.head, learning_rate=own.learning_rate, epochs=own.epochs, weight_decay=own.weight_decay
    )
    return fit_on_tokens(heads, parts, setup, settings, make, True, cost, description)


def fit_on_tokens(
    heads: Sequence[Head],
    parts: Parts,
    setup: Setup,
    settings: HeadConfig,
    make: Callable[[list[int], TokenInputs, torch.Generator], nn.Module],
    unit: bool,
    cost: Cost,
    description: str,
) -> list[HeadResult]:
    """Fit heads of one kind on patch tokens.

    Args:
        heads: The heads, one for each layer.
        parts: Clips and targets.
        setup: Settings and task.
        settings: Settings of the fit.
        make: Makes the module for some layers, from the inputs of the training clips.
        unit: Whether the module reads tokens of unit length.
        cost: Cost of a head without its time.
        description: Title of the progress bar.
    """
    num_patches, width = parts.clips[0].token_shape
    bytes_per_head = 4 * num_patches * width * sum(map(len, parts.clips))
    # Layers that do not fit into memory together are fitted one after another.
    size = max(1, MAX_BYTES_IN_MEMORY // bytes_per_head)
    results: list[HeadResult] = []
    for start in range(0, len(heads), size):
        group = heads[start : start + size]
        started = time.perf_counter()
        layers = [layer for head in group if isinstance(layer := head.layer, int)]
        mean, deviation = channel_statistics(parts.clips[0], layers)
        share = MAX_BYTES_IN_MEMORY / len(parts.clips)
        inputs = [TokenInputs(clips, layers, mean, deviation, unit, setup.device, share) for clips in parts.clips]
        generator = torch.Generator().manual_seed(setup.config.seed)
        module = make(layers, inputs[0], generator).to(setup.device)
        statistics = {layer: (mean[i : i + 1], deviation[i : i + 1]) for i, layer in enumerate(layers)}
        tokens = partial(tokens_of, statistics=statistics, unit=unit)
        results += train(module, group, inputs, parts, setup, settings, generator, description, cost, started, tokens)
    return results


def tokens_of(
    clips: Clips,
    head: Head,
    setup: Setup,
    statistics: dict[int, tuple[torch.Tensor, torch.Tensor]],
    unit: bool,
) -> Inputs:
    """Return the input of one head on patch tokens.

    Args:
        clips: The clips.
        head: The head.
        setup: Settings and task.
        statistics: Mean and deviation of the channels by layer.
        unit: Whether the head reads tokens of unit length.
    """
    assert isinstance(head.layer, int)
    mean, deviation = statistics[head.layer]
    return TokenInputs(clips, [head.layer], mean, deviation, unit, setup.device, max_bytes=0)


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
    """Train a module of several heads and test them.

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
    """Return a module of several heads with one of them alone. Each tensor's first axis is that of the heads."""
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


def fit_neighbours(heads: Sequence[Head], parts: Parts, setup: Setup, description: str) -> list[HeadResult]:
    """Classify by nearest neighbours. Heads on the same features share their similarities."""
    results = []
    for place in dict.fromkeys((head.layer, head.pooling) for head in heads):
        started = time.perf_counter()
        group = [head for head in heads if (head.layer, head.pooling) == place]
        ks = [int(dict(head.setting)["k"]) for head in group]
        features = [clips.pooled(group[0]).to(setup.device) for clips in parts.clips]
        logits = [neighbour_logits(features[0], parts.targets[0], part, ks) for part in features[1:]]
        validation, *scores = scores_of(logits, parts.targets[1:], setup)
        count, width = features[0].shape
        cost = Cost(
            count * width,
            2 * count * width,
            width * itemsize(parts.clips[0]),
            (time.perf_counter() - started) / len(group),
        )
        for i, (head, k) in enumerate(zip(group, ks, strict=True)):
            predict = partial(predict_neighbours, head=head, k=k, train=parts.clips[0], targets=parts.targets[0])
            of_validation = validation[i] if parts.has_validation else None
            tests = [part[i] for part in scores]
            results.append(HeadResult(head, None, None, of_validation, tests, None, predict, None, cost))
    return results


def predict_neighbours(clips: Clips, head: Head, k: int, train: Clips, targets: torch.Tensor) -> torch.Tensor:
    """Compute the scores of nearest neighbours."""
    features = [part.pooled(head).to(targets.device) for part in (train, clips)]
    return neighbour_logits(features[0], targets, features[1], [k])[0].cpu()


def fit_few_shots(heads: Sequence[Head], parts: Parts, setup: Setup, description: str) -> list[HeadResult]:
    """Classify by nearest means of a few training clips of each class, drawn many times."""
    own, results = setup.config.few_shot, []
    drawn = draw_shots(parts.targets[0], own.shots, own.draws, setup.config.seed)
    for head in heads:
        started = time.perf_counter()
        features = [clips.pooled(head).to(setup.device) for clips in parts.clips]
        values = [
            METRICS[setup.problem_type](few_shot_logits(features[0], part, drawn), targets)
            for part, targets in zip(features[1:], parts.targets[1:], strict=True)
            if len(part)
        ]
        means = [value.mean().item() for value in values]
        tests = values[1:] if parts.has_validation else values
        width = features[0].shape[-1]
        cost = Cost(
            len(setup.labels) * width,
            5 * width + 2 * width * len(setup.labels),
            width * itemsize(parts.clips[0]),
            time.perf_counter() - started,
        )
        results.append(
            HeadResult(
                head,
                None,
                None,
                means[0] if parts.has_validation else None,
                means[-len(tests) :],
                tests[0].std().item() if own.draws > 1 else None,
                partial(predict_few_shots, head=head, train=parts.clips[0], drawn=drawn, device=setup.device),
                None,
                cost,
            )
        )
    return results


def predict_few_shots(
    clips: Clips, head: Head, train: Clips, drawn: list[list[torch.Tensor]], device: torch.device
) -> torch.Tensor:
    """Compute the similarities of the first draw."""
    features = [part.pooled(head).to(device) for part in (train, clips)]
    return few_shot_logits(features[0], features[1], drawn[:1])[0].cpu()


def fit_forests(heads: Sequence[Head], parts: Parts, setup: Setup, description: str) -> list[HeadResult]:
    """Fit a random forest on cepstral statistics."""
    started = time.perf_counter()
    features = [clips.pooled(heads[0]).numpy() for clips in parts.clips]
    forest = fit_forest(features[0], parts.targets[0].cpu().numpy(), setup.config.forest.trees, setup.config.seed)
    num_classes = len(setup.labels)

    def score(part: np.ndarray, targets: torch.Tensor) -> float:
        logits = torch.from_numpy(forest_scores(forest, part, num_classes))[None].to(setup.device)
        return METRICS[setup.problem_type](logits, targets)[0].item()

    others = zip(features[1:], parts.targets[1:], strict=True)
    validation, *tests = [score(part, targets) if len(part) else None for part, targets in others]
    nodes, comparisons = forest_size(forest)
    cost = Cost(nodes, comparisons, features[0].shape[1] * 4, time.perf_counter() - started)

    def predict(clips: Clips) -> torch.Tensor:
        return torch.from_numpy(forest_scores(forest, clips.pooled(heads[0]).numpy(), num_classes))

    of_tests = [value for value in tests if value is not None]
    return [HeadResult(heads[0], None, None, validation, of_tests, None, predict, None, cost)]


def check_losses(fitted: FittedHeads, heads: Sequence[Head]) -> None:
    """Check that the heads converged.

    Raises:
        TrainingError: If a head's loss is not finite.
    """
    if not (finite := fitted.losses.isfinite().all(0)).all():
        head = heads[int(finite.int().argmin())]
        section = head.kind if head.kind in ("attentive", "prototypes") else "head"
        raise TrainingError(f"The loss of the head on {head} is not finite; lower {section}.learning_rate.")


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
    """Return the bytes of a cached value."""
    return clips.sets[0].pooled.dtype.itemsize


Fit = Callable[[Sequence[Head], Parts, Setup, str], list[HeadResult]]
FITS: dict[str, Fit] = {
    "linear": fit_linear,
    "layers": fit_layer_sums,
    "attentive": fit_attentive,
    "prototypes": fit_prototypes,
    "knn": fit_neighbours,
    "few_shot": fit_few_shots,
    "forest": fit_forests,
}
