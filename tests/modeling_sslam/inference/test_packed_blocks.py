"""Blocks for CPUs against the plain ones: equal up to rounding in floating point, close in int8."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from modeling_sslam import (
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForPreTraining,
    SSLAMModel,
)
from modeling_sslam.inference import Embedder, InferenceError, SSLAMTagger, optimize_for_cpu
from modeling_sslam.inference import packed_blocks as cpu

PRECISIONS = [precision for precision in cpu.PRECISIONS if cpu.can_optimize(precision)]


@pytest.fixture(autouse=True)
def _two_clips_at_a_time(monkeypatch):
    """So that there are several slices of the clips below, and a part of one at the end."""
    monkeypatch.setattr(cpu, "TOKENS_AT_A_TIME", dict.fromkeys(cpu.PRECISIONS, 300))


@pytest.fixture(params=[True, False], ids=["attention by oneDNN", "torch's attention"])
def _either_attention(request, monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_IS_FASTER", request.param)


@pytest.fixture
def config() -> SSLAMConfig:
    """Wide enough for oneDNN's blocked kernels."""
    return SSLAMConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=160,
        max_length=512,
        num_labels=5,
        initializer_range=0.1,
    )


@pytest.fixture
def input_values() -> torch.Tensor:
    return torch.randn(5, 256, 128)


def test_the_kernels_are_there():
    assert "float32" in PRECISIONS
    assert "int8" in PRECISIONS


@pytest.mark.usefixtures("_either_attention")
def test_float32_is_the_plain_model_up_to_rounding(config, input_values):
    plain = SSLAMModel(config).eval()
    fast = optimize_for_cpu(deepcopy(plain))
    with torch.no_grad():
        expected = plain(input_values, output_hidden_states=True)
    found = fast(input_values, output_hidden_states=True)
    assert not found.last_hidden_state.requires_grad
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
    for state, expected_state in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, expected_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "relu"])
def test_other_activations_and_no_bias(config, input_values, act):
    config.hidden_act, config.qkv_bias = act, False
    plain = SSLAMModel(config).eval()
    with torch.no_grad():
        expected = plain(input_values).last_hidden_state
    found = optimize_for_cpu(deepcopy(plain))(input_values).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    rounded = optimize_for_cpu(plain, "int8")(input_values).last_hidden_state
    assert cosine_similarity(rounded, expected, dim=-1).min() > 0.99


@pytest.mark.usefixtures("_either_attention")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("score_bytes", [cpu.SCORE_BYTES_AT_A_TIME, 80_000, 4_000])  # all heads, two, a part of one
def test_padding_is_attended_to_by_none(config, precision, score_bytes, monkeypatch):
    monkeypatch.setattr(cpu, "SCORE_BYTES_AT_A_TIME", score_bytes)
    model = optimize_for_cpu(SSLAMModel(config), precision)
    clips = torch.randn(3, 256, 128)
    attention_mask = torch.ones(3, 256, dtype=torch.long)
    attention_mask[1, 160:] = 0
    clips[1, 160:] = 5.0
    with_mask = model(clips, attention_mask).last_hidden_state
    alone = model(clips[1:2, :160]).last_hidden_state
    tolerance = 1e-5 if precision == "float32" else 3e-2
    torch.testing.assert_close(with_mask[1:2, : alone.shape[1]], alone, atol=tolerance, rtol=tolerance)
    without = model(clips).last_hidden_state
    assert (without[1] - with_mask[1]).abs().max() > 0.05


@pytest.mark.usefixtures("_either_attention")
@pytest.mark.parametrize("precision", [precision for precision in PRECISIONS if precision != "float32"])
def test_fidelity_of_embeddings(config, input_values, precision):
    plain = SSLAMModel(config).eval()
    with torch.no_grad():
        expected = plain(input_values).pooler_output
    found = optimize_for_cpu(plain, precision)(input_values).pooler_output.float()
    assert cosine_similarity(found, expected).min() > {"bfloat16": 0.9995, "int8": 0.998}[precision]
    assert not torch.equal(found, expected)


