"""Settings of runs that take a second."""

from typing import Any

import pytest


@pytest.fixture
def tiny_run() -> dict[str, Any]:
    """Settings of a training run; folder and data are named by the command line."""
    return {"output_dir": "x", "data": {"source": "x"}, "batch_size": 4, "optimizer": {"warmup_updates": 1}}


@pytest.fixture
def tiny_pretraining(tiny_run: dict[str, Any]) -> dict[str, Any]:
    """Settings of a pre-training, without the number of updates."""
    model = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_length": 64,
        "max_position_embeddings": 8,
        "num_clones": 2,
        "decoder_num_layers": 1,
    }
    return tiny_run | {"model": model, "checkpoint": {"every": 2}}
