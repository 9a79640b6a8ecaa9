import numpy as np
import pytest
import torch

from training.data.augmentation import (
    AugmentationConfig,
    augment_batch,
    mask_spectrogram,
    mix,
    roll_and_gain,
    shift_frames,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_roll_and_gain_shifts_the_whole_clip_and_scales_it():
    waveform = torch.arange(1.0, 401.0)
    gains, offsets = [], set()
    for seed in range(400):
        changed = roll_and_gain(waveform, np.random.default_rng(seed))
        offset = int(changed.argmin())
        gains.append((changed.sum() / waveform.sum()).item())
        offsets.add(offset)
        assert torch.allclose(changed, gains[-1] * waveform.roll(offset), rtol=1e-5)
    # Beta(10, 10) + 0.5 has mean 1 and variance 1 / 84.
    assert np.mean(gains) == pytest.approx(1.0, abs=0.02)
    assert np.std(gains) == pytest.approx(84**-0.5, rel=0.15)
    assert len(offsets) > 200


def test_mixup_combines_the_batch_and_its_reverse():
    values, targets = torch.randn(3, 8, 4), torch.eye(3)
    assert torch.allclose(mix(values, 0.25)[0], 0.25 * values[0] + 0.75 * values[2])
    assert torch.allclose(mix(values, 0.25)[1], values[1])
    assert mix(targets, 0.25).tolist() == [[0.25, 0, 0.75], [0, 1, 0], [0.75, 0, 0.25]]


def test_frames_and_targets_are_mixed_with_the_same_weight():
    config = AugmentationConfig(mixup_alpha=0.8, mixup_prob=1.0, mask_ratio=0.0)
    values = torch.stack([torch.zeros(16, 4), torch.ones(16, 4)])
    weights = []
    for _ in range(200):
        mixed, targets = augment_batch(values, torch.eye(2), config)
        weight = targets[0, 0].item()
        assert targets[0].sum().item() == pytest.approx(1)
        assert mixed[0, 0, 0].item() == pytest.approx(1 - weight, abs=1e-6)
        weights.append(weight)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    assert np.mean(weights) == pytest.approx(0.5, abs=0.07)
    assert np.var(weights) == pytest.approx(1 / (4 * 2.6), rel=0.2)


@pytest.mark.parametrize(("prob", "least", "most"), [(0.0, 0, 0), (0.9, 160, 195), (1.0, 200, 200)])
def test_share_of_mixed_batches(prob, least, most):
    config = AugmentationConfig(mixup_prob=prob, mask_ratio=0.0)
    mixed = sum(
        not torch.equal(augment_batch(torch.zeros(2, 16, 4), torch.eye(2), config)[1], torch.eye(2))
        for _ in range(200)
    )
    assert least <= mixed <= most


def test_masks_have_at_most_the_ratio_and_differ_between_clips():
    ratio, length, num_mel_bins = 0.25, 64, 32
    masked = mask_spectrogram(torch.ones(200, length, num_mel_bins), ratio)
    assert set(masked.unique().tolist()) == {0.0, 1.0}
    frames, bins = (masked == 0).all(2), (masked == 0).all(1)
    assert frames.sum(1).max() <= length * ratio
    assert bins.sum(1).max() <= num_mel_bins * ratio
    # Nothing else is 0, and each mask is contiguous.
    assert torch.equal(masked == 0, frames[:, :, None] | bins[:, None, :])
    assert (frames.int().diff(dim=1).abs().sum(1) <= 2).all()
    # Widths are uniform on [0, width).
    assert frames.sum(1).float().mean().item() == pytest.approx(length * ratio / 2, rel=0.15)
    assert len({tuple(row.tolist()) for row in frames}) > 100


def test_without_a_ratio_nothing_is_masked():
    values = torch.randn(2, 16, 4)
    assert torch.equal(mask_spectrogram(values, 0.0), values)


def test_each_clip_is_rolled_by_its_own_offset():
    values = torch.arange(20.0)[None, :, None].expand(100, 20, 3)
    shifted = shift_frames(values, 3)
    offsets = shifted[:, 0, 0].neg().remainder(20).int()
    for clip, offset, original in zip(shifted, offsets, values, strict=True):
        assert torch.equal(clip, original.roll(offset.item(), 0))
    assert {(offset.item() + 10) % 20 - 10 for offset in offsets} == set(range(-3, 4))


def test_noise_is_uniform_with_a_level_for_each_clip():
    config = AugmentationConfig(noise=0.1, mixup_alpha=0.0, mask_ratio=0.0)
    noise, _ = augment_batch(torch.zeros(300, 64, 8), torch.eye(300), config)
    assert noise.min() >= 0
    levels = noise.flatten(1).max(1).values
    assert 0.09 < levels.max() < 0.1
    assert levels.mean().item() == pytest.approx(0.05, abs=0.006)
    assert torch.allclose(noise.mean((1, 2)), levels / 2, rtol=0.15, atol=1e-4)


def test_the_same_seed_gives_the_same_batch():
    config = AugmentationConfig(noise=0.1, shift_frames=3)
    values, targets = torch.randn(4, 32, 16), torch.eye(4)
    torch.manual_seed(5)
    first = augment_batch(values, targets, config)
    torch.manual_seed(5)
    for one, other in zip(first, augment_batch(values, targets, config), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "value"), [("mixup_alpha", -1), ("mixup_prob", 1.5), ("mask_ratio", -0.1), ("noise", -1)]
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        AugmentationConfig(**{name: value})
