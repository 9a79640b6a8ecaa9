"""Augmentation for fine-tuning.

Waveforms are augmented clip by clip with the data's own generators. Log-mel frames are augmented a batch at a time on
their device, with torch's global generators.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torchaudio.transforms import FrequencyMasking, TimeMasking

# The published gain is Beta(10, 10) + 0.5: mean 1, standard deviation 0.11.
GAIN_BETA = 10.0
# Share of the batches that are mixed, as published.
DEFAULT_MIXUP_PROB = 0.9


@dataclass
class AugmentationConfig:
    """Augmentation of training clips. The defaults are the published ones for AudioSet."""

    roll_and_gain: bool = field(
        default=True, metadata={"help": "Roll waveforms by a random offset and multiply them by Beta(10,10) + 0.5."}
    )
    noise: float = field(
        default=0.0,
        metadata={"help": "Upper limit of the level of uniform noise added to the normalised frames; 0.1 for speech."},
    )
    shift_frames: int = field(
        default=0, metadata={"help": "Roll the frames by up to this many in either direction; 10 for speech."}
    )
    mixup_alpha: float = field(
        default=0.8,
        metadata={"help": "Mix the batch with its reverse (mixup), with lambda ~ Beta(alpha, alpha). 0: never."},
    )
    mixup_prob: float = field(default=DEFAULT_MIXUP_PROB, metadata={"help": "Share of the batches that are mixed."})
    mask_ratio: float = field(
        default=0.2,
        metadata={"help": "SpecAugment: mask up to this share of the mel bins and of the frames. 0: no masks."},
    )

    def __post_init__(self) -> None:
        for name in ("noise", "shift_frames", "mixup_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("mixup_prob", "mask_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")


def roll_and_gain(waveform: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Roll a waveform `(samples,)` by a random offset and multiply it by a random gain."""
    return waveform.roll(int(rng.integers(len(waveform)))) * (rng.beta(GAIN_BETA, GAIN_BETA) + 0.5)


def augment_batch(
    input_values: torch.Tensor, targets: torch.Tensor, config: AugmentationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the augmentations of frames, in the published order.

    Args:
        input_values: Normalised log-mel frames `(B, T, F)`.
        targets: float `(B, K)`.
        config: The augmentations.

    Returns:
        Frames and targets. Mixup mixes both alike.
    """
    if config.noise:
        levels = config.noise * torch.rand(len(input_values), 1, 1, device=input_values.device)
        input_values = input_values + levels * torch.rand_like(input_values)
    if config.shift_frames:
        input_values = shift_frames(input_values, config.shift_frames)
    if config.mixup_alpha and torch.rand(()) < config.mixup_prob:
        alpha = torch.tensor(config.mixup_alpha)
        weight = torch.distributions.Beta(alpha, alpha).sample().item()
        input_values, targets = mix(input_values, weight), mix(targets, weight)
    return mask_spectrogram(input_values, config.mask_ratio), targets


def shift_frames(input_values: torch.Tensor, most: int) -> torch.Tensor:
    """Roll each clip of `(B, T, F)` by its own number of frames, from -most to most."""
    batch_size, length, _ = input_values.shape
    offsets = torch.randint(-most, most + 1, (batch_size, 1), device=input_values.device)
    index = (torch.arange(length, device=input_values.device) - offsets) % length
    return input_values.gather(1, index[..., None].expand_as(input_values))


def mix(values: torch.Tensor, weight: float) -> torch.Tensor:
    """Mix a batch with its reverse, `weight` to `1 - weight` (Zhang et al., mixup, ICLR 2018)."""
    return weight * values + (1 - weight) * values.flip(0)


def mask_spectrogram(input_values: torch.Tensor, ratio: float) -> torch.Tensor:
    """Apply SpecAugment (Park et al., 2019) to `(B, T, F)`.

    In each clip, one mask sets at most `ratio` of the mel bins to 0 and one as much of the frames. Widths and places
    are drawn for each clip.
    """
    length, num_mel_bins = input_values.shape[1:]
    widths = int(num_mel_bins * ratio), int(length * ratio)
    # torchaudio draws a mask per clip only if there is an axis of channels.
    spectrograms = input_values.transpose(1, 2)[:, None]
    for masking, width in zip((FrequencyMasking, TimeMasking), widths, strict=True):
        if width:
            spectrograms = masking(width, iid_masks=True)(spectrograms)
    return spectrograms[:, 0].transpose(1, 2)
