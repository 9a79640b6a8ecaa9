"""Checkpoints of the Earth Species Project, in the form that its package `avex` states."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel

HEADS = ("--num-attention-heads", 4)
SUPERVISED, PRETRAINED = "esp-aves2-sl-eat-all-ssl-all", "esp-aves2-eat-all"


@pytest.fixture
def supervised(golden_dir, tmp_path):
    """Write a folder with a backbone under EATModel's names, a linear classifier without a norm and its label map."""
    folder = tmp_path / SUPERVISED
    folder.mkdir()
    tensors = load_file(golden_dir / "hub_pretrained" / "model.safetensors")
    weights = {f"backbone.{name}": value for name, value in tensors.items()}
    weights |= {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
    save_file(weights, folder / f"{SUPERVISED}.safetensors")
    (folder / "label_map.json").write_text(json.dumps({"wren": 2, "robin": 0, "crow": 1}))
    return folder


def test_supervised(supervised, golden_dir, run, tmp_path):
    outcome = run(supervised, tmp_path / "out", *HEADS)
    assert outcome.code == 0, outcome.error
    assert outcome.lines[0].endswith("avex (Earth Species Project); encoder (42 tensors), classifier (2 tensors)")
    model = SSLAMForAudioClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "robin", 1: "crow", 2: "wren"}
    assert model.config.classifier_norm_eps is None
    weights = load_file(supervised / f"{SUPERVISED}.safetensors")
    golden = load_file(golden_dir / "encoder.safetensors")
    with torch.no_grad():
        logits = model(golden["input_512"].float()).logits
    expected = torch.nn.functional.linear(
        golden["last_hidden_state_512"][:, 0], weights["classifier.weight"], weights["classifier.bias"]
    )
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert "no norm" in (tmp_path / "out" / "README.md").read_text()


def test_encoder_of_the_supervised_checkpoint(supervised, golden_dir, run, tmp_path, parity):
    assert run(supervised, tmp_path / "out", *HEADS, "--head", "encoder").code == 0
    golden = load_file(golden_dir / "encoder.safetensors")
    with torch.no_grad():
        states = SSLAMModel.from_pretrained(tmp_path / "out")(golden["input_512"].float()).last_hidden_state
    parity("encoder in avex's layout", (states - golden["last_hidden_state_512"]).abs().max(), 1e-5)


def test_self_supervised_checkpoint_is_known_by_its_name(golden_dir, run, tmp_path, pretrained):
    (tmp_path / PRETRAINED).mkdir()
    student = {name: value.clone() for name, value in pretrained.tensors.items() if not name.startswith("_ema.")}
    save_file(student, tmp_path / PRETRAINED / f"{PRETRAINED}.safetensors")
    for name, source in (("folder", PRETRAINED), ("file", f"{PRETRAINED}/{PRETRAINED}.safetensors")):
        outcome = run(tmp_path / source, tmp_path / name, *HEADS)
        assert outcome.code == 0, outcome.error
        extractor = SSLAMFeatureExtractor.from_pretrained(tmp_path / name)
        assert (extractor.mean, extractor.std, extractor.max_length) == (-5.553, 4.606, 1024)
    golden = load_file(golden_dir / "encoder.safetensors")
    with torch.no_grad():
        states = SSLAMModel.from_pretrained(tmp_path / "file")(golden["input_512"].float()).last_hidden_state
    torch.testing.assert_close(states, golden["last_hidden_state_512"], atol=1e-5, rtol=0)


def test_choices_take_precedence(supervised, run, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("a\nb\nc\n")
    outcome = run(supervised, tmp_path / "out", *HEADS, "--labels", labels, "--dataset-preset", "esc50")
    assert outcome.code == 0, outcome.error
    assert list(SSLAMConfig.from_pretrained(tmp_path / "out").id2label.values()) == ["a", "b", "c"]
    assert SSLAMFeatureExtractor.from_pretrained(tmp_path / "out").mean == -6.627


@pytest.mark.parametrize(
    "content", ["[]", '{"robin": 0}', '{"a": 0, "b": 0, "c": 1}', "not json", '{"a": "x", "b": 1}']
)
def test_a_label_map_that_does_not_fit_is_refused(supervised, run, tmp_path, content):
    (supervised / "label_map.json").write_text(content)
    outcome = run(supervised, tmp_path / "out", *HEADS)
    assert outcome.code == 1
    assert "label_map.json" in outcome.error or "--labels names" in outcome.error
    assert outcome.error.count("\n") == 1


@pytest.mark.parametrize("to", ["fairseq", "hub-eat"])
def test_layouts_whose_classifier_has_a_norm_are_refused(supervised, run, tmp_path, to):
    outcome = run(supervised, tmp_path / "out", *HEADS, "--to", to)
    assert outcome.code == 1
    assert "has no norm" in outcome.error
