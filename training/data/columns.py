"""The columns of a source that training reads: audio, clip id, labels, group."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modeling_sslam.common.encoded_audio import find_audio_column, find_id_column
from training.data.config import DataConfig

# Candidates for a column that is "auto", in order of preference. AudioSet's `labels` are ids of its ontology, which
# label files translate to names.
LABEL_COLUMNS = ("labels", "label", "category", "class", "target")
GROUP_COLUMNS = ("num_sources",)


class Columns(NamedTuple):
    """Names of the columns that training reads; `None` for a column that the source lacks or that nobody asked for.

    Attributes:
        audio: A string column of paths, or a struct of `bytes` and `path`.
        id: Clip names.
        label: A label, or a list of them.
        group: The value by which results are reported.
        label_names: Class names of an integer label column.
    """

    audio: str
    id: str | None = None
    label: str | None = None
    group: str | None = None
    label_names: Sequence[str] | None = None

    @property
    def names(self) -> list[str]:
        """All columns, each once."""
        given = (self.audio, self.id, self.label, self.group)
        return list(dict.fromkeys(name for name in given if name is not None))


def find_column(
    source: str | Path, names: Sequence[str], wanted: str | None, candidates: Sequence[str], key: str
) -> str | None:
    """Return the column that a configuration key asks for.

    Args:
        source: The source, for the error message.
        names: The columns that the source has.
        wanted: The key's value: a column, "auto" for the first of `candidates` that exists, or `None`.
        candidates: The usual names.
        key: The key, for the error message.

    Raises:
        ValueError: If there is no such column.
    """
    if wanted is None or wanted in names:
        return wanted
    found = next((name for name in candidates if name in names), None) if wanted == "auto" else None
    if found is None:
        asked = "of the usual names" if wanted == "auto" else repr(wanted)
        raise ValueError(f"{source} has no column {asked}; set {key} to one of those it has: {', '.join(names)}.")
    return found


def find_group_column(source: str | Path, names: Sequence[str], wanted: str | None) -> str | None:
    """Return the group column; `None` for "auto" if the source has no groups.

    Raises:
        ValueError: If `wanted` names a column that does not exist.
    """
    if wanted == "auto":
        return next((name for name in GROUP_COLUMNS if name in names), None)
    return find_column(source, names, wanted, (), "group_column")


def find_columns(config: DataConfig, features: Mapping[str, Any] | None) -> Columns:
    """Find the columns of a dataset.

    Args:
        config: Says which columns to use.
        features: The dataset's features by column; `None` if they are unknown before the data are read.

    Raises:
        ValueError: If a column does not exist or the audio column is ambiguous. The message lists the columns.
    """
    if features is None:
        raise ValueError(f"The columns of {config.source} are unknown until it is read; set streaming to false.")
    names = list(features)
    columns = Columns(
        audio=find_audio_column(config.source, features, config.audio_column, "audio_column"),
        id=find_id_column(config.source, features, config.id_column),
        label=find_column(config.source, names, config.label_column, LABEL_COLUMNS, "label_column"),
        group=find_group_column(config.source, names, config.group_column),
    )
    if columns.label is None:
        return columns
    label = features[columns.label]
    return columns._replace(label_names=getattr(getattr(label, "feature", label), "names", None))
