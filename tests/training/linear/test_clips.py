"""Inputs of heads on cached features."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.linear.clips import Clips
from training.linear.features import FEATURE_POOLINGS, FeatureSet
from training.linear.heads import Head


@pytest.fixture
def clips() -> Clips:
    """Three of five clips in two splits, with features of an encoder with two blocks of width 4."""
    pooled = np.random.default_rng(0).normal(size=(5, 3, len(FEATURE_POOLINGS), 4)).astype(np.float16)
    splits = {"a": pooled[:2], "b": pooled[2:]}
    sets = [
        FeatureSet(Path(), [f"{name}{i}" for i in range(len(part))], [["x"]] * len(part), None, None, {}, part)
        for name, part in splits.items()
    ]
    return Clips(sets, lambda id_: id_ in ("a1", "b0", "b2"))


def test_a_head_reads_poolings_of_one_layer(clips):
    (first, second), rows = clips.sets, [FEATURE_POOLINGS.index(name) for name in ("max", "std")]
    expected = np.stack([np.concatenate(clip[1, rows]) for clip in (first.pooled[1], *second.pooled[[0, 2]])])
    found = clips.pooled(Head(1, "max+std"))
    assert found.dtype == torch.float32
    assert np.array_equal(found, expected)


def test_heads_on_all_layers(clips):
    layers = [clips.pooled(Head(layer, "max+std")) for layer in range(3)]
    assert torch.equal(clips.pooled(Head("all", "max+std", "layers")), torch.stack(layers, 1))
    assert torch.equal(clips.pooled(Head("concat", "max+std")), torch.cat(layers, 1))


@pytest.mark.parametrize("head", [Head(0, "cls"), Head(2, "max+std"), Head("all", "cls"), Head("concat", "max+std")])
def test_the_number_of_values_is_that_of_the_input(clips, head):
    assert clips.values_of(head) == clips.pooled(head)[0].numel()
