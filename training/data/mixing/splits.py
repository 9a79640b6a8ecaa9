"""Division of recordings into splits that share no group."""

from collections import Counter
from collections.abc import Mapping, Sequence

from training.data.seeding import generator_for


def divide(groups: Sequence[str], labels: Sequence[str], shares: Mapping[str, float]) -> list[str]:
    """Assign recordings to splits, whole groups at a time and in about the same proportions for each label.

    The assignment depends on the names of the groups and on the shares, and on no seed: data sets with different seeds
    have the same recordings in their test splits.

    Args:
        groups: Group of each recording.
        labels: Label of each recording. A group with several labels counts for its most frequent one.
        shares: Share of the recordings by split; positive numbers that add up to 1.

    Returns:
        The split of each recording. A label with fewer groups than splits is missing in some splits.
    """
    members: dict[str, Counter[str]] = {}
    for group, label in zip(groups, labels, strict=True):
        members.setdefault(group, Counter())[label] += 1
    by_label: dict[str, list[str]] = {}
    for group in sorted(members, key=lambda group: (generator_for("division", group).random(), group)):
        counts = members[group]
        by_label.setdefault(min(counts, key=lambda label: (-counts[label], label)), []).append(group)
    split_of: dict[str, str] = {}
    for label_groups in by_label.values():
        total = sum(members[group].total() for group in label_groups)
        missing = {split: share * total for split, share in shares.items()}
        empty = list(shares)
        for i, group in enumerate(label_groups):
            # The last groups go to splits that would stay empty.
            candidates = empty if len(label_groups) - i <= len(empty) else list(shares)
            split = max(candidates, key=missing.__getitem__)
            split_of[group] = split
            missing[split] -= members[group].total()
            empty = [name for name in empty if name != split]
    return [split_of[group] for group in groups]
