"""Pre-training on scenes that are mixed while it runs: new scenes in each epoch, and exact resume."""

import shutil

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from training import pretrain
from training.run.checkpointing import list_checkpoints
from training.run.metrics_log import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def train(write_sounds, tmp_path):
    """A function that pre-trains a tiny model on scenes of tones in `tmp_path / name`, and returns its weights."""
    write_sounds(tmp_path / "sounds")
    scenes = {"sounds": "sounds", "clips": 10, "seconds": 0.64, "max_sources": 3, "splits": ["train=1"]}
    (tmp_path / "scenes.yaml").write_text(yaml.safe_dump(scenes | {"pitch": [-1, 1], "snr": [10, 20]}))
    settings = {
        "batch_size": 4,
        "data": {"source": str(tmp_path / "scenes.yaml"), "shuffle_buffer": 4},
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "num_mel_bins": 32,
            "max_length": 64,
            "max_position_embeddings": 8,
            "num_clones": 2,
            "decoder_num_layers": 2,
        },
        "optimizer": {"learning_rate": 2e-3, "warmup_updates": 2},
        "checkpoint": {"every": 3, "keep": 9},
        "watch": {"every": 2, "tracker": "none"},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))

    def train(name, **changes):
        changes = {"output_dir": tmp_path / name, "max_updates": 8, "data.num_workers": 0} | changes
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        pretrain.main(["--config", str(tmp_path / "settings.yaml"), *(f"--{k}={v}" for k, v in changes.items())])
        return load_file(tmp_path / name / "model" / "model.safetensors")

    return train


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(train, tmp_path, num_workers):
    workers = {"data.num_workers": num_workers}
    whole = train("whole", **workers)
    # The state of a run that was killed after update 3, within which the first epoch of 10 scenes ends.
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "model")
    checkpoints = sorted(list_checkpoints(tmp_path / "resumed"))
    assert checkpoints[0].name == "step-00000003"
    for path in checkpoints[1:]:
        shutil.rmtree(path)
    resumed = train("resumed", resume="auto", **workers)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("whole", "resumed")
    ]
    assert losses[0] == losses[1]
