"""A grouped 2-D convolution as one batched matrix product, for grids that are narrow along one axis.

The patch grid of SSLAM has many time patches but few mel patches (8), and a group of the decoder's convolution has
few channels (48). A product for each group and tap is therefore too small for a GPU. Here the mel patches of a group
lie side by side, so a row has `mel * channels` values. The kernel's taps along mel become a band in a matrix that maps
rows to rows. For the taps along time, the rows of neighbouring time patches lie side by side as well:

    (groups, batch * time, taps * mel * channels_in) x (groups, taps * mel * channels_in, mel * channels_out)

The matrix is zero outside the band, so the product has mel / kernel_mel times the convolution's FLOPs.
"""

import torch
from torch import nn


def banded_convolution(
    grid: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int
) -> torch.Tensor:
    """Convolve as `torch.nn.functional.conv2d` with `padding="same"`, up to rounding.

    The gradients of all arguments follow from torch's own operators. `torch.compile` turns the rearrangements into one
    kernel before the product, and into reads of the operation after it.

    Args:
        grid: `(batch_size, time, mel, channels)`, with the channels last. All tensors have the same dtype.
        weight: `(channels_out, channels / groups, kernel_time, kernel_mel)`, as `conv2d` takes it. Kernel sizes can be
            odd or even; an even one has its additional tap at the end, as `padding="same"` has.
        bias: `(channels_out,)`, or None.
        groups: Number of groups; a divisor of both numbers of channels.

    Returns:
        `(batch_size, time, mel, channels_out)`.
    """
    batch_size, time, mel, _ = grid.shape
    taps = weight.shape[2]
    before = _taps_before(taps)
    padded = nn.functional.pad(grid, (0, 0, 0, 0, before, taps - 1 - before))
    by_group = padded.unflatten(-1, (groups, -1)).permute(3, 0, 1, 2, 4)
    # `unfold` would do the same, but its gradient is a scatter, and that of slices a sum of shifted tensors.
    windows = torch.stack([by_group[:, :, tap : tap + time] for tap in range(taps)], dim=3)
    rows = windows.reshape(groups, batch_size * time, -1) @ banded_weight(weight, groups, mel)
    output = rows.view(groups, batch_size, time, mel, -1).permute(1, 2, 3, 0, 4).flatten(3)
    return output if bias is None else output + bias


def banded_weight(weight: torch.Tensor, groups: int, mel: int) -> torch.Tensor:
    """Arrange a convolution's weight as the matrices that map rows to rows.

    Args:
        weight: `(channels_out, channels_in / groups, kernel_time, kernel_mel)`.
        groups: Number of groups.
        mel: Width of the grid along mel.

    Returns:
        `(groups, kernel_time * mel * channels_in / groups, mel * channels_out / groups)`.
    """
    taps = weight.shape[3]
    position = torch.arange(mel, device=weight.device)
    # The tap by which an output position (last dimension) reads an input position (last but one).
    tap = position[:, None] - position + _taps_before(taps)
    is_tap = tap == torch.arange(taps, device=weight.device)[:, None, None]
    # Each entry of this product is a single weight, or 0, so it is exact. Its gradient is a product too, where that of
    # an index would be a scatter.
    band = torch.tensordot(weight.unflatten(0, (groups, -1)), is_tap.to(weight.dtype), 1)
    # (groups, out, in, kernel_time, mel_in, mel_out) to (groups, kernel_time, mel_in, in, mel_out, out)
    return band.permute(0, 3, 4, 2, 5, 1).flatten(4).flatten(1, 3)


def _taps_before(taps: int) -> int:
    """Return the number of taps before the one at the output's own position, as `padding="same"` places it."""
    return (taps - 1) // 2
