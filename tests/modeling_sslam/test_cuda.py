"""`use_cuda` keeps torch's results, up to rounding, and leaves everything else of a model as it is."""

import json
import pickle
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conversion.convert import convert
from modeling_sslam import SSLAMForAudioClassification, SSLAMForPreTraining, cuda_sslam
from modeling_sslam.cuda_sslam import BandedDecoderLayer, is_faster, use_cuda
from modeling_sslam.layouts import FAIRSEQ_PRETRAINING, to_theirs
from modeling_sslam.modeling_sslam_pretraining import SSLAMDecoder, SSLAMDecoderLayer

# A group has 64 channels and the grid 2 mel patches, so a row of 128 values is wide enough for the banded form.
WIDE = {"hidden_size": 128, "decoder_groups": 2}


@pytest.fixture(autouse=True)
def _models_are_on_cuda(monkeypatch):
    """Take the CPU for a CUDA device."""
    monkeypatch.setattr(cuda_sslam, "is_on_cuda", lambda model: True)
    monkeypatch.delenv("SSLAM_CUDA", raising=False)


@pytest.fixture
def _always_banded(monkeypatch):
    """Choose the banded form in every dtype, size and mode."""
    monkeypatch.setattr(cuda_sslam, "is_faster", lambda width, kernel_size, dtype: True)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def decoder_classes(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, SSLAMDecoderLayer)}


def operators(model: nn.Module, *inputs: torch.Tensor) -> set[str]:
    """Return the names of the operators that a call of the model runs."""
    with torch.profiler.profile() as profile:
        model(*inputs)
    return {event.key for event in profile.key_averages()}


# Results


@pytest.mark.usefixtures("_always_banded")
@pytest.mark.parametrize("overrides", [{}, {"decoder_kernel_size": 5, "decoder_groups": 4, "num_mel_bins": 48}])
def test_objective_and_gradients(make_config, overrides):
    """Loss and gradients agree within the tolerances of the golden vectors."""
    plain = SSLAMForPreTraining(make_config(**overrides))
    model = use_cuda(deepcopy(plain))
    clips = torch.randn(2, 64, plain.config.num_mel_bins)
    losses = []
    for each in (plain, model):
        torch.manual_seed(0)
        losses.append(each(clips).loss)
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert not torch.equal(plain.decoder.layers[0].weight.grad, model.decoder.layers[0].weight.grad)
    expected = gradients_of(plain)
    for name, gradient in gradients_of(model).items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


@pytest.mark.usefixtures("_always_banded")
def test_published_loss_and_gradients(golden_dir: Path, tmp_path, parity):
    convert(golden_dir / "sslam_pretrained.pt", tmp_path / "model", head="pretraining")
    changes = {"pretraining_objective": "sslam", "mask_noise_std": 0.0}
    model = use_cuda(SSLAMForPreTraining.from_pretrained(tmp_path / "model", **changes).train())
    assert decoder_classes(model) == {BandedDecoderLayer}
    facts = json.loads((golden_dir / "expected.json").read_text())["stage2"]
    vectors = load_file(golden_dir / "stage2_step.safetensors")
    clips, mask = vectors["source"].float().squeeze(1), vectors["mask"].bool()
    mask = mask.view(len(clips), -1, mask.shape[-1])
    loss = model(clips, bool_masked_pos=mask, unmixed_starts=(facts["idx_1"], facts["idx_2"])).loss
    loss.backward()
    parity("banded decoder, stage2 loss (relative)", abs(loss.item() / facts["loss"] - 1), 1e-5)
    worst = max(
        relative_error(gradient, vectors[f"grad.{to_theirs(name, FAIRSEQ_PRETRAINING)}"])
        for name, gradient in gradients_of(model).items()
    )
    parity("banded decoder, stage2 gradients (relative, by norm)", worst, 1e-4)


