import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from modeling_sslam import SSLAMForAudioClassification
from training.finetune import backpropagate
from training.run.losses import loss_sum, loss_weight

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
TARGETS = torch.tensor([[1.0, 0.0, 0.25], [0.0, 1.0, 0.0]])


def bce(logit: float, target: float) -> float:
    return math.log1p(math.exp(logit)) - logit * target


def mean(loss, label_smoothing=0.0):
    return (loss_sum(LOGITS, TARGETS, loss, label_smoothing) / loss_weight(TARGETS, loss)).item()


def pairs():
    return zip(LOGITS.flatten().tolist(), TARGETS.flatten().tolist(), strict=True)


def test_binary_cross_entropy_over_targets_and_over_clips():
    total = sum(bce(logit, target) for logit, target in pairs())
    assert mean("bce_per_target") == pytest.approx(total / 2.25, rel=1e-6)
    assert mean("bce_per_clip") == pytest.approx(total / 2, rel=1e-6)


def test_smoothed_binary_cross_entropy():
    total = sum(bce(logit, 0.9 * target + 0.1 / 3) for logit, target in pairs())
    assert mean("bce_per_clip", 0.1) == pytest.approx(total / 2, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_mixed_and_smoothed_targets(smoothing):
    total = 0.0
    for logits, targets in zip(LOGITS.tolist(), TARGETS.tolist(), strict=True):
        log_sum = math.log(sum(map(math.exp, logits)))
        for logit, target in zip(logits, targets, strict=True):
            total += ((1 - smoothing) * target + smoothing / 3) * (log_sum - logit)
    assert mean("cross_entropy", smoothing) == pytest.approx(total / 2, rel=1e-6)


def test_half_precision_logits_do_not_round_the_loss():
    logits = LOGITS.to(torch.bfloat16)
    wanted = loss_sum(logits.float(), TARGETS, "bce_per_target")
    assert loss_sum(logits, TARGETS, "bce_per_target") == wanted


@pytest.mark.parametrize("loss", ["bce_per_target", "bce_per_clip", "cross_entropy"])
def test_uneven_passes_give_the_gradient_of_the_whole_batch(loss, make_config):
    torch.manual_seed(0)
    model = SSLAMForAudioClassification(make_config(num_labels=3)).train()
    values = torch.randn(5, model.config.max_length, model.config.num_mel_bins)
    targets = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]], dtype=torch.float32)

    logits = model(values).logits
    whole = loss_sum(logits, targets, loss, 0.1) / loss_weight(targets, loss)
    whole.backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    parts = [(values[:1], targets[:1]), (values[1:], targets[1:])]
    outputs = backpropagate(accelerator, model, parts, loss, 0.1)
    assert torch.stack([output["loss"] for output in outputs]).mean() == pytest.approx(whole.item(), rel=1e-5)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient, expected in zip(found, wanted, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
