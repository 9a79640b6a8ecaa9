"""TODO."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from training.data.selection import is_on_side
from training.linear.config import LinearEvalConfig
from training.linear.features import FeatureSet
from training.linear.heads import Head


class Clips:
    """Some of the clips of some splits, with their cached features.

    Args:
        choose: Of all clips of the splits those that it chooses by name.
    """

    def __init__(self, sets: Sequence[FeatureSet], choose: Callable[[str], bool] = lambda id_: True) -> None:
        self.sets = sets
        self.rows = [np.array([choose(id_) for id_ in features.ids]).nonzero()[0] for features in sets]

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def column(self, name: str) -> list[Any]:
        """`ids`, `labels` or, if there are any, `groups` of all clips."""
        return [getattr(features, name)[i] for features, rows in zip(self.sets, self.rows, strict=True) for i in rows]

    def groups(self) -> list[Any] | None:
        """Values of the group column; `None` if the data have none."""
        return self.column("groups") if self.group_column else None

    @property
    def group_column(self) -> str | None:
        return self.sets[0].group_column

    def pooled(self, head: Head) -> torch.Tensor:
        """float32 `(len(self), width)`."""
        parts = [
            features.pooled[:, head.layer, head.columns][rows]
            for features, rows in zip(self.sets, self.rows, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32)).flatten(1)


class Round(NamedTuple):
    """The clips of one fit and its test; without validation that part is empty."""

    train: Clips
    validation: Clips
    test: Clips


def make_rounds(config: LinearEvalConfig, sets: dict[str, FeatureSet]) -> dict[str, Round]:
    """The clips to train, validate and test with, by test split: one round, or one for each fold."""

    def split_by_name(train: list[FeatureSet]) -> tuple[Clips, Clips]:
        rest, held_out = (partial(is_on_side, epoch=0, fraction=config.data.hold_out, held_out=x) for x in (0, 1))
        return Clips(train, rest), Clips(train, held_out)

    if config.folds:
        return {
            fold: Round(*split_by_name([sets[name] for name in config.folds if name != fold]), Clips([sets[fold]]))
            for fold in config.folds
        }
    train = [sets["train"]]
    parts = split_by_name(train) if config.data.hold_out else (Clips(train), Clips([sets["validation"]]))
    if config.test_split is None:
        return {"held out" if config.data.hold_out else config.validation_split: Round(*parts, parts[1])}
    return {config.test_split: Round(*parts, Clips([sets["test"]]))}
