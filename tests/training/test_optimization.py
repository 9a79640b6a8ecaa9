import json

import pytest
import torch
from torch import nn

from training.optimization import OptimizerConfig, learning_rate, make_optimizer, parameter_groups


def test_warm_up_is_the_published_one(golden_dir):
    steps = json.loads((golden_dir / "expected.json").read_text())["trajectory"]["steps"][:3]
    for step in steps:
        rate = learning_rate(step["update"] + 1, peak=1e-3, warmup_updates=3, max_updates=100)
        assert rate == pytest.approx(step["lr"], rel=1e-12)


def test_schedule_rises_to_its_peak_and_falls_to_zero():
    rates = [learning_rate(n, 2.0, warmup_updates=10, max_updates=110) for n in range(1, 111)]
    assert max(rates) == rates[9] == 2.0
    assert rates[59] == pytest.approx(1.0)  # half way down the cosine
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize(("warmup", "updates"), [(0, 1), (5, 5), (10, 3)])
def test_schedule_without_a_decay_phase(warmup, updates):
    assert all(0 <= learning_rate(n, 1.0, warmup, updates) <= 1 for n in range(1, updates + 1))


def test_everything_trainable_decays_unless_asked_otherwise():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    model[2].requires_grad_(False)
    (group,) = parameter_groups(model.parameters(), 0.05)
    assert group["weight_decay"] == 0.05
    assert len(group["params"]) == 5

    decayed, spared = parameter_groups(model.parameters(), 0.05, decay_1d_parameters=False)
    assert [parameter.shape for parameter in decayed["params"]] == [(4, 3)]
    assert decayed["weight_decay"] == 0.05
    assert len(spared["params"]) == 4
    assert spared["weight_decay"] == 0.0


def test_optimizer_is_the_published_one():
    optimizer = make_optimizer(nn.Linear(2, 2), OptimizerConfig())
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.05)


@pytest.mark.parametrize("setting", ["learning_rate", "eps", "max_grad_norm"])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting}=0"):
        OptimizerConfig(**{setting: 0})
