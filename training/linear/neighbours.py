"""Classification without gradients: nearest neighbours, and nearest class means of a few clips."""

from collections.abc import Sequence

import torch
from torch import nn

LEAST_DEVIATION = 1e-6


def standardized(features: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Scale features `(N, width)` to mean 0 and standard deviation 1 over clips, then each clip to unit length.

    Args:
        features: Features that determine the means and standard deviations.
        others: Further features, scaled in the same way.
    """
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    scale = torch.where(deviation < LEAST_DEVIATION, 0.0, 1 / deviation.clamp(min=LEAST_DEVIATION))
    return [nn.functional.normalize((part - mean) * scale, dim=-1) for part in (features, *others)]


def neighbour_logits(
    features: torch.Tensor, targets: torch.Tensor, others: torch.Tensor, neighbours: Sequence[int]
) -> torch.Tensor:
    """Return the mean targets of the nearest training clips, for each number of neighbours: `(len(k), M, K)`.

    A neighbour's weight grows with its cosine similarity, which also breaks ties between classes.

    Args:
        features: Features of the N training clips, `(N, width)`.
        targets: Their targets, `(N, K)`.
        others: Features of the clips to classify, `(M, width)`.
        neighbours: Numbers of neighbours; one above N stands for N.
    """
    training, queries = standardized(features, others)
    most = min(max(neighbours), len(training))
    results = torch.empty(len(neighbours), len(queries), targets.shape[1], device=targets.device)
    for start in range(0, len(queries), 1024):
        rows = slice(start, start + 1024)
        similarity, nearest = (queries[rows] @ training.T).topk(most)
        # The weights lie in [0, 1], so a distant neighbour never votes against its own class.
        votes = targets[nearest] * ((1 + similarity) / 2)[..., None]
        for i, k in enumerate(neighbours):
            results[i, rows] = votes[:, :k].mean(1)
    return results


def draw_shots(targets: torch.Tensor, shots: int, draws: int, seed: int) -> list[list[torch.Tensor]]:
    """Draw some clips of each class, many times.

    Args:
        targets: Targets of the training clips, `(N, K)`.
        shots: Number of clips of each class. A class with fewer clips gives all of them.
        draws: Number of draws.
        seed: Determines the draws.

    Returns:
        The rows of the clips, for each draw and class.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [column.nonzero()[:, 0] for column in targets.cpu().T]
    return [[of[torch.randperm(len(of), generator=generator)[:shots]] for of in rows] for _ in range(draws)]


def few_shot_logits(
    features: torch.Tensor, others: torch.Tensor, drawn: Sequence[Sequence[torch.Tensor]]
) -> torch.Tensor:
    """Return cosine similarities to the mean of each class's clips, for each draw: `(draws, M, K)`.

    The drawn clips alone determine the standardisation. A class without clips gets the least similarity, -1.

    Args:
        features: Features of the training clips, `(N, width)`.
        others: Features of the clips to classify, `(M, width)`.
        drawn: Rows of the training clips by draw and class, of [`draw_shots`].
    """
    logits = []
    for rows in drawn:
        support, queries = standardized(features[torch.cat(list(rows)).to(features.device)], others)
        parts = support.split([len(of) for of in rows])
        means = torch.stack([part.mean(0) if len(part) else support.new_zeros(support.shape[1]) for part in parts])
        similarity = queries @ nn.functional.normalize(means, dim=-1).T
        similarity[:, [len(part) == 0 for part in parts]] = -1.0
        logits.append(similarity)
    return torch.stack(logits)
