"""Fits without gradients: nearest neighbours, nearest class means of a few clips, and the random forest."""

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from training.linear.clips import Clips
from training.linear.fitting import Cost, HeadResult, Parts, Setup, itemsize, scores_of
from training.linear.forest import fit_forest, forest_scores, forest_size
from training.linear.heads import METRICS, Head
from training.linear.neighbours import draw_shots, few_shot_logits, neighbour_logits


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
