"""Checkpoints go from a published layout to transformers and back with the same names and bits."""

import json

import pytest
import torch

from conversion.configuration import lookup
from conversion.reader import read_checkpoint
from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor
from modeling_sslam.layouts import FAIRSEQ_ENCODER_CONSTANTS, FAIRSEQ_PRETRAINING_CONSTANTS, FAIRSEQ_SETTINGS

pytestmark = pytest.mark.slow

FAIRSEQ_PATHS = [path for _, path in FAIRSEQ_SETTINGS] + [*FAIRSEQ_ENCODER_CONSTANTS, *FAIRSEQ_PRETRAINING_CONSTANTS]


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    ("source", "options"), [("sslam_pretrained.pt", ("--head", "pretraining")), ("sslam_finetuned.pt", ())]
)
def test_fairseq_and_back(source, options, golden_dir, converted, run, tmp_path):
    outcome = run(converted(source, *options), tmp_path / "back.pt", "--to", "fairseq")
    assert outcome.code == 0, outcome.error
    assert_same_tensors(read_checkpoint(tmp_path / "back.pt").tensors, read_checkpoint(golden_dir / source).tensors)


def test_fairseq_file_has_what_fairseq_reads(pretrained, converted, run, tmp_path):
    run(converted("sslam_pretrained.pt", "--head", "pretraining"), tmp_path / "back.pt", "--to", "fairseq")
    # Only tensors and plain containers: weights_only accepts them without stand-ins.
    state = torch.load(tmp_path / "back.pt", weights_only=True)
    assert state["args"] is None
    assert state["last_optimizer_state"] is None
    assert {"epoch", "iterations_in_epoch"} <= state["extra_state"]["train_iterator"].keys()
    assert {"optimizer_name", "num_updates", "lr_scheduler_state"} <= state["optimizer_history"][-1].keys()
    assert isinstance(state["model"]["_ema"], dict)
    found = {path: lookup(state["cfg"], path) for path in FAIRSEQ_PATHS}
    assert found == {path: lookup(pretrained.settings, path) for path in FAIRSEQ_PATHS}
    assert state["cfg"]["model"]["mlp_ratio"] == 4.0
    assert state["cfg"]["model"]["supported_modality"] == "IMAGE"


@pytest.mark.parametrize("source", ["hub_pretrained", "hub_finetuned"])
def test_hub_and_back(source, golden_dir, converted, run, tmp_path):
    outcome = run(converted(source), tmp_path / "back", "--to", "hub-eat")
    assert outcome.code == 0, outcome.error
    assert_same_tensors(read_checkpoint(tmp_path / "back").tensors, read_checkpoint(golden_dir / source).tensors)
    found, expected = (
        json.loads((folder / source_name).read_text())
        for folder, source_name in ((tmp_path / "back", "config.json"), (golden_dir / source, "config.json"))
    )
    del expected["transformers_version"]
    if source == "hub_pretrained":
        del expected["num_classes"], found["num_classes"]  # the number of classes of a missing head
    assert found == expected


def test_published_layout_to_the_other_in_one_step(golden_dir, run, tmp_path):
    assert run(golden_dir / "sslam_finetuned.pt", tmp_path / "hub", "--to", "hub-eat").code == 0
    assert run(golden_dir / "hub_finetuned", tmp_path / "file.pt", "--to", "fairseq").code == 0
    for path, source in ((tmp_path / "hub", "hub_finetuned"), (tmp_path / "file.pt", "sslam_finetuned.pt")):
        assert_same_tensors(read_checkpoint(path).tensors, read_checkpoint(golden_dir / source).tensors)


@pytest.mark.parametrize(
    "options",
    [
        ("--dataset-preset", "esc50", "--problem-type", "single_label_classification"),
        ("--dataset-preset", "speech_commands", "--problem-type", "single_label_classification"),
        ("--problem-type", "single_label_classification", "--pooling", "mean"),
        ("--problem-type", "multi_label_classification"),
    ],
)
def test_task_survives_fairseq(options, golden_dir, run, tmp_path):
    run(golden_dir / "sslam_finetuned.pt", tmp_path / "there", *options)
    run(tmp_path / "there", tmp_path / "file.pt", "--to", "fairseq")
    assert run(tmp_path / "file.pt", tmp_path / "back").code == 0
    there, back = (SSLAMConfig.from_pretrained(tmp_path / name).to_dict() for name in ("there", "back"))
    assert there == back
    there, back = (SSLAMFeatureExtractor.from_pretrained(tmp_path / name).to_dict() for name in ("there", "back"))
    assert there == back


def test_own_folder_keeps_its_feature_extractor(golden_dir, run, tmp_path):
    run(golden_dir / "sslam_finetuned.pt", tmp_path / "one")
    extractor = SSLAMFeatureExtractor(mean=-1.0, std=2.0, max_length=512)
    extractor.save_pretrained(tmp_path / "one")
    assert run(tmp_path / "one", tmp_path / "two").code == 0
    assert SSLAMFeatureExtractor.from_pretrained(tmp_path / "two").to_dict() == extractor.to_dict()


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("sslam_pretrained.pt", ("--to", "fairseq", "--head", "encoder"), "cannot hold --head encoder"),
        (
            "hub_pretrained",
            ("--to", "fairseq"),
            "no teacher, which pretraining needs. --to fairseq holds no encoder alone",
        ),
        ("sslam_pretrained.pt", ("--to", "hub-eat", "--head", "pretraining"), "cannot hold --head pretraining"),
        ("sslam_finetuned.pt", ("--to", "hub-eat", "--pooling", "mean"), "pools by the CLS token"),
        ("sslam_pretrained.pt", ("--head", "classification"), "no classifier"),
        ("sslam_finetuned.pt", ("--weights", "teacher"), "no teacher"),
        ("sslam_pretrained.pt", ("--weights", "teacher", "--head", "pretraining"), "needs --head encoder"),
    ],
)
def test_head_that_a_layout_cannot_hold_is_refused(source, options, reason, golden_dir, run, tmp_path):
    outcome = run(golden_dir / source, tmp_path / "out", *options)
    assert outcome.code == 1
    assert reason in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_other_norm_epsilon_of_the_layout_is_noted(golden_dir, run, tmp_path):
    lines = run(golden_dir / "sslam_finetuned.pt", tmp_path / "out", "--to", "hub-eat").lines
    assert any("epsilon of 1e-06 here, but 1e-05" in line for line in lines)
