"""Heads on patch tokens, several fitted at once: attentive pooling and prototypes.

Pooling before the head hides which patches hold a sound. These heads pool after they have looked at every patch:

- [`AttentiveHeads`]: learned queries attend to the patches, and a linear layer reads the pooled tokens;
- [`PrototypeHeads`]: each prototype's greatest cosine similarity to a patch, and a linear layer on these similarities
  (Rauch et al., "Unmute the Patch Tokens", ICLR 2026). The prototypes can be binary.

[`TokenInputs`] reads cached tokens, one layer for each head.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from training.linear.clips import Clips
from training.linear.heads import LEAST_DEVIATION

# Values of similarities between prototypes and patches that exist at once.
MAX_SIMILARITIES = 2**26
# Values of tokens that are read at once.
MAX_VALUES = 2**25


class AttentiveHeads(nn.Module):
    """H heads, each with queries over the patch tokens of its layer.

    Args:
        num_heads: Number of heads H.
        width: Width of a token.
        num_queries: Queries of a head.
        num_classes: Number of classes K.
        std: Standard deviation of the initial weights. Small queries start from the mean of all patches.
        generator: Random generator for the initial weights.
    """

    def __init__(
        self, num_heads: int, width: int, num_queries: int, num_classes: int, std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        query = torch.empty(num_queries, width).normal_(std=std, generator=generator)
        weight = torch.empty(num_queries * width, num_classes).normal_(std=std, generator=generator)
        self.query = nn.Parameter(query.repeat(num_heads, 1, 1))
        self.weight = nn.Parameter(weight.repeat(num_heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, num_classes))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute logits `(H, B, K)` of tokens `(H, B, patches, width)`."""
        scores = self.query[:, None] @ tokens.transpose(2, 3) / math.sqrt(tokens.shape[-1])
        pooled = scores.softmax(-1) @ tokens
        return torch.baddbmm(self.bias, pooled.flatten(2), self.weight)


