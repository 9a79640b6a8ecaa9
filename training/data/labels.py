"""The classes of a labelled data set: their names, their order, and targets from clips' labels."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from modeling_sslam import SSLAMConfig
from modeling_sslam.common.labels import read_label_table
from training.data.config import DataError
from training.data.selection import selections_of
from training.data.sources import Source

# Names of the table of classes in published data sets and in the output of `training.prepare`: in a data set's folder
# or beside a listing.
LABEL_FILES = ("labels.csv", "label_descriptors.csv", "class_labels_indices.csv")


class LabelSet:
    """The classes in the order of a classifier's outputs.

    Args:
        names: Display names.
        ids: Other names that data may use, such as AudioSet's machine ids; `None` for a class without one.
    """

    def __init__(self, names: Sequence[str], ids: Sequence[str | None] = ()) -> None:
        self.names = list(names)
        self.index = {name: i for i, name in enumerate(self.names)}
        self.index |= {id_: i for i, id_ in enumerate(ids) if id_ is not None and id_ not in self.index}

    def __len__(self) -> int:
        """Return the number of classes."""
        return len(self.names)

    @classmethod
    def of_model(cls, config: SSLAMConfig) -> "LabelSet":
        """Return a model's classes."""
        names = {int(i): name for i, name in (config.id2label or {}).items()}
        return cls([names[i] for i in range(len(names))])

    @classmethod
    def of_file(cls, path: str | Path) -> "LabelSet":
        """Read a file with a line for each class: `index,mid,name`, `index,name,mid`, `index,name` or `name`.

        Raises:
            ValueError: If the file has another format.
        """
        table = read_label_table(Path(path))
        return cls([name for name, _ in table], [id_ for _, id_ in table])

    def encode(self, labels: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return the targets of B clips: float32 `(B, K)`, 0 or 1.

        Raises:
            DataError: If a label is not one of the classes.
        """
        targets = torch.zeros(len(labels), len(self))
        for i, names in enumerate(labels):
            for name in names:
                if name not in self.index:
                    raise DataError(
                        f"The data have the label {name!r}, which is none of the {len(self)} classes "
                        f"({', '.join(self.names[:5])}, ...). Name all classes in a label file, or mend the data."
                    )
                targets[i, self.index[name]] = 1.0
        return targets


class Survey(NamedTuple):
    """Counts over all labels of a source.

    Attributes:
        num_clips: Number of clips.
        counts: Number of clips by label.
        is_single_label: Whether every clip has exactly one label.
    """

    num_clips: int
    counts: Counter[str]
    is_single_label: bool


def survey(source: Source, seed: int = 0) -> Survey:
    """Count the clips and labels of a source's first epoch, without decoding audio.

    Args:
        source: Its configuration selects the clips that take part.
        seed: Determines a weighted draw of clips.
    """
    selections = selections_of(source.config, seed)
    num_clips, is_single_label = 0, True
    counts: Counter[str] = Counter()
    rows = tqdm(source.ids_and_labels(), desc="Reading labels", unit="clip", leave=False, mininterval=0.5)
    for id_, labels in rows:
        if all(select(id_, 0) for select in selections):
            num_clips += 1
            counts.update(labels)
            is_single_label &= len(labels) == 1
    return Survey(num_clips, counts, is_single_label)


def find_label_set(source: Source, label_file: str | None = None) -> LabelSet | None:
    """Find the classes of a source: in `label_file`, in a table beside the data or in the data's own features.

    Returns:
        The classes; `None` if there is none of these.

    Raises:
        ValueError: If the file cannot be read as a table of classes.
    """
    path = Path(source.config.source).expanduser()
    folder = path if path.is_dir() else path.parent
    files = [Path(label_file)] if label_file else [folder / name for name in LABEL_FILES if path.exists()]
    found = next((file for file in files if label_file or file.is_file()), None)
    if found is not None:
        return LabelSet.of_file(found)
    return LabelSet(source.columns.label_names) if source.columns.label_names else None
