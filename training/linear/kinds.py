"""Fits of heads of all kinds on the cached features of clips.

[`fit_kinds`] takes heads of any kinds and returns a [`HeadResult`] for each. Heads of the same kind and width are
fitted together.
"""

from collections.abc import Callable, Sequence

import torch

from training.data.config import DataError
from training.linear.clips import Clips
from training.linear.fitting import HeadResult, Parts, Setup
from training.linear.heads import Head
from training.linear.plain_fits import fit_few_shots, fit_forests, fit_neighbours
from training.linear.pooled_fits import fit_layer_sums, fit_linear, fit_ridges
from training.linear.token_fits import fit_attentive, fit_prototypes


def fit_kinds(
    heads: Sequence[Head],
    train: Clips,
    validation: Clips,
    tests: Sequence[Clips],
    setup: Setup,
    description: str,
) -> list[HeadResult]:
    """Fit all heads on the training clips, choose their epochs by the validation clips, and test them.

    Args:
        heads: The heads.
        train: The training clips.
        validation: The validation clips. If there are none, the last epoch is used.
        tests: Sets of test clips.
        setup: Settings and task.
        description: Title of the progress bar.

    Raises:
        TrainingError: If a head's loss is not finite.
        DataError: If the clips do not have the labels that the task needs.
    """
    clips = (train, validation, *tests)
    parts = Parts(clips, [target.to(setup.device) for target in encode_targets(clips, setup)])
    results: dict[Head, HeadResult] = {}
    for kind in dict.fromkeys(head.kind for head in heads):
        of_kind = [head for head in heads if head.kind == kind]
        results |= {result.head: result for result in FITS[kind](of_kind, parts, setup, description)}
    return [results[head] for head in heads]


def encode_targets(clips: Sequence[Clips], setup: Setup) -> list[torch.Tensor]:
    """Return the targets of training, validation and test clips: `(N, K)` each.

    Raises:
        DataError: If no clip of a part has a label, or if a clip of a single-label task does not have one label.
    """
    targets = [setup.labels.encode(part.column("labels")) for part in clips]
    names = ["train", "validation", *["test"] * (len(clips) - 2)]
    for name, part in zip(names, targets, strict=True):
        if len(part) and not part.any():
            raise DataError(f"None of the {len(part)} {name} clips has a label.")
        odd = (part.sum(1) != 1).sum().item()
        if setup.problem_type == "single_label_classification" and odd:
            raise DataError(
                f"{odd} of the {len(part)} {name} clips do not have one label each. If clips can have several, set "
                "problem_type=multi."
            )
    return targets


Fit = Callable[[Sequence[Head], Parts, Setup, str], list[HeadResult]]
FITS: dict[str, Fit] = {
    "linear": fit_linear,
    "ridge": fit_ridges,
    "layers": fit_layer_sums,
    "attentive": fit_attentive,
    "prototypes": fit_prototypes,
    "knn": fit_neighbours,
    "few_shot": fit_few_shots,
    "forest": fit_forests,
}
