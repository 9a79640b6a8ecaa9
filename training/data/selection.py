"""Which clips of a source take part in an epoch: a function of seed, epoch and the clip's name.

So every process and every worker decides alike without asking another, on streams as on lists, and a resumed run
decides as before. A source that refers to its files by path passes over a clip for nothing; one that holds the audio
itself is still read through.
"""

import csv
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from training.data.seeding import generator_for

if TYPE_CHECKING:
    from training.data.config import DataConfig


class Selection(Protocol):
    def __call__(self, clip_id: str, epoch: int) -> bool:
        """Whether the clip takes part in the epoch."""


def selections_of(config: "DataConfig", seed: int) -> list[Selection]:
    """What a configuration asks for; a clip takes part if all of these say so."""
    selections: list[Selection] = []
    if config.hold_out:
        # The same clips for every seed, so that runs can be compared on them.
        selections.append(
            lambda id_, _: (generator_for("hold out", id_).random() < config.hold_out) == config.held_out
        )
    if config.sample_weights is not None:
        selections.append(WeightedDraw(config.sample_weights, config.clips_per_epoch, seed))
    return selections


def is_on_side(clip_id: str, epoch: int, fraction: float, held_out: bool) -> bool:
    """Whether a clip is on the side asked for of a split in two, where about `fraction` of the clips is held out: the
    same clips in every epoch and for every seed, so that runs can be compared on them."""
    return (generator_for("hold out", clip_id).random() < fraction) == held_out


class WeightedDraw:
    """Draws a fixed number of clips per epoch without replacement, by weights.

    Clip i has the key u_i^(1/w_i) with u_i uniform in [0, 1), and the clips with the largest keys are drawn
    (Efraimidis and Spirakis, 2006): one after another, each with probability in proportion to its weight among those
    that are left.

    Args:
        path: Table with the columns `id` and `weight`, as `python -m training.class_weights` writes it.
        clips_per_epoch: How many are drawn.

    Raises:
        ValueError: If the table is not such, names a clip twice, or has fewer clips of positive weight than are drawn.
    """

    def __init__(self, path: str | Path, clips_per_epoch: int, seed: int) -> None:
        self.path = path
        self.clips_per_epoch = clips_per_epoch
        self.seed = seed
        # Millions of names would take gigabytes in every worker.
        self.digests, self.weights = _read_weights(path)
        if clips_per_epoch > (drawable := np.count_nonzero(self.weights)):
            raise ValueError(f"{path} has {drawable} clips of positive weight; {clips_per_epoch} cannot be drawn.")
        self._drawn: tuple[int, np.ndarray] | None = None

    def drawn(self, epoch: int) -> np.ndarray:
        """For every row of the table, in the order of the clips' digests, whether it is drawn."""
        if self._drawn is None or self._drawn[0] != epoch:
            uniform = generator_for(self.seed, "draw", epoch).random(len(self.weights))
            with np.errstate(divide="ignore"):
                keys = np.log(uniform) / self.weights
            chosen = np.zeros(len(keys), dtype=bool)
            chosen[np.argpartition(keys, -self.clips_per_epoch)[-self.clips_per_epoch :]] = True
            self._drawn = epoch, chosen
        return self._drawn[1]

    def __call__(self, clip_id: str, epoch: int) -> bool:
        digest = _digest(clip_id)
        row = int(np.searchsorted(self.digests, digest))
        if row == len(self.digests) or self.digests[row] != digest:
            raise ValueError(f"{self.path} has no weight for clip {clip_id}; make it anew for this source.")
        return bool(self.drawn(epoch)[row])


def _digest(clip_id: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(clip_id.encode(), digest_size=8).digest(), "little"))


@lru_cache(maxsize=1)
def _read_weights(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"id", "weight"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} must have the columns id and weight; it has {reader.fieldnames}.")
        pairs = [(_digest(row["id"]), float(row["weight"])) for row in reader]
    digests = np.array([digest for digest, _ in pairs], dtype=np.uint64)
    weights = np.array([weight for _, weight in pairs])
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(f"{path} has weights that are negative or not finite.")
    order = np.argsort(digests)
    digests, weights = digests[order], weights[order]
    if (digests[1:] == digests[:-1]).any():
        raise ValueError(f"{path} names a clip twice.")
    return digests, weights
