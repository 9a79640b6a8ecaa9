"""Fast paths equal the plain computations that they stand for, forward and backward."""

import pytest
import torch
from torch import nn

from modeling_sslam import SSLAMModel
from modeling_sslam import modeling_sslam as modeling
from modeling_sslam import modeling_sslam_pretraining as pretraining
from modeling_sslam.modeling_sslam import SSLAMMLP, SSLAMLinear, recomputing
from modeling_sslam.modeling_sslam_pretraining import SSLAMDecoder

# Of a clip of the tiny configuration: 3 time patches, 2 mel patches, so 6 patches and the CLS token.
FRAMES, TOKENS = 48, 7


def results_and_gradients(function, module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What `function(*inputs)` gives, and the gradients of the inputs and the module's parameters."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    module.zero_grad()
    output = function(*inputs)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype))
    return [output.detach(), *(x.grad for x in (*inputs, *module.parameters()))]


@pytest.mark.parametrize("shape", [(96,), (1, 96), (70, 96), (3, 17, 96), (2, 3, 5, 96), (0, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_as_convolution(shape, bias, monkeypatch):
    layer, plain = SSLAMLinear(96, 160, bias=bias), nn.functional.linear
    inputs = torch.randn(shape)
    monkeypatch.setattr(modeling, "ONEDNN_IS_FASTER", True)
    assert modeling._is_faster_as_convolution(inputs, layer.weight) == (inputs.numel() > 0)
    expected = results_and_gradients(lambda x: plain(x, layer.weight, layer.bias), layer, inputs)
    for function in (layer, lambda x: layer(torch.stack((x, x), -1)[..., 0])):  # in order in memory, or with gaps
        for value, expected_value in zip(results_and_gradients(function, layer, inputs), expected, strict=True):
            torch.testing.assert_close(value, expected_value, atol=1e-4, rtol=1e-5)
    monkeypatch.setattr(modeling, "ONEDNN_IS_FASTER", False)
    for value, expected_value in zip(results_and_gradients(layer, layer, inputs), expected, strict=True):
        assert torch.equal(value, expected_value)


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD"])
def test_who_made_the_processor(maker, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {maker}\ncpu family\t: 6\n" * 3)
    assert modeling._is_intels(cpuinfo) == (maker == "GenuineIntel")
    monkeypatch.setattr("platform.processor", lambda: f"Intel64 Family 6 Model 143, {maker}")
    assert modeling._is_intels(tmp_path / "missing") == (maker == "GenuineIntel")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_linear_layers_of_other_types_are_torchs_own(dtype):
    layer, inputs = SSLAMLinear(96, 160, dtype=dtype), torch.randn(5, 96, dtype=dtype)
    assert torch.equal(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))


def test_autocast_reaches_linear_layers():
    layer, inputs = SSLAMLinear(96, 160), torch.randn(5, 96)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("scores_at_a_time", [1 << 20, 2 * TOKENS**2, 1])  # all heads, two, one
def test_attention_by_convolution(make_config, monkeypatch, scores_at_a_time):
    monkeypatch.setattr(modeling, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(modeling, "CONVOLVED_LENGTHS", range(TOKENS, TOKENS + 1))
    monkeypatch.setattr(modeling, "SCORES_AT_A_TIME", scores_at_a_time)
    by_convolution, calls = modeling.convolution_attention_forward, []

    def spy(*args, **kwargs):
        calls.append(args)
        return by_convolution(*args, **kwargs)

    monkeypatch.setattr(modeling, "convolution_attention_forward", spy)
    model = SSLAMModel(make_config(attn_implementation="sdpa", attention_probs_dropout_prob=0.5)).eval()
    batch, mask = torch.randn(3, FRAMES, 32), torch.ones(3, FRAMES, dtype=torch.long)
    mask[1, 16:], mask[2, 20:] = 0, 0
    for attention_mask in (None, mask):
        expected = model(batch, attention_mask=attention_mask, output_hidden_states=True)
        assert not calls  # it has no use for gradients
        with torch.no_grad():
            actual = model(batch, attention_mask=attention_mask, output_hidden_states=True)
            assert len(calls) == model.config.num_hidden_layers
            calls.clear()
            for value, expected_value in zip(actual.to_tuple(), expected.to_tuple(), strict=True):
                torch.testing.assert_close(value, expected_value, atol=1e-5, rtol=0)
            model.train()(batch)  # with dropout
            model.eval()(batch[:, :16])  # of another length
            model.double()(batch)
            model.float()
        assert not calls


@pytest.mark.parametrize("hidden_act", ["gelu", "relu"])
def test_mlp_that_recomputes(make_config, hidden_act):
    mlp = SSLAMMLP(make_config(hidden_act=hidden_act))
    inputs = torch.randn(3, 7, mlp.fc1.in_features)
    activation = getattr(nn.functional, hidden_act)
    expected = results_and_gradients(lambda x: mlp.fc2(activation(mlp.fc1(x))), mlp, inputs)
    for value, expected_value in zip(results_and_gradients(mlp, mlp, inputs), expected, strict=True):
        torch.testing.assert_close(value, expected_value, atol=1e-6, rtol=1e-5)


def test_recomputing_keeps_its_inputs_alone():
    kept = []
    inputs = torch.randn(50, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        recomputing(lambda x: x.exp().sin().exp(), inputs)
    assert not [x for x in kept if x.shape == inputs.shape and x.data_ptr() != inputs.data_ptr()]
    with torch.no_grad():
        assert torch.equal(recomputing(torch.exp, inputs), inputs.exp())


@pytest.mark.parametrize("clones", [1, 5, 16])
def test_decoder_in_parts_equals_the_whole(make_config, monkeypatch, clones):
    decoder = SSLAMDecoder(make_config())
    width = decoder.projection.in_features
    grid, index = torch.randn(clones, 4, 2, width), torch.stack([torch.randperm(8)[:6] for _ in range(clones)])
    factors = torch.randn(clones, 6, width)
    results = []
    for parts in (1, 8):
        monkeypatch.setattr(pretraining, "DECODER_PARTS", parts)
        decoder.zero_grad()
        grid = grid.detach().requires_grad_()
        predictions = decoder(grid, index)
        (predictions * factors).sum().backward()
        results.append([predictions.detach(), grid.grad, *(p.grad for p in decoder.parameters())])
    for whole, in_parts in zip(*results, strict=True):
        torch.testing.assert_close(in_parts, whole, atol=1e-5, rtol=1e-5)
