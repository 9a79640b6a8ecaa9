"""Heads on patch tokens: they find what the mean over patches hides, and equal a plain computation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.linear import token_heads
from training.linear.clips import Clips
from training.linear.features import FeatureSet
from training.linear.heads import HeadConfig, InMemory, accuracy, logits_of, train_heads
from training.linear.token_heads import (
    AttentiveHeads,
    PrototypeHeads,
    TokenInputs,
    channel_statistics,
    nearest_tokens,
)

WIDTH, PATCHES, CLASSES = 12, 9, 3


def needles(num_clips, seed):
    """Return tokens `(1, N, PATCHES, WIDTH)` and targets. One patch of a clip has the direction of its class.

    Directions are vectors of signs: a binary prototype is never near to an axis.
    """
    directions = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]]).repeat(1, 3)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_clips, PATCHES, WIDTH, generator=generator)
    classes = torch.arange(num_clips) % CLASSES
    places = torch.randint(PATCHES, (num_clips,), generator=generator)
    tokens[torch.arange(num_clips), places] += 2 * directions[classes]
    return tokens[None], torch.eye(CLASSES)[classes]


def fit(heads, tokens, targets, **settings):
    return train_heads(
        heads,
        InMemory(tokens),
        targets,
        None,
        "single_label_classification",
        HeadConfig(**{"learning_rate": 3e-2, "epochs": 30, "batch_size": 30} | settings),
        generator=torch.Generator().manual_seed(0),
        loss="cross_entropy",
        label_smoothing=0.0,
        description="Fitting",
    )


def test_attention_finds_the_patch_of_the_class():
    generator = torch.Generator().manual_seed(0)
    heads = AttentiveHeads(1, WIDTH, 4, CLASSES, 0.02, generator)
    fit(heads, *needles(240, 0))
    tokens, targets = needles(120, 1)
    assert accuracy(logits_of(heads, InMemory(tokens)), targets)[0] > 0.9


@pytest.mark.parametrize("binary", [True, False])
def test_prototypes_find_the_patch_of_the_class(binary):
    generator = torch.Generator().manual_seed(0)
    heads = PrototypeHeads(1, WIDTH, 15, CLASSES, binary, 0.02, generator)
    tokens, targets = needles(240, 0)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    with torch.no_grad():
        heads.standardize(heads.similarities(unit))
        first = heads.similarities(unit) * heads.scale + heads.shift
    torch.testing.assert_close(first.mean(1), torch.zeros(1, 15), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.std(1, correction=0), torch.ones(1, 15), atol=1e-4, rtol=0)
    fit(heads, unit, targets)
    others, other_targets = needles(120, 1)
    unit = torch.nn.functional.normalize(others, dim=-1)
    assert accuracy(logits_of(heads, InMemory(unit)), other_targets)[0] > 0.85


def test_untrained_attention_is_the_mean_over_patches():
    heads = AttentiveHeads(2, WIDTH, 1, CLASSES, 0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        heads.query.zero_()
    tokens = torch.randn(2, 5, PATCHES, WIDTH)
    expected = tokens.mean(2) @ heads.weight
    torch.testing.assert_close(heads(tokens), expected, atol=1e-5, rtol=1e-5)


def test_similarities_equal_a_plain_computation(monkeypatch):
    """Few similarities exist at once, so that clips are searched one by one."""
    monkeypatch.setattr(token_heads, "MAX_SIMILARITIES", 1)
    heads = PrototypeHeads(2, WIDTH, 5, CLASSES, False, 0.02, torch.Generator().manual_seed(0))
    tokens = torch.nn.functional.normalize(torch.randn(2, 7, PATCHES, WIDTH), dim=-1)
    prototypes = torch.nn.functional.normalize(heads.prototypes, dim=-1)
    expected = torch.einsum("hbpw,hjw->hbjp", tokens, prototypes)
    torch.testing.assert_close(heads.similarities(tokens), expected.amax(-1), atol=1e-6, rtol=1e-5)
    assert torch.equal(nearest_tokens(prototypes, tokens), expected.argmax(-1))
    (own,) = torch.autograd.grad(heads.similarities(tokens).square().sum(), heads.prototypes)
    (plain,) = torch.autograd.grad(expected.amax(-1).square().sum(), heads.prototypes)
    torch.testing.assert_close(own, plain, atol=1e-5, rtol=1e-4)


def test_binary_prototypes_are_signs_with_the_gradient_of_the_clipped_value():
    heads = PrototypeHeads(1, WIDTH, 2, CLASSES, True, 0.02, torch.Generator().manual_seed(0))
    with torch.no_grad():
        heads.prototypes[0, 0, 0] = 3.0
    directions = heads.directions()
    assert torch.equal(directions.sign(), torch.where(heads.prototypes >= 0, 1.0, -1.0))
    torch.testing.assert_close(directions.abs(), torch.full_like(directions, WIDTH**-0.5))
    (gradient,) = torch.autograd.grad((directions * torch.randn(WIDTH)).sum(), heads.prototypes)
    inside = heads.prototypes.abs() <= 1
    assert (gradient[~inside] == 0).all()
    assert (gradient[inside] != 0).any()


@pytest.fixture
def clips():
    """Seven clips of two splits, two of which are left out, with the tokens of the layers 1 and 3."""
    rng = np.random.default_rng(0)
    sets = [
        FeatureSet(
            folder=Path(),
            ids=[f"{name}{i}" for i in range(size)],
            labels=[["x"]] * size,
            group_column=None,
            groups=None,
            skipped={},
            pooled=np.zeros((size, 4, 5, WIDTH), np.float32),
            tokens=(3 + 2 * rng.standard_normal((size, 2, PATCHES, WIDTH))).astype(np.float16),
            token_layers=(1, 3),
        )
        for name, size in (("a", 4), ("b", 5))
    ]
    return Clips(sets, lambda id_: id_ not in ("a1", "b0"))


def test_tokens_of_clips_of_several_splits(clips):
    one, other = clips.sets
    rows = np.array([6, 0, 3])
    expected = np.stack([other.tokens[4], one.tokens[0], other.tokens[1]])
    np.testing.assert_array_equal(clips.tokens([3], rows)[0], expected[:, 1])
    np.testing.assert_array_equal(clips.tokens([3, 1], rows), expected.transpose(1, 0, 2, 3)[::-1])


@pytest.mark.parametrize("unit", [True, False])
def test_tokens_are_standardised_in_memory_and_from_the_cache(clips, unit, monkeypatch):
    monkeypatch.setattr(token_heads, "MAX_VALUES", 2 * PATCHES * WIDTH)  # clips are read one by one
    mean, deviation = channel_statistics(clips, [1, 3])
    held = TokenInputs(clips, [1, 3], mean, deviation, unit, torch.device("cpu"), max_bytes=2**20)
    read = TokenInputs(clips, [1, 3], mean, deviation, unit, torch.device("cpu"), max_bytes=0)
    assert held.held is not None
    assert read.held is None
    rows = torch.tensor([5, 2])
    torch.testing.assert_close(held.take(rows), read.take(rows), atol=0, rtol=0)
    tokens = held.take(torch.arange(7))
    if unit:
        torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 7, PATCHES))
    else:
        torch.testing.assert_close(tokens.mean((1, 2)), torch.zeros(2, WIDTH), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens.flatten(1, 2).std(1, correction=0), torch.ones(2, WIDTH))


def test_clips_without_tokens_are_an_error(clips):
    clips.sets[0] = clips.sets[0]._replace(tokens=None)
    with pytest.raises(ValueError, match="without patch tokens"):
        clips.token_shape  # noqa: B018
