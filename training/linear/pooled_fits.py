"""Fits of linear heads on pooled features."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from tqdm.auto import tqdm

from training.linear.clips import Clips
from training.linear.fitting import (
    MAX_BYTES_IN_MEMORY,
    Cost,
    HeadResult,
    Parts,
    Setup,
    check_losses,
    itemsize,
    result_of,
    scores_of,
    train,
)
from training.linear.heads import (
    DEFAULT_LOSS,
    Head,
    HeadConfig,
    InMemory,
    Inputs,
    LayerSumHeads,
    LinearHeads,
    fit_heads,
    head_logits,
)
from training.linear.ridge import RidgeHead, solve_ridge


def parts_that_fit(heads: Sequence[Head], clips: Sequence[Clips], num_classes: int) -> list[list[Head]]:
    """Divide heads into lists of one width and setting each whose features and logits fit into memory together.

    Args:
        heads: The heads.
        clips: The clips of the round.
        num_classes: Number of logits per clip.
    """
    num_clips = sum(map(len, clips))
    alike: dict[tuple[int, tuple[tuple[str, float], ...]], list[Head]] = {}
    for head in heads:
        alike.setdefault((clips[0].values_of(head), head.setting), []).append(head)
    parts = []
    for (values, _), group in alike.items():
        count = max(1, MAX_BYTES_IN_MEMORY // ((values + num_classes) * max(num_clips, 1) * 4))
        parts += [group[first : first + count] for first in range(0, len(group), count)]
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
    num_classes = len(setup.labels)
    for group in parts_that_fit(heads, parts.clips, num_classes):
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


def fit_ridges(heads: Sequence[Head], parts: Parts, setup: Setup, description: str) -> list[HeadResult]:
    """Solve ridge regressions on pooled features. Heads on the same features share their equations."""
    results = []
    places: dict[tuple[int | str, str], list[Head]] = {}
    for head in heads:
        places.setdefault((head.layer, head.pooling), []).append(head)
    for group in tqdm(places.values(), desc=f"{description}, ridge", unit="place", leave=False):
        started = time.perf_counter()
        features = [clips.pooled(group[0]).to(setup.device) for clips in parts.clips]
        solved = solve_ridge(features[0], parts.targets[0], [dict(head.setting)["strength"] for head in group])
        logits = [torch.stack([ridge.logits(part) for ridge in solved]) for part in features[1:]]
        validation, *scores = scores_of(logits, parts.targets[1:], setup)
        width, num_classes = solved[0].weight.shape
        cost = Cost(
            (width + 1) * num_classes,
            2 * width * num_classes,
            width * itemsize(parts.clips[0]),
            (time.perf_counter() - started) / len(group),
        )
        for i, (head, ridge) in enumerate(zip(group, solved, strict=True)):
            predict = partial(predict_ridge, head=head, ridge=RidgeHead(*(value.cpu() for value in ridge)))
            of_validation = validation[i] if parts.has_validation else None
            tests = [part[i] for part in scores]
            results.append(HeadResult(head, None, None, of_validation, tests, None, predict, None, cost))
    return results


def predict_ridge(clips: Clips, head: Head, ridge: RidgeHead) -> torch.Tensor:
    """Compute the scores of a ridge regression."""
    return ridge.logits(clips.pooled(head))


def fit_layer_sums(heads: Sequence[Head], parts: Parts, setup: Setup, description: str) -> list[HeadResult]:
    """Fit linear heads on weighted sums of all layers' pooled features."""
    results = []
    num_layers = parts.clips[0].sets[0].pooled.shape[1]
    num_classes = len(setup.labels)
    for group in parts_that_fit(heads, parts.clips, num_classes):
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