class PrototypeHeads(nn.Module):
    """H heads, each with prototypes for the patch tokens of its layer.

    Args:
        num_heads: Number of heads H.
        width: Width of a token.
        num_prototypes: Prototypes J of a head.
        num_classes: Number of classes K.
        binary: Whether the components of a prototype are -1 and 1.
        std: Standard deviation of the initial weights of the linear layer.
        generator: Random generator for the initial prototypes and weights.
    """

    def __init__(
        self,
        num_heads: int,
        width: int,
        num_prototypes: int,
        num_classes: int,
        binary: bool,
        std: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.binary = binary
        prototypes = torch.empty(num_prototypes, width).normal_(generator=generator)
        weight = torch.empty(num_prototypes, num_classes).normal_(std=std, generator=generator)
        self.prototypes = nn.Parameter(prototypes.repeat(num_heads, 1, 1))
        self.scale = nn.Parameter(torch.ones(num_heads, 1, num_prototypes))
        self.shift = nn.Parameter(torch.zeros(num_heads, 1, num_prototypes))
        self.weight = nn.Parameter(weight.repeat(num_heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, num_classes))

    def directions(self) -> torch.Tensor:
        """Return the prototypes as unit vectors, `(H, J, width)`.

        The derivative of a sign is that of the value clipped to [-1, 1] (straight-through estimator).
        """
        prototypes: torch.Tensor = self.prototypes
        if self.binary:
            clipped = prototypes.clamp(-1, 1)
            signs = torch.where(prototypes >= 0, 1.0, -1.0)
            prototypes = clipped + (signs - clipped).detach()
        return nn.functional.normalize(prototypes, dim=-1)

    def similarities(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return each prototype's greatest cosine similarity `(H, B, J)` to tokens of unit length."""
        directions = self.directions()
        nearest = nearest_tokens(directions.detach(), tokens)
        index = nearest[..., None].expand(*nearest.shape, tokens.shape[-1])
        # Only the nearest tokens take part in the backward pass.
        return (tokens.gather(2, index) * directions[:, None]).sum(-1)

    @torch.no_grad()
    def standardize(self, similarities: torch.Tensor) -> None:
        """Set scale and shift such that each of the similarities `(H, N, J)` has mean 0 and deviation 1 over clips."""
        deviation, mean = torch.std_mean(similarities, dim=1, keepdim=True, correction=0)
        self.scale.copy_(1 / deviation.clamp(min=LEAST_DEVIATION))
        self.shift.copy_(-mean * self.scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute logits `(H, B, K)` of tokens `(H, B, patches, width)` of unit length."""
        return torch.baddbmm(self.bias, self.similarities(tokens) * self.scale + self.shift, self.weight)


@torch.no_grad()
def nearest_tokens(directions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the index `(H, B, J)` of the token with the greatest dot product with each direction.

    Args:
        directions: Directions of shape `(H, J, width)`.
        tokens: Tokens of shape `(H, B, patches, width)`.
    """
    num_heads, num_directions, _ = directions.shape
    clips = max(1, MAX_SIMILARITIES // (num_heads * num_directions * tokens.shape[2]))
    parts = [directions[:, None] @ part.transpose(2, 3) for part in tokens.split(clips, dim=1)]
    return torch.cat([part.argmax(-1) for part in parts], dim=1)


class TokenInputs:
    """Cached patch tokens of some clips, one layer for each head, standardised by channel.

    Args:
        clips: The clips.
        layers: The H layers.
        mean: Mean of each channel, `(H, 1, 1, width)`.
        deviation: Standard deviation of each channel, in the same shape.
        unit: Whether tokens are scaled to unit length.
        device: Device of the tokens.
        max_bytes: The tokens are held in memory up to this size. More are read from the cache batch by batch.
    """

    def __init__(
        self,
        clips: Clips,
        layers: Sequence[int],
        mean: torch.Tensor,
        deviation: torch.Tensor,
        unit: bool,
        device: torch.device,
        max_bytes: float,
    ) -> None:
        self.clips, self.layers, self.unit, self.device = clips, list(layers), unit, device
        self.mean, self.scale = mean.to(device), 1 / deviation.clamp(min=LEAST_DEVIATION).to(device)
        self.values_per_clip = int(np.prod(clips.token_shape)) * len(self.layers)
        self.held: torch.Tensor | None = None
        if 4 * self.values_per_clip * len(clips) <= max_bytes:
            parts = [self.read(rows) for rows in torch.arange(len(clips)).split(self.rows_at_once)]
            self.held = torch.cat(parts, dim=1) if parts else None

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def rows_at_once(self) -> int:
        """Number of clips to evaluate at once."""
        return max(1, MAX_VALUES // self.values_per_clip)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the tokens of some clips, float32 `(H, B, patches, width)`."""
        return self.read(rows) if self.held is None else self.held[:, rows.to(self.device)]

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Read the tokens of some clips from the cache and standardise them."""
        tokens = torch.from_numpy(self.clips.tokens(self.layers, rows.cpu().numpy())).to(self.device).float()
        tokens.sub_(self.mean).mul_(self.scale)
        return nn.functional.normalize(tokens, dim=-1) if self.unit else tokens


def channel_statistics(clips: Clips, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each channel of some layers' tokens, float32 `(H, 1, 1, width)` each."""
    num_patches, width = clips.token_shape
    total, squares = torch.zeros(2, len(layers), width, dtype=torch.float64)
    for rows in torch.arange(len(clips)).split(max(1, MAX_VALUES // (num_patches * width * len(layers)))):
        tokens = torch.from_numpy(clips.tokens(list(layers), rows.numpy())).double()
        total += tokens.sum((1, 2))
        squares += tokens.square().sum((1, 2))
    count = len(clips) * num_patches
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.float()[:, None, None], deviation.float()[:, None, None]
