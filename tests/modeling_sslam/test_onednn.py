"""`use_onednn` keeps torch's results, up to rounding, and leaves everything else of a model as it is."""

import math
import pickle
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_sslam import SSLAMForAudioClassification, SSLAMForPreTraining, SSLAMModel, onednn_sslam
from modeling_sslam.inference import SSLAMTagger
from modeling_sslam.inference.packed_blocks import PackedEncoder
from modeling_sslam.onednn_sslam import OnednnLinear, use_onednn

# A clip of the tiny configuration has 3 time patches and 2 mel patches, so 6 patches and the CLS token.
FRAMES, TOKENS = 48, 7


@pytest.fixture(autouse=True)
def _two_threads():
    """Torch runs 1x1 convolutions by oneDNN only if it has several threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def _onednn_is_faster(monkeypatch):
    """Choose kernels as on an AMD processor, whatever processor this is."""
    monkeypatch.setattr(onednn_sslam, "ONEDNN_IS_FASTER", True)
    monkeypatch.setattr(onednn_sslam, "CONVOLVED_LENGTHS", range(TOKENS, TOKENS + 1))
    monkeypatch.delenv("SSLAM_ONEDNN", raising=False)


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """Return three clips. Two are padded."""
    mask = torch.ones(3, FRAMES, dtype=torch.long)
    mask[1, 16:], mask[2, 20:] = 0, 0
    return {"input_values": torch.randn(3, FRAMES, 32), "attention_mask": mask}


def calls(operator: str, model: nn.Module, *args, **kwargs) -> int:
    """Count how often a call of the model runs an operator of torch."""
    with torch.profiler.profile() as profile:
        model(*args, **kwargs)
    return sum(event.count for event in profile.key_averages() if event.key == operator)


convolutions = partial(calls, "aten::conv2d")


# Products


@pytest.mark.parametrize("shape", [(96,), (1, 96), (70, 96), (3, 17, 96), (2, 3, 5, 96), (300, 96), (0, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_as_convolution(shape, bias, results_and_gradients):
    """oneDNN may add terms one after the other, while torch adds partial sums.

    Each addition rounds by at most eps / 2, of random sign, so n terms come to about sqrt(n) * eps / 2. The tolerance
    is twice that. A result is a sum over features, a gradient one over features or rows.
    """
    layer, plain = OnednnLinear(96, 160, bias=bias), nn.Linear(96, 160, bias=bias, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    inputs = torch.randn(shape)
    assert convolutions(layer, inputs) == (inputs.numel() > 0)
    exact = results_and_gradients(plain, plain, inputs.double())
    tolerance = math.sqrt(max(160, inputs.numel() // 96)) * torch.finfo(torch.float32).eps
    for function in (layer, lambda x: layer(torch.stack((x, x), -1)[..., 0])):  # contiguous in memory, or with gaps
        for value, exact_value in zip(results_and_gradients(function, layer, inputs), exact, strict=True):
            assert value.dtype == torch.float32
            assert (value.double() - exact_value).norm() <= tolerance * exact_value.norm()


def test_convolutions_reach_onednn():
    reached = calls("aten::mkldnn_convolution", OnednnLinear(96, 160), torch.randn(300, 96))
    assert reached == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_linear_layers_of_other_dtypes_are_torchs_own(dtype):
    layer, inputs = OnednnLinear(96, 160, dtype=dtype), torch.randn(5, 96, dtype=dtype)
    assert torch.equal(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))


def test_autocast_reaches_linear_layers():
    layer, inputs = OnednnLinear(96, 160), torch.randn(5, 96)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("scores_at_a_time", [1 << 20, 2 * TOKENS**2, 1])  # all heads, two, one
def test_attention_by_convolution(make_config, monkeypatch, padded, scores_at_a_time, assert_rounds_like):
    monkeypatch.setattr(onednn_sslam, "SCORES_AT_A_TIME", scores_at_a_time)
    plain = SSLAMModel(make_config()).eval()
    double, model = deepcopy(plain).double(), use_onednn(deepcopy(plain))
    for inputs in ({"input_values": padded["input_values"]}, padded):
        with torch.no_grad():
            expected, exact = (m(**inputs, output_hidden_states=True).hidden_states for m in (plain, double))
            actual = model(**inputs, output_hidden_states=True).hidden_states
        for values in zip(actual, expected, exact, strict=True):
            assert_rounds_like(*values)


def test_attention_by_convolution_is_for_inference_in_float32_at_some_lengths(make_config):
    model = use_onednn(SSLAMModel(make_config(attention_probs_dropout_prob=0.5)).eval())
    layers, linear = model.config.num_hidden_layers, 4 * model.config.num_hidden_layers
    batch = torch.randn(1, FRAMES, 32)
    all_heads_at_once = 2 * layers
    assert convolutions(model, batch) == 1 + linear  # the first is the patch embedding's
    with torch.no_grad():
        assert convolutions(model, batch) == 1 + linear + all_heads_at_once
        assert convolutions(model, batch[:, :16]) == 1 + linear
        assert convolutions(model.train(), batch) == 1 + linear  # with dropout
        assert convolutions(model.eval().double(), batch) == 1


# Models


def test_gradients_of_a_whole_model(make_config, padded, assert_rounds_like):
    plain = SSLAMForAudioClassification(make_config(num_labels=3)).train()
    gradients = []
    for model in (use_onednn(deepcopy(plain)), plain, deepcopy(plain).double()):
        model(**padded, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for values in zip(*gradients, strict=True):
        assert_rounds_like(*values)


def test_pretraining_model(make_config):
    """Student, teacher and decoder use oneDNN, within the tolerance of the golden losses."""
    plain = SSLAMForPreTraining(make_config())
    model = use_onednn(deepcopy(plain))
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 2 * 4 * model.config.num_hidden_layers + 1
    assert {type(module) for module in linear} == {OnednnLinear}
    assert model.teacher.config._attn_implementation == onednn_sslam.ATTENTION
    clips = torch.randn(2, 64, 32)
    losses = []
    for each in (plain, model):
        torch.manual_seed(0)
        losses.append(each(clips).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("cls", [SSLAMModel, SSLAMForAudioClassification, SSLAMForPreTraining])
def test_names_weights_and_files_stay_as_they_are(make_config, tmp_path, cls):
    plain = cls(make_config())
    model = use_onednn(deepcopy(plain))
    assert type(model) is cls
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "onednn")
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in (tmp_path / "onednn").iterdir()} == files
    for name in files:
        assert (tmp_path / "onednn" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert not any("onednn" in name for name in files)
    loaded = cls.from_pretrained(tmp_path / "onednn")
    assert not any(isinstance(module, OnednnLinear) for module in loaded.modules())
    assert loaded.config._attn_implementation == "sdpa"


def test_copies_and_pickles_are_fast_too(make_config, padded):
    model = use_onednn(SSLAMForAudioClassification(make_config()).eval())
    with torch.no_grad():
        expected = model(**padded).logits
        for twin in (deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**padded).logits, expected)
            assert type(twin.sslam.encoder.layers[0].mlp.fc1) is OnednnLinear
            assert twin.config._attn_implementation == onednn_sslam.ATTENTION


def test_second_call_changes_nothing(make_config, padded):
    model = use_onednn(SSLAMModel(make_config()).eval())
    with torch.no_grad():
        expected = model(**padded).last_hidden_state
        assert use_onednn(model) is model
        assert torch.equal(model(**padded).last_hidden_state, expected)


def test_other_attention_is_kept(make_config):
    model = use_onednn(SSLAMModel(make_config(attn_implementation="eager")))
    assert model.config._attn_implementation == "eager"
    assert type(model.encoder.layers[0].attention.qkv) is OnednnLinear


def test_attention_probabilities_are_still_there(make_config, padded):
    model = SSLAMModel(make_config()).eval()
    expected = model(**padded, output_attentions=True).attentions
    for value, expected_value in zip(
        use_onednn(model)(**padded, output_attentions=True).attentions, expected, strict=True
    ):
        # Probabilities of at most 1: eight units in the last place.
        torch.testing.assert_close(value, expected_value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_compiles_as_a_whole(make_config, padded):
    torch.compiler.reset()
    model = use_onednn(SSLAMForAudioClassification(make_config(num_hidden_layers=1)).eval())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        # The tolerance of the golden logits.
        torch.testing.assert_close(compiled(**padded).logits, model(**padded).logits, atol=1e-5, rtol=0)
        # In a compiled graph convolutions are slower than torch's own products, so only the patch embedding's is left.
        assert calls("aten::convolution", compiled, **padded) == 1
        assert calls("aten::convolution", model, **padded) > 1


def test_exports_as_a_plain_model(make_config):
    model = use_onednn(SSLAMForAudioClassification(make_config()).eval())
    program = torch.export.export(model, (torch.randn(2, FRAMES, 32),), strict=False)
    operators = [str(node.target) for node in program.graph.nodes]
    assert operators.count("aten.conv2d.default") == 1  # the patch embedding's
    assert operators.count("aten.scaled_dot_product_attention.default") == model.config.num_hidden_layers


def test_untouched_model_quantises_all_its_linear_layers(make_config):
    model = SSLAMForAudioClassification(make_config())
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())


# Where nothing changes


def is_untouched(model: nn.Module) -> bool:
    return model.config._attn_implementation == "sdpa" and not any(
        isinstance(module, OnednnLinear) for module in model.modules()
    )


def test_environment_forbids(make_config, monkeypatch, model_folder: Path):
    monkeypatch.setenv("SSLAM_ONEDNN", "0")
    assert is_untouched(use_onednn(SSLAMModel(make_config())))
    tagger = SSLAMTagger.from_pretrained(model_folder, device="cpu")
    assert is_untouched(tagger.model)
    assert not isinstance(tagger.model.sslam.encoder, PackedEncoder)
    by_name = SSLAMTagger.from_pretrained(model_folder, device="cpu", dtype="int8")
    assert isinstance(by_name.model.sslam.encoder, PackedEncoder)
    monkeypatch.setenv("SSLAM_ONEDNN", "1")
    assert not is_untouched(use_onednn(SSLAMModel(make_config())))


def test_unchanged_where_onednn_is_not_faster(make_config, monkeypatch):
    assert is_untouched(use_onednn(SSLAMModel(make_config()).to("meta")))
    monkeypatch.setattr(onednn_sslam, "ONEDNN_IS_FASTER", False)
    assert is_untouched(use_onednn(SSLAMModel(make_config())))


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_vendor_of_the_processor(vendor, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 6\n" * 3)
    assert onednn_sslam._is_intels(cpuinfo) == (vendor == "GenuineIntel")
    monkeypatch.setattr("platform.processor", lambda: f"Intel64 Family 6 Model 143, {vendor}")
    assert onednn_sslam._is_intels(tmp_path / "missing") == (vendor == "GenuineIntel")
