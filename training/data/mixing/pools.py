"""The recordings of each split, and the mixer that makes its scenes."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from training.data.mixing.mixer import Mixer
from training.data.mixing.recordings import Recordings
from training.data.mixing.settings import SceneSettings
from training.data.mixing.splits import divide

logger = logging.getLogger(__name__)

# Returns the recordings of a source: its name, the split, and whether they need labels.
Opener = Callable[[str, str, bool], Recordings]


class Pool(NamedTuple):
    """The mixer of a split and its number of scenes."""

    mixer: Mixer
    num_scenes: int


def scene_id(split: str, index: int) -> str:
    """Return the name of a scene."""
    return f"{split}-{index:06d}"


def make_pools(settings: SceneSettings, open_recordings: Opener) -> dict[str, Pool]:
    """Divide recordings into splits that share no original. Backgrounds and impulse responses are divided alike.

    Args:
        settings: The settings of the scenes.
        open_recordings: Opens a source of recordings.

    Returns:
        The pools of the splits that have scenes.

    Raises:
        ValueError: If a split has too few classes or no recordings, or splits share an original recording.
    """
    parts = settings.parts()
    shares = {split: share for split, share in parts.items() if isinstance(share, float)}
    if shares:
        sounds = _divided(open_recordings(settings.sounds, settings.sounds_split, True), shares)
    else:
        sounds = {split: open_recordings(settings.sounds, str(names), True) for split, names in parts.items()}
        total = sum(map(len, sounds.values()))
        shares = {split: len(recordings) / total for split, recordings in sounds.items()}
    _check_division(settings.sounds, sounds)
    background = _shared_out(settings, settings.background, shares, open_recordings)
    responses = _shared_out(settings, settings.impulse_responses, shares, open_recordings)
    counts = _shared_counts(settings.clips, shares)
    return {
        split: Pool(Mixer(settings, sounds[split], background.get(split), responses.get(split)), count)
        for split, count in counts.items()
        if count
    }


def _shared_counts(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Divide a number of scenes by shares; splits with the largest remainders get the scenes left over."""
    counts = {split: int(share * total + 1e-9) for split, share in shares.items()}
    remainders = sorted(shares, key=lambda split: counts[split] - shares[split] * total)
    for split in remainders[: total - sum(counts.values())]:
        counts[split] += 1
    return counts


def _divided(recordings: Recordings, shares: dict[str, float]) -> dict[str, Recordings]:
    splits = divide(recordings.groups, recordings.labels, shares)
    return {split: recordings.select([i for i, name in enumerate(splits) if name == split]) for split in shares}


def _shared_out(
    settings: SceneSettings, source: str | None, shares: dict[str, float], open_recordings: Opener
) -> dict[str, Recordings]:
    """Return each split's part of recordings without labels. If there are too few, all splits have all of them."""
    if source is None:
        return {}
    recordings = open_recordings(source, settings.sounds_split, False)
    if len(set(recordings.groups)) >= len(shares):
        return _divided(recordings, shares)
    logger.warning("%s: fewer recordings than splits, so the splits share them.", source)
    return dict.fromkeys(shares, recordings)


def _check_division(source: str, sounds: dict[str, Recordings]) -> None:
    """Check that no split is empty and no original in two splits. Warn of classes that a split lacks.

    Raises:
        ValueError: If one is.
    """
    labels = {label for recordings in sounds.values() for label in recordings.labels}
    split_of: dict[str, str] = {}
    for split, recordings in sounds.items():
        if not len(recordings):
            raise ValueError(f"{source} has too few original recordings for the split {split}; leave it out.")
        for group in sorted(set(recordings.groups)):
            if split_of.setdefault(group, split) != split:
                raise ValueError(
                    f"{source}: the original recording {group!r} is in the splits {split_of[group]} and {split}. Give "
                    "shares instead of names of splits."
                )
        if missing := sorted(labels - set(recordings.labels)):
            logger.warning("%s: the split %s has no recording of %s.", source, split, ", ".join(missing))
