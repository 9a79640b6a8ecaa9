"""The classes of a labelled data set: their names, their order, and targets out of a clip's labels."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from modeling_sslam import SSLAMConfig
from modeling_sslam.common.labels import read_label_table
from training.data.config import DataConfig, DataError
from training.data.selection import Selection
from training.data.sources import Source

# What published data sets and `training.prepare` call the table of classes, in a data set's folder or beside a list.
LABEL_FILES = ("labels.csv", "label_descriptors.csv", "class_labels_indices.csv")


class LabelSet:
    """The classes in the order of a classifier's outputs.

    Args:
        names: Their display names.
        ids: Other names that data may use, such as AudioSet's machine ids: one for each class, or `None`.
    """

    def __init__(self, names: Sequence[str], ids: Sequence[str | None] = ()) -> None:
        self.names = list(names)
        self.index = {name: i for i, name in enumerate(self.names)}
        self.index |= {id_: i for i, id_ in enumerate(ids) if id_ is not None and id_ not in self.index}

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of_model(cls, config: SSLAMConfig) -> "LabelSet":
        """The classes that a model tells apart."""
        return cls([config.id2label[i] for i in range(config.num_labels)])

    @classmethod
    def of_file(cls, path: str | Path) -> "LabelSet":
        """From a file with a line for each class: `index,mid,name`, `index,name` or `name`.

        Raises:
            ValueError: If it is not such a file.
        """
        table = read_label_table(Path(path))
        return cls([name for name, _ in table], [id_ for _, id_ in table])

    def encode(self, labels: Sequence[Sequence[str]]) -> torch.Tensor:
        """Targets of B clips: float32 of 0 and 1, of shape `(B, K)`.

        Raises:
            DataError: If a label is none of the classes.
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
    """What one look at all labels of a source tells."""

    num_clips: int
    counts: Counter[str]
    # Whether every clip has just one.
    is_single_label: bool


def survey(source: Source, selections: Iterable[Selection] = (), description: str = "Reading labels") -> Survey:
    """Counts a source's clips and labels, in its first epoch, without decoding any audio."""
    num_clips, counts, is_single_label = 0, Counter(), True
    for id_, labels in tqdm(source.ids_and_labels(), desc=description, unit="clip", leave=False, mininterval=0.5):
        if all(select(id_, 0) for select in selections):
            num_clips += 1
            counts.update(labels)
            is_single_label &= len(labels) == 1
    return Survey(num_clips, counts, is_single_label)


def find_label_set(config: DataConfig, source: Source, label_file: str | None = None) -> LabelSet | None:
    """The classes as the user, the data set's folder or its features name them; `None` if nothing does.

    Raises:
        ValueError: If the file that should name them does not.
    """
    path = Path(config.source).expanduser()
    folder = path if path.is_dir() else path.parent
    files = [Path(label_file)] if label_file else [folder / name for name in LABEL_FILES if path.exists()]
    found = next((file for file in files if label_file or file.is_file()), None)
    if found is not None:
        return LabelSet.of_file(found)
    return LabelSet(source.label_names) if source.label_names else None
