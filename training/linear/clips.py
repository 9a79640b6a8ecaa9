"""Clips with cached features, and their division into training, validation and test clips."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from training.data.selection import is_on_side
from training.linear.config import LinearEvalConfig
from training.linear.features import FeatureSet
from training.linear.heads import Head
from training.run.config import TrainingError


class Clips:
    """Clips of one or several splits, with their cached features.

    Args:
        sets: The splits.
        choose: Returns whether the clip with an id belongs to them.
    """

    def __init__(self, sets: Sequence[FeatureSet], choose: Callable[[str], bool] = lambda id_: True) -> None:
        self.sets = sets
        self.rows = [np.array([choose(id_) for id_ in features.ids]).nonzero()[0] for features in sets]

    def __len__(self) -> int:
        """Return the number of clips."""
        return sum(map(len, self.rows))

    def column(self, name: str) -> list[Any]:
        """Return the `ids`, `labels` or `groups` of all clips."""
        return [getattr(features, name)[i] for features, rows in zip(self.sets, self.rows, strict=True) for i in rows]

    def groups(self) -> list[Any] | None:
        """Return the values of the group column; `None` if the data have none."""
        return self.column("groups") if self.group_column else None

    @property
    def group_column(self) -> str | None:
        """The name of the group column, if there is one."""
        return self.sets[0].group_column

    def pooled(self, head: Head) -> torch.Tensor:
        """Return the input of a head: float32 `(len(self), width)`; for layer "all", `(len(self), layers, width)`."""
        layer: Any = head.layer if isinstance(head.layer, int) else slice(None)
        parts = [
            # One indexing with both a list and a slice would move the axes.
            features.pooled[:, layer][..., head.columns, :][rows]
            for features, rows in zip(self.sets, self.rows, strict=True)
        ]
        values = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        return values.flatten(1 if head.layer == "concat" else -2)

    def values_of(self, head: Head) -> int:
        """Return the number of values per clip that a head on pooled features reads."""
        _, num_layers, _, hidden_size = self.sets[0].pooled.shape
        return (1 if isinstance(head.layer, int) else num_layers) * len(head.columns) * hidden_size

    @property
    def token_shape(self) -> tuple[int, int]:
        """Number of patches and width of a clip's tokens in one layer."""
        tokens = self.sets[0].tokens
        if tokens is None:
            raise ValueError("These clips were read without patch tokens.")
        return tokens.shape[2], tokens.shape[3]

    def tokens(self, layers: Sequence[int], rows: np.ndarray) -> np.ndarray:
        """Return patch tokens of some clips: float16 `(len(layers), len(rows), patches, width)`.

        Args:
            layers: The layers.
            rows: Numbers of the clips, from 0 to `len(self) - 1`.
        """
        result = np.empty((len(layers), len(rows), *self.token_shape), np.float16)
        first = 0
        for features, own in zip(self.sets, self.rows, strict=True):
            here = ((rows >= first) & (rows < first + len(own))).nonzero()[0]
            if features.tokens is not None and len(here):
                columns = [features.token_layers.index(layer) for layer in layers]
                clips = own[rows[here] - first]
                for i, column in enumerate(columns):
                    result[i, here] = features.tokens[clips, column]
            first += len(own)
        return result


class Round(NamedTuple):
    """The clips of one fit and its test. `validation` is empty if there is no validation."""

    train: Clips
    validation: Clips
    test: Clips


def no_clips(sets: Sequence[FeatureSet]) -> Clips:
    """Return an empty selection from some splits."""
    return Clips(sets, lambda id_: False)


def make_rounds(config: LinearEvalConfig, sets: dict[str, FeatureSet]) -> dict[str, Round]:
    """Divide clips into rounds, by test split: one round, or one per fold.

    Args:
        config: The settings, which give each split its purpose.
        sets: The features of "train" and, if they exist, "validation" and "test". With folds, the features of each.

    Raises:
        TrainingError: If `data.hold_out` holds out none of the training clips.
    """

    def hold_out(train: list[FeatureSet]) -> tuple[Clips, Clips]:
        rest, held_out = (
            Clips(train, partial(is_on_side, epoch=0, fraction=config.data.hold_out, held_out=side))
            for side in (False, True)
        )
        if config.data.hold_out and not len(held_out):
            raise TrainingError(
                f"data.hold_out={config.data.hold_out:g} holds out none of the {len(rest)} training clips; hold out "
                "a larger share."
            )
        return rest, held_out

    if config.folds:
        return {
            fold: Round(*hold_out([sets[name] for name in config.folds if name != fold]), Clips([sets[fold]]))
            for fold in config.folds
        }
    train = [sets["train"]]
    parts = hold_out(train) if config.data.hold_out else (Clips(train), Clips([sets["validation"]]))
    if config.test_split is None:
        return {"held out" if config.data.hold_out else config.validation_split: Round(*parts, parts[1])}
    return {config.test_split: Round(*parts, Clips([sets["test"]]))}