@pytest.mark.parametrize(("kernel_size", "groups"), list(product((1, 3, 5, 7, 9), (1, 4, 32))))
def test_decoder_under_autocast(make_config, monkeypatch, kernel_size, groups):
    """Errors are at most twice those of `conv2d`, the float64 results being exact."""
    decoder = SSLAMDecoder(make_config(decoder_kernel_size=kernel_size, decoder_groups=groups))
    grid, index = torch.randn(4, 6, 2, 32), torch.stack([torch.randperm(12)[:9] for _ in range(4)])
    results = {}
    for name, always in (("exact", False), ("plain", False), ("banded", True)):
        monkeypatch.setattr(cuda_sslam, "is_faster", lambda width, kernel_size, dtype, always=always: always)
        twin = deepcopy(decoder).double() if name == "exact" else deepcopy(decoder)
        for layer in twin.layers:
            layer.__class__ = BandedDecoderLayer
        leaf = grid.to(twin.projection.weight.dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            output = twin(leaf, index)
        output.float().square().sum().backward()
        results[name] = {"output": output, "grid": leaf.grad, **gradients_of(twin)}
    assert results["banded"]["output"].dtype == results["plain"]["output"].dtype
    for name, exact in results["exact"].items():
        error, plain_error = (relative_error(results[form][name].double(), exact) for form in ("banded", "plain"))
        assert error <= 2 * plain_error, name


# The choice of a layer


@pytest.mark.slow
@pytest.mark.parametrize("compile_first", [True, False])  # the training programs compile first
def test_compiled_layer_is_banded_in_half_precision(make_config, compile_first):
    torch.compiler.reset()
    model = SSLAMForPreTraining(make_config(**WIDE))
    layer, grid = model.decoder.layers[0], torch.randn(2, 4, 2, 128)
    if not compile_first:
        use_cuda(model)
    layer.compile(fullgraph=True, backend="aot_eager")
    use_cuda(model)
    expected = layer.forward(grid)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(grid)
        names = operators(layer, grid)
    assert "aten::bmm" in names
    assert "aten::convolution" not in names
    # bfloat16 has 8 bits of precision.
    assert relative_error(found, expected) < 2**-8
    names = operators(layer, grid)  # float32
    assert "aten::bmm" not in names
    assert "aten::convolution" in names


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "backend"), [("ua", "aot_eager"), ("sslam", "aot_eager"), ("ua", "inductor")])
def test_compiled_objective_is_banded(make_config, objective, backend):
    """In bfloat16, loss and gradients of one graph with banded layers are as exact as those of the eager model."""
    torch.compiler.reset()
    config = make_config(**WIDE, pretraining_objective=objective, num_hidden_layers=1, mask_noise_std=0.0)
    plain = SSLAMForPreTraining(config).train()
    model, exact = use_cuda(deepcopy(plain)), deepcopy(plain).double()
    for each in (plain, model):
        each.set_memory("fast")
    model.compile(fullgraph=True, dynamic=False, backend=backend)
    clips = torch.randn(3, 64, 32)

    def step(each: SSLAMForPreTraining, values: torch.Tensor, half: bool) -> dict[str, torch.Tensor]:
        each.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = each(values, generator=torch.Generator().manual_seed(0)).loss
        loss.backward()
        return {"loss": loss.detach(), **gradients_of(each)}

    expected, exact_values = step(plain, clips, True), step(exact, clips.double(), False)
    found = step(model, clips, True)
    with torch.profiler.profile() as profile:
        step(model, clips, True)
    # The patch embedding's convolutions are left, with a gradient in the student.
    names = [event.key for event in profile.key_averages() for _ in range(event.count)]
    encoders = 2
    assert names.count("aten::convolution") == encoders
    assert names.count("aten::convolution_backward") == 1
    for name, value in exact_values.items():
        error, plain_error = (relative_error(values[name].double(), value) for values in (found, expected))
        assert error <= 2 * plain_error + 1e-3, name


def test_eager_layers_keep_conv2d(make_config):
    layer = use_cuda(SSLAMForPreTraining(make_config(**WIDE))).decoder.layers[0]
    for dtype in (torch.float32, torch.bfloat16):
        names = operators(layer.to(dtype), torch.randn(2, 4, 2, 128, dtype=dtype))
        assert "aten::convolution" in names
        assert "aten::bmm" not in names


@pytest.mark.parametrize(
    ("width", "kernel_size", "dtype", "expected"),
    [
        (384, 3, torch.bfloat16, True),  # the base size
        (384, 3, torch.float16, True),
        (512, 5, torch.bfloat16, True),  # the large size
        (384, 3, torch.float32, False),
        (768, 3, torch.bfloat16, True),
        (769, 3, torch.bfloat16, False),
        (384, 1, torch.bfloat16, False),
        (64, 3, torch.bfloat16, True),
        (63, 3, torch.bfloat16, False),
    ],
)
def test_where_the_banded_form_is_faster(monkeypatch, width, kernel_size, dtype, expected):
    assert not is_faster(width, kernel_size, dtype)  # eager
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert is_faster(width, kernel_size, dtype) == expected


# Models


def test_names_weights_and_files_stay_as_they_are(make_config, tmp_path):
    plain = SSLAMForPreTraining(make_config())
    model = use_cuda(deepcopy(plain))
    assert type(model) is SSLAMForPreTraining
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, each in (("plain", plain), ("cuda", model)):
        each.save_pretrained(tmp_path / name)
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in (tmp_path / "cuda").iterdir()} == files
    for name in files:
        assert (tmp_path / "cuda" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert decoder_classes(SSLAMForPreTraining.from_pretrained(tmp_path / "cuda")) == {SSLAMDecoderLayer}


def test_copies_and_pickles_are_fast_too(make_config):
    model = use_cuda(SSLAMForPreTraining(make_config()))
    for twin in (deepcopy(model), pickle.loads(pickle.dumps(model)), use_cuda(model)):
        assert decoder_classes(twin) == {BandedDecoderLayer}


def test_models_without_a_decoder_stay_as_they_are(make_config):
    model = SSLAMForAudioClassification(make_config())
    classes = [type(module) for module in model.modules()]
    assert use_cuda(model) is model
    assert [type(module) for module in model.modules()] == classes


def test_environment_forbids(make_config, monkeypatch):
    monkeypatch.setenv("SSLAM_CUDA", "0")
    assert decoder_classes(use_cuda(SSLAMForPreTraining(make_config()))) == {SSLAMDecoderLayer}
    monkeypatch.setenv("SSLAM_CUDA", "1")
    assert decoder_classes(use_cuda(SSLAMForPreTraining(make_config()))) == {BandedDecoderLayer}


def test_other_devices_stay_as_they_are(make_config, monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("SSLAM_CUDA", raising=False)
    assert decoder_classes(use_cuda(SSLAMForPreTraining(make_config()))) == {SSLAMDecoderLayer}
