"""Blocks for CPUs against the plain ones: equal up to rounding in floating point, close in int8."""

import math
import sys
import warnings
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
from modeling_sslam.inference import Embedder, InferenceError, SSLAMTagger, optimize_for_cpu, packed_blocks
from modeling_sslam.inference.packed_blocks import PRECISIONS, Model, PackedLayer, can_optimize, precision_of

# The least cosine between an optimised model's embeddings and the float32 ones that the README promises.
FIDELITY = {"bfloat16": 0.9995, "int8": 0.998}


@pytest.fixture(autouse=True)
def _two_clips_at_a_time(monkeypatch):
    """Compute the batches below in several parts, of which the last is smaller."""
    monkeypatch.setattr(packed_blocks, "TOKENS_AT_A_TIME", dict.fromkeys(packed_blocks.PRECISIONS, 300))


@pytest.fixture(params=[True, False], ids=["attention by oneDNN", "torch's attention"])
def _either_attention(request, monkeypatch):
    monkeypatch.setattr(packed_blocks, "ONEDNN_IS_FASTER", request.param)


@pytest.fixture
def config() -> SSLAMConfig:
    """Return a configuration that is wide enough for oneDNN's blocked kernels."""
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


def optimize_or_refuse(model: Model, precision: str) -> Model | None:
    """Optimise a model. Where the processor lacks the precision's kernels, check the refusal and return None."""
    if can_optimize(precision):
        return optimize_for_cpu(model, precision)
    with pytest.raises(InferenceError, match=f"no {precision} kernels"):
        optimize_for_cpu(model, precision)
    warnings.warn(f"This processor has no {precision} kernels: only the refusal was tested.", stacklevel=2)
    return None


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the Euclidean distance, computed in float64."""
    return (first.double() - second.double()).norm().item()


def relative_error(precision: str) -> float:
    """Return the distance of two unit vectors with the promised cosine."""
    return math.sqrt(2 * (1 - FIDELITY[precision]))


@pytest.mark.usefixtures("_either_attention")
def test_float32_rounds_like_the_plain_model(config, input_values, assert_rounds_like):
    plain = SSLAMModel(config).eval()
    fast = optimize_for_cpu(deepcopy(plain))
    with torch.no_grad():
        expected = plain(input_values, output_hidden_states=True)
        exact = deepcopy(plain).double()(input_values, output_hidden_states=True)
    found = fast(input_values, output_hidden_states=True)
    assert not found.last_hidden_state.requires_grad
    assert torch.equal(found.pooler_output, found.last_hidden_state[:, 0])
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    for states in zip(found.hidden_states, expected.hidden_states, exact.hidden_states, strict=True):
        assert_rounds_like(*states)


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "relu"])
def test_other_activations_and_no_bias(config, input_values, act, assert_rounds_like):
    config.hidden_act, config.qkv_bias = act, False
    plain = SSLAMModel(config).eval()
    with torch.no_grad():
        expected = plain(input_values).last_hidden_state
        exact = deepcopy(plain).double()(input_values).last_hidden_state
    assert_rounds_like(optimize_for_cpu(deepcopy(plain))(input_values).last_hidden_state, expected, exact)
    rounded = optimize_for_cpu(plain, "int8")(input_values).pooler_output
    assert cosine_similarity(rounded, expected[:, 0]).min() > FIDELITY["int8"]


@pytest.mark.usefixtures("_either_attention")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("score_bytes", [packed_blocks.SCORE_BYTES_AT_A_TIME, 80_000, 4_000])
def test_no_token_attends_to_padding(config, precision, score_bytes, monkeypatch):
    """A padded clip gets the result that it gets alone, up to rounding.

    Attention may round differently with a mask and without one, and int8 rounds its result again. Both results lie
    about equally far from the exact one, so rounding alone makes them differ by at most twice that distance.

    Scores are computed for all heads at a time, for two, and for a part of one.
    """
    monkeypatch.setattr(packed_blocks, "SCORE_BYTES_AT_A_TIME", score_bytes)
    plain = SSLAMModel(config).eval()
    clips = torch.randn(3, 256, 128)
    attention_mask = torch.ones(3, 256, dtype=torch.long)
    attention_mask[1, 160:] = 0
    clips[1, 160:] = 5.0
    with torch.no_grad():
        exact = deepcopy(plain).double()(clips[1:2, :160]).last_hidden_state[0]
    model = optimize_or_refuse(plain, precision)
    if model is None:
        return
    alone = model(clips[1:2, :160]).last_hidden_state[0]
    with_mask = model(clips, attention_mask).last_hidden_state[1, : len(alone)]
    without_mask = model(clips).last_hidden_state[1, : len(alone)]
    rounding = distance(alone, exact)
    assert distance(with_mask, alone) <= 2 * rounding
    assert distance(without_mask, alone) > 10 * rounding, "padding that is attended to must show"


@pytest.mark.usefixtures("_either_attention")
@pytest.mark.parametrize("precision", FIDELITY)
def test_fidelity_of_embeddings(config, input_values, precision):
    plain = SSLAMModel(config).eval()
    with torch.no_grad():
        expected = plain(input_values).pooler_output
    fast = optimize_or_refuse(plain, precision)
    if fast is None:
        return
    found = fast(input_values).pooler_output.float()
    assert cosine_similarity(found, expected).min() > FIDELITY[precision]
    assert not torch.equal(found, expected)


@pytest.mark.usefixtures("_either_attention")
def test_int8_of_a_clip_does_not_depend_on_the_others(config, input_values):
    """The results agree bit for bit: shapes are the same, and each token has its own scale."""
    model = optimize_for_cpu(SSLAMModel(config), "int8")
    others = torch.cat((input_values[:1], 100 * torch.randn_like(input_values[1:])))
    assert torch.equal(model(input_values).last_hidden_state[0], model(others).last_hidden_state[0])


def test_int8_of_silence(config):
    model = optimize_for_cpu(SSLAMModel(config), "int8")
    product = packed_blocks.pack_linear_int8(torch.nn.Linear(96, 96))
    assert product(torch.zeros(4, 96)).isfinite().all()
    assert model(torch.zeros(1, 256, 128)).pooler_output.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_classifier(config, input_values, precision, assert_rounds_like):
    """The head keeps the relative error of the embeddings."""
    plain = SSLAMForAudioClassification(config).eval()
    with torch.no_grad():
        expected = plain(input_values).logits
        exact = deepcopy(plain).double()(input_values).logits
    fast = optimize_or_refuse(plain, precision)
    if fast is None:
        return
    found = fast(input_values).logits
    if precision == "float32":
        assert_rounds_like(found, expected, exact)
    else:
        assert distance(found, exact) < relative_error(precision) * exact.norm()


def test_optimised_model_refuses_other_uses(config, input_values, tmp_path):
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


def test_other_models_cannot_be_optimised(config):
    with pytest.raises(ValueError, match="'int4' is not one of"):
        optimize_for_cpu(SSLAMModel(config), "int4")
    with pytest.raises(ValueError, match="SSLAMForPreTraining on cpu cannot be"):
        optimize_for_cpu(SSLAMForPreTraining(config))
    with pytest.raises(ValueError, match="SSLAMModel on meta cannot be"):
        optimize_for_cpu(SSLAMModel(config).to("meta"))


def test_missing_kernels_and_packages(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packed_blocks, "IS_X86_WITH_ONEDNN", False)
        with pytest.raises(InferenceError, match="no float32 kernels"):
            optimize_for_cpu(SSLAMModel(config))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model = SSLAMModel(config).half().train()
    with pytest.raises(InferenceError, match=r"int8 needs torchao: pip install"):
        optimize_for_cpu(model, "int8")
    assert model.dtype == torch.float16
    assert model.training


def test_commands_use_packed_blocks(model_folder: Path, audio_dir: Path):
    recording = audio_dir / "misc_crow.flac"
    plain = SSLAMTagger(
        SSLAMForAudioClassification.from_pretrained(model_folder), SSLAMFeatureExtractor.from_pretrained(model_folder)
    )
    expected = {entry["label"]: entry["score"] for entry in plain.tag(recording, top_k=None)}
    # The slope of the sigmoid is at most 1/4, so a score's error is at most a quarter of its logit's: the tolerance of
    # the golden logits, or the promised relative error.
    norm_of_logits = torch.tensor(list(expected.values())).logit().norm().item()
    for dtype, tolerance in (("auto", 1e-5 / 4), ("int8", relative_error("int8") * norm_of_logits / 4)):
        tagger = SSLAMTagger.from_pretrained(model_folder, device="cpu", dtype=dtype)
        assert precision_of(tagger.model.sslam) == {"auto": "float32"}.get(dtype, dtype)
        found = {entry["label"]: entry["score"] for entry in tagger.tag(recording, top_k=None)}
        assert found == pytest.approx(expected, abs=tolerance)
    assert precision_of(plain.model.sslam) == "float32"
    assert not isinstance(plain.model.sslam.encoder.layers[0], PackedLayer)


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
