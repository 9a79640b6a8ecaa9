"""The baseline without an encoder: statistics of cepstral coefficients and a random forest.

It follows the baseline of ESC-50 (Piczak 2015): the features of a clip are the mean and the standard deviation of its
MFCCs and of their derivatives. The MFCCs are computed from the log-mel frames that the encoder reads, so both read the
same crop.
"""

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from torchaudio.functional import compute_deltas, create_dct

from training.linear.features import Extractor


def cepstral_statistics(frames: torch.Tensor, coefficients: int) -> torch.Tensor:
    """Return the mean and the standard deviation over time of MFCCs and their derivatives.

    Args:
        frames: Log-mel frames `(B, T, F)`.
        coefficients: Number of coefficients C.

    Returns:
        Values of shape `(B, 1, 1, 4 * C)`, with one layer and one pooling, as pooled features have them.
    """
    matrix = create_dct(coefficients, frames.shape[-1], norm="ortho").to(frames.device)
    with torch.autocast(frames.device.type, enabled=False):
        cepstra = (frames.float() @ matrix).transpose(1, 2)
        changes = compute_deltas(cepstra)
    statistics = [moment for part in (cepstra, changes) for moment in (part.mean(-1), part.std(-1, correction=0))]
    return torch.cat(statistics, dim=1)[:, None, None]


def cepstral_extractor(coefficients: int) -> Extractor:
    """Return the extractor of [`cepstral_statistics`] for the feature cache."""
    return Extractor(
        {"cepstra": coefficients},
        (1, 1, 4 * coefficients),
        lambda frames: cepstral_statistics(frames, coefficients),
        "MFCCs",
    )


def fit_forest(features: np.ndarray, targets: np.ndarray, trees: int, seed: int) -> RandomForestClassifier:
    """Fit a random forest to features `(N, width)` and targets `(N, K)`, 0 or 1."""
    labels = targets.astype(int)
    if targets.shape[1] == 1:
        labels = labels[:, 0]
    elif (targets.sum(1) == 1).all():
        labels = labels.argmax(1)
    return RandomForestClassifier(trees, random_state=seed).fit(features, labels)


def forest_scores(forest: RandomForestClassifier, features: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the share of trees that vote for each class, float32 `(N, num_classes)`."""
    scores = np.zeros((len(features), num_classes), np.float32)
    if not len(features):
        return scores
    probabilities = forest.predict_proba(features)
    if isinstance(probabilities, list):
        # One table for each class, with a column for each value that occurs among its targets.
        for column, (table, values) in enumerate(zip(probabilities, forest.classes_, strict=True)):
            if 1 in values:
                scores[:, column] = table[:, list(values).index(1)]
    elif num_classes == 1:
        # The values 0 and 1 of the only class.
        scores[:, 0] = probabilities @ forest.classes_
    else:
        scores[:, forest.classes_] = probabilities
    return scores


def forest_size(forest: RandomForestClassifier) -> tuple[int, int]:
    """Return the number of nodes of all trees, and the largest number of comparisons per clip."""
    trees = [tree.tree_ for tree in forest.estimators_]
    return sum(tree.node_count for tree in trees), sum(tree.max_depth for tree in trees)
