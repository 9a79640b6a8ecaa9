"""Computations that save memory equal the plain ones that they stand for, forward and backward."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from modeling_sslam import modeling_sslam_pretraining as pretraining
from modeling_sslam.modeling_sslam import SSLAMMLP, checkpoint_activations
from modeling_sslam.modeling_sslam_pretraining import SSLAMDecoder


@pytest.mark.parametrize("hidden_act", ["gelu", "relu"])
def test_mlp_that_recomputes_equals_the_plain_one(make_config, hidden_act, results_and_gradients):
    """The results agree bit for bit: the same operators run in the same order."""
    mlp = SSLAMMLP(make_config(hidden_act=hidden_act))
    inputs = torch.randn(3, 7, mlp.fc1.in_features)
    activation = getattr(nn.functional, hidden_act)
    expected = results_and_gradients(lambda x: mlp.fc2(activation(mlp.fc1(x))), mlp, inputs)
    for value, expected_value in zip(results_and_gradients(mlp, mlp, inputs), expected, strict=True):
        assert torch.equal(value, expected_value)


def test_checkpointing_keeps_only_the_inputs():
    kept = []
    inputs = torch.randn(50, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        checkpoint_activations(lambda x: x.exp().sin().exp(), inputs)
    assert not [x for x in kept if x.shape == inputs.shape and x.data_ptr() != inputs.data_ptr()]
    with torch.no_grad():
        assert torch.equal(checkpoint_activations(torch.exp, inputs), inputs.exp())


@pytest.mark.parametrize("clones", [1, 5, 16])
def test_decoder_in_parts_equals_the_whole(
    make_config, monkeypatch, clones, results_and_gradients, assert_rounds_like
):
    decoder = SSLAMDecoder(make_config())
    grid = torch.randn(clones, 4, 2, decoder.projection.in_features)
    index = torch.stack([torch.randperm(8)[:6] for _ in range(clones)])
    in_parts = results_and_gradients(lambda x: decoder(x, index), decoder, grid)
    monkeypatch.setattr(pretraining, "DECODER_PARTS", 1)
    whole = results_and_gradients(lambda x: decoder(x, index), decoder, grid)
    decoder = deepcopy(decoder).double()
    exact = results_and_gradients(lambda x: decoder(x, index), decoder, grid.double())
    for values in zip(in_parts, whole, exact, strict=True):
        assert_rounds_like(*values)