@pytest.mark.usefixtures("_either_attention")
def test_int8_of_a_clip_does_not_depend_on_the_others(config, input_values):
    model = optimize_for_cpu(SSLAMModel(config), "int8")
    together = model(torch.cat((input_values, 100 * input_values))).pooler_output[:5]
    torch.testing.assert_close(model(input_values).pooler_output, together, atol=2e-3, rtol=2e-3)


def test_int8_of_silence(config):
    model = optimize_for_cpu(SSLAMModel(config), "int8")
    product = cpu.pack_linear_int8(torch.nn.Linear(96, 96))
    assert product(torch.zeros(4, 96)).isfinite().all()
    assert model(torch.zeros(1, 256, 128)).pooler_output.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_classifier(config, input_values, precision):
    plain = SSLAMForAudioClassification(config).eval()
    with torch.no_grad():
        expected = plain(input_values).logits
    fast = optimize_for_cpu(plain, precision)
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "int8": 0.1}[precision]
    torch.testing.assert_close(fast(input_values).logits.float(), expected, atol=tolerance, rtol=tolerance)


def test_what_an_optimised_model_refuses(config, input_values, tmp_path):
    for target in (torch.bfloat16, "meta"):
        with pytest.raises(ValueError, match=r"stays in torch\.float32 on the CPU; load it anew"):
            optimize_for_cpu(SSLAMModel(config)).to(target)
    model = optimize_for_cpu(SSLAMModel(config))
    assert model.to("cpu").float() is model
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no attention probabilities"):
        model(input_values, output_attentions=True)
    with pytest.raises(ValueError, match="optimised already"):
        optimize_for_cpu(model, "bfloat16")
    assert model(input_values).last_hidden_state.dtype == torch.float32


def test_what_cannot_be_optimised(config):
    with pytest.raises(ValueError, match="'int4' is not one of"):
        optimize_for_cpu(SSLAMModel(config), "int4")
    with pytest.raises(ValueError, match="SSLAMForPreTraining on cpu cannot be"):
        optimize_for_cpu(SSLAMForPreTraining(config))
    with pytest.raises(ValueError, match="SSLAMModel on meta cannot be"):
        optimize_for_cpu(SSLAMModel(config).to("meta"))


def test_missing_kernels_and_packages(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "IS_X86_WITH_ONEDNN", False)
        with pytest.raises(InferenceError, match="no float32 kernels"):
            optimize_for_cpu(SSLAMModel(config))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model = SSLAMModel(config).half().train()
    with pytest.raises(InferenceError, match=r"int8 needs torchao: pip install"):
        optimize_for_cpu(model, "int8")
    assert model.dtype == torch.float16
    assert model.training


def test_commands_use_them(model_folder: Path, audio_dir: Path):
    recording = audio_dir / "misc_crow.flac"
    plain = SSLAMTagger(
        SSLAMForAudioClassification.from_pretrained(model_folder), SSLAMFeatureExtractor.from_pretrained(model_folder)
    )
    expected = {entry["label"]: entry["score"] for entry in plain.tag(recording, top_k=None)}
    for dtype, tolerance in (("auto", 1e-5), ("int8", 0.05)):
        tagger = SSLAMTagger.from_pretrained(model_folder, device="cpu", dtype=dtype)
        assert cpu.precision_of(tagger.model.sslam) == {"auto": "float32"}.get(dtype, dtype)
        found = {entry["label"]: entry["score"] for entry in tagger.tag(recording, top_k=None)}
        assert found == pytest.approx(expected, abs=tolerance)
    assert cpu.precision_of(plain.model.sslam) == "float32"
    assert not isinstance(plain.model.sslam.encoder.layers[0], cpu.PackedLayer)


def test_embeddings_know_their_precision_and_weights(model_folder: Path):
    plain = Embedder(
        SSLAMModel.from_pretrained(model_folder), SSLAMFeatureExtractor.from_pretrained(model_folder)
    ).settings()
    assert Embedder.from_pretrained(model_folder, device="cpu").settings() == plain
    int8 = Embedder.from_pretrained(model_folder, device="cpu", dtype="int8").settings()
    assert int8 == plain | {"dtype": "int8"}


def test_int8_elsewhere_than_on_a_cpu(model_folder: Path):
    with pytest.raises(InferenceError, match="int8 is for CPUs, and the model is on meta"):
        SSLAMTagger.from_pretrained(model_folder, device="meta", dtype="int8")
