import json

import pytest
import torch

from modeling_sslam import SSLAMConfig, SSLAMForAudioClassification
from training.run.optimization import OptimizerConfig, learning_rate, make_optimizer, parameter_groups


def schedule(peak: float, warmup_updates: int, max_updates: int, **settings: float) -> list[float]:
    config = OptimizerConfig(learning_rate=peak, warmup_updates=warmup_updates, **settings)
    return [learning_rate(n, config, max_updates) for n in range(1, max_updates + 1)]


def test_warm_up_is_the_published_one(golden_dir):
    steps = json.loads((golden_dir / "expected.json").read_text())["trajectory"]["steps"][:3]
    rates = schedule(1e-3, 3, 100)
    for step in steps:
        assert rates[step["update"]] == pytest.approx(step["lr"], rel=1e-12)


def test_schedule_rises_to_its_peak_and_falls_to_zero():
    rates = schedule(2.0, 10, 110)
    assert max(rates) == rates[9] == 2.0
    assert rates[59] == pytest.approx(1.0)  # half way down the cosine
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_schedule_with_other_initial_and_final_rates_than_zero():
    rates = schedule(5e-5, 4, 24, initial_learning_rate=1e-6, final_learning_rate=2e-6)
    assert rates[1] == pytest.approx((1e-6 + 5e-5) / 2)
    assert rates[3] == 5e-5
    assert rates[13] == pytest.approx((5e-5 + 2e-6) / 2)
    assert rates[-1] == pytest.approx(2e-6)


@pytest.mark.parametrize(("warmup", "updates"), [(0, 1), (5, 5), (10, 3)])
def test_schedule_without_a_decay_phase(warmup, updates):
    assert all(0 <= rate <= 1 for rate in schedule(1.0, warmup, updates))


@pytest.fixture
def model(tiny_config):
    return SSLAMForAudioClassification(tiny_config)


def test_everything_trainable_decays_unless_asked_otherwise(model):
    model.sslam.encoder.layers[0].requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    (group,) = parameter_groups(model, OptimizerConfig())
    assert group["weight_decay"] == 0.05
    assert len(group["params"]) == len(trainable)

    groups = parameter_groups(model, OptimizerConfig(decay_1d_parameters=False))
    decayed, spared = sorted(groups, key=lambda group: -group["weight_decay"])
    assert decayed["weight_decay"] == 0.05
    assert spared["weight_decay"] == 0.0
    assert any(p is model.classifier.dense.weight for p in decayed["params"])
    assert any(p is model.sslam.encoder.cls_token for p in spared["params"])
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert len(decayed["params"]) + len(spared["params"]) == len(trainable)


def test_layer_decay_gives_base_thirteen_learning_rates():
    with torch.device("meta"):
        model = SSLAMForAudioClassification(SSLAMConfig(num_labels=527))
    groups = parameter_groups(model, OptimizerConfig(layer_decay=0.65))
    scale_of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    wanted = {1.0} | {0.65 ** (12 - i) for i in range(12)}
    assert len(wanted) == 13
    assert set(scale_of.values()) == wanted
    for i, layer in enumerate(model.sslam.encoder.layers):
        assert {scale_of[id(p)] for p in layer.parameters()} == {0.65 ** (12 - i)}
    for whole in (model.sslam.patch_embeddings, model.sslam.encoder.layernorm, model.classifier):
        assert {scale_of[id(p)] for p in whole.parameters()} == {1.0}
    assert scale_of[id(model.sslam.encoder.cls_token)] == 1.0


def test_optimizer_is_the_published_one(model):
    optimizer = make_optimizer(model, OptimizerConfig())
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.05)


@pytest.mark.parametrize("setting", ["learning_rate", "eps", "max_grad_norm"])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting}=0"):
        OptimizerConfig(**{setting: 0})


@pytest.mark.parametrize("layer_decay", [0.0, 1.1])
def test_impossible_layer_decays_are_refused(layer_decay):
    with pytest.raises(ValueError, match=f"layer_decay={layer_decay}"):
        OptimizerConfig(layer_decay=layer_decay)
