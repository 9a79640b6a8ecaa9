"""Fits of heads on patch tokens."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from training.linear.clips import Clips
from training.linear.fitting import MAX_BYTES_IN_MEMORY, Cost, HeadResult, Parts, Setup, train
from training.linear.heads import Head, HeadConfig, Inputs
from training.linear.token_heads import AttentiveHeads, PrototypeHeads, TokenInputs, channel_statistics


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
