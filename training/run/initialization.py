"""Initialisation of the patch projection from data.

Patches of log-mel frames differ above all in level and spectral slope. A random projection hands on these few
directions and little else, so a new teacher's targets hold little but level and position. Here the projection starts
from the principal components of the data (Krähenbühl et al., "Data-dependent Initializations of Convolutional Neural
Networks", ICLR 2016), with the strong ones attenuated.
"""

from collections.abc import Iterable

import torch
from torch import nn

# Share of the largest eigenvalue below which a component counts as rounding and is not amplified.
LEAST_EIGENVALUE = 1e-6


def patches_of(input_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut frames `(batch_size, T, num_mel_bins)` into patches `(batch_size * N, patch_size**2)`."""
    columns = torch.nn.functional.unfold(input_values[:, None], patch_size, stride=patch_size)
    return columns.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def whiten_patches(
    embeddings: nn.Module, batches: Iterable[torch.Tensor], strength: float, generator: torch.Generator
) -> None:
    """Set the patch projection to a random rotation of the data's principal components.

    A component with the eigenvalue v leaves the projection with a variance in proportion to v**(1 - strength). The
    mean patch is mapped to 0, and the mean variance of the outputs is 1.

    Args:
        embeddings: An [`SSLAMPatchEmbeddings`], whose projection is set in place.
        batches: `input_values`, each `(batch_size, T, num_mel_bins)`; some thousand patches in all.
        strength: 0 keeps the variances of the components, 1 makes them equal.
        generator: Source of the rotation, on the CPU.

    Raises:
        ValueError: If the patches are all alike.
    """
    weight, bias = embeddings.get_parameter("projection.weight"), embeddings.get_parameter("projection.bias")
    hidden_size, patch_size = weight.shape[0], weight.shape[-1]
    count, total, products = 0, torch.zeros(patch_size**2).double(), torch.zeros(patch_size**2, patch_size**2).double()
    for input_values in batches:
        patches = patches_of(input_values.cpu().double(), patch_size)
        count, total, products = count + len(patches), total + patches.sum(0), products + patches.T @ patches
    mean = total / max(1, count)
    eigenvalues, components = torch.linalg.eigh(products / max(1, count) - mean.outer(mean))
    if not eigenvalues[-1] > 1e-10:
        raise ValueError(f"The {count} patches are all alike: the clips are silent, so nothing can be learned.")
    kept = min(hidden_size, patch_size**2)
    variances = eigenvalues[-kept:].clamp_min(LEAST_EIGENVALUE * eigenvalues[-1])
    rotation = torch.linalg.qr(torch.randn(hidden_size, kept, generator=generator).double())[0]
    projection = (rotation * variances ** (-strength / 2)) @ components[:, -kept:].T
    projection *= (hidden_size / (variances ** (1 - strength)).sum()).sqrt()
    weight.copy_(projection.view_as(weight))
    bias.copy_(-projection @ mean)
