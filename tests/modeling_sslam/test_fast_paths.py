"""Computations that save memory equal those that keep everything, forward and backward."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from modeling_sslam import SSLAMForAudioClassification, SSLAMForPreTraining
from modeling_sslam.modeling_sslam import SSLAMMLP, checkpoint_activations, saves_memory
from modeling_sslam.modeling_sslam_pretraining import SSLAMDecoder


@pytest.mark.parametrize("hidden_act", ["gelu", "relu"])
def test_mlp_that_recomputes_equals_the_plain_one(make_config, hidden_act, results_and_gradients):
    """The results agree bit for bit: the same operators run in the same order."""
    mlp = SSLAMMLP(make_config(hidden_act=hidden_act))
    inputs = torch.randn(3, 7, mlp.fc1.in_features)
    activation = getattr(nn.functional, hidden_act)
    expected = results_and_gradients(lambda x: mlp.fc2(activation(mlp.fc1(x))), mlp, inputs)
    for mlp.memory in ("small", "fast"):
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
def test_decoder_in_parts_equals_the_whole(make_config, clones, results_and_gradients, assert_rounds_like):
    decoder = SSLAMDecoder(make_config())
    decoder.memory = "small"
    grid = torch.randn(clones, 4, 2, decoder.projection.in_features)
    index = torch.stack([torch.randperm(8)[:6] for _ in range(clones)])
    in_parts = results_and_gradients(lambda x: decoder(x, index), decoder, grid)
    decoder.memory = "fast"
    whole = results_and_gradients(lambda x: decoder(x, index), decoder, grid)
    decoder = deepcopy(decoder).double()
    exact = results_and_gradients(lambda x: decoder(x, index), decoder, grid.double())
    for values in zip(in_parts, whole, exact, strict=True):
        assert_rounds_like(*values)


@pytest.fixture
def kept_bytes():
    """`kept_bytes(function)`: the bytes of the distinct tensors that the function keeps for its backward pass."""

    def count(function) -> int:
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: storages.update({x.data_ptr(): x.untyped_storage()}) or x, lambda x: x
        ):
            function()
        return sum(storage.nbytes() for storage in storages.values())

    return count


@pytest.fixture
def train_step(make_config):
    """`train_step(objective, memory, precision)`: the loss and gradients of a seeded step."""

    def step(objective: str, memory: str, precision: torch.dtype, checkpointing: bool = False) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = SSLAMForPreTraining(make_config(pretraining_objective=objective)).train()
        model.set_memory(memory)
        if checkpointing:
            model.gradient_checkpointing_enable()
        clips = torch.randn(3, 64, 32)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            output = model(clips, generator=torch.Generator().manual_seed(1))
        output.loss.backward()
        scalars = [output.loss, output.pred_var, output.target_var]
        return [*scalars, *(x.grad for x in model.parameters() if x.grad is not None)]

    return step


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["ua", "sslam"])
def test_memory_changes_a_step_by_rounding_alone(objective, precision, train_step):
    fast, small, auto, whole_blocks = (
        train_step(objective, memory, precision, checkpointing)
        for memory, checkpointing in (("fast", False), ("small", False), ("auto", False), ("fast", True))
    )
    assert all(torch.equal(value, other) for value, other in zip(small, auto, strict=True))
    assert all(torch.equal(value, other) for value, other in zip(fast, whole_blocks, strict=True))
    for value, other in zip(fast[:3], small[:3], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=0)
    rounding = torch.finfo(precision).eps
    for value, other in zip(fast[3:], small[3:], strict=True):
        assert (value - other).norm() <= 10 * rounding * other.norm()


def test_fast_keeps_what_small_recomputes(make_config, kept_bytes):
    clips, config = torch.randn(3, 64, 32), make_config(intermediate_size=512, num_labels=3)
    for model in (SSLAMForPreTraining(config).train(), SSLAMForAudioClassification(config).train()):
        kept = {}
        for memory in ("fast", "small", "auto"):
            model.set_memory(memory)
            kept[memory] = kept_bytes(lambda model=model: model(clips))
        assert kept["small"] == kept["auto"] < 0.8 * kept["fast"]


def test_auto_follows_the_device():
    assert [saves_memory("auto", torch.device(kind)) for kind in ("cpu", "cuda", "mps")] == [True, False, False]
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert saves_memory("small", device)
        assert not saves_memory("fast", device)


def test_unknown_memory_is_refused(tiny_config):
    with pytest.raises(ValueError, match="memory='large' is not one of auto, fast, small"):
        SSLAMForAudioClassification(tiny_config).set_memory("large")
