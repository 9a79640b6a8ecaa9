"""The transcription computes the same numbers as the model, so that the benchmarks' comparison is fair."""

import pytest
import torch

from benchmarks.plain import PlainPreTraining, load_weights, rename
from modeling_sslam import SSLAMForPreTraining
from modeling_sslam.modeling_sslam_pretraining import draw_unmixed_starts, inverse_block_masks


@pytest.mark.parametrize("objective", ["ua", "sslam"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"decoder_kernel_size": 5, "decoder_groups": 8, "num_clones": 3, "num_target_layers": 2},
        {"num_global_target_layers": 2, "num_mel_bins": 48, "qkv_bias": False, "global_loss_weight": 0.5},
    ],
)
def test_transcription_and_model_agree(objective, overrides, make_config):
    config = make_config(pretraining_objective=objective, mask_noise_std=0.0, **overrides)
    model, plain = SSLAMForPreTraining(config).train(), PlainPreTraining(config).train()
    for parameter in model.teacher.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    load_weights(plain, model)
    batch_size, num_frames = 3, 80
    clips = torch.randn(batch_size, num_frames, config.num_mel_bins)
    masks = inverse_block_masks(batch_size, num_frames // config.patch_size, config)
    starts = None if objective == "ua" else draw_unmixed_starts(num_frames // config.patch_size, config)

    output = model(clips, bool_masked_pos=masks, unmixed_starts=starts)
    plain_output = plain(clips, masks, starts)
    assert len(plain_output) == {"ua": 5, "sslam": 8}[objective]
    for name, value in plain_output.items():
        torch.testing.assert_close(value, output[name], rtol=1e-5, atol=0)

    output.loss.backward()
    plain_output["loss"].backward()
    gradients = rename({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain_gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert plain_gradients.keys() == gradients.keys()
    for name, gradient in plain_gradients.items():
        # A small element among large ones is a difference of large numbers and has their rounding.
        atol = max(1e-5, 2e-6 * gradient.abs().max().item())
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=atol)

    model.update_teacher(0.75)
    plain.update_teacher(0.75)
    teacher = rename({f"teacher.{name}": p for name, p in model.teacher.named_parameters()})
    for name, parameter in plain.teacher.named_parameters():
        torch.testing.assert_close(parameter, teacher[f"teacher.{name}"])


def test_transcription_draws_masks_and_windows_itself(make_config):
    plain = PlainPreTraining(make_config())
    losses = {plain(torch.ones(2, 64, 32))["loss"].item() for _ in range(5)}
    assert len(losses) == 5
