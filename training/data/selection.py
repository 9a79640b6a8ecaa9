"""Selection of the clips that take part in an epoch: a function of seed, epoch and the clip's name.

All processes and workers therefore agree without communication, for streams and for lists, and a resumed run selects
the same clips. Skipping a clip costs nothing if the source refers to files by path. A source that holds the audio
itself is read in full.
"""

from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from training.data.config import DataConfig
from training.data.seeding import generator_for
from training.data.tables import read_rows


class Selection(Protocol):
    """A rule that chooses clips by name."""

    def __call__(self, clip_id: str, epoch: int) -> bool:
        """Return whether the clip takes part in the epoch."""


def selections_of(config: DataConfig, seed: int) -> list[Selection]:
    """Return the rules that a configuration asks for. A clip takes part if all of them choose it."""
    selections: list[Selection] = []
    if config.hold_out:
        selections.append(partial(is_on_side, fraction=config.hold_out, held_out=config.held_out))
    if config.sample_weights is not None and config.clips_per_epoch is not None:
        selections.append(WeightedDraw(config.sample_weights, config.clips_per_epoch, seed))
    return selections


def is_on_side(clip_id: str, epoch: int, fraction: float, held_out: bool) -> bool:
    """Return whether a clip is on the given side of a division into two parts.

    The sides are the same in every epoch and for every seed, so that runs can be compared on them.

    Args:
        clip_id: The clip's name.
        epoch: Has no influence.
        fraction: Share of the clips that are held out, approximately.
        held_out: The side: the clips held out, or the others.
    """
    return (generator_for("hold out", clip_id).random() < fraction) == held_out


class WeightedDraw:
    """Weighted draw of a fixed number of clips per epoch, without replacement.

    Clip i has the key u_i^(1/w_i) with u_i uniform in [0, 1); the clips with the largest keys are drawn (Efraimidis
    and Spirakis, 2006). That equals drawing one clip after another, each with a probability proportional to its weight
    among the clips that are left.

    Args:
        path: Table with the columns `id` and `weight`, as `python -m training.class_weights` writes it.
        clips_per_epoch: Number of clips to draw.
        seed: Determines the draws.

    Raises:
        ValueError: If the table lacks a column, names a clip twice, has a negative or non-finite weight, or has fewer
            than `clips_per_epoch` clips of positive weight. Also if it has just as many and their weights differ.
    """

    def __init__(self, path: str | Path, clips_per_epoch: int, seed: int) -> None:
        self.path = path
        self.clips_per_epoch = clips_per_epoch
        self.seed = seed
        # Digests instead of names, because millions of names would take gigabytes in every worker.
        self.digests, self.weights = _read_weights(path)
        if clips_per_epoch > (drawable := np.count_nonzero(self.weights)):
            raise ValueError(f"{path} has {drawable} clips of positive weight; {clips_per_epoch} cannot be drawn.")
        if clips_per_epoch == drawable and len(np.unique(self.weights[self.weights > 0])) > 1:
            raise ValueError(
                f"clips_per_epoch={clips_per_epoch} draws all clips of positive weight in {path} in every epoch, so "
                "their different weights have no effect; draw fewer."
            )
        self._drawn: tuple[int, np.ndarray] | None = None

    def drawn(self, epoch: int) -> np.ndarray:
        """Return a mask over the table's rows, sorted by the clips' digests: True for the clips drawn."""
        if self._drawn is None or self._drawn[0] != epoch:
            uniform = generator_for(self.seed, "draw", epoch).random(len(self.weights))
            with np.errstate(divide="ignore"):
                keys = np.log(uniform) / self.weights
            chosen = np.zeros(len(keys), dtype=bool)
            chosen[np.argpartition(keys, -self.clips_per_epoch)[-self.clips_per_epoch :]] = True
            self._drawn = epoch, chosen
        return self._drawn[1]

    def __call__(self, clip_id: str, epoch: int) -> bool:
        """Return whether the clip is drawn for the epoch.

        Raises:
            ValueError: If the table does not name the clip.
        """
        digest = _digest(clip_id)
        row = int(np.searchsorted(self.digests, digest))
        if row == len(self.digests) or self.digests[row] != digest:
            raise ValueError(f"{self.path} has no weight for clip {clip_id}; make it anew for this source.")
        return bool(self.drawn(epoch)[row])


def _digest(clip_id: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(clip_id.encode(), digest_size=8).digest(), "little"))


@lru_cache(maxsize=1)
def _read_weights(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    names, rows = read_rows(Path(path))
    if not {"id", "weight"} <= set(names):
        raise ValueError(f"{path} must have the columns id and weight; it has {names}.")
    pairs = [(_digest(row["id"]), float(row["weight"])) for row in rows]
    digests = np.array([digest for digest, _ in pairs], dtype=np.uint64)
    weights = np.array([weight for _, weight in pairs])
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(f"{path} has weights that are negative or not finite.")
    order = np.argsort(digests)
    digests, weights = digests[order], weights[order]
    if (digests[1:] == digests[:-1]).any():
        raise ValueError(f"{path} names a clip twice.")
    return digests, weights
